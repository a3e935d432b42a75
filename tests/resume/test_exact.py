"""A run that stops and goes on equals one that never stopped, bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from training import Data, Tape, differences, load, make_adversary, make_module, rows, train

IGNORED = {"pytorch-lightning_version"}


def run(
    out: Path,
    stops: list[int],
    accumulate: int = 1,
    workers: int = 0,
    count: int = 12,
    adversary: dict[str, Any] | None = None,
    **options: Any,
):
    """Train up to each of the steps in turn, every time from the checkpoint of the last, with everything made anew."""
    tape, resume = Tape(), None
    for step in stops:
        module = make_module(
            accumulate=accumulate, adversary=None if adversary is None else make_adversary(dropout=0.3, **adversary)
        )
        data = Data(count=count, workers=workers)
        train(out, step, module, data, resume, callbacks=(tape,), **options)
        resume = out / "checkpoints" / f"step-{step:08d}.ckpt"
    return load(resume), rows(out), tape.seen


def check(tmp_path: Path, stops: list[int], **options: Any) -> None:
    whole = run(tmp_path / "whole", stops[-1:], **options)
    parts = run(tmp_path / "parts", stops, **options)
    assert parts[2] == whole[2], "samples"
    assert parts[1] == whole[1], "logged rows"
    for checkpoint in (whole[0], parts[0]):
        for callback in list(checkpoint["callbacks"]):
            checkpoint["callbacks"].pop(callback)
    assert differences(*({k: v for k, v in c.items() if k not in IGNORED} for c in (whole[0], parts[0]))) == []


def test_resume_when_accumulating(tmp_path):
    """Epochs of 6 batches, so that step 4 lies inside one; EMA and schedule on."""
    check(tmp_path, [4, 7], accumulate=2)


@pytest.mark.parametrize("stops", [[5, 7], [6, 12, 14]])  # before and at the last batch of an epoch
def test_resume_at_the_end_of_an_epoch(tmp_path, stops):
    check(tmp_path, stops)


@pytest.mark.slow
def test_resume_with_workers(tmp_path):
    check(tmp_path, [4, 8], workers=2)


def test_resume_three_times_with_validation(tmp_path):
    options = {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
    check(tmp_path, [3, 4, 6], **options)


def test_resume_with_an_uneven_last_group(tmp_path):
    check(tmp_path, [1, 2, 4], accumulate=4)  # groups of 4 and 2 batches


@pytest.mark.slow
def test_resume_in_bf16(tmp_path):
    check(tmp_path, [3, 6], precision="bf16-mixed")


GAMES = {
    "both": {"start": 4, "norm": "batch"},
    "in turns": {"start": 3, "alternate": True, "lecam": 0.1, "r1": 1.0, "r1_every": 2},
}


@pytest.mark.parametrize("game", GAMES)
def test_resume_with_an_adversary(tmp_path, game):
    """Before, at and after its start, and in mid-epoch."""
    check(tmp_path, [3, 4, 5, 8], adversary=GAMES[game])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("stop", range(1, 10))
def test_resume_with_an_adversary_after_every_step(tmp_path, stop, game, workers):
    check(tmp_path, [stop, 10], adversary=GAMES[game], workers=workers, accumulate=1 + stop % 2, count=10)


@pytest.mark.slow
def test_resume_many_times(tmp_path):
    check(tmp_path, [6, 9, 12, 15, 20])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", range(1, 16))
def test_resume_after_every_step(tmp_path, stop, accumulate, workers):
    check(tmp_path, [stop, 16], accumulate=accumulate, workers=workers, count=10)
