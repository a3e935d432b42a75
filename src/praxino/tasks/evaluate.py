"""Evaluate: PSNR and SSIM of a VAE's reconstructions, or between two folders of videos, one row a video."""

import csv
import io
import json
import logging
import os
import statistics
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from praxino import checkpoint
from praxino.config import check_call
from praxino.data.clips import ClipSampler, Short
from praxino.data.transforms import Size
from praxino.data.usable import find_usable
from praxino.errors import ConfigError, DataError
from praxino.models.vae import VideoVAE
from praxino.tasks.common import (
    Precision,
    at_least,
    check_clip,
    load_clips,
    make_directory,
    make_resize,
    measure,
    pick_device,
    precision_context,
    show_table,
    versions,
    without_nan,
    write_atomic,
    write_jsonl,
)
from praxino.tasks.compare import compare_sets
from praxino.video import DecodeFailure, Video, to_float

log = logging.getLogger(__name__)

METRICS = ("psnr", "ssim")
Row = dict[str, Any]
Rejected = list[dict[str, Any]]


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `evaluate` and call it."""
    return evaluate(**check_call(evaluate, cfg))


def evaluate(
    out: str,
    vae: str | None = None,
    data: dict[str, str | None] | None = None,
    real: str | None = None,
    fake: str | None = None,
    paired: bool = True,
    frames: int = 17,
    stride: int = 1,
    size: Size = 64,
    short: Short = "drop",
    limit: int | None = None,
    batch: int = 1,
    workers: int = 2,
    weights: Literal["ema", "raw"] = "ema",
    device: str = "auto",
    precision: Precision = "32",
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Measure a VAE on `data.root`, in memory, or the videos under `fake` against their namesakes under `real`.

    With a VAE, a clip is the first `frames` frames at `stride` of each video, resized and centre-cropped to `size`; the
    decoded posterior mean is clamped to [-1, 1] and not rounded. Two folders are compared as their files decode, all
    frames at their own size. A score of a video is the mean over its frames.

    Args:
        paired: false: `fake` are videos of their own, such as samples, and `compare_sets` measures how like they are to
            those under `real`, by a clip of each.

    Returns:
        the content of metrics.json: n, mean and std over the videos of each metric, protocol, versions.
    """
    at_least(1, frames=frames, stride=stride, limit=limit, batch=batch)
    at_least(0, workers=workers)
    resize = make_resize(size)
    if size is None and batch > 1:
        raise ConfigError("size=null keeps the size of every video: use batch=1")
    target, root = make_directory(out), data["root"] if data else None
    if not paired:
        if not (real and fake) or vae or root:
            raise ConfigError(
                "paired=false compares two folders: give real=DIR fake=DIR, and neither vae nor data.root"
            )
        clips = ClipSampler(frames, stride, short=short, where="start")
        return compare_sets(real, fake, target, clips, resize, limit, batch, workers, cache_dir)
    rejected: Rejected = []
    if vae and root and not (real or fake):
        chosen = pick_device(device)
        model = checkpoint.load(vae, weights=weights, device=chosen)
        check_clip(model, frames, size)
        clips = ClipSampler(frames, stride, short=short, where="start")
        loader = load_clips(root, clips, resize, limit, batch, workers, cache_dir, rejected)
        with precision_context(chosen, precision):
            rows = score_reconstructions(model, loader, chosen, rejected)
        protocol: Row = {"vae": vae, "root": root, "frames": frames, "stride": stride, "size": size, "short": short}
        protocol |= {"weights": weights, "precision": precision, "latent": "posterior mean"}
    elif real and fake and not (vae or root):
        rows = score_folders(Path(real), Path(fake), limit, cache_dir, rejected)
        protocol = {"real": real, "fake": fake, "frames": "all", "size": "as stored"}
    else:
        raise ConfigError("nothing to compare: give vae=PATH data.root=DIR, or real=DIR fake=DIR")
    write_jsonl(target / "rejected.jsonl", rejected)
    if not rows:
        raise DataError(f"no video could be measured: see {target / 'rejected.jsonl'}")

    protocol |= {"psnr": "data range 1, 100 dB at most, mean over frames"}
    protocol |= {
        "ssim": "data range 1, gaussian 11x11 of sigma 1.5, valid window, mean over frames; none under 11 pixels"
    }
    summary = {metric: describe([row[metric] for row in rows if row[metric] is not None]) for metric in METRICS}
    result = {**summary, "n": len(rows), "rejected": len(rejected), "protocol": protocol, "versions": versions()}
    write_csv(target / "metrics.csv", rows)
    write_atomic(target / "metrics.json", json.dumps(result, indent=2) + "\n")
    show_table(
        f"{len(rows)} videos measured, {len(rejected)} passed over; see {target / 'metrics.csv'}",
        [(name, score["mean"], score["std"], score["n"]) for name, score in summary.items()],
        ("metric", "mean", "std", "videos"),
    )
    return result


@torch.inference_mode()
def score_reconstructions(model: VideoVAE, loader: DataLoader, device: torch.device, rejected: Rejected) -> list[Row]:
    """Send every clip through the VAE and measure what comes back."""
    rows: list[Row] = []
    for clips in loader:
        rejected += [failure.to_json() for failure in clips["failures"]]
        if "error" in clips:
            raise DataError(clips["error"])
        if "video" not in clips:
            continue
        x = to_float(clips["video"].to(device))  # (B, C, T, H, W)
        try:
            model.check_video(x.shape)
        except ValueError as error:  # of size=null
            rejected += [{"path": path, "reason": "size", "detail": str(error)} for path in clips["path"]]
            continue
        y = model.decode(model.encode(x).mode()).float().clamp(-1, 1)
        scores = {name: score.tolist() for name, score in measure(x, y).items()}
        for index, path in enumerate(clips["path"]):
            row = {"path": path, "frames": x.shape[2], **{name: score[index] for name, score in scores.items()}}
            rows.append(without_nan(row))
    return rows


def score_folders(real: Path, fake: Path, limit: int | None, cache_dir: str | None, rejected: Rejected) -> list[Row]:
    """Compare the videos of two trees that have the same path but for the suffix."""
    found = {}
    for root in (real, fake):
        if (
            rows_file := root / "reconstructions.jsonl"
        ).is_file():  # written by reconstruct, with more than one tree in it
            paths = [json.loads(line)["output"] for line in rows_file.read_text(encoding="utf-8").splitlines()]
        else:
            usable = find_usable(root, ClipSampler(1), cache_dir=cache_dir)
            rejected += [rejection.to_json() for rejection in usable.rejected]
            paths = [entry.path for entry in usable.entries]
        found[root] = pair_names(paths)
    if lone := sorted(found[real].keys() ^ found[fake].keys()):
        side = "fake" if lone[0] in found[real] else "real"
        counts = f"{len(found[real])} real and {len(found[fake])} fake videos, {len(lone)} without a partner"
        raise DataError(f"{counts}; first: {lone[0]!a} is missing under {side}={fake if side == 'fake' else real}")
    rows: list[Row] = []
    for name in sorted(found[real])[:limit]:
        try:
            rows.append(score_pair(real / found[real][name], fake / found[fake][name], found[fake][name]))
        except DecodeFailure as failure:
            rejected.append({"path": failure.path, "reason": failure.reason, "detail": failure.detail})
    return rows


def score_pair(real: Path, fake: Path, name: str, chunk: int = 16) -> Row:
    """Measure two videos frame by frame, chunk by chunk."""
    with Video(real) as first, Video(fake) as second:
        shapes = [(v.info.frames, v.info.height, v.info.width) for v in (first, second)]
        if shapes[0] != shapes[1]:
            sizes = " and ".join(f"{t} frames of {h}x{w}" for t, h, w in shapes)
            raise DataError(f"{name!a}: real and fake differ, {sizes}")
        sums, count = torch.zeros(len(METRICS), dtype=torch.float64), 0
        for a, b in zip(first.chunks(chunk), second.chunks(chunk), strict=True):
            x, y = to_float(a)[None], to_float(b)[None]
            sums += len(a) * torch.cat([*measure(x, y).values()]).double()
            count += len(a)
    return without_nan({"path": name, "frames": count, **dict(zip(METRICS, (sums / count).tolist(), strict=True))})


def pair_names(paths: list[str]) -> dict[str, str]:
    """Return the paths under their names without suffix, or with it where two would be alike."""
    stems = [os.path.splitext(path)[0] for path in paths]
    return {stem if stems.count(stem) == 1 else path: path for stem, path in zip(stems, paths, strict=True)}


def describe(values: list[float]) -> dict[str, float | None]:
    """Return mean, sample standard deviation (0 of one value, no mean of none) and number of the values."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "n": len(values),
    }


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write rows as CSV, a column a key."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())
