"""Latent statistics: measured on real files, stored with the VAE, the same however the work is cut."""

import inspect
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import praxino
from praxino import checkpoint, cli, video
from praxino.config import check_call, conf_dir, register_resolvers
from praxino.data.synthetic import draw
from praxino.errors import ConfigError, DataError, PraxinoError
from praxino.models.vae import VideoVAE, describe
from praxino.models.wfvae import WFVAE
from praxino.tasks.encode import encode, run
from praxino.tasks.encoding.store import fingerprint
from praxino.tasks.train import run as train

TINY: dict[str, Any] = {
    "latent_dim": 3,
    "base_channels": 8,
    "encoder_energy_flow_hidden_size": 8,
    "decoder_energy_flow_hidden_size": 8,
    "norm_type": "layernorm",
}
LENGTHS = {"a.mp4": 12, "b.mp4": 9, "deep/c.mp4": 14, "d.mp4": 10}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for seed, (name, frames) in enumerate(LENGTHS.items()):
        video.write(root / name, draw(0, frames=frames, size=[20, 26], seed=seed)[1], 25, "lossless")
    return root


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    torch.manual_seed(0)
    vae = WFVAE(**TINY)
    vae.initialize("fan_in")
    return vae.eval()


@pytest.fixture(scope="module")
def saved(vae: VideoVAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A praxino checkpoint."""
    path = tmp_path_factory.mktemp("vae") / "step-00000001.ckpt"
    state = {f"net.{key}": value for key, value in vae.state_dict().items()}
    torch.save({"state_dict": state, "praxino": {**describe(vae), "config": None, "step": 1}}, path)
    return path


def measured(vae: Path, videos: Path, out: Path, **settings: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"frames": 9, "size": 16, "workers": 0, "device": "cpu", "stats_only": True}
    return encode(vae=str(vae), data={"root": str(videos)}, out=str(out), **{**given, **settings})


def moments(vae: VideoVAE, videos: Path, frames: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the latents of the uncut videos, rows `(N, C)`, encoded whole."""
    found = []
    for name, length in sorted(LENGTHS.items()):
        clip = video.to_float(video.read(videos / name)[None])
        clip = clip[:, :, : frames or 1 + (length - 1) // 4 * 4, :16, :24]
        with torch.inference_mode():
            posterior = vae.encode(clip)
        found.append([m.double().transpose(0, 1).flatten(1).T.numpy() for m in (posterior.mean, posterior.std**2)])
    mean, variance = (np.concatenate(rows) for rows in zip(*found, strict=True))
    return mean, variance


@pytest.mark.parametrize("frames", [9, None])
def test_equal_to_numpy_over_all_latents(
    vae: VideoVAE, saved: Path, videos: Path, tmp_path: Path, frames: int | None
) -> None:
    result = measured(saved, videos, tmp_path, frames=frames, size=None)
    mean, variance = moments(vae, videos, frames)
    std = np.sqrt(mean.var(0) + variance.mean(0))
    np.testing.assert_allclose(result["mean"], mean.mean(0), atol=1e-6)
    np.testing.assert_allclose(result["std"], std, rtol=1e-5)
    np.testing.assert_allclose(result["scale"], 1 / std, rtol=1e-5)
    np.testing.assert_allclose(result["noise_share"], variance.mean(0) / std**2, rtol=1e-4)
    np.testing.assert_allclose(result["kl"], (mean**2 + variance - 1 - np.log(variance)).mean(0) / 2, rtol=1e-5)
    np.testing.assert_allclose(result["min"], mean.min(0), rtol=1e-5)
    power = {"spectrum": result["spectrum"]["power"], "haar": list(result["haar"].values())}
    for name, parts in power.items():  # frames of 2x3 latents: one column has no partner
        square = (
            (mean**2).mean(0) if name == "spectrum" else (mean.reshape(-1, 3, mean.shape[1])[:, :2] ** 2).mean((0, 1))
        )
        np.testing.assert_allclose(np.sum(parts, axis=0), square, rtol=1e-5)
    counts = {"videos": 4, "frames": 36 if frames else 9 + 9 + 13 + 9, "latents": len(mean), "rejected": 0}
    assert {key: result[key] for key in counts} == counts
    first, rest = result["first"], result["rest"]
    assert first["latents"] == 4 * 2 * 3
    assert first["latents"] + rest["latents"] == len(mean)
    both = [(part["latents"] * np.array(part["mean"])) for part in (first, rest)]
    np.testing.assert_allclose(sum(both) / len(mean), result["mean"], atol=1e-12)
    written = json.loads((tmp_path / "statistics.json").read_text())
    assert written == result
    assert written["protocol"]["frames"] == frames
    assert written["fingerprint"] == fingerprint(vae)


def test_batch_chunk_workers_and_limit_change_nothing_else(saved: Path, videos: Path, tmp_path: Path) -> None:
    plain = measured(saved, videos, tmp_path / "plain")
    for number, settings in enumerate([{"batch": 3, "workers": 2}, {"chunk": 1}]):
        other = measured(saved, videos, tmp_path / str(number), **settings)
        for key in ("mean", "std", "kl"):
            np.testing.assert_allclose(other[key], plain[key], rtol=1e-5, atol=1e-7)
        assert other["latents"] == plain["latents"]
    assert measured(saved, videos, tmp_path / "two", limit=2)["videos"] == 2


def test_measured_statistics_normalise(saved: Path, videos: Path, tmp_path: Path) -> None:
    result = measured(saved, videos, tmp_path, frames=9, size=None)
    vae = praxino.load(tmp_path)
    assert vae.statistics == {"mean": result["mean"], "std": result["std"]}
    mean, variance = moments(vae, videos, 9)
    z = torch.from_numpy(mean.T)[None, :, :, None, None]
    scaled = vae.normalize(z)
    torch.testing.assert_close(vae.denormalize(scaled), z, rtol=0, atol=1e-12)
    noise = torch.from_numpy(variance.mean(0)) / torch.tensor(result["std"]).double() ** 2
    total = scaled.var((0, 2, 3, 4), correction=0) + noise
    assert scaled.mean((0, 2, 3, 4)).abs().max() < 1e-4
    assert (total - 1).abs().max() < 1e-4


def test_only_the_statistics_of_a_checkpoint_change(vae: VideoVAE, saved: Path, videos: Path, tmp_path: Path) -> None:
    before = saved.read_bytes()
    measured(saved, videos, tmp_path)
    assert saved.read_bytes() == before
    old, new = (torch.load(path, weights_only=True) for path in (saved, tmp_path / "vae.ckpt"))
    assert {**new["praxino"], "statistics": None} == old["praxino"]
    assert new["state_dict"].keys() == old["state_dict"].keys()
    assert all(torch.equal(new["state_dict"][key], value) for key, value in old["state_dict"].items())
    assert {path.name for path in tmp_path.iterdir()} == {"statistics.json", "rejected.jsonl", "vae.ckpt"}
    assert fingerprint(praxino.load(tmp_path)) == fingerprint(vae)
    with pytest.raises(ConfigError, match="holds the VAE itself"):
        measured(tmp_path / "vae.ckpt", videos, tmp_path)


def test_official_files_get_scale_and_shift(vae: VideoVAE, videos: Path, tmp_path: Path) -> None:
    checkpoint.save_official(vae, tmp_path / "safetensors")
    checkpoint.save_official_ckpt(vae, tmp_path / "ckpt" / "wf.ckpt", ema=vae)
    for kind, weights in (("safetensors", checkpoint.SAFETENSORS), ("ckpt", "wf.ckpt")):
        source, out = tmp_path / kind, tmp_path / "out" / kind
        for _ in range(2):  # its own copy is replaced
            result = measured(source, videos, out)
        assert (out / "vae" / weights).read_bytes() == (source / weights).read_bytes()
        old, new = (json.loads((path / "config.json").read_text()) for path in (source, out / "vae"))
        assert new == {**old, "scale": result["scale"], "shift": result["mean"]}
        again = praxino.load(out)
        assert again.statistics is None  # read as official ones are
        z = torch.randn(1, 3, 2, 2, 2, dtype=torch.float64)
        table = [torch.tensor(result[key], dtype=torch.float64).view(1, 3, 1, 1, 1) for key in ("shift", "scale")]
        torch.testing.assert_close(again.normalize(z), (z - table[0]) * table[1], rtol=1e-12, atol=1e-12)
        assert fingerprint(again) == result["fingerprint"]
        assert result["stored"] == str(out / "vae")
    with pytest.raises(ConfigError, match="holds the VAE itself"):
        measured(tmp_path / "out" / "ckpt" / "vae", videos, tmp_path / "out" / "ckpt")


@pytest.mark.parametrize(
    ("scale", "shift", "usable"),
    [
        ([0.18215] * 4, [0, 0, 0, 0], True),
        ([1.0, 2.0], [0.0, 0.0], False),
        ([], [], False),
        ([0.0] * 4, [0] * 4, False),
    ],
)
def test_an_official_scale_of_another_length(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scale: list[float], shift: list[float], usable: bool
) -> None:
    checkpoint.save_official(WFVAE(**TINY | {"scale": scale, "shift": shift}), tmp_path / "vae")
    with caplog.at_level(logging.WARNING):
        vae = praxino.load(tmp_path / "vae")
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"{len(scale)} and {len(shift)} entries for 3 latent channels" in warning
    z = torch.randn(1, 3, 2, 2, 2)
    if usable:
        torch.testing.assert_close(vae.normalize(z), z * 0.18215)
    else:
        with pytest.raises(ConfigError, match="praxino-encode stats_only=true"):
            vae.normalize(z)
    checkpoint.save_official(vae, tmp_path / "again")
    for name in (checkpoint.CONFIG, checkpoint.SAFETENSORS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "vae" / name).read_bytes()


def test_group_norm_is_encoded_in_one_piece(videos: Path, tmp_path: Path) -> None:
    flows = {key: 32 for key in TINY if "flow" in key}
    vae = WFVAE(**TINY | flows | {"base_channels": 32, "norm_type": "groupnorm"}).eval()
    checkpoint.save_official(vae, tmp_path / "vae")
    vae = praxino.load(tmp_path / "vae")
    with pytest.raises(ConfigError, match="chunk=1: this model cannot stream"):
        measured(tmp_path / "vae", videos, tmp_path / "out", frames=None, size=None, chunk=1)
    result = measured(tmp_path / "vae", videos, tmp_path / "out", frames=None, size=None)
    np.testing.assert_allclose(result["mean"], moments(vae, videos, None)[0].mean(0), atol=1e-6)


def test_a_vae_of_diffusers_is_measured_and_not_copied(videos: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    widths = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(**widths, **kinds).save_pretrained(tmp_path / "vae")
    result = measured(tmp_path / "vae", videos, tmp_path / "out", limit=2)
    assert (len(result["mean"]), result["videos"], result["stored"]) == (2, 2, None)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"statistics.json", "rejected.jsonl"}


def test_what_cannot_be_read_is_listed_and_does_not_count(saved: Path, videos: Path, tmp_path: Path) -> None:
    shutil.copytree(videos, tmp_path / "in")
    (tmp_path / "in" / "broken.mp4").write_bytes(b"no video")
    video.write(tmp_path / "in" / "brief.mp4", draw(0, frames=3, size=16)[1], 25)
    video.write(tmp_path / "in" / "tiny.gif", draw(0, frames=9, size=6)[1], 25)
    for frames, missing in ((9, {"broken.mp4", "brief.mp4", "tiny.gif"}), (None, {"broken.mp4", "tiny.gif"})):
        out = tmp_path / str(frames)
        result = measured(saved, tmp_path / "in", out, frames=frames, size=None)
        rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        assert {row["path"] for row in rejected} == missing
        assert result["videos"] == 7 - len(missing)
    (tmp_path / "none").mkdir()
    shutil.copy(tmp_path / "in" / "tiny.gif", tmp_path / "none")
    with pytest.raises(DataError, match="no video could be encoded"):
        measured(saved, tmp_path / "none", tmp_path / "out", size=None)
    assert not (tmp_path / "out" / "statistics.json").exists()


@pytest.mark.parametrize(("frames", "batch"), [(9, 4), (9, 1), (None, 1)])
def test_latents_that_are_not_finite_are_left_out(
    saved: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int | None, batch: int
) -> None:
    """The videos beside them are encoded as if they were not there."""
    shutil.copytree(videos, tmp_path / "in")
    (tmp_path / "in" / "b.mp4").unlink()
    settings: dict[str, Any] = {"frames": frames, "batch": batch}
    good = measured(saved, tmp_path / "in", tmp_path / "good", **settings)
    white = torch.full((12, 20, 26, 3), 255, dtype=torch.uint8)
    video.write(tmp_path / "in" / "b.mp4", white, 25, "lossless")

    def spoiled(x: torch.Tensor) -> torch.Tensor:
        y = video.to_float(x)
        y[(y > 0.99).flatten(1).all(1)] = torch.nan
        return y

    monkeypatch.setattr("praxino.tasks.encoding.parts.to_float", spoiled)
    result = measured(saved, tmp_path / "in", tmp_path / "out", **settings)
    (row,) = (json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert (row["path"], row["reason"]) == ("b.mp4", "not_finite")
    assert (result["videos"], result["rejected"], good["videos"]) == (3, 1, 3)
    for name in ("mean", "std", "kl"):
        np.testing.assert_allclose(result[name], good[name], rtol=1e-6, atol=1e-9)


def test_a_vae_without_finite_latents_ends_an_encoding_early(
    saved: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves nothing that another attempt would have to go on with; the reason is in the error."""
    tried: list[int] = []

    def spoiled(x: torch.Tensor) -> torch.Tensor:
        tried.append(len(x))
        return video.to_float(x) * torch.nan

    place = "praxino.tasks.encoding.parts.to_float"
    for lost, count in ((99, 4), (2, 2)):
        tried.clear()
        monkeypatch.setattr(place, spoiled)
        monkeypatch.setattr("praxino.tasks.encode.LOST", lost)
        with pytest.raises(PraxinoError, match=r"could be encoded: .* not finite: use precision=32, or another VAE"):
            measured(saved, videos, tmp_path / "out", shard=1)
        assert len(tried) == count
        assert not (tmp_path / "out" / ".work").exists()
    monkeypatch.setattr(place, video.to_float)
    assert measured(saved, videos, tmp_path / "out", precision="bf16")["videos"] == 4


@pytest.mark.slow
def test_the_copy_of_a_checkpoint_resumes_as_the_original(videos: Path, tmp_path: Path) -> None:
    net = [f"model.net.{key}={value}" for key, value in TINY.items()]
    settings = ["experiment=wfvae_tiny", *net, f"data.root={videos}", "data.workers=0", "frames=5", "size=16"]
    settings += [f"data.cache_dir={tmp_path}/cache", "batch=1", "trainer.accelerator=cpu", "callbacks.media=null"]
    settings += ["data.val_fraction=0.25", "model.scheduler.total=2", "checkpoint.every=1"]

    def trained(out: Path, *overrides: str) -> dict[str, torch.Tensor]:
        register_resolvers()
        with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
            train(compose("train", overrides=[*settings, f"out={out}", *overrides]))
        return praxino.load(out, weights="raw").state_dict()

    straight = trained(tmp_path / "run", "trainer.max_steps=2")
    first = tmp_path / "run" / "checkpoints" / "step-00000001.ckpt"
    measured(first, videos, tmp_path / "measured", frames=5)
    sizes = [path.stat().st_size for path in (first, tmp_path / "measured" / "vae.ckpt")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)  # nothing stored twice
    resumed = trained(tmp_path / "on", "trainer.max_steps=2", f"ckpt={tmp_path}/measured/vae.ckpt")
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())


def test_the_configuration_has_the_defaults_of_the_function(saved: Path, videos: Path, tmp_path: Path) -> None:
    given = [f"vae={saved}", f"data.root={videos}", f"out={tmp_path}"]
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        cfg = compose("encode", overrides=given)
        small = compose("encode", overrides=[*given, "stats_only=true", "frames=5", "size=[16,24]", "workers=0"])
    defaults = {name: p.default for name, p in inspect.signature(encode).parameters.items() if p.default is not p.empty}
    arguments = check_call(encode, cfg)
    assert {name: arguments[name] for name in defaults} == defaults
    assert run(small)["latents"] == 4 * 2 * 2 * 3


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['praxino-encode', '--help']; from praxino.cli import encode\n"
    code += "try: encode()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "praxino-encode vae=PATH data.root=DIR out=DIR" in done.stdout


BAD = [
    (["vae={here}", "out={here}/o"], "data.root: a value is required"),
    (["data.root={here}", "out={here}/o"], "vae: a value is required"),
    (["vae={here}/none", "data.root={here}", "out={here}/o"], "vae: {here}/none does not exist"),
    (["vae={here}/vae", "data.root={here}", "out={here}/o", "stats_only=perhaps"], "stats_only: "),
    (["vae={here}/vae", "data.root={here}/vae", "out={here}/o", "frames=6"], "use 1 + 4k, e.g. 5 or 9"),
    (["vae={here}/vae", "data.root={here}/vae", "out={here}/o", "size=20"], "use multiples of 8"),
    (["vae={here}/vae", "data.root={here}/vae", "out={here}/o", "frames=0"], "frames=0: use 1 or more"),
    (["vae={here}/vae", "data.root={here}/vae", "out={here}/o", "size=null", "batch=2"], "use batch=1"),
    (["vae={here}/vae", "data.root={here}", "out={here}/o", "frame=5"], "frame: unknown key; did you mean frames"),
    (["vae={here}/vae", "data.root={here}", "out={here}/o", "precision=8"], "precision: "),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=[a[-1] for a, _ in BAD])
def test_bad_command_lines(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    checkpoint.save_official(WFVAE(**TINY | {"scale": [1.0] * 3, "shift": [0.0] * 3}), tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["praxino-encode", *(a.format(here=tmp_path) for a in arguments)])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as caught:
        cli.encode()
    error = capfd.readouterr().err.strip()
    assert expected.format(here=tmp_path) in error
    assert len(error.splitlines()) <= 3
    assert caught.value.code == 2
    assert not (tmp_path / "o").exists()
