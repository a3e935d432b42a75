"""Read a video: describe it, take any frames, or stream all of them. Files, folders of frames and pictures alike."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from av.video.frame import VideoFrame
from torch import Tensor

from praxino.video import index as indexing
from praxino.video import pictures
from praxino.video.index import Cache, Index, default_index_dir
from praxino.video.pixels import Converter
from praxino.video.source import Source, check_file, failures
from praxino.video.types import MAX_PIXELS, DecodeFailure, Geometry, VideoInfo

log = logging.getLogger(__name__)

NONREF_EXACT = frozenset({"h264", "hevc"})  # decoders that can leave out unwanted pictures without touching the others
CLOSED = frozenset({"h264", "vp8", "vp9"})  # nothing after a key frame (of `Index.keys`) refers to what came before it
IN_BAND = frozenset({"h264", "hevc"})  # whose parameters may change between key frames
WORTH_A_SEEK = 8  # unwanted frames before a key frame that cost more to decode than a seek
USER_CACHE = Path("~user-cache")  # stands for default_index_dir(), which is found when a video is opened


class _Lost(Exception):
    """The fast way did not meet a frame that the index promised."""


class Video:
    """A video of any kind, opened when first needed; a context manager.

    Frame k is the k-th frame that plain decoding from the start delivers, up to the first damage.

    Args:
        path: a video file, a picture, a folder with one sequence of pictures, or `folder/prefix*` for one of several.
        index_dir: where indexes are kept; None keeps none.
        max_pixels: refuse larger pictures.
        fast: False reads everything by plain decoding from the start, and counts frames the same way.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        index_dir: Path | None = USER_CACHE,
        max_pixels: int = MAX_PIXELS,
        fast: bool = True,
    ) -> None:
        self.path = os.fspath(path)
        self.max_pixels = max_pixels
        self.fast = fast
        self._cache = Cache(default_index_dir() if index_dir == USER_CACHE else index_dir)
        self._index: Index | None = None
        self._files: list[str] | None = None
        self._stamp = ""
        self._source: Source | None = None
        self._reached = -1  # number of the last frame that was found by seeking in the open file
        self._cursor: tuple[Iterator[VideoFrame], int] | None = None  # plain decoding, and the number of its next frame

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading opens it again."""
        if self._source is not None:
            self._source.close()
        self._source, self._cursor, self._reached = None, None, -1

    @property
    def info(self) -> VideoInfo:
        """Size, rate and number of frames, as they can be read."""
        return self.index.info

    @property
    def timestamps(self) -> np.ndarray:
        """Seconds of each frame after the first, float64."""
        return self.index.times

    @property
    def index(self) -> Index:
        """The index, from the cache if the video has not changed."""
        if self._index is None:
            self._index = self._find_index()
        return self._index

    def _find_index(self) -> Index:
        self._files = pictures.picture_files(self.path)
        if self._files is None:
            status = check_file(self.path)
            self._stamp = f"{status.st_size} {status.st_mtime_ns} {self.max_pixels}"
        else:
            self._stamp = f"{pictures.stamp(self._files)} {self.max_pixels}"
        index = self._cache.load(self.path, self._stamp)
        if index is None or not (self.fast or index.counted):
            if self._files is None:
                index = indexing.build(self.path, self.max_pixels, trust=self.fast)
            else:
                index = pictures.build(self.path, self._files, self.max_pixels)
            self._cache.save(self.path, self._stamp, index)
        return index if self.fast else index.sequential()

    def read(self, indices: Sequence[int], geometry: Geometry | None = None) -> Tensor:
        """Return the frames with these numbers, uint8 `(len(indices), H, W, 3)`; any order, repeats allowed."""
        numbers = [int(k) for k in indices]
        self._check(numbers, geometry)
        if not numbers:
            return torch.empty(0, *self._size(geometry), 3, dtype=torch.uint8)
        try:
            found = self._take(sorted(set(numbers)), geometry)
        except _Lost:
            self._recount()
            self._check(numbers, geometry, after_recount=True)
            try:
                found = self._take(sorted(set(numbers)), geometry)
            except _Lost:
                raise DecodeFailure(self.path, "corrupt", "decodes differently every time") from None
        return torch.stack([found[k] for k in numbers])

    def _size(self, geometry: Geometry | None) -> tuple[int, int]:
        return (geometry.height, geometry.width) if geometry else (self.info.height, self.info.width)

    def _take(self, wanted: list[int], geometry: Geometry | None) -> dict[int, Tensor]:
        convert = Converter(self.index.layout)
        if self._files is not None:
            frames: Iterator[tuple[int, VideoFrame]] = self._pictures(wanted)
        elif self.index.seekable:
            if self._reached >= wanted[0] and self.info.codec in IN_BAND:
                self.close()  # the decoder would go on with the parameters of a later part
            self._reached = wanted[-1]
            self._source = self._source or Source(self.path, self.max_pixels)
            frames = _seek(self._source, self.index, wanted)
        else:
            frames = self._continue(wanted)
        return {k: self._convert(convert, frame, geometry) for k, frame in frames}

    def _convert(self, convert: Converter, frame: VideoFrame, geometry: Geometry | None) -> Tensor:
        with failures(self.path, "codec"):
            return convert(frame, geometry)

    def chunks(
        self, size: int, start: int = 0, stop: int | None = None, stride: int = 1, geometry: Geometry | None = None
    ) -> Iterator[Tensor]:
        """Yield the frames `start:stop:stride` in order, at most `size` at a time, uint8 `(t, H, W, 3)`.

        The memory needed does not depend on the length. Damage that the index did not know of ends the frames early,
        with a warning.
        """
        if size < 1 or stride < 1:
            raise ValueError(f"size {size} and stride {stride} must be at least 1")
        wanted = range(*slice(start, stop, stride).indices(self.info.frames))
        self._check([], geometry)
        convert = Converter(self.index.layout)
        batch: list[Tensor] = []
        done = 0
        for frame in self._stream(wanted):
            batch.append(self._convert(convert, frame, geometry))
            done += 1
            if len(batch) == size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)
        if done < len(wanted):
            self._recount()
            log.warning("%s: %d of %d frames could be read: %s", ascii(self.path), done, len(wanted), self.info.damage)

    def _stream(self, wanted: range) -> Iterator[VideoFrame]:
        """Yield the wanted frames of a file opened for this purpose; end early where the data is damaged."""
        try:
            if self._files is not None:
                yield from (frame for _, frame in self._pictures(wanted))
                return
            with Source(self.path, self.max_pixels) as source:
                if self.index.seekable and (wanted.start > 0 or wanted.step > 1):
                    found = _seek(source, self.index, list(wanted))
                else:
                    found = _select(source.frames(), 0, wanted)
                yield from (frame for _, frame in found)
        except (_Lost, DecodeFailure):
            return

    def _pictures(self, wanted: Sequence[int]) -> Iterator[tuple[int, VideoFrame]]:
        assert self._files is not None
        for k in wanted:
            yield k, pictures.decode_picture(self._files[k], self.max_pixels)

    def _continue(self, wanted: list[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Decode from the start, or on from where the last reading ended if that is before the first wanted frame."""
        if self._cursor is None or self._cursor[1] > wanted[0]:
            self.close()
            self._source = Source(self.path, self.max_pixels)
            self._cursor = (self._source.frames(), 0)
        frames, at = self._cursor
        self._cursor = None  # not usable after an exception
        try:
            yield from _select(frames, at, wanted)
        except DecodeFailure as failure:
            raise _Lost from failure
        self._cursor = (frames, wanted[-1] + 1)

    def _recount(self) -> None:
        """Count the frames by decoding, remember it, and read from the start from now on."""
        self.close()
        if self._files is None:
            self._index = indexing.build(self.path, self.max_pixels, trust=False).sequential()
        else:
            self._index = pictures.build(self.path, self._files, self.max_pixels)
        self._cache.save(self.path, self._stamp, self._index)

    def _check(self, numbers: list[int], geometry: Geometry | None, after_recount: bool = False) -> None:
        info = self.info
        wrong = next((k for k in numbers if not 0 <= k < info.frames), None)
        if wrong is not None and after_recount:
            detail = f"frame {wrong}: only {info.frames} frames can be read; {info.damage}"
            raise DecodeFailure(self.path, "corrupt", detail)
        if wrong is not None:
            raise IndexError(f"frame {wrong} of {self.path!a} does not exist: use 0 to {info.frames - 1}")
        if geometry is not None:
            geometry.check(info.height, info.width)


def _select(frames: Iterator[VideoFrame], at: int, wanted: Sequence[int]) -> Iterator[tuple[int, VideoFrame]]:
    """Pick the wanted frames out of plain decoding whose next frame has the number `at`."""
    remaining = iter(wanted)
    k = next(remaining, None)
    while k is not None:
        frame = next(frames, None)
        if frame is None:
            raise _Lost
        if at == k:
            yield k, frame
            k = next(remaining, None)
        at += 1


def _runs(index: Index, wanted: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Split the wanted frames where jumping to a later key frame costs less than decoding up to it."""
    keys = index.keys[np.maximum(np.searchsorted(index.keys, index.pts[wanted], "right") - 1, 0)]
    key_frames = np.searchsorted(index.pts, keys)
    run: list[int] = []
    start = 0
    for k, key, key_frame in zip(wanted, keys.tolist(), key_frames.tolist(), strict=True):
        if run and key_frame - run[-1] > WORTH_A_SEEK:
            yield start, run
            run = []
        if not run:
            start = key
        run.append(k)
    if run:
        yield start, run


def _seek(source: Source, index: Index, wanted: list[int]) -> Iterator[tuple[int, VideoFrame]]:
    """Yield the wanted frames (increasing), each found by its time from the key frame before it."""
    for start, run in _runs(index, wanted):
        yield from _decode_run(source, index, start, {int(index.pts[k]): k for k in run})


def _decode_run(source: Source, index: Index, start: int, wanted: dict[int, int]) -> Iterator[tuple[int, VideoFrame]]:
    """Decode from the key frame at `start` until every wanted time was met.

    Left out, where that changes nothing: pictures that no other refers to and nobody wants, and everything between the
    last wanted frame of a group and the next key frame. The decoder is drained as soon as it has all that is wanted,
    instead of being fed until it lets go of them.
    """
    context = source.stream.codec_context
    skip, closed = source.codec in NONREF_EXACT, source.codec in CLOSED
    groups = index.keys[np.searchsorted(index.keys, sorted(wanted), "right") - 1]
    in_group = dict(zip(*(values.tolist() for values in np.unique(groups, return_counts=True)), strict=True))
    missing, unfed, unfed_here, started = dict(wanted), len(wanted), 0, False
    source.seek(start)
    for packet in source.packets():
        if not started and packet.pts != start:
            if not packet.size or (packet.is_keyframe and packet.pts is not None and packet.pts > start):
                raise _Lost
            continue
        started = True
        needed = packet.pts in wanted
        unfed_here += in_group.pop(packet.pts, 0)
        if closed and not unfed_here and packet.size and not index.counted:
            continue
        unfed, unfed_here = unfed - needed, unfed_here - needed
        context.skip_frame = "DEFAULT" if needed or not skip else "NONREF"
        try:
            frames = source.decode(packet if packet.size else None)
            if unfed == 0 and packet.size and not index.counted:
                frames += source.decode(None)
        except DecodeFailure as failure:
            raise _Lost from failure
        for frame in frames:
            k = missing.pop(frame.pts, None) if frame.pts is not None else None
            if k is not None:
                yield k, frame
        if not missing:
            break
        if not packet.size or (unfed == 0 and not index.counted):
            raise _Lost
    context.skip_frame = "DEFAULT"


def probe(
    path: str | os.PathLike[str],
    *,
    index_dir: Path | None = USER_CACHE,
    max_pixels: int = MAX_PIXELS,
    fast: bool = True,
) -> VideoInfo:
    """Describe a video; raise DecodeFailure if it has no frame that can be read."""
    with Video(path, index_dir=index_dir, max_pixels=max_pixels, fast=fast) as video:
        return video.info


def read(
    path: str | os.PathLike[str],
    indices: Sequence[int] | None = None,
    geometry: Geometry | None = None,
    *,
    index_dir: Path | None = USER_CACHE,
    max_pixels: int = MAX_PIXELS,
    fast: bool = True,
) -> Tensor:
    """Return frames of a video (all without `indices`), uint8 `(T, H, W, 3)`."""
    with Video(path, index_dir=index_dir, max_pixels=max_pixels, fast=fast) as video:
        if indices is not None:
            return video.read(indices, geometry)
        return torch.cat(list(video.chunks(32, geometry=geometry)))
