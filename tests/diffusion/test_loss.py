"""The loss: analytic values, weights, given frames, levels of frames."""

import pytest
import torch
from denoisers import CASES, IDS, PATHS, gaussian

from praxino.diffusion.loss import DiffusionLoss, weight_of
from praxino.diffusion.prediction import PREDICTIONS, sensitivity
from praxino.diffusion.time import UniformTime

MEAN, STD = 0.5, 0.7


def clips(*shape: int, seed: int = 0) -> torch.Tensor:
    return MEAN + STD * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(path, prediction="flow", **settings) -> DiffusionLoss:
    return DiffusionLoss(path, UniformTime(), prediction, **settings)


@pytest.mark.parametrize(("path", "prediction"), CASES, ids=IDS)
@pytest.mark.parametrize("weight", ["none", "min_snr"])
def test_the_exact_denoiser_reaches_the_analytic_loss(path, prediction, weight):
    x, t = clips(3, 1, 1, 200, 200), torch.tensor([0.2, 0.5, 0.8])
    terms = make(path, prediction, weight=weight)(
        gaussian(path, prediction, MEAN, STD), x, t=t, generator=torch.Generator().manual_seed(1)
    )
    alpha, sigma = path.alpha(t), path.sigma(t)
    variance = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)  # of x, given z
    plain = variance / sensitivity(path, prediction, t)[0].square()
    expected = plain if weight == "none" else (alpha / sigma).square().clamp(max=5.0) * variance
    assert torch.allclose(terms["per_sample"], expected, rtol=0.03)
    assert terms["loss"].item() == pytest.approx(terms["per_sample"].mean().item())
    assert terms["mse"].item() == pytest.approx(plain.mean().item(), rel=0.03)


def test_min_snr_weights_are_those_of_the_paper():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    for path in (PATHS["linear"], PATHS["cosine"], PATHS["sigmoid"], PATHS["vdm"]):
        snr = path.log_snr(t).exp()
        cut = snr.clamp(max=5.0)
        for prediction, expected in (("x0", cut), ("eps", cut / snr), ("v", cut / (snr + 1))):
            assert torch.allclose(weight_of(path, prediction, "min_snr", t, 5.0, 0.0), expected)
    snr = ((1 - t) / t).square()
    expected = snr.clamp(max=5.0) * t.square()  # an error of the flow is one of x0 over t
    assert torch.allclose(weight_of(PATHS["flow"], "flow", "min_snr", t, 5.0, 0.0), expected)


def test_sigmoid_weights_are_those_of_the_paper():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    path = PATHS["cosine"]
    snr = path.log_snr(t).exp()
    of_eps = torch.sigmoid(2.0 - path.log_snr(t))
    for prediction, expected in (("eps", of_eps), ("x0", of_eps * snr), ("v", of_eps * snr / (1 + snr))):
        assert torch.allclose(weight_of(path, prediction, "sigmoid", t, 5.0, 2.0), expected)


@pytest.mark.parametrize("weight", ["min_snr", "sigmoid"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_weighted_loss_does_not_depend_on_what_is_predicted(path, weight):
    x, t = clips(8, 2, 3, 4, 4).double(), torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = [
        make(path, prediction, weight=weight, bias=1.0)(gaussian(path, prediction, 0.0, 1.0), x, t=t, noise=noise)
        for prediction in PREDICTIONS
    ]
    for terms in losses[1:]:
        assert torch.allclose(terms["per_sample"], losses[0]["per_sample"], rtol=1e-9)


@pytest.mark.parametrize("weight", ["none", "min_snr", "sigmoid"])
@pytest.mark.parametrize(("path", "prediction"), CASES, ids=IDS)
def test_weights_are_finite_at_the_ends(path, prediction, weight):
    weights = weight_of(path, prediction, weight, torch.tensor([0.0, 1.0]), 5.0, 0.0)
    assert weights.isfinite().all()
    assert (weights >= 0).all()


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_given_frames_enter_as_they_are_and_count_for_nothing(path):
    x = clips(3, 2, 4, 2, 2)
    known = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    seen = []

    def denoise(z, t):
        seen.append((z, t))
        return torch.where(known[:, None, :, None, None], torch.nan, torch.zeros_like(z))

    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    terms = make(path)(denoise, x, known=known, t=torch.tensor([0.3, 0.5, 0.9]), noise=noise)
    (z, t), mask = seen[0], known[:, None, :, None, None].expand_as(x)
    assert torch.equal(t, torch.where(known, 0, torch.tensor([[0.3], [0.5], [0.9]])))
    assert torch.equal(z[mask], x[mask])
    squares = (noise - x).square()
    expected = [squares[0, :, 2:].mean(), squares[1].mean(), squares[2, :, 1:3].mean()]
    assert torch.allclose(terms["per_sample"], torch.stack(expected))
    assert torch.allclose(terms["mse"], torch.stack(expected).mean())
    whole = make(path)(lambda z, t: torch.zeros_like(z), x[1:2], t=torch.tensor([0.5]), noise=noise[1:2])
    assert torch.allclose(whole["loss"], terms["per_sample"][1])


def test_a_clip_that_is_given_whole_costs_nothing():
    known = torch.ones(1, 3, dtype=torch.bool)
    terms = make(PATHS["flow"])(lambda z, t: z, clips(1, 2, 3, 2, 2), known=known)
    assert terms["loss"] == 0


def test_context_noise_is_a_level_of_its_own_for_every_clip():
    x, known = clips(500, 1, 3, 1, 1), torch.tensor([True, True, False]).expand(500, -1)
    seen = []
    loss = make(PATHS["flow"])
    noise = torch.ones_like(x)
    generator = torch.Generator().manual_seed(0)
    loss(lambda z, t: seen.append((z, t)) or z, x, known=known, context_noise=0.2, noise=noise, generator=generator)
    z, t = seen[0]
    assert torch.equal(t[:, 0], t[:, 1])
    assert 0 <= t[:, 0].min() < 0.01 < 0.19 < t[:, 0].max() <= 0.2
    assert t[:, 0].mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.allclose(z[:, 0, 0, 0, 0], (1 - t[:, 0]) * x[:, 0, 0, 0, 0] + t[:, 0])


def test_levels_of_frames_are_drawn_apart():
    seen = []
    generator = torch.Generator().manual_seed(0)
    make(PATHS["flow"], per_frame=True)(lambda z, t: seen.append(t) or z, clips(6, 1, 5, 1, 1), generator=generator)
    assert seen[0].shape == (6, 5)
    assert seen[0].unique().numel() == 30
    make(PATHS["flow"])(lambda z, t: seen.append(t) or z, clips(6, 1, 5, 1, 1))
    assert seen[1].shape == (6,)


def test_the_loss_of_a_batch_is_the_mean_of_its_halves():
    x, t, noise = clips(4, 2, 3, 2, 2), torch.rand(4), torch.randn(4, 2, 3, 2, 2)
    known = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    loss = make(PATHS["cosine"], "v", weight="min_snr")

    def of(part: slice):
        return loss(lambda z, t: 0.5 * z, x[part], known=known[part], t=t[part], noise=noise[part])["loss"]

    assert torch.allclose(of(slice(0, 4)), (of(slice(0, 2)) + of(slice(2, 4))) / 2)


def test_half_precision_is_judged_in_float32_and_gradients_flow():
    gain = torch.tensor(0.3, requires_grad=True)
    x = clips(2, 2, 3, 2, 2)
    terms = make(PATHS["flow"])(lambda z, t: (gain * z).bfloat16(), x.bfloat16())
    assert terms["loss"].dtype == torch.float32
    terms["loss"].backward()
    assert gain.grad is not None
    assert gain.grad.abs() > 0
    assert not terms["mse"].requires_grad


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'velocity' is unknown"):
        make(PATHS["flow"], "velocity")
    with pytest.raises(ValueError, match="'snr' is unknown"):
        make(PATHS["flow"], weight="snr")
