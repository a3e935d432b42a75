"""Encode: measure the latents of a data set, and store their statistics with the VAE.

Statistics are those of samples of the posterior, computed from its means and variances: nothing random is in them.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from torch import Tensor

from praxino import checkpoint, stream
from praxino.config import check_call
from praxino.data.clips import ClipSampler, Short
from praxino.data.transforms import Resize, Size
from praxino.data.usable import find_usable
from praxino.errors import ConfigError, DataError, NonFiniteError
from praxino.metrics.latents import LatentStatistics, double
from praxino.models.vae import Posterior, VideoVAE
from praxino.tasks.common import (
    Precision,
    at_least,
    check_chunk,
    check_clip,
    load_clips,
    make_directory,
    make_resize,
    pick_device,
    precision_context,
    show_table,
    versions,
    write_atomic,
    write_jsonl,
)
from praxino.tasks.reconstruct import fitting_chunk
from praxino.tasks.store import fingerprint, place_of, store_statistics
from praxino.video import DecodeFailure, Video, to_float

log = logging.getLogger(__name__)

Rejected = list[dict[str, Any]]


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `encode` and call it."""
    return encode(**check_call(encode, cfg))


def encode(
    vae: str,
    data: dict[str, str],
    out: str,
    stats_only: bool = True,
    frames: int | None = 17,
    stride: int = 1,
    size: Size = 64,
    short: Short = "drop",
    limit: int | None = None,
    batch: int = 1,
    workers: int = 2,
    chunk: int | None = None,
    weights: Literal["ema", "raw"] = "ema",
    device: str = "auto",
    precision: Precision = "32",
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Measure mean and deviation per latent channel over the videos under `data.root`; store them with the VAE.

    Args:
        vae: whatever `praxino.load` reads.
        out: gets statistics.json, rejected.jsonl and a copy of the VAE that holds the statistics: `vae.ckpt` of a
            praxino checkpoint, which still resumes, or the directory `vae` of official files. One of diffusers has no
            place for them and is not copied.
        stats_only: true; statistics are all that this version measures.
        frames: frames of each video, from its start; None takes all of them, in constant memory where the VAE streams.
        size: a square of that many pixels, or [height, width], resized and centre-cropped; None keeps the video's own.
            Frames, rows and columns at the end that do not fill a latent are left out where `frames` or `size` is None.
        batch, workers: of the loader; with frames=None videos are read one after the other.
        chunk: frames a push, where the VAE streams; the result does not depend on it. None fits it to the frame.
        weights: the statistics are those of these weights; the copy holds all.

    Returns:
        the content of statistics.json.
    """
    if not stats_only:
        raise ConfigError("stats_only=false: this version measures the statistics and writes no latents; leave it true")
    at_least(1, frames=frames, stride=stride, limit=limit, batch=batch, chunk=chunk)
    at_least(0, workers=workers)
    resize = make_resize(size)
    if size is None and batch > 1:
        raise ConfigError("size=null keeps the size of every video: use batch=1")
    file, root = checkpoint.locate(vae), data["root"]
    chosen = pick_device(device)
    model = checkpoint.load(file, weights=weights, device=chosen)
    check_chunk(model, chunk)
    check_clip(model, frames or model.frame_rule[0], size)
    target = make_directory(out)
    place = place_of(file, model, target)
    survey, rejected = Survey(model), []
    with precision_context(chosen, precision):
        if frames is None:
            usable = find_usable(root, ClipSampler(1), cache_dir=cache_dir)
            rejected += [rejection.to_json() for rejection in usable.rejected]
            for entry in usable.entries[:limit]:
                survey_video(survey, Path(root), entry.path, stride, resize, chunk, rejected)
        else:
            clips = ClipSampler(frames, stride, short=short, where="start")
            loader = load_clips(root, clips, resize, limit, batch, workers, cache_dir, rejected)
            survey_clips(survey, loader, chunk, rejected)
    write_jsonl(target / "rejected.jsonl", rejected)
    if not survey.videos:
        raise DataError(f"no video could be encoded: see {target / 'rejected.jsonl'}")

    result = survey.describe()
    model.set_statistics(result["mean"], result["std"])
    if place is not None:
        store_statistics(file, model, place)
    else:
        log.warning("a VAE of diffusers has no place for statistics: they are in statistics.json alone")
    protocol = {"root": root, "frames": frames, "stride": stride, "size": size, "short": short, "limit": limit}
    protocol |= {"weights": weights, "precision": precision, "latent": "posterior sample, in closed form"}
    result |= {"rejected": len(rejected), "stored": None if place is None else str(place)}
    result |= {"vae": vae, "fingerprint": fingerprint(model), "protocol": protocol, "versions": versions()}
    write_atomic(target / "statistics.json", json.dumps(result, indent=2) + "\n")
    report(result, target)
    return result


class Survey:
    """What is known of the latents so far, those of the causal first frames apart."""

    def __init__(self, model: VideoVAE) -> None:
        self.model, self.weight = model, next(model.parameters())
        self.videos = self.frames = 0
        self.first, self.rest = self.empty(), self.empty()

    def empty(self) -> LatentStatistics:
        return LatentStatistics.empty(self.model.latent_channels)

    @torch.inference_mode()
    def add(self, name: str, pieces: Iterable[tuple[Tensor, bool]]) -> None:
        """Encode videos given in pieces, uint8 `(B, t, H, W, 3)` that fit, each with whether it is the last.

        All of them count, or none where reading them fails midway.
        """
        encoder, first, rest = stream.Encoder(self.model), self.empty(), self.empty()
        videos = frames = 0
        for piece, final in pieces:
            posterior = encoder.push(to_float(piece.to(self.weight.device)).to(self.weight.dtype), final)
            videos, frames = len(piece), frames + piece.shape[0] * piece.shape[1]
            if posterior is None:
                continue
            if not posterior.moments.isfinite().all():
                raise NonFiniteError(f"the latents of {name!a} are not finite: use precision=32, or another VAE")
            wide, causal = double(posterior.moments), 0 if first.count else 1  # first latent frames in this piece
            for statistics, moments in ((first, wide[:, :, :causal]), (rest, wide[:, :, causal:])):
                part = Posterior(moments)
                statistics.update(part.mean, part.logvar.exp(), part.kl())
        self.first.merge(first)
        self.rest.merge(rest)
        self.videos, self.frames = self.videos + videos, self.frames + frames

    def describe(self) -> dict[str, Any]:
        """Return all figures as plain data; lists have an entry per channel."""
        whole = self.empty().merge(self.first).merge(self.rest)
        parts = {"first": self.first, "rest": self.rest}
        return {
            "mean": whole.mean.tolist(),
            "std": whole.std.tolist(),
            "scale": whole.std.reciprocal().tolist(),
            "shift": whole.mean.tolist(),
            "videos": self.videos,
            "frames": self.frames,
            "latents": whole.count,  # positions in time and space
            "kl": whole.kl.mean.tolist(),  # nats an element
            "active": int(whole.active.sum()),
            "min": whole.means.low.tolist(),  # of the posterior mean
            "max": whole.means.high.tolist(),
            "noise_share": whole.noise_share.tolist(),  # of the posterior in the variance
            **{
                name: {"mean": part.mean.tolist(), "std": part.std.tolist(), "latents": part.count}
                if part.count
                else None
                for name, part in parts.items()  # the causal first latent frame, and all others
            },
        }


def survey_clips(survey: Survey, loader: Iterable[dict[str, Any]], chunk: int | None, rejected: Rejected) -> None:
    """Encode the clips of a loader."""
    for clips in loader:
        rejected += [failure.to_json() for failure in clips["failures"]]
        if "error" in clips:
            raise DataError(clips["error"])
        if "video" not in clips:
            continue
        video = clips["video"]  # (B, T, H, W, 3)
        shape = fitting(survey.model, *video.shape[1:4])
        if 0 in shape:
            rejected += [too_small(path, *video.shape[2:4]) for path in clips["path"]]
            continue
        size = push_size(survey.model, shape, chunk)
        parts = video[:, :, : shape[1], : shape[2]].split(size, dim=1)
        survey.add(clips["path"][0], ((part, i == len(parts) - 1) for i, part in enumerate(parts)))


def survey_video(
    survey: Survey, root: Path, name: str, stride: int, resize: Resize, chunk: int | None, rejected: Rejected
) -> None:
    """Encode all of a video as it is read; one that breaks off does not count."""
    try:
        with Video(root / name) as video:
            info = video.info
            geometry = None if resize.size is None else resize(info.height, info.width)
            given = (geometry.height, geometry.width) if geometry else (info.height, info.width)
            shape = fitting(survey.model, -(-info.frames // stride), *given)
            if 0 in shape:
                rejected.append(too_small(name, *given, frames=info.frames))
                return
            frames, height, width = shape
            size, stop = push_size(survey.model, shape, chunk), (frames - 1) * stride + 1

            def pieces() -> Iterator[tuple[Tensor, bool]]:
                taken = 0
                for part in video.chunks(size, 0, stop, stride, geometry):
                    taken += len(part)
                    yield part[None, :, :height, :width], taken == frames
                if taken < frames:
                    raise DecodeFailure(name, "corrupt", f"{taken} of {frames} frames could be read")

            survey.add(name, pieces())
    except DecodeFailure as failure:
        log.warning("%s", failure)
        rejected.append({"path": name, "reason": failure.reason, "detail": failure.detail})


def fitting(model: VideoVAE, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Return the largest clip in a video that the model takes, 0 where even its least is larger."""
    first, step = model.frame_rule
    fits = first + (frames - first) // step * step if frames >= first else 0
    return fits, height // model.stride[1] * model.stride[1], width // model.stride[2] * model.stride[2]


def push_size(model: VideoVAE, shape: tuple[int, int, int], chunk: int | None) -> int:
    """Return how many frames go through the encoder at once: all, where it cannot stream."""
    frames, height, width = shape
    return (chunk or fitting_chunk(height, width)) if model.streamable else frames


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
