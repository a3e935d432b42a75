"""Distances of sets: exact, the same whatever is kept from run to run, and refused before hours of drawing."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_run import SIZE, make_run
from praxino import video
from praxino.data.synthetic import draw
from praxino.errors import ConfigError, DataError
from praxino.metrics.frechet import frechet_distance
from praxino.tasks.device import precision_context
from praxino.tasks.evaluate import evaluate
from praxino.tasks.evaluation import collect, imagined
from praxino.tasks.evaluation.collect import Collected
from praxino.tasks.evaluation.compare import FRAMES, Fid, Fvd, SetDistance, open_distances, settle
from praxino.tasks.evaluation.score import Reading
from praxino.tasks.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


class Products:
    """A detector: products with fixed weights, and how much it was given at once."""

    def __init__(self) -> None:
        self.name, self.fingerprint, self.frames, self.most = "products", "0", False, 0

    def __call__(self, video: Tensor) -> Tensor:
        self.most = max(self.most, len(video))
        return video.mean((2, 3, 4)) @ torch.tensor([[1.003, 0.1], [0.2, 0.997], [0.3, 0.4]])


def distance(settings: Fvd | Fid) -> SetDistance:
    return SetDistance("fid" if isinstance(settings, Fid) else "fvd", settings, Products())


def clips(count: int, frames: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, frames, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def watch(watcher: SetDistance, places: list[int], x: Tensor, y: Tensor) -> None:
    watcher.begin(places, [8.0] * len(places))
    watcher.add(x, y)
    watcher.end([{}] * len(places))


def test_detectors_run_in_full_precision_and_on_few_frames_at_once() -> None:
    x, y, found = clips(3, 50), clips(3, 50, seed=1), distance(Fid(detector="given"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found.collect(found.real, [0, 1, 2], x)
        found.collect(found.fake, [0, 1, 2], y)
    assert found.detector.most == FRAMES  # type: ignore[attr-defined]
    frames = [Products()(v.transpose(1, 2).flatten(0, 1)[:, :, None]) for v in (x, y)]
    (row,) = settle(found, (), ALONE, 3).values()
    assert row["value"] == pytest.approx(frechet_distance(*frames), rel=1e-9)
    assert row["n"] == row["n_real"] == 150
    assert not found.real.features  # moments alone are kept


@pytest.mark.parametrize("single", [False, True])
def test_no_split_over_processes_changes_a_digit(single: bool) -> None:
    features = 100 + torch.randn(9, 4, 5, generator=torch.Generator().manual_seed(0)) ** 3
    features = features if single else features[:, :1]
    found = []
    for parts in ([range(9)], [range(0, 9, 2), range(1, 9, 2)], [range(8, 5, -1), range(6)]):
        ranks = [Collected(single) for _ in parts]
        for rank, places in zip(ranks, parts, strict=True):
            for place in places:
                rank.add([place], features[place : place + 1])
        found.append(Collected(single).merge(ranks).gaussian())
    assert all(one is not None and torch.equal(one.mean, found[0].mean) for one in found)  # type: ignore[union-attr]
    assert all(torch.equal(one.covariance, found[0].covariance) for one in found)  # type: ignore[union-attr]


def test_one_usable_clip_leaves_a_note_and_no_number() -> None:
    found = distance(Fvd(detector="given", frames=4, stride=2, per_batch=True))
    watch(found, [0, 1], clips(2, 6), clips(2, 6))  # of 6 frames every second one: 3
    result = settle(found, [[0, 1], [2]], ALONE)
    assert result["fvd"]["value"] is None
    assert result["fvd"]["short"] == 2
    note = "not measured: it takes two clips or more of each set, of fvd.frames=4 at fvd.stride=2; "
    assert result["fvd"]["note"] == note + "2 videos are too short"
    assert result["fvd_per_batch"]["value"] is None
    watch(found, [2], clips(1, 7), clips(1, 7, seed=1))
    result = settle(found, [[0, 1], [2]], ALONE)
    assert (result["fvd"]["value"], result["fvd"]["n"]) == (None, 1)
    assert result["fvd_per_batch"]["value"] > 0
    frames = distance(Fid(detector="given"))
    watch(frames, [0], clips(1, 1), clips(1, 1))
    (row,) = settle(frames, [[0]], ALONE).values()
    assert row["note"] == "not measured: it takes two frames or more of each set"


def test_only_statistics_of_a_whole_real_set_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(places: list[int], real_videos: int | None, known: bool = False) -> dict[str, Any]:
        found = distance(Fvd(detector="given"))
        found.place = tmp_path / "kept"
        found.known = collect.Gaussian.load(found.place) if known else None
        x, y = clips(4)[places], clips(4, seed=1)[places]
        if real_videos is None:
            watch(found, places, x, y)
            return settle(found, [[0, 1, 2, 3]], ALONE)["fvd"]
        found.collect(found.fake, places, y)
        if not found.known:
            found.collect(found.real, places, x)
        return settle(found, (), ALONE, real_videos)["fvd"]

    for real_videos in (4, None):
        assert measured([0, 1, 2], real_videos)["n_real"] == 3
        assert not (tmp_path / "kept").exists()
    whole = measured([0, 1, 2, 3], 4)
    assert measured([0, 1, 2, 3], 4, known=True) == whole == measured([0, 1, 2, 3], None, known=True)
    partial = measured([0, 1, 2], None, known=True)  # of three against all four
    assert partial["value"] is None
    assert "1 videos failed that could be read before" in partial["note"]
    place = collect.place_of(tmp_path, ["facts"])
    monkeypatch.setattr(collect, "VERSION", collect.VERSION + 1)
    assert collect.place_of(tmp_path, ["facts"]) != place


class Means(nn.Module):
    """A detector: mean colours of a video."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3, 4))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("detector") / "means.pt"
    torch.jit.script(Means()).save(str(path))
    return {"detector": str(path), "kind": "plain"}


def write(folder: Path, lengths: list[int], size: int = SIZE) -> str:
    for seed, frames in enumerate(lengths):
        video.write(folder / f"{seed}.mp4", draw(0, frames=frames, size=size, seed=seed)[1], 8, "lossless")
    return str(folder)


def test_what_is_measured_is_written_though_a_distance_is_missing(detector: dict[str, str], tmp_path: Path) -> None:
    trees: dict[str, Any] = {"real": write(tmp_path / "real", [6, 3]), "fake": write(tmp_path / "fake", [6, 3])}
    settings: dict[str, Any] = {
        "fvd": {**detector, "frames": 5},
        "metrics": ["psnr"],
        "cache_dir": str(tmp_path / "cache"),
    }
    result = evaluate(str(tmp_path / "out"), fid=detector, device="cpu", **trees, **settings)
    assert (result["n"], result["fvd"]["value"], result["fvd"]["short"]) == (2, None, 1)
    assert result["fid"]["value"] == pytest.approx(0, abs=1e-9)
    assert result["protocol"]["float32"] == "without TF32"
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["psnr"]["mean"] == 100
    assert (tmp_path / "out" / "report.html").exists()


def test_sets_take_no_batches_and_one_size(detector: dict[str, str], tmp_path: Path) -> None:
    given: dict[str, Any] = {"real": write(tmp_path / "real", [5] * 3), "fake": write(tmp_path / "fake", [5] * 2)}
    given |= {"paired": False, "frames": 5, "size": 16, "workers": 0, "device": "cpu", "report": False}
    given |= {"cache_dir": str(tmp_path / "cache"), "fvd": {**detector, "per_batch": True}}
    with pytest.raises(ConfigError, match=r"fvd\.per_batch: sets without partners have no batches"):
        evaluate(str(tmp_path / "1"), **given)
    result = evaluate(str(tmp_path / "2"), protocol="wfvae", **given)  # which asks for them
    assert result["protocol"]["protocol"]["left_out"] == ["fvd.per_batch"]
    assert "fvd_per_batch" not in result
    assert result["fvd"]["n_real"] == 3
    with pytest.raises(ConfigError, match="size=null: without a detector"):
        evaluate(str(tmp_path / "3"), **{**given, "fvd": None, "size": None})
    with pytest.raises(ConfigError, match=r"fvd\.frames=4 at fvd\.stride=2: frames=5 are too few: use 7"):
        evaluate(str(tmp_path / "4"), **{**given, "fvd": {**detector, "frames": 4, "stride": 2}})
    (tmp_path / "one").mkdir()
    with pytest.raises(DataError, match="fvd: not measured: it takes two clips or more"):
        evaluate(str(tmp_path / "5"), **{**given, "fake": write(tmp_path / "one", [5]), "fvd": detector})


def test_a_real_video_that_fails_counts_alike_in_every_run(detector: dict[str, str], tmp_path: Path) -> None:
    given: dict[str, Any] = {"real": write(tmp_path / "real", [5] * 4), "fake": write(tmp_path / "fake", [5] * 2)}
    given |= {"paired": False, "frames": 5, "size": 16, "workers": 0, "device": "cpu", "report": False}
    given |= {"cache_dir": str(tmp_path / "cache"), "fvd": detector}
    Reading(frames=5, size=16, cache_dir=given["cache_dir"]).find(given["real"])
    rotten = tmp_path / "real" / "3.mp4"
    content, status = rotten.read_bytes(), rotten.stat()

    def hold(data: bytes) -> None:  # what the scan does not see
        rotten.write_bytes(data)
        os.utime(rotten, ns=(status.st_atime_ns, status.st_mtime_ns))

    hold(bytes(len(content)))
    first, second = (evaluate(str(tmp_path / name), **given) for name in ("1", "2"))
    assert (first["fvd"]["n_real"], first["rejected"]) == (3, 1)
    assert (second["fvd"], second["rejected"]) == (first["fvd"], 1)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    hold(content)
    whole, again = (evaluate(str(tmp_path / name), **given) for name in ("3", "4"))
    assert (whole["fvd"]["n_real"], whole["rejected"]) == (4, 0)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    assert again["fvd"] == whole["fvd"]


def test_where_noise_is_no_farther_than_real_videos_there_is_no_position(tmp_path: Path) -> None:
    for number in range(4):  # halves: black videos, and white ones
        for kind in ("real", "fake"):
            shade = torch.full((5, 16, 16, 3), 255 * (number % 2), dtype=torch.uint8)
            video.write(tmp_path / kind / f"{number}.mp4", shade, 8, "lossless")
    given: dict[str, Any] = {"paired": False, "frames": 5, "size": 16, "workers": 0, "report": False}
    result = evaluate(
        str(tmp_path / "out"),
        real=str(tmp_path / "real"),
        fake=str(tmp_path / "fake"),
        cache_dir=str(tmp_path / "cache"),
        **given,
    )
    assert result["ceiling"] < result["floor"]
    assert result["position"] is None


def test_of_samples_those_of_the_last_run_are_read(tmp_path: Path) -> None:
    reading = Reading(frames=5, size=16, cache_dir=str(tmp_path / "cache"))
    root = Path(write(tmp_path / "samples", [5, 5, 5]))
    (root / "old.mp4").write_bytes(b"no video")
    assert len(reading.find(root).entries) == 3
    (root / "samples.jsonl").write_text('{"file": "0.mp4"}\n{"file": "2.mp4"}\n')
    found = reading.find(root)
    assert ([entry.path for entry in found.entries], found.rejected) == (["0.mp4", "2.mp4"], [])
    (root / "2.mp4").unlink()
    with pytest.raises(DataError, match=r"samples\.jsonl lists 1 videos that are not there, first '2\.mp4'"):
        reading.find(root)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_run(tmp_path_factory.mktemp("run") / "run", drop=None))


def test_samples_are_read_whole_whatever_is_read_of_real_videos(
    run: str, detector: dict[str, str], tmp_path: Path
) -> None:
    real = write(tmp_path / "real", [18, 17, 19, 17])
    settings: dict[str, Any] = {"stride": 2, "limit": 3, "where": "center", "fvd": detector, "workers": 0, "shown": 1}
    settings |= {"generate": {"steps": 1}, "device": "cpu", "cache_dir": str(tmp_path / "cache")}
    result = evaluate(str(tmp_path / "out"), ckpt=run, real=real, n=5, **settings)
    assert (result["fvd"]["n"], result["fvd"]["n_real"], result["rejected"]) == (5, 3, 0)


def test_errors_come_before_anything_is_drawn(
    run: str, detector: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(**settings: Any) -> None:
        raise AssertionError("this would have taken hours")

    monkeypatch.setattr(imagined, "sample", checked_as(imagined.sample, drawn))
    monkeypatch.setattr(imagined, "predict", checked_as(imagined.predict, drawn))
    real = write(tmp_path / "real", [9] * 3)
    given: dict[str, Any] = {"ckpt": run, "real": real, "device": "cpu", "cache_dir": str(tmp_path / "cache")}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"fvd": {"detector": "missing.pt", "kind": "plain"}}, "missing.pt cannot be read"),
        ({"fvd": {**detector, "sha256": "0" * 8}}, "nothing of it was run"),
        ({"fvd": {**detector, "kind": "i3d"}, "generate": {"frames": 5}}, "9 frames or more, not 5"),
        ({"real": str(tmp_path / "missing")}, "does not exist"),
        ({"generate": {"frames": 13}}, "too short"),
        ({}, "3 clips under .* and n=64: 4 and 2 are the least"),
        ({"fvd": detector, "n": 1}, "n=1: 2 and 2 are the least"),
        ({"real": None, "input": real, "metrics": ["lpips"], "lpips": {"weights": "missing.pth"}}, "missing.pth"),
    ]
    for number, (settings, message) in enumerate(wrong):
        with pytest.raises((ConfigError, DataError), match=message):
            evaluate(str(tmp_path / f"out-{number}"), **{**given, **settings})


def checked_as(function: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with the signature of another one, which settings are checked against."""
    return functools.wraps(function)(lambda **settings: instead(**settings))


def test_float32_is_never_tf32() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        for precision in ("32", "bf16"):
            with precision_context(CPU, precision):
                assert not torch.backends.cudnn.allow_tf32
                assert torch.get_float32_matmul_precision() == "highest"
                assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
            assert torch.backends.cudnn.allow_tf32
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def test_distances_need_clips_of_their_length(detector: dict[str, str]) -> None:
    assert [found.name for found in open_distances(Fvd(**detector, frames=3, stride=2), Fid(), 5, CPU)] == ["fvd"]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="use 7"):
        open_distances(Fvd(**detector, frames=4, stride=2), Fid(), 5, CPU)  # type: ignore[arg-type]
