"""Rows of results: their files, each written whole or not at all, and their means."""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """Put None, which JSON knows, in the place of NaN."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def mean_of(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """Return the mean of a column over the rows that have a value in it."""
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else None


def write_atomic(path: Path, text: str) -> None:
    """Write a small text file whole or not at all; names that are not UTF-8 survive as escapes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, in ASCII, so that any file name can be written."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, a column a key."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())
