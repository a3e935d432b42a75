"""Write videos: H.264, lossless H.264, VP9, GIF, or a folder of PNG frames; complete or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

import av
import numpy as np
import torch
from av.filter import Graph
from av.video.codeccontext import VideoCodecContext
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from praxino.video.types import IMAGE_SUFFIXES, VIDEO_SUFFIXES

Codec = Literal["h264", "lossless", "vp9", "gif", "png"]
CONTAINERS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".avi"})
DRAFT = ".praxino-"  # how the name of a video begins while it is written
ENCODERS = {"h264": "libx264", "lossless": "libx264rgb", "vp9": "libvpx-vp9"}
BT709, LIMITED = 1, 1  # the same numbers for matrix, primaries and transfer curve


def exact_rate(fps: Fraction | float) -> Fraction:
    """Return a frame rate as a fraction; 23.976 and its like become 24000/1001."""
    if not 0 < fps < 1e6:
        raise ValueError(f"{fps} frames per second cannot be written: use more than 0, e.g. 25")
    if isinstance(fps, Fraction):
        return fps
    broadcast = Fraction(round(fps * 1.001) * 1000, 1001)
    if abs(broadcast / fps - 1) < 1e-4:
        return broadcast
    return max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))


class _Sink(Protocol):
    def add(self, frame: VideoFrame) -> None: ...

    def close(self) -> None: ...


class _Coded:
    """Limited-range BT.709, tagged so; RGB throughout if lossless. Odd sizes keep all of their colour samples."""

    def __init__(self, path: Path, rate: Fraction, height: int, width: int, quality: int, codec: Codec) -> None:
        lossless = codec == "lossless"
        self.container = av.open(str(path), "w")
        self.stream: VideoStream = self.container.add_stream(ENCODERS[codec], rate=rate)  # type: ignore[assignment]
        stream, context = self.stream, self.stream.codec_context
        assert isinstance(context, VideoCodecContext)
        stream.width, stream.height = width, height
        odd = height % 2 or width % 2
        stream.pix_fmt = "rgb24" if lossless else "yuv444p" if odd else "yuv420p"
        stream.options = {"qp": "0", "preset": "veryfast"} if lossless else {"crf": str(quality)}
        if codec == "h264":  # builds of x264 whose look-ahead by macroblocks reads what was never written: no two
            stream.options |= {"mbtree": "0"}  # files of many widths were the same
        if codec == "vp9":  # constant quality, in all colours of odd sizes, too
            stream.options |= {"b": "0", "deadline": "good", "cpu-used": "4", "profile": "1" if odd else "0"}
        if path.suffix.lower() == ".avi":
            stream.options |= {"bf": "0"}  # AVI stores no presentation times
        if not lossless:
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED
        self.lossless = lossless
        self.reformatter = VideoReformatter()

    def add(self, frame: VideoFrame) -> None:
        pts = frame.pts
        if not self.lossless:
            frame = self.reformatter.reformat(
                frame,
                format=self.stream.pix_fmt,
                dst_colorspace=BT709,
                dst_color_range=LIMITED,
                interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
            )
            frame.pts = pts
        self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        try:
            if self.stream.codec_context.is_open:
                self.container.mux(self.stream.encode(None))
        finally:
            self.container.close()


class _Gif:
    """A palette for every frame, so that the memory needed does not depend on the length."""

    def __init__(self, path: Path, rate: Fraction, height: int, width: int) -> None:
        self.container = av.open(str(path), "w", format="gif")
        self.stream = self.container.add_stream("gif", rate=rate)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "pal8"
        graph = Graph()
        source = graph.add_buffer(width=width, height=height, format=VideoFormat("rgb24"), time_base=1 / rate)
        split, colours = graph.add("split"), graph.add("palettegen", "stats_mode=single")
        use, sink = graph.add("paletteuse", "new=1"), graph.add("buffersink")
        source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(colours, 1, 0)
        colours.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()
        self.graph = graph

    def _drain(self) -> None:
        while True:
            try:
                frame = self.graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            self.container.mux(self.stream.encode(frame))  # type: ignore[arg-type]

    def add(self, frame: VideoFrame) -> None:
        self.graph.push(frame)
        self._drain()

    def close(self) -> None:
        try:
            self.graph.push(None)
            self._drain()
            if self.stream.codec_context.is_open:
                self.container.mux(self.stream.encode(None))
        finally:
            self.container.close()


class _Png:
    """One file per frame: 00000.png, 00001.png, ..."""

    def __init__(self, path: Path, height: int, width: int) -> None:
        path.mkdir()
        self.folder, self.size, self.count = path, (height, width), 0

    def add(self, frame: VideoFrame) -> None:
        context = av.CodecContext.create("png", "w")
        assert isinstance(context, VideoCodecContext)
        context.height, context.width = self.size
        context.pix_fmt, context.time_base = "rgb24", Fraction(1, 25)
        data = b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])
        (self.folder / f"{self.count:05d}.png").write_bytes(data)
        self.count += 1

    def close(self) -> None:
        pass


class Writer:
    """Write one video; a context manager. The target appears when it is complete, and never after an exception.

    Args:
        path: .mp4, .m4v, .mov, .mkv or .avi for H.264, .webm for VP9, .gif, or a name without suffix for a folder of
            PNG frames.
        fps: frames per second; 24000/1001 stays exact as a Fraction.
        codec: None follows the suffix; "lossless" writes H.264 that decodes to the very same pixels.
        quality: CRF of H.264 and VP9, 0 (best) to 51.
    """

    def __init__(
        self, path: str | os.PathLike[str], fps: Fraction | float, codec: Codec | None = None, quality: int = 18
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.rate = exact_rate(fps)
        self.quality = quality
        suffix = self.path.suffix.lower()
        own: dict[str, Codec] = {".gif": "gif", ".webm": "vp9", **dict.fromkeys(CONTAINERS, "h264")}
        self.codec: Codec = codec or own.get(suffix, "png")
        allowed = {"gif": {".gif"}, "vp9": {".webm"}, "png": {suffix} - VIDEO_SUFFIXES - IMAGE_SUFFIXES}.get(
            self.codec, CONTAINERS
        )
        if suffix not in allowed:
            remedy = (
                f"{', '.join(sorted(CONTAINERS))} for h264 or lossless, .webm for vp9, .gif for gif, a folder for png"
            )
            raise ValueError(f"{self.path.name!r} cannot hold {self.codec}: use {remedy}")
        if not 0 <= quality <= 51:
            raise ValueError(f"quality {quality} is not a CRF: use 0 (best) to 51, e.g. 18")
        if self.codec == "png" and self.path.exists() and not _replaceable(self.path):
            raise FileExistsError(f"{self.path} holds other things than PNG frames: use another folder")
        self.frames = 0
        self._size: tuple[int, int] | None = None
        self._sink: _Sink | None = None
        self._draft = self.path.with_name(f"{DRAFT}{uuid.uuid4().hex}{suffix if self.codec != 'png' else ''}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def add(self, frames: Tensor | np.ndarray) -> None:
        """Append uint8 frames `(t, H, W, 3)`, all of the size of the first."""
        array = frames.cpu().numpy() if isinstance(frames, torch.Tensor) else frames
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
            raise ValueError(f"frames {array.dtype} {array.shape} cannot be written: use uint8 (t, H, W, 3)")
        size = (array.shape[1], array.shape[2])
        if self._size not in (None, size):
            raise ValueError(f"frames {size} do not fit the first ones {self._size}: one video has one size")
        for picture in array:
            if self._sink is None:
                self._size, self._sink = size, self._open(*size)
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = self.frames, 1 / self.rate
            self._sink.add(frame)
            self.frames += 1

    def _open(self, height: int, width: int) -> _Sink:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.codec == "png":
            return _Png(self._draft, height, width)
        if self.codec == "gif":
            return _Gif(self._draft, self.rate, height, width)
        return _Coded(self._draft, self.rate, height, width, self.quality, self.codec)

    def close(self) -> None:
        """Complete the video and put it in its place; ValueError if no frame was added."""
        if self._sink is None:
            if self.frames:
                return  # closed before
            raise ValueError(f"no frames were added to {self.path}: nothing is written")
        sink, self._sink = self._sink, None
        try:
            sink.close()
            if self.codec == "png" and self.path.is_dir():
                old = self._draft.with_name(f"{self._draft.name}-old")
                os.replace(self.path, old)
                os.replace(self._draft, self.path)
                shutil.rmtree(old)
            else:
                os.replace(self._draft, self.path)
        except BaseException:
            self._remove()
            raise

    def discard(self) -> None:
        """Give up: leave neither the target nor a trace of the attempt."""
        sink, self._sink = self._sink, None
        try:
            if sink is not None:
                sink.close()
        except (av.error.FFmpegError, OSError, ValueError):
            pass
        finally:
            self._remove()

    def _remove(self) -> None:
        if self._draft.is_dir():
            shutil.rmtree(self._draft, ignore_errors=True)
        else:
            self._draft.unlink(missing_ok=True)


def _replaceable(path: Path) -> bool:
    return path.is_dir() and all(child.suffix == ".png" and child.stem.isdecimal() for child in path.iterdir())


def write(
    path: str | os.PathLike[str],
    frames: Tensor | np.ndarray | Iterable[Tensor],
    fps: Fraction | float,
    codec: Codec | None = None,
    quality: int = 18,
) -> Path:
    """Write frames `(T, H, W, 3)` uint8, or chunks of such, and return the path."""
    with Writer(path, fps, codec, quality) as writer:
        for chunk in [frames] if isinstance(frames, torch.Tensor | np.ndarray) else frames:
            writer.add(chunk)
    return writer.path
