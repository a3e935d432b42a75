"""The record of what a task wrote into its folder: begun before the first file, so that a run cut short is known."""

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

from praxino.errors import ConfigError, DataError
from praxino.tasks.common import write_jsonl

BEGUN = b'{"unfinished": true'  # how the record begins until the task writes its rows


def begin(target: Path, record: str, files: Iterable[str], beside: Sequence[str], **run: Any) -> None:
    """Begin a record, and remove what the one before lists: after a kill the same folder can be taken again.

    Args:
        files: that will be written, relative to `target`; when all are, the rows of the record each list their `files`.
        beside: what stands beside any such record.
        run: whose record it is.

    Raises:
        ConfigError: one of the files is there, and no earlier run wrote it.
    """
    path = target / record
    before = dict.fromkeys(listed(path)) if path.exists() else {}
    due = dict.fromkeys(files)
    if foreign := next((name for name in due if name not in before and (target / name).exists()), None):
        raise ConfigError(f"{str(target / foreign)!a} exists and is not of an earlier run: choose another out")
    stale = [*before, *beside] if path.exists() else []
    write_jsonl(path, [{"unfinished": True, **run, "files": [*(before | due)]}])
    for name in stale:
        (target / name).unlink(missing_ok=True)
        with suppress(OSError):  # it holds other files
            os.removedirs((target / name).parent)


def listed(record: Path) -> list[str]:
    """Return the files that the rows of a record list."""
    try:
        rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
        names = [str(PurePath(name)) for row in rows for name in row["files"]]
        if any(name.startswith("/") or ".." in PurePath(name).parts for name in names):
            raise ValueError("not in this folder")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{record} does not say which files an earlier run wrote: choose another out") from error
    return names


def check_finished(root: str | Path) -> None:
    """Raise DataError where the samples or predictions in a folder are of a run that was cut short."""
    folder = Path(root).expanduser().absolute()
    for record in (folder / "samples.jsonl", folder / "predictions.jsonl", folder.parent / "predictions.jsonl"):
        if record.is_file() and record.read_bytes().startswith(BEGUN):
            raise DataError(f"{record} is of a run that did not finish: run it again, or choose another folder")
