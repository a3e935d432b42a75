"""Solvers: from noise to data along a path, each in coordinates where a denoiser that knows its datum errs in no step.

All write the next state with the estimates of data and noise, so they serve every path and every prediction, and times
may differ from frame to frame. Time grids are even in the share of noise, sigma / (alpha + sigma): a sampler then takes
the same steps on every path, those of rectified flow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from praxino.diffusion.loss import Denoise
from praxino.diffusion.path import TINY, Path, expand
from praxino.diffusion.prediction import Prediction, check, split
from praxino.diffusion.time import shift_time

Sampler = Literal["euler", "heun", "ddim", "dpmpp_2m", "ancestral"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
LAST_LOG_SNR = -11.0  # where `eps` begins on a path that ends in pure noise, of which it says nothing
Levels = tuple[Tensor, Tensor]  # alpha, sigma
Past = tuple[Tensor, Tensor]  # the data estimated in the step before, and its times


def straight(z: Tensor, velocity: Tensor, now: Levels, then: Levels) -> Tensor:
    """Move by `noise - x` along the straight line that z / (alpha + sigma) follows."""
    (a, s), (b, r) = now, then
    return (z / (a + s) + (r / (b + r) - s / (a + s)) * velocity) * (b + r)


def decay(now: Levels, then: Levels) -> Tensor:
    """Return sqrt(SNR now / SNR then), in [0, 1]; it is exp(-h) of the papers."""
    (a, s), (b, r) = now, then
    return a * r / (b * s).clamp(min=TINY)


def ddim(x: Tensor, eps: Tensor, now: Levels, then: Levels) -> Tensor:
    """Mix both estimates anew (Song et al. 2020, eta = 0)."""
    return then[0] * x + then[1] * eps


def ancestral(x: Tensor, eps: Tensor, now: Levels, then: Levels, fresh: Tensor) -> Tensor:
    """Draw from q(z_s | z_t, x) (Ho et al. 2020, eq. 7; DDIM with eta = 1)."""
    kept = decay(now, then)
    return then[0] * x + then[1] * (kept * eps + (1 - kept.square()).clamp(min=0).sqrt() * fresh)


def multistep(z: Tensor, x: Tensor, past: Past | None, path: Path, t: Tensor, now: Levels, then: Levels) -> Tensor:
    """Extrapolate the data in log-SNR (Lu et al. 2022, DPM-Solver++ 2M); first order without a past and at the end."""
    kept = decay(now, then)
    if past is not None:
        before = expand(path.log_snr(past[1]), z)
        weight = -kept.log() / (expand(path.log_snr(t), z) - before)  # step / (2 step before), in log-SNR / 2
        usable = expand(past[1] > t, z) & (then[1] > 0)
        x = x + torch.where(usable, weight, 0) * (x - past[0])
    return then[1] / now[1].clamp(min=TINY) * z + then[0] * (1 - kept) * x


@dataclass(frozen=True)
class Solver:
    """Settings of a solver, ready to be called.

    Args:
        path: of the training.
        prediction: what the denoiser puts out.
        sampler: euler and ddim (the same but for rounding) and ancestral are of first order, heun and dpmpp_2m of
            second; heun calls the denoiser twice in every step but the last.
        steps: any number from 1.
        shift: of the time grid, as in `shift_time`; above 1 more steps go to high noise.
        context_noise: time up to which given frames are noised for the denoiser; they come back as they are.
    """

    path: Path
    prediction: Prediction
    sampler: Sampler = "euler"
    steps: int = 50
    shift: float = 1.0
    context_noise: float = 0.0

    def __post_init__(self) -> None:
        check(self.prediction)
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} is unknown: choose one of {', '.join(SAMPLERS)}.")
        if self.steps < 1:
            raise ValueError(f"{self.steps} steps do not reach the data: at least 1 is needed.")
        shift_time(torch.zeros(()), self.shift)
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"a context_noise of {self.context_noise} is no time in [0, 1).")

    def grid(self) -> Tensor:
        """Return the `steps + 1` times in float64, from the terminal one to exactly 0.

        The terminal time is 1; for `eps` on a path without signal there, that of log-SNR -11.
        """
        terminal = torch.ones((), dtype=torch.float64)
        if self.prediction == "eps" and self.path.log_snr(terminal) < LAST_LOG_SNR:
            terminal = self.path.time(torch.full_like(terminal, LAST_LOG_SNR))
        fall = shift_time(torch.linspace(1, 0, self.steps + 1, dtype=torch.float64), self.shift)
        first, last = self.path.share(terminal), self.path.share(torch.zeros_like(terminal))
        times = self.path.at_share(last + (first - last) * fall)
        times[0], times[-1] = terminal, 0
        return times

    def begin(self, noise: Tensor) -> Tensor:
        """Return the state at the terminal time, in float32 or better: the noise alone, as data have mean zero."""
        return self.path.sigma(self.grid()[0]).item() * noise.to(torch.promote_types(noise.dtype, torch.float32))

    def levels(self, t: Tensor, z: Tensor) -> Levels:
        """Return alpha and sigma at `t` with the axes of `z`; time 0 is the datum itself, in every path."""
        clean = t == 0
        alpha, sigma = self.path.alpha(t).masked_fill(clean, 1), self.path.sigma(t).masked_fill(clean, 0)
        return expand(alpha, z), expand(sigma, z)

    def step(
        self,
        denoise: Denoise,
        z: Tensor,
        t: Tensor,
        s: Tensor,
        past: Past | None = None,
        redraw: Callable[[], Tensor] | None = None,
    ) -> tuple[Tensor, Past]:
        """Move from the times `t` to `s`, `(B,)` or `(B, T)`; where they are equal the state stays, bit for bit."""
        x, eps = split(self.path, self.prediction, denoise(z, t), z, t)
        now, then = self.levels(t, z), self.levels(s, z)
        match self.sampler:
            case "euler":
                moved = straight(z, eps - x, now, then)
            case "heun":
                moved = self.heun(denoise, z, eps - x, s, now, then)
            case "ddim":
                moved = ddim(x, eps, now, then)
            case "dpmpp_2m":
                moved = multistep(z, x, past, self.path, t, now, then)
            case _:
                if redraw is None:
                    raise ValueError("the ancestral sampler draws noise in every step: give redraw.")
                moved = ancestral(x, eps, now, then, redraw().to(z))
        return torch.where(expand(s < t, z), moved, z), (x, t)

    def heun(self, denoise: Denoise, z: Tensor, velocity: Tensor, s: Tensor, now: Levels, then: Levels) -> Tensor:
        """Average the velocities of both ends; Euler into time 0, where `x0` gives none."""
        moved = straight(z, velocity, now, then)
        if bool((s > 0).any()):
            x, eps = split(self.path, self.prediction, denoise(moved, s), moved, s)
            velocity = torch.where(expand(s > 0, z), (velocity + eps - x) / 2, velocity)
            moved = straight(z, velocity, now, then)
        return moved

    def noised(self, denoise: Denoise, known: Tensor, noise: Tensor) -> Denoise:
        """Show the denoiser the frames `known` `(B, T)` at the time `context_noise`."""
        if not self.context_noise:
            return denoise

        def seen(z: Tensor, t: Tensor) -> Tensor:
            level = torch.where(known, self.context_noise, t)
            return denoise(torch.where(expand(known, z), self.path.mix(z, noise.to(z), level), z), level)

        return seen

    @torch.no_grad()
    def __call__(
        self,
        denoise: Denoise,
        noise: Tensor,
        known: Tensor | None = None,
        given: Tensor | None = None,
        redraw: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Return the data that grow out of `noise` `(B, C, T, ...)`, float32 or better.

        Args:
            known: `(B, T)`, true at given frames, whose time is 0 throughout.
            given: shaped as `noise`; its known frames come back bit for bit.
            redraw: fresh noise of step 0, 1, ..., for `ancestral`.

        Raises:
            ValueError: only one of `known` and `given`, or no `redraw` where noise is needed.
        """
        if (known is None) != (given is None):
            raise ValueError("known frames and their values belong together: give known and given, or neither.")
        grid = self.grid()
        z, past = self.begin(noise), None
        times = grid.to(z.device, z.dtype)[:, None].expand(-1, z.shape[0])  # (steps + 1, B)
        if known is not None and given is not None:
            z = torch.where(expand(known, z), given.to(z), z)
            times = torch.where(known, 0, times[:, :, None])  # (steps + 1, B, T)
            denoise = self.noised(denoise, known, noise)
        for j in range(self.steps):
            fresh = None if redraw is None else lambda j=j: redraw(j)
            z, past = self.step(denoise, z, times[j], times[j + 1], past, fresh)
        return z


def solve(
    denoise: Denoise,
    noise: Tensor,
    *,
    path: Path,
    prediction: Prediction,
    sampler: Sampler = "euler",
    steps: int = 50,
    shift: float = 1.0,
    known: Tensor | None = None,
    given: Tensor | None = None,
    context_noise: float = 0.0,
    redraw: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Return the data that grow out of `noise`; see `Solver`."""
    return Solver(path, prediction, sampler, steps, shift, context_noise)(denoise, noise, known, given, redraw)
