"""Paths from data to noise: z_t = alpha(t) x + sigma(t) noise, with t = 0 the data and t = 1 the noise.

Every function is finite on all of [0, 1], but for the log-SNR, which is infinite where alpha or sigma is zero. Where a
derivative is infinite (an end of the linear and of the sigmoid schedule), a very large number stands for it.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

TINY = 1e-12  # instead of a zero in a denominator; its square is a float32 still


def expand(t: Tensor, x: Tensor) -> Tensor:
    """Give times `(B,)` or, of every frame, `(B, T)` the axes of `x` `(B, C, T, ...)`.

    Raises:
        ValueError: `t` has another shape.
    """
    if t.ndim == 0:
        return t
    if t.shape == x.shape[:1]:
        return t.view(-1, *[1] * (x.ndim - 1))
    if x.ndim >= 3 and t.shape == (x.shape[0], x.shape[2]):
        return t.view(t.shape[0], 1, t.shape[1], *[1] * (x.ndim - 3))
    raise ValueError(
        f"times of shape {tuple(t.shape)} do not fit {tuple(x.shape)}: give (B,), or (B, T) of every frame."
    )


class Path(ABC):
    """How signal turns into noise; `t` is a tensor of any shape and floating type, and so are the results."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the amplitude of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the standard deviation of the noise."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """Return the derivative of alpha."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """Return the derivative of sigma."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time of a log-SNR, the inverse of `log_snr`; beyond the ends it goes on or stays there."""

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2)."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def share(self, t: Tensor) -> Tensor:
        """Return sigma / (alpha + sigma), which grows from about 0 to about 1; it is t itself for rectified flow."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        return sigma / (alpha + sigma)

    def at_share(self, share: Tensor) -> Tensor:
        """Return the time at which the noise has this share, the inverse of `share`."""
        return self.time(-2 * torch.logit(share))

    def mix(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return z_t."""
        return expand(self.alpha(t), x) * x + expand(self.sigma(t), x) * noise


class RectifiedFlow(Path):
    """The straight line from data to noise (Liu et al. 2022; Lipman et al. 2022)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def dalpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)


class VariancePreserving(Path):
    """A path with alpha^2 + sigma^2 = 1 (Song et al. 2021)."""

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t).square()).clamp(min=0).sqrt()

    def dsigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.dalpha(t) / self.sigma(t).clamp(min=TINY)


class LinearBeta(VariancePreserving):
    """Noise added at a rate that grows linearly from `low` to `high` (Ho et al. 2020, in continuous time)."""

    def __init__(self, low: float = 0.1, high: float = 20.0) -> None:
        if not 0 < low < high:
            raise ValueError(f"rates from {low} to {high} do not grow: 0 < low < high is needed, e.g. 0.1 and 20.")
        self.low, self.high = low, high

    def log_alpha(self, t: Tensor) -> Tensor:
        return -t * (2 * self.low + t * (self.high - self.low)) / 4

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * (self.low + t * (self.high - self.low)) / 2

    def time(self, log_snr: Tensor) -> Tensor:
        total = torch.nn.functional.softplus(-log_snr)  # -2 log alpha, the integral of the rate
        return 2 * total / (self.low + (self.low**2 + 2 * (self.high - self.low) * total).sqrt())


class Cosine(VariancePreserving):
    """A quarter of a circle at constant speed (Nichol & Dhariwal 2021, without their offset)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))  # a cosine that is exactly zero at t = 1

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def dalpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.sigma(t)

    def dsigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.alpha(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr / 2)) * 2 / math.pi


class Sigmoid(VariancePreserving):
    """alpha^2 falls as the logistic function does between `start` and `end`, scaled to 1 .. 0 (Jabri et al. 2022)."""

    def __init__(self, start: float = -3.0, end: float = 3.0) -> None:
        if not start < end:
            raise ValueError(f"start {start} must lie below end {end}, e.g. -3 and 3.")
        self.start, self.end = start, end

    def place(self, t: Tensor) -> Tensor:
        return self.start + t * (self.end - self.start)

    def whole(self) -> float:
        return math.tanh(self.end / 2) - math.tanh(self.start / 2)

    def fall(self, t: Tensor, length: Tensor, edge: float) -> Tensor:
        """Return which part of the fall lies between `t` and the edge, `length` away: accurate however short."""
        return torch.sinh(length / 2) / (torch.cosh(self.place(t) / 2) * math.cosh(edge / 2) * self.whole())

    def alpha(self, t: Tensor) -> Tensor:
        return self.fall(t, (1 - t) * (self.end - self.start), self.end).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return self.fall(t, t * (self.end - self.start), self.start).sqrt()

    def dalpha(self, t: Tensor) -> Tensor:
        slope = (self.end - self.start) / (2 * self.whole() * torch.cosh(self.place(t) / 2).square())
        return -slope / (2 * self.alpha(t)).clamp(min=TINY)

    def dsigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t).clamp(min=TINY) * self.dalpha(t) / self.sigma(t).clamp(min=TINY)

    def time(self, log_snr: Tensor) -> Tensor:
        bottom, top = 1 / (1 + math.exp(self.end)), 1 / (1 + math.exp(self.start))
        height = bottom + (top - bottom) * torch.sigmoid(log_snr)
        return ((-torch.logit(height) - self.start) / (self.end - self.start)).clamp(0, 1)


class LinearLogSNR(VariancePreserving):
    """A log-SNR that falls linearly from `high` to `low` (Kingma et al. 2021, variational diffusion models)."""

    def __init__(self, high: float = 10.0, low: float = -10.0) -> None:
        if not low < high:
            raise ValueError(f"a log-SNR from {high} to {low} does not fall: low < high is needed, e.g. -10 and 10.")
        self.high, self.low = high, low

    def log_snr(self, t: Tensor) -> Tensor:
        return self.high + t * (self.low - self.high)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.log_snr(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.log_snr(t)).sqrt()

    def dalpha(self, t: Tensor) -> Tensor:
        return self.alpha(t) * torch.sigmoid(-self.log_snr(t)) * (self.low - self.high) / 2

    def dsigma(self, t: Tensor) -> Tensor:
        return -self.sigma(t) * torch.sigmoid(self.log_snr(t)) * (self.low - self.high) / 2

    def time(self, log_snr: Tensor) -> Tensor:
        return (log_snr - self.high) / (self.low - self.high)
