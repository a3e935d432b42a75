"""Checkpoints that survive a crash at any moment, and say themselves what they hold."""

import fcntl
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from praxino.callbacks.durable import PATTERN, TEMPORARY, DurableIO, clean, link, move, remove, step_of, write_text
from praxino.errors import BusyError, ConfigError, NonFiniteError, PraxinoError, StorageError
from praxino.lit.optim import local

log = logging.getLogger(__name__)

NOTE, DUE = "best.json", "best.json.due"  # the step and the value of best.ckpt, and of the one that is being written


class Checkpoint(pl.callbacks.Checkpoint):
    """Save `step-XXXXXXXX.ckpt` at the end of a step: every `every` steps, every `minutes`, and when training ends.

    A checkpoint resumes training exactly, and rebuilds its model alone: its block `praxino` names class and config.
    Files later than the step at which training begins are another future: they are moved to `superseded/`.
    The module must have `describe()`, the counter `step`, and `boundary`, true where no gradients are waiting.

    Args:
        directory: of the checkpoints.
        every: steps between saves; None for none.
        minutes: of wall-clock time between saves; None for none.
        keep: the newest saves that stay, None for all; an old one goes only after a new one was read back.
        config: the resolved configuration of the run, as plain data, to lie in the file.
        monitor: a metric of validation, measured with the averaged weights where there are any; the best checkpoint so
            far is `best.ckpt`, and `best.json` says what it reached. None keeps none.
        mode: whether the smallest (`min`) or the largest (`max`) value is the best.
    """

    def __init__(
        self,
        directory: str,
        every: int | None = 1000,
        minutes: float | None = None,
        keep: int | None = 3,
        config: dict[str, Any] | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if any(value is not None and value <= 0 for value in (every, minutes, keep)):
            raise ConfigError(f"checkpoint every={every}, minutes={minutes}, keep={keep} must be positive or null")
        self.directory = Path(directory)
        self.every, self.minutes, self.keep, self.config = every, minutes, keep, config
        self.monitor, self.mode = monitor, mode
        self.failures = 0  # saves in a row that failed
        self._saved = -1  # step of the last save
        self._time = time.monotonic()
        self._lock: IO[str] | None = None
        self._io = DurableIO()

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Take over the writing of checkpoints; make sure that the directory is ours and can be written."""
        trainer.strategy.checkpoint_io = self._io
        if stage not in ("fit", "validate"):
            return
        self._on_first(trainer, self._claim)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin to count from the resumed step."""
        self._saved, self._time = pl_module.step, time.monotonic()
        self._on_first(trainer, lambda: self._supersede(pl_module.step))
        # Lightning ends the epoch of a checkpoint taken at its last batch, but forgets to count the next one as begun:
        # a second resume would take another epoch.
        epochs: Any = trainer.fit_loop.epoch_progress
        if trainer.fit_loop.restarted_mid_epoch and epochs.current.ready == epochs.current.processed:
            epochs.increment_ready()
            epochs.increment_started()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save when it is time, never between the batches of one step."""
        if not pl_module.boundary or pl_module.step == self._saved:
            return
        step = pl_module.step
        last_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        last = step == trainer.max_steps or last_epoch or trainer.should_stop
        if last or (self.every is not None and step % self.every == 0) or self._time_is_up(trainer):
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save what training ended with."""
        if pl_module.step != self._saved:
            self.save(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Keep `best.ckpt` where the metric is better than ever, in a training and after it."""
        if self.monitor is None or trainer.sanity_checking:
            return
        if self.monitor not in pl_module.latest:
            known = ", ".join(sorted(name for name in pl_module.latest if name.startswith("val/")))
            raise ConfigError(
                f"checkpoint monitor={self.monitor} is not measured by the validation: use one of {known}"
            )
        value, step = pl_module.latest[self.monitor], pl_module.step
        saved, best = self._path(step), self.directory / "best.ckpt"
        better, exists = trainer.strategy.broadcast((self._is_better(value), saved.exists()))
        if not better or not (exists or trainer.state.fn == "fit"):  # the last weights of all may not have been saved
            return
        if not (exists or pl_module.boundary):
            log.warning(
                "step %d is the best so far and not kept, for it was validated between the batches of a step: "
                "make trainer.val_check_interval a multiple of model.accumulate",
                step,
            )
            return
        # the note comes first, under another name: by it `_claim` knows what best.ckpt is after a kill
        due, note = self.directory / DUE, json.dumps({"step": step, self.monitor: value}) + "\n"
        if not self._try(trainer, lambda: write_text(due, note)):
            return
        if self._try(trainer, lambda: link(saved, best)) if exists else self._write(trainer, pl_module, best):
            self._try(trainer, lambda: os.replace(due, self.directory / NOTE))

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Give the directory free."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the directory free; what an exception leaves behind is not saved."""
        self._release()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the block from which the model can be rebuilt."""
        checkpoint["praxino"] = {**pl_module.describe(), "config": self.config, "step": pl_module.step}

    def save(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save now, on all ranks; training goes on when the disk fails, until it has failed three times.

        Raises:
            NonFiniteError: the weights hold NaN or infinity; nothing is written.
            StorageError: the third failure in a row.
        """
        path = self._path(pl_module.step)
        saved = self._write(trainer, pl_module, path)
        self._saved, self._time = pl_module.step, time.monotonic()
        if saved and trainer.is_global_zero:
            self._prune(path)

    def _write(self, trainer: pl.Trainer, pl_module: Any, path: Path) -> bool:
        """Write a checkpoint on all ranks; return whether that worked."""
        ema = pl_module.__dict__.get("ema_net")
        weights = [*pl_module.parameters(), *(ema.parameters() if ema is not None else ())]
        if not trainer.strategy.reduce_boolean_decision(_all_finite(weights), all=True):
            raise NonFiniteError(
                f"the weights are not finite after step {pl_module.step}, nothing was saved: "
                "resume from the last checkpoint with a lower learning rate"
            )
        trainer.save_checkpoint(path, weights_only=False)
        failure = trainer.strategy.broadcast(None if self._io.failure is None else str(self._io.failure))
        if failure is None:
            self.failures = 0
            return True
        self.failures += 1
        log.error("CHECKPOINT NOT SAVED (%d in a row), training goes on: %s", self.failures, failure)
        if self.failures >= 3:
            raise StorageError(f"checkpoints cannot be written to {self.directory}: {failure}")
        return False

    def _on_first(self, trainer: pl.Trainer, function: Callable[[], Any]) -> None:
        """Call a function on the first rank; the expected error that it raises is that of all."""
        error: PraxinoError | None = None
        if trainer.is_global_zero:
            try:
                function()
            except PraxinoError as reason:
                error = reason
            except OSError as reason:
                error = StorageError(f"{reason.filename or self.directory} cannot be used: {reason.strerror or reason}")
        error = trainer.strategy.broadcast(error)
        if error is not None:
            raise error

    def _try(self, trainer: pl.Trainer, function: Callable[[], Any]) -> bool:
        """Call a function on the first rank; return on all whether the disk did what it asks for."""
        try:
            self._on_first(trainer, function)
        except StorageError as error:
            log.error("best.ckpt NOT KEPT, training goes on: %s", error)
            return False
        return True

    def _claim(self) -> None:
        """Lock the directory, and put right what a killed process left."""
        self._lock = lock(self.directory)
        clean(self.directory)
        due = self.directory / DUE
        if due.exists():
            if self._note(DUE).get("step") == step_of(self.directory / "best.ckpt"):
                os.replace(due, self.directory / NOTE)
            due.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.ckpt"

    def _is_better(self, value: float) -> bool:
        """Tell whether a value of the metric is better than that of `best.ckpt`, as far as one is known."""
        if not math.isfinite(value):
            log.warning("%s is %s: it is passed over in the search for the best", self.monitor, value)
            return False
        best = self._note().get(self.monitor, math.nan)
        return not math.isfinite(best) or (value < best if self.mode == "min" else value > best)

    def _note(self, name: str = NOTE) -> dict[str | None, float]:
        """Return the step and the value of `best.ckpt`; nothing where they are not known."""
        try:
            note = json.loads((self.directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        valid = isinstance(note, dict) and all(isinstance(value, int | float) for value in note.values())
        return note if valid and (self.directory / "best.ckpt").exists() else {}

    def _time_is_up(self, trainer: pl.Trainer) -> bool:
        if self.minutes is None:
            return False
        return bool(
            trainer.strategy.reduce_boolean_decision(time.monotonic() - self._time > 60 * self.minutes, all=False)
        )

    def _prune(self, newest: Path) -> None:
        """Remove all but the newest files; `newest` has been read back."""
        if self.keep is not None:
            older = sorted((p for p in self.directory.glob(PATTERN) if p.name < newest.name), reverse=True)
            for path in older[self.keep - 1 :]:
                remove(path)

    def _supersede(self, step: int) -> None:
        later = [p for p in self.directory.glob(PATTERN) if p.name > self._path(step).name]
        if self._note().get("step", step) > step:
            later += [self.directory / "best.ckpt", self.directory / NOTE]
        for path in later:
            target = self.directory / "superseded"
            target.mkdir(exist_ok=True)
            move(path, target / path.name)
        if later:
            log.warning(
                "training begins at step %d: later checkpoints moved to %s/superseded: %s",
                step,
                self.directory,
                ", ".join(sorted(path.name for path in later)),
            )

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def lock(directory: Path) -> IO[str]:
    """Claim a directory until the returned file is closed or the process ends.

    Raises:
        BusyError: another process has claimed it.
        StorageError: it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f"{TEMPORARY}probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
        file = (directory / ".lock").open("a+")
    except OSError as error:
        raise StorageError(f"{directory} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise BusyError(
            f"{directory} is in use by {owner or 'another run'}: wait for it, or choose another out=DIR"
        ) from error
    except OSError as error:  # a file system without locks
        log.warning(
            "%s cannot be locked (%s): make sure that one run at a time writes to it", directory, error.strerror
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no tensor, or this rank's part of it, holds NaN or infinity."""
    finite = [local(t.detach()).isfinite().all() for t in tensors]
    return not finite or bool(torch.stack(finite).all())
