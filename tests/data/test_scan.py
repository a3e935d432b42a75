"""The scan finds every video once, whatever else the tree holds, and remembers what it saw."""

import csv
import io
import json
import os
import shutil
import tarfile
import time
from pathlib import Path

import pytest

from praxino.data import scan as module
from praxino.data.clips import ClipSampler
from praxino.data.report import read_lines
from praxino.data.scan import Manifest, Rejection, scan
from praxino.data.usable import find_usable, split
from praxino.errors import ConfigError, DataError
from praxino.video import read, write


def names(manifest):
    return [entry.path for entry in manifest.videos]


def reasons(manifest):
    return {rejection.path: rejection.reason for rejection in manifest.rejected}


def count_probes(monkeypatch):
    probed = []
    original = module.run_all

    def spy(function, calls, workers):
        probed.extend(calls)
        return original(function, calls, workers)

    monkeypatch.setattr(module, "run_all", spy)
    return probed


def test_finds_files_folders_and_pictures_at_any_depth(tmp_path, new_video):
    root = tmp_path / "data"
    new_video(root / "top.mp4")
    new_video(root / "a/b/c/d/e/f/deep.mkv", frames=5)
    new_video(root / "UPPER.MP4")
    new_video(root / "loop.gif", frames=4)
    clip = read(root / "top.mp4")
    write(root / "frames" / "one", clip[:6], 25, codec="png")
    write(root / "pair", clip[:3], 25, codec="png")
    for k, name in enumerate(sorted(os.listdir(root / "pair"))):
        shutil.copy(root / "pair" / name, root / "pair" / f"left_{k}.png")
        os.rename(root / "pair" / name, root / "pair" / f"right_{k}.png")
    (root / "single").mkdir()
    shutil.copy(next((root / "frames" / "one").iterdir()), root / "single" / "only.png")
    (root / "notes.txt").write_text("not a video")
    (root / "empty").mkdir()
    manifest = scan(root)
    expected = ["UPPER.MP4", "a/b/c/d/e/f/deep.mkv", "frames/one", "loop.gif", "pair/left_*", "pair/right_*", "top.mp4"]
    assert names(manifest) == expected
    assert [entry.info.frames for entry in manifest.videos] == [12, 5, 6, 4, 3, 3, 12]
    assert manifest.rejected == []
    assert manifest.ignored == 2  # the text and the lone picture
    assert names(scan(root, images=True)) == sorted([*expected, "single/only.png"])
    assert names(scan(root, workers=1)) == expected


def test_refreshes_what_changed_and_only_that(tree, tmp_path, new_video, monkeypatch):
    probed = count_probes(monkeypatch)
    cache = tmp_path / "cache"
    first = scan(tree, cache_dir=cache)
    assert len(probed) == len(first.videos) == 13
    again = scan(tree, cache_dir=cache)
    assert len(probed) == 13
    assert again == first
    assert again.fingerprint == first.fingerprint

    del probed[:]
    new_video(tree / "a" / "00.mp4", frames=20)
    os.utime(tree / "b" / "01.mp4", ns=(1, 1))
    (tree / "c" / "02.mp4").unlink()
    new_video(tree / "new" / "x.mp4")
    changed = scan(tree, cache_dir=cache)
    assert sorted(probed) == ["a/00.mp4", "b/01.mp4", "new/x.mp4"]
    assert changed.fingerprint != first.fingerprint
    assert {e.path: e.info.frames for e in changed.videos}["a/00.mp4"] == 20
    assert len(changed.videos) == 13
    assert not any(tree in path.parents for path in cache.rglob("*"))  # nothing is written into the data
    assert sorted(p.suffix for p in tree.rglob("*") if p.is_file()) == [".mp4"] * 13


def test_frames_of_a_folder_are_watched(tmp_path, new_video, monkeypatch):
    root = tmp_path / "data"
    write(root / "seq", read(new_video(tmp_path / "x.mp4"))[:4], 25, codec="png")
    probed = count_probes(monkeypatch)
    assert scan(root).videos[0].info.frames == 4
    assert scan(root).videos[0].info.frames == 4
    assert len(probed) == 1
    sorted((root / "seq").iterdir())[-1].unlink()
    assert scan(root).videos[0].info.frames == 3
    assert len(probed) == 2


@pytest.mark.parametrize(
    "damage", ["", "not json\n", '{"format": 99}\n', '{"format": 1}\n{"path": "a/00.mp4"}\n', "\xff"]
)
def test_a_damaged_cache_is_made_anew(tree, tmp_path, damage):
    cache = tmp_path / "cache"
    first = scan(tree, cache_dir=cache)
    (file,) = (cache / "manifests").iterdir()
    file.write_bytes(damage.encode("latin-1"))
    assert scan(tree, cache_dir=cache) == first
    assert next(read_lines(file))["format"] == 1
    assert [p.name for p in file.parent.iterdir()] == [file.name]  # no temporary file is left


def test_a_cache_that_cannot_be_written_is_no_error(tree, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert len(scan(tree, cache_dir=tmp_path / "file" / "cache").videos) == 13
    assert "no cache in" in caplog.text


def test_links_loops_pipes_and_names(tmp_path, new_video):
    root = tmp_path / "data"
    real = new_video(root / "sub" / "real.mp4", frames=9)
    (root / "loop" / "inner").mkdir(parents=True)
    (root / "loop" / "inner" / "back").symlink_to("..")
    (root / "loop" / "self").symlink_to("self")
    (root / "self.mp4").symlink_to("self.mp4")
    (root / "dangling.mp4").symlink_to("/nonexistent/clip.mp4")
    (root / "alias.mp4").symlink_to(real)
    os.link(real, root / "zz_hard.mp4")
    outside = new_video(tmp_path / "outside" / "far.mp4", frames=7)
    (root / "linked.mp4").symlink_to(outside)
    (root / "linked_folder").symlink_to(tmp_path / "outside")
    os.mkfifo(root / "pipe.mp4")
    (root / "folder like a clip.mp4").mkdir()
    shutil.copy(real, root / "folder like a clip.mp4" / "inside.mp4")
    odd = [
        b"caf\xe9_latin1.mp4",
        b"new\nline.mp4",
        b"-dash.mp4",
        b"comma, =()[].mp4",
        b"x" * 251 + b".mp4",
        b"trail .mp4",
    ]
    for name in odd:
        shutil.copy(real, os.path.join(os.fsencode(root), name))
    manifest = scan(root, cache_dir=tmp_path / "cache")
    expected = ["folder like a clip.mp4/inside.mp4", "linked.mp4", "sub/real.mp4", *map(os.fsdecode, odd)]
    assert names(manifest) == sorted(expected, key=os.fsencode)
    assert reasons(manifest) == {"dangling.mp4": "missing", "pipe.mp4": "not_a_file", "self.mp4": "not_a_file"}
    assert scan(root, cache_dir=tmp_path / "cache") == manifest  # names survive the cache
    manifest.write_rejected(tmp_path / "rejected.jsonl")
    assert [line["path"] for line in read_lines(tmp_path / "rejected.jsonl")] == sorted(reasons(manifest))
    both = [*expected, "alias.mp4", "zz_hard.mp4"]
    assert names(scan(root, cache_dir=tmp_path / "cache", aliases=True)) == sorted(both, key=os.fsencode)
    followed = scan(root, follow_links=True)
    assert names(followed) == names(manifest)  # far.mp4 is there already, and the loop ends
    (root / "linked.mp4").unlink()
    assert "linked_folder/far.mp4" in names(scan(root, follow_links=True))
    assert "linked_folder/far.mp4" not in names(scan(root))


def test_unreadable_files_and_folders_are_rejected(tmp_path, new_video, monkeypatch):
    """As root everything is readable, so the refusal of the system is played where it does not come by itself."""
    root = tmp_path / "data"
    new_video(root / "good.mp4")
    locked = new_video(root / "locked" / "inside.mp4").parent
    locked.chmod(0)
    refuses = not os.access(locked, os.R_OK)
    listing = os.scandir

    def scandir(path):
        if not refuses and os.fspath(path) == str(locked):
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(module.os, "scandir", scandir)
    try:
        manifest = scan(root)
    finally:
        locked.chmod(0o700)
    assert names(manifest) == ["good.mp4"]
    assert reasons(manifest) == {"locked": "permission"}


def test_a_decoder_that_hangs_or_crashes_is_survived(tree, monkeypatch):
    original = module._inspect

    def inspect(path, index_dir):
        if path.endswith("00.mp4"):
            time.sleep(600)
        if path.endswith("01.mp4"):
            os.abort()
        return original(path, index_dir)

    def run_all(function, calls, workers):
        assert all(limit >= 300 for _, limit in calls.values())
        limits = {path: (given, 2.0 if path.endswith("00.mp4") else limit) for path, (given, limit) in calls.items()}
        return original_run_all(function, limits, workers)

    original_run_all = module.run_all
    with monkeypatch.context() as patched:
        patched.setattr(module, "run_all", run_all)
        patched.setattr(module, "_inspect", inspect)
        manifest = scan(tree, timeout=300.0)
    assert reasons(manifest) == {"a/00.mp4": "timeout", "b/01.mp4": "crash"}
    assert len(manifest.videos) == 11
    assert len(scan(tree).videos) == 13  # such failures are tried again


def test_a_bar_on_a_slow_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock = iter(range(100))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    for terminal, show, expected in ((True, True, True), (True, False, False), (False, True, False)):
        out = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr(module.sys, "stderr", out)
        items = [(str(k), k) for k in range(5)]
        assert list(module._with_bar(iter(items), 5, show)) == items
        assert ("probing videos" in out.getvalue()) == expected


def test_hostile_files(shared, tmp_path):
    source = shared("data/hostile")
    root = tmp_path / "hostile"
    shutil.copytree(source, root)
    with tarfile.open(root / "names.tar") as archive:
        archive.extractall(root, filter="tar")
    manifest = scan(root, images=True)
    rejected, found = reasons(manifest), names(manifest)
    with (source / "MANIFEST.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    refused = {"odd/huge_8000x8000.mkv", "odd/huge_8000x8000.mp4", "folders/mixed_sizes"}  # too large, several sizes
    left_out = {"names/download.mp4.part", "names/no_extension"}  # by suffix
    frames = {entry.path: entry.info.frames for entry in manifest.videos}
    for path, row in rows.items():
        path = path.rstrip("/")
        inside = [name for name in found if name == path or name.startswith(path + "/")]
        if row["note"].startswith("expect=skip"):
            assert not inside, path
            assert path in rejected or path.endswith(".txt"), path
        elif row["note"].startswith("expect=ok"):
            assert (path in rejected) == (path in refused), (path, rejected.get(path))
            assert bool(inside) == (path not in refused | left_out), path
            if row["container"] != "image folder" and inside and path != "odd/two_video_streams.mkv":
                assert frames[path] == int(row["frames"]), path
        else:
            assert inside or path in rejected, path
    assert all(rejection.detail for rejection in manifest.rejected)
    manifest.write_rejected(tmp_path / "rejected.jsonl")
    assert len((tmp_path / "rejected.jsonl").read_text("ascii").splitlines()) == len(manifest.rejected)


def test_nothing_usable_ends_with_one_line(tmp_path, tree, new_video):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"no videos under .*empty \(no files at all"):
        find_usable(empty, ClipSampler())
    (empty / "a.txt").write_text("x")
    with pytest.raises(DataError, match="1 other files"):
        find_usable(empty, ClipSampler())
    for k in range(7):
        (empty / f"{k}.mp4").write_bytes(b"noise" * k)
    with pytest.raises(
        DataError, match=r"0 of 7 files usable under .*\(6 container, 1 empty\)\. First: '0.mp4'"
    ) as error:
        find_usable(empty, ClipSampler())
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"13 of 13 videos .* too short for 17 frames at stride 2"):
        find_usable(tree, ClipSampler(17, 2))
    with pytest.raises(ConfigError, match="does not exist"):
        scan(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is not a directory"):
        scan(new_video(tmp_path / "file.mp4"))


@pytest.mark.parametrize("short", ["drop", "pad", "slow"])
def test_short_videos_are_never_silent(tree, new_video, caplog, short):
    new_video(tree / "tiny.mp4", frames=3)
    usable = find_usable(tree, ClipSampler(9, short=short))
    assert [note.path for note in usable.short] == ["tiny.mp4"]
    assert len(usable.entries) == (13 if short == "drop" else 14)
    assert [r.path for r in usable.rejected] == (["tiny.mp4"] if short == "drop" else [])
    assert f"1 of 14 videos under {str(tree)!r} are too short for 9 frames" in caplog.text
    assert f"(short={short})" in caplog.text


def test_split_is_stable_and_never_empty(tree, new_video):
    entries = scan(tree).videos
    train, val = split(entries, 0.3)
    assert sorted(e.path for e in train + val) == [e.path for e in entries]
    more = scan(new_video(tree / "zz.mp4").parent).videos
    train2, val2 = split(more, 0.3)
    assert {e.path for e in val} <= {e.path for e in val2}
    assert {e.path for e in train} <= {e.path for e in train2}
    for count in (2, 3, 13):
        for fraction in (1e-9, 0.1, 0.5, 0.999):
            train, val = split(entries[:count], fraction)
            assert train
            assert val
            assert len(train) + len(val) == count
    assert split(entries, 0) == (entries, [])
    assert split(entries[:1], 0.1) == (entries[:1], entries[:1])


def test_rejected_lines_are_ascii_json(tmp_path):
    path = os.fsdecode(b"caf\xe9\n.mp4")
    Manifest("/r", [], [Rejection(path, "container", "x")]).write_rejected(tmp_path / "out" / "rejected.jsonl")
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_bytes().splitlines()
    assert os.fsencode(json.loads(line.decode("ascii"))["path"]) == b"caf\xe9\n.mp4"
    assert json.loads(line).keys() == {"path", "reason", "detail"}
    assert Path(tmp_path / "out" / "rejected.jsonl").stat().st_size == len(line) + 1


def test_the_home_directory_may_be_written_as_a_tilde(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree.parent))
    assert scan("~/tree").root == str(tree)
