"""Compare sets of videos by the Frechet distance of features: of reconstructions, and of sets without partners."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from praxino.data.scan import Entry, fingerprint
from praxino.errors import ConfigError, DataError
from praxino.metrics.detector import LEAST_FRAMES, Detector, TorchScriptDetector
from praxino.metrics.features import RandomFeatures
from praxino.metrics.frechet import frechet_distance, gaussian_distance
from praxino.tasks.evaluation.collect import Collected, Features, Gaussian, place_of, stack
from praxino.tasks.evaluation.score import Reading, Row
from praxino.tasks.ranks import Ranks
from praxino.tasks.rows import write_jsonl
from praxino.video import to_float
from praxino.video.index import default_index_dir

log = logging.getLogger(__name__)

RANDOM = "of a convolutional network with random weights, seed 0"
LEAST_REAL, LEAST_OTHERS = 4, 2  # clips, without a detector
FRAMES = 32  # at once through a detector


@dataclass(frozen=True)
class Fvd:
    """The Frechet distance of clips.

    Args:
        detector: a TorchScript file, such as StyleGAN-V's I3D; None: no distance.
        sha256: of the file, or its first digits.
        size: resize frames first; None: as the clips are (I3D and Inception resize on their own).
        frames: of a clip, its first ones at `stride`; None: all.
        per_batch: of pairs the mean of the distances within each batch, too, as published tables hold it: it is no
            distance of sets, and without the covariances where a batch is one clip.
    """

    detector: str | None = None
    sha256: str | None = None
    kind: Literal["i3d", "plain"] = "i3d"
    size: int | list[int] | None = None
    frames: int | None = None
    stride: int = 1
    per_batch: bool = False


@dataclass(frozen=True)
class Fid:
    """The Frechet distance of frames, every `stride`-th."""

    detector: str | None = None
    sha256: str | None = None
    kind: Literal["inception", "plain"] = "inception"
    size: int | list[int] | None = None
    stride: int = 1


class SetDistance:
    """Collects the features of originals and reconstructions while they are scored, as a `Watcher`.

    `known` are the statistics of the originals that an earlier run left in `place`; `short` counts the videos that are
    too short for a clip.
    """

    def __init__(self, name: str, settings: Fvd | Fid, detector: Detector) -> None:
        self.name, self.settings, self.detector = name, settings, detector
        self.single = isinstance(settings, Fid)  # frame by frame
        self.frames = settings.frames if isinstance(settings, Fvd) else None
        self.known: Gaussian | None = None
        self.place: Path | None = None
        self.real, self.fake, self.short = Collected(self.single), Collected(self.single), 0

    def begin(self, places: Sequence[int], fps: Sequence[float]) -> None:
        self.places, self.seen, self.held = places, 0, list[list[Tensor]]()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take the frames that count; features of frames are taken at once, those of clips at the end."""
        numbers = torch.arange(self.seen, self.seen + x.shape[2], device=x.device)
        self.seen += x.shape[2]
        stride = self.settings.stride
        wanted = numbers % stride == 0
        if self.frames is not None:
            wanted &= numbers < self.frames * stride
        if wanted.any():
            videos = [y[:, :, wanted]] if self.known else [y[:, :, wanted], x[:, :, wanted]]
            self.held.append([self.detect(video) if self.single else video for video in videos])

    def end(self, rows: Sequence[Row]) -> None:
        """Write down the features; a video that is too short for a clip has none."""
        if self.frames is not None and (self.seen - 1) // self.settings.stride + 1 < self.frames:
            self.short += len(self.places)
            return
        for found, pieces in zip((self.fake, self.real), zip(*self.held, strict=True), strict=False):
            features = torch.cat(pieces, dim=1) if self.single else self.detect(torch.cat(pieces, dim=2))
            found.add(self.places, features)

    def collect(self, found: Collected, places: Sequence[int], video: Tensor) -> None:
        """Add the features of clips that are read at once."""
        found.add(places, self.detect(video[:, :, :: self.settings.stride][:, :, : self.frames]))

    def detect(self, video: Tensor) -> Tensor:
        """Return the features `(B, n, D)` of videos, in full precision whatever the VAE runs in."""
        batch = len(video)
        if self.single:
            video = video.transpose(1, 2).flatten(0, 1)[:, :, None]  # (B t, 3, 1, H, W)
        with torch.autocast(video.device.type, enabled=False):
            parts = [self.detector(part) for part in video.split(FRAMES if self.single else batch)]
        return torch.cat(parts).unflatten(0, (batch, -1)).float().cpu()

    def protocol(self) -> Row:
        """Return what the distance depends on, but for the clips."""
        return asdict(self.settings) | {"detector": self.detector.name, "sha256": self.detector.fingerprint}

    def distance(self, real: Gaussian | None, fake: Gaussian | None, n: int, n_real: int) -> Row:
        """Return the distance, of so many features, or why there is none."""
        unit = "frames" if self.single else "clips"
        if real is None or fake is None:
            least = f", of fvd.frames={self.frames} at fvd.stride={self.settings.stride}" if self.frames else ""
            return self.missing(f"not measured: it takes two {unit} or more of each set{least}", n, n_real)
        value = gaussian_distance(real.mean, real.covariance, fake.mean, fake.covariance)
        note = f"{n} {unit} against {n_real} real ones, features of {self.detector.name}"
        return {"value": value, "note": note, "n": n, "n_real": n_real}

    def missing(self, reason: str, n: int, n_real: int) -> Row:
        """Return the row of a distance that is not there, and say so."""
        log.warning("%s %s", self.name, reason)
        return {"value": None, "note": reason, "n": n, "n_real": n_real}


def mean_over_batches(batches: Sequence[Sequence[int]], real: Features, fake: Features) -> Row:
    """Return the mean of the distances within each batch that has features."""
    parts = [part for batch in batches if (part := [place for place in batch if place in fake])]
    scores = [within(stack(real, part), stack(fake, part)) for part in parts]
    note = f"mean over {len(scores)} batches: to reproduce published columns, no distance of sets"
    return {"value": sum(scores) / len(scores) if scores else None, "note": note}


def within(real: Tensor, fake: Tensor) -> float:
    """Return the distance of the features of one batch, of one clip each the squared distance of the two."""
    if len(real) > 1:
        return frechet_distance(real, fake)
    return float((real.double() - fake.double()).square().sum())


def open_distances(fvd: Fvd, fid: Fid, frames: int | None, device: torch.device) -> list[SetDistance]:
    """Load the detectors that are given, for clips of so many frames; None: whole videos."""
    if fvd.detector and frames is None and fvd.frames is None:
        raise ConfigError(
            "fvd.frames: whole videos differ in length: say how many frames a clip has, e.g. fvd.frames=16"
        )
    found = []
    count = fvd.frames or -(-(frames or 1) // fvd.stride)
    if fvd.detector and count < LEAST_FRAMES[fvd.kind]:
        least = LEAST_FRAMES[fvd.kind]
        raise ConfigError(f"fvd: {fvd.kind} takes clips of {least} frames or more, not {count}: use frames=17")
    if fvd.detector and frames is not None and count > -(-frames // fvd.stride):
        least = (count - 1) * fvd.stride + 1
        raise ConfigError(f"fvd.frames={count} at fvd.stride={fvd.stride}: frames={frames} are too few: use {least}")
    both: tuple[tuple[str, Fvd | Fid], ...] = ("fvd", fvd), ("fid", fid)
    for name, settings in both:
        if settings.detector:
            sides = [settings.size] * 2 if isinstance(settings.size, int) else settings.size
            size = None if sides is None else (sides[0], sides[1])
            detector = TorchScriptDetector(settings.detector, settings.sha256, settings.kind, size, device)
            found.append(SetDistance(name, settings, detector))
    return found


def known_statistics(
    distances: Sequence[SetDistance], root: str, entries: Sequence[Entry], reading: Reading, ranks: Ranks
) -> None:
    """Look for the statistics of a real set: a file for each protocol, detector and state of the files."""
    folder = default_index_dir().parent if reading.cache_dir is None else Path(reading.cache_dir).expanduser()
    for distance in distances:
        facts = reading.protocol(), distance.protocol(), fingerprint(entries), str(Path(root).absolute())
        distance.place = place_of(folder, facts)
        if not (isinstance(distance.settings, Fvd) and distance.settings.per_batch):  # which needs the features
            distance.known = ranks.on_first(lambda place=distance.place: Gaussian.load(place))  # type: ignore[misc]


def settle(
    distance: SetDistance, batches: Sequence[Sequence[int]], ranks: Ranks, real_videos: int | None = None
) -> Row:
    """Put the features of all processes together and return the distance; keep the statistics of a real set.

    Kept are those of all its videos alone, and they serve where all were measured, so that it makes no difference
    whether they are there.

    Args:
        batches: of pairs; empty for sets without partners, whose real one has `real_videos`.
    """
    parts = ranks.on_all(lambda: (distance.real, distance.fake, distance.short))
    expected = sum(map(len, batches)) if real_videos is None else real_videos

    def finish() -> Row:
        reals, fakes, shorts = zip(*parts, strict=True)
        real, fake = (Collected(distance.single).merge(found) for found in (reals, fakes))
        short = sum(shorts)
        statistics, found = distance.known or real.gaussian(), fake.gaussian()
        n_real = distance.known.count if distance.known else real.count
        if distance.known and batches and len(fake.places) + short < expected:
            reason = f"not measured: {expected - len(fake.places) - short} videos failed that could be read before"
            result = {distance.name: distance.missing(reason, fake.count, n_real)}
        else:
            result = {distance.name: distance.distance(statistics, found, fake.count, n_real)}
        if distance.place and statistics and not distance.known and len(real.places) + short == expected:
            statistics.save(distance.place)
        if short:
            log.warning("%s leaves out %d videos: shorter than its clips", distance.name, short)
            result[distance.name] |= {"short": short}
            result[distance.name]["note"] += f"; {short} videos are too short"
        if isinstance(distance.settings, Fvd) and distance.settings.per_batch and batches:
            result[f"{distance.name}_per_batch"] = mean_over_batches(batches, real.features, fake.features)
        return result

    return ranks.on_first(finish)


# ----------------------------------------------------------------------------------------------------- without partners
def compare_sets(
    real: str,
    fake: str,
    reading: Reading,
    made: Reading,
    distances: Sequence[SetDistance],
    target: Path,
    ranks: Ranks,
) -> tuple[Row, list[Row], dict[str, list[Entry]]]:
    """Measure how far the videos under `fake` are from those under `real`, by a clip of each.

    Without a detector, by random features. The real videos are halved, every other one. Floor: the distance between
    the halves. Distance: the mean of those from `fake` to either half. Ceiling: the same for noise in place of `fake`,
    normal in each pixel with mean and deviation of each colour of the real videos. All sets are of one size, for the
    distance depends on it.

    Args:
        made: how `fake` is read, `real` by `reading`.

    Returns:
        the figures, what was passed over, and the videos of both trees.
    """
    readings = {real: reading, fake: made}
    usable = {root: ranks.on_first(lambda root=root: readings[root].find(root)) for root in readings}  # type: ignore[misc]
    entries = {root: found.entries for root, found in usable.items()}
    rejected = [rejection.to_json() for found in usable.values() for rejection in found.rejected]

    def videos(root: str) -> Iterator[tuple[list[int], Tensor]]:
        loader = readings[root].load(root, entries[root], slice(ranks.rank, None, ranks.world))
        return load(loader, failed)

    failed: list[Row] = []
    if not distances:
        result = ranks.on_all(lambda: (survey(videos(real)), survey(videos(fake)), failed))
        reals, fakes, lists = zip(*result, strict=True)
        rejected += [row for rows in lists for row in rows]
        ranks.on_first(lambda: write_jsonl(target / "rejected.jsonl", rejected))
        least = f"{LEAST_REAL} real ones and {LEAST_OTHERS} others are the least"
        counts = f"clips under {real}", f"under {fake}: {least}; see {target}"
        values = ranks.on_first(lambda: place_between(merge(reals), merge(fakes), reading.batch, counts))
        return values, rejected, entries
    known_statistics(distances, real, entries[real], reading, ranks)

    @torch.inference_mode()
    def work() -> list[Row]:
        fresh = [distance for distance in distances if not distance.known]
        for places, x in videos(fake):
            for distance in distances:
                distance.collect(distance.fake, places, x.to(ranks.device))
        for places, x in videos(real) if fresh else ():
            for distance in fresh:
                distance.collect(distance.real, places, x.to(ranks.device))
        return failed

    rejected += [row for part in ranks.on_all(work) for row in part]
    ranks.on_first(lambda: write_jsonl(target / "rejected.jsonl", rejected))
    values = {}
    for distance in distances:
        values |= settle(distance, (), ranks, len(entries[real]))
    if all(value["value"] is None for value in values.values()):
        raise DataError("; ".join(f"{name}: {value['note']}" for name, value in values.items()))
    return values, rejected, entries


def load(loader: DataLoader, failed: list[Row]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield places and videos `(B, 3, T, H, W)`; list those that cannot be read."""
    for clips in loader:
        failed += [failure.to_json() for failure in clips["failures"]]
        if "error" in clips:
            raise DataError(clips["error"])
        if "video" in clips:
            yield clips["index"].tolist(), to_float(clips["video"])


@dataclass(frozen=True)
class Survey:
    """Random features of a set, by place, the sums of its colours and of their squares, and the shape of a clip."""

    features: Features
    sums: dict[int, Tensor]  # (3, 2) by the first place of a batch
    pixels: int  # of each colour
    shape: tuple[int, ...]


@torch.inference_mode()
@torch.autocast("cpu", enabled=False)
def survey(videos: Iterable[tuple[list[int], Tensor]]) -> Survey:
    """Look at a set of clips."""
    net, features, sums, pixels, shape = RandomFeatures(), Features(), dict[int, Tensor](), 0, tuple[int, ...]()
    for places, x in videos:
        features |= dict(zip(places, net(x)[:, None], strict=True))
        values = x.double().transpose(0, 1).flatten(1)  # (3, B T H W)
        sums[places[0]] = torch.stack([values.sum(1), values.square().sum(1)], dim=1)
        pixels, shape = pixels + values.shape[1], tuple(x.shape[1:])
    return Survey(features, sums, pixels, shape)


def merge(surveys: Iterable[Survey]) -> Survey:
    """Put the surveys of several processes together."""
    found = list(surveys)
    features = {place: row for part in found for place, row in part.features.items()}
    sums = {place: row for part in found for place, row in part.sums.items()}
    return Survey(features, sums, sum(part.pixels for part in found), max(part.shape for part in found))


@torch.inference_mode()
@torch.autocast("cpu", enabled=False)
def place_between(real: Survey, fake: Survey, batch: int, counts: tuple[str, str]) -> Row:
    """Return distance, floor, ceiling, position (0 at the floor, 1 at the ceiling), and n of a set.

    The position is None where few clips leave the ceiling no higher than the floor.
    """
    n = min(len(real.features) // 2, len(fake.features))
    if n < LEAST_OTHERS:
        raise DataError(f"{len(real.features)} {counts[0]} and {len(fake.features)} {counts[1]}")
    found, others = (stack(part.features, sorted(part.features)) for part in (real, fake))
    halves, samples = [spread(found[0::2], n), spread(found[1::2], n)], spread(others, n)
    mean, square = torch.stack([real.sums[place] for place in sorted(real.sums)]).sum(0).T / real.pixels
    colours = torch.stack([mean, (square - mean.square()).clamp(min=0).sqrt()])
    net = RandomFeatures()
    noise = torch.cat([net(x) for x in draw_noise(n, batch, colours, real.shape)])
    floor = frechet_distance(*halves)
    distance, ceiling = (sum(frechet_distance(half, other) for half in halves) / 2 for other in (samples, noise))
    position = (distance - floor) / (ceiling - floor) if ceiling > floor else None
    if position is None:
        log.warning("%d clips are too few: noise is no farther from them than they are from each other", n)
    return {"distance": distance, "floor": floor, "ceiling": ceiling, "position": position, "n": n}


def spread(features: Tensor, count: int) -> Tensor:
    """Return so many rows, from all over: neighbours by name may be alike."""
    return features[torch.linspace(0, len(features) - 1, count).round().long()]


def draw_noise(count: int, batch: int, colours: Tensor, shape: Sequence[int]) -> Iterator[Tensor]:
    """Yield clips of noise of given colours, `(B, 3, T, H, W)`."""
    generator = torch.Generator().manual_seed(0)
    mean, std = colours.float().view(2, 3, 1, 1, 1)
    for begin in range(0, count, batch):
        x = torch.randn(min(batch, count - begin), *shape, generator=generator)
        yield (x * std + mean).clamp(-1, 1)
