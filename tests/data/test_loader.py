"""Loading: the same clips for any number of workers, from any batch on, and substitutes for what cannot be read."""

import os
import pickle
import random
import shutil
import time

import numpy as np
import pytest
import torch

from praxino.data.clips import ClipSampler
from praxino.data.loader import FailureLog, PlannedLoader, ResumableLoader
from praxino.data.plan import BatchPlan, permutation
from praxino.data.report import read_lines
from praxino.data.scan import scan
from praxino.data.transforms import Resize
from praxino.data.videos import Failure, VideoClips, collate
from praxino.errors import DataError
from praxino.video import DecodeFailure, Video, read

RANDOM = ClipSampler(4, 2, random_stride=True)
AUGMENT = Resize(16, flip=0.5, random_crop=True)


def clips_of(tree, clips=RANDOM, resize=AUGMENT, **options):
    options = {"seed": 5, "shuffle": True} | options
    return VideoClips(tree, scan(tree).videos, clips, resize, **options)


def loader_of(clips, kind=ResumableLoader, batch=3, log=None, **options):
    plan = BatchPlan(len(clips), batch, seed=clips.seed, shuffle=clips.shuffle, full=kind is ResumableLoader)
    return kind(clips, plan, log or FailureLog(str(clips.root), None, 0.9), **options)


def ids(batch):
    return list(
        zip(batch["epoch"].tolist(), batch["path"], batch["start"].tolist(), batch["repeat"].tolist(), strict=True)
    )


def equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert ids(a) == ids(b)
        assert torch.equal(a["video"], b["video"])
        assert torch.equal(a["fps"], b["fps"])


def spoil(tree, *names):
    for name in names:
        next(tree.rglob(f"{name}.mp4")).write_bytes(b"no video any more")


def test_a_clip_is_what_was_asked_for(tree):
    clips = clips_of(tree, ClipSampler(4, 2, where="start"), Resize(None), shuffle=False)
    for k in range(len(clips)):
        sample = clips[k]
        assert sample["video"].dtype == torch.uint8
        assert torch.equal(sample["video"], read(tree / sample["path"], [0, 2, 4, 6]))
        assert (sample["index"], sample["repeat"], sample["start"], sample["epoch"]) == (k, 0, 0, 0)
        assert sample["fps"] == pytest.approx(12.5)
        assert sample["failures"] == []


def test_chance_is_a_function_of_seed_epoch_and_index(tree):
    clips = clips_of(tree)
    assert torch.equal(clips[3, 7]["video"], clips_of(tree)[3, 7]["video"])
    drawn = [(c["start"], c["fps"]) for c in (clips[epoch, 7] for epoch in range(20))]
    assert len(set(drawn)) > 5
    assert drawn != [(c["start"], c["fps"]) for c in (clips_of(tree, seed=6)[epoch, 7] for epoch in range(20))]
    again = clips[0, 7 + len(clips)]  # the repetition of a video within an epoch
    assert (again["path"], again["repeat"]) == (clips[0, 7]["path"], 1)
    state, python = torch.get_rng_state(), random.getstate()
    _ = clips[1, 2]
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python


def test_workers_change_nothing(tree):
    plain = loader_of(clips_of(tree))
    first, second = list(plain), list(plain)
    assert len(first) == len(plain) == 5
    assert {e for batch in second for e in batch["epoch"].tolist()} == {1}
    assert {path for batch in first for path in batch["path"]} == {entry.path for entry in plain.dataset.entries}
    assert first[0]["video"].shape == (3, 4, 16, 16, 3)
    for workers in (1, 2):
        loader = loader_of(clips_of(tree), workers=workers)
        torch.manual_seed(workers)
        before = torch.get_rng_state()
        equal(list(loader), first)
        equal(list(loader), second)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_from_every_batch(tree, workers):
    straight = loader_of(clips_of(tree))
    batches = [batch for _ in range(3) for batch in straight]
    stops = range(len(batches) + 1) if workers == 0 else (3, 5, 10)
    for stop in stops:
        running = loader_of(clips_of(tree), workers=workers)
        taken = 0
        while taken < stop:
            for _ in running:
                taken += 1
                if taken == stop:
                    break
        state = running.state_dict()
        assert state["position"] == stop
        resumed = loader_of(clips_of(tree), workers=workers)
        resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
        rest = []
        while len(rest) < len(batches) - stop:
            rest += list(resumed)
        equal(rest, batches[stop:])


def test_a_chain_of_resumes_over_ends_of_epochs(tree):
    straight = loader_of(clips_of(tree))
    batches = [batch for _ in range(4) for batch in straight]
    state, chain = {"position": 0, "length": 5, "clips": 3, "seed": 5}, []
    for take in (4, 1, 5, 7, 3):
        loader = loader_of(clips_of(tree))
        loader.load_state_dict(state)
        part = []
        while len(part) < take:
            for batch in loader:
                part.append(batch)
                if len(part) == take:
                    break
        chain += part
        state = loader.state_dict()
    equal(chain, batches)


def test_resume_under_another_batch_size_goes_on_in_the_epoch(tree, caplog):
    loader = loader_of(clips_of(tree), batch=2)
    loader.load_state_dict({"position": 5 + 3, "length": 5, "clips": 3, "seed": 5})  # 9 clips of epoch 1
    assert loader.position == 7 + 4
    assert "goes on at batch 4" in caplog.text
    assert next(iter(loader))["epoch"].tolist() == [1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_has_a_deterministic_substitute(tree, workers, tmp_path):
    clips = clips_of(tree)
    entries = [entry.path for entry in clips.entries]
    good = list(loader_of(clips))
    spoil(tree, "04", "11")
    bad = {"b/04.mp4", "c/11.mp4"}
    log = FailureLog(str(tree), tmp_path / "out" / "quarantine.jsonl", 0.9)
    loader = loader_of(clips, workers=workers, log=log)
    replaced = list(loader)
    order = [entries[i] for i in permutation(13, 5, 0)]
    fillers = len(good) * 3 - 13
    for before, after in zip(good, replaced, strict=True):
        for row, (old, new) in enumerate(zip(before["path"], after["path"], strict=True)):
            if old not in bad:
                assert new == old
                assert torch.equal(before["video"][row], after["video"][row])
                continue
            place = order.index(old) + 1
            while order[place % 13] in bad:
                place += 1
            assert new == order[place % 13]  # the next good one in the order of the epoch
            assert entries[after["index"][row]] == new
            assert after["video"][row].float().std() > 0
    assert log.clips == 15
    assert 2 <= log.failed <= 2 + fillers + 1
    assert {failure.path for failure in log.known.values()} == bad
    lines = list(read_lines(log.path))
    assert sorted(line["path"] for line in lines) == sorted(bad)
    assert {line["reason"] for line in lines} == {"container"}
    list(loader)
    assert len(list(read_lines(log.path))) == 2  # each file is listed once
    assert log.failed >= 4


def test_a_file_that_vanishes_or_changes_is_noticed(tree):
    clips = clips_of(tree, shuffle=False)
    (tree / "a" / "00.mp4").unlink()
    assert [f.reason for f in clips[0]["failures"]] == ["missing"]
    assert clips[0]["path"] == "a/03.mp4"


@pytest.mark.parametrize("workers", [0, 2])
def test_when_all_fail_the_run_ends_at_once_with_one_line(tree, workers):
    clips = clips_of(tree)
    spoil(tree, *[f"{k:02d}" for k in range(13)])
    with pytest.raises(DataError, match=r"1 clips and all their substitutes .* \(9 container\)\. First: ") as error:
        list(loader_of(clips, batch=1, workers=workers))
    assert "\n" not in str(error.value)
    assert len(pickle.dumps(error.value)) < 2000


def test_too_many_failures_end_the_run(tree):
    clips = clips_of(tree)
    spoil(tree, "00", "01")
    log = FailureLog(str(tree), None, max_bad=0.1, after=20)
    loader = loader_of(clips, log=log)
    list(loader)  # 15 clips: too early to judge
    with pytest.raises(DataError, match=r"\d of 21 clips failed, more than max_bad=0.1 .*\(2 container\)"):
        list(loader)


class Broken(ClipSampler):
    """Fails as decoders do: with exceptions that cannot be sent between processes."""

    def indices(self, length, rng, times=None):
        class Local(Exception):
            def __init__(self, first, second):
                super().__init__("two arguments\nand lines \udce9")

        raise Local(1, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_exception_leaves_a_worker(tree, workers):
    clips = clips_of(tree, Broken(4))
    with pytest.raises(DataError, match=r"\(\d+ error\)\. First: .*Local: 'two arguments.nand lines .udce9'"):
        list(loader_of(clips, workers=workers))


class Deadly(ClipSampler):
    """Kills its process, or blocks it."""

    def indices(self, length, rng, times=None):
        if self.short == "pad":
            time.sleep(600)
        import os

        os._exit(1)


@pytest.mark.parametrize("short", ["drop", pytest.param("pad", marks=pytest.mark.slow)])
def test_a_worker_that_dies_or_hangs_ends_the_run_with_one_line(tree, short):
    loader = loader_of(clips_of(tree, Deadly(4, short=short)), workers=1, timeout=2)
    with pytest.raises(DataError, match="a decoding process died or hung") as error:
        list(loader)
    assert "\n" not in str(error.value)


def test_failures_and_entries_can_be_sent_between_processes(tree):
    clips = clips_of(tree)
    copy = pickle.loads(pickle.dumps(clips))
    assert torch.equal(copy[0, 1]["video"], clips[0, 1]["video"])
    failure = pickle.loads(pickle.dumps(DecodeFailure("a\udce9\n.mp4", "corrupt", "x")))
    assert (failure.path, failure.reason, failure.detail) == ("a\udce9\n.mp4", "corrupt", "x")


@pytest.mark.parametrize("workers", [0, 2])
def test_names_in_any_encoding_reach_the_batch(tree, workers, tmp_path):
    for k, name in enumerate((b"caf\xe9.mp4", b"new\nline.mp4", "видео 🎬.mp4".encode())):
        shutil.copy(tree / "a" / "12.mp4", os.path.join(os.fsencode(tree), name))
        (tree / "abc"[k] / f"{k:02d}.mp4").unlink()
    clips = clips_of(tree)
    log = FailureLog(str(tree), tmp_path / "quarantine.jsonl", 0.9)
    paths = {os.fsencode(path) for batch in loader_of(clips, workers=workers, log=log) for path in batch["path"]}
    assert {b"caf\xe9.mp4", b"new\nline.mp4", "видео 🎬.mp4".encode()} < paths
    os.truncate(os.path.join(os.fsencode(tree), b"caf\xe9.mp4"), 9)
    list(loader_of(clips, workers=workers, log=log))
    assert [os.fsencode(line["path"]) for line in read_lines(log.path)] == [b"caf\xe9.mp4"]


def test_a_target_rate_reads_the_frames_shown_at_those_times(shared):
    folder = shared("data/hostile/odd")
    (entry,) = [entry for entry in scan(folder).videos if entry.path == "vfr.mp4"]  # 0.04 to 0.16 s from frame to frame
    clips = VideoClips(folder, [entry], ClipSampler(8, fps=5, where="start"), Resize(None))
    with Video(folder / "vfr.mp4") as video:
        times = video.timestamps
        nearly = 1e-7 * np.arange(len(times))  # the earlier of two equally near
        wanted = [int((np.abs(times - k / 5) + nearly).argmin()) for k in range(8)]
        assert len(set(np.diff(wanted))) > 1
        assert torch.equal(clips[0]["video"], video.read(wanted))


def test_hostile_files_can_be_trained_on(shared):
    """Damaged files that the scan admits end in substitutes at most."""
    entries = scan(shared("data/hostile"), images=True).videos
    clips = VideoClips(shared("data/hostile"), entries, ClipSampler(5, short="slow"), Resize(16), shuffle=True)
    log = FailureLog("hostile", None, 0.5)
    batches = list(loader_of(clips, workers=2, log=log))
    assert sum(len(batch["path"]) for batch in batches) >= len(entries)
    assert log.failed < 10
    assert all(failure.detail for failure in log.known.values())


def test_without_substitutes_a_bad_video_is_left_out(tree):
    clips = clips_of(tree, ClipSampler(4, where="start"), Resize(16), shuffle=False, tries=0)
    spoil(tree, "00")
    batch = collate([clips[0], clips[1]])
    assert batch["missing"] == 1
    assert batch["path"] == [clips.entries[1].path]
    assert [type(f) for f in batch["failures"]] == [Failure]
    assert "video" not in collate([clips[0]])


def test_sizes_that_differ_are_one_clear_message(tree, new_video):
    new_video(tree / "tall.mp4", size=(64, 32))
    clips = clips_of(tree, ClipSampler(4), Resize(32, "keep"))
    with pytest.raises(DataError, match=r"different sizes in a batch.*batch=1 or mode=crop"):
        list(loader_of(clips, batch=14))
    shapes = {tuple(batch["video"].shape[2:4]) for batch in loader_of(clips, batch=1)}
    assert shapes == {(32, 40), (64, 32)}


def test_validation_is_the_same_every_time(tree):
    clips = clips_of(tree, ClipSampler(4, where="center"), Resize(16), shuffle=False)
    loader = loader_of(clips, PlannedLoader, batch=4)
    first = list(loader)
    assert [index for batch in first for index in batch["index"].tolist()] == list(range(13))
    assert {s for batch in first for s in batch["start"].tolist()} == {4}
    equal(list(loader), first)


def test_workers_use_one_thread_and_leave_interrupts_to_the_main_process(tree):
    class Report(ClipSampler):
        def indices(self, length, rng, times=None):
            import signal

            ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            return np.array([torch.get_num_threads(), int(ignored)])

    batch = next(iter(loader_of(clips_of(tree, Report(2)), workers=1)))
    assert set(batch["start"].tolist()) == {1}
    assert batch["fps"][0] == pytest.approx(25)  # from thread 1 to flag 1: no step


@pytest.mark.slow
def test_workers_started_afresh_give_the_same(tree):
    first = list(loader_of(clips_of(tree)))
    equal(list(loader_of(clips_of(tree), workers=2, context="spawn")), first)
