"""A clean end when the machine is taken away."""

import logging
import os
import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.environments import LightningEnvironment

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # submitit asks SLURM for the last
EXIT_CODE = 75  # EX_TEMPFAIL: queue me again


class Preemption(pl.Callback):
    """On SIGTERM, SIGUSR1 or SIGUSR2, to any rank: finish the step, save a checkpoint, exit with code 75.

    The same signal again kills; another one does not, for SLURM sends SIGTERM while the first may still be saving. The
    handler only sets a flag, and the ranks agree at the end of a step: Lightning's own, which this replaces,
    communicates inside the handler and then hangs.
    """

    def __init__(self) -> None:
        self.received: set[int] = set()

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take over the signals."""
        self._install()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take over the signals; Lightning gives back the old handlers after training."""
        self._install()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save and leave, all ranks together, if one of them was told to."""
        if not pl_module.boundary:
            return
        if not trainer.strategy.reduce_boolean_decision(bool(self.received), all=False):
            return
        checkpoint: Any = trainer.checkpoint_callback
        if checkpoint is not None:
            checkpoint.save(trainer, pl_module)
        log.warning("told to stop: step %d is saved, resume with ckpt=last", pl_module.step)
        trainer.strategy.barrier("preemption")
        # Lightning's launcher kills the main process when a child that it started exits with another code than 0.
        child = trainer.global_rank > 0 and _launched_by_lightning(trainer)
        raise SystemExit(0 if child else EXIT_CODE)

    def _install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in self.received:
            os._exit(128 + number)
        self.received.add(number)


def _launched_by_lightning(trainer: pl.Trainer) -> bool:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment)
