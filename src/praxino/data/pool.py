"""Run a function over many inputs in processes that may crash or hang."""

import contextlib
import faulthandler
import gc
import multiprocessing as mp
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch


def start_method() -> Literal["fork", "spawn"]:
    """Return how processes start: by fork on Linux; elsewhere it is missing, or unsafe beside the system's threads."""
    return "fork" if sys.platform == "linux" else "spawn"


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Lost:
    """Stands for a result that never came."""

    reason: Literal["timeout", "crash"]
    detail: str


@dataclass(eq=False)
class _Worker:
    function: Callable[..., Any]
    siblings: list["_Worker"]
    key: str | None = None
    deadline: float = 0.0
    limit: float = 0.0
    pipe: Connection = field(init=False)
    process: Any = field(init=False)

    def __post_init__(self) -> None:
        method = start_method()
        context: Any = mp.get_context(method)
        self.pipe, theirs = context.Pipe()
        inherited = [self.pipe, *(sibling.pipe for sibling in self.siblings)] if method == "fork" else []
        self.process = context.Process(target=_serve, args=(theirs, self.function, inherited), daemon=True)
        self.process.start()
        theirs.close()
        self.siblings.append(self)

    def give(self, key: str, arguments: tuple[Any, ...], limit: float) -> None:
        self.key, self.limit, self.deadline = key, limit, time.monotonic() + limit
        with contextlib.suppress(OSError):  # a process that died while idle is found out on receiving
            self.pipe.send(arguments)

    def end(self) -> None:
        self.siblings.remove(self)
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run_all(
    function: Callable[..., Any], calls: Mapping[str, tuple[tuple[Any, ...], float]], workers: int
) -> Iterator[tuple[str, Any]]:
    """Yield `(key, function(*arguments))` for each `key: (arguments, seconds)` of `calls`, in the order of completion.

    A call that takes longer than its seconds or kills its process yields a `Lost`, and the others go on. `function`
    must be importable, and its exceptions must be results: one that escapes counts as a crash.
    """
    waiting = deque(calls.items())
    team: list[_Worker] = []
    try:
        for _ in range(min(workers, len(waiting))):
            _Worker(function, team)
        while waiting or any(worker.key is not None for worker in team):
            for worker in list(team):
                if worker.key is None and waiting:
                    key, (arguments, limit) = waiting.popleft()
                    worker.give(key, arguments, limit)
            busy = [worker for worker in team if worker.key is not None]
            pause = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            ready = wait([worker.pipe for worker in busy], pause)
            for worker in busy:
                outcome: Any
                if worker.pipe in ready:
                    try:
                        outcome = worker.pipe.recv()
                    except (EOFError, OSError):
                        worker.process.join(5)
                        outcome = Lost("crash", f"the process that read it ended with code {worker.process.exitcode}")
                elif time.monotonic() >= worker.deadline:
                    outcome = Lost("timeout", f"not read within {worker.limit:.0f} s")
                else:
                    continue
                done, worker.key = worker.key, None
                if isinstance(outcome, Lost):
                    worker.end()
                    if waiting:
                        _Worker(function, team)
                assert done is not None
                yield done, outcome
    finally:
        for worker in list(team):
            worker.end()


def _serve(pipe: Connection, function: Callable[..., Any], inherited: list[Connection]) -> None:
    """Answer calls until the other side is gone."""
    torch.set_num_threads(1)  # a forked process has no threads of its parent's pool
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # do not collect here what a fork inherits: it may be a loader, whose workers that would end
    faulthandler.disable()  # a crash is a result here, not a reason for a page of addresses
    for other in inherited:  # else this process would keep its siblings' pipes open after the parent has died
        other.close()
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*arguments))
