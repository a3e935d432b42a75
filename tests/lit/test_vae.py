"""The training step counts, accumulates, clips, logs and guards as it says."""

import json
import math
from functools import partial

import pytest
import torch

from praxino.callbacks.guard import FiniteGuard
from praxino.errors import CheckpointError, ConfigError, NonFiniteError
from praxino.lit.optim import warmup_constant
from training import Clips, Data, Tape, load, make_module, rows, train


def sgd(lr: float) -> partial:
    return partial(torch.optim.SGD, lr=lr)


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.net.parameters()])


def test_ten_steps_are_ten_steps(tmp_path):
    module = make_module()
    trainer = train(tmp_path, steps=10, module=module)
    assert module.step == trainer.global_step == 10
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 11))
    checkpoint = load(tmp_path / "checkpoints" / "step-00000010.ckpt")
    assert checkpoint["global_step"] == checkpoint["train"]["step"] == checkpoint["praxino"]["step"] == 10
    assert {int(state["step"]) for state in checkpoint["optimizer_states"][0]["state"].values()} == {10}
    assert checkpoint["ema"]["updates"] == 10


def test_accumulated_steps_count_once(tmp_path):
    module, tape = make_module(accumulate=3), Tape()
    trainer = train(tmp_path, steps=4, module=module, callbacks=(tape,))  # 6 batches an epoch
    assert module.step == trainer.global_step == 4
    assert len(tape.seen) == 12


def test_a_short_last_group_makes_a_step(tmp_path):
    module, tape = make_module(accumulate=4), Tape()
    train(tmp_path, steps=4, module=module, callbacks=(tape,))  # epochs of 6 batches: groups of 4 and 2
    assert len(tape.seen) == 12


def test_accumulating_two_batches_of_two_equals_one_of_four(tmp_path):
    """One epoch; noise off, because it is drawn per batch."""
    results = []
    for accumulate, batch in ((2, 2), (1, 4)):
        module = make_module(optimizer=sgd(0.1), scheduler=None, accumulate=accumulate, sample_posterior=False)
        out = tmp_path / str(batch)
        train(out, steps=2, module=module.double(), data=Data(batch=batch), precision="64-true")
        results.append((weights(module), rows(out)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-12)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-6)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-6)


def test_clipping_acts_and_logs_the_norm_before(tmp_path):
    start = weights(make_module())
    module = make_module(optimizer=sgd(1.0), scheduler=None, clip=0.01)
    train(tmp_path / "clipped", steps=1, module=module)
    norm = rows(tmp_path / "clipped")[0]["train/grad_norm"]
    assert norm > 0.05
    assert (weights(module) - start).norm().item() == pytest.approx(0.01, rel=1e-3)
    free = make_module(optimizer=sgd(1.0), scheduler=None, clip=None)
    train(tmp_path / "free", steps=1, module=free)
    assert rows(tmp_path / "free")[0]["train/grad_norm"] == norm
    assert (weights(free) - start).norm().item() == pytest.approx(norm, rel=1e-3)


def test_schedule_moves_once_a_step(tmp_path):
    module = make_module(scheduler=partial(warmup_constant, warmup=4), accumulate=2)
    train(tmp_path, steps=6, module=module)
    assert [row["train/lr"] for row in rows(tmp_path)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_noise_depends_on_seed_and_step_alone(tmp_path):
    losses = []
    for seed, burn in ((0, 0), (0, 7), (1, 0)):
        torch.manual_seed(burn)
        torch.rand(burn)
        out = tmp_path / f"{seed}-{burn}"
        train(out, steps=2, module=make_module(seed=seed))
        losses.append([row["train/loss"] for row in rows(out)])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_logged_names(tmp_path):
    train(tmp_path, steps=2, limit_val_batches=1.0, val_check_interval=2, check_val_every_n_epoch=None)
    training, _, validation = rows(tmp_path)
    assert set(training) == {
        "step", "epoch", "train/loss", "train/l1", "train/wavelet", "train/kl", "train/psnr",
        "train/grad_norm", "train/lr", "train/skipped",
    }  # fmt: skip
    assert set(validation) == {
        "step",
        "epoch",
        "val/loss",
        "val/l1",
        "val/wavelet",
        "val/kl",
        "val/psnr",
        "val/ssim",
        "val/latent_std",
    }


def test_validation_does_not_depend_on_the_batch(tmp_path):
    """Nor does it change training."""
    found = []
    for batch in (2, 5):
        out = tmp_path / str(batch)
        data = Data(val_batch=batch)
        train(out, steps=2, data=data, limit_val_batches=1.0, val_check_interval=1, check_val_every_n_epoch=None)
        found.append(rows(out))
    assert found[0] == found[1]
    train(tmp_path / "without", steps=2)
    assert rows(tmp_path / "without") == [row for row in found[0] if "train/loss" in row]


def test_a_sample_too_small_for_a_metric_is_left_out_of_its_mean(tmp_path):
    module = make_module()
    options = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    train(tmp_path, steps=1, module=module, **options)
    module._rows = {0: {"psnr": 20.0, "ssim": 0.5}, 1: {"psnr": 30.0}}
    reported = []
    module._report, module.log_dict = reported.append, lambda *_, **__: None
    module.on_validation_epoch_end()
    assert reported == [{"val/psnr": 25.0, "val/ssim": 0.5}]


def test_validation_uses_the_average(tmp_path):
    module = make_module(optimizer=sgd(0.5), scheduler=None)
    options = {"limit_val_batches": 1.0, "val_check_interval": 3, "check_val_every_n_epoch": None}
    trainer = train(tmp_path, steps=3, module=module, **options)
    assert module.eval_net is module.ema_net
    video = torch.stack([Clips(5)[(999, index)]["video"] for index in range(5)])
    batch = {"video": video, "index": torch.arange(5)}
    with torch.no_grad():
        module.eval_net.eval()
        module.validation_step(batch, 0)
    psnr = sum(row["psnr"] for row in module._rows.values()) / 5
    assert rows(tmp_path)[-1]["val/psnr"] == pytest.approx(psnr, abs=1e-9)
    assert trainer.callback_metrics["val/psnr"].item() == pytest.approx(psnr, abs=1e-5)
    del module.__dict__["ema_net"]
    with torch.no_grad():
        module.validation_step(batch, 0)
    assert sum(row["psnr"] for row in module._rows.values()) / 5 != pytest.approx(psnr, abs=1e-4)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_step_is_skipped_and_counted(tmp_path, where):
    module = make_module(optimizer=sgd(0.1), scheduler=None)
    bad_batches = {2, 3}
    real_step, real_backward = module.training_step, module.manual_backward
    calls = {"batch": -1}

    def training_step(batch, batch_idx):
        calls["batch"] += 1
        return real_step(batch, batch_idx)

    def manual_backward(loss):
        if calls["batch"] in bad_batches:
            if where == "loss":
                return real_backward(loss * float("nan"))
            real_backward(loss)
            module.net.decoder.conv_out.weight.grad[0, 0] = float("inf")
            return None
        return real_backward(loss)

    module.training_step, module.manual_backward = training_step, manual_backward
    trainer = train(tmp_path, steps=4, module=module, callbacks=(FiniteGuard(str(tmp_path / "faults")),))
    assert module.step == trainer.global_step == 4
    assert calls["batch"] == 5
    assert (module.skipped, module.bad_steps) == (2, 0)
    assert torch.isfinite(weights(module)).all()
    assert rows(tmp_path)[-1]["train/skipped"] == 2
    faults = sorted((tmp_path / "faults").iterdir())
    norms = json.loads(faults[0].read_text())["grad_norms"]
    assert [name for name, norm in norms.items() if isinstance(norm, str)] == (
        list(norms) if where == "loss" else ["decoder.conv_out"]
    )


def test_too_many_bad_steps_end_the_run(tmp_path):
    module = make_module(max_bad_steps=3)
    module.net.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="3 steps in a row after step 0"):
        train(tmp_path, steps=10, module=module)
    assert list((tmp_path / "checkpoints").glob("*.ckpt")) == []
    fault = module.fault  # the gradient of a mean absolute difference is finite even here
    assert math.isnan(fault["batches"][0]["loss"])
    assert set(fault["grad_norms"]) >= {"encoder.down1", "decoder.conv_out"}
    assert all(math.isfinite(norm) for norm in fault["grad_norms"].values())
    assert len(fault["batches"][0]["path"]) == len(fault["batches"][0]["index"]) == 2


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_half_precision_is_refused(tmp_path, precision):  # on a CPU Lightning itself turns 16-mixed into bf16-mixed
    with pytest.raises(ConfigError, match="bf16-mixed"):
        train(tmp_path, precision=precision)


def test_bf16_trains_in_float32_weights(tmp_path):
    module = make_module()
    train(tmp_path, steps=3, module=module, precision="bf16-mixed")
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert rows(tmp_path)[-1]["train/loss"] < rows(tmp_path)[0]["train/loss"]


def test_memory_layout_changes_nothing_but_the_layout(tmp_path):
    losses = []
    for channels_last in (False, True):
        module = make_module(channels_last=channels_last)
        kernel = module.net.encoder.conv_out.conv.weight
        assert kernel.is_contiguous(memory_format=torch.channels_last_3d) == channels_last
        out = tmp_path / str(channels_last)
        train(out, steps=3, module=module)
        losses.append([row["train/loss"] for row in rows(out)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_weight_decay_of_matrices_only():
    groups = make_module(decay="matrices", optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1))
    optimizer = groups.configure_optimizers()[0][0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {p.ndim > 1 for p in optimizer.param_groups[0]["params"]} == {True}
    assert {p.ndim > 1 for p in optimizer.param_groups[1]["params"]} == {False}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(groups.net.parameters()))


def test_state_of_other_optimizers_is_refused(tmp_path):
    train(tmp_path, steps=1)
    path = tmp_path / "checkpoints" / "step-00000001.ckpt"
    with pytest.raises(CheckpointError, match="1 lr_schedulers, this run has 0"):
        train(tmp_path, steps=2, module=make_module(scheduler=None), resume=path)


@pytest.mark.parametrize("wrong", [{"accumulate": 0}, {"clip": 0.0}, {"max_bad_steps": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ConfigError, match="must be positive"):
        make_module(**wrong)


def test_a_wrong_learning_rate_is_an_error_of_the_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.optimizer: Invalid learning rate: -1"):
        train(tmp_path, module=make_module(optimizer=sgd(-1.0)))
