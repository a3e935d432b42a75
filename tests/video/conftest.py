"""Videos made on the spot, and decoding from the start as the measure of all reading."""

from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def moving(frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return a clip `(T, H, W, 3)` in which every frame differs: a camera over a smooth texture."""
    noise = torch.rand(1, 3, height // 4 + 12, width // 4 + 12, generator=torch.Generator().manual_seed(seed))
    scene = F.interpolate(noise, (height + 40, width + 40), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    scene = (scene * 255).round().to(torch.uint8)
    steps = [(int(20 + 19 * np.sin(k / 5)), int(20 + 19 * np.cos(k / 7))) for k in range(frames)]
    return torch.stack([scene[top : top + height, left : left + width] for top, left in steps])


def encode(
    path: Path,
    codec: str,
    clip: Tensor,
    options: dict[str, str] | None = None,
    *,
    pix_fmt: str = "yuv420p",
    times: Iterable[int] | None = None,
    skip_packets: int = 0,
) -> Path:
    """Write a clip with any encoder; `times` are presentation times in 1/100 s, the first packets can be left out."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], pix_fmt
        stream.options = options or {}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 100)
        packets = []
        for k, (picture, time) in enumerate(zip(clip, times or range(len(clip)), strict=True)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture.numpy()), format="rgb24")
            frame.pts = time if times is not None else k
            frame.time_base = Fraction(1, 100 if times is not None else 25)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for packet in packets[skip_packets:]:
            container.mux(packet)
    return path


def plain(path: Path) -> Tensor:
    """Decode the first video stream from the start with nothing but PyAV, stored pixels, up to the first error."""
    frames: list[np.ndarray] = []
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
        try:
            for frame in container.decode(stream):
                height, width = frames[0].shape[:2] if frames else (frame.height, frame.width)
                frames.append(frame.reformat(width, height, "rgb24").to_ndarray())
        except av.error.FFmpegError:
            pass
    return torch.from_numpy(np.stack(frames))


def display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Write a display matrix into an mp4: shown (x, y) = (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    for place, value in ((0, a), (1, b), (3, c), (4, d)):
        data[start + 4 * place : start + 4 * place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(bytes(data))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a clip into the test's folder."""

    def build(name: str, codec: str, clip: Tensor, options: dict[str, str] | None = None, **more: object) -> Path:
        return encode(tmp_path / name, codec, clip, options, **more)  # type: ignore[arg-type]

    return build
