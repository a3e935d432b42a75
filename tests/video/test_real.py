"""Exact frames on real clips: every file of ../shared/data/videos, against decoding from the start."""

import csv
import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch

from praxino.video import Video, probe
from praxino.video.source import Source

QUICK = [
    "actions/apply_makeup/test.avi",
    "actions/arm_wrestling/demo.mp4",
    "animals/kitten_vfr.mp4",
    "broadcast/asteroid.mpg",
    "broadcast/nasa_13013.mp4",
    "hdr/roadtrip-vp92-10bit.webm",
    "lab/flame.avi",
    "objects/loops/newtonscradle.gif",
    "phones/portrait.MOV",
]
SQUARE_WIDTH = {"actions/arm_wrestling/demo.mp4": 427}  # 340 columns with pixels of 64:51


def rows(root: Path) -> dict[str, dict[str, str]]:
    with open(root / "MANIFEST.csv", encoding="utf-8", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def digest(picture: torch.Tensor) -> str:
    return hashlib.sha1(picture.contiguous().numpy().tobytes()).hexdigest()


def truth(path: Path) -> list[str]:
    """Return a digest of every frame, decoded from the start by PyAV alone and turned by its own `rotation`."""
    found = []
    with Source(str(path), 10**9) as source:
        number = source.stream.index
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams[number]
        stream.codec_context.thread_type = "SLICE"  # type: ignore[assignment]
        for frame in container.decode(stream):  # type: ignore[call-overload]
            picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
            found.append(digest(picture.rot90(frame.rotation // 90, (0, 1))))
    return found


def wrong_frames(path: Path, clips: int, seed: int) -> tuple[int, int]:
    """Return (wrong, compared) over random clips and one pass of streaming."""
    expected, rng, wrong, compared = truth(path), random.Random(seed), 0, 0
    with Video(path, index_dir=None) as video:
        assert video.info.frames == len(expected)
        layout = video.index.layout
        object.__setattr__(layout, "square_width", layout.width)  # compare stored pixels
        for _ in range(clips):
            stride, length = rng.choice([1, 2, 4]), rng.choice([1, 9, 17])
            length = min(length, (len(expected) - 1) // stride + 1)
            start = rng.randrange(len(expected) - (length - 1) * stride)
            clip = [start + stride * j for j in range(length)]
            wrong += sum(digest(picture) != expected[k] for k, picture in zip(clip, video.read(clip), strict=True))
            compared += length
        streamed = [digest(picture) for chunk in video.chunks(16) for picture in chunk]
        wrong += sum(a != b for a, b in zip(streamed, expected, strict=True))
    return wrong, compared + len(streamed)


@pytest.mark.parametrize("name", QUICK)
def test_exact_frames(name: str, shared: Callable[[str], Path]) -> None:
    wrong, compared = wrong_frames(shared("data/videos") / name, clips=6, seed=0)
    assert wrong == 0
    assert compared > 10


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ninth", range(9))
def test_exact_frames_of_every_file(ninth: int, shared: Callable[[str], Path]) -> None:
    root = shared("data/videos")
    names = [name for name in rows(root) if not name.endswith("/")]
    assert len(names) == 36
    results = {name: wrong_frames(root / name, clips=12, seed=1) for name in names[ninth::9]}
    assert {name: result for name, result in results.items() if result[0]} == {}


def test_described_as_the_manifest_says(shared: Callable[[str], Path], tmp_path: Path) -> None:
    root = shared("data/videos")
    for name, row in rows(root).items():
        height, width = int(row["height"]), SQUARE_WIDTH.get(name, int(row["width"]))
        if int(row["rotation"] or 0) % 180:
            height, width = width, height
        for _ in range(2):  # the second time from the cache
            info = probe(root / name.rstrip("/"), index_dir=tmp_path)
            assert (info.frames, info.height, info.width) == (int(row["frames"]), height, width), name
            assert info.pix_fmt == row["pix_fmt"], name
            assert info.kind == "folder" or str(info.fps) == row["fps"], name
            assert info.damage == ""
