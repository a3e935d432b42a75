"""The record on disk is complete, grows columns, forgets the future; other loggers cannot end a run."""

import csv
import json
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger

from praxino.callbacks.record import RunLog, SafeLogger
from training import make_module, rows, train


def table(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_rows_are_on_disk_at_once_and_columns_grow(tmp_path):
    record = RunLog(str(tmp_path))
    record.log_metrics({"epoch": 0, "train/loss": 1.5}, step=1)
    record.log_metrics({"epoch": 0, "train/loss": 0.1 + 0.2}, step=2)
    record.log_metrics({"epoch": 0, "val/psnr": 20}, step=2)
    record.log_metrics({"epoch": 1, "train/loss": float("nan")}, step=3)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "step,epoch,time,train/loss,val/psnr"
    assert [row["train/loss"] for row in table(tmp_path)] == ["1.5", "0.30000000000000004", "", "nan"]
    assert [row["val/psnr"] for row in table(tmp_path)] == ["", "", "20.0", ""]
    assert rows(tmp_path)[:3] == [
        {"step": 1, "epoch": 0, "train/loss": 1.5},
        {"step": 2, "epoch": 0, "train/loss": 0.1 + 0.2},
        {"step": 2, "epoch": 0, "val/psnr": 20.0},
    ]
    stamps = [json.loads(line)["time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(stamp - time.time()) < 60 for stamp in stamps)


def test_resume_forgets_later_rows_and_torn_lines(tmp_path):
    first = RunLog(str(tmp_path))
    for step in range(1, 6):
        first.log_metrics({"epoch": 0, "a": step}, step=step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ep')
    second = RunLog(str(tmp_path))
    second.resume(3)
    second.log_metrics({"epoch": 0, "a": 40, "b": 1}, step=4)
    assert [(row["step"], row["a"], row["b"]) for row in table(tmp_path)] == [
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("3", "3.0", ""),
        ("4", "40.0", "1.0"),
    ]
    assert [row["a"] for row in rows(tmp_path)] == [1, 2, 3, 40]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl"]


def test_a_resumed_run_writes_the_rows_of_one_that_never_stopped(tmp_path):
    train(tmp_path / "whole", steps=6)
    train(tmp_path / "parts", steps=4, every=3)
    train(tmp_path / "parts", steps=6, resume=tmp_path / "parts" / "checkpoints" / "step-00000003.ckpt")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert len(table(tmp_path / "parts")) == 6


def test_a_new_run_keeps_the_rows_of_the_old_one(tmp_path):
    RunLog(str(tmp_path)).log_metrics({"a": 1}, step=1)
    new = RunLog(str(tmp_path))
    new.resume(0)
    new.log_metrics({"b": 2}, step=1)
    assert [row["b"] for row in table(tmp_path)] == ["2.0"]
    assert (tmp_path / "metrics.csv.old").read_text().count("\n") == 2
    assert (tmp_path / "metrics.jsonl.old").read_text().count("\n") == 1


class Broken(CSVLogger):
    """Fails in one method, and counts how often."""

    def __init__(self, directory: str, method: str) -> None:
        super().__init__(directory)
        self.calls = 0

        def fail(*arguments: object, **named: object) -> None:
            self.calls += 1
            raise ConnectionResetError("the service is gone")

        setattr(self, method, fail)


@pytest.mark.parametrize("method", ["log_metrics", "finalize"])
def test_a_broken_logger_changes_nothing(tmp_path, method, caplog):
    weights = []
    for broken in (False, True):
        out = tmp_path / str(broken)
        module = make_module()
        logger = Broken(str(out / "extra"), method)
        train(out, steps=2, module=module, logger=[RunLog(str(out)), *([SafeLogger(logger)] if broken else [])])
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)
    assert rows(tmp_path / "True") == rows(tmp_path / "False")
    assert logger.calls == 1
    assert caplog.text.count("training goes on without it: ConnectionResetError") == 1


def test_a_logger_that_cannot_be_made_is_replaced(tmp_path, caplog):
    def make() -> Logger:
        raise RuntimeError("no API key")

    safe = SafeLogger(make, fallback=lambda: CSVLogger(str(tmp_path), name="fallback", version=""))
    safe.log_metrics({"a": 1.0}, step=1)
    safe.save()
    assert (tmp_path / "fallback" / "metrics.csv").exists()
    assert "its fallback takes over: RuntimeError: no API key" in caplog.text


def test_closing_is_bounded(tmp_path, caplog):
    class Slow(CSVLogger):
        def finalize(self, status: str) -> None:
            time.sleep(600)

    SafeLogger(Slow(str(tmp_path)), patience=0.1).finalize("success")
    assert "did not close within 0.1 s" in caplog.text
