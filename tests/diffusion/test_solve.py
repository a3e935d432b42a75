"""Solvers: closed forms of a Gaussian, points, orders, given frames, batches."""

import math

import pytest
import torch
from denoisers import CASES, IDS, PATHS, gaussian, point, points

from praxino.diffusion.noise import FrameNoise
from praxino.diffusion.solve import SAMPLERS, Solver, solve

MEAN, STD = 0.5, 0.7
each_case = pytest.mark.parametrize(("path", "prediction"), CASES, ids=IDS)
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def statistics(denoise, path, prediction, sampler, steps, dtype=torch.float64):
    """Return mean and std of what comes out: with a linear denoiser, by the response to every noise that goes in."""
    count = steps + 2 if sampler == "ancestral" else 2
    units = torch.eye(count, dtype=dtype)
    noise = units[0].view(-1, 1, 1)
    redraw = lambda j: units[j + 1].view(-1, 1, 1)  # noqa: E731
    out = solve(denoise, noise, path=path, prediction=prediction, sampler=sampler, steps=steps, redraw=redraw).flatten()
    mean, response = out[-1], out[:-1] - out[-1]  # the last sample gets no noise at all
    return mean.item(), response.square().sum().sqrt().item()


def check_gaussian(path, prediction, sampler, steps):
    mean, std = statistics(gaussian(path, prediction, MEAN, STD), path, prediction, sampler, steps)
    assert mean == pytest.approx(MEAN, rel=0.01)
    assert std == pytest.approx(STD, rel=0.01)


@each_case
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_second_order_brings_out_a_gaussian_in_64_steps(path, prediction, sampler):
    check_gaussian(path, prediction, sampler, 64)


@pytest.mark.slow
@each_case
@pytest.mark.parametrize(("sampler", "steps"), [("euler", 160), ("ancestral", 320)])
def test_first_order_brings_out_a_gaussian_in_more_steps(path, prediction, sampler, steps):
    check_gaussian(path, prediction, sampler, steps)


@each_case
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_first_order_loses_the_spread_that_theory_says(path, prediction, sampler):
    """With tan(phi) = sigma / (alpha std) a step multiplies the distance from the mean by R_s cos(phi_t - phi_s) / R_t.

    As the phi fall from about pi / 2 to 0, no grid of 64 steps keeps more than cos(pi / 128)^64 = 98.1 % of the spread.
    """
    _, std = statistics(gaussian(path, prediction, MEAN, STD), path, prediction, sampler, 64)
    times = Solver(path, prediction, steps=64).grid()
    alpha, sigma = path.alpha(times), path.sigma(times)
    alpha[-1], sigma[-1] = 1, 0
    phi, radius = torch.atan2(sigma, alpha * STD), (alpha.square() * STD**2 + sigma.square()).sqrt()
    expected = sigma[0] * radius[-1] / radius[0] * phi.diff().cos().prod()
    assert std == pytest.approx(expected.item(), rel=1e-9)
    assert 0.975 < std / STD < math.cos(math.pi / 128) ** 64 + 1e-6


@each_case
def test_ancestral_loses_the_spread_that_theory_says(path, prediction):
    _, std = statistics(gaussian(path, prediction, MEAN, STD), path, prediction, "ancestral", 64)
    times = Solver(path, prediction, steps=64).grid()
    alpha, sigma = path.alpha(times), path.sigma(times)
    alpha[-1], sigma[-1] = 1, 0
    variance = sigma[0] ** 2
    for a, s, b, r in zip(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], strict=True):
        kept = a * r**2 / (b * s**2)  # of z, in the mean of q(z_s | z_t, x); b - a kept of x
        gain = a * STD**2 / (a**2 * STD**2 + s**2)  # of x in z
        variance = (kept + (b - a * kept) * gain) ** 2 * variance + r**2 - (a * r**2 / (b * s)) ** 2
    assert std == pytest.approx(variance.sqrt().item(), rel=1e-9)


@each_case
@each_sampler
def test_a_point_is_hit_in_any_number_of_steps(path, prediction, sampler):
    noise = FrameNoise([0, 1], (2, 3, 3))
    for steps in (1, 2, 20):
        out = solve(
            point(path, prediction, 1.5), noise(0, 2), path=path, prediction=prediction, sampler=sampler, steps=steps,
            redraw=lambda j: noise(0, 2, j + 1),
        )  # fmt: skip
        # in float32, and eps says little of the data in the first step
        assert (out - 1.5).abs().max() < (2e-5 if steps > 1 or prediction != "eps" else 5e-4)


@each_case
@each_sampler
def test_few_points_are_hit(path, prediction, sampler):
    data = [-1.2, 0.1, 1.5]
    noise = FrameNoise([0], (1, 20, 50))
    out = solve(
        points(path, prediction, data), noise(0, 1), path=path, prediction=prediction, sampler=sampler, steps=20,
        redraw=lambda j: noise(0, 1, j + 1),
    )  # fmt: skip
    gaps = (out[..., None] - torch.tensor(data)).abs()
    nearest = gaps.min(-1)
    assert nearest.values.mean() < 0.02
    shares = nearest.indices.flatten().bincount(minlength=3) / out.numel()
    assert (shares - 1 / 3).abs().max() < 0.08


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_order_of_convergence(path, sampler, order):
    """Between two times inside, in steps even in log-SNR; the exact flow scales by the spread of z."""
    solver, denoise = Solver(path, "v", sampler), gaussian(path, "v", 0.0, STD)
    errors = []
    for steps in (16, 32, 64):
        times = path.time(torch.linspace(-4, 4, steps + 1, dtype=torch.float64))[:, None]
        z, past = torch.ones(1, 1, 1, dtype=torch.float64), None
        for j in range(steps):
            z, past = solver.step(denoise, z, times[j], times[j + 1], past)
        radius = (path.alpha(times).square() * STD**2 + path.sigma(times).square()).sqrt()
        errors.append(abs(z.item() - (radius[-1] / radius[0]).item()))
    rates = [math.log2(errors[i] / errors[i + 1]) for i in (0, 1)]
    assert rates == pytest.approx([order, order], abs=0.2), errors


@each_case
def test_ddim_is_euler(path, prediction):
    denoise = gaussian(path, prediction, MEAN, STD)
    noise = torch.randn(5, 2, 3, dtype=torch.float64)
    one, other = (
        solve(denoise, noise, path=path, prediction=prediction, sampler=s, steps=7) for s in ("euler", "ddim")
    )
    assert torch.allclose(one, other, atol=1e-12)


def test_euler_of_rectified_flow_is_the_plain_one():
    denoise = gaussian(PATHS["flow"], "flow", MEAN, STD)
    noise = torch.randn(5, 2, 3, dtype=torch.float64)
    z = noise
    for j in range(10):
        z = z - 0.1 * denoise(z, torch.full((5,), 1 - 0.1 * j, dtype=torch.float64))
    assert torch.allclose(solve(denoise, noise, path=PATHS["flow"], prediction="flow", steps=10), z, atol=1e-12)


def test_ancestral_is_the_posterior_of_ddpm():
    """Equation 7 of Ho et al. 2020, in the alphas and betas of two neighbouring times."""
    path = PATHS["linear"]
    solver = Solver(path, "eps", "ancestral", steps=10)
    t, s = solver.grid()[4].view(1), solver.grid()[5].view(1)
    z, eps, fresh = torch.randn(3, 1, 2, 5, dtype=torch.float64)
    out, _ = solver.step(lambda z, t: eps, z, t, s, redraw=lambda: fresh)
    bar, bar_before = path.alpha(t) ** 2, path.alpha(s) ** 2
    a = bar / bar_before
    mean = (z - (1 - a) / (1 - bar).sqrt() * eps) / a.sqrt()
    assert torch.allclose(out, mean + ((1 - bar_before) / (1 - bar) * (1 - a)).sqrt() * fresh, atol=1e-12)


@pytest.mark.parametrize("path", [PATHS["linear"], PATHS["cosine"]])
def test_dpmpp_2m_is_that_of_the_paper(path):
    """Algorithm 2 of Lu et al. 2022 in its own terms, lambda = log(alpha / sigma), first order in the last step."""
    solver = Solver(path, "v", "dpmpp_2m", steps=8)
    denoise = gaussian(path, "x0", MEAN, STD)
    noise = torch.randn(3, 2, 2, dtype=torch.float64)
    times = solver.grid()
    lam = (path.alpha(times) / path.sigma(times)).log()
    z, before = solver.begin(noise), None
    for j in range(7):
        x = denoise(z, times[j].expand(3))
        h = lam[j + 1] - lam[j]
        r = (lam[j] - lam[j - 1]) / h
        d = x if before is None else (1 + 1 / (2 * r)) * x - 1 / (2 * r) * before
        alpha, sigma = path.alpha(times[j + 1]), path.sigma(times[j + 1])
        z, before = sigma / path.sigma(times[j]) * z - alpha * torch.expm1(-h) * d, x
    assert torch.allclose(solver(gaussian(path, "v", MEAN, STD), noise), denoise(z, times[7].expand(3)), atol=1e-10)


@each_case
def test_the_first_time_is_the_terminal_one(path, prediction):
    for steps in (1, 3, 10):
        seen = []
        solve(
            lambda z, t, seen=seen: seen.append(t) or torch.zeros_like(z),
            torch.randn(2, 1, 3), path=path, prediction=prediction, sampler="heun", steps=steps,
        )  # fmt: skip
        assert len(seen) == 2 * steps - 1
        if prediction == "eps" and path.alpha(torch.ones(())) == 0:  # eps says nothing there
            assert path.log_snr(seen[0][0]).item() == pytest.approx(-11, abs=0.01)
        else:
            assert seen[0].tolist() == [1, 1]
        grid = Solver(path, prediction, steps=steps).grid()
        assert grid[-1] == 0
        assert (grid.diff() < 0).all()


def test_a_shift_moves_the_grid_towards_noise():
    grid = Solver(PATHS["flow"], "flow", steps=4, shift=3.0).grid()
    assert torch.allclose(grid, torch.tensor([1, 9 / 10, 3 / 4, 1 / 2, 0], dtype=torch.float64))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@each_sampler
@pytest.mark.parametrize("context_noise", [0.0, 0.1])
def test_given_frames_come_back_as_they_are(path, sampler, context_noise):
    noise = FrameNoise([3, 4], (2, 2, 2))
    given = torch.randn(2, 2, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    known = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)
    mask = known[:, None, :, None, None].expand_as(given)
    exact, seen = gaussian(path, "x0", MEAN, STD), []

    def denoise(z, t):
        seen.append((z, t))
        return exact(z, t) + 0.1

    out = solve(
        denoise, noise(0, 5), path=path, prediction="x0", sampler=sampler, steps=6, known=known, given=given,
        context_noise=context_noise, redraw=lambda j: noise(0, 5, j + 1),
    )  # fmt: skip
    assert torch.equal(out[mask], given[mask])
    assert out.isfinite().all()
    level = torch.tensor(context_noise)
    shown = given if not context_noise else path.mix(given, noise(0, 5), level.expand(2))
    for z, t in seen:
        assert t.shape == (2, 5)
        assert torch.equal(t[known], level.expand(4))
        assert torch.allclose(z[mask], shown[mask], atol=1e-6)


@each_sampler
def test_a_sample_does_not_depend_on_its_batch(sampler):
    path = PATHS["cosine"]

    def sample(seeds):
        noise = FrameNoise(seeds, (2, 3, 3))
        return solve(
            gaussian(path, "v", MEAN, STD), noise(0, 4), path=path, prediction="v", sampler=sampler, steps=5,
            redraw=lambda j: noise(0, 4, j + 1),
        )  # fmt: skip

    whole = sample([5, 6, 7])
    assert torch.equal(whole, torch.cat([sample([5]), sample([6, 7])]))
    assert whole.unique().numel() == whole.numel()


def test_noise_belongs_to_its_frame():
    noise = FrameNoise([1, 2], (2, 3, 3))
    whole = noise(0, 6)
    assert whole.shape == (2, 2, 6, 3, 3)
    assert torch.equal(whole[:, :, 2:4], noise(2, 4))
    assert torch.equal(whole[1:], FrameNoise([2], (2, 3, 3))(0, 6))
    assert not torch.equal(whole, noise(0, 6, draw=1))
    assert not torch.equal(whole[:, :, 0], whole[:, :, 1])
    large = FrameNoise([2**40 + 1], (1, 200, 200))(0, 1)
    assert large.std().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(large, FrameNoise([1], (1, 200, 200))(0, 1))


def test_half_precision_noise_is_solved_in_float32_without_gradients():
    weight = torch.ones((), requires_grad=True)
    out = solve(lambda z, t: (weight * z).bfloat16(), torch.randn(2, 1, 3).bfloat16(), path=PATHS["flow"],
                prediction="flow", steps=3)  # fmt: skip
    assert out.dtype == torch.float32
    assert not out.requires_grad


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_a_solver_refuses_a_shift_before_it_is_called(shift):
    with pytest.raises(ValueError, match="not positive"):
        Solver(PATHS["flow"], "flow", shift=shift)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"sampler": "rk4"}, "'rk4' is unknown"), ({"steps": 0}, "at least 1"), ({"shift": -1.0}, "not positive"),
     ({"context_noise": 1.0}, "no time"), ({"known": torch.ones(1, 3, dtype=torch.bool)}, "belong together"),
     ({"sampler": "ancestral"}, "give redraw"), ({"prediction": "score"}, "'score' is unknown")],
)  # fmt: skip
def test_settings_that_make_no_sense(settings, message):
    settings = {"path": PATHS["flow"], "prediction": "flow"} | settings
    with pytest.raises(ValueError, match=message):
        solve(lambda z, t: z, torch.zeros(1, 1, 3), **settings)
