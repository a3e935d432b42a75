"""Pictures become videos in the order of their numbers, one video a sequence."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from praxino.errors import ConfigError, DataError
from praxino.tasks.make_video import make_video
from praxino.video import probe, read, write


def pictures(folder: Path, names: list[str], shade: int = 0, size: tuple[int, int] = (16, 24)) -> None:
    """Write pictures of one grey each: `shade` plus ten times its place in the list."""
    folder.mkdir(parents=True, exist_ok=True)
    greys = torch.arange(len(names), dtype=torch.uint8) * 10 + shade
    drafts = folder / ".drafts" / "d"
    drafts.parent.mkdir(exist_ok=True)
    write(drafts, greys.view(-1, 1, 1, 1).expand(-1, *size, 3), 25)
    for number, name in enumerate(names):
        (drafts / f"{number:05d}.png").rename(folder / name)


def greys(path: Path) -> list[int]:
    frames: Tensor = read(path, index_dir=None)
    return frames.float().mean((1, 2, 3)).round().int().tolist()


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".mkv"])
def test_twelve_frames_in_order(suffix: str, tmp_path: Path) -> None:
    pictures(tmp_path / "in", [f"frame_{number}.png" for number in range(12)])  # by name, 10 comes before 2
    result = make_video(str(tmp_path / "in"), str(tmp_path / f"out{suffix}"), fps=10)
    path = tmp_path / f"out{suffix}"
    assert result["videos"] == {str(path): 12}
    assert probe(path, index_dir=None).fps == 10
    assert all(abs(got - 10 * number) <= 2 for number, got in enumerate(greys(path)))


def test_prefixes_and_folders_are_videos_of_their_own(tmp_path: Path) -> None:
    pictures(tmp_path / "in", [f"sample_{n}.png" for n in range(3)])
    pictures(tmp_path / "in", [f"reconstruction_{n}.png" for n in range(4)], shade=100)
    pictures(tmp_path / "in" / "more" / "cat", [f"{n}.png" for n in range(2)], shade=200)
    make_video(str(tmp_path / "in"), str(tmp_path / "out.mp4"), lossless=True)
    found = {path.relative_to(tmp_path / "out").as_posix(): greys(path) for path in (tmp_path / "out").rglob("*.mp4")}
    assert found == {
        "sample.mp4": [0, 10, 20],
        "reconstruction.mp4": [100, 110, 120, 130],
        "more/cat.mp4": [200, 210],
    }


def test_names_without_numbers_and_pictures_left_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures(tmp_path / "letters", ["a.png", "b.png", "c.png"])
    make_video(str(tmp_path / "letters"), str(tmp_path / "letters.mp4"), lossless=True)
    assert greys(tmp_path / "letters.mp4") == [0, 10, 20]
    pictures(tmp_path / "mixed", ["0.png", "1.png", "cover.png"])
    with caplog.at_level(logging.WARNING):
        make_video(str(tmp_path / "mixed"), str(tmp_path / "mixed.mp4"), lossless=True)
    assert greys(tmp_path / "mixed.mp4") == [0, 10]
    assert "1 pictures belong to no sequence" in caplog.text


def test_a_video_of_another_kind_keeps_its_rate(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", torch.full((5, 16, 16, 3), 90, dtype=torch.uint8), 20)
    make_video(str(tmp_path / "a.mp4"), str(tmp_path / "a.gif"))
    assert (probe(tmp_path / "a.gif", index_dir=None).frames, probe(tmp_path / "a.gif", index_dir=None).fps) == (5, 20)


def test_what_cannot_be_made(tmp_path: Path) -> None:
    pictures(tmp_path / "in", ["0.png", "1.png"])
    with pytest.raises(ConfigError, match=r"\.webm"):
        make_video(str(tmp_path / "in"), str(tmp_path / "out.jpg"))
    with pytest.raises(ConfigError, match="CRF"):
        make_video(str(tmp_path / "in"), str(tmp_path / "out.mp4"), quality=99)
    with pytest.raises(ConfigError, match="more than 0"):
        make_video(str(tmp_path / "in"), str(tmp_path / "out.mp4"), fps=-1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        make_video(str(tmp_path / "empty"), str(tmp_path / "out.mp4"))
    pictures(tmp_path / "in", ["2.png"], size=(8, 8))
    with pytest.raises(ConfigError, match="one size"):
        make_video(str(tmp_path / "in"), str(tmp_path / "out.mp4"))
    assert not (tmp_path / "out.mp4").exists()
