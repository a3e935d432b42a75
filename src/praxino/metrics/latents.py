"""Statistics of latents, per channel, over any number of videos, the same for every batch, order and split."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

ACTIVE = 0.01  # variance of the posterior mean from which a channel counts as used
BANDS = 8  # of spatial frequency
HAAR = ("low", "high_h", "high_w", "high_hw")  # high_h: what changes down the frame


class ChannelStatistics:
    """Count, mean, variance and range per channel of all tensors `(B, C, ...)` seen, in float64, on the CPU.

    Sums of squared deviations are merged (Chan et al.), not squares summed: no digits are lost to a large mean.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0  # elements a channel
        self.mean = torch.zeros(channels, dtype=torch.float64)  # (C,)
        self.deviations = torch.zeros(channels, dtype=torch.float64)  # (C,) sum of (z - mean)^2
        self.low = torch.full((channels,), torch.inf, dtype=torch.float64)
        self.high = torch.full((channels,), -torch.inf, dtype=torch.float64)

    def update(self, z: Tensor) -> None:
        """Add all elements of a tensor `(B, C, ...)`."""
        if z.ndim < 2 or z.shape[1] != len(self.mean):
            raise ValueError(f"a tensor of shape {tuple(z.shape)} does not fit: use (B, {len(self.mean)}, ...).")
        if not z.numel():
            return
        part, values = ChannelStatistics(len(self.mean)), double(z.detach()).transpose(0, 1).flatten(1)  # (C, N)
        part.count = values.shape[1]
        mean = values.mean(dim=1)
        part.deviations = (values - mean[:, None]).square().sum(dim=1).cpu()
        low, high = values.aminmax(dim=1)
        part.mean, part.low, part.high = mean.cpu(), low.cpu(), high.cpu()
        self.merge(part)

    def merge(self, other: Self) -> Self:
        """Add all that another one has seen; return self."""
        if other.count:
            total, delta = self.count + other.count, other.mean - self.mean
            self.mean = self.mean + delta * (other.count / total)
            self.deviations = self.deviations + other.deviations + delta**2 * (self.count * other.count / total)
            self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
            self.count = total
        return self

    def state(self) -> list[Any]:
        """Return all that it knows as plain data, for `from_state`."""
        return [self.count, *(value.tolist() for value in (self.mean, self.deviations, self.low, self.high))]

    @classmethod
    def from_state(cls, state: list[Any]) -> Self:
        """Undo `state`, without rounding."""
        count, *values = state
        found = cls(len(values[0]))
        found.count = count
        found.mean, found.deviations, found.low, found.high = (torch.tensor(v, dtype=torch.float64) for v in values)
        return found

    @property
    def variance(self) -> Tensor:
        """The variance of the values seen, `(C,)`: their mean squared deviation."""
        return self.deviations / max(self.count, 1)


@dataclass
class LatentStatistics:
    """Statistics of the latents that a diffusion model sees: samples of posteriors, without drawing any.

    The mean of samples is that of the posterior means. Their variance is that of the posterior means plus the mean of
    the posterior variances.
    """

    means: ChannelStatistics
    noise: ChannelStatistics  # of the posterior variances
    kl: ChannelStatistics

    @classmethod
    def empty(cls, channels: int) -> Self:
        """Begin with nothing seen."""
        return cls(*(ChannelStatistics(channels) for _ in range(3)))

    def update(self, mean: Tensor, variance: Tensor, kl: Tensor) -> None:
        """Add posteriors: mean, variance and divergence per element, `(B, C, ...)`."""
        self.means.update(mean)
        self.noise.update(variance)
        self.kl.update(kl)

    def merge(self, other: Self) -> Self:
        """Add all that another one has seen; return self."""
        self.means.merge(other.means)
        self.noise.merge(other.noise)
        self.kl.merge(other.kl)
        return self

    def state(self) -> list[Any]:
        """Return all that it knows as plain data, for `from_state`."""
        return [part.state() for part in (self.means, self.noise, self.kl)]

    @classmethod
    def from_state(cls, state: list[Any]) -> Self:
        """Undo `state`, without rounding."""
        return cls(*map(ChannelStatistics.from_state, state))

    @property
    def count(self) -> int:
        """Elements a channel."""
        return self.means.count

    @property
    def mean(self) -> Tensor:
        """The mean of samples, `(C,)`."""
        return self.means.mean

    @property
    def std(self) -> Tensor:
        """The standard deviation of samples, `(C,)`."""
        return (self.means.variance + self.noise.mean).sqrt()

    @property
    def noise_share(self) -> Tensor:
        """How much of the variance of samples is the posteriors' own, `(C,)`, 0 to 1: at 1 a channel says nothing."""
        return self.noise.mean / self.std.square()

    @property
    def active(self) -> Tensor:
        """Which channels are used, `(C,)` bool: the posterior mean varies by more than `ACTIVE`."""
        return self.means.variance > ACTIVE


class Spectrum:
    """Power of the frames of all tensors `(B, C, T, H, W)` seen, per channel: by spatial frequency, and by Haar band.

    power: sums of |F|^2 of the orthonormal Fourier transform, by `BANDS` of frequency after that of the frame's mean:
        over `elements` they add up to the mean square. energy: sums of squares of the orthonormal Haar bands `HAAR`;
        a last row or column without a partner has no part in them.
    """

    def __init__(self, channels: int) -> None:
        self.elements, self.paired = 0, 0  # a channel; those with Haar bands
        self.power = torch.zeros(channels, BANDS + 1, dtype=torch.float64)
        self.energy = torch.zeros(channels, len(HAAR), dtype=torch.float64)

    def update(self, z: Tensor) -> None:
        """Add all frames of a tensor `(B, C, T, H, W)`."""
        if z.ndim != 5 or z.shape[1] != len(self.power):
            raise ValueError(f"a tensor of shape {tuple(z.shape)} does not fit: use (B, {len(self.power)}, T, H, W).")
        if not z.numel():
            return
        x = double(z.detach()).transpose(1, 2).flatten(0, 1)  # (N, C, H, W)
        height, width = x.shape[-2:]
        rows, columns = torch.fft.fftfreq(height).double(), torch.fft.fftfreq(width).double()  # cycles a position
        radius = torch.hypot(rows[:, None], columns)
        band = (1 + (radius * 2 * BANDS).long().clamp(max=BANDS - 1)).flatten()
        band[0] = 0
        power = torch.fft.fft2(x, norm="ortho").abs().square().sum(dim=0)  # (C, H, W)
        self.power.index_add_(1, band, power.flatten(1).cpu())
        self.elements += x.numel() // x.shape[1]
        pairs = x[..., : height // 2 * 2, : width // 2 * 2].unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
        (a, b), (c, d) = (half.unbind(-1) for half in pairs.unbind(-3))  # corners of 2x2, each (N, C, H / 2, W / 2)
        bands = torch.stack([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], dim=2) / 2
        self.energy += bands.square().sum(dim=(0, 3, 4)).cpu()
        self.paired += pairs.numel() // x.shape[1]

    def merge(self, other: Self) -> Self:
        """Add all that another one has seen; return self."""
        self.elements, self.paired = self.elements + other.elements, self.paired + other.paired
        self.power, self.energy = self.power + other.power, self.energy + other.energy
        return self

    def state(self) -> list[Any]:
        """Return all that it knows as plain data, for `from_state`."""
        return [self.elements, self.paired, self.power.tolist(), self.energy.tolist()]

    @classmethod
    def from_state(cls, state: list[Any]) -> Self:
        """Undo `state`, without rounding."""
        found = cls(len(state[2]))
        found.elements, found.paired = state[:2]
        found.power, found.energy = (torch.tensor(values, dtype=torch.float64) for values in state[2:])
        return found

    def figures(self) -> dict[str, Any]:
        """Return mean squares as plain data, lists over channels: by upper end of the frequency, and by Haar band.

        The frequency is in cycles a position: 0 is the mean of a frame, and the last band has no upper end.
        """
        power, energy = self.power.T / max(1, self.elements), self.energy.T / max(1, self.paired)
        ends = [0.0, *(band / (2 * BANDS) for band in range(1, BANDS + 1))]
        haar = dict(zip(HAAR, energy.tolist(), strict=True)) if self.paired else None
        return {"spectrum": {"frequency": ends, "power": power.tolist()}, "haar": haar}


def double(x: Tensor) -> Tensor:
    """Return float64, on the CPU where it comes from Apple's GPUs, which have none."""
    return (x.cpu() if x.device.type == "mps" else x).double()
