"""Evaluation: the numbers are those of the formulas, of any VAE and any video, on any number of processes."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from dit_run import SIZE, make_run
from praxino import checkpoint, stream, video
from praxino.config import check_call, conf_dir, register_resolvers
from praxino.data.clips import ClipSampler
from praxino.data.synthetic import draw
from praxino.data.transforms import Resize
from praxino.data.usable import find_usable
from praxino.errors import ConfigError, NonFiniteError
from praxino.metrics.frechet import frechet_distance
from praxino.metrics.image import psnr, ssim
from praxino.metrics.suite import PairSuite
from praxino.models.wfvae import WFVAE
from praxino.tasks.evaluate import evaluate
from praxino.tasks.evaluation.compare import Gaussian
from praxino.tasks.evaluation.score import Recorder
from praxino.tasks.evaluation.shown import LONGEST, SIDE, Pictures, tagged
from praxino.tasks.evaluation.verdict import Judge, pooled

TINY: dict[str, Any] = {
    "latent_dim": 3,
    "base_channels": 8,
    "encoder_num_resblocks": 1,
    "decoder_num_resblocks": 1,
    "encoder_energy_flow_hidden_size": 4,
    "decoder_energy_flow_hidden_size": 4,
    "norm_type": "layernorm",
    "scale": [1.0] * 3,
    "shift": [0.0] * 3,
}
LENGTHS = [9, 12, 5, 14, 13, 9, 17, 10, 6, 11, 8, 7, 16]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = WFVAE(**TINY)
    model.initialize("fan_in")
    checkpoint.save_official(model.eval(), path := tmp_path_factory.mktemp("vae"))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 videos of many lengths and a broken one."""
    root = tmp_path_factory.mktemp("videos")
    for seed, frames in enumerate(LENGTHS):
        clip = draw(0, frames=frames, size=[20, 26], seed=seed)[1]
        video.write(root / f"{'ba'[seed % 2]}/{seed:02d}.mp4", clip, 10 + seed, "lossless")
    (root / "broken.mp4").write_bytes(b"no video")
    return root


def evaluated(vae: Path, videos: Path, out: Path, **settings: Any) -> dict[str, Any]:
    given = {"frames": 5, "size": 16, "workers": 0, "device": "cpu", "cache_dir": str(videos.parent / "cache")}
    return evaluate(str(out), vae=str(vae), data={"root": str(videos)}, **{**given, **settings})


def table(out: Path) -> dict[str, dict[str, float]]:
    with (out / "metrics.csv").open() as file:
        return {row.pop("path"): {k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)}


@torch.no_grad()
def test_whole_videos_of_any_size_are_measured_as_they_are(vae: Path, videos: Path, tmp_path: Path) -> None:
    result = evaluated(vae, videos, tmp_path, frames=None, size=None, shown=1)
    assert (result["n"], result["rejected"]) == (13, 1)
    model, rows = checkpoint.load(vae), table(tmp_path)
    for name in ("b/00.mp4", "a/03.mp4"):  # 9 frames, and 14, which no VAE of stride 4 takes; 20x26 fits none either
        x = video.to_float(video.read(videos / name))[None]
        (y,) = stream.reconstruct(model, [x], chunk=None)
        y = y.clamp(-1, 1)
        assert rows[name]["frames"] == x.shape[2]
        assert rows[name]["psnr"] == pytest.approx(float(psnr(x, y)), abs=1e-4)
        assert rows[name]["ssim"] == pytest.approx(float(ssim(x, y)), abs=1e-6)
    curves = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()]
    assert [len(curve["psnr"]) for curve in curves] == [int(row["frames"]) for row in rows.values()]
    assert curves[0]["difference"][0] is None
    assert "frames" in (tmp_path / "report.html").read_text()


def clips(root: Path, names: Iterable[str]) -> Tensor:
    """The first five frames of videos, 16x16, `(N, 3, 5, 16, 16)`."""
    kept = []
    for name in names:
        with video.Video(root / name) as source:
            kept.append(source.read(range(5), Resize(16)(source.info.height, source.info.width)))
    return video.to_float(torch.stack(kept))


@torch.no_grad()
def test_clips_are_measured_in_memory(vae: Path, videos: Path, tmp_path: Path) -> None:
    settings = {"metrics": ["psnr", "ssim", "lpips"], "lpips": {"net": "vgg", "weights": "random"}}
    result = evaluated(vae, videos, tmp_path, batch=4, **settings)
    rows, model = table(tmp_path), checkpoint.load(vae)
    x = clips(videos, rows)
    y = model.decode(model.encode(x).mode()).clamp(-1, 1)
    assert rows["a/01.mp4"].keys() == {"frames", "height", "width", "psnr", "psnr_clip", "ssim", "lpips", "mse"}
    for name, scores in (("psnr", psnr(x, y)), ("ssim", ssim(x, y))):
        torch.testing.assert_close(
            torch.tensor([row[name] for row in rows.values()]).double(), scores, atol=1e-4, rtol=0
        )
    mse = (x - y).double().div(2).square().mean()
    assert result["psnr_pooled"] == pytest.approx(-10 * mse.log10().item(), abs=1e-4)
    assert result["psnr"]["low"] < result["psnr"]["mean"] < result["psnr"]["high"]
    assert result["seconds"].keys() == {"load", "encode", "decode", "metrics"}
    assert result["protocol"]["lpips"] == settings["lpips"]


def test_padded_videos_are_counted_and_listed(vae: Path, videos: Path, tmp_path: Path) -> None:
    result = evaluated(vae, videos, tmp_path / "1", frames=9, short="pad", shown=1)
    names = [f"{'ba'[k % 2]}/{k:02d}.mp4" for k, frames in enumerate(LENGTHS) if frames < 9]
    assert (result["n"], result["short"]["value"]) == (13, len(names))
    rows = [json.loads(line) for line in (tmp_path / "1" / "short.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == sorted(names)
    assert {row["reason"] for row in rows} == {"padded with its last frame"}
    assert content(tmp_path / "1")["values"]["short"] == result["short"]
    assert (result["protocol"]["batch"], result["protocol"]["step"]) == (1, None)
    assert result["protocol"]["fingerprint"] == checkpoint.fingerprint(checkpoint.load(vae))
    dropped = evaluated(vae, videos, tmp_path / "1", frames=9, report=False)
    assert "short" not in dropped
    assert not (tmp_path / "1" / "short.jsonl").exists()


def content(out: Path) -> dict[str, Any]:
    """What the script of a page is given."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', (out / "report.html").read_text())
    assert found is not None
    return json.loads(found[1])


def test_pooled_errors_count_pixels() -> None:
    rows = [
        {"frames": 1, "height": 2, "width": 5, "mse": 0.1},
        {"frames": 3, "height": 2, "width": 5, "mse": 0.02},
    ]
    assert pooled(rows) == pytest.approx(-10 * torch.tensor(0.04).double().log10().item(), abs=1e-6)


def test_a_protocol_is_named_with_what_was_changed(vae: Path, videos: Path, tmp_path: Path) -> None:
    register_resolvers()
    given = [f"vae={vae}", f"data.root={videos}", f"out={tmp_path}", "metrics=[psnr]", "frames=5", "workers=0"]
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        plain = compose("evaluate", overrides=["out=a"])
        cfg = compose("evaluate", overrides=[*given, "protocol=vidtok", "size=16", f"cache_dir={videos.parent}/cache"])
    check_call(evaluate, plain)
    result = evaluate(**check_call(evaluate, cfg))
    assert result["protocol"]["protocol"] == {"name": "vidtok", "changed": ["frames", "metrics", "size"]}
    assert result["protocol"]["fps"] == 30
    assert result["n"] == 13
    for name in ("wfvae", "opensora_plan", "native"):
        with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
            assert check_call(evaluate, compose("evaluate", overrides=["out=a", f"protocol={name}"]))


class Means(nn.Module):
    """A detector: mean colours of a video."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3, 4))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("detector") / "means.pt"
    torch.jit.script(Means()).save(str(path))
    return str(path)


@torch.no_grad()
def test_distances_of_reconstructions(vae: Path, videos: Path, detector: str, tmp_path: Path) -> None:
    plain = {"detector": detector, "kind": "plain"}
    settings: dict[str, Any] = {"fvd": {**plain, "per_batch": True}, "batch": 5, "report": False}
    first = evaluated(vae, videos, tmp_path / "1", fid={**plain, "stride": 2}, **settings)
    model = checkpoint.load(vae)
    x = clips(videos, table(tmp_path / "1"))
    y = model.decode(model.encode(x).mode()).clamp(-1, 1)
    real, fake = (Means()(video) for video in (x, y))
    assert first["fvd"]["value"] == pytest.approx(frechet_distance(real, fake), rel=1e-4)
    assert (first["fvd"]["n"], first["fvd"]["n_real"]) == (13, 13)
    parts = [frechet_distance(a, b) for a, b in zip(real.split(5), fake.split(5), strict=True)]
    assert first["fvd_per_batch"]["value"] == pytest.approx(sum(parts) / 3, rel=1e-3)
    frames = [video[:, :, ::2].mean(dim=(3, 4)).transpose(1, 2).flatten(0, 1) for video in (x, y)]
    assert first["fid"]["value"] == pytest.approx(frechet_distance(*frames), rel=1e-4)
    assert first["fid"]["n"] == 39
    again = evaluated(vae, videos, tmp_path / "2", fid={**plain, "stride": 2}, **settings)
    assert (again["fvd"], again["fvd_per_batch"]) == (first["fvd"], first["fvd_per_batch"])
    assert not (tmp_path / "1" / "report.html").exists()


def test_statistics_of_the_real_set_are_kept(
    videos: Path, detector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "fake"
    for seed in range(3):
        video.write(fake / f"{seed}.mp4", draw(0, frames=9, size=16, seed=90 + seed)[1], 8, "lossless")
    given: dict[str, Any] = {"real": str(videos), "fake": str(fake), "paired": False, "frames": 5, "size": 16}
    given |= {"workers": 0, "cache_dir": str(tmp_path / "cache"), "fvd": {"detector": detector, "kind": "plain"}}
    given["fid"] = {"detector": detector, "kind": "plain", "stride": 2}
    first = evaluate(str(tmp_path / "1"), **given)
    saved = []
    monkeypatch.setattr(Gaussian, "save", lambda self, path: saved.append(path))
    assert evaluate(str(tmp_path / "2"), **given)["fvd"] == first["fvd"]
    assert not saved
    evaluate(str(tmp_path / "3"), **{**given, "stride": 2, "limit": 4})
    assert len(saved) == 2  # another protocol, both distances
    assert (first["fvd"]["n"], first["fvd"]["n_real"]) == (3, 13)
    assert (first["fid"]["n"], first["fid"]["n_real"]) == (9, 39)
    assert "distance" not in first
    trees: dict[str, Any] = {key: given[key] for key in ("fake", "fvd", "cache_dir")} | {"real": str(fake)}
    with pytest.raises(ConfigError, match=r"fvd\.frames: whole videos"):
        evaluate(str(tmp_path / "4"), **trees)
    with pytest.raises(ConfigError, match="i3d takes clips of 9 frames or more, not 5"):
        evaluate(str(tmp_path / "5"), **{**given, "fvd": {"detector": detector}})


def test_a_vae_that_gives_no_numbers_ends_it(videos: Path, tmp_path: Path) -> None:
    broken = WFVAE(**TINY)
    with torch.no_grad():
        broken.moments_layer.bias.fill_(torch.nan)
    checkpoint.save_official(broken, tmp_path / "vae")
    with pytest.raises(NonFiniteError, match=r"00\.mp4.* not finite"):
        evaluated(tmp_path / "vae", videos / "b", tmp_path / "out")


def test_a_guilty_video_is_named() -> None:
    recorder, x = Recorder(PairSuite(("psnr",))), torch.zeros(2, 3, 1, 4, 4)
    recorder.begin([0, 1], ["good.mp4", "bad.mp4"], [25.0, 25.0])
    with pytest.raises(NonFiniteError, match=r"the reconstruction of 'bad\.mp4' is not finite"):
        recorder.add(x, torch.stack([x[0], x[1] + torch.inf]))


def test_words_name_the_pixels_that_are_needed() -> None:
    words = Judge.of(("ssim", "ms_ssim"), "valid", None, None, None).protocol()
    assert words["ssim"].endswith("none under 11 pixels")
    assert words["ms_ssim"].endswith("none under 176 pixels")


def test_the_page_shows_the_worst_the_best_and_others() -> None:
    errors = {0: 0.5, 1: 0.1, 2: 0.9, 3: 0.3, 5: 0.2}
    assert tagged(errors, 1, 6) == {2: ("worst",), 1: ("best",), 0: ("spread",)}
    assert tagged(errors, 2, 6) == {2: ("worst",), 0: ("worst", "spread"), 1: ("best",), 5: ("best",), 3: ("spread",)}
    kept = []
    for order in ([0, 1, 2, 3, 5], [5, 2, 0, 3, 1]):
        pictures = Pictures(1, 6)
        for place in order:
            x = torch.full((1, 3, LONGEST + 9, 4, 2 * SIDE), -1.0)
            pictures.begin([place], [25.0])
            for piece in x.split(30, dim=2):
                pictures.add(piece, piece + errors[place])
            pictures.end([{"mse": errors[place]}])
        kept.append(pictures.kept)
    assert kept[0].keys() == kept[1].keys() == {0, 1, 2}
    fps, panels = kept[0][2]
    assert fps == 25
    assert all(panel.shape == (LONGEST, 2, SIDE, 3) for panel in panels.values())
    assert [int(panel.max()) for panel in panels.values()] == [0, round(0.9 * 127.5), 255]  # 4 x 0.9 is more than white


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "run", drop=None)


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("square")
    for seed, frames in enumerate([12, 12, 12, 12, 6]):
        video.write(root / f"{seed}.mp4", draw(0, frames=frames, size=SIZE, seed=seed)[1], 12, "lossless")
    return root


def test_predictions_are_measured_against_the_truth(run: Path, square: Path, tmp_path: Path) -> None:
    generate = {"frames": 9, "steps": 2, "samples": 2}
    result = evaluate(str(tmp_path), ckpt=str(run), input=str(square), context=5, generate=generate, device="cpu")
    assert (result["n"], result["rejected"]) == (4, 1)
    written = json.loads((tmp_path / "predictions" / "metrics.json").read_text())
    for ours, theirs in (("psnr", "sample"), ("psnr_mean", "mean"), ("psnr_copy_last", "copy_last")):
        assert result[ours]["mean"] == pytest.approx(written["psnr"][theirs], abs=0.05)  # files have 8 bits
    rows = table(tmp_path).values()
    gain = sum(row["psnr"] - row["psnr_copy_last"] for row in rows) / 4
    assert result["gain"]["value"] == pytest.approx(gain, abs=1e-12)  # of the rows, not of `predict`
    assert result["gain"]["value"] == pytest.approx(written["gain"]["sample"], abs=0.05)
    truth, full = (video.read(tmp_path / "predictions" / kind / "0.mp4", index_dir=None) for kind in ("truth", "full"))
    x, y = (video.to_float(frames[5:])[None] for frames in (truth, full))
    assert table(tmp_path)["0.mp4"]["psnr"] == pytest.approx(float(psnr(x, y)), abs=1e-9)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    with pytest.raises(ConfigError, match=r"generate\.stepz: unknown key; did you mean steps"):
        evaluate(str(tmp_path / "x"), ckpt=str(run), input=str(square), generate={"stepz": 2})


def test_samples_are_compared_with_a_real_set(run: Path, square: Path, tmp_path: Path) -> None:
    settings = {"generate": {"steps": 1, "batch": 4}, "device": "cpu", "workers": 0, "shown": 1}
    result = evaluate(str(tmp_path), ckpt=str(run), real=str(square), n=4, **settings)
    assert result["n"] == 2  # the smaller half of four real videos
    assert result["floor"] < result["distance"]
    assert result["protocol"]["size"] == [SIZE, SIZE]
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 4


SCRIPT = """
import sys
import torch
from praxino.tasks.evaluate import evaluate
if __name__ == "__main__":
    torch.set_num_threads(1)
    vae, videos, out, devices, detector, whole = sys.argv[1:7]
    settings = dict(workers=0, device="cpu", cache_dir=out + "/cache", devices=int(devices), shown=2)
    settings["fvd"] = {"detector": detector, "kind": "plain", "frames": 5}
    settings |= dict(frames=None, size=None) if whole == "True" else dict(frames=5, size=16, batch=2)
    evaluate(out, vae=vae, data={"root": videos}, **settings)
"""


def spoil(picture: Path) -> None:
    """Damage a file after the scan, so that only the process that decodes it finds out."""
    status, size = picture.stat(), picture.stat().st_size
    picture.write_bytes(picture.read_bytes()[: size // 2].ljust(size, b"\0"))
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("frames", [None, 5])
def test_a_video_that_decays_after_the_scan_is_listed(vae: Path, tmp_path: Path, frames: int | None) -> None:
    for name in ("good", "bad"):
        video.write(tmp_path / "in" / name, draw(0, frames=5, size=16)[1], 8, "png")
    find_usable(tmp_path / "in", ClipSampler(1), cache_dir=tmp_path / "cache")
    spoil(sorted((tmp_path / "in" / "bad").iterdir())[2])
    result = evaluated(vae, tmp_path / "in", tmp_path / "out", frames=frames, report=False)
    assert (result["n"], result["rejected"]) == (1, 1)
    assert json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["path"] == "bad"


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["clips", "whole"])
def test_two_processes_write_the_bytes_of_one(
    vae: Path, videos: Path, detector: str, tmp_path: Path, whole: bool
) -> None:
    root = shutil.copytree(videos, tmp_path / "videos")
    frames = video.write(root / "damaged", draw(0, frames=9, size=[20, 26], seed=99)[1], 8, "png")
    for devices in ("1", "2"):
        find_usable(root, ClipSampler(1), cache_dir=tmp_path / devices / "cache")
    spoil(sorted(frames.iterdir())[2])
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for devices in ("1", "2"):
        command = [sys.executable, str(script), str(vae), str(root), str(tmp_path / devices), devices, detector]
        done = subprocess.run(
            [*command, str(whole)], env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("metrics.csv", "curves.jsonl", "rejected.jsonl"):
        one, two = ((tmp_path / devices / name).read_bytes() for devices in ("1", "2"))
        assert one == two, name
    one, two = (json.loads((tmp_path / devices / "metrics.json").read_text()) for devices in ("1", "2"))
    assert {**one, "seconds": 0, "command": 0} == {**two, "seconds": 0, "command": 0}
    assert (one["n"], one["rejected"]) == (13, 2)
    rejected = [json.loads(line)["path"] for line in (tmp_path / "2" / "rejected.jsonl").read_text().splitlines()]
    assert rejected == ["broken.mp4", "damaged"]
    pages = [content(tmp_path / devices) for devices in ("1", "2")]
    for page in pages:
        page["command"] = ""
        assert all(clip.pop("video") for clip in page["clips"])  # x264 codes the same small frames in several ways
    assert pages[0] == pages[1]
    assert pages[0]["clips"]
