"""praxino: causal video autoencoders and denoisers of their latents, trained by Lightning and composed by Hydra."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "load": "praxino.checkpoint",
    "VideoVAE": "praxino.models.vae",
    "VideoDiT": "praxino.models.dit",
    "stream": None,
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line answers `--help` without torch."""
    if name not in _LAZY:
        raise AttributeError(f"module 'praxino' has no attribute {name!r}")
    module = _LAZY[name]
    return import_module(f"praxino.{name}") if module is None else getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
