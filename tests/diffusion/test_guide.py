"""Guidance: a product of Gaussians, interval, rescaling, calls."""

import pytest
import torch
from denoisers import CASES, IDS, PATHS, gaussian

from praxino.diffusion.guide import guide
from praxino.diffusion.solve import solve


class Counted:
    def __init__(self, function) -> None:
        self.function, self.calls = function, 0

    def __call__(self, z, t):
        self.calls += 1
        return self.function(z, t)


def test_scale_one_is_the_conditional_and_calls_nothing_else():
    def forbidden(z, t):
        raise AssertionError

    conditional = gaussian(PATHS["flow"], "flow", 1.0, 0.5)
    assert guide(conditional, forbidden, 1.0) is conditional


@pytest.mark.parametrize(("path", "prediction"), CASES, ids=IDS)
def test_guided_gaussians_are_the_gaussian_of_their_product(path, prediction):
    """N(m, s)^w / N(m0, s)^(w - 1) is normal around m0 + w (m - m0) with the same s, at every level of noise."""
    guided = guide(gaussian(path, prediction, 0.5, 0.7), gaussian(path, prediction, 0.1, 0.7), 3.0)
    expected = gaussian(path, prediction, 0.1 + 3 * 0.4, 0.7)
    z, t = torch.randn(9, 2, 3, dtype=torch.float64), torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    assert torch.allclose(guided(z, t), expected(z, t), atol=1e-12)
    unit = torch.eye(2, dtype=torch.float64)[0].view(2, 1, 1)
    out = solve(guided, unit, path=path, prediction=prediction, sampler="heun", steps=64).flatten()
    assert out[1].item() == pytest.approx(1.3, rel=0.015)  # the terminal signal of 0.0067 costs 0.7 %
    assert (out[0] - out[1]).item() == pytest.approx(0.7, rel=0.01)


def test_scale_zero_is_the_unconditional():
    path = PATHS["flow"]
    z, t = torch.randn(3, 2, 2), torch.rand(3)
    without = gaussian(path, "flow", 0.0, 1.0)
    assert torch.allclose(guide(gaussian(path, "flow", 1.0, 0.5), without, 0.0)(z, t), without(z, t), atol=1e-6)


def test_guidance_keeps_to_its_interval():
    path = PATHS["flow"]
    conditional, without = Counted(gaussian(path, "flow", 1.0, 0.5)), Counted(gaussian(path, "flow", 0.0, 0.5))
    guided = guide(conditional, without, 2.0, interval=(0.3, 0.6))
    always = guide(conditional.function, without.function, 2.0)
    z = torch.randn(4, 2, 2)
    assert torch.equal(guided(z, torch.full((4,), 0.7)), conditional.function(z, torch.full((4,), 0.7)))
    assert (conditional.calls, without.calls) == (1, 0)
    t = torch.tensor([0.29, 0.3, 0.6, 0.61])
    out = guided(z, t)
    assert torch.equal(out[1:3], always(z, t)[1:3])
    assert torch.equal(out[::3], conditional.function(z, t)[::3])
    solve(guided, z, path=path, prediction="flow", steps=10)
    assert (conditional.calls, without.calls) == (12, 5)  # at 0.6 0.5 0.4 and 0.3 of the grid


def test_the_interval_holds_for_every_frame():
    path = PATHS["flow"]
    conditional, without = gaussian(path, "flow", 1.0, 0.5), gaussian(path, "flow", 0.0, 0.5)
    z, t = torch.randn(1, 2, 3, 1, 1), torch.tensor([[0.0, 0.4, 0.9]])
    out = guide(conditional, without, 2.0, interval=(0.2, 0.5))(z, t)
    assert torch.equal(out[:, :, ::2], conditional(z, t)[:, :, ::2])
    assert torch.equal(out[:, :, 1], guide(conditional, without, 2.0)(z, t)[:, :, 1])


@pytest.mark.parametrize("level", [0.0, 0.1])
def test_given_frames_do_not_call_for_guidance(level):
    """At time 0, or at the noise in which they are shown, they lie within an interval that begins at 0."""
    path = PATHS["flow"]
    conditional, without = Counted(gaussian(path, "flow", 1.0, 0.5)), Counted(gaussian(path, "flow", 0.0, 0.5))
    z, known = torch.randn(1, 2, 3, 1, 1), torch.tensor([[True, False, False]])
    guided = guide(conditional, without, 2.0, interval=(0.0, 0.5), known=known)
    early, late = torch.tensor([[level, 0.9, 0.9]]), torch.tensor([[level, 0.4, 0.4]])
    assert torch.equal(guided(z, early), conditional.function(z, early))
    assert (conditional.calls, without.calls) == (1, 0)
    out = guided(z, late)
    assert (conditional.calls, without.calls) == (2, 1)
    assert torch.equal(out[:, :, 0], conditional.function(z, late)[:, :, 0])
    always = guide(conditional.function, without.function, 2.0)(z, late)
    assert torch.equal(out[:, :, 1:], always[:, :, 1:])


@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_rescaling_restores_the_spread_of_every_clip(part):
    with_, without = torch.randn(2, 3, 2, 4, 2, 2).unbind(0)
    z, t = torch.zeros_like(with_), torch.full((3,), 0.5)
    plain = guide(lambda z, t: with_, lambda z, t: without, 5.0)(z, t)
    out = guide(lambda z, t: with_, lambda z, t: without, 5.0, rescale=part)(z, t)
    for clip in range(3):
        spread = [x[clip].std(correction=0).item() for x in (with_, plain, out)]
        assert spread[2] == pytest.approx(part * spread[0] + (1 - part) * spread[1], rel=1e-5)


def test_rescaling_looks_at_frames_with_noise_only():
    with_, without = torch.randn(2, 1, 2, 4, 2, 2).unbind(0)
    t = torch.tensor([[0.0, 0.5, 0.5, 0.5]])

    def guided(off):
        return guide(lambda z, t: with_ + off, lambda z, t: without, 5.0, rescale=1.0)(torch.zeros_like(with_), t)

    off = torch.tensor([100.0, 0, 0, 0]).view(1, 1, 4, 1, 1)
    assert torch.equal(guided(0 * off)[:, :, 1:], guided(off)[:, :, 1:])
    assert not torch.equal(guided(0 * off), guided(off.flip(2)))


@pytest.mark.parametrize("settings", [{"interval": (0.6, 0.3)}, {"rescale": 2.0}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match=r"no interval|no part"):
        guide(lambda z, t: z, lambda z, t: z, 2.0, **settings)


def test_given_frames_do_not_count_in_the_spread():
    """Whatever is predicted at a given frame, which is shown with a little noise, the others are the same."""
    t, known = torch.tensor([[0.2, 0.8, 0.8]]), torch.tensor([[True, False, False]])
    z, loud = torch.randn(1, 2, 3, 4, 4), torch.tensor([20.0, 1.0, 1.0]).view(1, 1, 3, 1, 1)

    def guided(loudness):
        return guide(lambda z, t: z * loudness, lambda z, t: z.roll(1, 1), 3.0, rescale=0.7, known=known)(z, t)

    assert torch.equal(guided(1)[:, :, 1:], guided(loud)[:, :, 1:])
