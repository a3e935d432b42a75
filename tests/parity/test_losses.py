"""The losses against the official ones: LPIPS with VGG, the adaptive weight, the discriminator's step, the sums."""

import json
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from praxino.losses.adversarial import Adversary
from praxino.losses.perceptual import LPIPS
from praxino.losses.vae import VAELoss
from praxino.models.discriminator import NLayerDiscriminator3D
from praxino.models.vae import Posterior


def noise(key: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32))


# LPIPS.


def lpips_recipe(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return the weight of the golden LPIPS under this name."""
    if key.startswith("lin"):
        return noise(key, shape).abs() / shape[1]
    return noise(key, shape) * (0.05 if len(shape) == 1 else (2 / np.prod(shape[1:])) ** 0.5)


@pytest.mark.filterwarnings("ignore:LPIPS has random")
def test_lpips_with_vgg(shared):
    folder = shared("golden/lpips_vgg")
    data, info = load_file(folder / "data.safetensors"), json.loads((folder / "info.json").read_text())
    lpips = LPIPS("vgg", weights="random", chunk=1)
    own = lpips.net.state_dict()
    assert {key: list(own[key].shape) for key in info["keys"]} == info["keys"]
    for key, values in info["scaling"].items():
        assert own[key].flatten().tolist() == values
    drawn = {key: lpips_recipe(key, shape) for key, shape in info["keys"].items() if key not in info["scaling"]}
    lpips.net.load_state_dict(drawn, strict=False)
    a, b, c = (data[name].transpose(0, 1)[None] for name in "abc")  # (1, 3, 2, 64, 64)
    for x, y, name in ((a, b, "ab"), (a, c, "ac"), (a, a, "aa")):  # measured: 2e-7
        torch.testing.assert_close(lpips(x, y), data[f"lpips_{name}"].view(1, 2), rtol=1e-5, atol=0)


# The adversarial game.


@pytest.fixture
def golden(shared):
    folder = shared("golden/losses")
    return load_file(folder / "data.safetensors"), json.loads((folder / "info.json").read_text())


@pytest.fixture
def adversary() -> Adversary:
    net = NLayerDiscriminator3D(width=64, layers=2).eval()
    state = {key: value for key, value in net.state_dict().items() if "running_" in key or "num_batches" in key}
    for key, value in net.state_dict().items():
        if key not in state:
            drawn = noise(key, tuple(value.shape))
            gain = key.endswith("weight") and value.ndim == 1
            bias = 0.05 if value.ndim == 1 else value[0].numel() ** -0.5
            state[key] = 1 + 0.1 * drawn if gain else bias * drawn
    net.load_state_dict(state)
    return Adversary(net, weight=0.5, adaptive="wfvae")


def test_the_adaptive_weight(golden, adversary):
    data, info = golden
    expected = next(value for key, value in info.items() if key.startswith("gen_with_adaptive_weight"))
    weight = data["last_layer_weight"].requires_grad_()
    recon = F.conv3d(data["feat"], weight)
    nll = (recon - data["x"]).abs().sum() / (2 * 5)
    generator = adversary.generator_loss(recon)
    gradients = [torch.autograd.grad(term, weight, retain_graph=True)[0] for term in (nll, generator)]
    assert float(nll.detach()) == pytest.approx(expected["nll_loss"], rel=1e-5)
    assert float(generator.detach()) == pytest.approx(expected["g_loss"], rel=1e-5)
    assert float(adversary.weigh(*gradients)) == pytest.approx(expected["d_weight"], rel=1e-5)
    assert adversary.factor(0) == expected["disc_factor"]


def test_the_discriminators_step(golden, adversary):
    data, info = golden
    terms = adversary.discriminator_loss(data["x"], data["disc_input_recon"], step=0)
    assert float(terms["loss"].detach()) == pytest.approx(info["disc_step"]["disc_loss"], rel=1e-5)
    assert float(terms["real"]) == pytest.approx(info["disc_step"]["logits_real"], rel=1e-5)
    assert float(terms["fake"]) == pytest.approx(info["disc_step"]["logits_fake"], rel=1e-5)
    adversary.start = 1
    early = adversary.discriminator_loss(data["x"], data["disc_input_recon"], step=0)
    assert float(early["loss"].detach()) == info["disc_step_before_start"]["disc_loss"] == 0.0
    assert float(early["fake"]) == pytest.approx(info["disc_step_before_start"]["logits_fake"], rel=1e-5)


# The sums of reconstruction, wavelet coefficients and KL.


class Pooled(nn.Module):
    """What stands for LPIPS in the golden losses: the difference of frames at half the size, `(B, T)`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (F.avg_pool3d(x, (1, 2, 2)) - F.avg_pool3d(y, (1, 2, 2))).abs().mean(dim=(1, 3, 4))


@pytest.mark.parametrize("perceptual", [0, 1])
@pytest.mark.parametrize("pixel", ["l1", "l2"])
def test_the_official_sums(golden, pixel, perceptual):
    data, info = golden
    expected = info[f"gen_before_disc_start.{pixel}.perceptual{perceptual}"]
    weights = {"l1": 0.0, "l2": 0.0, pixel: 1.0, "perceptual": float(perceptual), "wavelet": 0.1, "kl": 1e-6}
    loss = VAELoss(**weights, lpips=Pooled(), reduction="official", logvar=expected["logvar"])
    output = SimpleNamespace(
        recon=data["recon"],
        posterior=Posterior(data["parameters"]),
        encoder_coefficients=(data["enc_l1"], data["enc_l2"]),
        decoder_coefficients=(data["dec_l1"], data["dec_l2"]),
    )
    terms = loss(data["x"], output)
    assert float(terms["nll"]) == pytest.approx(expected["nll_loss"], rel=1e-5)
    assert float(terms["kl"]) * data["mean"][0].numel() == pytest.approx(expected["kl_loss"], rel=1e-5)
    coefficients = data["enc_l1"][0].numel() + data["enc_l2"][0].numel()
    assert float(terms["wavelet"]) * coefficients == pytest.approx(expected["wl_loss"], rel=1e-5)
    assert float(terms["loss"]) == pytest.approx(expected["total_loss"], rel=1e-5)
