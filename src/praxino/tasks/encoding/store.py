"""Store latent statistics with a VAE: copy the files that it came from, with nothing else changed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from praxino import checkpoint
from praxino.checkpoint import CONFIG, INDEX, fingerprint
from praxino.errors import ConfigError, StorageError
from praxino.models.foreign import ForeignVAE
from praxino.models.vae import VideoVAE

__all__ = ["fingerprint", "is_own", "place_of", "store_statistics"]


def place_of(file: Path, vae: VideoVAE, out: Path) -> Path | None:
    """Return where the copy of a VAE with statistics goes, None for a kind that cannot hold them.

    Args:
        file: the checkpoint or the weights, as `checkpoint.locate` finds them.

    Raises:
        ConfigError: that is where the VAE is already.
    """
    own = is_own(file)
    if isinstance(vae, ForeignVAE) and not own:
        return None
    place = out / "vae.ckpt" if own else out / "vae"
    if place.resolve() == (file if own else file.parent).resolve():
        raise ConfigError(f"out={out} holds the VAE itself, which is not overwritten: choose another out")
    return place


def is_own(file: Path) -> bool:
    """Tell whether a file is a checkpoint of praxino."""
    return file.suffix not in (".safetensors", ".json") and "praxino" in checkpoint.read(file)


def store_statistics(file: Path, vae: VideoVAE, place: Path) -> None:
    """Copy a VAE with its statistics to the place that `place_of` gave it; raises StorageError."""
    try:
        if place.suffix:
            copy_checkpoint(file, vae, place)
        else:
            copy_official(file, vae, place)
    except (OSError, RuntimeError) as error:  # the latter is torch's writer, when the disk under it fails
        raise StorageError(f"{place} cannot be written: {checkpoint.one_line(error)}") from error


def copy_checkpoint(file: Path, vae: VideoVAE, place: Path) -> None:
    """Write a praxino checkpoint again, with the statistics in its block: it resumes like the one it came from."""
    content = dict(checkpoint.read(file))
    content["praxino"] = {**content["praxino"], "statistics": vae.statistics}

    def write(path: Path) -> None:
        with path.open("wb") as target:
            torch.save(content, target)
            target.flush()
            os.fsync(target.fileno())
        checkpoint.verify(path)

    checkpoint.replace(place, write)


def copy_official(file: Path, vae: VideoVAE, place: Path) -> None:
    """Copy official weights and, last, their config.json with scale and shift set."""
    assert vae.statistics is not None
    beside = file.parent / CONFIG
    config: dict[str, Any] = checkpoint.read_config(beside) if beside.exists() else vae.official_config()
    config |= {"scale": [1 / std for std in vae.statistics["std"]], "shift": vae.statistics["mean"]}
    text = json.dumps(config, indent=2) + "\n"
    place.mkdir(exist_ok=True)
    (place / CONFIG).unlink(missing_ok=True)  # without it, half a copy cannot be loaded
    for source in [file, *(checkpoint.listed_files(file) if file.name == INDEX else ())]:
        checkpoint.replace(place / source.name, lambda path, source=source: shutil.copyfile(source, path))  # type: ignore[misc]
    checkpoint.replace(place / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
