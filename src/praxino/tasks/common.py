"""What the tasks share: the run directory, the device, tables, and rows on disk."""

import csv
import io
import json
import logging
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from praxino.config import redacted
from praxino.data.transforms import Resize, Size
from praxino.errors import ConfigError, NonFiniteError, StorageError
from praxino.metrics.suite import PairSuite
from praxino.models.vae import VideoVAE
from praxino.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, DecodeFailure

log = logging.getLogger(__name__)

Precision = Literal["32", "bf16"]
FLOAT32 = "without TF32"  # what `precision_context` sees to, for protocols
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


def check_written(quality: int, fps: float | None = None) -> None:
    """Raise ConfigError for a quality or a frame rate at which no video can be written."""
    if not 0 <= quality <= 51:
        raise ConfigError(f"quality={quality}: use 0 (best) to 51, e.g. 18")
    if not (fps is None or 0 < fps < 1e6):
        raise ConfigError(f"fps={fps}: use more than 0 frames a second, e.g. 25")


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


def quiet_lightning() -> None:
    """Leave Lightning's warnings, drop its chatter, and let every line appear once."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # Lightning's own call
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # workers are the user's choice
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")  # rows are logged by step
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing changes it in place
    warnings.filterwarnings("ignore", message=".*broadcast_buffers` is deprecated")  # its successor is too new


def pick_device(device: str) -> torch.device:
    """Return the device of a name; `auto` takes an accelerator where there is one."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device} cannot be used here: {str(error).splitlines()[0]}") from error
    return chosen


@contextmanager
def precision_context(device: torch.device, precision: Precision) -> Iterator[None]:
    """Compute under autocast if the precision is bf16; what is in float32 is never in TF32, cuDNN's default."""
    tf32, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision(products)


def at_least(bound: int, **settings: int | None) -> None:
    """Raise ConfigError for the first setting below the bound."""
    for name, value in settings.items():
        if value is not None and value < bound:
            raise ConfigError(f"{name}={value}: use {bound} or more")


def make_resize(size: Size) -> Resize:
    """Return the resizing that a size asks for."""
    try:
        return Resize(size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_finite(y: Tensor) -> None:
    """Raise NonFiniteError for frames that cannot be shown or measured."""
    if not y.isfinite().all():
        raise NonFiniteError("what was decoded is not finite: use precision=32, or other weights")


def pass_over(path: str, error: DecodeFailure | NonFiniteError) -> dict[str, str]:
    """Warn of a video of which nothing is made; return its row of rejected.jsonl."""
    if isinstance(error, DecodeFailure):
        log.warning("%s", error)
        return {"path": path, "reason": error.reason, "detail": error.detail}
    log.warning("%s: not_finite: %s", ascii(path)[1:-1], error)
    return {"path": path, "reason": "not_finite", "detail": str(error)}


def measure(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return psnr and ssim of videos `(B, C, T, H, W)`, `(B,)`; ssim is NaN where its window does not fit."""
    check_finite(y)
    scores = PairSuite(("psnr", "ssim")).score(x, y)
    return {name: scores[name] for name in ("psnr", "ssim")}


def check_chunk(net: VideoVAE, chunk: int | None, remedy: str = "") -> None:
    """Refuse chunks for a model that only takes whole videos, rather than not to use them."""
    if chunk is not None and not net.streamable:
        raise ConfigError(f"chunk={chunk}: this model cannot stream: leave chunk out (the whole video at once){remedy}")


def without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """Put None, which JSON knows, in the place of NaN."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def mean_of(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """Return the mean of a column over the rows that have a value in it."""
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else None


def stem(path: str) -> str:
    """Return the path of a video without the suffix of its file; a folder of frames, or `prefix*` in one, has none."""
    name, suffix = os.path.splitext(path)
    file = suffix.lower() in VIDEO_SUFFIXES or (suffix.lower() in IMAGE_SUFFIXES and "*" not in name)
    return name if file else path


def write_atomic(path: Path, text: str) -> None:
    """Write a small text file whole or not at all; names that are not UTF-8 survive as escapes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, in ASCII, so that any file name can be written."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, a column a key."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def show_table(title: str, rows: Iterable[tuple[Any, ...]], columns: Iterable[str]) -> None:
    """Print a small table on the console."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(show(cell)) for cell in row))  # not markup, which names with [ ] would be taken for
    console = Console()
    console.print(ascii_safe(title), highlight=False, markup=False, soft_wrap=True)
    console.print(table)


def show(cell: Any) -> str:
    """Return a cell of a table as text."""
    return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else ascii_safe(cell)


@contextmanager
def progress(what: str, total: int, show: bool = True, every: float = 10.0) -> Iterator[Callable[[int], None]]:
    """Give a function that counts things as done: a bar in a terminal, else a log line every so many seconds."""
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        done, told = 0, time.monotonic()

        def count(more: int) -> None:
            nonlocal done, told
            done += more
            if show and time.monotonic() - told >= every:
                told = time.monotonic()
                log.info("%s: %d of %d", what, done, total)

        yield count
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:  # no thread beside the workers
        task = bar.add_task(what, total=total)
        yield lambda more: bar.update(task, advance=more, refresh=True)


def ascii_safe(value: Any) -> str:
    """Return text that any terminal can show: bytes of a name that are not UTF-8 become escapes."""
    return str(value).encode("utf-8", "backslashreplace").decode()
