"""What a checkpoint says of a network: enough to build it again."""

from typing import Any

from torch import nn

from praxino import __version__
from praxino.errors import ConfigError

FORMAT = 1  # of the "praxino" block in a checkpoint


def header(kind: str, net: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """Return the head of the "praxino" block: the class and the constructor's arguments as plain data."""
    cls = type(net)
    model = {"class": f"{cls.__module__}.{cls.__qualname__}", "config": config}
    return {"format": FORMAT, "version": __version__, "kind": kind, "model": model}


def check_counts(config: dict[str, Any], *keys: str) -> None:
    """Raise ConfigError for a count below 1."""
    for key in keys:
        if config[key] is not None and config[key] < 1:
            raise ConfigError(f"{key}={config[key]} does not fit: use 1 or more.")
