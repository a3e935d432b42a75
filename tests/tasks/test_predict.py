"""Predictions: given frames come back as read, scores follow their formulas, any length, any number of processes."""

import csv
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from dit_run import SIZE, make_run, make_vae
from praxino import stream, video
from praxino.config import check_call, conf_dir, register_resolvers
from praxino.data.synthetic import draw
from praxino.errors import ConfigError, DataError
from praxino.models.conditioning import Condition
from praxino.models.dit import VideoDiT
from praxino.tasks.generation.generate import seed_of
from praxino.tasks.generation.opening import Settings, open_generator
from praxino.tasks.predict import predict


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "run", drop=None)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of 12 frames in a tree, one of 6 frames, one of 3."""
    root = tmp_path_factory.mktemp("videos")
    for seed, (name, frames) in enumerate(
        {"a.mp4": 12, "deep/b.mp4": 12, "c.mp4": 12, "six.mp4": 6, "x.mp4": 3}.items()
    ):
        video.write(root / name, draw(0, frames=frames, size=SIZE, seed=seed)[1], 12, "lossless")
    return root


def predicted(run: Path, source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    given = {"frames": 9, "steps": 2, "samples": 2, "device": "cpu", **settings}
    return predict(ckpt=str(run), input=str(source), out=str(out), **given)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """PSNR of each frame of videos `(T, H, W, 3)` in 0..255."""
    error = ((a.astype(np.float64) - b) / 255) ** 2
    return np.minimum(100, -10 * np.log10(error.mean(axis=(1, 2, 3))))


@pytest.fixture(scope="module")
def finished(run: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    return out, predicted(run, videos, out, start=1)


def test_given_frames_come_back_as_they_were_read(videos: Path, finished: tuple[Path, Any]) -> None:
    out, _ = finished
    for name in ("a.mp4", "deep/b.mp4", "six.mp4"):
        source = video.read(videos / name)[1:]
        full = video.read(out / "full" / name, index_dir=None)
        assert full.shape == (9, SIZE, SIZE, 3)
        assert torch.equal(full[:5], source[:5])
        assert torch.equal(video.read(out / "context" / name, index_dir=None), source[:5])
        assert torch.equal(video.read(out / "prediction" / name, index_dir=None), full[5:])
        assert torch.equal(video.read(out / "mean" / name, index_dir=None)[:5], source[:5])
        assert video.probe(out / "full" / name, index_dir=None).fps == 12
    assert torch.equal(video.read(out / "truth" / "a.mp4", index_dir=None), video.read(videos / "a.mp4")[1:10])
    shape = video.read(out / "side_by_side" / "deep" / "b.mp4", index_dir=None).shape
    assert shape == (9, SIZE, 4 * SIZE, 3)
    assert not (out / "side_by_side" / "six.mp4").exists()  # the truth ends
    rows = {row["path"]: row for row in map(json.loads, (out / "predictions.jsonl").open())}
    assert sorted(rows) == ["a.mp4", "c.mp4", "deep/b.mp4", "six.mp4"]
    assert rows["six.mp4"]["psnr"] is None
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").open()]
    assert [(row["path"], row["reason"]) for row in rejected] == [("x.mp4", "short")]


def test_scores_are_those_of_the_formula(videos: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    last, single = [], []
    for name in ("a.mp4", "c.mp4", "deep/b.mp4"):
        truth = video.read(videos / name)[6:10].numpy()
        given = video.read(videos / name)[5].numpy()
        last.append(psnr(np.repeat(given[None], 4, axis=0), truth))
        single.append(psnr(video.read(out / "prediction" / name, index_dir=None).numpy(), truth))
    assert result == json.loads((out / "metrics.json").read_text())
    assert (result["n"], result["videos"], result["rejected"]) == (3, 4, 1)
    np.testing.assert_allclose(result["psnr"]["copy_last"], np.mean(last), rtol=1e-6)
    np.testing.assert_allclose(result["horizon"]["psnr"]["copy_last"], np.mean(last, axis=0), rtol=1e-6)
    np.testing.assert_allclose(result["horizon"]["psnr"]["sample"], np.mean(single, axis=0), atol=0.02)  # rounded here
    better = np.mean(np.mean(single, axis=1) > np.mean(last, axis=1))
    assert result["better"]["sample"] == pytest.approx(better)
    assert result["gain"]["sample"] == pytest.approx(result["psnr"]["sample"] - result["psnr"]["copy_last"])
    with (out / "horizon.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["frame"]) for row in table] == [5, 6, 7, 8]
    np.testing.assert_allclose([float(row["psnr_mean"]) for row in table], result["horizon"]["psnr"]["mean"])


def test_means_of_samples(run: Path, videos: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    _, result = finished
    defaults = {name: parameter.default for name, parameter in inspect.signature(predict).parameters.items()}
    settings = Settings.among({**defaults, "ckpt": str(run), "steps": 2, "batch": 1})
    generator = open_generator(settings, torch.device("cpu"))
    vae, scores = make_vae(), {"mean": [], "mean_latent": []}
    for name in ("a.mp4", "c.mp4", "deep/b.mp4"):
        clip = video.to_float(video.read(videos / name)[1:10])
        with torch.no_grad():
            given = vae.normalize(vae.encode(clip[None, :, :5]).mode())
            seeds = [seed_of(0, name, k) for k in range(2)]
            z = torch.cat(list(generator.draw(seeds, [0, 1], 3, (2, 2), given)), dim=2)
            decoded = {"mean": vae.decode(vae.denormalize(z)).clamp(-1, 1).mean(0)}
            decoded["mean_latent"] = vae.decode(vae.denormalize(z.mean(0, keepdim=True))).clamp(-1, 1)[0]
        assert torch.equal(z[:, :, :2], given.expand(2, -1, -1, -1, -1))
        for key, y in decoded.items():
            pixels = (127.5 * (v[:, 5:].movedim(0, -1).numpy() + 1) for v in (y, clip))
            scores[key].append(psnr(*pixels).mean())
    for key, values in scores.items():
        assert result["psnr"][key] == pytest.approx(np.mean(values), abs=1e-3)


def test_the_true_latents_give_the_reconstruction(
    run: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that knows what comes points straight at it: the prediction is the truth through the VAE."""
    vae, clip = make_vae(), video.to_float(video.read(videos / "a.mp4")[None, :9])
    with torch.no_grad():
        x = vae.normalize(vae.encode(clip).mode())
        given = vae.normalize(vae.encode(clip[:, :, :5]).mode())
        y = vae.decode(vae.denormalize(torch.cat([given, x[:, :, 2:]], dim=2))).clamp(-1, 1)

    def forward(self: VideoDiT, z: Tensor, t: Tensor, cond: Condition, *_: Any) -> Tensor:
        assert cond.known is not None
        assert cond.known[0].tolist() == [True, True, False]
        assert cond.first is not None
        assert cond.first.all()
        torch.testing.assert_close(z[:, :, :2], given.expand(len(z), -1, -1, -1, -1), atol=1e-5, rtol=1e-5)
        assert (t[:, :2] == 0).all()
        return (z - x) / t[:, None, :, None, None].clamp(min=1e-9)  # noise - x

    monkeypatch.setattr(VideoDiT, "forward", forward)
    result = predicted(run, videos / "a.mp4", tmp_path, steps=3, sampler="heun")
    expected = psnr(*(127.5 * (v[0, :, 5:].movedim(0, -1).numpy() + 1) for v in (y, clip)))
    for key in ("sample", "mean", "mean_latent"):
        np.testing.assert_allclose(result["horizon"]["psnr"][key], expected, atol=1e-3)


def test_four_times_the_length_of_training_in_a_window(
    run: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, pushed = [], []
    forward, push = VideoDiT.forward, stream.Decoder.push

    def counted(self: VideoDiT, z: Tensor, *rest: Any) -> Tensor:
        windows.append(z.shape[2])
        return forward(self, z, *rest)

    def watched(self: stream.Decoder, z: Tensor, final: bool = False) -> Tensor | None:
        pushed.append(z.shape[2])
        return push(self, z, final)

    with pytest.raises(
        ConfigError, match=r"frames=36: the model was trained on 9 at once; for more use rollout=sliding"
    ):
        predicted(run, videos / "a.mp4", tmp_path / "no", frames=36)
    monkeypatch.setattr(VideoDiT, "forward", counted)
    monkeypatch.setattr(stream.Decoder, "push", watched)
    result = predicted(run, videos / "a.mp4", tmp_path, frames=36, rollout="sliding", overlap=8, samples=1)
    told = {"window": None, "window_latents": 3, "overlap": 8, "overlap_latents": 2, "precision": "32"}
    assert told.items() <= result["protocol"].items()
    assert max(windows) <= 3  # of 9 latents
    assert max(pushed) <= 3
    full = video.read(tmp_path / "full" / "a.mp4", index_dir=None)
    assert full.shape[0] == 36
    assert torch.equal(full[:5], video.read(videos / "a.mp4")[:5])


def test_what_does_not_fit(run: Path, videos: Path, tmp_path: Path) -> None:
    for settings, match in (
        ({"context": 6}, r"context=6 does not fit: use 1 \+ 4k frames, e.g. 5 or 9"),
        ({"frames": 5}, r"frames=5 counts the context=5"),
        ({"label": 0}, "takes no label"),
        ({"guidance": -1.0}, "guidance=-1"),
    ):
        with pytest.raises(ConfigError, match=match):
            predicted(run, videos, tmp_path / "out", **settings)
    with pytest.raises(ConfigError, match="lies inside input"):
        predicted(run, videos, videos / "out")
    with pytest.raises(DataError, match="none of 1 videos"):
        predicted(run, videos / "x.mp4", tmp_path / "short")
    alone = make_run(tmp_path / "alone", drop=None, context=None)
    with pytest.raises(ConfigError, match="trained without given frames"):
        predicted(alone, videos, tmp_path / "alone-out")


@pytest.mark.parametrize("compare", [True, False])
def test_a_prediction_that_is_not_finite_does_not_end_the_run(
    run: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compare: bool
) -> None:
    """Measured or not: of two steps a video, the third call is of the second video."""
    forward, calls = VideoDiT.forward, []

    def broken(self: VideoDiT, z: Tensor, *rest: Any) -> Tensor:
        calls.append(z)
        return forward(self, z, *rest) * (torch.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(VideoDiT, "forward", broken)
    predicted(run, videos, tmp_path, compare=compare, samples=1)
    rejected = {row["path"]: row["reason"] for row in map(json.loads, (tmp_path / "rejected.jsonl").open())}
    assert rejected == {"c.mp4": "not_finite", "x.mp4": "short"}
    rows = [json.loads(line)["path"] for line in (tmp_path / "predictions.jsonl").open()]
    assert rows == ["a.mp4", "deep/b.mp4", "six.mp4"]
    assert not (tmp_path / "full" / "c.mp4").exists()


def test_odd_sizes_are_padded_and_cut(run: Path, tmp_path: Path) -> None:
    clip = draw(0, frames=9, size=[20, 26], seed=3)[1]
    video.write(tmp_path / "in" / "odd.mp4", clip, 12, "lossless")
    result = predicted(run, tmp_path / "in", tmp_path / "out", size="source", samples=1)
    assert torch.equal(video.read(tmp_path / "out" / "full" / "odd.mp4", index_dir=None)[:5], torch.as_tensor(clip)[:5])
    assert result["psnr"].keys() == {"sample", "copy_last"}
    assert result["ssim"]["copy_last"] is not None


def test_guidance_can_stress_the_given_frames(run: Path, videos: Path, tmp_path: Path) -> None:
    outs = {}
    for scale in (0.0, 1.0, 2.0):
        predicted(run, videos / "a.mp4", tmp_path / str(scale), guidance=scale, steps=1, samples=1)
        outs[scale] = video.read(tmp_path / str(scale) / "prediction" / "a.mp4", index_dir=None).float()
    assert (outs[2.0] - outs[1.0]).abs().max() > 1
    assert (outs[0.0] - outs[1.0]).abs().max() > 1


def test_the_configuration_names_every_key() -> None:
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        cfg = compose("predict", overrides=["ckpt=a", "input=b", "out=c", "size=source"])
    assert check_call(predict, cfg)["samples"] == 8


@pytest.mark.slow
def test_two_processes_predict_the_same(run: Path, videos: Path, tmp_path: Path) -> None:
    for devices in (1, 2):
        words = [f"ckpt={run}", f"input={videos}", f"out={tmp_path / str(devices)}", f"devices={devices}"]
        words += ["frames=9", "steps=2", "samples=2", "device=cpu"]
        code = "from praxino.cli import predict\n\npredict()\n"
        script = tmp_path / "predict.py"
        script.write_text(code)
        done = subprocess.run(
            [sys.executable, str(script), *words], capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "istributed" not in done.stdout + done.stderr  # no word of Lightning's on how ranks are started
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in "12")
    assert one["psnr"] == two["psnr"]
    assert one["horizon"] == two["horizon"]
    for name in ("a.mp4", "deep/b.mp4", "c.mp4", "six.mp4"):
        first, second = (video.read(tmp_path / k / "full" / name, index_dir=None) for k in "12")
        assert torch.equal(first, second)
