"""Two processes train as one does with the double batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("ddp_run.py")


def launch(out: Path, scenario: str, ranks: int) -> list[dict]:
    """Run a scenario of the script; return what each rank found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(out), scenario, str(ranks)]
    result = subprocess.run(command, env=environment, timeout=600, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["plain", "accumulate"])
def test_two_ranks_equal_one_with_the_double_batch(tmp_path, scenario):
    (one,) = launch(tmp_path / "one", scenario, 1)
    two = launch(tmp_path / "two", scenario, 2)
    for key in ("weights", "ema"):
        assert torch.equal(two[0][key], two[1][key])
        torch.testing.assert_close(two[0][key], one[key], rtol=0, atol=1e-10)
    assert two[0]["step"] == two[1]["step"] == one["step"] == 3
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert {k: v for k, v in a.items() if k != "time"} == pytest.approx(
            {k: v for k, v in b.items() if k != "time"}, rel=1e-9
        )


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "tolerance"), [("gan64", 1e-10), ("gan64-turns", 1e-10), ("gan32", 1e-5)])
def test_two_ranks_with_an_adversary_equal_one_with_the_double_batch(tmp_path, scenario, tolerance):
    (one,) = launch(tmp_path / "one", scenario, 1)
    two = launch(tmp_path / "two", scenario, 2)
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    for key in ("weights", "ema"):
        torch.testing.assert_close(two[0][key], one[key], rtol=0, atol=tolerance)
    assert two[0]["step"] == one["step"] == 5
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert {k: v for k, v in a.items() if k != "time"} == pytest.approx(
            {k: v for k, v in b.items() if k != "time"}, rel=100 * tolerance, abs=tolerance
        )


@pytest.mark.slow
def test_two_ranks_train_compiled_blocks(tmp_path):
    (one,) = launch(tmp_path / "one", "gan32", 1)
    two = launch(tmp_path / "two", "gan32-compile", 2)
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    for key in ("weights", "ema"):
        torch.testing.assert_close(two[0][key], one[key], rtol=0, atol=1e-5)
    assert one["graphs"] == 0
    assert two[0]["graphs"] == two[1]["graphs"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("game", ["", "-gan"])
def test_two_ranks_resume_exactly(tmp_path, game):
    launch(tmp_path / "whole", f"resume-whole{game}", 2)
    launch(tmp_path / "parts", f"resume-first{game}", 2)
    two = launch(tmp_path / "parts", f"resume-second{game}", 2)
    whole = [torch.load(tmp_path / "whole" / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for a, b in zip(two, whole, strict=True):
        assert torch.equal(a["weights"], b["weights"])
        assert torch.equal(a["ema"], b["ema"])


@pytest.mark.slow
def test_a_bad_step_of_one_rank_is_skipped_by_both(tmp_path):
    two = launch(tmp_path, "bad", 2)
    assert [rank["skipped"] for rank in two] == [1, 1]
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    assert bool(two[0]["weights"].isfinite().all())
    assert len(list((tmp_path / "faults").glob("*-rank?-1.json"))) == 2
