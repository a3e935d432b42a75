"""The run directory: where it may lie, what describes the run in it, and its log."""

import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from praxino.config import redacted
from praxino.errors import ConfigError, StorageError
from praxino.tasks.rows import write_atomic

PACKAGES = ("praxino", "torch", "lightning", "hydra-core", "torchmetrics", "lpips", "torchvision", "av", "numpy")


def versions(device: torch.device | None = None) -> dict[str, Any]:
    """Return what a result depends on: libraries, interpreter, machine, and the device (None: any that is there)."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    kind = device.type if device else "cuda" if torch.cuda.is_available() else "cpu"
    found["device"] = torch.cuda.get_device_name(device) if kind == "cuda" else kind
    found["threads"] = torch.get_num_threads()
    return found


def make_directory(path: str | Path) -> Path:
    """Create the output directory and make sure that it can be written to."""
    out = Path(path).expanduser().absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(f"out={out} cannot be written: {error.strerror}") from error
    return out


def check_outside(out: str | Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Raise ConfigError where `out` lies in a tree that is read: what is written there would be an input next time.

    Args:
        inputs: directories by the keys that named them.
    """
    target = Path(out).expanduser().resolve()
    for key, path in inputs.items():
        if path is not None and Path(path).expanduser().resolve() in (target, *target.parents):
            raise ConfigError(f"out={out} lies inside {key}={path}: choose a folder outside of it")


def describe_run(cfg: DictConfig, out: Path, overrides: Iterable[str]) -> None:
    """Write config, overrides and versions into the run directory, without secrets, and keep the log beside them."""
    write_atomic(out / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(redacted(OmegaConf.to_container(cfg)))))
    write_atomic(out / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(redacted(list(overrides)))))
    write_atomic(out / "versions.json", json.dumps(versions(), indent=2) + "\n")
    keep_log(out / "log.txt")


def keep_log(path: Path) -> None:
    """Append everything that is logged to a file, and no longer to that of the run before (in a sweep)."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if h.name == "praxino run"]:
        root.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.name = "praxino run"
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(handler)
