"""Encode: the latents of a data set, their statistics, and a copy of the VAE that holds these.

Statistics are those of samples of the posterior, computed from its means and variances: nothing random is in them.
"""

import csv
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader

from praxino import checkpoint
from praxino.config import check_call
from praxino.data.clips import ClipSampler, Short
from praxino.data.latents import LatentClip, write_manifest
from praxino.data.scan import Entry
from praxino.data.transforms import Resize, Size
from praxino.data.usable import find_usable
from praxino.data.videos import VideoClips, collate
from praxino.errors import ConfigError, DataError, NonFiniteError
from praxino.models.vae import VideoVAE, check_clip
from praxino.tasks.common import at_least, check_chunk, make_resize, pass_over
from praxino.tasks.console import progress, show_table
from praxino.tasks.device import Precision, precision_context
from praxino.tasks.encoding.cache import Workplace, begin, repaired
from praxino.tasks.encoding.parts import Part, batched, cut, due_bytes, fitting, merge, push_size
from praxino.tasks.encoding.store import fingerprint, place_of, store_statistics
from praxino.tasks.ranks import Ranks, launch
from praxino.tasks.rows import write_atomic, write_jsonl
from praxino.tasks.rundir import check_outside, make_directory, versions
from praxino.video import DecodeFailure, Video

log = logging.getLogger(__name__)

LOST = 16  # videos: where none of the first so many has finite latents, no other is tried
LATENT = "posterior mean and log-variance, bf16; statistics: of samples, in closed form"


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `encode` and call it."""
    return encode(**check_call(encode, cfg))


def encode(
    vae: str,
    data: dict[str, str],
    out: str,
    stats_only: bool = False,
    labels: str | None = None,
    frames: int | None = 17,
    stride: int = 1,
    size: Size = 64,
    short: Short = "drop",
    limit: int | None = None,
    batch: int = 1,
    workers: int = 2,
    chunk: int | None = None,
    shard: int | None = None,
    weights: Literal["ema", "raw"] = "ema",
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    precision: Precision = "32",
    verify: bool = False,
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Encode the videos under `data.root`; measure mean and deviation per latent channel.

    What is there already is not encoded again: a run that was stopped goes on, a finished one stays. The shards do not
    depend on the number of processes.

    Args:
        vae: whatever `praxino.load` reads.
        out: gets the cache (see `praxino.data.latents`), statistics.json, rejected.jsonl and a copy of the VAE that
            holds the statistics: `vae.ckpt` of a praxino checkpoint, which still resumes, or the directory `vae` of
            official files. One of diffusers has no place for them and is not copied.
        stats_only: write no latents, and measure anew each time.
        labels: classes of the videos: `folders` (the first folder below `data.root`), or a CSV file with the columns
            path and label; None for none.
        frames: frames of each video, from its start; None takes all of them, in constant memory where the VAE streams.
        size: a square of that many pixels, or [height, width], resized and centre-cropped; None keeps the video's own.
            Frames, rows and columns at the end that do not fill a latent are left out where `frames` or `size` is None.
        limit: encode that many videos, evenly spread over the sorted paths.
        batch, workers: of the loader; with frames=None videos are read one after the other.
        chunk: frames a push, where the VAE streams; the result does not depend on it. None fits it to the frame.
        shard: clips of a shard at most, which is what a stopped run may lose; None fits it to the number of videos.
        weights: the latents are those of these weights; the copy holds all.
        devices, num_nodes: processes; each encodes shards of its own. torchrun tells them itself.
        verify: compare the shards of a finished cache with their digests, and encode damaged ones again.

    Returns:
        the content of statistics.json.
    """
    at_least(1, frames=frames, stride=stride, limit=limit, batch=batch, chunk=chunk, shard=shard)
    at_least(1, devices=devices, num_nodes=num_nodes)
    at_least(0, workers=workers)
    resize = make_resize(size)
    if size is None and batch > 1:
        raise ConfigError("size=null keeps the size of every video: use batch=1")
    file, root = checkpoint.locate(vae), data["root"]
    check_outside(out, {"data.root": root})
    sides = list(size) if isinstance(size, tuple) else size
    settings: dict[str, Any] = {"frames": frames, "stride": stride, "size": sides, "short": short, "shard": shard}
    settings |= {"weights": weights, "precision": precision}
    with ExitStack() as stack:
        ranks = stack.enter_context(launch(device, devices, num_nodes))
        model = checkpoint.load(file, weights=weights, device=ranks.device)
        check_chunk(model, chunk)
        check_clip(model, frames or model.frame_rule[0], size)
        target = ranks.on_first(lambda: make_directory(out))
        place = place_of(file, model, target)
        clips = ClipSampler(frames or 1, stride, short=short, where="start")
        usable = ranks.on_first(lambda: find_usable(root, clips, cache_dir=cache_dir, limit=limit))
        entries = usable.entries
        numbers, classes = ranks.on_first(lambda: read_labels(labels, entries))
        parts = cut([due_bytes(model, entry, frames, stride, resize) for entry in entries], shard)
        identity = {"fingerprint": fingerprint(model), "settings": settings, "classes": classes}
        known = [[entry.path, entry.stamp, number] for entry, number in zip(entries, numbers, strict=True)]
        work = stack.enter_context(Workplace(target, not stats_only))
        todo = ranks.on_first(lambda: begin(work, identity, known, len(parts), verify))
        source = Source(root, entries, numbers, clips if frames else None, stride, resize, batch, workers, chunk)
        with precision_context(ranks.device, precision):
            try:
                ranks.on_all(lambda: encode_parts(model, source, work, parts, todo[ranks.rank :: ranks.world], ranks))
            except NonFiniteError:
                if not work.holds_clips(len(parts)):
                    work.remove()
                raise

        def finish() -> dict[str, Any]:
            """Put the parts together: the copy of the VAE, the statistics, and last the manifest."""
            if work.latents and work.manifest.exists():
                return repaired(work, todo)
            whole, shards = merge(model, (work.load(number) for number in range(len(parts))))
            rejected = [rejection.to_json() for rejection in usable.rejected] + whole.rejected
            write_jsonl(target / "rejected.jsonl", rejected)
            if not whole.clips:
                work.remove()
                path, why = (whole.rejected[0][key] for key in ("path", "detail"))
                raise DataError(f"no video could be encoded: {path!a}: {why}; see {target / 'rejected.jsonl'}")
            statistics = whole.figures() | {"rejected": len(rejected)}
            model.set_statistics(statistics["mean"], statistics["std"])
            if place is not None:
                store_statistics(file, model, place)
            else:
                log.warning("a VAE of diffusers has no place for statistics: they are in statistics.json alone")
            protocol = {"root": root, **settings, "limit": limit, "labels": labels, "latent": LATENT}
            result = statistics | {"stored": None if place is None else str(place), "vae": vae}
            result |= {"fingerprint": identity["fingerprint"], "protocol": protocol, "versions": versions()}
            write_atomic(target / "statistics.json", json.dumps(result, indent=2) + "\n")
            if work.latents:
                head: dict[str, Any] = identity | {"protocol": protocol, "statistics": statistics}
                head |= {"stride": model.stride, "frame_rule": model.frame_rule, "channels": model.latent_channels}
                head |= {"vae": None if place is None else place.name, "shards": shards}
                encoded = {clip["path"] for clip in whole.clips}
                head |= {"left_out": [row for row in known if row[0] not in encoded]}  # what could not be encoded
                write_manifest(work.manifest, head, [LatentClip(**clip) for clip in whole.clips])
            work.remove()
            report(result, target)
            return result

        return ranks.on_first(finish)


def read_labels(labels: str | None, entries: Sequence[Entry]) -> tuple[list[int | None], list[str] | None]:
    """Return the class number of each video and the names of the classes; None where there are none.

    Names are sorted, as numbers where all are.
    """
    if labels is None:
        return [None] * len(entries), None
    if labels == "folders":
        names = {entry.path: Path(entry.path).parts[0] for entry in entries if len(Path(entry.path).parts) > 1}
    else:
        try:
            with Path(labels).expanduser().open(newline="", encoding="utf-8-sig") as file:
                names = {row["path"]: row["label"] for row in csv.DictReader(file)}
        except (OSError, KeyError, UnicodeDecodeError) as error:
            raise ConfigError(f"labels={labels}: no CSV file with the columns path and label ({error})") from error
    if missing := [entry.path for entry in entries if not names.get(entry.path)]:
        where = "no folder below data.root" if labels == "folders" else "no row"
        raise ConfigError(f"labels={labels}: {where} for {len(missing)} of {len(entries)} videos, first {missing[0]!a}")
    classes = sorted({names[entry.path] for entry in entries})
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    return [classes.index(names[entry.path]) for entry in entries], classes


@dataclass(frozen=True)
class Source:
    """The videos of a list and how they are read; `clips` None: whole."""

    root: str
    entries: list[Entry]
    labels: list[int | None]
    clips: ClipSampler | None
    stride: int
    resize: Resize
    batch: int
    workers: int
    chunk: int | None

    def row(self, place: int, start: int, fps: float) -> dict[str, Any]:
        """Return what is known of a clip before it is encoded."""
        entry = self.entries[place]
        row = {"path": entry.path, "stamp": entry.stamp, "label": self.labels[place]}
        return row | {"start": start, "fps": fps, "first": True}

    def load(self, batches: list[list[int]]) -> Iterator[dict[str, Any]]:
        """Load clips; batches are given by places in the list."""
        assert self.clips is not None
        dataset = VideoClips(self.root, self.entries, self.clips, self.resize, tries=0)
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=self.workers, collate_fn=collate)
        return iter(loader)


def encode_parts(
    model: VideoVAE, source: Source, work: Workplace, parts: list[range], mine: list[int], ranks: Ranks
) -> None:
    """Encode the parts of this process, one after the other; raises NonFiniteError where none of the first can be."""
    lost = list[str]()
    batches = {number: [list(places) for places in batched(parts[number], source.batch)] for number in mine}
    loader = source.load([places for number in mine for places in batches[number]]) if source.clips and mine else None
    total = sum(len(parts[number]) for number in mine)
    what = "encoding" if ranks.world == 1 else f"encoding (process 1 of {ranks.world})"
    with progress(what, total, show=ranks.rank == 0 and total > 0) as count:
        for number in mine:
            with work.writer(number) or nullcontext() as writer:
                part = Part(model, writer)
                if loader is None:
                    for place in parts[number]:
                        encode_video(part, source, place)
                        count(1)
                else:
                    for clips in islice(loader, len(batches[number])):
                        encode_clips(part, source, clips)
                        count(len(clips.get("path", ())) + clips["missing"])
                work.store(number, part)
                lost += [row["detail"] for row in part.rejected if row["reason"] == "not_finite"]
                if len(lost) >= LOST and not work.holds_clips(len(parts)):
                    raise NonFiniteError(f"none of {len(lost)} videos could be encoded: {lost[0]}")


def encode_clips(part: Part, source: Source, clips: dict[str, Any]) -> None:
    """Encode a batch of a loader."""
    part.rejected += [failure.to_json() for failure in clips["failures"]]
    if "error" in clips:
        raise DataError(clips["error"])
    if "video" not in clips:
        return
    video = clips["video"]  # (B, T, H, W, 3)
    shape = fitting(part.model, *video.shape[1:4])
    if 0 in shape:
        part.rejected += [too_small(path, *video.shape[2:4]) for path in clips["path"]]
        return
    columns = zip(clips["index"].tolist(), clips["start"].tolist(), clips["fps"].tolist(), strict=True)
    rows = [source.row(*row) for row in columns]
    add(part, rows, video[:, :, : shape[1], : shape[2]], push_size(part.model, shape, source.chunk))


def add(part: Part, rows: list[dict[str, Any]], video: Tensor, size: int) -> None:
    """Encode clips together; where that gives anything but finite latents, one by one, to pass over those alone."""
    pieces = video.split(size, dim=1)
    try:
        part.add(rows, ((piece, i == len(pieces) - 1) for i, piece in enumerate(pieces)))
    except NonFiniteError as error:
        if len(rows) == 1:
            part.rejected.append(pass_over(rows[0]["path"], error))
            return
        for row, one in zip(rows, video.split(1), strict=True):
            add(part, [row], one, size)


def encode_video(part: Part, source: Source, place: int) -> None:
    """Encode all of a video as it is read; one that breaks off does not count."""
    name, stride = source.entries[place].path, source.stride
    try:
        with Video(Path(source.root) / name) as video:
            info = video.info
            geometry = None if source.resize.size is None else source.resize(info.height, info.width)
            given = (geometry.height, geometry.width) if geometry else (info.height, info.width)
            shape = fitting(part.model, -(-info.frames // stride), *given)
            if 0 in shape:
                part.rejected.append(too_small(name, *given, frames=info.frames))
                return
            frames, height, width = shape
            size, stop = push_size(part.model, shape, source.chunk), (frames - 1) * stride + 1

            def pieces() -> Iterator[tuple[Tensor, bool]]:
                taken = 0
                for piece in video.chunks(size, 0, stop, stride, geometry):
                    taken += len(piece)
                    yield piece[None, :, :height, :width], taken == frames
                if taken < frames:
                    raise DecodeFailure(name, "corrupt", f"{taken} of {frames} frames could be read")

            part.add([source.row(place, 0, float(info.fps / stride))], pieces())
    except (DecodeFailure, NonFiniteError) as error:
        part.rejected.append(pass_over(name, error))


def too_small(path: str, height: int, width: int, frames: int | None = None) -> dict[str, Any]:
    """Word why a video was passed over."""
    length = "" if frames is None else f"{frames} frames of "
    return {"path": path, "reason": "size", "detail": f"{length}{height}x{width} do not fill a latent"}


def report(result: dict[str, Any], target: Path) -> None:
    """Print a row a channel."""
    first, channels = result["first"], len(result["mean"])
    columns = [result["mean"], result["std"], result["kl"], result["noise_share"], first["mean"], first["std"]]
    show_table(
        f"{result['videos']} videos, {result['latents']} latents, {result['active']} of {channels} channels active, "
        f"{result['rejected']} passed over; see {target / 'statistics.json'}",
        [(str(channel), *row) for channel, row in enumerate(zip(*columns, strict=True))],
        ("channel", "mean", "std", "KL nats", "noise share", "first mean", "first std"),
    )
