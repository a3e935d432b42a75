"""However two ranks are launched, they make one run, in one directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from praxino.data.synthetic import make_dataset

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "lightning": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}
SETTINGS = [
    "experiment=wfvae_tiny",
    "trainer=ddp",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.precision=32-true",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "data.workers=0",
    "batch=1",
    "frames=5",
    "size=16",
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("videos")
    make_dataset(folder, videos=4, val_videos=3, frames=5, size=16, workers=1)
    return [f"data.root={folder / 'train'}", f"data.val_root={folder / 'val'}"]


def launch(folder: Path, launcher: str, settings: list[str]) -> None:
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PRAXINO_RUN_ID"}
    command = [*LAUNCHERS[launcher], str(ROOT / "train.py"), *SETTINGS, *settings]
    result = subprocess.run(
        command, cwd=folder, env={**environment, "OMP_NUM_THREADS": "1"}, timeout=240, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


def last_row(run: Path) -> dict[str, float]:
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {key: value for key, value in row.items() if key.startswith("val/")}


@pytest.mark.slow
def test_one_directory_a_run(tmp_path: Path, videos: list[str]) -> None:
    found = {}
    for launcher in LAUNCHERS:
        launch(tmp_path / launcher, launcher, videos)
        (run,) = (tmp_path / launcher / "runs").iterdir()
        assert [path.name for path in (run / "checkpoints").glob("*.ckpt")] == ["step-00000002.ckpt"]
        found[launcher] = last_row(run)
    assert found["lightning"] == found["torchrun"]


@pytest.mark.slow
def test_one_directory_a_job_of_a_sweep(tmp_path: Path, videos: list[str]) -> None:
    launch(tmp_path / "sweep", "lightning", [*videos, "-m", "seed=0,1", 'out="a sweep"'])
    sweep = tmp_path / "sweep" / "a sweep"
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["a sweep"]
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1", "multirun.yaml"]
    rows = [last_row(sweep / job) for job in "01"]
    assert rows[0]["val/psnr"] != rows[1]["val/psnr"]
