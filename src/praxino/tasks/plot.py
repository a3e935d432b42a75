"""Plot: the curves of a run, or of several over each other, with the settings that made them."""

import csv
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from praxino.config import check_call, nearest
from praxino.errors import ConfigError, DataError, StorageError
from praxino.tasks.figure import TITLES, Curve, Run, draw
from praxino.tasks.rundir import make_directory

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".pdf", ".svg")
FIRST = ("loss", "psnr", "ssim", "lpips", "mse")  # panels in this order, then all others, then these:
LAST = ("grad_norm", "lr", "disc_grad_norm", "disc_lr", "clips_per_second", "data_wait")
# rows of the table: what they are called, and the keys that may hold them
SETTINGS = {
    "network": ("model.net._target_",),
    "frames": ("frames",),
    "size": ("size",),
    "batch": ("batch",),
    "accumulate": ("model.accumulate",),
    "optimizer": ("model.optimizer._target_",),
    "learning rate": ("model.optimizer.lr",),
    "schedule": ("model.scheduler._target_",),
    "weight decay": ("model.optimizer.weight_decay",),
    "clip": ("model.clip",),
    "prediction": ("model.loss.prediction",),
    "KL weight": ("model.loss.kl",),
    "EMA": ("callbacks.ema.decay",),
    "precision": ("trainer.precision",),
    "devices": ("trainer.devices",),
    "seed": ("seed",),
}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `plot` and call it."""
    return plot(**check_call(plot, cfg))


def plot(
    run: str | list[str],
    out: str | None = None,
    smooth: Annotated[float, Field(ge=0, le=0.5)] = 0.02,
    log_steps: bool = False,
    only: list[str] | None = None,
) -> dict[str, Any]:
    """Draw a panel for each quantity that was logged: training raw and smoothed, validation as points.

    Args:
        run: run directories, or their metrics.jsonl or metrics.csv.
        out: .png, .pdf or .svg; None writes curves.png into the directory of a single run.
        smooth: standard deviation of the Gaussian average along a curve, as a share of its points; 0 draws none.
        log_steps: steps on a logarithmic scale.
        only: the panels to draw, e.g. `[loss, psnr]`.
    """
    paths = [run] if isinstance(run, str) else run
    if out is None and len(paths) != 1:
        raise ConfigError("out: a value is required where several runs are drawn, e.g. out=compared.png")
    target = Path(out).expanduser() if out else directory_of(paths[0]) / "curves.png"
    if target.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"out={target}: use a name that ends in {', '.join(SUFFIXES)}")
    runs = [read_run(path, name) for path, name in zip(paths, names_of(paths), strict=True)]
    panels = order({panel for run in runs for panel in run.curves})
    for wanted in only or ():
        if wanted not in panels:
            raise ConfigError(f"only: {wanted} was not logged{nearest(wanted, panels)}")
    panels = only or panels
    make_directory(target.parent)
    figure = draw(runs, panels, smooth, log_steps)
    try:
        figure.savefig(target, dpi=160, facecolor="white")
    except OSError as error:
        raise StorageError(f"out={target} cannot be written: {error.strerror}") from error
    log.info("%d panels of %s: %s", len(panels), ", ".join(run.name for run in runs), target)
    return {"out": str(target), "panels": panels, "runs": len(runs)}


# -------------------------------------------------------------------------------------------------- what was logged
def directory_of(path: str) -> Path:
    """Return the directory of a run."""
    found = Path(path).expanduser()
    return found.parent if found.suffix in (".jsonl", ".csv") else found


def names_of(paths: Sequence[str]) -> list[str]:
    """Name runs by the last parts of their paths that tell them apart."""
    parts = [directory_of(path).absolute().parts for path in paths]
    for depth in range(2 if len(parts) == 1 else 1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{part[-1]} ({number})" for number, part in enumerate(parts, 1)]


def read_run(path: str, name: str) -> Run:
    """Read what a run logged and how it was set."""
    rows, file = read_rows(Path(path).expanduser())
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for key, value in row.items():
            split, slash, panel = key.partition("/")
            if slash and split in ("train", "val") and isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(panel, {}).setdefault(split, []).append((row["step"], value))
    points.pop("skipped", None)
    if not points:
        raise DataError(f"{file}: no training or validation values in it yet")
    curves = {
        panel: {split: (table[:, 0], table[:, 1]) for split, found in splits.items() for table in [np.array(found)]}
        for panel, splits in points.items()
    }
    return Run(name, curves, {**read_settings(directory_of(path)), **summary(rows, curves)})


def read_rows(path: Path) -> tuple[list[dict[str, Any]], Path]:
    """Return the logged rows; a line that a crash cut off is left out."""
    candidates = [path] if path.is_file() else [path / "metrics.jsonl", path / "metrics.csv"]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise DataError(f"{path}: neither metrics.jsonl nor metrics.csv in it: give the directory of a run")
    text = file.read_text(encoding="utf-8", errors="replace").splitlines()
    parsed: list[Any] = [number_row(row) for row in csv.DictReader(text)] if file.suffix == ".csv" else []
    for line in text if file.suffix != ".csv" else ():
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: a line is cut off and left out", file)
    rows = [row for row in parsed if isinstance(row, dict) and isinstance(row.get("step"), int | float)]
    if not rows:
        raise DataError(f"{file}: no rows with a step in it")
    return rows, file


def number_row(row: Mapping[str, str]) -> dict[str, float]:
    """Return the cells of a CSV's row that are numbers."""
    found = {}
    for key, text in row.items():
        try:
            found[key] = float(text)
        except (TypeError, ValueError):
            continue
    return found


def read_settings(directory: Path) -> dict[str, str]:
    """Return the rows of the table that the run's configuration has."""
    try:
        cfg: Any = OmegaConf.load(directory / "config.yaml")
    except (OSError, OmegaConfBaseException, ValueError):
        return {}
    found: dict[str, str] = {}
    for name, keys in SETTINGS.items():
        for key in keys:
            try:
                value = OmegaConf.select(cfg, key)
            except OmegaConfBaseException:
                continue
            if value is not None:
                text = f"{value:g}" if isinstance(value, float) else str(value)
                found[name] = text.rpartition(".")[2] if key.endswith("_target_") else text
    return found


def summary(rows: Sequence[Mapping[str, Any]], curves: Mapping[str, Mapping[str, Curve]]) -> dict[str, str]:
    """Return what the run came to."""
    found = {"steps": f"{int(max(row['step'] for row in rows))}"}
    times = [row["time"] for row in rows if isinstance(row.get("time"), int | float)]
    if times and (seconds := max(times) - min(times)) > 0:
        hours, rest = divmod(round(seconds), 3600)
        found["time"] = f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
    for panel, best in (("psnr", max), ("ssim", max), ("loss", min)):
        if "val" in curves.get(panel, {}):
            found[f"best {TITLES.get(panel, panel).removesuffix(' (dB)')}"] = f"{best(curves[panel]['val'][1]):.4g}"
    return found


def order(panels: set[str]) -> list[str]:
    """Sort panels: what matters most, what the loss is made of, how the optimizer fares."""
    middle = sorted(panels - {*FIRST, *LAST})
    return [p for p in FIRST if p in panels] + middle + [p for p in LAST if p in panels]
