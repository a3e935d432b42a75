"""Processes that crash or hang cost their own call only."""

import multiprocessing
import os
import signal
import time

import pytest

from praxino.data.pool import Lost, run_all, start_method


def behave(what: str) -> str:
    if what == "hang":
        time.sleep(600)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit":
        os._exit(3)
    if what == "raise":
        raise RuntimeError("not a result")
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    return what.upper()


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_calls_do_not_touch_the_others(workers):
    names = ["a", "hang", "b", "crash", "c", "exit", "raise", "d", "stop", "e"]
    limits = {"hang": 0.5, "stop": 0.5}
    results = dict(run_all(behave, {name: ((name,), limits.get(name, 200.0)) for name in names}, workers))
    assert set(results) == set(names)
    assert {name: results[name] for name in "abcde"} == {name: name.upper() for name in "abcde"}
    assert [results[name].reason for name in ("hang", "stop", "crash", "exit", "raise")] == [
        "timeout",
        "timeout",
        "crash",
        "crash",
        "crash",
    ]
    assert isinstance(results["exit"], Lost)
    assert "code 3" in results["exit"].detail


def test_nothing_is_left_when_the_caller_stops_early():
    before = set(multiprocessing.active_children())
    calls = run_all(behave, {str(i): ((str(i),), 5.0) for i in range(20)}, 2)
    next(calls)
    assert len(set(multiprocessing.active_children()) - before) == 2
    calls.close()
    assert set(multiprocessing.active_children()) <= before


def test_no_calls_no_processes():
    assert list(run_all(behave, {}, 4)) == []


def test_processes_are_forked_on_linux_only(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert start_method() == "spawn"
    monkeypatch.setattr("sys.platform", "linux")
    assert start_method() == "fork"
