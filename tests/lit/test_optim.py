"""Schedules have the shapes that they are named for; seeds are functions."""

import math

import pytest
import torch

from praxino.errors import ConfigError
from praxino.lit.optim import seed_of, warmup_constant, warmup_cosine, warmup_stable_decay


def rates(make, steps: int) -> list[float]:
    """Return the learning rate of each step of a run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant():
    assert rates(lambda o: warmup_constant(o), 3) == [2.0] * 3
    assert rates(lambda o: warmup_constant(o, warmup=4), 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_begins_above_zero_and_ends_at_the_floor():
    found = rates(lambda o: warmup_cosine(o, total=12, warmup=2, floor=0.1), 15)
    assert found[:3] == [1.0, 2.0, 2.0]
    assert found[7] == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert found[3] == pytest.approx(2 * (0.1 + 0.45 * (1 + math.cos(math.pi / 10))))
    assert found[12:] == pytest.approx([0.2] * 3)


def test_stable_decay():
    found = rates(lambda o: warmup_stable_decay(o, total=10, warmup=2, decay=4, floor=0.5), 12)
    assert found == pytest.approx([1, 2, 2, 2, 2, 2, 2, 1.75, 1.5, 1.25, 1, 1])
    assert rates(lambda o: warmup_stable_decay(o, total=10), 11) == [2.0] * 11


@pytest.mark.parametrize(("total", "warmup"), [(-1, 0), (0, 0), (10, 11)])
def test_impossible_phases(total, warmup):
    with pytest.raises(ConfigError, match=f"total={total}"):
        rates(lambda o: warmup_cosine(o, total=total, warmup=warmup), 1)


def test_seeds_differ_and_are_the_same_everywhere():
    assert seed_of(0, 1, 2, 3) == 3252311618909706447
    seeds = {seed_of(0, step, micro, rank) for step in range(50) for micro in range(4) for rank in range(4)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)
