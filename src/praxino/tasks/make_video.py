"""Make videos: pictures in the order of their numbers become a video file; a video becomes one of another kind."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from praxino.config import check_call
from praxino.errors import ConfigError, DataError, StorageError
from praxino.tasks.rundir import make_directory
from praxino.video import IMAGE_SUFFIXES, DecodeFailure, Video, Writer, frames_in

log = logging.getLogger(__name__)

SUFFIXES = (".mp4", ".webm", ".gif", ".mkv", ".mov", ".avi", ".m4v")
RATE = 25.0  # frames a second of pictures, which state none


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `make_video` and call it."""
    return make_video(**check_call(make_video, cfg))


def make_video(
    input: str, out: str, fps: float | None = None, quality: int = 18, lossless: bool = False
) -> dict[str, Any]:
    """Write a video for each sequence of pictures: of a folder, of each prefix in it, of each folder of a tree.

    Args:
        input: a folder of pictures, a tree of such folders, or a video file.
        out: the video of a single sequence. Several become files of this kind in a folder of this name without its
            suffix, named by their folder and prefix.
        fps: frames a second; None: 25 for pictures, its own for a video.
        quality: constant rate factor, 0 (best) to 51; a GIF has none.
        lossless: every pixel as it is.

    Returns:
        the videos by path, and the number of their frames.
    """
    target, source = Path(out).expanduser().absolute(), Path(input).expanduser().absolute()
    if target.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"out={out}: use a name that ends in {', '.join(SUFFIXES)}")
    sequences = find_sequences(source) if source.is_dir() else {source.stem: [source]}
    if not sequences:
        raise DataError(f"no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}) in input={input}")
    single = len(sequences) == 1
    written: dict[str, int] = {}
    for name, files in sequences.items():
        path = target if single else target.with_suffix("") / f"{name}{target.suffix}"
        make_directory(path.parent)
        try:
            rate = fps or (RATE if source.is_dir() else rate_of(source))
            with Writer(path, rate, "lossless" if lossless else None, quality) as writer:
                for frames in read_frames(files):
                    writer.add(frames)
        except ValueError as error:  # sizes that differ, a rate or a quality out of range
            raise ConfigError(f"{name}: {error}") from error
        except OSError as error:
            raise StorageError(f"out={path} cannot be written: {error.strerror or error}") from error
        written[str(path)] = writer.frames
        log.info("%s: %d frames, %g a second", path, writer.frames, float(rate))
    return {"videos": written, "frames": sum(written.values())}


def find_sequences(root: Path) -> dict[str, list[Path]]:
    """Return the pictures of each sequence under a folder, in order, by the name of the video that they become."""
    found: dict[str, list[Path]] = {}
    for folder, below, _ in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        groups = frames_in(folder)
        relative = Path(folder).relative_to(root)
        if len(groups) > 1 and all(len(files) == 1 for files in groups.values()):  # names without numbers
            groups = {folder: [file for files in groups.values() for file in files]}
        for address, files in groups.items():
            form = "" if address == folder else os.path.splitext(os.path.basename(address))[0].replace("*", "")
            parts = (*relative.parts[:-1], relative.name or root.name) if not form else (*relative.parts, form)
            name = "/".join((*parts[:-1], parts[-1].strip("-_. ") or "frames"))
            while name in found:
                name += "-2"
            found[name] = [Path(file) for file in files]
        left = count_pictures(folder) - sum(map(len, groups.values()))
        if left:
            log.warning("%s: %d pictures belong to no sequence and are left out", folder, left)
    return found


def count_pictures(folder: str) -> int:
    """Return how many visible pictures a folder holds."""
    names = (entry.name for entry in os.scandir(folder) if entry.is_file())
    return sum(not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES for name in names)


def rate_of(path: Path) -> Any:
    """Return the frames a second of a video."""
    with Video(path, index_dir=None) as video:
        return video.info.fps


def read_frames(files: list[Path]) -> Iterator[Tensor]:
    """Yield the frames of pictures, or of a video, in order, uint8 `(t, H, W, 3)`."""
    for file in files:
        with Video(file, index_dir=None) as video:
            if video.info.damage:
                raise DecodeFailure(str(file), "corrupt", video.info.damage)
            yield from video.chunks(16)
