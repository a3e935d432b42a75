"""Intervals cover as often as they say, and a summary says what it does not know."""

import math

import pytest
import torch

from praxino.metrics.suite import METRICS
from praxino.metrics.summary import DIRECTION, bootstrap, describe


def test_the_interval_is_the_normal_one_for_many_values() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 10
    low, high = bootstrap(x.tolist())
    half = 1.959964 * float(x.std()) / math.sqrt(5000)
    assert low == pytest.approx(float(x.mean()) - half, abs=0.1 * half)
    assert high == pytest.approx(float(x.mean()) + half, abs=0.1 * half)
    narrow = bootstrap(x.tolist(), level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_two_values_have_a_known_distribution_of_means() -> None:
    """Means are 0, 1/2 and 1, with 1/4, 1/2 and 1/4."""
    assert bootstrap([0, 1], level=0.95) == (0, 1)
    assert bootstrap([0, 1], level=0.3) == (0.5, 0.5)
    assert bootstrap([4.0] * 9) == (4, 4)


def test_it_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    samples = [torch.rand(40, generator=generator, dtype=torch.float64).tolist() for _ in range(200)]
    covered = sum(low <= 0.5 <= high for low, high in (bootstrap(s, draws=400) for s in samples))
    assert 178 <= covered <= 199  # 190 are due; 3 standard deviations down


def test_it_is_a_function_of_values_and_seed_alone() -> None:
    values = torch.rand(30, generator=torch.Generator().manual_seed(2)).tolist()
    state = torch.random.get_rng_state()
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) != bootstrap(values, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_interval_of_nothing() -> None:
    for values in ([], [1.0, math.inf], [math.nan]):
        with pytest.raises(ValueError, match="needs one at least, all of them finite"):
            bootstrap(values)


def test_a_summary_skips_what_has_no_value() -> None:
    found = describe([1.0, None, 3.0, math.nan])
    assert {key: found[key] for key in ("mean", "n")} == {"mean": 2, "n": 2}
    assert found["std"] == pytest.approx(math.sqrt(2))
    assert (found["low"], found["high"]) == bootstrap([1.0, 3.0])
    assert describe([7.0]) == {"mean": 7, "std": None, "low": None, "high": None, "n": 1}
    assert describe([]) == {"mean": None, "std": None, "low": None, "high": None, "n": 0}
    infinite = describe([1.0, math.inf])
    assert infinite == {"mean": math.inf, "std": None, "low": None, "high": None, "n": 2}


def test_every_metric_has_a_direction() -> None:
    assert {*METRICS, "lpips", "fvd", "fid"} <= DIRECTION.keys()
    assert set(DIRECTION.values()) == {"up", "down", "zero"}
