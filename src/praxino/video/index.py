"""Which frames a video has, when they are shown, and where decoding may start.

The index of a file comes from its packets alone where they can be trusted: a container that stores the time of every
picture (mp4, mov, mkv, webm), a codec that gives one frame per packet, packets that are whole, and no edit list. In
every other case the frames are counted by decoding the file once. Headers are never believed.
"""

import hashlib
import itertools
import json
import logging
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame

from praxino.video.pixels import Converter, Layout, Turn
from praxino.video.source import Source, failures
from praxino.video.types import DecodeFailure, VideoInfo

log = logging.getLogger(__name__)

VERSION = f"2 ffmpeg {av.ffmpeg_version_info}"
TIMED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # containers that store the time of every picture
SEEKABLE = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mjpeg", "prores", "ffv1", "png", "rawvideo", "dnxhd"})
FIELDS = 2  # AVFieldOrder: 2 and more are interlaced, where two packets may share a frame

Times = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Index:
    """The frames of one video in the order in which plain decoding delivers them."""

    info: VideoInfo
    layout: Layout
    times: Times  # seconds since the first frame, float64
    pts: Times = field(default_factory=lambda: np.empty(0, np.int64))  # one per frame, increasing; empty: not seekable
    keys: Times = field(default_factory=lambda: np.empty(0, np.int64))  # pts at which decoding may start
    counted: bool = True  # by decoding every frame

    @property
    def seekable(self) -> bool:
        """Whether a frame is found from the key frame before it."""
        return len(self.pts) > 0

    def sequential(self) -> "Index":
        """Return the same frames, to be read from the start only."""
        return replace(self, pts=self.pts[:0], keys=self.keys[:0])


@dataclass
class _Packets:
    """What a walk over the packets tells."""

    pts: list[int | None]
    keys: list[int]
    sound: bool = True  # every packet is whole
    plain: bool = True  # every packet gives one frame that is shown


def _nal_types(data: memoryview, length_size: int, hevc: bool) -> list[int]:
    """List the types of the NAL units of one packet; an empty list where the lengths do not add up."""
    types, position = [], 0
    while position + length_size < len(data):
        length = int.from_bytes(data[position : position + length_size])
        position += length_size
        if length == 0 or position + length > len(data) or data[position] & 0x80:
            return []
        types.append(data[position] >> 1 & 63 if hevc else data[position] & 31)
        position += length
    return types if position == len(data) else []


def _nal_packet(data: memoryview, length_size: int, hevc: bool) -> tuple[bool, bool, bool]:
    types = _nal_types(data, length_size, hevc)
    if hevc:
        return bool(types), any(t < 32 for t in types), any(16 <= t <= 21 for t in types)
    return bool(types) and 0 not in types, any(t in (1, 5) for t in types), 5 in types


def _vp9_shown(data: memoryview) -> bool:
    """Tell whether a VP9 packet shows a frame (a superframe, two frames in one packet, always does)."""
    if data[-1] & 0xE0 == 0xC0:
        return True
    profile = (data[0] >> 5 & 1) | (data[0] >> 3 & 2)
    header = int.from_bytes(bytes(data[:2]).ljust(2, b"\0")) << (5 if profile == 3 else 4) & 0xFFFF
    shows_existing, show_frame = header >> 15, header >> 13 & 1
    return bool(shows_existing or show_frame)


class _Judge:
    """Look into packets: are they whole, do they show a frame, may decoding start there?"""

    def __init__(self, source: Source) -> None:
        context = source.stream.codec_context
        extra = context.extradata or b""
        self.codec = source.codec
        self.hevc = self.codec == "hevc"
        self.length_size = 0
        if self.codec in ("h264", "hevc") and len(extra) > 21 - 16 * (not self.hevc) and extra[0] == 1:
            self.length_size = (extra[21 if self.hevc else 4] & 3) + 1
        self.known = (
            source.container.format.name in TIMED
            and self.codec in SEEKABLE
            and context.field_order < FIELDS
            and (self.length_size > 0 or self.codec not in ("h264", "hevc"))
        )

    def look(self, packet: Packet) -> tuple[bool, bool, bool]:
        """Return (whole, shows a frame, decoding may start here)."""
        data = memoryview(packet)
        if self.length_size:
            return _nal_packet(data, self.length_size, self.hevc)
        if self.codec == "vp8":
            return len(data) > 3, bool(data[0] & 16), not data[0] & 1
        if self.codec == "vp9":
            return data[0] >> 6 == 2, _vp9_shown(data), packet.is_keyframe
        return True, True, packet.is_keyframe


def _walk(source: Source, judge: _Judge) -> tuple[_Packets, VideoFrame | None]:
    """Read all packets, and decode as many as it takes to see the first frame."""
    walked, first = _Packets([], []), None
    for packet in source.packets():
        if first is None:
            first = next(iter(source.decode(packet if packet.size else None)), None)
        if not packet.size:
            continue
        walked.pts.append(packet.pts)
        if judge.known:
            sound, shown, key = judge.look(packet)
            walked.sound &= sound and not packet.is_corrupt
            walked.plain &= shown and not packet.is_discard
            if key and packet.pts is not None:
                walked.keys.append(packet.pts)
    return walked, first


def _increasing(values: Sequence[int | None]) -> bool:
    return None not in values and all(a < b for a, b in itertools.pairwise(values))  # type: ignore[operator]


def build(path: str, max_pixels: int, trust: bool = True) -> Index:
    """Index one video file, by its packets if `trust` and they can be trusted, by decoding it otherwise."""
    walked, first = _Packets([], []), None
    with Source(path, max_pixels) as source:
        judge = _Judge(source)
        try:
            walked, first = _walk(source, judge)
        except DecodeFailure as failure:
            if failure.reason == "too_large":
                raise
        starts = sorted(set(walked.keys))
        seekable = judge.known and walked.sound and bool(starts)
        pts = sorted(p for p in walked.pts if p is not None)
        timed = len(pts) == len(walked.pts) and _increasing(pts) and walked.pts[:1] == starts[:1]
        if first is not None and trust and seekable and walked.plain and timed:
            return _index(source, first, pts, starts, counted=False)
    return _count(path, max_pixels, starts if seekable else [])


def _count(path: str, max_pixels: int, starts: list[int]) -> Index:
    """Index one video file by decoding all of it, up to the first damage."""
    first, delivered, damage = None, [], ""
    with Source(path, max_pixels) as source:
        source.stream.codec_context.options = source.limits() | {"skip_loop_filter": "all"}
        try:
            for frame in source.frames():
                first = first or frame
                delivered.append(frame.pts)
        except DecodeFailure as failure:
            damage = failure.detail
            if first is None and failure.reason != "corrupt":
                raise
        if first is None:
            raise DecodeFailure(path, "no_frames", damage or "opens, but no frame comes out")
        return _index(source, first, delivered, starts if _increasing(delivered) else [], damage)


def _index(
    source: Source, first: VideoFrame, pts: list[Any], starts: list[int], damage: str = "", counted: bool = True
) -> Index:
    """Put an index together; `starts` is empty where seeking cannot be trusted."""
    stream, count = source.stream, len(pts)
    fps = next((r for r in (stream.average_rate, stream.guessed_rate) if r and 0 < r <= 1000), Fraction(25))
    base = stream.time_base
    if base and _increasing(pts):
        times = (np.array(pts, np.int64) - pts[0]) * float(base)
        mean = (count - 1) / float(times[-1]) if count > 1 and source.container.format.name in TIMED else float(fps)
        if not 0.9 < mean / fps < 1.1:  # the header states another rate than the pictures have
            fps = max(Fraction(mean).limit_denominator(1001), Fraction(1, 1001))
    else:
        length = stream.duration * base if stream.duration and base else None
        if length and not damage and 0.3 < count / length / fps < 3:  # AVI may state twice the rate of H.264
            fps = Fraction(count / length).limit_denominator(1001)
        times = np.arange(count) / float(fps)
    layout = Layout.of(first, stream.codec_context.sample_aspect_ratio, source.max_pixels)
    with failures(source.path, "codec"):
        Converter(layout).rgb(first)  # there are colours that cannot be converted
    info = VideoInfo(
        path=source.path,
        kind="file",
        frames=count,
        height=layout.shown[0],
        width=layout.shown[1],
        fps=fps,
        codec=source.codec,
        pix_fmt=first.format.name,
        duration=float(times[-1]) + 1 / float(fps),
        damage=damage,
    )
    seek = np.array(pts if starts else [], np.int64)
    return Index(info, layout, times, seek, np.array(starts, np.int64), counted)


def default_index_dir() -> Path:
    """Return the user's cache folder for indexes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "praxino" / "index"


class Cache:
    """Indexes on disk, outside the data; one that does not fit its video any more is rebuilt, never used."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def _file(self, path: str) -> Path | None:
        if self.directory is None:
            return None
        name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:40]
        return self.directory / name[:2] / f"{name}.npz"

    def load(self, path: str, stamp: str) -> Index | None:
        """Return the stored index of `path` if it was made for this `stamp` (size, time of change, limits)."""
        file = self._file(path)
        if file is None or not file.is_file():
            return None
        try:
            with np.load(file, allow_pickle=False) as stored:
                meta = json.loads(str(stored["meta"]))
                if meta["stamp"] != stamp or meta["version"] != VERSION:
                    return None
                layout = Layout(**(meta["layout"] | {"turn": Turn(**meta["layout"]["turn"])}))
                info = VideoInfo.from_json(meta["info"] | {"path": path})
                return Index(info, layout, stored["times"], stored["pts"], stored["keys"], meta["counted"])
        except Exception as error:
            log.debug("index %s is not readable, it will be rebuilt: %s", file, error)
            return None

    def save(self, path: str, stamp: str, index: Index) -> None:
        """Store an index; a cache that cannot be written is no error."""
        file = self._file(path)
        if file is None:
            return
        meta = {
            "version": VERSION,
            "stamp": stamp,
            "info": index.info.to_json(),
            "layout": asdict(index.layout),
            "counted": index.counted,
        }
        draft = file.with_name(f".{uuid.uuid4().hex}.npz")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(draft, meta=np.array(json.dumps(meta)), times=index.times, pts=index.pts, keys=index.keys)
            os.replace(draft, file)
        except OSError as error:
            log.debug("index of %s is not kept: %s", ascii(path), error)
            with suppress(OSError):
                draft.unlink()
