"""The record of a run: metrics on disk, always; other loggers, as long as they work."""

import csv
import io
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from praxino.callbacks.durable import write_text

log = logging.getLogger(__name__)

FIRST = ["step", "epoch", "time"]  # columns


class RunLog(Logger):
    """Append every logged row to `metrics.jsonl` and `metrics.csv` in `directory`, at once.

    `time` is seconds since 1970. A resumed run drops the rows after the step that it goes on from; a run that begins
    anew in a used directory keeps the old rows as `*.old`.
    """

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.directory = Path(directory)
        self.jsonl, self.csv = self.directory / "metrics.jsonl", self.directory / "metrics.csv"
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.directory)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration lies beside the metrics."""

    @rank_zero_only
    def resume(self, step: int) -> None:
        """Forget the rows after `step`."""
        rows = self._read()
        if rows and step == 0:
            os.replace(self.jsonl, self.jsonl.with_name(f"{self.jsonl.name}.old"))
            if self.csv.exists():
                os.replace(self.csv, self.csv.with_name(f"{self.csv.name}.old"))
            log.warning("%s holds metrics of another run: they are now %s.old", self.directory, self.jsonl.name)
        kept = [row for row in rows if 0 < row["step"] <= step] if step else []
        if kept:
            write_text(self.jsonl, "".join(json.dumps(row) + "\n" for row in kept))
            self._rewrite_csv(kept)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row."""
        values = {key: float(value) for key, value in metrics.items() if key not in FIRST}
        row = {"step": step, "epoch": metrics.get("epoch"), "time": round(time.time(), 3), **values}
        self.directory.mkdir(parents=True, exist_ok=True)
        _append(self.jsonl, json.dumps(row) + "\n")
        if not set(row) <= set(self._columns):
            self._rewrite_csv(self._read())
        else:
            _append(self.csv, _csv_lines(self._columns, [row]))

    def _read(self) -> list[dict[str, Any]]:
        """Return the rows on disk; a line that a crash cut off is left out."""
        rows = []
        for line in self.jsonl.read_text().splitlines() if self.jsonl.exists() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                log.warning("%s: one line is cut off and left out", self.jsonl)
        return rows

    def _rewrite_csv(self, rows: list[dict[str, Any]]) -> None:
        """Write the table again, with the columns that have come up so far."""
        self._columns = list(dict.fromkeys([*FIRST, *(key for row in rows for key in row)]))
        header = ",".join(self._columns) + "\n"
        write_text(self.csv, header + _csv_lines(self._columns, rows))


class SafeLogger(Logger):
    """Pass everything on to `logger` and never let it end the run: after one failure there is one warning and no more.

    Args:
        logger: the logger, or what makes it.
        fallback: takes over after the failure, e.g. wandb with `offline: true`.
        patience: seconds that closing may take.
    """

    def __init__(
        self,
        logger: Logger | Callable[[], Logger],
        fallback: Logger | Callable[[], Logger] | None = None,
        patience: float = 60.0,
    ) -> None:
        super().__init__()
        self._candidates = [logger] if fallback is None else [logger, fallback]
        self._logger: Logger | None = None
        self.patience = patience

    @property
    def name(self) -> str | None:
        return self._call("name", lambda logger: logger.name)

    @property
    def version(self) -> int | str | None:
        return self._call("version", lambda logger: logger.version)

    @property
    def save_dir(self) -> str | None:
        return self._call("save_dir", lambda logger: logger.save_dir)

    @property
    def experiment(self) -> Any:
        """The experiment of the logger, None where it does not work."""
        return self._call("experiment", lambda logger: getattr(logger, "experiment", None))

    @property
    def logger(self) -> Logger | None:
        """The logger that works, if any."""
        return self._call("set-up", lambda logger: logger)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Pass on."""
        self._call("log_metrics", lambda logger: logger.log_metrics(metrics, step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Pass on."""
        self._call("log_hyperparams", lambda logger: logger.log_hyperparams(params, *args, **kwargs))

    def save(self) -> None:
        """Pass on."""
        self._call("save", lambda logger: logger.save())

    def finalize(self, status: str) -> None:
        """Close, but do not wait for ever."""
        closing = threading.Thread(
            target=self._call, args=("finalize", lambda logger: logger.finalize(status)), daemon=True
        )
        closing.start()
        closing.join(self.patience)
        if closing.is_alive():
            log.warning("a logger did not close within %g s: left behind", self.patience)

    def _call(self, what: str, use: Callable[[Logger], Any]) -> Any:
        """Use the first candidate that works; one that fails is dropped for good."""
        while self._candidates:
            try:
                if self._logger is None:
                    first = self._candidates[0]
                    self._logger = first if isinstance(first, Logger) else first()
                return use(self._logger)
            except Exception as error:  # whatever a logger, a network or a service raises
                failed = type(self._candidates.pop(0)).__name__ if self._logger is None else type(self._logger).__name__
                if self._logger is not None:
                    self._candidates.pop(0)
                self._logger = None
                then = "its fallback takes over" if self._candidates else "training goes on without it"
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                log.warning("%s failed in %s, %s: %s", failed, what, then, reason)
        return None


def _csv_lines(columns: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)
