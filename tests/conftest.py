"""Fixtures for every test."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

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
