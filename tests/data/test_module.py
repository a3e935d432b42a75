"""The datamodule under a real Trainer: what a run sees, before and after it stops and goes on."""

import json
import os
import subprocess
import sys
import textwrap

import lightning.pytorch as pl
import pytest
import torch

from praxino.data import marks as marking
from praxino.data.marks import compare, marks
from praxino.data.module import SyntheticData, VideoData
from praxino.data.report import read_lines
from praxino.errors import ConfigError, DataError, StorageError
from praxino.video import read


class Recorder(pl.LightningModule):
    """Trains one number, with manual optimisation, and remembers the clips that it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.automatic_optimization = False
        self.seen, self.validated = [], []

    def training_step(self, batch):
        columns = [batch[name].tolist() for name in ("epoch", "index", "repeat", "start")]
        self.seen.append(list(zip(batch["path"], *columns, strict=True)))
        self.manual_backward((self.weight - batch["video"].float().mean() / 255) ** 2)
        optimizer = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()

    def validation_step(self, batch):
        self.validated.append((batch["index"].tolist(), batch["repeat"].tolist(), batch["start"].tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(pl.Callback):
    """Write a checkpoint after each of some batches."""

    def __init__(self, folder, steps):
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def data_of(tree, **options):
    return VideoData(str(tree), **{"frames": 4, "size": 16, "batch": 2, "workers": 0, "val_fraction": 0.2} | options)


def fit(data, steps, callbacks=(), ckpt=None, **options):
    recorder = Recorder()
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return recorder, trainer


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_mid_epoch_sees_what_the_straight_run_saw(tree, tmp_path, workers):
    steps = range(1, 21) if workers == 0 else (6, 7, 12)
    straight, whole = fit(data_of(tree, workers=workers), 20, [SaveAt(tmp_path, steps)])
    length = whole.num_training_batches
    assert length == 6  # 11 or 12 videos by two: the saves cover first, middle and last batches of epochs
    assert len(straight.seen) == 20
    for epoch in range(3):
        seen = [clip for batch in straight.seen[epoch * length : (epoch + 1) * length] for clip in batch]
        assert {clip[1] for clip in seen} == {epoch}
        assert len({clip[2] for clip in seen if clip[3] == 0}) == len(data_of(tree).find()[0].entries)
    for step in steps:
        resumed, trainer = fit(data_of(tree, workers=workers), 20, ckpt=tmp_path / f"{step}.ckpt")
        assert resumed.seen == straight.seen[step:], step
        assert trainer.global_step == 20
        assert trainer.current_epoch == whole.current_epoch or step == 20
        assert torch.equal(resumed.weight, straight.weight)


def test_chains_of_resumes(tree, tmp_path):
    straight, _ = fit(data_of(tree), 26)
    seen, ckpt, done = [], None, 0
    for step in (6, 7, 12, 18, 24, 26):  # ends of epochs, one after the other
        part, trainer = fit(data_of(tree), step, ckpt=ckpt)
        ckpt = tmp_path / f"{step}.ckpt"
        trainer.save_checkpoint(ckpt)
        seen += part.seen
        assert len(part.seen) == step - done
        done = step
    assert seen == straight.seen


def test_resume_beside_validation_and_limits(tree, tmp_path):
    options = {"val_check_interval": 4, "limit_train_batches": 5}
    straight, _ = fit(data_of(tree), 17, [SaveAt(tmp_path, (4, 5, 9, 13))], **options)
    assert len(straight.validated) > 2
    for step in (4, 5, 9, 13):
        resumed, _ = fit(data_of(tree), 17, ckpt=tmp_path / f"{step}.ckpt", **options)
        assert resumed.seen == straight.seen[step:]


def test_validation_clips_are_fixed_and_complete(tree):
    recorder, _ = fit(data_of(tree, val_batch=2, val_fraction=0.4), 12, val_check_interval=4)
    indices = [index for batch in recorder.validated for index in batch[0]]
    count = max(indices) + 1
    assert count > 2
    assert indices == list(range(count)) * 2
    assert {start for batch in recorder.validated for start in batch[2]} == {4}
    train, val = data_of(tree, val_fraction=0.4).find()
    assert {e.path for e in train.entries}.isdisjoint(e.path for e in val.entries)
    assert count == len(val.entries)
    assert data_of(tree, val_fraction=0.0).val_dataloader() == []
    assert len(next(iter(data_of(tree, val_fraction=0.6, val_limit=3).val_dataloader()))["path"]) == 2


def test_roots_of_their_own(tree, tmp_path, new_video):
    new_video(tmp_path / "val" / "v.mp4")
    train, val = data_of(tree, val_root=str(tmp_path / "val")).find()
    assert (len(train.entries), len(val.entries)) == (13, 1)
    inner = tree / "a"
    train, val = data_of(tree, val_root=str(inner)).find()  # a folder inside is taken out of training
    assert len(train.entries) + len(val.entries) == 13
    assert not any(e.path.startswith("a/") for e in train.entries)
    with pytest.raises(DataError, match="nothing to train on"):
        data_of(inner, val_root=str(tree)).find()
    train, val = data_of(tree, val_root=str(tree)).find()
    assert train.entries == val.entries


def test_the_frame_rate_is_that_of_the_clips(tree):
    assert (data_of(tree).rate(), data_of(tree, stride=2).rate(), data_of(tree, fps=12).rate()) == (25, 12.5, 12)


def test_missing_and_empty_roots(tree, tmp_path):
    with pytest.raises(ConfigError, match=r"data.root: .*nowhere does not exist"):
        data_of(tmp_path / "nowhere").setup()
    with pytest.raises(ConfigError, match=r"data.val_root: .*nowhere does not exist"):
        fit(data_of(tree, val_root=str(tmp_path / "nowhere")), 1)
    with pytest.raises(ConfigError, match="is not a directory"):
        data_of(tree / "a" / "00.mp4").setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no videos under"):
        fit(data_of(tmp_path / "empty"), 1)


def test_bad_arguments_are_refused(tree):
    for options, message in (
        ({"batch": 0}, "data.batch=0: use at least 1"),
        ({"workers": -1}, "data.workers=-1"),
        ({"seed": -1}, "data.seed=-1"),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0"),
        ({"val_limit": 0}, "data.val_limit=0"),
        ({"prefetch": 0}, "data.prefetch=0"),
        ({"frames": 0}, "data: 0 frames"),
        ({"size": [8]}, "data: size"),
        ({"fps": 10, "stride": 2}, "exclude each other"),
    ):
        with pytest.raises(ConfigError, match=message):
            data_of(tree, **options)


@pytest.mark.parametrize("change", ["add", "remove", "rename", "touch", "grow"])
def test_changed_data_is_noticed_on_resume(tree, tmp_path, new_video, change, caplog):
    options = {"val_root": str(tree / "b")}
    _, trainer = fit(data_of(tree, **options), 3)
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    file = tree / "a" / "00.mp4"
    expected = {"add": r"\+1 / -0 / ~0", "remove": r"\+0 / -1 / ~0", "rename": r"\+1 / -1 / ~0"}.get(
        change, r"\+0 / -0 / ~1"
    )
    if change == "add":
        new_video(tree / "a" / "zz.mp4")
    elif change == "remove":
        file.unlink()
    elif change == "rename":
        file.rename(tree / "a" / "zz.mp4")
    elif change == "touch":
        os.utime(file)
    else:
        new_video(file, frames=30)
    with pytest.raises(DataError, match=rf"training files changed \({expected} of 9\).*data.on_change=warn"):
        fit(data_of(tree, **options), 5, ckpt=tmp_path / "3.ckpt")
    resumed, _ = fit(data_of(tree, **options, on_change="warn"), 5, ckpt=tmp_path / "3.ckpt")
    assert len(resumed.seen) == 2
    assert "training files changed" in caplog.text


def test_another_seed_is_noticed_on_resume(tree, tmp_path):
    _, trainer = fit(data_of(tree), 3)
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    with pytest.raises(DataError, match="the seed was 0 and is 1"):
        fit(data_of(tree, seed=1), 5, ckpt=tmp_path / "3.ckpt")


def test_new_validation_files_do_not_stop_a_resume(tree, tmp_path, new_video):
    options = {"val_root": str(tree / "b")}
    _, trainer = fit(data_of(tree, **options), 3)
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    new_video(tree / "b" / "zz.mp4")
    assert len(fit(data_of(tree, **options), 5, ckpt=tmp_path / "3.ckpt")[0].seen) == 2


def test_a_report_that_cannot_be_written_is_one_clear_error(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file"):
        data_of(tree, rejected=str(tmp_path / "file" / "rejected.jsonl")).setup()


def test_counting_changes(tree, monkeypatch):
    entries = data_of(tree).find()[0].entries
    assert compare(marks(entries), entries) == f"+0 / -0 / ~0 of {len(entries)}"
    before = marks(entries)
    monkeypatch.setattr(marking, "LISTED", 3)  # too many files to list each
    assert marks(entries) is None
    assert compare(before, entries) == compare(None, entries) == f"{len(entries)} now"


def test_rejected_short_and_quarantined_files_are_listed(tree, tmp_path, new_video):
    (tree / "a" / "noise.mp4").write_bytes(b"noise")
    new_video(tree / "a" / "tiny.mp4", frames=2)
    out = tmp_path / "out"
    data = data_of(tree, rejected=str(out / "rejected.jsonl"), max_bad=0.9)
    data.setup()
    lines = {line["path"]: line for line in read_lines(out / "rejected.jsonl")}
    assert {path: line["reason"] for path, line in lines.items()} == {"a/noise.mp4": "container", "a/tiny.mp4": "short"}
    assert {line["root"] for line in lines.values()} == {str(tree)}
    assert not (out / "short.jsonl").exists()
    victim = data.found[0].entries[0].path
    (tree / victim).write_bytes(b"gone bad")
    fit(data, 6)
    assert [line["path"] for line in read_lines(out / "quarantine.jsonl")] == [victim]
    data_of(tree, rejected=str(out / "rejected.jsonl"), short="pad").setup()
    assert {line["path"] for line in read_lines(out / "rejected.jsonl")} == {victim, "a/noise.mp4"}
    assert [line["path"] for line in read_lines(out / "short.jsonl")] == ["a/tiny.mp4"]


def test_all_bad_at_run_time_ends_the_fit(tree):
    data = data_of(tree, workers=2)
    data.setup()
    for entry in data.found[0].entries:
        (tree / entry.path).write_bytes(b"x")
    with pytest.raises(DataError, match="all their substitutes failed"):
        fit(data, 4)


def test_synthetic_data_trains_and_is_written_once(tmp_path):
    def data():
        return SyntheticData(
            str(tmp_path), videos=6, val_videos=2, frames=5, size=32, batch=2, workers=0, cache_dir=str(tmp_path / "c")
        )

    recorder, _ = fit(data(), 4)
    assert len(recorder.seen) == 4
    assert len(recorder.validated) == 1
    (folder,) = [path for path in tmp_path.iterdir() if path.name != "c"]
    files = sorted(folder.rglob("*.mp4"))
    assert len(files) == 8
    assert read(files[0]).shape == (9, 32, 32, 3)
    before = [path.stat().st_mtime_ns for path in files]
    data().setup()
    assert [path.stat().st_mtime_ns for path in files] == before


SCRIPT = """
import sys, json, importlib.util
import torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("test_module", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
tree, out, ckpt = sys.argv[2:5]
from pathlib import Path
if __name__ == "__main__":
    saves = [tests.SaveAt(Path(out), (3, 4))] if ckpt == "none" else []
    recorder, trainer = tests.fit(
        tests.data_of(tree, workers=1), 8, saves, None if ckpt == "none" else ckpt, devices=2, strategy="ddp"
    )
    name = f"{'straight' if ckpt == 'none' else Path(ckpt).stem}.{trainer.global_rank}.json"
    (Path(out) / name).write_text(json.dumps({"seen": recorder.seen, "validated": recorder.validated}))
"""


@pytest.mark.slow
def test_two_ranks_are_disjoint_complete_and_resume(tree, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT))

    def run(ckpt):
        command = [sys.executable, str(script), __file__, str(tree), str(tmp_path), ckpt]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        name = "straight" if ckpt == "none" else ckpt.rpartition("/")[2].removesuffix(".ckpt")
        return [json.loads((tmp_path / f"{name}.{rank}.json").read_text()) for rank in range(2)]

    ranks = run("none")
    train, val = data_of(tree).find()
    length = 3  # batches of two on two ranks
    for epoch in range(2):
        clips = [tuple(c) for r in ranks for b in r["seen"][epoch * length : (epoch + 1) * length] for c in b]
        assert len(set(clips)) == len(clips)
        assert {clip[2] for clip in clips if clip[3] == 0} == set(range(len(train.entries)))
    shown = [
        (i, r) for rank in ranks for batch in rank["validated"][:1] for i, r in zip(batch[0], batch[1], strict=True)
    ]
    assert sorted(i for i, repeat in shown if repeat == 0) == list(range(len(val.entries)))
    for step in (3, 4):
        resumed = run(str(tmp_path / f"{step}.ckpt"))
        for rank in range(2):
            assert resumed[rank]["seen"] == ranks[rank]["seen"][step:]


@pytest.mark.slow
def test_no_usable_data_ends_every_rank(tree, tmp_path):
    for path in tree.rglob("*.mp4"):
        path.write_bytes(b"x")
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), __file__, str(tree), str(tmp_path), "none"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)  # gloo waits 1800 s
    assert result.returncode != 0
    assert result.stderr.count("DataError: 0 of 13 files usable") >= 1
