"""Folders of samples and predictions: taken again after a kill, of one run alone, and nothing of others is removed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dit_run import SIZE, make_run
from praxino import video
from praxino.data.synthetic import draw
from praxino.errors import BusyError, ConfigError, DataError
from praxino.models.dit import VideoDiT
from praxino.tasks.evaluation.pairs import read_tree
from praxino.tasks.evaluation.score import Reading
from praxino.tasks.outputs import check_finished, written
from praxino.tasks.predict import predict
from praxino.tasks.sample import sample


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_run(tmp_path_factory.mktemp("run") / "run", drop=None))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def killed(monkeypatch: pytest.MonkeyPatch, calls: int, function: Callable[[], Any]) -> None:
    """Call a function that ends, as a killed process would, once the network has been called so often."""
    forward, seen = VideoDiT.forward, []

    def killing(self: VideoDiT, *args: Any, **named: Any) -> Any:
        seen.append(0)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return forward(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(VideoDiT, "forward", killing)
        with pytest.raises(KeyboardInterrupt):
            function()


def test_samples_of_a_killed_run(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    settings: dict[str, Any] = {"steps": 1, "batch": 1, "device": "cpu"}
    reading = Reading(frames=9, size=SIZE, cache_dir=str(tmp_path / "cache"))
    sample(run, str(out), n=3, save_latents=True, **settings)
    first = (out / "00000.mp4").read_bytes()
    (out / "00009.mp4").write_bytes(b"of the user")
    killed(monkeypatch, 1, lambda: sample(run, str(out), n=3, seed=1, **settings))
    assert files(out) == {"00000.mp4", "00009.mp4", "samples.jsonl"}
    assert (out / "00000.mp4").read_bytes() != first
    row = json.loads((out / "samples.jsonl").read_text())
    assert (row["unfinished"], row["ckpt"], row["seed"]) == (True, run, 1)
    for read in (reading.find, lambda root: read_tree(str(root), None)):
        with pytest.raises(DataError, match=r"samples\.jsonl is of a run that did not finish: run it again"):
            read(out)
    sample(run, str(out), n=2, **settings)
    assert files(out) == {"00000.mp4", "00001.mp4", "00009.mp4", "protocol.json", "samples.jsonl", "sheet.png"}
    assert (out / "00000.mp4").read_bytes() == first
    assert [entry.path for entry in reading.find(out).entries] == ["00000.mp4", "00001.mp4"]
    with pytest.raises(ConfigError, match=r"00009\.mp4' exists and is not of an earlier run"):
        sample(run, str(out), n=10, **settings)
    assert (out / "00001.mp4").exists()


def test_predictions_of_a_killed_run(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("a.mp4", "deep/b.mp4")):
        video.write(tmp_path / "in" / name, draw(0, frames=9, size=SIZE, seed=seed)[1], 12, "lossless")
    out = tmp_path / "out"

    def predicted(**settings: Any) -> None:
        predict(run, str(tmp_path / "in"), str(out), frames=9, steps=1, samples=2, device="cpu", **settings)

    predicted()
    assert {"truth/deep/b.mp4", "horizon.csv", "metrics.json"} < files(out)
    (out / "truth" / "c.mp4").write_bytes(b"of the user")
    killed(monkeypatch, 1, lambda: predicted(compare=False))
    finished = {f"{kind}/a.mp4" for kind in ("context", "prediction", "full")}
    assert files(out) == {*finished, "truth/c.mp4", "predictions.jsonl"}
    assert not (out / "mean").exists()
    with pytest.raises(DataError, match=r"predictions\.jsonl is of a run that did not finish"):
        read_tree(str(out / "full"), None)
    for folder in (out / "full", out / "truth", out / "context" / "deep"):
        folder.mkdir(exist_ok=True)
        (folder / ".praxino-0123.mp4").touch()  # as a process leaves it that is killed while it writes
    predicted(compare=False)
    finished |= {name.replace("a.mp4", "deep/b.mp4") for name in finished}
    assert files(out) == {*finished, "truth/c.mp4", "predictions.jsonl", "rejected.jsonl", "metrics.json"}
    assert read_tree(str(out / "full"), None).videos.keys() == {"a.mp4", "deep/b.mp4"}
    before = {name: (out / name).read_bytes() for name in files(out)}
    with pytest.raises(ConfigError, match=r"full/a\.mp4' is of an earlier run in .*, which would go"):
        predict(run, str(out / "full"), str(out), frames=9, steps=1, compare=False, device="cpu")
    assert before == {name: (out / name).read_bytes() for name in files(out)}


def test_two_runs_do_not_write_to_one_folder(run: str, tmp_path: Path) -> None:
    sample(run, str(tmp_path), n=1, steps=1, device="cpu")
    before = (tmp_path / "00000.mp4").read_bytes()
    with written(tmp_path, "samples.jsonl", ["00000.mp4"], []):
        assert not (tmp_path / "00000.mp4").exists()
        with pytest.raises(BusyError, match="is in use by"):
            sample(run, str(tmp_path), n=1, steps=1, device="cpu")
    sample(run, str(tmp_path), n=1, steps=1, device="cpu")
    assert (tmp_path / "00000.mp4").read_bytes() == before


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "protocol.json").write_text("of the user")
    with pytest.raises(ConfigError, match=r"protocol\.json' exists and is not of an earlier run"):  # noqa: SIM117
        with written(tmp_path, "samples.jsonl", ["00000.mp4"], ["protocol.json"]):
            pass
    assert files(tmp_path) == {"protocol.json"}


def test_an_unfinished_run_is_known_wherever_one_looks(tmp_path: Path) -> None:
    """In its folder, below it, and at a file of it; other folders below or beside it are not of the run."""
    out = tmp_path / "out"
    with written(out, "predictions.jsonl", ["full/deep/a.mp4", "full/b.mp4"], []):
        pass
    (out / "samples.jsonl").write_text("[]")  # of something else
    for place in (out, out / "full", out / "full" / "deep", out / "full" / "b.mp4"):
        with pytest.raises(DataError, match=r"predictions\.jsonl is of a run that did not finish"):
            check_finished(place)
    for place in (tmp_path, out / "videos", out / "full" / "deeper", out / "full" / "c.mp4"):
        check_finished(place)


RECORDS = ['{"files": ["../x.mp4"]}', '{"files": ["/x.mp4"]}', '{"files": "x.mp4"}', '{"file": "x.mp4"}', "[]", "x", ""]


@pytest.mark.parametrize("text", RECORDS)
def test_nothing_is_removed_by_a_record_of_others(tmp_path: Path, text: str) -> None:
    out, other = tmp_path / "out", tmp_path / "x.mp4"
    out.mkdir()
    other.touch()
    (out / "x.mp4").touch()
    (out / "samples.jsonl").write_text(text + "\n" * bool(text))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(ConfigError, match="does not say which files an earlier run wrote: remove it and them, or"):  # noqa: SIM117
        with written(out, "samples.jsonl", ["x.mp4"], ["sheet.png"]):
            pass
    assert before == {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
