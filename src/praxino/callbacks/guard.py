"""What was wrong when a step had a non-finite loss or gradient."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from praxino.errors import ConfigError

log = logging.getLogger(__name__)


class FiniteGuard(pl.Callback):
    """Write what the module knows of each bad step to `directory/step-XXXXXXXX-rankR-N.json`.

    The module itself skips such a step on all ranks, and ends the run after `max_bad_steps` of them in a row.

    Args:
        directory: of the files.
        limit: files to write at most, a process.
    """

    def __init__(self, directory: str, limit: int = 100) -> None:
        if limit < 0:
            raise ConfigError(f"guard limit={limit} must not be negative")
        self.directory, self.limit = Path(directory), limit
        self.written = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the file of a step that was skipped."""
        self._write(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write the file of the step that ended the run."""
        self._write(pl_module)

    def _write(self, pl_module: Any) -> None:
        fault, pl_module.fault = pl_module.fault, None
        if fault is None or self.written >= self.limit:
            return
        self.written += 1
        path = self.directory / f"step-{fault['step']:08d}-rank{fault['rank']}-{fault['skipped']}.json"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_plain(fault), indent=2) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", path, error.strerror)
        else:
            log.warning("what is known of it: %s", path)


def _plain(value: Any) -> Any:
    """Return numbers that JSON has not as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
