"""Open a denoiser with the settings by which it draws, and check these against what it was trained for."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch
from torch import Tensor

from praxino import checkpoint
from praxino.checkpoint import Trained
from praxino.data.latents import read_text
from praxino.diffusion.solve import Sampler, Solver
from praxino.errors import ConfigError
from praxino.models.denoiser import Denoiser
from praxino.models.vae import VideoVAE
from praxino.tasks.common import at_least
from praxino.tasks.generation.generate import Generator, Rollout, latents_of
from praxino.tasks.generation.guided import Guidance


@dataclass(frozen=True)
class Settings:
    """How to draw from a denoiser: what `praxino.tasks.sample.sample` and `predict` have in common, explained there."""

    ckpt: str
    vae: str | None
    weights: Literal["ema", "raw"]
    sampler: Sampler
    steps: int
    shift: float
    context_noise: float
    guidance: float
    guidance_interval: list[float]
    guidance_rescale: float
    rollout: Rollout
    window: int | None  # in video frames, as overlap
    overlap: int | None
    label: int | str | Sequence[int | str] | None
    text: str | None
    batch: int

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> Self:
        """Take the settings out of a task's arguments, as JSON can hold them."""
        values: dict[str, Any] = {field.name: arguments[field.name] for field in fields(cls)}
        interval = list(values.pop("guidance_interval"))
        return cls(**values, guidance_interval=interval)

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, batch=self.batch)
        interval = self.guidance_interval
        if not 0 <= self.guidance < math.inf:
            raise ConfigError(f"guidance={self.guidance}: use 0 (no condition), 1 (none stressed) or more, e.g. 3")
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ConfigError(f"guidance_interval={interval}: use two times in [0, 1], e.g. [0, 0.8]")
        if not 0 <= self.guidance_rescale <= 1:
            raise ConfigError(f"guidance_rescale={self.guidance_rescale}: use a part of the way, 0 to 1, e.g. 0.7")


def is_denoiser(path: str) -> bool:
    """Tell whether a checkpoint holds a denoiser; anything else is left to `praxino.load`."""
    file = checkpoint.locate(path)
    if file.suffix in (".safetensors", ".json"):
        return False
    header = checkpoint.read(file).get("praxino")
    return isinstance(header, Mapping) and header.get("kind") == "denoiser"


def open_generator(settings: Settings, device: torch.device) -> Generator:
    """Load a denoiser and its VAE; raises ConfigError for settings that do not fit them."""
    net, trained = checkpoint.load_denoiser(settings.ckpt, weights=settings.weights, device=device)
    vae = checkpoint.load_vae_of(trained, device=device, path=settings.vae)
    steps, shift, context_noise = settings.steps, settings.shift, settings.context_noise
    try:
        solver = Solver(trained.path, trained.prediction, settings.sampler, steps, shift, context_noise)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    window = trained.shape[1] if settings.window is None else latents_of(vae, settings.window, "window")
    low, high = settings.guidance_interval
    return Generator(
        net,
        trained,
        vae,
        solver,
        Guidance(settings.guidance, (low, high), settings.guidance_rescale),
        settings.rollout,
        window,
        overlap_of(trained, vae, window, settings.overlap),
        labels_of(net, trained, settings.label),
        text_of(net, settings.text),
        settings.batch,
    )


def overlap_of(trained: Trained, vae: VideoVAE, window: int, overlap: int | None) -> int:
    """Return the overlap of windows in latent frames: by default the longest context that the model was trained on."""
    if overlap is None:
        context = trained.conditioning["context"]
        usable = [k for k in context["frames"] if k < window] if context["probability"] else []
        return max(usable, default=max(1, window // 2))
    if overlap < 1 or overlap % vae.stride[0]:
        raise ConfigError(f"overlap={overlap} does not fit: use a multiple of {vae.stride[0]} frames")
    return overlap // vae.stride[0]


def labels_of(net: Denoiser, trained: Trained, label: int | str | Sequence[int | str] | None) -> tuple[int, ...] | None:
    """Return classes by name, or by number where no name is one, as numbers."""
    if label is None:
        return None
    if net.classes is None:
        raise ConfigError(f"label={label}: the model takes no label: leave it out")
    names, found = trained.classes or [], []
    numbers = range(0 if any(name.replace("_", "").isdecimal() for name in names) else net.classes)
    for item in label if isinstance(label, list | tuple) else [label]:
        meant = type(item) in (int, str)  # a name without quotes may be a truth value or a fraction
        if meant and str(item) in names:
            found.append(names.index(str(item)))
        elif meant and isinstance(item, int) and item in numbers:
            found.append(item)
        else:
            word = item if meant else json.dumps(item)
            known = [f"0 to {net.classes - 1}"] if numbers else []
            known += [f"a name: {', '.join(names[:20])}"] if names else []
            quotes = "" if meant or not names else f"; a name that reads as another value in quotes: label='\"{word}\"'"
            raise ConfigError(f"label={word} is no class of the model: use {' or '.join(known)}{quotes}")
    if not found:
        raise ConfigError("label=[]: give at least one class")
    return tuple(found)


def text_of(net: Denoiser, path: str | None) -> Tensor | None:
    """Return the embedded words `(L, E)` of a file of praxino-embed-text."""
    if path is None:
        return None
    if net.text_width is None:
        raise ConfigError(f"text={path}: the model takes no text: leave it out")
    words = read_text(path)
    if words.shape[1] != net.text_width:
        raise ConfigError(f"text={path} has shape {tuple(words.shape)}: the model takes (words, {net.text_width})")
    return words
