"""Stages: finished ones are skipped, killed ones go on, changed settings reach what is built on them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from praxino.errors import BusyError, ConfigError, PraxinoError
from praxino.tasks import stages as module
from praxino.tasks.stages import Stage, overrides, run_stages

# stands for a command: appends to a log, writes its number, and does what `do` says
PROGRAM = """
import os, pathlib, signal, sys, time
given = dict(word.split("=", 1) for word in sys.argv[1:])
out = pathlib.Path(given["out"])
out.mkdir(parents=True, exist_ok=True)
with open(out.parent / "calls", "a") as calls:
    calls.write(out.name + (" again" if "ckpt" in given else "") + "\\n")
(out / "half").touch()
if given["do"] == "fail" or (given["do"] == "begin" and "ckpt" not in given):
    sys.exit(6)
if given["do"] == "wait" and "ckpt" not in given:
    time.sleep(600)
(out / "whole").write_text(given["do"])
"""


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "program", lambda command: [sys.executable, "-c", PROGRAM])


def chain(**do: str) -> list[Stage]:
    """a -> b -> d, and c for itself."""

    def again(folder: Path) -> list[str] | None:
        return ["ckpt=last"] if (folder / "half").exists() else None

    inputs = {"a": (), "b": ("a",), "c": (), "d": ("b",)}
    return [Stage(name, "x", {"do": do.get(name, "work")}, inputs[name], resume=again) for name in inputs]


def run(out: Path, **do: str) -> list[str]:
    """Run the chain; return what was called."""
    (out / "calls").unlink(missing_ok=True)
    for stamp in run_stages(chain(**do), out):
        assert stamp["seconds"] >= 0
    return (out / "calls").read_text().splitlines() if (out / "calls").exists() else []


def test_finished_stages_are_skipped_and_changes_reach_what_is_built_on_them(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out) == ["a", "b", "c", "d"]
    assert run(out) == []
    assert run(out, b="other") == ["b", "d"]
    assert (out / "b" / "whole").read_text() == "other"
    (out / "stages" / "a.json").unlink()
    assert run(out, b="other") == ["a", "b", "d"]
    (out / "c" / "whole").rename(out / "kept")
    for path in (out / "c").iterdir():
        path.unlink()
    (out / "c").rmdir()
    assert run(out, b="other") == ["c"]
    (out / "stages" / "d.json").write_text("{")
    assert run(out, b="other") == ["d"]
    moved = out.rename(tmp_path / "moved")
    assert run(moved, b="other") == []


def test_files_of_others_that_have_changed_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was made of them stays: it may have taken days."""
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    (videos / "a.mp4").touch()
    stages = [Stage("a", "x", {"do": "work"}, reads=(str(videos),)), Stage("b", "x", {"do": "work"}, ("a",))]
    for added, warned in (("a.mp4", 0), ("a.mp4", 0), ("b.mp4", 1)):
        (videos / added).write_bytes(b"1")
        os.utime(videos / added, ns=(0, 0))
        caplog.clear()
        found = [stamp["skipped"] for stamp in run_stages(stages, out)]
        messages = [r.getMessage() for r in caplog.records if "has changed since" in r.getMessage()]
        assert len(messages) == warned
    assert found == [True, True]
    assert messages == [f"{videos} has changed since: to run the stage anew, remove {out / 'stages' / 'a.json'}"]
    (out / "stages" / "a.json").unlink()
    assert not any(stamp["skipped"] for stamp in run_stages(stages, out))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings since the last call."""
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return found


def test_only_videos_count_among_the_files_of_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those in folders that are links, too, and a root without any is missing."""
    videos, linked, out = tmp_path / "videos", tmp_path / "linked", tmp_path / "out"
    for folder in (videos, linked):
        folder.mkdir()
        (folder / "a.mp4").touch()
    (videos / "link").symlink_to(linked)
    stages = [Stage("a", "x", {"do": "work"}, reads=(str(videos),))]
    list(run_stages(stages, out))
    (videos / "README").touch()
    (videos / ".DS_Store").touch()
    assert [stamp["skipped"] for stamp in run_stages(stages, out)] == [True]
    assert told(caplog) == []
    (linked / "b.mp4").touch()
    list(run_stages(stages, out))
    assert "has changed since" in told(caplog)[0]
    videos.rename(tmp_path / "gone")
    for _ in range(2):  # it need not be gone: an empty place to mount it is left
        assert [stamp["skipped"] for stamp in run_stages(stages, out)] == [True]
        assert told(caplog) == [f"{videos} is missing, or holds no videos"]
        videos.mkdir(exist_ok=True)


def test_a_stage_that_goes_on_with_other_videos_tells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And its stamp tells of those that it began with."""
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    (videos / "a.mp4").touch()

    stages = [Stage("b", "x", {"do": "begin"}, reads=(str(videos),), resume=lambda folder: ["ckpt=last"])]
    with pytest.raises(PraxinoError):
        list(run_stages(stages, out))
    (videos / "a.mp4").write_bytes(b"another")
    for skipped, remedy in ((False, "the stage goes on with it"), (True, "to run the stage anew")):
        assert told(caplog) == []
        (stamp,) = run_stages(stages, out)
        assert (stamp["skipped"], stamp["resumed"]) == (skipped, True)
        (warning,) = told(caplog)
        assert warning.startswith(f"{videos} has changed since: {remedy}")


def test_a_failure_stops_the_chain_and_is_mended_by_the_same_command(tmp_path: Path) -> None:
    with pytest.raises(PraxinoError, match=r"stage b: .* exit code 6") as caught:
        run(tmp_path, b="fail")
    assert caught.value.exit_code == 6
    assert (tmp_path / "calls").read_text().splitlines() == ["a", "b"]
    assert run(tmp_path) == ["b", "c", "d"]  # other settings: from the start


def start(out: Path, **do: str) -> subprocess.Popen:
    """Run the chain in a process of its own, until its stage b runs."""
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
    code += "import pathlib, test_stages as t\nfrom praxino.errors import PraxinoError\n"
    code += "t.module.program = lambda command: [sys.executable, '-c', t.PROGRAM]\n"
    code += f"try:\n    t.run(pathlib.Path({str(out)!r}), **{do!r})\n"
    code += "except PraxinoError as error:\n    sys.exit(error.exit_code)"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 200
    while not (out / "b" / "half").exists():
        assert process.poll() is None, "ended before its time"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_an_interrupted_stage_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, b="wait")
    with pytest.raises(BusyError, match="in use"):
        run(tmp_path, b="wait")
    process.send_signal(signal.SIGTERM)  # is passed on to the command
    assert process.wait(200) == 128 + signal.SIGTERM
    assert run(tmp_path, b="wait") == ["b again", "c", "d"]


def test_a_killed_pipeline_leaves_a_command_that_keeps_others_out(tmp_path: Path) -> None:
    process = start(tmp_path, b="wait")
    process.kill()
    process.wait(200)
    (orphan,) = [
        int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and str(tmp_path / "b") in arguments(p)
    ]
    with pytest.raises(BusyError, match="outlived"):
        run(tmp_path, b="wait")
    os.kill(orphan, signal.SIGKILL)
    deadline = time.monotonic() + 200
    while not ended(orphan):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run(tmp_path, b="other") == ["b", "c", "d"]  # with other settings from the start
    assert not json.loads((tmp_path / "stages" / "b.json").read_text())["resumed"]


def arguments(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def ended(pid: int) -> bool:
    """Whether a process is gone or a zombie: only then are its files closed, and with them its locks."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_files_of_others_are_not_removed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").touch()
    with pytest.raises(ConfigError, match="no stage has made"):
        run(tmp_path)
    assert (tmp_path / "a" / "mine").exists()


@pytest.mark.parametrize(
    "value",
    [1, 2.5e-7, True, None, "text", "12", "1e3", "null", "a b", "it's", "a\\'b", "end\\", "c:\\x", "x=1,y", "[a]", "",
     "/a/b.mp4", [1, "a b", None], "{k: v}", "10%", "é"],
)  # fmt: skip
def test_settings_are_read_back_as_they_were(value: Any) -> None:
    words = overrides({"a": {"b": value}, "c": 1})
    first, _ = OverridesParser.create().parse_overrides(words)
    found = first.value()
    assert first.key_or_group == "a.b"
    unquoted = [getattr(item, "text", item) for item in (found if isinstance(found, list) else [found])]
    assert unquoted == (value if isinstance(value, list) else [value])
