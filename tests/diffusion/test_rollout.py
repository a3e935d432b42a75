"""Rollouts of a process whose denoiser is known: covariance, memory, given frames, levels of frames, caches."""

import itertools

import pytest
import torch
from denoisers import PATHS, Process

from praxino.diffusion.noise import FrameNoise
from praxino.diffusion.rollout import autoregressive, cached, full, pyramid, sliding
from praxino.diffusion.solve import Solver

FLOW = PATHS["flow"]
ROLLOUTS = {
    "full": lambda *args, **more: full(*args, **more),
    "autoregressive": lambda *args, **more: autoregressive(*args, window=6, block=2, **more),
    "sliding": lambda *args, **more: sliding(*args, window=6, overlap=2, **more),
    "pyramid": lambda *args, **more: pyramid(*args, window=6, context=2, **more),
}
each = pytest.mark.parametrize("rollout", ROLLOUTS.values(), ids=ROLLOUTS)
LONG = {name: ROLLOUTS[name] for name in ("autoregressive", "sliding", "pyramid")}


def joined(pieces) -> torch.Tensor:
    return torch.cat(list(pieces), dim=2)


def solver(steps: int = 16, sampler="heun", path=FLOW, prediction="flow", **more) -> Solver:
    return Solver(path, prediction, sampler, steps, **more)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
@each
def test_a_long_process_has_the_right_covariance(rollout, sampler):
    process = Process(FLOW, "flow", rho=0.8, mean=0.5)
    x = joined(rollout(process, FrameNoise([0], (1, 100, 100)), solver(24, sampler), 16))[0, 0].flatten(1).double()
    assert x.shape == (16, 100 * 100)
    assert (x.mean(1) - 0.5).abs().max() < 0.04  # 4 standard errors
    assert (x.cov() - process.covariance(16)).abs().max() < 0.06


@pytest.mark.parametrize("rollout", LONG.values(), ids=LONG)
def test_windows_that_forget_their_context_would_be_noticed(rollout):
    process = Process(FLOW, "flow", rho=0.8)
    bind, process.bind = process.bind, lambda known, start: bind(None, start)
    process.covariance = lambda frames: torch.eye(frames, dtype=torch.float64)
    x = joined(rollout(process, FrameNoise([0], (1, 60, 60)), solver(16), 12))[0, 0].flatten(1)
    assert (x.cov() - Process(FLOW, "flow").covariance(12)).abs().max() > 0.5


def test_prediction_of_given_frames_is_that_of_the_process():
    """From one given frame of value 2 the mean falls as 2 rho^k, and the variance grows as 1 - rho^2k."""
    for name, rollout in ROLLOUTS.items():
        process = Process(FLOW, "flow", rho=0.8)
        given = torch.full((1, 1, 1, 90, 90), 2.0)
        x = joined(rollout(process, FrameNoise([0], (1, 90, 90)), solver(24), 8, given=given))[0, 0].flatten(1)
        k = torch.arange(8.0)
        assert torch.allclose(x.mean(1), 2 * 0.8**k, atol=0.04), name
        assert torch.allclose(x.var(1), 1 - 0.8 ** (2 * k), atol=0.05), name


@pytest.mark.parametrize("rollout", LONG.values(), ids=LONG)
def test_memory_is_flat_and_pieces_come_as_they_are_ready(rollout):
    process = Process(FLOW, "flow")
    pieces = rollout(process, FrameNoise([0], (1, 2, 2)), solver(4, "euler"), 40)
    next(pieces)
    begun = len(process.windows)
    assert begun <= 4 * 4  # a pyramid begins with its steps, other ways with a window's
    length = sum(piece.shape[2] for piece in pieces)
    assert len(process.windows) > begun
    assert 30 < length < 40
    assert max(frames for _, frames in process.windows) == 6
    assert max(start + frames for start, frames in process.windows) == 40


def test_the_plan_of_windows():
    process, noise = Process(FLOW, "flow"), FrameNoise([0], (1, 1, 1))
    one = solver(1, "euler")
    list(autoregressive(process, noise, one, 11, window=6, block=2))
    assert process.windows == [(0, 2), (0, 4), (0, 6), (2, 6), (4, 6), (5, 6)]
    assert process.known == [0, 2, 4, 4, 4, 5]
    process = Process(FLOW, "flow")
    list(sliding(process, noise, one, 11, window=6, overlap=2))
    assert process.windows == [(0, 6), (4, 6), (5, 6)]
    assert process.known == [0, 2, 5]
    process = Process(FLOW, "flow")
    list(sliding(process, noise, one, 11, window=6, overlap=2, given=torch.zeros(1, 1, 5, 1, 1)))
    assert process.windows == [(3, 6), (5, 6)]
    assert process.known == [2, 4]


@each
@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ancestral"])
@pytest.mark.parametrize("context_noise", [0.0, 0.1])
def test_given_frames_come_first_and_unchanged(rollout, count, sampler, context_noise):
    given = torch.randn(2, 3, count, 2, 2)
    settings = solver(5, sampler, context_noise=context_noise)
    x = joined(rollout(Process(FLOW, "flow"), FrameNoise([1, 2], (3, 2, 2)), settings, 12, given=given))
    assert x.shape == (2, 3, 12, 2, 2)
    assert torch.equal(x[:, :, :count], given)
    assert x.isfinite().all()
    assert x.abs().max() < 10


@each
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ancestral"])
def test_a_sample_does_not_depend_on_its_batch(rollout, sampler):
    def sample(seeds):
        return joined(rollout(Process(FLOW, "flow"), FrameNoise(seeds, (1, 2, 2)), solver(6, sampler), 10))

    assert torch.allclose(sample([4, 5, 6]), torch.cat([sample([4, 5]), sample([6])]), atol=1e-6)


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("steps", [1, 7, 12])
def test_a_pyramid_of_independent_frames_is_the_full_sequence(sampler, path, steps):
    process = Process(path, "v", rho=1e-30)
    settings = solver(steps, sampler, path, "v")
    noise = FrameNoise([0, 1], (1, 3, 3))
    whole = joined(full(process, noise, settings, 9))
    assert torch.allclose(joined(pyramid(process, noise, settings, 9, window=4, context=1)), whole, atol=2e-6)


def test_the_levels_of_a_pyramid():
    seen = []

    class Model:
        def bind(self, known, start):
            def denoise(z, t):
                assert t.shape == (1, z.shape[2])
                assert known is None or torch.equal(known, t == 0)
                seen.append((start, t[0].tolist()))
                return z

            return denoise

    list(pyramid(Model(), FrameNoise([0], (1, 1, 1)), solver(4, "euler"), 5, window=3, context=1))
    levels = [(start, [round(4 * level) for level in t]) for start, t in seen]
    assert levels == [
        (0, [4, 4, 4]), (0, [3, 4, 4]), (0, [2, 4, 4]), (0, [1, 3, 4]),
        (0, [0, 2, 4]), (0, [0, 1, 3]), (1, [0, 2, 4]), (1, [0, 1, 3]),
        (2, [0, 2, 4]), (2, [0, 1, 3]), (2, [0, 0, 2]), (2, [0, 0, 1]),
    ]  # fmt: skip


class Remembering(Process):
    """The process as a causal network with a cache: the denoiser is given new frames only, and recalls the others."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__(FLOW, "flow")
        self.kept: dict[int, torch.Tensor] = {}
        self.most = 0

    def remember(self, z, start):
        self.kept |= {start + k: z[:, :, k] for k in range(z.shape[2])}
        self.most = max(self.most, len(self.kept))

    def forget(self, before):
        self.kept = {k: z for k, z in self.kept.items() if k >= before}

    def bind(self, known, start):
        assert known is None

        def denoise(z, t):
            past = [self.kept[k] for k in sorted(self.kept)]
            t = t[:, None].expand(-1, z.shape[2])
            if past:
                z = torch.cat([torch.stack(past, 2), z], dim=2)
                t = torch.cat([torch.zeros(len(t), len(past)), t], dim=1)
            return self.denoise(z, t, start - len(past))[:, :, len(past) :]

        return denoise


@pytest.mark.parametrize("count", [0, 3])
def test_a_cache_changes_nothing(count):
    given = torch.randn(2, 1, count, 3, 3) if count else None
    noise = FrameNoise([1, 2], (1, 3, 3))
    model = Remembering()
    with_cache = joined(cached(model, noise, solver(6), 13, block=2, given=given, window=6))
    without = joined(autoregressive(Process(FLOW, "flow"), noise, solver(6), 13, window=6, block=2, given=given))
    assert with_cache.shape == (2, 1, 13, 3, 3)
    if count:  # the last window of the uncached one is filled up with context, of no effect on this process
        assert torch.equal(with_cache[:, :, :count], given)
    assert torch.allclose(with_cache, without, atol=1e-5)
    assert model.most <= 6
    unlimited = Remembering()
    joined(cached(unlimited, noise, solver(2), 13, block=2, given=given))
    assert unlimited.most == 13


def test_a_window_of_all_frames_is_the_full_sequence():
    noise = FrameNoise([1], (2, 3, 3))
    whole = joined(full(Process(FLOW, "flow"), noise, solver(5, "ancestral"), 6))
    assert torch.equal(whole, joined(ROLLOUTS["sliding"](Process(FLOW, "flow"), noise, solver(5, "ancestral"), 6)))
    alone = autoregressive(Process(FLOW, "flow"), noise, solver(5, "ancestral"), 6, window=6, block=6)
    assert torch.equal(whole, joined(alone))


def test_context_noise_reaches_the_network_in_every_rollout():
    for rollout in ROLLOUTS.values():
        levels = set()

        class Model:
            def bind(self, known, start, levels=levels):
                def denoise(z, t):
                    if known is not None:
                        levels.update(round(level, 4) for level in t[known].tolist())
                    return z

                return denoise

        settings = solver(3, "heun", context_noise=0.05)
        given = torch.zeros(1, 1, 2, 1, 1)
        list(rollout(Model(), FrameNoise([0], (1, 1, 1)), settings, 9, given=given))
        assert levels == {0.05}


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda *a: autoregressive(*a, 9, window=4, block=5), "block of 5"),
     (lambda *a: sliding(*a, 9, window=4, overlap=4), "overlap of 4"),
     (lambda *a: pyramid(*a, 9, window=4, context=0), "context of 0"),
     (lambda *a: cached(*a, 9, block=3, window=2), "block of 3"),
     (lambda *a: full(*a, 9, given=torch.zeros(1, 1, 9, 2, 2)), "leave none of 9"),
     (lambda *a: full(*a, 9, given=torch.zeros(2, 1, 1, 2, 2)), "do not fit 1 samples")],
)  # fmt: skip
def test_settings_that_make_no_sense(call, message):
    with pytest.raises(ValueError, match=message):
        list(itertools.islice(call(Process(FLOW, "flow"), FrameNoise([0], (1, 2, 2)), solver(2)), 1))
