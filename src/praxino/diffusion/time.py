"""How training draws diffusion times: uniform or logit-normal, shifted towards noise, stratified over the batch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Divide the ratio of signal to noise of rectified flow by `shift` (Esser et al. 2024, eq. 23); the ends stay."""
    if not 0 < shift < math.inf:
        raise ValueError(f"a shift of {shift} is not positive: 1 changes nothing, 3 suits more noise.")
    return shift * t / (1 + (shift - 1) * t)


class TimeSampler(ABC):
    """A distribution of t in [0, 1], by its quantiles.

    Args:
        shift: as of `shift_time`.
        stratified: draw one time from each of B equal parts of the distribution, in random order, in each column of a
            batch `(B,)` or `(B, T)`; every single time is distributed as before.
    """

    def __init__(self, shift: float = 1.0, stratified: bool = False) -> None:
        shift_time(torch.zeros(()), shift)
        self.shift, self.stratified = shift, stratified

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Return the time below which the fraction `u` lies, before the shift."""

    def draw(
        self, shape: Sequence[int], device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return float32 times; the generator may live on another device."""
        source = generator.device if generator is not None else device
        u = torch.rand(*shape, generator=generator, device=source)
        if self.stratified:
            order = torch.rand(*shape, generator=generator, device=source).argsort(dim=0)
            u = (order + u) / shape[0]
        return shift_time(self.quantile(u.to(device)), self.shift).clamp(0, 1)


class UniformTime(TimeSampler):
    """Times spread evenly over [0, 1]."""

    def quantile(self, u: Tensor) -> Tensor:
        return u


class LogitNormalTime(TimeSampler):
    """Times whose logit is normal, which dwells on the middle (Esser et al. 2024)."""

    def __init__(self, mean: float = 0.0, std: float = 1.0, shift: float = 1.0, stratified: bool = False) -> None:
        super().__init__(shift, stratified)
        if not std > 0:
            raise ValueError(f"a standard deviation of {std} is not positive.")
        self.mean, self.std = mean, std

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * math.sqrt(2) * torch.erfinv(2 * u - 1))
