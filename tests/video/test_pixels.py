"""Rotation, mirrors, pixel aspect, crop and resize; colours, ranges and depths."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from praxino.video import Geometry, Video, probe, read, to_float, to_uint8

from .conftest import display_matrix, moving, plain

Make = Callable[..., Path]
CLIP = moving(6, 48, 80)
TURNS = {
    "as stored": ((1, 0, 0, 1), lambda x: x),
    "clockwise": ((0, 1, -1, 0), lambda x: x.rot90(-1, (1, 2))),
    "half": ((-1, 0, 0, -1), lambda x: x.rot90(2, (1, 2))),
    "counter-clockwise": ((0, -1, 1, 0), lambda x: x.rot90(1, (1, 2))),
    "mirrored": ((-1, 0, 0, 1), lambda x: x.flip(2)),
    "upside down": ((1, 0, 0, -1), lambda x: x.flip(1)),
    "transposed": ((0, 1, 1, 0), lambda x: x.transpose(1, 2)),
    "transverse": ((0, -1, -1, 0), lambda x: x.transpose(1, 2).flip(1, 2)),
}


def resized(video: Tensor, height: int, width: int) -> Tensor:
    batch = video.permute(0, 3, 1, 2).contiguous()
    return F.interpolate(batch, (height, width), mode="bilinear", antialias=True).permute(0, 2, 3, 1)


@pytest.mark.parametrize("turn", TURNS)
def test_display_matrix(turn: str, make: Make) -> None:
    matrix, expected = TURNS[turn]
    path = make("a.mp4", "libx264", CLIP)
    display_matrix(path, *matrix)
    shown = expected(plain(path))
    with Video(path, index_dir=None) as video:
        assert (video.info.height, video.info.width) == shown.shape[1:3]
        assert torch.equal(video.read(range(6)), shown)
        crop = (5, 8, 40, 36)
        got = video.read([4], Geometry(20, 30, crop))
    want = resized(shown[[4], 5:45, 8:44], 20, 30)
    assert (got.int() - want.int()).abs().max() <= 1  # the two passes of the resize are rounded in another order


def test_geometry(make: Make) -> None:
    path = make("a.mp4", "libx264", CLIP)
    truth = plain(path)
    cut = truth[[3, 1], 7:40, 11:70]
    assert torch.equal(read(path, [3, 1], Geometry(33, 59, (7, 11, 33, 59)), index_dir=None), cut)
    assert torch.equal(read(path, [3, 1], Geometry(16, 24, (7, 11, 33, 59)), index_dir=None), resized(cut, 16, 24))
    flipped = read(path, [3, 1], Geometry(16, 24, (7, 11, 33, 59), flip=True), index_dir=None)
    assert torch.equal(flipped, resized(cut, 16, 24).flip(2))
    assert flipped.is_contiguous()


def test_pixel_aspect(make: Make) -> None:
    path = make("a.mp4", "libx264", CLIP, {"x264-params": "sar=8/3"})
    info = probe(path, index_dir=None)
    assert (info.height, info.width) == (48, 213)
    truth = plain(path)
    assert torch.equal(read(path, index_dir=None), resized(truth, 48, 213))
    half = read(path, [2], Geometry(24, 53, (0, 0, 48, 106)), index_dir=None)
    assert torch.equal(half, resized(truth[[2], :, :40], 24, 53))
    display_matrix(path, 0, 1, -1, 0)
    assert (probe(path, index_dir=None).height, probe(path, index_dir=None).width) == (213, 48)


def test_senseless_pixel_aspect_is_ignored(make: Make) -> None:
    path = make("a.mp4", "libx264", CLIP, {"x264-params": "sar=30000/1"})
    info = probe(path, index_dir=None, max_pixels=100_000)
    assert (info.height, info.width) == (48, 80)


def colour_film(path: Path, pix_fmt: str, planes: list[int], matrix: int, full: bool, depth: int = 8) -> Path:
    """Write two frames of one stored colour, lossless, with the matrix and range tagged."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 32, pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        for k in range(2):
            frame = av.VideoFrame(32, 32, pix_fmt)
            frame.pts = k
            for plane, value in zip(frame.planes, planes, strict=True):
                plane.update(
                    np.full(plane.buffer_size * 8 // (8 if depth == 8 else 16), value, f"<u{depth // 8 or 1}").tobytes()
                    if depth == 8
                    else np.full(plane.buffer_size // 2, value, "<u2").tobytes()
                )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("matrix", "red", "blue"), [(1, 0.2126, 0.0722), (6, 0.299, 0.114)], ids=["709", "601"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("depth", [8, 10])
def test_matrix_range_and_depth(matrix: int, red: float, blue: float, full: bool, depth: int, tmp_path: Path) -> None:
    rgb = np.array([200.0, 90.0, 40.0]) / 255
    luma = red * rgb[0] + (1 - red - blue) * rgb[1] + blue * rgb[2]
    chroma = [(rgb[2] - luma) / (2 - 2 * blue), (rgb[0] - luma) / (2 - 2 * red)]
    scale = 2 ** (depth - 8)
    if full:
        stored = [luma * (2**depth - 1), *(c * (2**depth - 1) + 128 * scale for c in chroma)]
    else:
        stored = [(16 + 219 * luma) * scale, *((128 + 224 * c) * scale for c in chroma)]
    pix_fmt = "yuv444p" if depth == 8 else "yuv444p10le"
    path = colour_film(tmp_path / "a.mkv", pix_fmt, [round(v) for v in stored], matrix, full, depth)
    got = read(path, [0], index_dir=None)[0].float().mean((0, 1))
    np.testing.assert_allclose(got, rgb * 255, atol=2.5)


def test_gray_is_copied_to_three_channels(tmp_path: Path) -> None:
    for pix_fmt, value, depth in (("gray", 77, 8), ("gray16le", 77 * 257, 16)):
        path = colour_film(tmp_path / f"{pix_fmt}.mkv", pix_fmt, [value], 2, True, depth)
        frame = read(path, [1], index_dir=None)
        assert frame.shape == (1, 32, 32, 3)
        assert (frame.int() - 77).abs().max() <= 1


def test_sizes_that_change_on_the_way(tmp_path: Path, make: Make) -> None:
    small, large = make("small.ts", "mpeg2video", moving(8, 48, 64)), make("large.ts", "mpeg2video", moving(8, 96, 96))
    path = tmp_path / "both.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    truth = plain(path)
    video = read(path, index_dir=None)
    assert video.shape == (len(truth), 48, 64, 3)
    assert torch.equal(video, truth)


def test_to_float_and_back() -> None:
    video = torch.randint(0, 256, (2, 5, 4, 6, 3), dtype=torch.uint8)
    x = to_float(video)
    assert x.shape == (2, 3, 5, 4, 6)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert torch.equal(to_uint8(x), video)
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1)).flatten().tolist() == [-1.0, 1.0]
    assert to_float(video[0]).shape == (3, 5, 4, 6)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0]).view(3, 1, 1, 1)).flatten().tolist() == [0, 255, 128]


def test_rate_is_a_fraction(make: Make) -> None:
    assert probe(make("a.mp4", "libx264", CLIP), index_dir=None).fps == Fraction(25)
