"""Paths: ends, derivatives, inverses, known values."""

import math

import pytest
import torch
from denoisers import PATHS

from praxino.diffusion.path import LinearBeta, LinearLogSNR, Sigmoid, VariancePreserving, expand

each = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_is_finite_at_the_ends_and_keeps_its_type(path, dtype):
    t = torch.tensor([0.0, 1.0], dtype=dtype)
    for function in (path.alpha, path.sigma, path.dalpha, path.dsigma, path.share):
        assert function(t).dtype == dtype
        assert function(t).isfinite().all(), function.__name__
    assert not path.log_snr(t).isnan().any()


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [("flow", (1, 0), (0, 1)), ("cosine", (1, 0), (0, 1)), ("sigmoid", (1, 0), (0, 1)),
     ("linear", (1, 0), (math.exp(-5.025), math.sqrt(1 - math.exp(-10.05)))),
     ("vdm", (1 / math.sqrt(1 + math.exp(-10)), 1 / math.sqrt(1 + math.exp(10))),
      (1 / math.sqrt(1 + math.exp(10)), 1 / math.sqrt(1 + math.exp(-10))))],
)  # fmt: skip
def test_the_ends(name, start, end):
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    levels = torch.stack([PATHS[name].alpha(t), PATHS[name].sigma(t)])
    assert torch.allclose(levels, torch.tensor([start, end], dtype=torch.float64).T, atol=1e-14)


@each
def test_noise_grows_and_signal_falls(path):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert (path.alpha(t).diff() < 0).all()
    assert (path.sigma(t).diff() > 0).all()
    if isinstance(path, VariancePreserving):
        assert torch.allclose(path.alpha(t).square() + path.sigma(t).square(), torch.ones_like(t), atol=1e-14)


@each
def test_derivatives_are_those_of_autograd(path):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    for function, derivative in ((path.alpha, path.dalpha), (path.sigma, path.dsigma)):
        (truth,) = torch.autograd.grad(function(t).sum(), t)
        assert torch.allclose(derivative(t), truth, rtol=1e-10)


@each
def test_times_invert_levels(path):
    t = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    assert torch.allclose(path.time(path.log_snr(t)), t, atol=1e-9)
    assert torch.allclose(path.at_share(path.share(t)), t, atol=1e-9)
    assert torch.allclose(path.log_snr(t), 2 * (path.alpha(t) / path.sigma(t)).log(), atol=1e-9)


def test_known_values():
    half = torch.tensor(0.5, dtype=torch.float64)
    assert PATHS["vdm"].log_snr(half) == 0
    assert PATHS["cosine"].alpha(half).item() == pytest.approx(math.sqrt(0.5), abs=1e-15)
    assert PATHS["sigmoid"].alpha(half).item() == pytest.approx(math.sqrt(0.5), abs=1e-15)
    logistic = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(3))
    square = (logistic[0] - (1 - logistic[1])) / (logistic[0] - logistic[2])  # Jabri et al., at t = 1/4
    assert 1 - PATHS["sigmoid"].alpha(half / 2).item() ** 2 == pytest.approx(square, abs=1e-12)


def test_the_linear_schedule_is_the_limit_of_a_thousand_discrete_steps():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    products = (1 - betas).cumprod(0)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.allclose(PATHS["linear"].alpha(t)[:800].square(), products[:800], rtol=0.05)


def test_small_noise_keeps_its_accuracy_in_float32():
    t = torch.tensor([1e-6, 1e-4])
    for name in ("linear", "sigmoid", "cosine", "flow"):
        assert torch.allclose(PATHS[name].sigma(t).double(), PATHS[name].sigma(t.double()), rtol=1e-5), name


def test_mix_takes_a_time_for_every_clip_or_frame():
    x, noise = torch.randn(2, 3, 4, 1, 1), torch.randn(2, 3, 4, 1, 1)
    t = torch.rand(2, 4)
    z = PATHS["flow"].mix(x, noise, t)
    assert torch.allclose(z[1, :, 2], (1 - t[1, 2]) * x[1, :, 2] + t[1, 2] * noise[1, :, 2])
    assert torch.equal(PATHS["flow"].mix(x, noise, t[:, 0]), PATHS["flow"].mix(x, noise, t[:, :1].expand(2, 4)))
    with pytest.raises(ValueError, match=r"\(3,\) do not fit"):
        expand(torch.zeros(3), x)


@pytest.mark.parametrize(
    "make", [lambda: LinearBeta(2.0, 1.0), lambda: Sigmoid(1.0, 1.0), lambda: LinearLogSNR(-1.0, 1.0)]
)
def test_schedules_that_do_not_fall_are_refused(make):
    with pytest.raises(ValueError, match=r"needed|below"):
        make()
