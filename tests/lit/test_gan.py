"""Two networks learn by two optimizers, and only the generator's steps count."""

import copy
from functools import partial

import pytest
import torch

from praxino.errors import CheckpointError, ConfigError
from praxino.lit.optim import renew, warmup_cosine
from praxino.losses.vae import VAELoss
from praxino.models.causalvae import CausalVAE
from training import Data, load, make_adversary, make_module, make_net, rows, train


def sgd(lr: float) -> partial:
    return partial(torch.optim.SGD, lr=lr)


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def test_steps_of_the_generator_count_alone(tmp_path):
    module = make_module(adversary=make_adversary(start=4))
    trainer = train(tmp_path, steps=10, module=module, every=5)
    assert module.step == trainer.global_step == 10
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("*.ckpt")) == [
        "step-00000005.ckpt",
        "step-00000010.ckpt",
    ]
    checkpoint = load(tmp_path / "checkpoints" / "step-00000010.ckpt")
    made = [{int(state["step"]) for state in o["state"].values()} for o in checkpoint["optimizer_states"]]
    assert made == [{10}, {6}]
    assert checkpoint["ema"]["updates"] == 10
    assert not any("adversary" in name for name in checkpoint["ema"]["weights"])
    judged = ["disc_loss" in "".join(row) for row in rows(tmp_path)]
    assert judged == [False] * 4 + [True] * 6


def test_players_in_turns(tmp_path):
    module = make_module(adversary=make_adversary(start=3, alternate=True))
    trainer = train(tmp_path, steps=6, module=module)
    assert (module.step, module.passes, trainer.global_step) == (6, 3, 6)
    kinds = ["D" if "train/disc_loss" in row else "G" for row in rows(tmp_path)]
    assert "".join(kinds) == "GGGDGDGDG"


@pytest.mark.parametrize("options", [{}, {"norm": "batch"}, {"alternate": True}])
def test_accumulating_two_batches_of_two_equals_one_of_four(tmp_path, options):
    """The adaptive weight is a ratio of norms, so it is of its own batch: constant here."""
    results = []
    adversary = make_adversary(adaptive=None, **options)
    for accumulate, batch in ((2, 2), (1, 4)):
        module = make_module(
            adversary=copy.deepcopy(adversary),
            optimizer=sgd(0.1),
            scheduler=None,
            accumulate=accumulate,
            sample_posterior=False,
        ).double()
        train(tmp_path / str(batch), steps=2, module=module, data=Data(batch=batch), precision="64-true")
        results.append((weights(module.net), weights(module.adversary)))
    for a, b in zip(*results, strict=True):
        if options.get("norm") == "batch":  # statistics of other batches
            assert not torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_clipping_holds_both(tmp_path):
    module = make_module(adversary=make_adversary(), optimizer=sgd(1.0), scheduler=None, clip=0.01)
    before = weights(module.net), weights(module.adversary)
    train(tmp_path, steps=1, module=module)
    row = rows(tmp_path)[0]
    assert min(row["train/grad_norm"], row["train/disc_grad_norm"]) > 0.02
    for old, new in zip(before, (weights(module.net), weights(module.adversary)), strict=True):
        assert (new - old).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_the_adversary_does_not_learn_from_the_generator(tmp_path):
    module = make_module(adversary=make_adversary(), adversary_optimizer=sgd(0.0))
    before = weights(module.adversary)
    train(tmp_path, steps=2, module=module)
    assert torch.equal(weights(module.adversary), before)


def test_the_game_changes_the_generator_only_from_its_start(tmp_path):
    found = []
    for adversary in (None, make_adversary(start=2)):
        out = tmp_path / str(len(found))
        train(out, steps=4, module=make_module(adversary=adversary))
        found.append([row["train/l1"] for row in rows(out)])
    assert found[0][:3] == found[1][:3]  # the loss of a step is of the weights before it
    assert found[0][3] != found[1][3]


@pytest.mark.parametrize("adaptive", ["wfvae", None])
def test_the_generator_learns_from_the_weighted_sum(adaptive):
    """Also where the gradients are taken at the reconstruction, and the weight balances them at the last layer."""
    module = make_module(adversary=make_adversary(weight=0.5, adaptive=adaptive)).double()
    x = 2 * torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    weights = list(module.net.parameters())

    output = module.net(x, sample=False)
    terms, adversarial = module.loss(x, output), module.adversary.generator_loss(output.recon)
    norms = [
        torch.autograd.grad(term, module.net.last_layer, retain_graph=True)[0].norm()
        for term in (terms["nll"], adversarial)
    ]
    weight = 0.5 * (norms[0] / (norms[1] + 1e-6) if adaptive else 1.0)
    loss = terms["loss"] + weight * adversarial
    expected = torch.autograd.grad(loss, weights)

    objective, values = module.generator_loss(x, module.net(x, sample=False))
    assert values["adversarial_weight"].item() == pytest.approx(float(weight), rel=1e-9)
    assert values["loss"].item() == pytest.approx(loss.item(), rel=1e-9)
    for found, gradient in zip(torch.autograd.grad(objective, weights), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


def test_lecam_remembers_the_logits(tmp_path):
    module = make_module(adversary=make_adversary(lecam=0.1))
    train(tmp_path, steps=3, module=module, log_every_n_steps=100)
    assert module.adversary.real_mean.item() != 0


@pytest.mark.parametrize("parts", [["encoder"], ["decoder.mid", "encoder.conv_out"]])
def test_frozen_parts_stay(tmp_path, parts):
    module = make_module(freeze=parts, adversary=make_adversary())
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    train(tmp_path, steps=2, module=module)
    for name, parameter in module.net.named_parameters():
        assert torch.equal(parameter, before[name]) == any(name.startswith(f"{part}.") for part in parts), name


@pytest.mark.parametrize(("parts", "message"), [(["encodr"], "names no weights"), (["encoder", "decoder"], "nothing")])
def test_wrong_parts_to_freeze(parts, message):
    with pytest.raises(ConfigError, match=message):
        make_module(freeze=parts)


def test_a_frozen_last_layer_cannot_weigh_the_adversary():
    with pytest.raises(ConfigError, match=r"use model\.adversary\.adaptive=null"):
        make_module(freeze=["decoder"], adversary=make_adversary())
    make_module(freeze=["decoder"], adversary=make_adversary(adaptive=None))


def test_the_encoder_is_frozen_with_the_layer_beside_the_latents():
    net = CausalVAE(hidden_size=8, hidden_size_mult=[1, 1, 1, 1], num_res_blocks=1, norm_type="layernorm")
    make_module(net=net, loss=VAELoss(wavelet=0.0), freeze=["encoder"])
    frozen = {name.partition(".")[0] for name, p in net.named_parameters() if not p.requires_grad}
    trained = {name.partition(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert (frozen, trained) == ({"encoder", "quant_conv"}, {"decoder", "post_quant_conv"})


def test_the_wavelet_loss_needs_wavelets():
    net = CausalVAE(hidden_size=8, hidden_size_mult=[1, 1, 1, 1], num_res_blocks=1, norm_type="layernorm")
    with pytest.raises(ConfigError, match=r"use model=causalvae .* or model\.loss\.wavelet=0"):
        make_module(net=net)


def test_a_pretrained_network_is_not_drawn_anew():
    net = make_net()
    net.pretrained = True
    with pytest.raises(ConfigError, match="use init=default"):
        make_module(net=net, init="fan_in")


@pytest.mark.parametrize(
    "other",
    [
        {"optimizer": sgd(0.1)},
        {"decay": "matrices"},
        {"freeze": ["encoder"]},
        {"adversary_optimizer": sgd(0.1)},
    ],
)
def test_state_of_another_optimizer_is_refused(tmp_path, other):
    train(tmp_path, steps=1, module=make_module(adversary=make_adversary()))
    path = tmp_path / "checkpoints" / "step-00000001.ckpt"
    with pytest.raises(CheckpointError, match="of another optimizer"):
        train(tmp_path, steps=2, module=make_module(adversary=make_adversary(), **other), resume=path)


@pytest.mark.parametrize("scheduler", [None, partial(warmup_cosine, total=10)])
def test_options_of_an_optimizer_may_change_on_resume(tmp_path, caplog, scheduler):
    """The rate is the new one, at the same place of its schedule; nothing else is another run's."""

    def module(lr, **options):
        return make_module(optimizer=partial(torch.optim.AdamW, lr=lr, **options), scheduler=scheduler)

    caplog.set_level("INFO", logger="praxino")
    train(tmp_path / "whole", steps=4, module=module(1e-3))
    whole = [row["train/lr"] for row in rows(tmp_path / "whole")]
    train(tmp_path, steps=2, module=module(1e-3))
    path = tmp_path / "checkpoints" / "step-00000002.ckpt"
    for again in (whole, [lr / 10 for lr in whole]):
        other = module(1e-3 * again[0] / whole[0], weight_decay=0.2 if again is not whole else 0.01)
        train(tmp_path, steps=4, module=other, resume=path)
        assert [row["train/lr"] for row in rows(tmp_path)][2:] == pytest.approx(again[2:], rel=1e-12)
        group = load(tmp_path / "checkpoints" / "step-00000004.ckpt")["optimizer_states"][0]["param_groups"][0]
        assert group["weight_decay"] == (0.01 if again is whole else 0.2)
        changes = [r.getMessage() for r in caplog.records if "resumed with another" in r.getMessage()]
        assert len(changes) == (0 if again is whole else 2)
    assert changes[0] == "resumed with another optimizer: lr 0.001, now 0.0001"


def test_a_changed_schedule_acts_at_once(tmp_path):
    def module(total):
        return make_module(scheduler=partial(warmup_cosine, total=total))

    train(tmp_path / "whole", steps=4, module=module(4))
    train(tmp_path, steps=2, module=module(2))
    train(tmp_path, steps=4, module=module(4), resume=tmp_path / "checkpoints" / "step-00000002.ckpt")
    rates = [[row["train/lr"] for row in rows(run)][2:] for run in (tmp_path, tmp_path / "whole")]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "option"),
    [
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
        (torch.optim.RMSprop, {"centered": True}),
    ],
)
def test_an_option_that_needs_a_state_is_refused_on_resume(tmp_path, optimizer, option):
    train(tmp_path, steps=1, module=make_module(optimizer=partial(optimizer, lr=1e-3)))
    other = make_module(optimizer=partial(optimizer, lr=1e-3, **option))
    with pytest.raises(CheckpointError, match=f"{next(iter(option))}=.* needs a state that the checkpoint lacks"):
        train(tmp_path, steps=2, module=other, resume=tmp_path / "checkpoints" / "step-00000001.ckpt")


def test_a_momentum_whose_state_is_made_when_it_is_needed_may_begin_on_resume(tmp_path):
    train(tmp_path, steps=1, module=make_module(optimizer=partial(torch.optim.SGD, lr=1e-3)))
    other = make_module(optimizer=partial(torch.optim.SGD, lr=1e-3, momentum=0.9))
    train(tmp_path, steps=2, module=other, resume=tmp_path / "checkpoints" / "step-00000001.ckpt")


def test_pairs_that_come_back_as_lists_are_no_change():
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], betas=(0.9, 0.99)).state_dict()["param_groups"]
    stored = [{**group, "betas": list(group["betas"])} for group in fresh]
    assert renew(stored, fresh, None) == []
    assert stored[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize("adversary", [False, True])
def test_recomputed_activations_change_nothing(tmp_path, adversary):
    found = []
    for recompute in (False, True):
        out = tmp_path / str(recompute)
        module = make_module(checkpoint_activations=recompute, adversary=make_adversary() if adversary else None)
        train(out, steps=3, module=module)
        found.append((rows(out), weights(module.net)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_a_checkpoint_without_an_adversary_is_not_resumed_with_one(tmp_path):
    train(tmp_path, steps=1)
    with pytest.raises(CheckpointError, match=r"1 optimizer_states, this run has 2: .* weights=PATH"):
        train(
            tmp_path,
            steps=2,
            module=make_module(adversary=make_adversary()),
            resume=tmp_path / "checkpoints" / "step-00000001.ckpt",
        )


def test_a_bad_step_of_the_adversary_is_skipped_for_both(tmp_path):
    module = make_module(adversary=make_adversary(), optimizer=sgd(0.1), scheduler=None)
    real = module.adversary.discriminator_loss
    calls = []

    def poisoned(*args, **kwargs):
        calls.append(1)
        terms = real(*args, **kwargs)
        return {**terms, "loss": terms["loss"] * float("nan")} if len(calls) == 2 else terms

    module.adversary.discriminator_loss = poisoned
    train(tmp_path, steps=3, module=module)
    assert (module.step, module.skipped, len(calls)) == (3, 1, 4)
    assert weights(module).isfinite().all()
