"""Exact resume with real files: decoding, random clips, two workers, several epochs."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from praxino.data.module import VideoData
from praxino.data.synthetic import make_dataset
from training import differences, load, make_module, rows, train


class Clips(pl.Callback):
    """Keeps which clips were seen, and their pixels."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        sums = batch["video"].long().sum(dim=(1, 2, 3, 4)).tolist()
        self.seen.append((batch["path"], batch["start"].tolist(), sums))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    make_dataset(root, videos=14, val_videos=1, frames=12, size=24, seed=0, workers=1)
    return root


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_ten_and_ten_equal_twenty_on_videos(tmp_path, videos, workers):
    """Epochs of 6 batches; the stop lies inside one."""
    results = []
    for name, stops in (("whole", [20]), ("parts", [10, 20])):
        out, clips, resume = tmp_path / name, Clips(), None
        for step in stops:
            data = VideoData(
                str(videos), frames=5, size=16, stride=2, random_stride=True, flip=0.5, batch=2, workers=workers,
                val_fraction=0.2, cache_dir=str(tmp_path / "cache"), scan_workers=1,
            )  # fmt: skip
            train(out, step, make_module(), data, resume, callbacks=(clips,), limit_val_batches=1.0)
            resume = out / "checkpoints" / f"step-{step:08d}.ckpt"
            loader = load(resume)["VideoData"]["loader"]
            assert loader["position"] == step
            assert step == 20 or step % loader["length"], "the stop must lie inside an epoch"
        results.append((load(resume), rows(out), clips.seen))
    (whole, whole_rows, whole_seen), (parts, parts_rows, parts_seen) = results
    assert whole_seen == parts_seen
    assert len({str(clip) for clip in whole_seen}) == 20
    assert whole_rows == parts_rows
    assert sum("val/psnr" in row for row in whole_rows) == 3
    keys = ["state_dict", "ema", "optimizer_states", "lr_schedulers", "loops", "train", "VideoData"]
    assert differences(*({key: checkpoint[key] for key in keys} for checkpoint in (whole, parts))) == []
