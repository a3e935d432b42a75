"""Clips a second, and the share of the time that training waits for data."""

import time
from collections import deque
from typing import Any

import lightning.pytorch as pl

from praxino.errors import ConfigError
from praxino.lit.parallel import peak_flops


class Throughput(pl.Callback):
    """Measure the last `window` batches by the clock of the host, without waiting for the device.

    The values go into `pl_module.gauges`, as `train/clips_per_second` (of all ranks) and `train/data_wait` (0 to 1),
    and are logged with the next row. The time of validation does not count. Of a module that knows them also
    `train/tokens_per_second`, and `train/mfu`: the share of the devices' dense bf16 peak that the network's own
    operations take, without what is recomputed; it is left out on devices whose peak is not known.
    """

    def __init__(self, window: int = 20) -> None:
        if window < 1:
            raise ConfigError(f"throughput window={window} must be at least 1")
        # seconds, seconds of waiting, clips, tokens, operations
        self._batches: deque[tuple[float, ...]] = deque(maxlen=window)
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
            cost = pl_module.cost(batch)
            work = [cost.get(name, 0.0) * trainer.world_size for name in ("clips", "tokens", "flops")]
            self._batches.append((now - self._end - self._pause, self._wait, *work))
            total, waiting, clips, tokens, flops = map(sum, zip(*self._batches, strict=True))
            seconds, gauges = max(float(total), 1e-9), pl_module.gauges
            gauges["train/clips_per_second"] = clips / seconds
            gauges["train/data_wait"] = min(1.0, max(0.0, waiting / seconds))
            if tokens:
                gauges["train/tokens_per_second"] = tokens / seconds
            if flops and (peak := peak_flops(trainer.strategy.root_device)):
                gauges["train/mfu"] = flops / seconds / (peak * trainer.world_size)
        self._end, self._pause = now, 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self._validation = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Let it go on."""
        self._pause += time.monotonic() - self._validation
