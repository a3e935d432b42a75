"""The tasks end to end on small videos: train, resume, reconstruct, evaluate."""

import csv
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

import praxino
from praxino import checkpoint, video
from praxino.callbacks.ema import EMA
from praxino.checkpoint import save_official_ckpt
from praxino.config import conf_dir, register_resolvers
from praxino.data.synthetic import draw, make_dataset
from praxino.errors import CheckpointError, ConfigError, DataError, NonFiniteError, StorageError
from praxino.models.wfvae import WFVAE
from praxino.tasks.common import measure
from praxino.tasks.evaluate import evaluate
from praxino.tasks.make_data import run as make_data
from praxino.tasks.reconstruct import fitting_chunk, output_names, pairs, reconstruct
from praxino.tasks.train import run as train

NET = ["model.net.base_channels=8", "model.net.encoder_energy_flow_hidden_size=8"]
NET += ["model.net.decoder_energy_flow_hidden_size=8", "model.net.latent_dim=4"]


def trained(out: Path, *overrides: str) -> dict[str, float]:
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        cfg = compose("train", overrides=["experiment=wfvae_tiny", f"out={out}", *NET, *overrides])
    return train(cfg)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "videos", videos=6, val_videos=2, frames=12, size=32)


@pytest.fixture(scope="module")
def settings(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = [f"data.root={videos}/train", f"data.val_root={videos}/val", "data.workers=0"]
    data += [f"data.cache_dir={tmp_path_factory.mktemp('cache')}"]
    return [*data, "frames=5", "size=16", "batch=2", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def finished(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    metrics = trained(out, *settings, "trainer.max_steps=4", "trainer.val_check_interval=2", "checkpoint.every=2")
    assert metrics["step"] == 4
    assert 0 < metrics["val/psnr"] < 100
    return out


def test_a_run_directory_says_everything(finished: Path) -> None:
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert {"config.yaml", "overrides.yaml", "versions.json", "log.txt", "metrics.csv", "metrics.jsonl"} <= names
    assert {"checkpoints/step-00000002.ckpt", "checkpoints/step-00000004.ckpt"} <= names
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "val/psnr" in row] == [2, 4]
    header = (finished / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"step", "train/loss", "val/psnr", "val/ssim"} <= set(header)
    assert json.loads((finished / "versions.json").read_text())["praxino"]
    assert any(path.startswith("media/") for path in names)


def test_a_used_directory_is_not_overwritten(finished: Path, settings: list[str]) -> None:
    with pytest.raises(ConfigError, match="ckpt=last goes on"):
        trained(finished, *settings, "trainer.max_steps=1")


def test_resume_and_weights(finished: Path, settings: list[str], tmp_path: Path) -> None:
    whole = [*settings, "checkpoint.every=2", "trainer.max_steps=4", "model.scheduler.total=4"]
    trained(tmp_path / "straight", *whole)
    first = [*whole, "trainer.max_steps=2"]
    trained(tmp_path / "parts", *first)
    trained(tmp_path / "parts", *whole, "ckpt=last")
    for weights in ("raw", "ema"):
        straight, parts = (
            praxino.load(tmp_path / name, weights=weights).state_dict() for name in ("straight", "parts")
        )
        assert all(torch.equal(straight[key], parts[key]) for key in straight)
    initialised = trained(tmp_path / "begun", *settings, "trainer.max_steps=1", f"weights={finished}")
    assert initialised["step"] == 1
    with pytest.raises(ConfigError, match=r"do not fit model\.net"):
        trained(tmp_path / "other", *settings, f"weights={finished}", "model.net.base_channels=16")


def test_training_on_frames_under_the_window_of_ssim(settings: list[str], tmp_path: Path) -> None:
    metrics = trained(tmp_path, *settings, "size=8", "trainer.max_steps=1", "callbacks.media=null")
    assert metrics["val/psnr"] > 0
    assert "val/ssim" not in metrics


def test_an_interrupted_training_says_so(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EMA, "on_train_batch_end", interrupt)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):  # the command line says "interrupted" and exits with 130
            trained(tmp_path, *settings, "trainer.max_steps=2")
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on


def test_make_data_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        make_data(OmegaConf.create({"out": str(tmp_path / "file")}))


def test_resume_names_what_it_cannot_go_on_with(finished: Path, settings: list[str], tmp_path: Path) -> None:
    newest = finished / "checkpoints" / "step-00000004.ckpt"
    with pytest.raises(ConfigError, match=r"does not fit the model: .* of .* tensors differ"):
        trained(tmp_path / "a", *settings, f"ckpt={newest}", "model.net.base_channels=16")
    official = save_official_ckpt(praxino.load(finished), tmp_path / "official" / "vae.ckpt")
    with pytest.raises(CheckpointError, match=r"weights=.* begins with its weights"):
        trained(tmp_path / "b", *settings, f"ckpt={official}")
    (tmp_path / "c" / "checkpoints").mkdir(parents=True)
    torn = tmp_path / "c" / "checkpoints" / newest.name
    torn.write_bytes(newest.read_bytes()[:1000])
    for ckpt in ("last", torn):  # a run is not begun again for want of its checkpoints
        with pytest.raises(CheckpointError):
            trained(tmp_path / "c", *settings, f"ckpt={ckpt}")


def test_reconstruct_mirrors_a_tree(finished: Path, videos: Path, tmp_path: Path) -> None:
    result = reconstruct(
        vae=str(finished), input=str(videos), out=str(tmp_path / "out"), save_original=True, side_by_side=True, limit=3
    )
    assert result["videos"] == 3
    rows = [json.loads(line) for line in (tmp_path / "out" / "reconstructions.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.keys() >= {"path", "frames", "size", "fps", "psnr", "ssim", "seconds"}
        original, shown = video.probe(videos / row["path"]), video.probe(tmp_path / "out" / row["output"])
        assert (shown.frames, shown.height, shown.width, shown.fps) == (12, 32, 32, original.fps)
        kept = video.read(tmp_path / "out" / "origin" / row["output"])
        assert torch.equal(kept, video.read(videos / row["path"]))
        assert video.probe(tmp_path / "out" / "side_by_side" / row["output"]).width == 64
    compared = evaluate(out=str(tmp_path / "eval"), real=str(tmp_path / "out" / "origin"), fake=str(tmp_path / "out"))
    assert compared["n"] == 3


def test_reconstruct_does_not_depend_on_the_chunk(finished: Path, videos: Path, tmp_path: Path) -> None:
    source = next((videos / "val").rglob("*.mp4"))
    for chunk in (1, 5, 64):
        reconstruct(
            vae=str(finished), input=str(source), out=str(tmp_path / str(chunk)), chunk=chunk, lossless=True, frames=10
        )
    first, *others = [video.read(tmp_path / str(chunk) / f"{source.stem}.mp4") for chunk in (1, 5, 64)]
    assert first.shape == (10, 32, 32, 3)
    for other in others:
        assert (first.int() - other.int()).abs().max() <= 1  # rounding at .5


def test_reconstruct_takes_any_size(finished: Path, tmp_path: Path) -> None:
    clip = draw(0, frames=6, size=[38, 22], seed=1)[1]
    video.write(tmp_path / "in" / "deep" / "odd.mp4", clip, 23.976)
    reconstruct(vae=str(finished), input=str(tmp_path / "in"), out=str(tmp_path / "out"), stride=2)
    info = video.probe(tmp_path / "out" / "deep" / "odd.mp4")
    assert (info.frames, info.height, info.width) == (3, 38, 22)
    assert float(info.fps) == pytest.approx(23.976 / 2, rel=1e-3)


def test_reconstruct_refuses_to_write_into_its_input(finished: Path, videos: Path) -> None:
    with pytest.raises(ConfigError, match="lies inside"):
        reconstruct(vae=str(finished), input=str(videos), out=str(videos / "out"))


def test_evaluate_writes_a_row_a_video(finished: Path, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for path in (videos / "train").rglob("*.mp4"):
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "data" / "broken.mp4").write_bytes(b"no video")
    video.write(tmp_path / "data" / "brief.mp4", draw(0, frames=3)[1], 25)
    result = evaluate(
        out=str(tmp_path / "out"),
        vae=str(finished),
        data={"root": str(tmp_path / "data")},
        frames=5,
        size=16,
        workers=0,
    )
    with (tmp_path / "out" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == result["n"] == 6
    assert result["psnr"]["mean"] == pytest.approx(sum(float(row["psnr"]) for row in rows) / 6)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["psnr"].keys() == {"mean", "std", "low", "high", "n"}
    assert written["protocol"]["frames"] == 5
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {row["path"] for row in rejected} == {"broken.mp4", "brief.mp4"}
    batched = evaluate(
        out=str(tmp_path / "b"), vae=str(finished), data={"root": str(tmp_path / "data")}, frames=5, size=16, batch=4
    )
    assert batched["psnr"]["mean"] == pytest.approx(result["psnr"]["mean"], abs=1e-4)


def test_evaluate_demands_partners(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"6 missing under fake .*; 2 under fake alone"):
        evaluate(out=str(tmp_path), real=str(videos / "train"), fake=str(videos / "val"))
    same = evaluate(out=str(tmp_path), real=str(videos / "val"), fake=str(videos / "val"))
    assert same["psnr"]["mean"] == 100
    assert same["ssim"]["mean"] == pytest.approx(1)


def test_official_directories_are_taken(videos: Path, tmp_path: Path) -> None:
    vae = WFVAE(latent_dim=4, base_channels=8, norm_type="layernorm")
    checkpoint.save_official(vae, tmp_path / "official")
    result = evaluate(
        out=str(tmp_path), vae=str(tmp_path / "official"), data={"root": str(videos)}, frames=5, size=16, limit=2
    )
    assert result["n"] == 2


def test_names_and_chunks() -> None:
    assert output_names(["a/x.webm", "a/y.gif", "b/x.mp4"]) == ["a/x.mp4", "a/y.mp4", "b/x.mp4"]
    assert output_names(["x.webm", "X.mp4", "y.mkv"]) == ["x.webm.mp4", "X.mp4.mp4", "y.mp4"]
    assert len(set(output_names(["a.mp4", "a.webm", "a.webm.avi"]))) == 3
    assert output_names(["shot.01", "a/take.1", "a/take.2", "b/c.v1_*"]) == [  # folders of frames have no suffix
        "shot.01.mp4",
        "a/take.1.mp4",
        "a/take.2.mp4",
        "b/c.v1_*.mp4",
    ]
    assert [fitting_chunk(*size) for size in ((16, 16), (256, 256), (1080, 1920), (4320, 7680))] == [64, 16, 1, 1]


def test_reconstruct_overwrites_nothing_of_others(finished: Path, tmp_path: Path) -> None:
    source = tmp_path / "in" / "x.mp4"
    video.write(source, draw(0, frames=2, size=16)[1], 25)
    before = source.read_bytes()
    with pytest.raises(ConfigError, match="is not of an earlier run"):
        reconstruct(vae=str(finished), input=str(source), out=str(tmp_path / "in"))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(ConfigError, match="lies inside"):
        reconstruct(vae=str(finished), input=str(tmp_path / "in"), out=str(tmp_path / "link" / "out"))
    assert source.read_bytes() == before
    video.write(tmp_path / "in" / "origin" / "x.mp4", draw(1, frames=2, size=16)[1], 25)
    with pytest.raises(ConfigError, match="for two videos"):
        reconstruct(vae=str(finished), input=str(tmp_path / "in"), out=str(tmp_path / "out"), save_original=True)
    for _ in range(2):  # its own files it writes again
        assert reconstruct(vae=str(finished), input=str(tmp_path / "in"), out=str(tmp_path / "out"))["videos"] == 2


def test_frames_under_the_window_of_ssim_have_none(finished: Path, tmp_path: Path) -> None:
    video.write(tmp_path / "in" / "small[b].gif", draw(0, frames=2, size=8)[1], 10)
    video.write(tmp_path / "in" / "large.mp4", draw(0, frames=2, size=16)[1], 10)
    result = reconstruct(vae=str(finished), input=str(tmp_path / "in"), out=str(tmp_path / "out"))
    large, small = map(json.loads, (tmp_path / "out" / "reconstructions.jsonl").read_text().splitlines())
    assert small["ssim"] is None
    assert small["psnr"] > 0
    assert result["ssim"] == large["ssim"]
    compared = evaluate(out=str(tmp_path / "eval"), real=str(tmp_path / "in"), fake=str(tmp_path / "out"))
    assert (compared["psnr"]["n"], compared["ssim"]["n"]) == (2, 1)


def test_a_folder_of_frames_is_a_video_of_its_name(finished: Path, tmp_path: Path) -> None:
    video.write(tmp_path / "in" / "shot.01", draw(0, frames=3, size=16)[1], 25, "png")
    reconstruct(vae=str(finished), input=str(tmp_path / "in" / "shot.01"), out=str(tmp_path / "out"))
    (row,) = map(json.loads, (tmp_path / "out" / "reconstructions.jsonl").read_text().splitlines())
    assert (row["path"], row["frames"]) == ("shot.01", 3)
    assert (tmp_path / "out" / row["output"]).is_file()


@pytest.mark.parametrize(
    "setting", [{"stride": 0}, {"frames": 0}, {"chunk": 0}, {"limit": -1}, {"size": [7]}, {"quality": 99}]
)
def test_reconstruct_refuses_settings_before_it_begins(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        reconstruct(vae="none", input="none", out=str(tmp_path / "out"), **setting)
    assert not (tmp_path / "out").exists()


def test_evaluate_checks_the_clip_against_the_model(finished: Path, videos: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"out": str(tmp_path), "vae": str(finished), "data": {"root": str(videos)}, "workers": 0}
    for setting in ({"frames": 6}, {"size": 20}, {"batch": 0}, {"size": None, "batch": 2}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            evaluate(**{**given, **setting})
    video.write(tmp_path / "in" / "a.mp4", draw(0, frames=5, size=16)[1], 25)
    video.write(tmp_path / "in" / "b.mp4", draw(0, frames=5, size=18)[1], 25)
    result = evaluate(**{**given, "data": {"root": str(tmp_path / "in")}, "frames": 5, "size": None})
    assert (result["n"], result["rejected"]) == (1, 1)


def test_an_experiment_without_data_makes_its_own(tmp_path: Path) -> None:
    overrides = ["frames=5", "size=16", "trainer.max_steps=1", "data.workers=0", f"data.cache_dir={tmp_path}/cache"]
    assert trained(tmp_path / "run", *overrides)["step"] == 1
    assert next((tmp_path / "run" / "shapes").rglob("train/*/*.mp4"))
    made = trained(tmp_path / "made", *overrides, "data=synthetic", "data.videos=4", f"data.root={tmp_path}/new")
    assert made["step"] == 1
    assert len(list((tmp_path / "new").rglob("train/*/*.mp4"))) == 4


def test_group_norm_is_reconstructed_in_one_piece(videos: Path, tmp_path: Path) -> None:
    checkpoint.save_official(WFVAE(latent_dim=4, base_channels=32, norm_type="groupnorm"), tmp_path / "vae")
    settings = {"vae": str(tmp_path / "vae"), "input": str(videos), "out": str(tmp_path / "out"), "frames": 5}
    with pytest.raises(ConfigError, match=r"chunk=2: this model cannot stream: .* tile_frames=N"):
        reconstruct(**settings, chunk=2)
    assert reconstruct(**settings, limit=1)["frames"] == 5


def test_what_is_not_finite_is_not_measured() -> None:
    x = torch.zeros(1, 3, 2, 8, 16)
    found = measure(x, x + 0.2)
    assert found["psnr"].item() == pytest.approx(20, abs=1e-5)
    assert found["ssim"].isnan().all()  # 8 pixels are fewer than its window has
    with pytest.raises(NonFiniteError, match="what was decoded is not finite: use precision=32"):
        measure(x, x / 0)


def test_a_reconstruction_that_is_not_finite_does_not_end_the_run(
    finished: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Any] = []

    def broken(*given: Any) -> Iterator[tuple[Tensor, Tensor]]:
        calls.append(given)
        for x, y in pairs(*given):
            yield x, y * torch.nan if len(calls) == 2 else y

    monkeypatch.setattr("praxino.tasks.reconstruct.pairs", broken)
    result = reconstruct(vae=str(finished), input=str(videos / "train"), out=str(tmp_path), limit=3)
    assert (result["videos"], result["rejected"]) == (2, 1)
    (bad,) = map(json.loads, (tmp_path / "rejected.jsonl").open())
    good = [json.loads(line)["output"] for line in (tmp_path / "reconstructions.jsonl").open()]
    assert bad["reason"] == "not_finite"
    assert f"{bad['path']}: not_finite: what was decoded is not finite" in caplog.text
    assert sorted(good) == sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.mp4"))
    assert bad["path"] not in good
