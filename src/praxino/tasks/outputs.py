"""The record of what a task wrote into its folder: begun before the first file, so that a run cut short is known."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from praxino.callbacks.checkpoint import lock
from praxino.errors import ConfigError, DataError
from praxino.tasks.ranks import Ranks
from praxino.tasks.rows import write_jsonl
from praxino.video.writer import DRAFT

SAMPLES, PREDICTIONS, RECONSTRUCTIONS = RECORDS = ("samples.jsonl", "predictions.jsonl", "reconstructions.jsonl")


@contextmanager
def written(
    target: Path,
    record: str,
    files: Sequence[str],
    beside: Sequence[str],
    inputs: Iterable[Path] = (),
    ranks: Ranks | None = None,
    **run: Any,
) -> Iterator[None]:
    """Claim a folder while files are written, begin its record, and remove what the record before lists.

    After a kill the same folder can be taken again: what was planned then counts as listed. Two runs at a time cannot.

    Args:
        files: that will be written, relative to `target`; when all are, the rows of the record each list their `files`.
        beside: what stands beside any such record.
        inputs: that will be read.
        ranks: of which the first does this.
        run: whose record it is.

    Raises:
        ConfigError: one of the files is there, and no earlier run wrote it; or an input is one of an earlier run.
        BusyError: another process writes there.
    """
    claims = []

    def begin() -> None:
        claims.append(lock(target))
        path = target / record
        before = dict.fromkeys([*listed(path), *beside] if path.exists() else [])
        due = dict.fromkeys(files)
        for name in (*due, *beside):
            if name not in before and (target / name).exists():
                raise ConfigError(f"{str(target / name)!a} exists and is not of an earlier run: choose another out")
        going = {(target / name).resolve() for name in (*before, *due)}
        if (lost := next((source for source in inputs if source.resolve() in going), None)) is not None:
            raise ConfigError(f"{str(lost)!a} is of an earlier run in {target}, which would go: choose another out")
        write_jsonl(path, [{"unfinished": True, **run, "files": sorted((before | due).keys() - set(beside))}])
        remove([target / name for name in before])

    try:
        ranks.on_first(begin) if ranks is not None else begin()
        yield
    finally:
        for claim in claims:
            claim.close()


def remove(files: Iterable[Path]) -> None:
    """Remove files of an earlier run, what a kill left beside them, and folders that are empty then."""
    folders = set()
    for file in files:
        file.unlink(missing_ok=True)
        folders.add(file.parent)
    for folder in folders:
        for draft in folder.glob(f"{DRAFT}*"):
            draft.unlink(missing_ok=True)
        with suppress(OSError):  # it holds other files
            os.removedirs(folder)


def listed(record: Path) -> list[str]:
    """Return the files that the rows of a record list."""
    try:
        rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
        if not rows or not all(isinstance(row["files"], list) for row in rows):
            raise ValueError("no lists of files")
        names = [str(PurePath(name)) for row in rows for name in row["files"]]
        if any(name.startswith("/") or ".." in PurePath(name).parts for name in names):
            raise ValueError("not in this folder")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{record} does not say which files an earlier run wrote: remove it and them, or choose another out"
        ) from error
    return names


def check_finished(root: str | Path) -> None:
    """Raise DataError where a folder, or a video, holds what a run wrote that was cut short."""
    path = Path(root).expanduser().absolute()
    for folder in (path, *path.parents):
        for record in (folder / name for name in RECORDS):
            if record.is_file() and is_begun(record):
                files = [folder / name for name in listed(record)]
                if any(file.is_relative_to(path) for file in files):
                    raise DataError(f"{record} is of a run that did not finish: run it again, or choose another folder")


def is_begun(record: Path) -> bool:
    """Tell whether the task that began a record has not written its rows."""
    try:
        with record.open(encoding="utf-8", errors="replace") as lines:
            row = json.loads(lines.readline())
    except (OSError, ValueError):  # of others
        return False
    return isinstance(row, dict) and row.get("unfinished") is True
