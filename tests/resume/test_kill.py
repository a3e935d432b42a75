"""SIGKILL while a checkpoint is written: what was acknowledged is never lost."""

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

from praxino.callbacks.durable import DurableIO, is_whole

SHM = Path("/dev/shm")


def save_for_ever(directory: Path, acknowledge: int) -> None:
    """Write checkpoints of 4 MB one after the other; tell of each that is done."""
    io, step = DurableIO(), 0
    while True:
        step += 1
        io.save_checkpoint({"step": step, "x": torch.full((1_000_000,), step)}, directory / f"step-{step:08d}.ckpt")
        assert io.failure is None
        os.write(acknowledge, step.to_bytes(8))
        for old in sorted(directory.glob("step-*.ckpt"))[:-2]:
            old.unlink()


def kill_once(directory: Path, delay: float) -> tuple[int, int, int]:
    """Return the last step acknowledged, the newest found whole, and the number of broken files."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        save_for_ever(directory, write)
    os.close(write)
    first = os.read(read, 8)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told = [first]
    while part := os.read(read, 8):
        told.append(part)
    os.close(read)
    files = sorted(directory.glob("step-*.ckpt"))
    whole = [path for path in files if is_whole(path)]
    newest = torch.load(whole[-1], weights_only=True)
    assert set(newest["x"].unique().tolist()) == {newest["step"]}
    return int.from_bytes(told[-1]), newest["step"], len(files) - len(whole)


@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_while_saving(kills, monkeypatch, tmp_path):
    """The target and the directory of temporary files lie on different file systems."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert SHM.stat().st_dev != tmp_path.stat().st_dev, "needs two file systems: run pytest with --basetemp elsewhere"
    chance = random.Random(0)
    lost = broken = stale = 0
    for _ in range(kills):
        with tempfile.TemporaryDirectory(dir=SHM) as name:
            acknowledged, newest, bad = kill_once(Path(name), chance.uniform(0, 0.05))
            lost += newest < acknowledged
            broken += bad
            stale += len(list(tmp_path.iterdir()))
    assert (lost, broken, stale) == (0, 0, 0)
