"""What the console shows: tables, progress, and less of Lightning's chatter."""

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

log = logging.getLogger(__name__)


def quiet_lightning() -> None:
    """Leave Lightning's warnings, drop its chatter, and let every line appear once."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # Lightning's own call
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # workers are the user's choice
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")  # rows are logged by step
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing changes it in place
    warnings.filterwarnings("ignore", message=".*broadcast_buffers` is deprecated")  # its successor is too new


def show_table(title: str, rows: Iterable[tuple[Any, ...]], columns: Iterable[str]) -> None:
    """Print a small table on the console."""
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(show(cell)) for cell in row))  # not markup, which names with [ ] would be taken for
    console = Console()
    console.print(ascii_safe(title), highlight=False, markup=False, soft_wrap=True)
    console.print(table)


def show(cell: Any) -> str:
    """Return a cell of a table as text."""
    return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else ascii_safe(cell)


@contextmanager
def progress(what: str, total: int, show: bool = True, every: float = 10.0) -> Iterator[Callable[[int], None]]:
    """Give a function that counts things as done: a bar in a terminal, else a log line every so many seconds."""
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        done, told = 0, time.monotonic()

        def count(more: int) -> None:
            nonlocal done, told
            done += more
            if show and time.monotonic() - told >= every:
                told = time.monotonic()
                log.info("%s: %d of %d", what, done, total)

        yield count
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:  # no thread beside the workers
        task = bar.add_task(what, total=total)
        yield lambda more: bar.update(task, advance=more, refresh=True)


def ascii_safe(value: Any) -> str:
    """Return text that any terminal can show: bytes of a name that are not UTF-8 become escapes."""
    return str(value).encode("utf-8", "backslashreplace").decode()
