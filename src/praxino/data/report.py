"""JSON lines on disk: pure ASCII, so that file names in any encoding survive."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON lines whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="ascii") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file; raises ValueError where one is damaged."""
    with path.open(encoding="ascii") as file:
        for line in file:
            yield json.loads(line)
