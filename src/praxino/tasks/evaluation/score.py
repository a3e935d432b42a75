"""Score reconstructions frame by frame: of clips in memory, of whole videos as a stream, of pairs of files."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from praxino.data.clips import ClipSampler, Short, Where
from praxino.data.scan import Entry
from praxino.data.transforms import Resize, Size
from praxino.data.usable import Usable, find_usable, spread
from praxino.data.videos import VideoClips, collate
from praxino.errors import DataError, NonFiniteError
from praxino.metrics.suite import PairMeter, PairSuite
from praxino.models.vae import Posterior, VideoVAE
from praxino.tasks.common import make_resize
from praxino.tasks.evaluation.pairs import Pair, read_outputs
from praxino.tasks.outputs import SAMPLES, check_finished
from praxino.tasks.reconstruct import Clip, fitting_chunk
from praxino.tasks.reconstruct import pairs as reconstructed
from praxino.tasks.rows import without_nan
from praxino.video import DecodeFailure, Video, to_float

Row = dict[str, Any]
Curves = dict[str, list[float | None]]
WHOLE: dict[str, Any] = {"tile": None, "overlap": 0.0, "tile_frames": None}  # no tiles


@dataclass
class Scores:
    """What was measured, by the place of a video in its list: a row and curves of each, and the seconds it took.

    `short` lists videos that were padded or slowed down.
    """

    rows: dict[int, Row] = field(default_factory=dict)
    curves: dict[int, Curves] = field(default_factory=dict)
    rejected: list[Row] = field(default_factory=list)
    short: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def merge(self, other: "Scores") -> "Scores":
        """Add what another process measured; of the seconds, those of the slower one stay."""
        self.rows |= other.rows
        self.curves |= other.curves
        self.rejected += other.rejected
        for key, value in other.seconds.items():
            self.seconds[key] = max(value, self.seconds.get(key, 0.0))
        return self

    @property
    def table(self) -> list[Row]:
        """The rows in the order of the list."""
        return [self.rows[place] for place in sorted(self.rows)]


class Codec(Protocol):
    """What is scored: a `VideoVAE`, or one behind a padding."""

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def check_video(self, shape: Sequence[int]) -> None: ...
    def encode(self, x: Tensor) -> Posterior: ...
    def decode(self, z: Tensor) -> Tensor: ...


class Watcher(Protocol):
    """Sees what is scored: the frames of a few videos of one shape, piece by piece, then what came out.

    Another `begin` without an `end` means that those videos could not be read to their end.
    """

    def begin(self, places: Sequence[int], fps: Sequence[float]) -> None: ...

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take the next frames of originals and reconstructions, `(B, 3, t, H, W)` in [-1, 1]."""

    def end(self, rows: Sequence[Row]) -> None: ...


class Stopwatch:
    """Adds up the seconds of the parts of a work, waiting for the device at their ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begun

    def each(self, part: str, items: Iterable[Any]) -> Iterator[Any]:
        """Yield items, timing how long each is waited for."""
        iterator, end = iter(items), object()
        while True:
            with self(part):
                item = next(iterator, end)
            if item is end:
                return
            yield item


class Recorder:
    """Measures videos while their frames come in, keeps what is known of them, and lets others watch."""

    def __init__(self, suite: PairSuite, watchers: Sequence[Watcher] = ()) -> None:
        self.suite, self.watchers, self.scores = suite, watchers, Scores()
        self.meter: PairMeter | None = None

    def begin(self, places: Sequence[int], paths: Sequence[str], fps: Sequence[float]) -> None:
        """Take up videos of one shape."""
        self.places, self.paths, self.frames = places, paths, 0
        self.meter = self.suite.begin()
        for watcher in self.watchers:
            watcher.begin(places, fps)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Measure the next frames of originals and reconstructions, `(B, 3, t, H, W)` in [-1, 1]."""
        assert self.meter is not None
        if not y.isfinite().all():
            guilty = next(path for path, video in zip(self.paths, y, strict=True) if not video.isfinite().all())
            raise NonFiniteError(f"the reconstruction of {guilty!a} is not finite: use precision=32, or another VAE")
        self.frames += x.shape[2]
        self.size, self.device = x.shape[-2:], x.device.type
        with torch.autocast(self.device, enabled=False):
            self.meter.add(x, y)
            for watcher in self.watchers:
                watcher.add(x, y)

    def end(self) -> None:
        """Write down what came out."""
        assert self.meter is not None
        scores = {name: values.tolist() for name, values in self.meter.scores().items()}
        curves = {name: values.tolist() for name, values in self.meter.curves().items()}
        scores["mse"] = self.meter.mse().tolist()
        height, width = self.size
        rows = []
        for index, (place, path) in enumerate(zip(self.places, self.paths, strict=True)):
            row = {"path": path, "frames": self.frames, "height": height, "width": width}
            row |= {name: values[index] for name, values in scores.items()}
            self.scores.rows[place] = without_nan(row)
            self.scores.curves[place] = {
                name: [None if value != value else value for value in values[index]] for name, values in curves.items()
            }
            rows.append(self.scores.rows[place])
        with torch.autocast(self.device, enabled=False):
            for watcher in self.watchers:
                watcher.end(rows)
        self.meter = None

    def reject(self, path: str, reason: str, detail: str) -> None:
        """Note a video that is left out."""
        self.scores.rejected.append({"path": path, "reason": reason, "detail": detail})


@dataclass(frozen=True)
class Reading:
    """How clips are read from files: the part of a protocol that is about the data.

    Args:
        frames: of a clip; None: whole videos, which `score_whole` streams.
        stride: distance of two frames; or fps: frames a second, by the source frames nearest in time.
        size: a square of that many pixels, or [height, width], resized and centre-cropped; None: as stored.
        short: what becomes of videos that are shorter than a clip.
        where: the part of a video that its clip is of; random: drawn from `seed` and the place in the list.
        limit: keep that many videos, evenly spread over the sorted paths.
    """

    frames: int | None = 17
    stride: int = 1
    fps: float | None = None
    size: Size = 64
    short: Short = "drop"
    where: Where = "start"
    seed: int = 0
    limit: int | None = None
    batch: int = 1
    workers: int = 0
    cache_dir: str | None = None

    @property
    def clips(self) -> ClipSampler:
        """The choice of frames."""
        return ClipSampler(self.frames or 1, self.stride, fps=self.fps, short=self.short, where=self.where)

    def find(self, root: str | Path) -> Usable:
        """Find the videos of a tree that are read; of what `sample` wrote, only what its last run did."""
        check_finished(root)
        usable = find_usable(root, self.clips, aliases=True, cache_dir=self.cache_dir)
        rows = Path(root).expanduser() / SAMPLES
        if rows.is_file():
            listed = read_outputs(rows, "file")
            usable.entries = [entry for entry in usable.entries if entry.path in listed]
            usable.rejected = [rejection for rejection in usable.rejected if rejection.path in listed]
            if missing := listed - {entry.path for entry in usable.entries} - {r.path for r in usable.rejected}:
                raise DataError(f"{rows} lists {len(missing)} videos that are not there, first {min(missing)!a}")
        return replace(usable, entries=spread(usable.entries, self.limit))

    def load(
        self, root: str | Path, entries: Sequence[Entry], share: slice = slice(None), pin: bool = False
    ) -> DataLoader:
        """Load a clip of each video; batches are cut from the whole list, and `share` takes those of a process."""
        dataset = VideoClips(root, entries, self.clips, make_resize(self.size), seed=self.seed, tries=0)
        batches = self.batches(len(entries))[share]
        return DataLoader(dataset, batch_sampler=batches, num_workers=self.workers, collate_fn=collate, pin_memory=pin)

    def batches(self, count: int) -> list[list[int]]:
        """Cut the places of a list into batches."""
        return [list(range(begin, min(begin + self.batch, count))) for begin in range(0, count, self.batch)]

    def stretched(self, entries: Sequence[Entry]) -> list[Row]:
        """List the videos that are shorter than a clip, and so are padded or slowed down."""
        fate, clips = {"pad": "padded with its last frame", "slow": "slowed down"}.get(self.short, ""), self.clips
        infos = [(e.path, e.info) for e in entries if fate and not clips.fits(e.info.frames, e.info.fps)]
        return [{"path": p, "reason": fate, "detail": f"{i.frames} frames at {float(i.fps):g} fps"} for p, i in infos]

    def protocol(self) -> Row:
        """Return what a result depends on."""
        chosen = {
            "frames": self.frames or "all",
            "stride": self.stride,
            "fps": self.fps,
            "size": self.size or "as stored",
        }
        return chosen | {"short": self.short, "where": self.where, "seed": self.seed, "limit": self.limit}


@torch.inference_mode()
def score_vae(
    model: Codec,
    batches: Iterable[dict[str, Any]],
    suite: PairSuite,
    watchers: Sequence[Watcher] = (),
) -> Scores:
    """Send clips through a VAE, by the mode of the posterior, and measure what comes back, clamped and not rounded.

    Args:
        batches: as `Reading.load` gives them; a list of them serves several models.

    Returns:
        seconds: of load (waiting for clips), encode, decode and metrics.
    """
    device = next(model.parameters()).device
    recorder, clock = Recorder(suite, watchers), Stopwatch(device)
    for clips in clock.each("load", batches):
        recorder.scores.rejected += [failure.to_json() for failure in clips["failures"]]
        if "error" in clips:
            raise DataError(clips["error"])
        if "video" not in clips:
            continue
        x = to_float(clips["video"].to(device, non_blocking=True))  # (B, C, T, H, W)
        try:
            model.check_video(x.shape)
        except ValueError as error:  # of size=null
            for path in clips["path"]:
                recorder.reject(path, "size", str(error))
            continue
        with clock("encode"):
            z = model.encode(x).mode()
        with clock("decode"):
            y = model.decode(z).float().clamp(-1, 1)
        with clock("metrics"):
            recorder.begin(clips["index"].tolist(), clips["path"], clips["fps"].tolist())
            recorder.add(x, y)
            recorder.end()
    recorder.scores.seconds = clock.seconds
    return recorder.scores


@torch.inference_mode()
def score_whole(
    model: VideoVAE,
    root: str | Path,
    videos: dict[int, Entry],
    stride: int,
    resize: Resize | None,
    suite: PairSuite,
    watchers: Sequence[Watcher] = (),
) -> Scores:
    """Send whole videos, by place, through a VAE as streams: any length and size, in memory that does not grow.

    What the VAE cannot take is padded as `stream.reconstruct` does, and the padding is cut off before it is measured.
    A VAE that cannot stream takes a video in one piece.

    Returns:
        seconds: of reconstruct (reading, encoding and decoding) and metrics.
    """
    device = next(model.parameters()).device
    recorder, clock = Recorder(suite, watchers), Stopwatch(device)
    for place, entry in videos.items():
        name = entry.path
        try:
            with Video(Path(root) / name) as video:
                clip = Clip(video, None, stride, resize, None, WHOLE)
                expected = -(-entry.info.frames // stride)
                recorder.begin([place], [name], [float(clip.fps)])
                pieces = reconstructed(model, clip, device, clip.chunk if model.streamable else None, WHOLE)
                for source, y in clock.each("reconstruct", pieces):
                    with clock("metrics"):
                        recorder.add(to_float(source).to(device)[None], y[None])
                check_count(name, recorder.frames, expected)
                recorder.end()
        except DecodeFailure as failure:
            recorder.reject(name, failure.reason, failure.detail)
    recorder.scores.seconds = clock.seconds
    return recorder.scores


@torch.inference_mode()
def score_pairs(
    pairs: dict[int, Pair], suite: PairSuite, device: torch.device, watchers: Sequence[Watcher] = ()
) -> Scores:
    """Measure pairs of videos, by place, as their files decode.

    Returns:
        seconds: of load and metrics.
    """
    recorder, clock = Recorder(suite, watchers), Stopwatch(device)
    for place, pair in pairs.items():
        size = fitting_chunk(pair.height, pair.width)
        try:
            with Video(pair.real) as first, Video(pair.fake) as second:
                recorder.begin([place], [pair.name], [float(pair.fps)])
                for a, b in clock.each("load", zip(first.chunks(size), second.chunks(size), strict=False)):
                    if len(a) != len(b):
                        break
                    with clock("metrics"):
                        recorder.add(to_float(a.to(device))[None], to_float(b.to(device))[None])
                check_count(pair.name, recorder.frames, pair.frames)
                recorder.end()
        except DecodeFailure as failure:
            recorder.reject(pair.name, failure.reason, failure.detail)
    recorder.scores.seconds = clock.seconds
    return recorder.scores


def check_count(name: str, read: int, promised: int) -> None:
    """Raise DecodeFailure for a video that ended before it should."""
    if read < promised:
        raise DecodeFailure(name, "corrupt", f"{read} of {promised} frames could be read")
