"""Convert: official files of any VAE, of halves of two, of a wider one, or of one for pictures made causal in time."""

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from praxino import checkpoint
from praxino.checkpoint import Weights
from praxino.config import check_call, report, signature_errors
from praxino.convert import Half, Inflation, expand, inflate, merge
from praxino.errors import ConfigError
from praxino.models.causalvae import CausalVAE
from praxino.models.vae import VideoVAE
from praxino.models.wfvae import WFVAE
from praxino.tasks.common import at_least
from praxino.tasks.rundir import make_directory

log = logging.getLogger(__name__)

# what `latent_dim` and `base_channels` are called in each model that can grow
SIZES: dict[type[VideoVAE], dict[str, tuple[str, ...]]] = {
    WFVAE: {"latent_dim": ("latent_dim",), "base_channels": ("base_channels",)},
    CausalVAE: {"latent_dim": ("z_channels", "embed_dim"), "base_channels": ("hidden_size",)},
}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `convert` and call it."""
    return convert(**check_call(convert, cfg))


def convert(
    vae: str,
    out: str,
    to: Literal["official", "ckpt"] = "official",
    weights: Weights = "ema",
    encoder: str | None = None,
    decoder: str | None = None,
    inflate: Inflation | None = None,
    latent_dim: int | None = None,
    base_channels: int | None = None,
    config: str | None = None,
    net: dict[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a VAE as official files, changed on the way as asked for: inflated, merged, then grown.

    Measured statistics of the latents become `scale` and `shift`: the official files have no other place for them, and
    without them the latents would be normalised wrongly.

    Args:
        vae: what `checkpoint.load` takes; with `inflate` a 2D autoencoder of diffusers or latent diffusion.
        out: a directory without a model in it.
        to: config.json with safetensors, or with a training checkpoint that holds raw weights, average, discriminator.
        weights: the moving average if there is one, or the raw weights.
        encoder: the encoder is taken from this model of the same architecture.
        decoder: the decoder is.
        inflate: where the 2D kernels go in time; `net` or `config` has the layout of the CausalVAE to be made.
        latent_dim: grow the latents to so many channels.
        base_channels: grow all widths by this one.
        config: an official config.json with the constructor arguments of the model to be made.
        net: constructor arguments, too; they win.
        seed: of what is drawn for new channels.
    """
    at_least(1, latent_dim=latent_dim, base_channels=base_channels)
    if inflate and (latent_dim or base_channels):
        raise ConfigError("inflate: the sizes come from the 2D autoencoder: grow in a second step")
    target = arguments(config, net)
    if inflate and not target:
        raise ConfigError("inflate: a layout is required, e.g. model/net@net=causalvae_v12 (OD-VAE), or config=PATH")
    directory = make_directory(out)
    if taken := [path.name for path in directory.iterdir() if path.suffix in (".ckpt", ".safetensors", ".json")]:
        raise ConfigError(f"out={out} holds {sorted(taken)[0]}: give a directory without a model")

    def build(kind: Weights) -> tuple[VideoVAE, list[str]]:
        fresh: list[str] = []
        model, fresh = make_causal(vae, kind, target, inflate) if inflate else (checkpoint.load(vae, kind), fresh)
        halves: tuple[tuple[Half, str | None], ...] = (("encoder", encoder), ("decoder", decoder))
        for half, path in halves:
            if path:
                model = merge(model, checkpoint.load(path, kind), half)
        if not inflate and (latent_dim or base_channels or target):
            model, fresh = make_wider(model, target, latent_dim, base_channels, seed)
        bake_statistics(model)
        return model, fresh

    model, fresh = build(weights)
    if fresh:
        log.info("%d tensors without an origin: %s", len(fresh), ", ".join(fresh))
    if to == "official":
        path = checkpoint.save_official(model, directory)
    else:
        path = save_ckpt(model, build("raw")[0] if weights == "ema" else model, directory, vae)
    size = sum(tensor.numel() for tensor in model.parameters())
    log.info("%s of %.1fM parameters, stride %s: %s", model.official_name, size / 1e6, model.stride, path)
    return {"out": str(path), "class": model.official_name, "parameters": size, "fresh": fresh}


def arguments(config: str | None, net: dict[str, Any] | None) -> dict[str, Any]:
    """Return the constructor arguments in an official config.json and in `net`, with the class that either names."""
    found: dict[str, Any] = {}
    if config:
        try:
            found = json.loads(Path(config).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"config={config} is not readable as JSON: {checkpoint.one_line(error)}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"config={config} holds no JSON object: give an official config.json")
    return {**found, **(net or {})}


def check_target(cls: type[VideoVAE], target: dict[str, Any]) -> dict[str, Any]:
    """Compare constructor arguments with the class; return them alone."""
    for key, name in (("_class_name", cls.official_name), ("_target_", f"{cls.__module__}.{cls.__qualname__}")):
        if target.get(key, name) != name:
            raise ConfigError(f"{target[key]} cannot be made of this model: give a config of {cls.__name__}")
    known = {key: v for key, v in target.items() if key[:1] != "_" and key not in cls.unused_keys}
    report(list(signature_errors(cls, OmegaConf.create(known), "net", partial=True)))
    return known


def make_causal(path: str, weights: Weights, target: dict[str, Any], how: Inflation) -> tuple[VideoVAE, list[str]]:
    """Inflate the 2D autoencoder of a path."""
    return inflate(*checkpoint.read_weights(path, weights), check_target(CausalVAE, target), how)


def make_wider(
    model: VideoVAE, target: dict[str, Any], latent_dim: int | None, base_channels: int | None, seed: int
) -> tuple[VideoVAE, list[str]]:
    """Grow a model to the sizes asked for."""
    cls = type(model)
    if cls not in SIZES:
        raise ConfigError(f"a {model.official_name} cannot grow: give a {' or '.join(c.__name__ for c in SIZES)}")
    sizes = {"latent_dim": latent_dim, "base_channels": base_channels}
    changes = {name: size for key, size in sizes.items() if size for name in SIZES[cls][key]}
    wide, fresh = expand(model, {**check_target(cls, target), **changes}, seed)
    if wide.latent_channels != model.latent_channels:
        log.warning("scale and shift are of %d latent channels: measure the new ones", model.latent_channels)
    return wide, fresh


def bake_statistics(model: VideoVAE) -> None:
    """Put measured statistics of the latents into the config, where the class has a place for them."""
    if model.statistics is None:
        return
    if not {"scale", "shift"} <= model.config.keys():
        log.warning("the measured statistics of the latents have no place in %s: left out", model.official_name)
        return
    mean, std = model.statistics["mean"], model.statistics["std"]
    inverse = {1 / scale for scale in model.config["scale"] if scale}
    if len({*mean, *model.config["shift"]}) == len({*std} | inverse) == 1:
        return  # they are the config's own
    model.config |= {"scale": [1 / value for value in std], "shift": list(mean)}


def save_ckpt(model: VideoVAE, raw: VideoVAE, directory: Path, source: str) -> Path:
    """Write a training checkpoint with raw weights, the average if it differs, and the discriminator if any."""
    discriminator: dict[str, Tensor]
    discriminator, step = checkpoint.read_discriminator(source)
    average = raw.state_dict()
    differs = any(not torch.equal(tensor, average[key]) for key, tensor in model.state_dict().items())
    if not discriminator:
        log.info("no discriminator in %s", source)
    path = directory / f"checkpoint-{step}.ckpt"
    return checkpoint.save_official_ckpt(raw, path, model if differs else None, step, discriminator)
