"""The training of a denoiser: what is learned, what is given, what validation says."""

import copy
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from dit_training import LatentBatches, make_dit, make_net
from praxino.callbacks.checkpoint import Checkpoint
from praxino.callbacks.media import Media
from praxino.callbacks.throughput import Throughput
from praxino.diffusion.loss import DiffusionLoss
from praxino.diffusion.path import Cosine, RectifiedFlow
from praxino.diffusion.time import LogitNormalTime
from praxino.errors import CheckpointError, ConfigError
from praxino.lit.context import Context, forget
from praxino.lit.optim import MuonAdamW, block_groups, seed_of
from praxino.models.conditioning import NULL, Condition
from praxino.models.vae import VideoVAE
from training import load, rows, train
from training import make_net as make_vae

VALIDATE = {"limit_val_batches": 1.0, "val_check_interval": 3, "check_val_every_n_epoch": None}


def test_training_lowers_the_loss_of_clips_with_and_without_context(tmp_path):
    """Latents are a constant of the label and noise: the flow is easy to learn."""
    data = LatentBatches(count=12, batch=6)
    options = {**VALIDATE, "val_check_interval": 20}
    train(tmp_path, 60, make_dit(scheduler=None), data, callbacks=(Throughput(),), **options)
    scores = [row for row in rows(tmp_path) if "val/loss" in row]
    for name in ("val/loss", "val/loss_free", "val/loss_context"):
        assert scores[-1][name] < 0.7 * scores[0][name] + 0.05, name
    last = [row for row in rows(tmp_path) if "train/tokens_per_second" in row][-1]
    assert last["train/tokens_per_second"] == pytest.approx(16 * last["train/clips_per_second"])  # 4 x 2 x 2


def test_without_a_learning_rate_validation_stays_and_training_does_not(tmp_path):
    module = make_dit(optimizer=partial(torch.optim.SGD, lr=0.0), scheduler=None)
    train(tmp_path, 9, module, LatentBatches(count=12), **VALIDATE)
    scores = [tuple(v for k, v in row.items() if k.startswith("val/")) for row in rows(tmp_path) if "val/loss" in row]
    losses = [row["train/loss"] for row in rows(tmp_path) if "train/loss" in row]
    assert len(scores) == 3
    assert len(set(scores)) == 1
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("batch", [1, 5])
def test_validation_does_not_depend_on_the_batch(tmp_path, batch):
    found = []
    for size in (2, batch):
        out = tmp_path / f"{size}"
        train(out, 1, make_dit(), LatentBatches(val_batch=size), **{**VALIDATE, "val_check_interval": 1})
        found.append(next(row for row in rows(out) if "val/loss" in row))
    assert found[0] == found[1]


def test_validation_loss_is_that_of_the_closed_form():
    """Of a net that predicts 0, the flow loss is the mean of (noise - z)^2, over the targets alone with a context."""
    module = make_dit(net=make_net())
    for parameter in module.net.head.parameters():
        torch.nn.init.zeros_(parameter)
    z = torch.randn(1, 3, 4, 4, 4)
    row = module.judge(z, Condition(label=torch.tensor([1])), 7)
    noise = torch.randn(4, 3, 4, 4, 4, generator=torch.Generator().manual_seed(seed_of(0, 7)))
    error = (noise - z).square()
    assert row["loss_free"] == pytest.approx(error.mean().item(), rel=1e-5)
    assert row["loss_context"] == pytest.approx(error[:, :, 2:].mean().item(), rel=1e-5)  # 7 % 2 = 1: 2 frames
    assert row["loss"] == pytest.approx((row["loss_free"] + row["loss_context"]) / 2)


def test_context_draws_its_lengths_with_its_probability():
    torch.manual_seed(0)
    known = Context(0.5, "1-3").draw(4000, 5)
    assert known is not None
    counts = known.sum(1)
    assert known.equal(torch.arange(5) < counts[:, None])  # the first ones
    shares = torch.bincount(counts, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]), atol=0.03, rtol=0)
    assert Context(0.0).draw(4, 5) is None


@pytest.mark.parametrize(
    "options", [{"probability": 2}, {"frames": []}, {"frames": [0]}, {"frames": "a-b"}, {"noise": 1}]
)
def test_context_refuses(options):
    with pytest.raises(ConfigError):
        Context(**options)


def test_context_refuses_to_give_everything():
    with pytest.raises(ConfigError, match="leave nothing to predict"):
        Context(0.5, [1, 4]).draw(2, 4)


def test_forgetting_is_independent_for_each_kind():
    torch.manual_seed(0)
    cond = Condition(
        label=torch.zeros(4000, dtype=torch.long), text=torch.ones(4000, 1, 2), text_mask=torch.ones(4000, 1).bool()
    )
    dropped = forget(cond, {"label": 0.2, "text": 0.5})
    no_label, no_text = dropped.label == NULL, ~dropped.text_mask[:, 0]
    for share, expected in ((no_label, 0.2), (no_text, 0.5), (no_label & no_text, 0.1)):
        assert float(share.float().mean()) == pytest.approx(expected, abs=0.03)


def test_checkpointed_blocks_change_nothing(tmp_path):
    for name, recomputed in (("kept", False), ("again", True)):
        train(tmp_path / name, 3, make_dit(checkpoint_activations=recomputed), LatentBatches())
    kept, again = (load(tmp_path / name / "checkpoints" / "step-00000003.ckpt") for name in ("kept", "again"))
    assert all(torch.equal(value, again["state_dict"][key]) for key, value in kept["state_dict"].items())


def validated(run):
    """Return the loss of every validation, by step."""
    return {row["step"]: row["val/loss"] for row in rows(run) if "val/loss" in row}


def best_of(directory):
    """Return the step that a best checkpoint is of, and what is noted of it."""
    return load(directory / "best.ckpt")["praxino"]["step"], json.loads((directory / "best.json").read_text())


def test_best_checkpoint_is_that_of_the_lowest_loss(tmp_path):
    keeper = Checkpoint(str(tmp_path / "kept"), every=None, monitor="val/loss")
    train(tmp_path, 9, make_dit(), LatentBatches(), callbacks=(keeper,), **VALIDATE)
    scores = validated(tmp_path)
    best = min(scores, key=lambda step: scores[step])
    assert best_of(tmp_path / "kept") == (best, {"step": best, "val/loss": scores[best]})


def test_what_training_ends_with_may_be_the_best(tmp_path):
    """It is validated after the last step, by the training itself or, where that was killed, by one that goes on."""
    kept = tmp_path / "kept"
    keeper = Checkpoint(str(kept), every=None, monitor="val/loss")
    trainer = train(tmp_path, 4, module := make_dit(), LatentBatches(), callbacks=(keeper,), **VALIDATE)
    assert best_of(kept)[0] == 3
    shutil.copytree(kept, tmp_path / "killed")
    trainer.validate(module, datamodule=LatentBatches(), verbose=False)
    scores = validated(tmp_path)
    assert scores[4] < scores[3]
    assert {row["epoch"] for row in rows(tmp_path)} == {0}
    assert best_of(kept) == (4, {"step": 4, "val/loss": scores[4]})

    keeper, again = Checkpoint(str(tmp_path / "killed"), every=None, monitor="val/loss"), tmp_path / "again"
    ckpt = tmp_path / "killed" / "step-00000004.ckpt"
    trainer = train(again, 4, module := make_dit(), LatentBatches(), callbacks=(keeper,), resume=ckpt, **VALIDATE)
    trainer.validate(module, datamodule=LatentBatches(), verbose=False)
    assert validated(again) == {4: scores[4]}
    assert {row["epoch"] for row in rows(again)} == {0}
    assert best_of(tmp_path / "killed") == (4, {"step": 4, "val/loss": scores[4]})


def test_a_run_that_goes_on_knows_the_best(tmp_path):
    """Of its own past: one that came after the step where it goes on is another future's."""
    kept, note = tmp_path / "kept", tmp_path / "kept" / "best.json"
    keeper = Checkpoint(str(kept), every=1, keep=None, monitor="val/loss")
    train(tmp_path, 6, make_dit(), LatentBatches(), callbacks=(keeper,), **VALIDATE)
    assert best_of(kept)[0] == 6
    scores = validated(tmp_path)
    for lowest, kept_step in ((0.0, 3), (scores[6] + 1, 6)):  # as if step 3 had been better, or worse, than any
        os.unlink(kept / "best.ckpt")
        shutil.copyfile(kept / "step-00000003.ckpt", kept / "best.ckpt")
        note.write_text(json.dumps({"step": 3, "val/loss": lowest}))
        keeper = Checkpoint(str(kept), every=1, keep=None, monitor="val/loss")
        ckpt = kept / "step-00000003.ckpt"
        train(tmp_path / str(kept_step), 6, make_dit(), LatentBatches(), callbacks=(keeper,), resume=ckpt, **VALIDATE)
        assert best_of(kept)[0] == kept_step
    train(tmp_path / "back", 4, make_dit(), LatentBatches(), callbacks=(keeper,), resume=ckpt, **VALIDATE)
    assert not (kept / "best.ckpt").exists()
    assert best_of(kept / "superseded")[0] == 6


@pytest.mark.parametrize(("step", "known"), [(9, 0.1), (3, 1.0)])
def test_a_kill_between_the_best_and_its_note_loses_neither(tmp_path, step, known):
    """The note that was to come counts if the checkpoint that was to come has come."""
    torch.save({"praxino": {"step": step}}, tmp_path / "best.ckpt")
    (tmp_path / "best.json").write_text('{"step": 3, "val/loss": 1.0}')
    (tmp_path / "best.json.due").write_text('{"step": 9, "val/loss": 0.1}')
    keeper = Checkpoint(str(tmp_path), monitor="val/loss")
    keeper._claim()
    assert keeper._note() == {"step": step, "val/loss": known}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "best.ckpt", "best.json"]


def test_a_disk_that_is_full_does_not_mislead_the_search_for_the_best(tmp_path, monkeypatch, caplog):
    """A best that could not be kept is not remembered, and training goes on."""
    keeper = Checkpoint(str(tmp_path / "kept"), every=None, monitor="val/loss")
    failing = [True, False, False]

    def write(path, text):
        if failing.pop(0):
            raise OSError(28, "No space left on device", str(path))
        path.write_text(text)

    monkeypatch.setattr("praxino.callbacks.checkpoint.write_text", write)
    train(tmp_path, 9, make_dit(), LatentBatches(), callbacks=(keeper,), **VALIDATE)
    scores = validated(tmp_path)
    assert scores[3] > scores[6] > scores[9]
    assert "best.ckpt NOT KEPT" in caplog.text
    assert failing == []
    assert best_of(tmp_path / "kept") == (9, {"step": 9, "val/loss": scores[9]})


@pytest.mark.parametrize("content", ["", "null", "[1]", '{"step": "a", "val/loss": 0}', '{"step": 1, "val/loss": NaN}'])
def test_a_note_that_says_nothing_is_no_best(tmp_path, content):
    for file in ("best.ckpt", "best.json"):
        (tmp_path / file).write_text(content)
    keeper = Checkpoint(str(tmp_path), monitor="val/loss")
    assert keeper._is_better(7.0)
    assert not keeper._is_better(float("nan"))


def test_a_best_between_the_batches_of_a_step_is_told_of(tmp_path, caplog):
    keeper = Checkpoint(str(tmp_path / "kept"), every=None, monitor="val/loss")
    train(tmp_path, 3, make_dit(accumulate=2), LatentBatches(), callbacks=(keeper,), **VALIDATE)
    assert "make trainer.val_check_interval a multiple of model.accumulate" in caplog.text
    assert json.loads((tmp_path / "kept" / "best.json").read_text())["step"] == 3


def test_muon_takes_the_matrices_of_the_blocks_alone():
    """The same weights as the two optimizers apart; and its state goes on where it was."""
    net = make_net()
    groups = block_groups(net, net.blocks, "matrices")
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    both = MuonAdamW(groups, lr=0.01)
    twin = copy.deepcopy(net)
    inside = {id(p) for block in twin.blocks for p in block.parameters() if p.ndim == 2}
    muon = torch.optim.Muon(
        [p for p in twin.parameters() if id(p) in inside], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [p for p in twin.parameters() if id(p) not in inside], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0
    )
    assert inside
    for step in range(3):
        torch.manual_seed(step)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        both.step()
        muon.step()
        adamw.step()
        if step == 1:
            fresh = MuonAdamW(block_groups(net, net.blocks, "matrices"), lr=0.5)
            fresh.load_state_dict(copy.deepcopy(both.state_dict()))
            both = fresh
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)


def test_videos_are_encoded_by_the_vae_which_stays_as_it_is(tmp_path):
    """Online encoding equals the VAE's own; it is neither trained nor in the checkpoint."""
    vae: VideoVAE = make_vae()
    vae.set_statistics([0.1, -0.2], [1.5, 0.5])
    before = copy.deepcopy(vae.state_dict())
    module = make_dit(net=make_net(channels=2, classes=None), vae=vae, drop={}, context=Context(0.5, [1]))
    module.previews = 1
    trainer = train(tmp_path, 2, module, callbacks=(), **{**VALIDATE, "val_check_interval": 2})
    assert trainer.global_step == 2
    assert all(torch.equal(value, vae.state_dict()[key]) for key, value in before.items())
    content = load(tmp_path / "checkpoints" / "step-00000002.ckpt")
    assert all(key.startswith("net.") for key in content["state_dict"])
    assert content["praxino"]["shape"] == [2, 2, 2, 2]
    assert content["praxino"]["statistics"] == {"mean": [0.1, -0.2], "std": [1.5, 0.5]}
    video = torch.randint(256, (1, 5, 16, 16, 3), dtype=torch.uint8)
    expected = vae.normalize(vae.encode(video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).mode())
    torch.testing.assert_close(module.encode(video, sample=False), expected)
    panels = module.preview(expected, Condition(), 0)
    assert [tuple(panel.shape) for panel in panels] == [(3, 5, 16, 16)] * 3
    torch.testing.assert_close(panels[0], vae.decode(vae.denormalize(expected))[0])


def test_a_condition_that_the_data_lack_is_named(tmp_path):
    with pytest.raises(ConfigError, match="takes text"):
        train(tmp_path, 1, make_dit(net=make_net(text_width=8)), LatentBatches())


def test_previews_are_written(tmp_path):
    vae = make_vae()
    vae.set_statistics([0.0, 0.0], [1.0, 1.0])
    module = make_dit(net=make_net(channels=2, classes=None), vae=vae, drop={}, context=Context(0.5, [1]))
    media = Media(str(tmp_path / "media"), videos=2)
    train(tmp_path, 1, module, callbacks=(media,), **{**VALIDATE, "val_check_interval": 1})
    names = {path.relative_to(tmp_path / "media").as_posix() for path in Path(tmp_path / "media").rglob("*.*")}
    assert names == {"step-00000001/00.mp4", "step-00000001/01.mp4", "step-00000001/sheet.png"}


@pytest.mark.parametrize(
    ("path", "prediction", "match"),
    [(RectifiedFlow(), "v", "prediction was flow, is v"), (Cosine(), "flow", "path was")],
)
def test_a_checkpoint_of_another_diffusion_is_refused(path, prediction, match):
    checkpoint = {"praxino": make_dit().describe()}
    other = make_dit(loss=DiffusionLoss(path, LogitNormalTime(), prediction))
    with pytest.raises(CheckpointError, match=match):
        other.on_load_checkpoint(checkpoint)


def test_a_checkpoint_of_other_classes_is_refused():
    """The numbers are the same, what they mean is not."""
    module, other = make_dit(), make_dit()
    module.classes, other.classes = ["1", "10", "2"], ["1", "2", "10"]
    with pytest.raises(CheckpointError, match="class 1 is '2' in the latents and was '10' to the ch"):
        other.on_load_checkpoint({"praxino": module.describe()})


def test_a_batch_costs_what_it_is_and_the_longest_is_described():
    module = make_dit()
    module.manual_backward = lambda loss: None
    for frames, size, validates in ((9, 4, False), (3, 4, False), (3, 8, False), (17, 8, True)):
        batch = {"latent": torch.randn(2, 3, frames, size, size), "label": torch.zeros(2).long(), "index": [0, 1]}
        module.read(batch, sample=False) if validates else module.learn(batch, ("",), 1.0)
        assert module.cost(batch)["tokens"] == 2 * frames * (size // 2) ** 2
    assert module.describe()["shape"] == [3, 9, 8, 8]


class SlowBatches(LatentBatches):
    def rate(self) -> float:
        return 12.5


def test_frames_a_second_are_those_of_the_data(tmp_path):
    for data, fps in ((SlowBatches(), 12.5), (LatentBatches(), None)):
        train(tmp_path / str(fps), 1, make_dit(), data)
        assert load(tmp_path / str(fps) / "checkpoints" / "step-00000001.ckpt")["praxino"]["fps"] == fps
