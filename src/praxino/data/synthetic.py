"""Moving shapes with texture, written as real video files: the data of the demo, the tests and CI."""

import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from praxino.data.pool import cores
from praxino.data.report import read_lines, write_lines
from praxino.errors import ConfigError
from praxino.video import write

SHAPES = ("disc", "square", "triangle")
COLOURS = np.array([(230, 60, 50), (60, 190, 80), (70, 110, 240), (240, 200, 60), (210, 80, 210), (70, 210, 220)]) / 255
BACKGROUNDS = np.array([(40, 40, 48), (24, 44, 60), (52, 32, 36), (30, 48, 34)]) / 255
MARKER = "dataset.json"


def draw(
    number: int,
    *,
    frames: int = 33,
    size: int | list[int] = 32,
    seed: int = 0,
    texture: float = 0.15,
    split: Literal["train", "val"] = "train",
) -> tuple[str, Tensor]:
    """Return the name of the shape and the clip, uint8 `(T, H, W, 3)`: a function of (seed, split, number).

    One shape with anti-aliased edges crosses a dark background with a vertical shade and bounces off the borders.
    Lengths are fractions of the short side: radius .16 to .26, speed .02 to .055 per frame.

    Args:
        texture: contrast of the stripes on the shape, which move and turn with it; 0 for plain colours.
    """
    rng = np.random.default_rng([2, seed, split == "val", number])
    height, width = (size, size) if isinstance(size, int) else size
    short = min(height, width)
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    colour, ground = COLOURS[rng.integers(len(COLOURS))], BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    radius = rng.uniform(0.16, 0.26) * short
    speed, heading = rng.uniform(0.02, 0.055) * short, rng.uniform(0, 2 * math.pi)
    time = np.arange(frames)[:, None, None]
    x, y = (
        _bounce(rng.uniform(radius, extent - radius) + speed * part * time, radius, extent - radius)
        for extent, part in ((width, math.cos(heading)), (height, math.sin(heading)))
    )
    rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
    dx, dy = columns - x, rows - y
    cover = np.clip(0.5 - _distance(shape, dx, dy, radius), 0, 1)[..., None]
    angle, pitch = rng.uniform(0, math.pi), rng.uniform(1.5, 2.5) * math.pi / radius
    stripes = 1 + texture * np.sin((dx * math.cos(angle) + dy * math.sin(angle)) * pitch)[..., None]
    shade = (0.7 + 0.6 * rows / height)[None, :, :, None] * ground
    picture = cover * np.clip(colour * stripes, 0, 1) + (1 - cover) * shade
    return shape, torch.from_numpy(np.rint(picture * 255).astype(np.uint8))


def _bounce(position: np.ndarray, low: float, high: float) -> np.ndarray:
    """Fold a straight path into [low, high] by mirrors at both ends."""
    span = high - low
    return low + span - np.abs((position - low) % (2 * span) - span)


def _distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Return the signed distance in pixels to the edge, negative inside."""
    if shape == "disc":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.85 * radius
    return np.maximum(np.abs(dx) * math.sqrt(3) / 2 - dy / 2, dy) - 0.5 * radius


def _write_one(
    job: tuple[Literal["train", "val"], int],
    out: Path,
    frames: int,
    size: int | list[int],
    seed: int,
    texture: float,
    fps: float,
    quality: int,
) -> None:
    part, number = job
    shape, clip = draw(number, frames=frames, size=size, seed=seed, texture=texture, split=part)
    folder = out / part / shape
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{number:06d}.mp4", clip, fps, codec="h264" if quality else "lossless", quality=quality)


def make_dataset(
    out: str | Path,
    *,
    videos: int = 256,
    val_videos: int = 32,
    frames: int = 33,
    size: int | list[int] = 32,
    fps: float = 25.0,
    seed: int = 0,
    texture: float = 0.15,
    quality: int = 0,
    workers: int | None = None,
) -> Path:
    """Write `out/train/SHAPE/NUMBER.mp4` and `out/val/...`; nothing to do where the same set is there already.

    Args:
        quality: 0 is lossless, so that reading gives what `draw` drew; else the constant rate factor of H.264 in 4:2:0,
            whose bytes are not the same every time.
        workers: processes, None for one per core.

    Raises:
        ConfigError: a value out of range, or `out` holds something else.
    """
    out = Path(out)
    _check(videos, val_videos, frames, size, fps, seed, texture, quality)
    wanted: dict[str, Any] = {
        "videos": videos,
        "val_videos": val_videos,
        "frames": frames,
        "size": size if isinstance(size, int) else list(size),
        "fps": float(fps),
        "seed": seed,
        "texture": float(texture),
        "quality": quality,
    }
    if _is_there(out, wanted):
        return out
    out.mkdir(parents=True, exist_ok=True)
    write_lines(out / MARKER, [{**wanted, "complete": False}])
    jobs: list[tuple[Literal["train", "val"], int]] = [("train", number) for number in range(videos)]
    jobs += [("val", number) for number in range(val_videos)]
    run = partial(_write_one, out=out, frames=frames, size=size, seed=seed, texture=texture, fps=fps, quality=quality)
    count = min(workers or cores(), len(jobs))
    if count == 1:
        for job in jobs:
            run(job)
    else:
        with ProcessPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(run, jobs, chunksize=max(1, len(jobs) // (8 * count))))
    write_lines(out / MARKER, [{**wanted, "complete": True}])
    return out


def _check(
    videos: int,
    val_videos: int,
    frames: int,
    size: int | list[int],
    fps: float,
    seed: int,
    texture: float,
    quality: int,
) -> None:
    sides = [size] if isinstance(size, int) else list(size)
    if videos < 1 or val_videos < 0 or frames < 1 or seed < 0:
        given = f"{videos} videos, {val_videos} val_videos, {frames} frames, seed {seed}"
        raise ConfigError(f"{given}: use at least 1, 0, 1 and 0")
    if not 1 <= len(sides) <= 2 or any(side < 8 or side % 2 for side in sides):
        raise ConfigError(f"size {size}: use an even number from 8 on, or [height, width]")
    if not fps > 0 or not 0 <= texture <= 1 or not 0 <= quality <= 51:
        given = f"fps {fps}, texture {texture}, quality {quality}"
        raise ConfigError(f"{given}: use a positive fps, a texture from 0 to 1, a quality from 0 (lossless) to 51")


def _is_there(out: Path, wanted: dict[str, Any]) -> bool:
    """Tell whether `out` holds the set; raises ConfigError where it holds something else."""
    marker = out / MARKER
    if not marker.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} is not an empty directory: give another one")
        return False
    try:
        found = next(read_lines(marker))
    except (ValueError, StopIteration):
        raise ConfigError(f"{marker} is damaged: remove {out} or give another directory") from None
    complete = found.pop("complete", False)
    if found != wanted:
        other = ", ".join(f"{key}={found.get(key)}" for key in wanted if found.get(key) != wanted[key])
        raise ConfigError(f"{out} holds another set ({other}): remove it or give another directory")
    return complete
