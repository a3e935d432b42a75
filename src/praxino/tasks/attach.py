"""What the training of a denoiser needs of the autoencoder whose latents it learns."""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from praxino import checkpoint
from praxino.data.latents import read_manifest, read_text, text_file
from praxino.errors import ConfigError
from praxino.lit.base import StepModule
from praxino.lit.dit import DiTModule
from praxino.models.denoiser import Denoiser
from praxino.models.vae import VideoVAE

log = logging.getLogger(__name__)

OWN = "vae.ckpt"  # the copy in a run directory, which makes the run whole


def find_vae(cfg: DictConfig, out: Path | None = None) -> str | None:
    """Return where the VAE lies: in a run that goes on, at model.vae, or beside the latents; None: nowhere."""
    given = cfg.model.get("vae")
    if isinstance(given, DictConfig):
        return None
    if out is not None and cfg.get("ckpt") is not None and (out / OWN).is_file():
        if given is not None:
            log.warning("model.vae=%s is not read: a run goes on with its own copy, %s", given, out / OWN)
        return str(out / OWN)
    if given is not None:
        return str(given)
    root = Path(str(cfg.data.get("root"))).expanduser()
    return next((str(root / name) for name in (OWN, "vae") if is_latents(cfg) and (root / name).exists()), None)


def is_latents(cfg: DictConfig) -> bool:
    """Tell whether the data are cached latents."""
    return str(cfg.data.get("_target_", "")).endswith(".LatentData")


def fill_in(cfg: DictConfig) -> None:
    """Set `model.net.channels`, where it is null, to the channels of the latents."""
    net = cfg.model.get("net")
    if net is None or "channels" not in net or OmegaConf.is_missing(net, "channels") or net.channels is not None:
        return
    if is_latents(cfg) and not OmegaConf.is_missing(cfg.data, "root"):
        net.channels = read_manifest(cfg.data.root).channels
    elif (path := find_vae(cfg)) is not None:
        net.channels = checkpoint.load(path).latent_channels
    else:
        raise ConfigError("model.vae: a value is required, e.g. model.vae=PATH: the VAE whose latents are learned")


def attach(model: StepModule, cfg: DictConfig, out: Path) -> None:
    """Give a denoiser's training its VAE, and what its checkpoints say of it."""
    if not isinstance(model, DiTModule):
        return
    check_text(model.net, cfg)
    vae: VideoVAE | None = model.__dict__["vae"]
    path = find_vae(cfg, out)
    if vae is None and path is None:
        log.warning("no VAE (model.vae=PATH): nothing will be decoded, and the run does not hold what sampling needs")
        return
    if vae is None:
        assert path is not None
        vae = checkpoint.load(path)
    reference: dict[str, Any] = {
        "fingerprint": checkpoint.fingerprint(vae),
        "path": OWN,
        "absolute": str(Path(path).expanduser().absolute()) if path is not None else str(out / OWN),
        "class": type(vae).__name__,
        "stride": list(vae.stride),
        "frame_rule": list(vae.frame_rule),
        "channels": vae.latent_channels,
    }
    model.attach(vae, reference)


def check_text(net: Denoiser, cfg: DictConfig) -> None:
    """Raise ConfigError unless the data have texts of the width that a network takes, or neither has to do with any."""
    name, width, text = type(net).__name__, net.text_width, cfg.data.get("text")
    if text is None:
        if width is not None:
            remedy = "give data.text=DIR" if is_latents(cfg) else "texts need data=latents"
            raise ConfigError(f"model.net.text_width={width}: the data have no texts: {remedy}, or leave it out")
        return
    clip = read_manifest(cfg.data.root).clips[0].path
    file = text_file(str(Path(text).expanduser()), clip)
    if not Path(file).is_file():
        raise ConfigError(f"data.text={text} holds no embedded text of {clip!a}: praxino-embed-text makes them")
    if "text_width" not in net.config:
        raise ConfigError(f"data.text={text}: {name} takes no text: leave it out, or use a DiT, e.g. model/net=dit_s")
    if width != (found := read_text(file).shape[1]):
        raise ConfigError(
            f"data.text={text} is of width {found}, model.net takes {width}: use model.net.text_width={found}"
        )


def keep_vae(model: StepModule, out: Path) -> None:
    """Copy the VAE into the run, with the statistics by which its latents are normalised."""
    vae: VideoVAE | None = model.__dict__.get("vae")
    if vae is not None and not (out / OWN).exists():
        checkpoint.save_vae(vae, out / OWN)
