"""Reconstruct: every video under a path through the VAE and back to disk, at any length, with PSNR and SSIM of each."""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from torch import Tensor

from praxino import checkpoint, stream, tiling
from praxino.config import check_call
from praxino.data.clips import ClipSampler
from praxino.data.transforms import Resize, Size
from praxino.data.usable import find_usable
from praxino.errors import ConfigError, DataError, NonFiniteError
from praxino.models.vae import VideoVAE
from praxino.tasks.common import at_least, check_chunk, check_written, make_resize, measure, pass_over, stem
from praxino.tasks.console import show, show_table
from praxino.tasks.device import Precision, pick_device, precision_context
from praxino.tasks.outputs import RECONSTRUCTIONS, written
from praxino.tasks.rows import mean_of, without_nan, write_jsonl
from praxino.tasks.rundir import check_outside, make_directory
from praxino.video import DecodeFailure, Video, Writer, to_float, to_uint8

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `reconstruct` and call it."""
    return reconstruct(**check_call(reconstruct, cfg))


def reconstruct(
    vae: str,
    input: str,
    out: str,
    frames: int | None = None,
    stride: int = 1,
    size: Size = None,
    chunk: int | None = None,
    tile: Size = None,
    overlap: float = 0.25,
    tile_frames: int | None = None,
    offload: bool = False,
    save_original: bool = False,
    side_by_side: bool = False,
    limit: int | None = None,
    images: bool = False,
    weights: Literal["ema", "raw"] = "ema",
    lossless: bool = False,
    quality: int = 18,
    device: str = "auto",
    precision: Precision = "32",
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Encode and decode videos; write them, and a row for each. One bad video does not end the run.

    Args:
        vae: whatever `praxino.load` reads.
        input: a video, an image, a folder of frames, or a tree of them, which is mirrored under `out`.
        frames: frames of each video, from its start; None takes all of them, in constant memory.
        stride: every `stride`-th frame.
        size: a square of that many pixels, or [height, width], resized and centre-cropped; None keeps the video's own.
        chunk: frames a push; the result does not depend on it. None fits it to the frame or the tile.
        tile: lossy: frames go through the VAE in tiles of this many pixels, square or [height, width], which overlap by
            `overlap` of a tile and are blended. None, or a tile as large as the frame, is exact.
        tile_frames: lossy: tiles of that many frames, for a VAE whose group norm cannot stream. None takes its videos
            in one piece.
        offload: what tiles hold waits in the host's memory rather than on the card: exact, but copied there and back
            once a chunk, so choose large ones.
        save_original: write the exact clips that the VAE was fed, without loss, under `out/origin`.
        side_by_side: write original | reconstruction under `out/side_by_side`.
        limit: take that many videos, evenly spread over the sorted paths.
        images: take lone pictures in a tree as videos of one frame.
        lossless: write the reconstructions without loss; otherwise H.264 of constant rate factor `quality`.

    Returns:
        videos, frames, rejected and the means of psnr (dB) and ssim over the videos.
    """
    at_least(1, frames=frames, stride=stride, chunk=chunk, limit=limit)
    check_written(quality)
    tiling.check_overlap(overlap)
    resize, chosen = make_resize(size) if size is not None else None, pick_device(device)
    check_outside(out, {"input": input})
    root, target = Path(input).expanduser().absolute(), make_directory(out)
    model = checkpoint.load(vae, weights=weights, device=chosen)
    if tile_frames is None:
        check_chunk(model, chunk, " or use tile_frames=N (tiles of time, lossy)")
    tiles = make_tiles(model, tile, overlap, tile_frames, offload)
    root, sources, rejected = find_sources(root, images, cache_dir, limit)
    kinds = [kind for kind, wanted in {"origin": save_original, "side_by_side": side_by_side}.items() if wanted]
    outputs = [{"reconstruction": name, **{kind: f"{kind}/{name}" for kind in kinds}} for name in output_names(sources)]
    planned = check_names([name for names in outputs for name in names.values()])
    rows: list[dict[str, Any]] = []
    read = [root / source for source in sources]
    with written(target, RECONSTRUCTIONS, planned, ["rejected.jsonl"], read, vae=vae):
        for source, names in zip(sources, outputs, strict=True):
            try:
                with Video(root / source) as video, precision_context(chosen, precision):
                    clip = Clip(video, frames, stride, resize, chunk, tiles)
                    paths = {kind: target / name for kind, name in names.items()}
                    row = clip.through(model, chosen, paths, lossless, quality)
            except (DecodeFailure, NonFiniteError) as error:
                rejected.append(pass_over(source, error))
                continue
            rows.append({"path": source, "output": names["reconstruction"], "files": [*names.values()], **row})
            log.info(
                "%s: %s frames, PSNR %s dB, SSIM %s",
                ascii(names["reconstruction"])[1:-1],
                *map(show, (row["frames"], row["psnr"], row["ssim"])),
            )
        write_jsonl(target / "rejected.jsonl", rejected)
        if not rows:
            raise DataError(
                f"none of {len(sources)} videos under {input} could be reconstructed: see {target / 'rejected.jsonl'}"
            )
        write_jsonl(target / RECONSTRUCTIONS, rows)
    means = {metric: mean_of(rows, metric) for metric in ("psnr", "ssim")}
    show_table(
        f"Reconstructions in {target}",
        [*((row["path"], row["frames"], row["psnr"], row["ssim"]) for row in rows), ("mean", "", *means.values())],
        ("video", "frames", "PSNR dB", "SSIM"),
    )
    if rejected:
        log.warning("%d files passed over, see %s", len(rejected), target / "rejected.jsonl")
    return {"videos": len(rows), "frames": sum(row["frames"] for row in rows), "rejected": len(rejected), **means}


def make_tiles(model: VideoVAE, tile: Size, overlap: float, tile_frames: int | None, offload: bool) -> dict[str, Any]:
    """Return the options of tiling, checked against the model; say in the log what is lossy."""
    if offload and tile is None:
        raise ConfigError("offload=true is about tiles that wait for their turn: use it with tile, e.g. tile=512")
    if tile is not None:
        tiling.check_tile(model, tile, overlap)
        log.warning("tile=%s, overlap=%s: tiling is lossy where a frame is larger than a tile", tile, overlap)
    if tile_frames is not None:
        tiling.check_tile_frames(model, tile_frames)
        log.warning("tile_frames=%s: tiling in time is lossy where a video is longer than a tile", tile_frames)
    return {"tile": tile, "overlap": overlap, "tile_frames": tile_frames, "offload": offload}


def find_sources(
    path: Path, images: bool, cache_dir: str | None, limit: int | None
) -> tuple[Path, list[str], list[dict[str, Any]]]:
    """Return a folder, `limit` videos of it by relative path, and what was rejected; a single video is its own tree."""
    if not path.is_dir():
        return path.parent, [path.name], []
    usable = find_usable(path, ClipSampler(1), images=images, aliases=True, cache_dir=cache_dir, limit=limit)
    names, root = [entry.path for entry in usable.entries], path
    if "." in names:  # the folder itself is a video: of frames
        names, root = [os.path.normpath(os.path.join(path.name, name)) for name in names], path.parent
    return root, names, [rejection.to_json() for rejection in usable.rejected]


def check_names(names: list[str]) -> list[str]:
    """Return the names of files if no two are the same; raise ConfigError otherwise."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"{twice[0]!a} would be written for two videos: rename a folder origin or side_by_side")
    return names


class Clip:
    """The part of a video that goes through the VAE, read chunk by chunk."""

    def __init__(
        self,
        video: Video,
        frames: int | None,
        stride: int,
        resize: Resize | None,
        chunk: int | None,
        tiles: dict[str, Any],
    ) -> None:
        info = video.info
        self.video, self.stride = video, stride
        self.geometry = resize(info.height, info.width) if resize else None
        self.size = [self.geometry.height, self.geometry.width] if self.geometry else [info.height, info.width]
        self.stop = None if frames is None else min(info.frames, (frames - 1) * stride + 1)
        tile = tiles["tile"]
        sides = self.size if tile is None else [tile, tile] if isinstance(tile, int) else tile
        self.chunk = chunk or fitting_chunk(*map(min, self.size, sides))
        self.tiles = tiles
        self.fps = info.fps / stride

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.video.chunks(self.chunk, 0, self.stop, self.stride, self.geometry))

    @torch.inference_mode()
    def through(
        self, model: VideoVAE, device: torch.device, paths: dict[str, Path], lossless: bool, quality: int
    ) -> dict[str, Any]:
        """Reconstruct the clip, write what `paths` asks for, and return its row."""
        started = time.perf_counter()
        count, sums = 0, torch.zeros(2, dtype=torch.float64)
        with ExitStack() as stack:
            writers = {
                kind: stack.enter_context(
                    Writer(path, self.fps, "lossless" if lossless or kind == "origin" else None, quality)
                )
                for kind, path in paths.items()
            }
            whole = not model.streamable and self.tiles["tile_frames"] is None
            for source, y in pairs(model, self, device, None if whole else self.chunk, self.tiles):
                x = to_float(source).to(device)
                pictures = {"reconstruction": to_uint8(y), "origin": source}
                pictures["side_by_side"] = torch.cat([source, pictures["reconstruction"]], dim=-2)
                for kind, writer in writers.items():
                    writer.add(pictures[kind])
                sums += len(source) * torch.cat([*measure(x[None], y[None]).values()]).double().cpu()
                count += len(source)
        scores = without_nan(dict(zip(("psnr", "ssim"), (sums / count).tolist(), strict=True)))
        seconds = round(time.perf_counter() - started, 3)
        return {"frames": count, "size": self.size, "fps": float(self.fps), **scores, "seconds": seconds}


def pairs(
    model: VideoVAE, chunks: Iterable[Tensor], device: torch.device, chunk: int | None, tiles: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the frames `(t, H, W, 3)` in uint8 and their reconstruction `(3, t, H, W)`, as the decoder lets them go."""
    waiting: list[Tensor] = []

    def feed() -> Iterator[Tensor]:
        for chunk in chunks:
            waiting.append(chunk)
            yield to_float(chunk).to(device)

    for y in stream.reconstruct(model, feed(), chunk, **tiles):
        held = torch.cat(waiting)
        waiting[:] = [held[y.shape[1] :]]
        yield held[: y.shape[1]], y.float().clamp(-1, 1)


def fitting_chunk(height: int, width: int) -> int:
    """Return how many frames go through the VAE at once: about a million pixels, and a multiple of 8 frames or few."""
    frames = 2**20 // (height * width)
    return min(64, frames // 8 * 8) if frames >= 8 else max(1, frames)


def output_names(paths: list[str]) -> list[str]:
    """Mirror the paths as mp4 files; two videos that differ in their suffix alone keep it in their names."""
    stems = [stem(path) for path in paths]
    count = Counter(name.casefold() for name in stems)
    names = [name if count[name.casefold()] == 1 else path for name, path in zip(stems, paths, strict=True)]
    return [name + ".mp4" for name in (names if len(set(names)) == len(names) else paths)]
