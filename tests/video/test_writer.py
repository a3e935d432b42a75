"""What is written reads back, with its size, rate and colours; complete or not at all."""

import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from praxino.video import Writer, probe, read, write
from praxino.video.writer import exact_rate

from .conftest import moving


def smooth(frames: int, height: int, width: int) -> Tensor:
    small = torch.rand(1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    video = F.interpolate(small, (frames, height, width), mode="trilinear", align_corners=True)[0]
    return (video.permute(1, 2, 3, 0) * 200 + 25).round().to(torch.uint8)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


@pytest.mark.parametrize("size", [(128, 160), (127, 161), (128, 161), (2, 2), (1, 1)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi"])
def test_h264(size: tuple[int, int], suffix: str, tmp_path: Path) -> None:
    video = smooth(12, *size)
    path = write(tmp_path / f"a{suffix}", video, Fraction(24000, 1001))
    info = probe(path, index_dir=None)
    assert (info.frames, info.height, info.width) == (12, *size)
    assert (info.fps, info.codec) == (Fraction(24000, 1001), "h264")
    got = read(path, index_dir=None)
    if min(size) > 2:  # 2x2 pixels share one colour sample
        assert psnr(got, video) > 38
        assert (got.float() - video.float()).mean((0, 1, 2)).abs().max() < 2


def test_the_same_frames_make_the_same_file(tmp_path: Path) -> None:
    """Whatever lies in memory that nobody wrote to, which `MALLOC_PERTURB_` decides."""
    np.save(tmp_path / "frames.npy", moving(20, 64, 80).numpy())
    code = "import sys, numpy; from praxino.video import write; write(sys.argv[2], numpy.load(sys.argv[1]), 25)"
    files = set()
    for memory in ("85", "165"):
        command = [sys.executable, "-c", code, str(tmp_path / "frames.npy"), str(tmp_path / "a.mp4")]
        subprocess.run(command, env={**os.environ, "MALLOC_PERTURB_": memory}, check=True, timeout=240)
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


def test_quality_counts(tmp_path: Path) -> None:
    video = moving(12, 96, 128)
    good, poor = (
        write(tmp_path / "good.mp4", video, 25, quality=10),
        write(tmp_path / "poor.mp4", video, 25, quality=40),
    )
    assert psnr(read(good, index_dir=None), video) > psnr(read(poor, index_dir=None), video) + 3
    assert good.stat().st_size > 2 * poor.stat().st_size


@pytest.mark.parametrize("size", [(48, 64), (47, 63), (1, 1)])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.avi", "frames"])
def test_lossless(size: tuple[int, int], name: str, tmp_path: Path) -> None:
    video = torch.randint(0, 256, (9, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = write(tmp_path / name, video, 12.5, codec="lossless" if "." in name else None)
    assert torch.equal(read(path, index_dir=None), video)
    assert probe(path, index_dir=None).fps == (Fraction(25, 2) if "." in name else 25)


def test_png_frames(tmp_path: Path) -> None:
    video = moving(11, 20, 30)
    path = write(tmp_path / "clip.v1", (chunk for chunk in video.split(4)), 25, codec="png")
    assert sorted(p.name for p in path.iterdir()) == [f"{k:05d}.png" for k in range(11)]
    assert torch.equal(read(path, index_dir=None), video)
    write(path, video[:3], 25, codec="png")
    assert len(list(path.iterdir())) == 3
    (path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other things"):
        write(path, video[:3], 25, codec="png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.v1"]


def test_gif(tmp_path: Path) -> None:
    video = smooth(10, 40, 60)
    path = write(tmp_path / "a.gif", video, 10)
    info = probe(path, index_dir=None)
    assert (info.frames, info.height, info.width, info.fps, info.codec) == (10, 40, 60, 10, "gif")
    assert psnr(read(path, index_dir=None), video) > 25


RATES: dict[float | Fraction, Fraction] = {
    23.976: Fraction(24000, 1001),
    29.97: Fraction(30000, 1001),
    59.94: Fraction(60000, 1001),
    24.0: Fraction(24),
    25: Fraction(25),
    0.5: Fraction(1, 2),
    1.0: Fraction(1),
    12.5: Fraction(25, 2),
    Fraction(37200, 1241): Fraction(37200, 1241),
}


@pytest.mark.parametrize(("fps", "exact"), RATES.items())
def test_rates(fps: float | Fraction, exact: Fraction, tmp_path: Path) -> None:
    assert exact_rate(fps) == exact
    assert exact_rate(1e-5) > 0
    assert probe(write(tmp_path / "a.mp4", moving(5, 16, 16), fps), index_dir=None).fps == exact


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "frames"])
def test_nothing_is_left_after_an_exception(name: str, tmp_path: Path) -> None:
    video = moving(4, 32, 32)

    def chunks() -> Iterator[Tensor]:
        yield video
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        write(tmp_path / name, chunks(), 25)
    with pytest.raises(ValueError, match="one video has one size"):
        write(tmp_path / name, iter([video, video[:, :16]]), 25)
    with pytest.raises(ValueError, match="no frames were added"):
        write(tmp_path / name, video[:0], 25)
    assert os.listdir(tmp_path) == []


def test_target_appears_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.mp4"
    with Writer(path, 25) as writer:
        writer.add(moving(4, 32, 32))
        assert not path.exists()
    assert probe(path, index_dir=None).frames == writer.frames == 4
    assert os.listdir(path.parent) == ["a.mp4"]
    before = path.read_bytes()

    def interrupted() -> Iterator[Tensor]:
        yield moving(2, 32, 32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, interrupted(), 25)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["a.mp4"]


@pytest.mark.parametrize("size", [(64, 80), (63, 81)])
def test_vp9(size: tuple[int, int], tmp_path: Path) -> None:
    video = smooth(6, *size)
    path = write(tmp_path / "a.webm", video, 12, quality=10)
    info = probe(path, index_dir=None)
    assert (info.frames, info.height, info.width, info.fps, info.codec) == (6, *size, 12, "vp9")
    assert psnr(read(path, index_dir=None), video) > 38


def test_wrong_requests(tmp_path: Path) -> None:
    for name, codec in (
        ("a.ogv", None),
        ("a.webm", "h264"),
        ("a.png", None),
        ("a.mp4", "gif"),
        ("a.gif", "h264"),
        ("frames", "lossless"),
    ):
        with pytest.raises(ValueError, match="cannot hold"):
            Writer(tmp_path / name, 25, codec)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="CRF"):
        Writer(tmp_path / "a.mp4", 25, quality=70)
    with pytest.raises(ValueError, match="more than 0"):
        Writer(tmp_path / "a.mp4", 0)
    with pytest.raises(ValueError, match="use uint8"):
        write(tmp_path / "a.mp4", torch.zeros(2, 8, 8, 3), 25)


def test_folder_name_that_is_not_utf8(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    path = write(os.path.join(folder, "caf\udce9.mp4"), moving(3, 16, 16), 25)
    assert probe(path, index_dir=None).frames == 3
