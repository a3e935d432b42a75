"""Pixel losses: means over every element, in float32 at least, whatever the precision of the network."""

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """Return half-precision values as float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean absolute difference, a scalar."""
    return (full(x) - full(y)).abs().mean()


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared difference, a scalar."""
    return (full(x) - full(y)).square().mean()


def charbonnier(x: Tensor, y: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Return the mean of sqrt(d^2 + epsilon^2), an L1 that is smooth at zero (Charbonnier et al. 1994)."""
    return ((full(x) - full(y)).square() + epsilon**2).sqrt().mean()
