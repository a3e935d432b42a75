"""A small tree of real videos, and a cache of its own for every session."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from praxino.video import write


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep frame indices and manifests out of the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def make_video(path: Path, frames: int = 12, size: tuple[int, int] = (32, 40), shade: int = 0) -> Path:
    """Write a video whose frame `k` is uniformly `10 k + shade`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = (10 * torch.arange(frames) + shade).clamp(max=255).to(torch.uint8)
    write(path, levels[:, None, None, None].expand(frames, *size, 3).contiguous(), 25)
    return path


@pytest.fixture(scope="session")
def new_video() -> Callable[..., Path]:
    return make_video


@pytest.fixture
def tree(tmp_path) -> Path:
    """Thirteen videos of 12 frames in three folders."""
    for k in range(13):
        make_video(tmp_path / "tree" / "abc"[k % 3] / f"{k:02d}.mp4", shade=k)
    return tmp_path / "tree"
