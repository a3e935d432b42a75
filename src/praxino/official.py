"""The official layouts of video autoencoders, in and out: Open-Sora-Plan's checkpoints and those of diffusers."""

import difflib
import inspect
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from praxino.archive import one_line, replace
from praxino.errors import CheckpointError, PraxinoError
from praxino.models.causalvae import CausalVAE
from praxino.models.foreign import FAMILIES, ForeignVAE, find_class, rename
from praxino.models.identity import IdentityVAE
from praxino.models.vae import VideoVAE
from praxino.models.wfvae import WFVAE

log = logging.getLogger(__name__)

Weights = Literal["ema", "raw"]
MODELS: dict[str, type[VideoVAE]] = {
    f"{cls.__module__}.{cls.__qualname__}": cls for cls in (WFVAE, CausalVAE, ForeignVAE, IdentityVAE)
}
OFFICIAL = {cls.official_name: cls for cls in (WFVAE, CausalVAE)}
CONFIG, SAFETENSORS = "config.json", "diffusion_pytorch_model.safetensors"
INDEX = f"{SAFETENSORS}.index.json"  # of weights in several files
LOSS = "loss."  # of LPIPS and the discriminator in those of Open-Sora-Plan v1.0 and v1.1


def load_safetensors(path: Path) -> VideoVAE:
    """Load official weights, or the index of several files of them, beside their config.json."""
    return build_official(path, read_config(path.parent / CONFIG), read_safetensors(path))


def official_config(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json beside an official checkpoint, or else what Lightning stored of it in the file."""
    stored = content.get("hyper_parameters")
    beside = path.parent / CONFIG
    return dict(stored) if isinstance(stored, Mapping) and stored and not beside.exists() else read_config(beside)


def official_state(path: Path, content: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """Pick the weights out of an official checkpoint: moving average, else the model, else a bare state dict."""
    state = content.get("state_dict", content)
    candidates = [state.get("gen_model"), state] if isinstance(state, Mapping) else []
    if weights == "ema":
        candidates.insert(0, content.get("ema_state_dict"))
        if not candidates[0]:
            log.info("%s: no moving average, the raw weights are taken", path)
    for candidate in candidates:
        if isinstance(candidate, Mapping) and candidate:
            named = {str(key).removeprefix("module."): value for key, value in candidate.items()}
            kept = {key: value for key, value in named.items() if not key.startswith(LOSS)}
            if len(kept) < len(named):
                log.info("%s: %d tensors of its loss are left out", path, len(named) - len(kept))
            return kept
    raise CheckpointError(f"{path}: no weights (ema_state_dict, state_dict.gen_model, state_dict): give another file.")


def read_safetensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a file, or of all the files that an index names."""
    state: dict[str, Any] = {}
    for file in [path] if path.name != INDEX else listed_files(path):
        try:
            state |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: not readable as safetensors ({one_line(error)}): copy it again.") from error
    return state


def listed_files(index: Path) -> list[Path]:
    """Return the files that an index of weights names, all of them beside it."""
    names = read_config(index).get("weight_map")
    names = sorted({str(name) for name in names.values()}) if isinstance(names, Mapping) else []
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: names no files beside it in its weight_map: copy it again.")
    return [index.with_name(name) for name in names]


def read_config(path: Path) -> dict[str, Any]:
    """Read an official config.json."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing: put the official {CONFIG} beside the weights.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({one_line(error)}): copy it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no JSON object: put the official {CONFIG} there.")
    return config


def build_official(path: Path, config: dict[str, Any], state: dict[str, Any]) -> VideoVAE:
    """Build the model that an official config names."""
    name = str(config.get("_class_name") or guess_class(config))
    if name in FAMILIES:
        return build_foreign(path, name, config, state)
    if name not in OFFICIAL:
        raise CheckpointError(f"{path}: holds a {name}: give one of {', '.join([*OFFICIAL, *FAMILIES])}.")
    vae = build(path, OFFICIAL[name], config, state)
    spread_scale(path, vae)
    return vae


def spread_scale(path: Path, vae: VideoVAE) -> None:
    """Take an official scale and shift of another length for all channels where their entries are all alike.

    The file's own stay in `config`, to be written back as they are.
    """
    scale, shift, channels = vae.config["scale"], vae.config["shift"], vae.latent_channels
    if len(scale) == len(shift) == channels:
        return
    alike = all(
        values and isinstance(values[0], int | float) and values.count(values[0]) == len(values)
        for values in (scale, shift)
    )
    alike = alike and scale[0] != 0
    log.warning(
        "%s: scale and shift have %d and %d entries for %d latent channels: %s; praxino-encode measures them",
        path,
        len(scale),
        len(shift),
        channels,
        "all alike, they are taken for every channel" if alike else "latents cannot be normalised",
    )
    if alike:
        vae.set_statistics([shift[0]] * channels, [1 / scale[0]] * channels)


def build_foreign(path: Path, name: str, config: dict[str, Any], state: dict[str, Any]) -> VideoVAE:
    """Build a model of diffusers; what its class does not know of the config is left out, as diffusers does."""
    taken = inspect.signature(find_class(name)).parameters
    options = {key: value for key, value in config.items() if key in taken}
    own = {key: value for key, value in config.items() if key.startswith("_")}
    if unknown := config.keys() - options.keys() - own.keys():
        log.warning("%s: %s does not know %s, which is left out", path, name, ", ".join(sorted(unknown)))
    return build(path, ForeignVAE, {**own, "class_name": name, "options": options}, rename(state))


def guess_class(config: dict[str, Any]) -> str:
    """Return the official name of the first model that takes all keys of a config without a class."""
    for name, cls in OFFICIAL.items():
        if {key for key in config if key[:1] != "_"} <= {*inspect.signature(cls).parameters, *cls.unused_keys}:
            return name
    return WFVAE.official_name


def build(path: Path, cls: type[VideoVAE], config: dict[str, Any], state: dict[str, Any]) -> VideoVAE:
    """Construct a model and give it exactly these weights; the fixed filters may be missing, but not differ."""
    extra = {key: value for key, value in config.items() if key.startswith("_") or key in cls.unused_keys}
    known = {key: value for key, value in config.items() if key not in extra}
    names = list(inspect.signature(cls).parameters)
    for key in known:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"{cls.__name__} takes {', '.join(names)}."
            raise CheckpointError(f"{path}: config key {key!r} is unknown: {hint}")
    if cls is ForeignVAE:
        find_class(str(known.get("class_name")))  # which may say that diffusers is missing
    try:
        with torch.device("meta"):
            vae = cls(**known)
    except (PraxinoError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its config does not fit {cls.__name__}: {one_line(error)}") from error
    filters = vae.fixed_filters()
    if not any(key in state for key in filters):
        state = {**filters, **state}
    compare(path, vae, state)
    for key, taps in filters.items():
        if not torch.allclose(state[key].float(), taps, atol=2e-3):
            raise CheckpointError(f"{path}: {key} is not the Haar filter: only fixed wavelets are supported.")
    vae.load_state_dict({key: value.clone().contiguous() for key, value in state.items()}, assign=True)
    vae.extra = extra
    return vae


def compare(path: Path, vae: VideoVAE, state: dict[str, Any]) -> None:
    """Raise CheckpointError, with the keys, unless names and shapes are exactly the model's."""
    own = vae.state_dict()
    missing = [key for key in own if key not in state]
    surplus = [key for key in state if key not in own]
    shapes = {key: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for key, v in state.items()}
    wrong = [
        f"{key} {shapes[key]}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and shapes[key] != tuple(own[key].shape)
    ]
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
        for what, keys in (("missing", missing), ("unexpected", surplus), ("of another shape", wrong))
        if keys
    ]
    if parts:
        raise CheckpointError(
            f"{path}: the weights do not fit {type(vae).__name__}: {'; '.join(parts)}. Use the config they came with."
        )


def save_official(vae: VideoVAE, directory: str | os.PathLike[str]) -> Path:
    """Write config.json and diffusion_pytorch_model.safetensors as the official code does; return the directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_config(vae, directory)
    state = official_weights(vae, vae.state_dict())
    replace(directory / SAFETENSORS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    return directory


def save_official_ckpt(
    vae: VideoVAE,
    path: str | os.PathLike[str],
    ema: VideoVAE | None = None,
    step: int = 0,
    discriminator: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write an official training checkpoint (without optimizers) and config.json beside it.

    The discriminator has its official names, as `read_discriminator` returns it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_config(vae, path.parent)
    averaged = {} if ema is None else official_weights(ema, dict(ema.named_parameters()), "module.")
    content = {
        "epoch": 0,
        "current_step": step,
        "optimizer_state": {},
        "state_dict": {
            "gen_model": official_weights(vae, vae.state_dict()),
            "dics_model": dict(discriminator or {}),
        },
        "ema_state_dict": averaged,
        "scaler_state": {},
        "sampler_state": {},
    }
    replace(path, lambda temporary: torch.save(content, temporary))
    return path


def official_weights(vae: VideoVAE, tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return tensors of a model under their official names."""
    own = vae.official_prefix
    return {prefix + key.removeprefix(own): value.detach().cpu().contiguous() for key, value in tensors.items()}


def write_config(vae: VideoVAE, directory: Path) -> None:
    """Write the official config.json."""
    text = json.dumps(vae.official_config(), indent=2, sort_keys=True) + "\n"
    replace(directory / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
