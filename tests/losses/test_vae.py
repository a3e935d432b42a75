"""The loss is a weighted sum of means."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from praxino.errors import ConfigError
from praxino.losses.coefficients import coefficient_l1
from praxino.losses.pixel import charbonnier, l1, l2
from praxino.losses.vae import VAELoss
from praxino.models.vae import Output, Posterior


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Output]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x = draw(2, 3, 5, 8, 8)
    coefficients = [(draw(2, 12, 3, 4, 4), draw(2, 24, 2, 2, 2)) for _ in range(2)]
    return x, Output(draw(2, 3, 5, 8, 8), Posterior(draw(2, 8, 2, 1, 1)), *coefficients)


def test_pixel_losses_by_hand():
    x, y = torch.zeros(2, 1, 1, 1, 1), torch.tensor([1.0, -3.0]).view(2, 1, 1, 1, 1)
    assert l1(x, y).item() == 2
    assert l2(x, y).item() == 5
    assert charbonnier(x, y, 4.0).item() == pytest.approx((17**0.5 + 5) / 2)
    assert charbonnier(x, x).item() == pytest.approx(1e-3)


def test_loss_is_the_weighted_sum_of_unweighted_means():
    x, output = example()
    weights = {"l1": 0.5, "l2": 2.0, "charbonnier": 3.0, "wavelet": 0.1, "kl": 0.01}
    terms = VAELoss(**weights)(x, output)
    d = x - output.recon
    levels = list(zip(output.encoder_coefficients, output.decoder_coefficients, strict=True))
    mean, logvar = output.posterior.moments.chunk(2, 1)
    expected = {
        "l1": d.abs().mean(),
        "l2": d.square().mean(),
        "charbonnier": (d.square() + 1e-6).sqrt().mean(),
        "wavelet": sum((e - f).abs().sum() for e, f in levels) / sum(e.numel() for e, _ in levels),
        "kl": 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(terms["loss"], sum(weights[name] * value for name, value in expected.items()))


def test_terms_without_a_weight_are_not_computed():
    x, output = example()
    output.encoder_coefficients = output.decoder_coefficients = ()
    assert set(VAELoss(wavelet=0.0, kl=0.0)(x, output)) == {"loss", "nll", "rest", "l1"}


def test_terms_are_float32_in_bf16():
    x, output = example(torch.bfloat16)
    assert {term.dtype for term in VAELoss()(x, output).values()} == {torch.float32}


def test_equal_to_the_reference(shared):
    """The official terms are sums over the batch size or the number of frames; ours are means."""
    folder = shared("golden/losses")
    data, info = load_file(folder / "data.safetensors"), json.loads((folder / "info.json").read_text())
    official = info["gen_before_disc_start.l1.perceptual0"]
    coefficients = [(data[f"{side}_l1"], data[f"{side}_l2"]) for side in ("enc", "dec")]
    terms = VAELoss(l1=1.0, l2=1.0)(data["x"], Output(data["recon"], Posterior(data["parameters"]), *coefficients))
    frame = data["x"][0, :, 0].numel()
    batch = data["x"].shape[0]
    for name in ("l1", "l2"):
        nll = info[f"gen_before_disc_start.{name}.perceptual0"]["nll_loss"]
        assert terms[name].item() == pytest.approx((nll / frame - 0.25) * math.exp(0.25), rel=1e-5)
    assert terms["kl"].item() == pytest.approx(official["kl_loss"] * batch / data["mean"].numel(), rel=1e-5)
    count = sum(e.numel() for e in coefficients[0])
    assert terms["wavelet"].item() == pytest.approx(official["wl_loss"] * batch / count, rel=1e-5)


def test_wrong_weights_and_missing_coefficients():
    with pytest.raises(ConfigError, match="pixel loss"):
        VAELoss(l1=0.0)
    with pytest.raises(ConfigError, match="negative"):
        VAELoss(kl=-1.0)
    with pytest.raises(ValueError, match="wavelet=0"):
        coefficient_l1([], [])
