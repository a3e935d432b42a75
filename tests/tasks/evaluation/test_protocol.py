"""Protocols say what was done: what was changed is listed, and what would not be heeded is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from praxino import checkpoint
from praxino.config import check_call, conf_dir, register_resolvers
from praxino.errors import ConfigError
from praxino.models.wfvae import WFVAE
from praxino.tasks.benchmark import benchmark
from praxino.tasks.evaluate import evaluate
from praxino.tasks.evaluation.protocol import changes, identify
from praxino.tasks.evaluation.verdict import Judge, mean_curves
from praxino.tasks.rundir import versions


def composed(name: str, *overrides: str) -> dict[str, Any]:
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        cfg = compose(name, overrides=["out=a", *overrides])
    return check_call(evaluate if name == "evaluate" else benchmark, cfg)


@pytest.mark.parametrize("name", ["wfvae", "vidtok", "opensora_plan", "native"])
def test_a_protocol_alone_changes_nothing(name: str) -> None:
    assert changes(name, composed("evaluate", f"protocol={name}")) == {"name": name, "changed": []}
    rest = ["fvd.detector=I3D", "fvd.sha256=12345678", "workers=5", "data.root=V", "report=false"]
    assert changes(name, composed("evaluate", f"protocol={name}", *rest))["changed"] == []
    assert changes(name, composed("benchmark", f"protocol={name}", "vaes=[v]", "data.root=V"))["changed"] == []


@pytest.mark.parametrize(
    "change",
    [
        *("window=reflect", "where=center", "short=pad", "precision=bf16", "weights=raw", "limit=3", "seed=1"),
        *("lpips.weights=random", "lpips.net=vgg", "fvd.stride=2", "fid.size=64", "fvd.per_batch=false", "frames=9"),
    ],
)
def test_every_change_is_listed(change: str) -> None:
    found = changes("wfvae", composed("evaluate", "protocol=wfvae", change))
    assert found["changed"] == [change.partition("=")[0]]


def test_settings_of_python_are_compared_with_the_defaults() -> None:
    given = {"protocol": "native", "frames": None, "size": None, "stride": 1, "fps": None, "batch": 1, "limit": None}
    given |= {"metrics": ("psnr", "ssim", "difference", "flicker"), "window": "valid", "short": "drop", "seed": 0}
    given |= {"lpips": None, "fvd": {"stride": 1}, "fid": None, "where": "start", "weights": "ema", "precision": "32"}
    assert changes("native", given)["changed"] == []
    assert changes("native", given | {"fid": {"stride": 8}, "where": "center"})["changed"] == ["fid.stride", "where"]


TREES = {"real": "a", "fake": "b"}
SAMPLES = {"ckpt": "a", "real": "b"}
PREDICTIONS = {"ckpt": "a", "input": "b"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (TREES | {"protocol": "wfvae", "frames": 33, "size": 256}, "protocol=wfvae is of reconstructions and sets"),
        (SAMPLES | {"protocol": "vidtok"}, "protocol=vidtok is of reconstructions and sets"),
        (PREDICTIONS | {"protocol": "native"}, "protocol=native is of reconstructions and sets"),
        (TREES | {"frames": 33}, "frames=33 would not be heeded, for two trees are compared by all frames"),
        (TREES | {"size": 32}, "size=32"),
        (TREES | {"stride": 2}, "stride=2"),
        (TREES | {"fps": 10.0}, "fps=10.0"),
        (TREES | {"short": "pad"}, "short=pad"),
        (TREES | {"where": "center"}, "where=center"),
        (PREDICTIONS | {"frames": 9}, r"frames=9 .* use generate\.frames"),
        (PREDICTIONS | {"where": "center"}, "where=center"),
        (SAMPLES | {"frames": 9}, r"frames=9 .* use generate\.frames"),
        (SAMPLES | {"size": None}, r"size=None .* generate\.size"),
        ({"vae": "a", "data": {"root": "b"}, "frames": None, "where": "center"}, "where=center .* whole videos"),
    ],
)
def test_what_would_not_be_heeded_is_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(str(tmp_path / "out"), **given)
    assert not (tmp_path / "out").exists()


def test_a_vae_is_known_by_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = WFVAE(base_channels=8, latent_dim=4, norm_type="layernorm")
    checkpoint.save_vae(vae, tmp_path / "own.ckpt")
    checkpoint.save_official(vae, tmp_path / "official")
    own, official = (identify(str(tmp_path / name), vae) for name in ("own.ckpt", "official"))
    assert (own["file"], own["step"]) == ("own.ckpt", 0)
    assert (official["file"], official["step"]) == ("diffusion_pytorch_model.safetensors", None)
    assert own["fingerprint"] == official["fingerprint"] == checkpoint.fingerprint(vae)


def test_the_weights_of_lpips_are_named(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"abc")
    found = [Judge(("lpips",), lpips={"weights": weights}).protocol()["lpips"] for weights in (None, "random")]
    assert found[0] == {"net": "alex", "weights": "alexnet-owt-7be5be79.pth", "sha256": "7be5be79"}
    assert found[1] == {"net": "alex", "weights": "random"}
    file = Judge(("lpips",), lpips={"weights": str(tmp_path / "w.pth"), "sha256": "ba7816bf"}).protocol()["lpips"]
    assert file["sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_versions_name_the_device_that_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    assert versions(torch.device("cpu"))["device"] == "cpu"
    assert versions(torch.device("cuda"))["device"] == versions()["device"] == "a card"
    assert versions()["torchvision"]
    assert versions()["lpips"]


def test_mean_curves_count_the_videos() -> None:
    curves = [{"psnr": [1.0, 2.0, 3.0, 4.0]}, {"psnr": [3.0, None]}, {"psnr": [5.0, 6.0, 9.0]}]
    found = mean_curves(curves)["psnr"]  # type: ignore[arg-type]
    assert found == {"frame": [0, 1, 2], "mean": [3.0, 4.0, 6.0], "n": [3, 2, 2]}
