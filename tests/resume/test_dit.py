"""Exact resume of a denoiser's training: mid-epoch, accumulating, with workers and an average, after a move."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from dit_training import LatentBatches, make_dit
from praxino import checkpoint
from praxino.config import conf_dir, register_resolvers
from praxino.data.synthetic import make_dataset
from praxino.errors import CheckpointError, ConfigError
from praxino.tasks.encode import encode
from praxino.tasks.train import run
from training import differences, load, make_net, rows, train

PARTS = ("state_dict", "ema", "optimizer_states", "lr_schedulers", "loops", "train")


@pytest.mark.parametrize(("stops", "accumulate"), [([4, 7], 2), ([5, 6, 9], 1)])
def test_resume_equals_one_run(tmp_path, stops, accumulate):
    """Epochs of 6 batches: stops within an epoch and at its end."""
    results = []
    for name, steps in (("whole", stops[-1:]), ("parts", stops)):
        resume = None
        for step in steps:
            train(tmp_path / name, step, make_dit(accumulate=accumulate), LatentBatches(count=12), resume)
            resume = tmp_path / name / "checkpoints" / f"step-{step:08d}.ckpt"
        results.append((load(resume), rows(tmp_path / name)))
    (whole, whole_rows), (parts, parts_rows) = results
    assert whole_rows == parts_rows
    a, b = ({k: v for k, v in c.items() if k not in {"pytorch-lightning_version", "callbacks"}} for c in (whole, parts))
    assert differences(a, b) == []


def configured(*overrides: str) -> dict[str, Any]:
    """Train a tiny denoiser by its configuration, on the CPU."""
    net = ["model.net.width=32", "model.net.depth=2", "model.net.num_heads=2", "model.net.mlp_width=64"]
    small = ["trainer=cpu", "batch=2", "frames=5", "model.context.frames=[1]", "model.preview_steps=2"]
    often = [
        "callbacks.throughput=null",
        "trainer.val_check_interval=6",
        "trainer.log_every_n_steps=1",
        "data.workers=2",
        "model.accumulate=2",
    ]
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        cfg = compose("train", overrides=["experiment=dit_tiny", *net, *small, *often, *overrides])
    return run(cfg)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 14 clips of 9 frames of 16 pixels, as praxino-encode makes it."""
    root = tmp_path_factory.mktemp("latents")
    make_dataset(root / "videos", videos=14, val_videos=1, frames=9, size=16, seed=0, workers=1)
    checkpoint.save_vae(make_net(), root / "vae.ckpt")
    encode(str(root / "vae.ckpt"), {"root": str(root / "videos" / "train")}, str(root / "cache"), stats_only=False,
           frames=9, size=16, workers=0, device="cpu")  # fmt: skip
    return root


@pytest.mark.slow
def test_a_run_goes_on_exactly_after_it_was_moved(tmp_path, latents):
    """It holds its VAE: the one that it was begun with may be gone. Any step of it rebuilds net and VAE alone."""
    gone = tmp_path / "gone.ckpt"
    shutil.copy(latents / "vae.ckpt", gone)
    data = [f"data.root={latents / 'cache'}", f"model.vae={gone}", "model.scheduler.total=10", "checkpoint.every=5"]
    whole = configured(*data, "trainer.max_steps=10", f"out={tmp_path / 'whole'}")
    configured(*data, "trainer.max_steps=5", f"out={tmp_path / 'parts'}")
    (tmp_path / "parts").rename(tmp_path / "moved")
    gone.unlink()
    moved = configured(*data, "trainer.max_steps=10", f"out={tmp_path / 'moved'}", "ckpt=last")
    assert moved == whole
    assert whole["val/loss"] > 0
    steps = [[row for row in rows(tmp_path / name) if "train/loss" in row] for name in ("moved", "whole")]
    assert steps[0] == steps[1]  # the first half also validated where it ended
    a, b = (load(tmp_path / name / "checkpoints" / "step-00000010.ckpt") for name in ("whole", "moved"))
    assert differences({part: a[part] for part in PARTS}, {part: b[part] for part in PARTS}) == []

    net, trained = checkpoint.load_denoiser(tmp_path / "moved")
    assert all(torch.equal(value, b["ema"]["weights"][key]) for key, value in net.state_dict().items())
    assert (trained.step, trained.prediction, trained.shape) == (10, "flow", (2, 2, 2, 2))
    assert trained.conditioning["context"] == {"probability": 0.5, "frames": [1], "noise": 0.0}
    vae = checkpoint.load_vae_of(trained)
    assert checkpoint.fingerprint(vae) == checkpoint.fingerprint(make_net())
    assert vae.statistics["mean"] == trained.statistics["mean"]
    assert any((tmp_path / "moved" / "media").rglob("*.mp4"))
    with pytest.raises(CheckpointError, match="holds the denoiser"):
        checkpoint.load(tmp_path / "moved")


@pytest.mark.slow
def test_another_vae_is_refused(tmp_path, latents):
    checkpoint.save_vae(make_net(seed=1), tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match="of another VAE"):
        configured(
            f"data.root={latents / 'cache'}", f"model.vae={tmp_path / 'other.ckpt'}", f"out={tmp_path / 'run'}",
            "trainer.max_steps=1",
        )  # fmt: skip
