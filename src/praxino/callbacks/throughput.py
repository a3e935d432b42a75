"""Clips a second, and the share of the time that training waits for data."""

import time
from collections import deque
from typing import Any

import lightning.pytorch as pl

from praxino.errors import ConfigError


class Throughput(pl.Callback):
    """Measure the last `window` batches by the clock of the host, without waiting for the device.

    The values go into `pl_module.gauges`, as `train/clips_per_second` (of all ranks) and `train/data_wait` (0 to 1),
    and are logged with the next row. The time of validation does not count.
    """

    def __init__(self, window: int = 20) -> None:
        if window < 1:
            raise ConfigError(f"throughput window={window} must be at least 1")
        self._batches: deque[tuple[int, float, float]] = deque(maxlen=window)  # clips, seconds, seconds of waiting
        self._end: float | None = None  # of the last batch
        self._wait = self._pause = self._validation = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin; the first batch starts the clock."""
        self._batches.clear()
        self._end, self._pause = None, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Take the time since the step before was done with everything."""
        done = pl_module.batch_ended
        self._wait = 0.0 if done is None else time.monotonic() - done - self._pause

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the batch."""
        now = time.monotonic()
        if self._end is not None:
            clips = len(batch["video"]) * trainer.world_size
            self._batches.append((clips, now - self._end - self._pause, self._wait))
            count, seconds, waiting = map(sum, zip(*self._batches, strict=True))
            pl_module.gauges["train/clips_per_second"] = count / max(seconds, 1e-9)
            pl_module.gauges["train/data_wait"] = min(1.0, max(0.0, waiting / max(seconds, 1e-9)))
        self._end, self._pause = now, 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self._validation = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Let it go on."""
        self._pause += time.monotonic() - self._validation
