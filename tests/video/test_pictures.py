"""Folders of pictures and single pictures as videos."""

import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.codeccontext import VideoCodecContext

from praxino.video import DecodeFailure, Geometry, Video, frames_in, is_sequence, probe, read

from .conftest import moving

CLIP = moving(12, 24, 32)


def save(path: Path, picture: torch.Tensor, pix_fmt: str = "rgb24") -> Path:
    """Write one picture by its suffix."""
    codec = {".jpg": "mjpeg", ".png": "png", ".bmp": "bmp", ".tif": "tiff", ".webp": "libwebp"}[path.suffix]
    context = av.CodecContext.create(codec, "w")
    assert isinstance(context, VideoCodecContext)
    context.height, context.width, context.time_base = picture.shape[0], picture.shape[1], Fraction(1, 25)
    context.pix_fmt = {"mjpeg": "yuvj444p", "bmp": "bgr24", "libwebp": "bgra"}.get(codec, pix_fmt)
    context.options = {"libwebp": {"lossless": "1"}}.get(codec, {})
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture.numpy()), format="rgb24").reformat(
        format=context.pix_fmt
    )
    frame.pts = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(bytes(p) for p in [*context.encode(frame), *context.encode(None)]))
    return path


def sequence(folder: Path, names: list[str]) -> Path:
    for name, picture in zip(names, CLIP, strict=False):
        save(folder / name, picture)
    return folder


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
def test_folder_of_lossless_pictures(suffix: str, tmp_path: Path) -> None:
    folder = sequence(tmp_path / "clip", [f"{k:03d}{suffix}" for k in range(12)])
    with Video(folder, index_dir=None) as video:
        info = video.info
        assert (info.kind, info.frames, info.height, info.width, info.fps) == ("folder", 12, 24, 32, Fraction(25))
        assert torch.equal(video.read([11, 0, 5, 5]), CLIP[[11, 0, 5, 5]])
        assert torch.equal(torch.cat(list(video.chunks(5))), CLIP)
        assert video.read([3], Geometry(6, 8, (0, 0, 12, 16))).shape == (1, 6, 8, 3)
        assert video.timestamps[:3].tolist() == [0.0, 0.04, 0.08]


def test_jpg(tmp_path: Path) -> None:
    folder = sequence(tmp_path / "clip", [f"{k:03d}.jpg" for k in range(4)])
    video = read(folder, index_dir=None)
    assert (video.float() - CLIP[:4].float()).abs().mean() < 6


def test_numbers_order_the_frames(tmp_path: Path) -> None:
    folder = sequence(tmp_path / "clip", [f"{k}.png" for k in (1, 2, 3, 9, 10, 11, 30)])
    assert torch.equal(read(folder, index_dir=None), CLIP[:7])
    assert is_sequence(folder)


def test_each_prefix_is_a_sequence(tmp_path: Path) -> None:
    folder = sequence(tmp_path / "clip", [f"{side}_{k:02d}.png" for side in ("left", "right") for k in range(4)])
    assert list(frames_in(folder)) == [str(folder / "left_*"), str(folder / "right_*")]
    assert torch.equal(read(folder / "right_*", index_dir=None), CLIP[4:8])
    assert probe(folder / "left_*", index_dir=None).kind == "folder"
    with pytest.raises(DecodeFailure, match=r"2 videos in one folder, name one: left_\*, right_\*") as failure:
        probe(folder, index_dir=None)
    assert failure.value.reason == "several_sequences"
    with pytest.raises(DecodeFailure) as failure:
        probe(folder / "up_*", index_dir=None)
    assert failure.value.reason == "missing"


def test_same_number_in_two_types_is_two_sequences(tmp_path: Path) -> None:
    folder = sequence(tmp_path / "clip", [f"{k}{suffix}" for suffix in (".png", ".bmp") for k in range(3)])
    assert list(frames_in(folder)) == [str(folder / "*.bmp"), str(folder / "*.png")]
    assert torch.equal(read(folder / "*.bmp", index_dir=None), CLIP[3:6])


def test_strangers_are_passed_over(tmp_path: Path) -> None:
    folder = sequence(tmp_path / "clip", [f"frame{k}.png" for k in range(5)])
    save(folder / "cover.png", moving(1, 60, 60)[0])
    save(folder / ".frame9.png", CLIP[9])
    (folder / "Thumbs.db").write_bytes(b"thumbs")
    (folder / "notes.txt").write_text("notes")
    (folder / "frame7.png").mkdir()
    assert torch.equal(read(folder, index_dir=None), CLIP[:5])


def test_pictures_without_numbers_stand_alone(tmp_path: Path) -> None:
    folder = sequence(tmp_path / "photos", ["Berry.png", "apple.png"])
    assert list(frames_in(folder)) == [str(folder / "Berry.png"), str(folder / "apple.png")]
    assert not is_sequence(folder)
    info = probe(folder / "apple.png", index_dir=None)
    assert (info.kind, info.frames) == ("image", 1)
    assert torch.equal(read(folder / "apple.png", index_dir=None), CLIP[[1]])


def test_mixed_sizes_are_refused(tmp_path: Path) -> None:
    folder = sequence(tmp_path / "clip", ["0.png", "1.png"])
    save(folder / "2.png", CLIP[2, :20])
    with pytest.raises(DecodeFailure, match=r"2\.png is 20x32, the first is 24x32") as failure:
        probe(folder, index_dir=None)
    assert failure.value.reason == "mixed_sizes"


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_ends_before_the_first_damaged_picture(damage: str, suffix: str, tmp_path: Path) -> None:
    folder = sequence(tmp_path / "clip", [f"{k}{suffix}" for k in range(8)])
    bad = folder / f"5{suffix}"
    whole = bad.read_bytes()
    bad.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no picture"}[damage])
    info = probe(folder, index_dir=None)
    assert info.frames == 5
    assert info.damage.startswith(bad.name)
    assert len(read(folder, index_dir=None)) == 5
    with pytest.raises(DecodeFailure):
        probe(bad, index_dir=None)


def test_cache_follows_the_pictures(tmp_path: Path) -> None:
    folder, cache = sequence(tmp_path / "clip", [f"{k}.png" for k in range(3)]), tmp_path / "index"
    assert probe(folder, index_dir=cache).frames == 3
    save(folder / "3.png", CLIP[3])
    assert probe(folder, index_dir=cache).frames == 4
    (folder / "1.png").write_bytes(b"broken")
    assert probe(folder, index_dir=cache).frames == 1


@pytest.mark.parametrize("pix_fmt", ["gray", "gray16be", "ya8", "rgba", "rgb48be", "pal8", "monob"])
def test_every_kind_of_png_has_three_channels(pix_fmt: str, tmp_path: Path) -> None:
    if pix_fmt == "monob":
        picture = ((CLIP[0, :, :, :1] > 127) * 255).to(torch.uint8).expand(-1, -1, 3)
    elif pix_fmt in ("gray", "gray16be", "ya8"):
        picture = CLIP[0, :, :, 1:2].expand(-1, -1, 3)
    elif pix_fmt == "pal8":
        picture = CLIP[0]
    else:
        picture = CLIP[0]
    path = save(tmp_path / "a.png", picture, pix_fmt) if pix_fmt != "pal8" else palette(tmp_path / "a.png", picture)
    info = probe(path, index_dir=None)
    assert info.pix_fmt == pix_fmt
    got = read(path, index_dir=None)[0]
    assert (got.int() - picture.int()).abs().max() <= (40 if pix_fmt == "pal8" else 1)


def palette(path: Path, picture: torch.Tensor) -> Path:
    """Write a palette PNG by hand: the 256 colours are 3-3-2 bits of red, green and blue."""
    import struct
    import zlib

    red, green, blue = (picture[..., c].numpy() for c in range(3))
    index = (red >> 5 << 5) | (green >> 5 << 2) | (blue >> 6)
    colours = bytes(v for k in range(256) for v in (k >> 5 << 5 | 16, (k >> 2 & 7) << 5 | 16, (k & 3) << 6 | 32))
    rows = b"".join(b"\0" + row.tobytes() for row in index)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", picture.shape[1], picture.shape[0], 8, 3, 0, 0, 0)),
        (b"PLTE", colours),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize(("orientation", "turned"), [
    (3, lambda x: x.rot90(2, (0, 1))),
    (6, lambda x: x.rot90(-1, (0, 1))),
    (8, lambda x: x.rot90(1, (0, 1))),
])  # fmt: skip
def test_exif_orientation(orientation: int, turned: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", CLIP[0])
    upright = read(path, index_dir=None)[0]
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + orientation.to_bytes(2, "big") + b"\0\0\0\0\0\0"
    exif = b"Exif\0\0" + tiff
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:])
    assert torch.equal(read(path, index_dir=None)[0], turned(upright))


def test_too_large_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", moving(1, 40, 40)[0])
    with pytest.raises(DecodeFailure) as failure:
        probe(path, index_dir=None, max_pixels=1000)
    assert failure.value.reason == "too_large"


def test_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(DecodeFailure) as failure:
        probe(tmp_path, index_dir=None)
    assert failure.value.reason == "not_a_file"
    assert frames_in(tmp_path) == {}
    with pytest.raises(DecodeFailure) as failure:
        frames_in(tmp_path / "absent")
    assert failure.value.reason == "missing"


def test_address_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sequence(tmp_path / "clip", ["a1.png", "a2.png", "b1.png", "b2.png"])
    monkeypatch.chdir(folder)
    assert probe("a*", index_dir=None).frames == 2
    shutil.rmtree(folder)
    assert not os.path.exists(folder)
