"""Checkpoints that survive a crash at any moment, and say themselves what they hold."""

import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from praxino.callbacks.durable import PATTERN, TEMPORARY, DurableIO, copy
from praxino.errors import BusyError, ConfigError, NonFiniteError, PraxinoError, StorageError
from praxino.lit.optim import local

log = logging.getLogger(__name__)


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
        self.best: float | None = None
        self.failures = 0  # saves in a row that failed
        self._saved = -1  # step of the last save
        self._time = time.monotonic()
        self._lock: IO[str] | None = None
        self._io = DurableIO()

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Take over the writing of checkpoints; make sure that the directory is ours and can be written."""
        trainer.strategy.checkpoint_io = self._io
        if stage != "fit":
            return
        error: PraxinoError | None = None
        if trainer.is_global_zero:
            try:
                self._lock = lock(self.directory)
            except PraxinoError as reason:
                error = reason
            else:
                for stale in self.directory.glob(f"{TEMPORARY}*"):
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
        error = trainer.strategy.broadcast(error)
        if error is not None:
            raise error

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin to count from the resumed step."""
        self._saved, self._time = pl_module.step, time.monotonic()
        if trainer.is_global_zero:
            self._supersede(pl_module.step)
        if self.monitor is not None:
            self.best = trainer.strategy.broadcast(self._known(pl_module.step))
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
        """Keep `best.ckpt` where the metric is better than ever, of a training that runs or has just ended."""
        fitting = trainer.state.fn == "fit"
        if self.monitor is None or trainer.sanity_checking or not (fitting or self._saved == pl_module.step):
            return
        if self.monitor not in pl_module.latest:
            known = ", ".join(sorted(name for name in pl_module.latest if name.startswith("val/")))
            raise ConfigError(
                f"checkpoint monitor={self.monitor} is not measured by the validation: use one of {known}"
            )
        value = trainer.strategy.broadcast(pl_module.latest[self.monitor])
        if self.best is not None and not (value < self.best if self.mode == "min" else value > self.best):
            return
        if not pl_module.boundary:
            log.warning(
                "step %d is the best so far and not kept, for it was validated between the batches of a step: "
                "make trainer.val_check_interval a multiple of model.accumulate",
                pl_module.step,
            )
            return
        self.best, path = value, self.directory / "best.ckpt"
        keep = self._write if fitting else self._copy
        if keep(trainer, pl_module, path) and trainer.is_global_zero:
            note = {"step": pl_module.step, self.monitor: value}
            (self.directory / "best.json").write_text(json.dumps(note) + "\n", encoding="utf-8")

    @property
    def state_key(self) -> str:
        """The name of this callback's state in a checkpoint, the same wherever the run lies."""
        return "Checkpoint" if self.monitor is None else f"Checkpoint({self.monitor})"

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far, where one is looked for."""
        return {} if self.best is None else {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best value so far."""
        self.best = state_dict.get("best")

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
        path = self.directory / f"step-{pl_module.step:08d}.ckpt"
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

    def _copy(self, trainer: pl.Trainer, pl_module: Any, path: Path) -> bool:
        """Copy the checkpoint that training ended with; return whether that worked."""
        done = True
        if trainer.is_global_zero:
            try:
                copy(self.directory / f"step-{pl_module.step:08d}.ckpt", path)
            except OSError as error:
                log.error("%s NOT SAVED: %s", path, error)
                done = False
        return trainer.strategy.broadcast(done)

    def _known(self, step: int) -> float | None:
        """Return the best value up to a step: what a training ended with is noted after its last checkpoint."""
        try:
            note = json.loads((self.directory / "best.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return self.best
        return note.get(self.monitor, self.best) if note.get("step", step + 1) <= step else self.best

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
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _supersede(self, step: int) -> None:
        later = [p for p in self.directory.glob(PATTERN) if p.name > f"step-{step:08d}.ckpt"]
        for path in later:
            target = self.directory / "superseded"
            target.mkdir(exist_ok=True)
            os.replace(path, target / path.name)
        if later:
            log.warning(
                "training begins at step %d: %d later checkpoints moved to %s/superseded",
                step,
                len(later),
                self.directory,
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
