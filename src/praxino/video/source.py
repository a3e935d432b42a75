"""Open one video file safely and walk its packets and frames."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import av
import av.error
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from praxino.video.types import DecodeFailure, Reason

# No playlist, no concatenation, no network, no picture files: a video is one file and nothing else is opened.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,gif,flv,live_flv,asf,ogg,ivf,mxf,dv,nut,yuv4mpegpipe,"
    "h264,hevc,m4v,obu,vvc"
)
OPTIONS = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
TIMEOUT = 30.0  # seconds without input


def check_file(path: str) -> os.stat_result:
    """Return the status of a readable, regular, non-empty file; raise DecodeFailure otherwise.

    A named pipe must be refused before it is opened: opening it blocks for ever.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise DecodeFailure(path, "not_a_file", "not a regular file")
        if status.st_size == 0:
            raise DecodeFailure(path, "empty", "0 bytes")
        if not os.access(path, os.R_OK):
            raise DecodeFailure(path, "permission", "not readable")
    except PermissionError as error:
        raise DecodeFailure(path, "permission", error.strerror or "not readable") from None
    except (OSError, ValueError) as error:
        raise DecodeFailure(path, "missing", getattr(error, "strerror", None) or str(error)) from None
    return status


@contextmanager
def failures(path: str, reason: Reason) -> Iterator[None]:
    """Turn whatever FFmpeg and PyAV raise into a DecodeFailure: `reason` unless the exception tells a better one."""
    try:
        yield
    except DecodeFailure:
        raise
    except Exception as error:
        if isinstance(error, av.error.DecoderNotFoundError | av.error.PatchWelcomeError | NotImplementedError):
            reason = "codec"
        elif isinstance(error, PermissionError):
            reason = "permission"
        elif isinstance(error, FileNotFoundError):
            reason = "missing"
        elif isinstance(error, av.error.ExitError | TimeoutError):
            reason = "timeout"
        elif isinstance(error, MemoryError):
            reason = "too_large"
        elif isinstance(error, av.error.ArgumentError) and reason == "container":
            raise DecodeFailure(path, reason, "not a video container, or one that is not allowed") from None
        text = getattr(error, "strerror", None) or str(error) or "no message"
        raise DecodeFailure(path, reason, f"{type(error).__name__}: {text}") from None


class Source:
    """One opened file: its video stream and decoder. Used with `with`, or closed by hand."""

    def __init__(self, path: str, max_pixels: int) -> None:
        self.path = path
        self.max_pixels = max_pixels
        self._fresh = True  # nothing was read yet
        check_file(path)
        with failures(path, "container"):
            self.container = av.open(os.path.abspath(path), options=OPTIONS, metadata_errors="ignore", timeout=TIMEOUT)
        try:
            with failures(path, "no_video"):
                self.stream = self._choose()
            with failures(path, "codec"):
                context = self.stream.codec_context
                self.codec: str = context.codec.canonical_name or context.name
                self._check_size(context.width, context.height)
                context.thread_type = "NONE"
                context.thread_count = 1
                context.options = self.limits()
        except BaseException:
            self.container.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.container.close()

    def _choose(self) -> VideoStream:
        """Return the first stream marked as default, else the first; cover pictures do not count."""
        streams = [s for s in self.container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            detail = "only a cover picture" if self.container.streams.video else "no video stream"
            raise DecodeFailure(self.path, "no_video", detail)
        known = [s for s in streams if s.codec_context is not None]
        if not known:
            raise DecodeFailure(self.path, "codec", "no decoder for the video stream")
        return next((s for s in known if s.disposition & Disposition.default), known[0])

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            detail = f"{width}x{height} is more than {self.max_pixels} pixels: raise max_pixels to read it"
            raise DecodeFailure(self.path, "too_large", detail)

    def limits(self) -> dict[str, str]:
        """Return the decoder's own limit, which counts padding; the exact one is checked on every frame."""
        return {"max_pixels": str(2 * self.max_pixels)}

    def packets(self) -> Iterator[Packet]:
        """Yield the packets of the video stream, and an empty one at the end that drains the decoder."""
        with failures(self.path, "corrupt"):
            yield from self.container.demux(self.stream)

    def is_cut_off(self, packet: Packet) -> bool:
        """Tell whether the file ends within this packet: decoders would fill up the picture.

        MPEG transport streams mark packets for other reasons too; the data of a GIF frame ends with a zero, and that of
        the last one may hold the end mark of the file.
        """
        if self.codec == "gif" and packet.size:
            return memoryview(packet)[-1] not in (0x00, 0x3B)
        return packet.is_corrupt and self.container.format.name != "mpegts"

    def decode(self, packet: Packet | None) -> list[VideoFrame]:
        """Decode one packet (None drains the decoder); raise DecodeFailure where it is damaged."""
        with failures(self.path, "corrupt"):
            frames = self.stream.codec_context.decode(packet)
        for frame in frames:
            self._check_size(frame.width, frame.height)
        return frames

    def frames(self) -> Iterator[VideoFrame]:
        """Yield the frames from the present position on; DecodeFailure ends them where the data is damaged."""
        for packet in self.packets():
            if self.is_cut_off(packet):
                raise DecodeFailure(self.path, "corrupt", "the file ends within a frame")
            yield from self.decode(packet if packet.size else None)

    def seek(self, pts: int) -> None:
        """Go to the last key frame at or before `pts` (in the stream's time base), as the container sees it."""
        with failures(self.path, "corrupt"):
            if self._fresh and self.codec == "h264":
                self._read_headers()
            self._fresh = False
            self.container.seek(pts, stream=self.stream, backward=True)

    def _read_headers(self) -> None:
        """Show the decoder the first packet without a picture being decoded.

        x264 signs only that packet, and FFmpeg decodes 4:4:4 by the encoder's version: without it, every frame reached
        by seeking differs.
        """
        context = self.stream.codec_context
        context.skip_frame = "ALL"
        packet = next(self.container.demux(self.stream), None)
        if packet is not None and packet.size:
            context.decode(packet)
        context.skip_frame = "DEFAULT"
