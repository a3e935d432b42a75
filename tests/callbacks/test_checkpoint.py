"""Checkpoints are whole or absent, on time, self-describing, and few."""

import errno
import os
import resource
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch

from praxino.callbacks import checkpoint as module_under_test
from praxino.callbacks import durable
from praxino.callbacks.checkpoint import Checkpoint, lock
from praxino.callbacks.durable import DurableIO, clean, is_whole, link, remove
from praxino.errors import BusyError, ConfigError, NonFiniteError, StorageError
from training import Data, load, make_module, train


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir() if path.name != ".lock")


def fit(checkpoint: Checkpoint, module=None, callbacks=(), **trainer) -> pl.Trainer:
    result = pl.Trainer(
        accelerator="cpu",
        **{"max_epochs": -1, **trainer},
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[checkpoint, *callbacks],
    )
    result.fit(module or make_module(), datamodule=Data())
    return result


def test_saves_on_time_and_keeps_the_newest(tmp_path):
    fit(Checkpoint(str(tmp_path / "checkpoints"), every=2, keep=2), max_steps=7)
    assert names(tmp_path) == ["step-00000006.ckpt", "step-00000007.ckpt"]


def test_saves_at_step_ends_when_accumulating(tmp_path):
    fit(Checkpoint(str(tmp_path / "checkpoints"), every=1, keep=None), make_module(accumulate=2), max_steps=4)
    assert names(tmp_path) == [f"step-{step:08d}.ckpt" for step in range(1, 5)]


def test_saves_by_the_clock(tmp_path, monkeypatch):
    seconds = {"now": 0.0}
    monkeypatch.setattr(module_under_test, "time", SimpleNamespace(monotonic=lambda: seconds["now"]))

    class Clock(pl.Callback):
        def on_train_batch_start(self, *args) -> None:
            seconds["now"] += 25

    fit(Checkpoint(str(tmp_path / "checkpoints"), every=None, minutes=1, keep=None), None, (Clock(),), max_steps=8)
    assert names(tmp_path) == [f"step-{step:08d}.ckpt" for step in (3, 6, 8)]


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        trainer.should_stop = pl_module.step == 2


@pytest.mark.parametrize(("callbacks", "step"), [((), 6), ((Stop(),), 2)])
def test_saves_when_training_ends(tmp_path, callbacks, step):
    """After the last epoch, and where a callback stops it."""
    fit(Checkpoint(str(tmp_path / "checkpoints"), every=None), None, callbacks, max_epochs=1)
    assert names(tmp_path) == [f"step-{step:08d}.ckpt"]


def test_describes_itself(tmp_path):
    config = {"seed": 0, "model": {"net": [1, 2]}}
    module = make_module()
    fit(Checkpoint(str(tmp_path / "checkpoints"), config=config), module, max_steps=1)
    block = load(tmp_path / "checkpoints" / "step-00000001.ckpt")["praxino"]
    assert block["model"] == {"class": "praxino.models.wfvae.WFVAE", "config": module.net.config}
    assert {key: block[key] for key in ("format", "kind", "config", "step", "stride", "statistics")} == {
        "format": 1,
        "kind": "vae",
        "config": config,
        "step": 1,
        "stride": [4, 8, 8],
        "statistics": None,
    }


def test_later_checkpoints_are_another_future(tmp_path):
    """A run that begins again at step 2 must not lose its first save to the old step 6."""
    train(tmp_path, steps=6, every=2)
    train(tmp_path, steps=3, resume=tmp_path / "checkpoints" / "step-00000002.ckpt")
    assert names(tmp_path) == ["step-00000002.ckpt", "step-00000003.ckpt", "superseded"]
    old = sorted(path.name for path in (tmp_path / "checkpoints" / "superseded").iterdir())
    assert old == ["step-00000004.ckpt", "step-00000006.ckpt"]


def test_stale_temporary_files_are_removed(tmp_path):
    stale = tmp_path / "checkpoints" / ".tmp-step-00000001.ckpt.999"
    stale.parent.mkdir()
    stale.touch()
    fit(Checkpoint(str(tmp_path / "checkpoints")), max_steps=1)
    assert names(tmp_path) == ["step-00000001.ckpt"]


def test_non_finite_weights_are_not_saved(tmp_path):
    class Poison(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            if pl_module.step == 2:
                pl_module.net.decoder.conv_out.bias.data[0] = float("inf")

    checkpoint = Checkpoint(str(tmp_path / "checkpoints"), every=1)
    with pytest.raises(NonFiniteError, match="not finite after step 2"):
        fit(checkpoint, None, (Poison(),), max_steps=3)
    assert names(tmp_path) == ["step-00000001.ckpt"]


class FullDisk:
    """A disk that is full for a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full, self.real = False, os.fsync
        monkeypatch.setattr(durable.os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.real(descriptor)


def test_full_disk_keeps_the_old_file_and_training(tmp_path, monkeypatch, caplog):
    disk = FullDisk(monkeypatch)

    class Fill(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args) -> None:
            disk.full = pl_module.step in (1, 2)  # the saves of steps 2 and 3 fail

    fit(Checkpoint(str(tmp_path / "checkpoints"), every=1, keep=2), None, (Fill(),), max_steps=4)
    assert names(tmp_path) == ["step-00000001.ckpt", "step-00000004.ckpt"]
    assert caplog.text.count("CHECKPOINT NOT SAVED") == 2


def test_three_failures_end_the_run(tmp_path, monkeypatch):
    disk = FullDisk(monkeypatch)
    disk.full = True
    with pytest.raises(StorageError, match=r"cannot be written.*No space left"):
        fit(Checkpoint(str(tmp_path / "checkpoints"), every=1), max_steps=5)
    assert names(tmp_path) == []


def test_really_full_disk(tmp_path):
    """The kernel refuses to let the file grow: torch's writer fails in the middle."""
    path = tmp_path / "step-00000001.ckpt"
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        io = DurableIO()
        io.save_checkpoint({"x": torch.ones(10)}, path)
        first = io.failure
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        io.save_checkpoint({"x": torch.zeros(1_000_000)}, path)
        os._exit(0 if first is None and isinstance(io.failure, OSError) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert load(path)["x"].tolist() == [1.0] * 10


def test_a_disk_that_would_become_full_is_not_written(tmp_path, monkeypatch):
    io = DurableIO()
    io.save_checkpoint({"x": torch.ones(1000)}, tmp_path / "step-00000001.ckpt")
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    io.save_checkpoint({"x": torch.ones(1000)}, tmp_path / "step-00000002.ckpt")
    assert io.failure is not None
    assert io.failure.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.ckpt"]


def make_checkpoint(path, kind):
    """Make something that looks like a checkpoint: a file, or a directory of shards."""
    file = path / "rows" if kind == "directory" else path
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"{path.name} {kind}")


def content(path):
    return (path / "rows" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("new", ["file", "directory"])
@pytest.mark.parametrize("old", ["file", "directory", None])
def test_a_link_takes_the_place_of_what_was_there(tmp_path, monkeypatch, old, new, links):
    if not links:
        monkeypatch.setattr(durable.os, "link", Mock(side_effect=PermissionError))
    source, best = tmp_path / "step-00000001.ckpt", tmp_path / "best.ckpt"
    make_checkpoint(source, new)
    if old is not None:
        make_checkpoint(best, old)
    link(source, best)
    assert content(best) == content(source) == f"step-00000001.ckpt {new}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "step-00000001.ckpt"]
    remove(source)
    assert content(best) == f"step-00000001.ckpt {new}"


def test_a_failed_link_leaves_nothing(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "step-00000001.ckpt", "file")
    monkeypatch.setattr(durable.os, "replace", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        link(tmp_path / "step-00000001.ckpt", tmp_path / "best.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.ckpt"]


@pytest.mark.parametrize("moves", [1, 2])
def test_a_directory_is_not_lost_to_a_kill_while_it_is_replaced(tmp_path, monkeypatch, moves):
    """Whatever was moved before the kill, the old checkpoint or the new one is in its place afterwards."""
    source, best = tmp_path / "step-00000001.ckpt", tmp_path / "best.ckpt"
    make_checkpoint(source, "directory")
    make_checkpoint(best, "directory")
    real, left = durable.os.replace, [moves]

    def killed(*args):
        real(*args)
        left[0] -= 1
        if not left[0]:
            os._exit(9)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(durable.os, "replace", killed)
        link(source, best)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) > 2
    clean(tmp_path)
    assert content(best) == ("best.ckpt directory" if moves == 1 else "step-00000001.ckpt directory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "step-00000001.ckpt"]


def test_a_file_takes_the_place_of_a_directory_of_shards(tmp_path):
    """A run that wrote shards goes on with files."""
    make_checkpoint(tmp_path / "best.ckpt", "directory")
    io = DurableIO()
    io.save_checkpoint({"x": torch.ones(10)}, tmp_path / "best.ckpt")
    assert io.failure is None
    assert load(tmp_path / "best.ckpt")["x"].tolist() == [1.0] * 10


def test_every_flipped_or_missing_byte_is_found(tmp_path):
    path = tmp_path / "step-00000001.ckpt"
    DurableIO().save_checkpoint({"x": torch.ones(100)}, path)
    assert is_whole(path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        data = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    start = content.index(torch.ones(100).numpy().tobytes(), data.header_offset)
    for damaged in (content[: len(content) // 2], b"", content[:start] + b"\1" + content[start + 1 :]):
        path.write_bytes(damaged)
        assert not is_whole(path)
    assert not is_whole(tmp_path)
    assert not is_whole(tmp_path / "missing")


def test_one_run_at_a_time(tmp_path):
    claim = lock(tmp_path)
    with pytest.raises(BusyError, match=f"in use by process {os.getpid()} on"):
        lock(tmp_path)
    with pytest.raises(BusyError):
        fit(Checkpoint(str(tmp_path)), max_steps=1)
    claim.close()
    lock(tmp_path).close()


def test_a_used_directory_is_given_free(tmp_path):
    train(tmp_path, steps=1)
    module = make_module(max_bad_steps=1)
    module.net.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NonFiniteError):
        train(tmp_path, steps=2, module=module)
    lock(tmp_path / "checkpoints").close()


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        lock(tmp_path / "file" / "checkpoints")


@pytest.mark.parametrize("wrong", [{"every": 0}, {"minutes": 0}, {"keep": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ConfigError, match="positive"):
        Checkpoint("nowhere", **wrong)
