"""The doctor finds what is wrong with data and with a VAE, and says that the healthy are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from praxino.checkpoint import save_official
from praxino.data.synthetic import make_dataset
from praxino.errors import ConfigError, PraxinoError
from praxino.models.dit import VideoDiT
from praxino.models.vae import Posterior
from praxino.models.wfvae import WFVAE
from praxino.tasks import doctor_dit
from praxino.tasks.doctor import check_latents, check_vae, doctor
from praxino.tasks.doctor_dit import check_cache, check_latent_training, check_learning, check_sample
from praxino.video import write

from ..training import make_net


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return (
        make_dataset(tmp_path_factory.mktemp("data") / "videos", videos=3, val_videos=1, frames=12, size=16) / "train"
    )


def states(checks: Any) -> dict[str, str]:
    return {check["name"]: check["colour"] for check in checks}


def clips() -> Tensor:
    return torch.rand(2, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def found(model: WFVAE, x: Tensor) -> dict[str, Any]:
    return {check.name: check for check in check_vae(model.eval(), x)}


def test_a_report_of_data_and_vae(videos: Path, tmp_path: Path) -> None:
    save_official(make_net(), tmp_path / "vae")
    settings: dict[str, Any] = {"frames": 5, "size": 16, "device": "cpu", "cache_dir": str(tmp_path / "cache")}
    arguments = {"data": {"root": str(videos)}, "vae": str(tmp_path / "vae"), "out": str(tmp_path / "out"), **settings}
    with pytest.raises(PraxinoError, match="are red: round trip"):  # random weights reconstruct nothing
        doctor(**arguments)
    result = json.loads((tmp_path / "out" / "doctor.json").read_text())
    colours = states(result["checks"])
    good = {"readable", "length", "rate", "size", "finite", "causality", "chunks", "cost"}
    good |= {"cache", "denoiser", "sample"}
    assert {name for name, colour in colours.items() if colour == "green"} >= good
    assert colours["statistics"] == "yellow"
    assert result["healthy"] == ("red" not in colours.values())


def test_data_alone(videos: Path, tmp_path: Path) -> None:
    result = doctor({"root": str(videos)}, str(tmp_path / "out"), frames=5, size=16, cache_dir=str(tmp_path / "cache"))
    assert states(result["checks"]) == dict.fromkeys(("readable", "length", "rate", "size"), "green")
    assert result["healthy"]
    assert [check["value"] for check in result["checks"]] == [1.0, 12, 25.0, 16]


def test_data_in_a_bad_state(videos: Path, tmp_path: Path) -> None:
    root = tmp_path / "videos"
    write(root / "fast.mp4", torch.zeros(4, 8, 8, 3, dtype=torch.uint8), 50)
    write(root / "slow.mp4", torch.zeros(20, 32, 32, 3, dtype=torch.uint8), 10)
    (root / "bad.mp4").write_bytes(b"nothing")
    arguments: dict[str, Any] = {"data": {"root": str(root)}, "cache_dir": str(tmp_path / "cache"), "size": 16}
    result = doctor(**arguments, out=str(tmp_path / "out"), frames=9)
    assert states(result["checks"]) == dict.fromkeys(("readable", "length", "rate", "size"), "yellow")
    with pytest.raises(PraxinoError, match="1 of 4 checks are red: length") as caught:
        doctor(**arguments, out=str(tmp_path / "out"), frames=33)
    assert caught.value.exit_code == 1
    assert not json.loads((tmp_path / "out" / "doctor.json").read_text())["healthy"]
    with pytest.raises(ConfigError, match="size=null"):
        doctor(**{**arguments, "size": None}, out=str(tmp_path / "out"))


def test_a_vae_that_looks_ahead_or_cannot_be_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    assert found(net, clips())["causality"].colour == "green"

    class Ahead(WFVAE):
        def encode(self, x: Tensor) -> Posterior:
            moments = super().encode(x).moments
            return Posterior(moments + x.mean())

    ahead = Ahead(**net.config)
    ahead.load_state_dict(net.state_dict())
    checks = found(ahead, clips())
    assert checks["causality"].colour == checks["chunks"].colour == "red"
    with torch.no_grad():
        next(net.decoder.parameters()).fill_(torch.nan)
    assert {name: check.colour for name, check in found(net, clips()).items()} == {"finite": "red"}


def test_statistics_of_other_latents() -> None:
    net, generator = make_net(), torch.Generator().manual_seed(0)
    latents = 3.0 + 2.0 * torch.randn(4, 2, 3, 8, 8, generator=generator)
    variance = torch.full_like(latents, 0.25)
    net.set_statistics([3.0, 3.0], [4.25**0.5, 4.25**0.5])
    check = check_latents(net, latents, variance)
    assert check.colour == "green"
    assert check.value == pytest.approx(1.0, abs=0.1)
    net.set_statistics([0.0, 0.0], [1.0, 1.0])
    assert check_latents(net, latents, variance).colour == "yellow"


def test_latents_that_bf16_cannot_hold() -> None:
    moments = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    check = check_cache(moments)
    assert check.colour == "green"
    mean = moments[:, :2]
    rounding = (mean.bfloat16().float() - mean).square().mean().sqrt() / mean.std()
    assert check.value == pytest.approx(float(rounding))
    far = check_cache(moments + 100)  # bf16 is 0.5 apart there
    assert far.colour == "yellow"
    assert 0.1 < far.value < 0.2  # 0.5 / sqrt(12) of deviations of 1


def test_a_denoiser_that_does_not_learn() -> None:
    torch.manual_seed(0)
    z = torch.randn(1, 2, 3, 4, 4)
    net = VideoDiT(2, width=64, depth=2, num_heads=2)
    assert check_learning(net, z).colour == "green"
    assert check_learning(net, z * torch.nan).colour == "red"


def test_the_loss_is_that_after_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(doctor_dit, "STEPS", 1)
    check = check_learning(VideoDiT(2, width=64, depth=2, num_heads=2), torch.randn(1, 2, 3, 4, 4))
    assert check.value < 0.999  # before it, 1


@pytest.mark.parametrize(("scale", "colour"), [(0.0, "red"), (0.8, "green"), (1.0, "green"), (30.0, "red")])
def test_samples_far_from_the_scale_of_latents(scale: float, colour: str) -> None:
    """A fresh denoiser predicts no flow: what it draws is what it is given."""
    net, noise = VideoDiT(2, width=64, depth=2, num_heads=2), torch.randn(1, 2, 3, 4, 4)
    check = check_sample(net, scale * noise, noise, lambda z: z)
    assert check.colour == colour
    assert check.value == pytest.approx(float((scale * noise).square().mean()))
    assert check_sample(net, noise, noise, lambda z: z * torch.nan).colour == "red"


def test_the_doctor_leaves_the_random_numbers_alone() -> None:
    net, moments = make_net(), torch.randn(2, 4, 3, 2, 2)
    state = torch.random.get_rng_state()
    checks = list(check_latent_training(net, moments))
    assert [check.name for check in checks] == ["cache", "denoiser", "sample"]
    assert torch.equal(torch.random.get_rng_state(), state)
