"""What every task that reads a tree and writes a folder keeps to: nothing is written into the tree."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from praxino import video
from praxino.config import conf_dir, register_resolvers
from praxino.data.synthetic import draw
from praxino.errors import ConfigError
from praxino.tasks.encode import encode
from praxino.tasks.predict import predict
from praxino.tasks.reconstruct import find_sources, reconstruct
from praxino.tasks.rundir import check_outside
from praxino.tasks.train import run


def train(data: dict[str, str], out: str) -> Any:
    register_resolvers()
    words = [f"data.{key}={path}" for key, path in data.items()]
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        return run(compose("train", overrides=["experiment=wfvae_tiny", f"out={out}", *words]))


TASKS: dict[str, Callable[[str, str], Any]] = {
    "data.root": lambda root, out: train({"root": root}, out),
    "data.val_root": lambda root, out: train({"root": f"{root}/../other", "val_root": root}, out),
    "data.root=": lambda root, out: encode("vae.ckpt", {"root": root}, out),
    "input": lambda root, out: reconstruct("vae.ckpt", root, out),
    "input=": lambda root, out: predict("run", root, out),
}


@pytest.mark.parametrize("key", TASKS)
def test_no_task_writes_into_the_tree_that_it_reads(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    (tmp_path / "vae.ckpt").touch()
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    for out in ("videos", "videos/inside", "link/inside/deep"):
        with pytest.raises(ConfigError, match=f"out={out} lies inside {key.rstrip('=')}="):
            TASKS[key](str(root), out)
    assert not list(root.iterdir())


def test_beside_and_above_a_tree_is_outside(tmp_path: Path) -> None:
    for out in ("videos-2", "other", "."):
        check_outside(tmp_path / out, {"data.root": tmp_path / "videos", "data.val_root": None})


def test_a_limit_takes_videos_from_all_over_the_tree(tmp_path: Path) -> None:
    for kind in ("a", "b", "c"):
        for number in range(4):
            frames = draw(0, frames=2, size=16, seed=number)[1]
            video.write(tmp_path / "in" / kind / f"{number}.mp4", frames, 8, "lossless")
    limits: dict[int | None, list[str]] = {}
    for limit in (3, 6, 99, None):
        limits[limit] = find_sources(tmp_path / "in", False, str(tmp_path / "cache"), limit)[1]
    assert limits[3] == ["a/0.mp4", "b/0.mp4", "c/0.mp4"]
    assert limits[6] == ["a/0.mp4", "a/2.mp4", "b/0.mp4", "b/2.mp4", "c/0.mp4", "c/2.mp4"]
    assert limits[99] == limits[None] == sorted(limits[99])
    assert len(limits[99]) == 12
