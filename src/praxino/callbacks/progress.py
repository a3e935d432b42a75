"""Progress on the screen: a bar in a terminal, plain lines elsewhere."""

import logging
import math
import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from praxino.errors import ConfigError

log = logging.getLogger(__name__)

SCORES = ("val/psnr", "val/ssim", "val/loss_free", "val/loss_context")  # of a validation, those that there are


class Progress(ProgressBar):
    """Show steps, loss, PSNR, clips a second and the share of the time that waits for data, on rank 0.

    In a terminal a bar; else a log line every `every` seconds, and one for each validation.
    """

    def __init__(self, every: float = 10.0, refresh: float = 0.25) -> None:
        super().__init__()
        if every <= 0 or refresh <= 0:
            raise ConfigError(f"progress every={every} and refresh={refresh} must be positive (seconds)")
        self.every, self.refresh = every, refresh
        self._enabled = True
        self._bar: Bar | None = None
        self._task: Any = None
        self._shown = -math.inf
        self._begin = (0, 0.0)  # step and time of the start
        self._streams: list[tuple[logging.StreamHandler, Any]] = []

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Put up the bar where there is a terminal."""
        self._begin, self._shown = (pl_module.step, time.monotonic()), time.monotonic()
        console = Console(stderr=True)
        if not self._enabled or not console.is_terminal:
            return
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,  # no thread: it might hold a lock while a loader's worker is forked
            transient=True,
        )
        self._task = self._bar.add_task("train", total=self._total(trainer), completed=pl_module.step, values="")
        self._bar.start()
        for handler in logging.getLogger().handlers:  # their lines go above the bar
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.__stdout__, sys.__stderr__):
                self._streams.append((handler, handler.setStream(sys.stderr)))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Show the latest values, not too often."""
        now = time.monotonic()
        if self._bar is not None and now - self._shown >= self.refresh:
            self._shown = now
            self._draw("train", pl_module)
        elif self._bar is None and self._enabled and now - self._shown >= self.every:
            self._shown = now
            self._line(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Say so."""
        if self._bar is not None:
            self._draw("validate", pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Show the result in a line that stays."""
        scores = [f"{name} {pl_module.latest[name]:.4f}" for name in SCORES if name in pl_module.latest]
        if self._enabled and scores and not trainer.sanity_checking:
            log.info("step %d: %s", pl_module.step, ", ".join(scores))
        if self._bar is not None:
            self._draw("train", pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take down the bar; a last line."""
        self._stop()
        if self._enabled:
            self._line(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def _draw(self, what: str, pl_module: Any) -> None:
        assert self._bar is not None
        self._bar.update(self._task, description=what, completed=pl_module.step, values=describe(pl_module))
        self._bar.refresh()

    def _line(self, trainer: pl.Trainer, pl_module: Any) -> None:
        total, (first, begin) = self._total(trainer), self._begin
        of = f"/{total}" if total else ""
        done = pl_module.step - first
        left = ""
        if total and done > 0 and pl_module.step < total:
            seconds = round((time.monotonic() - begin) / done * (total - pl_module.step))
            left = f"  {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
        log.info("step %d%s  %s%s", pl_module.step, of, describe(pl_module), left)

    def _stop(self) -> None:
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams = []
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @staticmethod
    def _total(trainer: pl.Trainer) -> int | None:
        """Return the number of steps, if it is known."""
        return trainer.max_steps if trainer.max_steps > 0 else None


def describe(pl_module: Any) -> str:
    """Return the latest values in a few words."""
    values = {**pl_module.latest, **pl_module.gauges}
    parts = (
        ("train/loss", lambda v: f"loss {v:.4f}"),
        ("train/psnr", lambda v: f"psnr {v:.2f}"),
        ("val/psnr", lambda v: f"val {v:.2f}"),
        ("train/mfu", lambda v: f"mfu {v:.0%}"),
        ("train/clips_per_second", lambda v: f"{v:.3g} clips/s"),
        ("train/data_wait", lambda v: f"data wait {v:.0%}"),
    )
    return "  ".join(show(values[name]) for name, show in parts if name in values)
