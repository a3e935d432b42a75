"""Predictions: exact conversions, sense at the ends, errors that they pass on."""

import pytest
import torch
from denoisers import CASES, IDS, PATHS

from praxino.diffusion.prediction import PREDICTIONS, convert, join, sensitivity, split, target

each = pytest.mark.parametrize(("path", "prediction"), CASES, ids=IDS)


def sample(t: torch.Tensor, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, len(t), 3, 2, 2, 2, generator=generator, dtype=dtype)
    return x, noise, t.to(dtype)


@each
def test_split_inverts_the_target(path, prediction):
    x, noise, t = sample(torch.linspace(0.05, 0.95, 19))
    x0, eps = split(path, prediction, target(path, prediction, x, noise, t), path.mix(x, noise, t), t)
    assert torch.allclose(x0, x, atol=1e-12)
    assert torch.allclose(eps, noise, atol=1e-12)


@each
@pytest.mark.parametrize("other", PREDICTIONS)
def test_any_output_goes_there_and_back(path, prediction, other):
    output, z, t = sample(torch.linspace(0.05, 0.95, 19))
    there = convert(path, prediction, other, output, z, t)
    assert torch.allclose(convert(path, other, prediction, there, z, t), output, atol=1e-12)
    x0, eps = split(path, other, there, z, t)
    assert torch.allclose(path.mix(x0, eps, t), z, atol=1e-12)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_is_finite_at_the_ends(path, prediction, dtype):
    x, noise, t = sample(torch.tensor([0.0, 1.0]), dtype)
    z = path.mix(x, noise, t)
    x0, eps = split(path, prediction, target(path, prediction, x, noise, t), z, t)
    assert x0.isfinite().all()
    assert eps.isfinite().all()
    wrong = split(path, prediction, torch.randn_like(z), z, t)
    assert all(part.isfinite().all() for part in (*wrong, *sensitivity(path, prediction, t)))
    if prediction in ("v", "flow"):  # well conditioned even there
        assert torch.allclose(x0, x, atol=1e-6)
        assert torch.allclose(eps, noise, atol=1e-6)


def test_the_flow_of_rectified_flow_is_its_velocity_and_v_that_of_the_circle():
    x, noise, _ = sample(torch.zeros(5))
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    small = 1e-6
    flow, cosine = PATHS["flow"], PATHS["cosine"]
    speed = (flow.mix(x, noise, t + small) - flow.mix(x, noise, t - small)) / (2 * small)
    assert torch.allclose(target(flow, "flow", x, noise, t), speed, atol=1e-8)
    speed = (cosine.mix(x, noise, t + small) - cosine.mix(x, noise, t - small)) / (2 * small)
    assert torch.allclose(target(cosine, "v", x, noise, t) * torch.pi / 2, speed, atol=1e-8)


@each
def test_sensitivity_is_the_slope_of_split(path, prediction):
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    output = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    x0, eps = split(path, prediction, output, torch.ones_like(t), t)
    slopes = [torch.autograd.grad(part.sum(), output, retain_graph=True, allow_unused=True)[0] for part in (x0, eps)]
    for slope, size in zip(slopes, sensitivity(path, prediction, t), strict=True):
        assert slope is not None
        assert torch.allclose(slope.abs(), size, rtol=1e-10)


def test_join_takes_times_of_frames():
    x, noise, _ = sample(torch.zeros(2))
    t = torch.rand(2, 2, dtype=torch.float64)
    whole = join(PATHS["cosine"], "v", x, noise, t)
    frame = join(PATHS["cosine"], "v", x[:, :, 1:], noise[:, :, 1:], t[:, 1:])
    assert torch.equal(whole[:, :, 1:], frame)
