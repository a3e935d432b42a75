"""Throughput, progress, faults and media show what happened and change nothing."""

import io
import json
import logging

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console

from praxino import video
from praxino.callbacks import media, progress, throughput
from praxino.callbacks.guard import FiniteGuard
from praxino.callbacks.media import Media, error, side_by_side
from praxino.callbacks.progress import Progress
from praxino.callbacks.record import RunLog, SafeLogger
from praxino.callbacks.throughput import Throughput
from praxino.errors import NonFiniteError
from praxino.lit import base
from training import Data, make_module, rows, train

VALIDATE = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}


class Clock:
    """The seconds that data, steps and validations are said to take; nothing else takes any."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class SlowData(Data):
    """Takes three seconds for each batch."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def train_dataloader(self):
        loader = super().train_dataloader()
        real = loader.collate_fn

        def collate(samples):
            self.clock.advance(3)
            return real(samples)

        loader.collate_fn = collate
        return loader


class SlowStep(pl.Callback):
    """Takes a second for each step, and much more for a validation."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, *args) -> None:
        self.clock.advance(1)

    def on_validation_epoch_start(self, *args) -> None:
        self.clock.advance(100)


def test_throughput_counts_waiting_and_not_validation(tmp_path, monkeypatch):
    clock = Clock()
    for module in (throughput, base):
        monkeypatch.setattr(module, "time", clock)
    train(tmp_path, steps=4, data=SlowData(clock), callbacks=(Throughput(), SlowStep(clock)), **VALIDATE)
    row = [row for row in rows(tmp_path) if "train/data_wait" in row][-1]
    assert row["train/data_wait"] == 3 / 4
    assert row["train/clips_per_second"] == 2 / 4


def test_fault_file(tmp_path):
    module = make_module(max_bad_steps=2)
    module.net.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NonFiniteError):
        train(tmp_path, module=module, callbacks=(FiniteGuard(str(tmp_path / "faults")),))
    files = sorted((tmp_path / "faults").iterdir())
    assert [path.name for path in files] == ["step-00000000-rank0-1.json", "step-00000000-rank0-2.json"]
    fault = json.loads(files[0].read_text())
    batch = fault["batches"][0]
    assert (fault["step"], fault["skipped"], batch["loss"]) == (0, 1, "nan")
    assert batch["path"] == [f"{index}.mp4" for index in batch["index"]]


def test_guard_writes_no_more_than_its_limit(tmp_path):
    module = make_module(max_bad_steps=4)
    module.net.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NonFiniteError):
        train(tmp_path, module=module, callbacks=(FiniteGuard(str(tmp_path / "faults"), limit=1),))
    assert len(list((tmp_path / "faults").iterdir())) == 1


def test_plain_lines_where_there_is_no_terminal(tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO, "praxino")
    bar = Progress(every=1e-6)
    train(tmp_path, steps=3, callbacks=(Throughput(), bar), enable_progress_bar=True, **VALIDATE)
    lines = [r.getMessage() for r in caplog.records if r.name == "praxino.callbacks.progress"]
    assert lines[0].startswith("step 1/3  loss 0.")
    assert " left" in lines[0]
    assert any(line.startswith("step 2: val/psnr ") and "val/ssim" in line for line in lines)
    assert all(word in lines[-1] for word in ("step 3/3", "psnr", "val", "clips/s", "data wait"))
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert "\x1b" not in "".join(capfd.readouterr())


def test_bar_in_a_terminal(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=160))
    bar = Progress(refresh=1e-6)
    train(tmp_path, steps=3, callbacks=(Throughput(), bar), enable_progress_bar=True, **VALIDATE)
    shown = screen.getvalue()
    assert all(word in shown for word in ("2/3", "loss 0.", "psnr", "clips/s", "data wait", "validate", "val "))
    assert bar._bar is None


def test_media_of_the_same_samples_each_time(tmp_path):
    folder = tmp_path / "media"
    train(tmp_path, steps=4, callbacks=(Media(str(folder), videos=3),), **VALIDATE)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004"]
    names = sorted(path.name for path in (folder / "step-00000002").iterdir())
    assert names == ["00.mp4", "01.mp4", "02.mp4", "sheet.png"]
    first, second = (video.read(folder / f"step-0000000{step}" / "00.mp4") for step in (2, 4))
    assert first.shape == (5, 16, 48, 3)
    inputs = [clip[:, :, :16].float() for clip in (first, second)]
    assert (inputs[0] - inputs[1]).abs().mean() < 8  # lossy, but the same sample
    sheet = video.read(folder / "step-00000002" / "sheet.png")
    assert sheet.shape == (1, 5 * 16, 3 * 48, 3)


def test_side_by_side_shows_the_error():
    x, y = torch.zeros(3, 2, 8, 8), torch.full((3, 2, 8, 8), 0.25)
    shown = side_by_side(x, y, error(x, y, gain=4))
    assert shown.shape == (2, 8, 24, 3)
    assert [shown[0, 0, column, 0].item() for column in (0, 8, 16)] == [128, 159, 128]
    assert side_by_side(x, x, error(x, x, 4))[0, 0, 16, 0].item() == 0


def test_media_that_fail_do_not_end_the_run(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(media, "write", fail)
    assert train(tmp_path, steps=2, callbacks=(Media(str(tmp_path / "media")),), **VALIDATE).global_step == 2
    assert "not written: OSError: no space left" in caplog.text


@pytest.mark.slow
def test_media_reach_tensorboard_and_wandb(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardLogger(str(tmp_path), name="board", version="")
    wandb = WandbLogger(project="test", save_dir=str(tmp_path), offline=True)
    loggers = [RunLog(str(tmp_path)), SafeLogger(board), SafeLogger(wandb)]
    train(tmp_path, steps=2, callbacks=(Media(str(tmp_path / "media"), videos=2),), logger=loggers, **VALIDATE)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert sorted(events.Tags()["images"]) == ["val/video_0", "val/video_1", "val/videos"]
    moving = events.Images("val/video_1")[0]
    assert moving.encoded_image_string.startswith(b"GIF89a")
    assert (moving.step, moving.width) == (2, 48)  # input, reconstruction, error
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert len(list((tmp_path / "wandb").rglob("video_*.mp4"))) == 2
