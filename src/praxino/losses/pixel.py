"""Pixel losses: means over every element, computed in float32 whatever the precision of the network."""

from torch import Tensor


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean absolute difference, a scalar."""
    return (x.float() - y.float()).abs().mean()


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared difference, a scalar."""
    return (x.float() - y.float()).square().mean()


def charbonnier(x: Tensor, y: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Return the mean of sqrt(d^2 + epsilon^2), an L1 that is smooth at zero (Charbonnier et al. 1994)."""
    return ((x.float() - y.float()).square() + epsilon**2).sqrt().mean()
