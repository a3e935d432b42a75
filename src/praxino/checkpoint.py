"""Load models from every kind of checkpoint.

A checkpoint may come from a stranger: nothing in it is executed (`weights_only=True`, always explicit), and the model
class comes from a list here, not from the file.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from praxino import shards
from praxino.archive import one_line, read, replace, verify
from praxino.diffusion.path import Cosine, LinearBeta, LinearLogSNR, RectifiedFlow, Sigmoid
from praxino.diffusion.path import Path as DiffusionPath
from praxino.errors import CheckpointError, ConfigError, PraxinoError
from praxino.models.denoiser import Denoiser
from praxino.models.header import FORMAT
from praxino.models.vae import VideoVAE, describe
from praxino.official import (
    CONFIG,
    INDEX,
    LOSS,
    MODELS,
    SAFETENSORS,
    Weights,
    build,
    build_official,
    listed_files,
    load_safetensors,
    official_config,
    official_state,
    read_config,
    read_safetensors,
    save_official,
    save_official_ckpt,
)

__all__ = [
    "CONFIG",
    "INDEX",
    "SAFETENSORS",
    "Trained",
    "Weights",
    "describe",
    "find_last",
    "fingerprint",
    "listed_files",
    "load",
    "load_denoiser",
    "load_vae_of",
    "locate",
    "one_line",
    "read",
    "read_config",
    "read_discriminator",
    "read_weights",
    "replace",
    "save_official",
    "save_official_ckpt",
    "save_vae",
    "verify",
]

log = logging.getLogger(__name__)

DENOISERS = ("praxino.models.dit.VideoDiT", "praxino.models.unet.UNet3D")
PATHS: dict[str, type[DiffusionPath]] = {
    cls.__name__: cls for cls in (RectifiedFlow, LinearBeta, Cosine, Sigmoid, LinearLogSNR)
}
PREFIX = "net."  # of the model in a LightningModule's state dict
ADVERSARY = "adversary."  # of the discriminator there
NORMALISATION = ("scale", "shift")  # of an official config: they say how latents are used, not what they are


def load(
    path: str | os.PathLike[str],
    weights: Weights = "ema",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> VideoVAE:
    """Rebuild a model, in eval mode, from its checkpoint alone.

    Args:
        path: a praxino checkpoint, a run directory (its newest sound checkpoint is taken), an official directory
            (config.json beside diffusion_pytorch_model.safetensors or a .ckpt), an official .ckpt, or a directory of
            diffusers: of an autoencoder, or of a pipeline with one in `vae`.
        weights: the moving average if there is one, or the raw weights.
        device: where to put the model.
        dtype: of the weights; as stored by default.

    Raises:
        CheckpointError: nothing usable there, or it does not fit.
    """
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights={weights!r} is unknown: use ema or raw.")
    file = locate(path)
    tensors_only = file.suffix == ".safetensors" or file.name == INDEX
    vae = load_safetensors(file) if tensors_only else load_ckpt(file, weights)
    return vae.to(device=device, dtype=dtype).eval()


def pretrained(path: str) -> VideoVAE:
    """Load a model to train it further, as `model.net` of a configuration."""
    vae = load(path).train()
    vae.pretrained = True
    return vae


def locate(path: str | os.PathLike[str]) -> Path:
    """Return the file that `load` reads: a checkpoint, weights, or the index of weights in several files."""
    path = Path(path).expanduser()
    if path.is_file() or shards.is_sharded(path):
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory: give a checkpoint, a run or an official directory.")
    if (path / "vae" / CONFIG).is_file() and not (path / CONFIG).exists():
        path = path / "vae"
    for name in (SAFETENSORS, INDEX):
        if (path / name).is_file():
            return path / name
    if (path / "checkpoints").is_dir():
        last = find_last(path)
        if last is None:
            raise CheckpointError(f"{path / 'checkpoints'}: no sound step-*.ckpt: give another run or checkpoint.")
        return last
    found = sorted(path.glob("*.ckpt"), key=step_of)
    if not found and (pickles := sorted(path.glob("*.bin"))):
        raise CheckpointError(
            f"{pickles[0]}: a pickle, which can run code: give {SAFETENSORS}, as save_pretrained does."
        )
    if not found:
        raise CheckpointError(
            f"{path}: neither a run (checkpoints/step-*.ckpt) nor an official directory ({CONFIG} with {SAFETENSORS} "
            "or a .ckpt): give one of them, or a file."
        )
    if len(found) > 1:
        log.warning("%s: %d checkpoints, the one of the highest step is taken: %s", path, len(found), found[-1].name)
    return found[-1]


def find_last(run: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint of a run that is sound, with one warning for each that is not."""
    for path in sorted(Path(run, "checkpoints").glob("step-*.ckpt"), key=step_of, reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            log.warning("rejected: %s", error)
        else:
            return path
    return None


def step_of(path: Path) -> tuple[int, str]:
    """Sort by the last number in the name."""
    numbers = re.findall(r"\d+", path.stem)
    return (int(numbers[-1]) if numbers else -1, path.name)


def load_ckpt(path: Path, weights: Weights) -> VideoVAE:
    """Load a praxino or an official checkpoint file."""
    content = read(path)
    if "praxino" in content:
        return load_praxino(path, content, weights)
    return build_official(path, official_config(path, content), official_state(path, content, weights))


def load_praxino(path: Path, content: Mapping[str, Any], weights: Weights) -> VideoVAE:
    """Rebuild the video autoencoder that a praxino checkpoint describes."""
    header, name, config, state = described(path, content, weights)
    if header["kind"] != "vae" or name not in MODELS:
        kind = header["kind"]
        raise CheckpointError(f"{path}: holds the {kind} {name}: give a video autoencoder ({', '.join(MODELS)}).")
    vae = build(path, MODELS[name], config, state)
    if (statistics := header["statistics"]) is not None:
        vae.set_statistics(statistics["mean"], statistics["std"])
    return vae


def described(
    path: Path, content: Mapping[str, Any], weights: Weights
) -> tuple[Mapping[str, Any], str, dict[str, Any], dict[str, Tensor]]:
    """Return the "praxino" block of a checkpoint, the class and the arguments of its model, and the weights asked for.

    Raises:
        CheckpointError: it does not say these, or in another format.
    """
    header = content["praxino"]
    try:
        version, name, config = header["format"], header["model"]["class"], dict(header["model"]["config"])
        state = {k.removeprefix(PREFIX): v for k, v in content["state_dict"].items() if k.startswith(PREFIX)}
        ema = (content.get("ema") or {}).get("weights")
        header["kind"], header["statistics"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its description is not readable ({one_line(error)}): give another one."
        ) from error
    if version != FORMAT:
        raise CheckpointError(f"{path}: format {version}, this version reads {FORMAT}: use the praxino that wrote it.")
    if weights == "ema" and not ema and "ema" not in content:
        log.info("%s: no moving average, the raw weights are taken", path)
    return header, name, config, ema if weights == "ema" and ema else state


@dataclass(frozen=True)
class Trained:
    """What a checkpoint says of a denoiser beside its weights.

    Args:
        file: the checkpoint.
        path, prediction, per_frame: of the diffusion that it was trained with; whether frames had noise levels apart.
        conditioning: `drop`, the probability with which label and text were dropped, and `context`: `probability`,
            `frames` (latents) and `noise`.
        shape: of the latents trained on, `(C, T, H, W)`.
        fps: frames a second of the clips behind them; None where it is not known.
        statistics: mean and deviation per channel by which these were normalised; None: the VAE's own.
        vae: of the autoencoder: `fingerprint`, `path` relative to the run, `absolute`, `stride`; {} without one.
        step: of the training.
        config: of the run, resolved; None where it was not kept.
        classes: the names of the labels; None where they have none.
    """

    file: Path
    path: DiffusionPath
    prediction: Any
    per_frame: bool
    conditioning: dict[str, Any]
    shape: tuple[int, ...]
    fps: float | None
    statistics: dict[str, Any] | None
    vae: dict[str, Any]
    step: int
    config: dict[str, Any] | None
    classes: list[str] | None


def load_denoiser(
    path: str | os.PathLike[str],
    weights: Weights = "ema",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Denoiser, Trained]:
    """Rebuild a denoiser, in eval mode, and what it was trained with, from a checkpoint or a run directory.

    Raises:
        CheckpointError: no denoiser there.
    """
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights={weights!r} is unknown: use ema or raw.")
    file = locate(path)
    content = read(file) if file.suffix != ".safetensors" and file.name != INDEX else {}
    if "praxino" not in content:
        raise CheckpointError(f"{file}: holds no denoiser of praxino: give a run of a denoiser or a checkpoint of one.")
    header, name, config, state = described(file, content, weights)
    if header["kind"] != "denoiser" or name not in DENOISERS:
        raise CheckpointError(f"{file}: holds the {header['kind']} {name}: give a denoiser ({', '.join(DENOISERS)}).")
    module, _, attribute = name.rpartition(".")
    try:
        with torch.device("meta"):
            net: Denoiser = getattr(import_module(module), attribute)(**config)
        net.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
        diffusion = header["diffusion"]
        trained = Trained(
            file=file,
            path=PATHS[diffusion["path"]["class"]](**diffusion["path"]["config"]),
            prediction=diffusion["prediction"],
            per_frame=bool(diffusion["per_frame"]),
            conditioning=dict(header["conditioning"]),
            shape=tuple(header["shape"]),
            fps=header.get("fps"),
            statistics=header["statistics"],
            vae=dict(header["vae"]),
            step=int(header["step"]),
            config=header["config"],
            classes=header.get("classes"),
        )
    except (PraxinoError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{file}: its description does not fit {attribute}: {one_line(error)}") from error
    return net.to(device=device, dtype=dtype).eval(), trained


def load_vae_of(
    trained: Trained,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    path: str | os.PathLike[str] | None = None,
) -> VideoVAE:
    """Load the VAE of a denoiser, normalising as in its training: the run's own copy, or where it lay then.

    Args:
        path: another place of the same VAE.

    Raises:
        CheckpointError: it is not there, or it is another one.
    """
    run = trained.file.absolute().parent.parent
    places = [Path(path)] if path is not None else []
    if path is None and trained.vae:
        places = [run / trained.vae["path"], Path(trained.vae["absolute"])]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        tried = " and ".join(map(str, places)) or "none is named"
        raise CheckpointError(f"{trained.file}: its VAE is not there ({tried}): say where it is, e.g. vae=PATH.")
    vae = load(found, device=device, dtype=dtype)
    if trained.vae and fingerprint(load(found) if dtype is not None else vae) != trained.vae["fingerprint"]:
        raise CheckpointError(f"{found}: another VAE than the one that {trained.file} was trained with: give that one.")
    if trained.statistics is not None:
        vae.set_statistics(trained.statistics["mean"], trained.statistics["std"])
    return vae


def fingerprint(vae: VideoVAE) -> str:
    """Return the SHA-256 of class, configuration and weights: of what decides the latents, whoever stored it where.

    Statistics are not part of it: storing them does not make another VAE.
    """
    config = {key: value for key, value in vae.config.items() if key not in NORMALISATION}
    digest = hashlib.sha256(json.dumps([type(vae).__name__, config], sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_vae(vae: VideoVAE, path: Path) -> None:
    """Write a VAE of any kind, as it is, as a praxino checkpoint without anything of a training."""
    state = {f"{PREFIX}{key}": value.detach().cpu().clone() for key, value in vae.state_dict().items()}
    content = {"praxino": {**describe(vae), "config": None, "step": 0}, "state_dict": state, "ema": None}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        verify(temporary)

    replace(path, write)


def read_weights(path: str | os.PathLike[str], weights: Weights = "ema") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors of a model that need not be known here, and the config.json beside them ({} without one)."""
    path = locate(path)
    config = read_config(path.with_name(CONFIG)) if path.with_name(CONFIG).is_file() else {}
    if path.suffix == ".safetensors" or path.name == INDEX:
        return read_safetensors(path), config
    state = official_state(path, read(path), weights)
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}, config


def read_discriminator(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], int]:
    """Return the discriminator in a checkpoint under its official names, empty without one, and the step."""
    path = locate(path)
    if path.suffix == ".safetensors" or path.name == INDEX:
        return {}, 0
    content = read(path)
    header, state = (part if isinstance(part, Mapping) else {} for part in map(content.get, ("praxino", "state_dict")))
    steps = (header.get("step"), content.get("current_step"), content.get("global_step"))
    places = ((state.get("dics_model"), ""), (state, ADVERSARY), (state, LOSS))
    found = {
        str(key).removeprefix(prefix): tensor.clone()
        for tensors, prefix in places
        if isinstance(tensors, Mapping)
        for key, tensor in tensors.items()
        if str(key).startswith(f"{prefix}discriminator.") and isinstance(tensor, Tensor)
    }
    return found, next((step for step in steps if isinstance(step, int)), 0)
