"""A run that is told to stop saves, and says so by its exit code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from praxino.callbacks.durable import is_whole
from training import Data, Tape, load, make_module, train

SCRIPT = Path(__file__).with_name("preempt_run.py")


def start(out: Path, ranks: int = 1, pause: float = 0.05) -> subprocess.Popen:
    """Start a run and wait for its third step, whose batches take `pause` seconds each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(out), str(ranks), str(pause)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    await_line(run, "step 3")
    return run


def await_line(run: subprocess.Popen, due: str) -> None:
    assert run.stdout is not None
    for line in run.stdout:
        if line.strip() == due:
            return
    raise AssertionError(f"the run ended early with code {run.wait()}")


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR2, marks=pytest.mark.slow)])
def test_a_signal_saves_and_exits_with_75(tmp_path, number):
    run = start(tmp_path)
    run.send_signal(number)
    assert run.wait(timeout=600) == 75
    (path,) = (tmp_path / "checkpoints").glob("step-*.ckpt")
    assert is_whole(path)
    step = load(path)["praxino"]["step"]
    assert step >= 3
    tape, module = Tape(), make_module(accumulate=2)
    train(tmp_path, step + 1, module, Data(count=100), path, callbacks=(tape,))  # goes on with the next two batches
    assert (module.step, len(tape.seen)) == (step + 1, 2)


@pytest.mark.slow
def test_the_same_signal_again_ends_it_at_once(tmp_path):
    run = start(tmp_path, pause=120)
    run.send_signal(signal.SIGTERM)
    await_line(run, "received")
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=600) == 143
    assert not list(tmp_path.glob("checkpoints/step-*.ckpt"))


@pytest.mark.slow
def test_another_signal_does_not_end_the_saving(tmp_path):
    """SLURM sends SIGUSR2 to a job whose time is nearly up, and SIGTERM when it is."""
    run = start(tmp_path, pause=10)
    run.send_signal(signal.SIGUSR2)
    await_line(run, "received")
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=600) == 75
    (path,) = (tmp_path / "checkpoints").glob("step-*.ckpt")
    assert is_whole(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["main", "child", "both"])
def test_two_ranks_leave_together(tmp_path, kind):
    run = start(tmp_path, ranks=2)
    (child,) = (pid for pid in children(run.pid) if SCRIPT.name in Path(f"/proc/{pid}/cmdline").read_text())
    for process in {"main": [run.pid], "child": [child], "both": [run.pid, child]}[kind]:
        os.kill(process, signal.SIGTERM)
    assert run.wait(timeout=600) == 75
    (path,) = (tmp_path / "checkpoints").glob("step-*.ckpt")
    assert is_whole(path)
    deadline = time.monotonic() + 100
    while alive(child) and time.monotonic() < deadline:  # it may still be on its way out
        time.sleep(0.1)
    assert not alive(child)
