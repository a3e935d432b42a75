"""Fixtures for every test."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Before torch: tests that fork must not inherit a pool of threads, and threads that wait stall a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Return a path of the reference material beside the checkout; skip where a clone lacks it."""

    def locate(relative: str) -> Path:
        path = SHARED / relative
        if not path.exists():
            message = f"reference material not found: ../shared/{relative}"
            if os.environ.get("PRAXINO_REQUIRE_SHARED") == "1":
                pytest.fail(message)
            pytest.skip(message)
        return path

    return locate


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="0/1", help="run the k-th of n parts of the tests, as k/n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every n-th test of those selected by `-m`, beginning with the k-th; give slow ones more time."""
    for item in items:
        if "slow" in item.keywords and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))
    k, n = (int(number) for number in config.getoption("--part").split("/"))
    if n > 1:
        slow = [item for item in items if "slow" in item.keywords]
        config.hook.pytest_deselected(items=[item for item in items if item not in slow[k::n]])
        items[:] = slow[k::n]
