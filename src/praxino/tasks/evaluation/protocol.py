"""Protocols: the named settings of an evaluation, what was changed of them, and settings that it would not heed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from praxino import checkpoint
from praxino.config import conf_dir, nearest, plain
from praxino.errors import ConfigError
from praxino.models.vae import VideoVAE

Mode = Literal["reconstruction", "trees", "sets", "samples", "predictions"]

# What a number depends on. Detectors are left out: they add a figure, and are named beside it.
KEYS = [
    "metrics",
    "window",
    "lpips",
    "fvd",
    "fid",
    "frames",
    "stride",
    "fps",
    "size",
    "short",
    "where",
    "seed",
    "limit",
]
KEYS += ["weights", "precision"]
FILES = frozenset({"fvd.detector", "fvd.sha256", "fid.detector", "fid.sha256", "lpips.sha256"})

NATIVE = "native"  # the protocol of all frames at their size, which trees always have
UNUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "trees": (
        ("frames", "stride", "fps", "size", "short", "where", "batch"),
        "two trees are compared by all frames, as they decode",
    ),
    "samples": (("frames", "size"), "both sets are read as samples are: use generate.frames and generate.size"),
    "predictions": (
        ("frames", "fps", "size", "short", "where", "batch"),
        "videos are read as the denoiser does: use generate.frames, generate.size and the like",
    ),
    "whole": (("short", "where"), "frames=null measures whole videos"),
}


def changes(protocol: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the name of a protocol of conf/protocol, and which settings are neither its own nor the defaults."""
    if protocol is None:
        return {}
    files = {path.stem: path for path in (Path(conf_dir()) / "protocol").glob("*.yaml")}
    if protocol not in files:
        raise ConfigError(f"protocol={protocol}: no such choice{nearest(protocol, files)}")
    base = defaults()
    wanted = plain(OmegaConf.merge(base, OmegaConf.load(files[protocol])))
    nested = {key for key, value in base.items() if isinstance(value, dict)}
    chosen = {key: {**base[key], **(value or {})} if key in nested else value for key, value in given.items()}
    return {"name": protocol, "changed": sorted({*differences(wanted, chosen)} - FILES)}


def defaults() -> dict[str, Any]:
    """Return the settings of conf/evaluate.yaml that a number depends on."""
    found: dict[str, Any] = plain(OmegaConf.masked_copy(OmegaConf.load(Path(conf_dir()) / "evaluate.yaml"), KEYS))  # type: ignore[arg-type]
    return found


def differences(wanted: Mapping[str, Any], given: Mapping[str, Any], path: str = "") -> list[str]:
    """Return the keys of the first tree that have another value in the second one."""
    found = []
    for key, value in wanted.items():
        other = given.get(key)
        if isinstance(value, dict):
            found += differences(value, other or {}, f"{path}{key}.")
        elif (list(other) if isinstance(other, tuple) else other) != value:
            found.append(path + key)
    return found


def check_heeded(mode: Mode, protocol: str | None, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a protocol, or for settings of the clips, that this kind of evaluation would not heed."""
    kind = "whole" if mode == "reconstruction" and given["frames"] is None else mode
    keys, reason = UNUSED.get(kind, ((), ""))
    if protocol and mode not in ("reconstruction", "sets") and (mode, protocol) != ("trees", NATIVE):
        raise ConfigError(f"protocol={protocol} is of reconstructions and sets, and {reason}: leave it out")
    wanted = defaults() | {"batch": 1}
    for key in keys:
        whole = mode == "trees" and key in ("frames", "size") and given[key] is None  # as it is
        if given[key] != wanted[key] and not whole:
            raise ConfigError(f"{key}={given[key]} would not be heeded, for {reason}: leave it out")


def identify(path: str, vae: VideoVAE) -> dict[str, Any]:
    """Return which weights a VAE has: the file that was taken, the step of a checkpoint of praxino, the fingerprint."""
    file = checkpoint.locate(path)
    header = {} if file.suffix in (".safetensors", ".json") else checkpoint.read(file).get("praxino", {})
    return {"file": file.name, "step": header.get("step"), "fingerprint": checkpoint.fingerprint(vae)}
