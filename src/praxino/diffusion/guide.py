"""Classifier-free guidance (Ho & Salimans 2022), within an interval of noise levels, with the spread put right."""

import torch
from torch import Tensor

from praxino.diffusion.loss import Denoise
from praxino.diffusion.path import expand


def spread(x: Tensor, counted: Tensor) -> Tensor:
    """Return the standard deviation of every clip over the elements `counted`, `(B, 1, ...)`."""
    dims = tuple(range(1, x.ndim))
    weight = counted.expand_as(x).to(x.dtype)
    count = weight.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * weight).sum(dims, keepdim=True) / count
    return (((x - mean).square() * weight).sum(dims, keepdim=True) / count).sqrt()


def guide(
    conditional: Denoise,
    unconditional: Denoise,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    known: Tensor | None = None,
) -> Denoise:
    """Return a denoiser that goes `scale` times the way from the unconditional to the conditional prediction.

    Args:
        conditional: its predictions are the result for `scale` 1 and outside `interval`, where nothing else is called.
        unconditional: predicts the same quantity without the condition.
        scale: above 1 stresses the condition.
        interval: the times at which guidance acts, ends included (Kynkaanniemi et al. 2024); of every frame its own.
        rescale: part of the way to the spread of the conditional prediction, on frames with noise but for given ones
            (Lin et al. 2023).
        known: `(B, T)`, true at given frames, on which guidance does not act; times are then of every frame.

    Raises:
        ValueError: no such interval, or `rescale` outside [0, 1].
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"({low}, {high}) is no interval of times in [0, 1].")
    if not 0 <= rescale <= 1:
        raise ValueError(f"a rescale of {rescale} is no part of the way: choose from 0 to 1, e.g. 0.7.")
    if scale == 1:
        return conditional

    def guided(z: Tensor, t: Tensor) -> Tensor:
        prediction = conditional(z, t)
        acts = (low <= t) & (t <= high)
        if known is not None:
            acts = acts & ~known
        if not bool(acts.any()):
            return prediction
        without = unconditional(z, t)
        result = without + scale * (prediction - without)
        if rescale:
            noisy = expand(t > 0 if known is None else (t > 0) & ~known, z)
            ratio = spread(prediction, noisy) / spread(result, noisy).clamp(min=1e-8)
            result = result * (1 + rescale * (ratio - 1))
        return torch.where(expand(acts, z), result, prediction)

    return guided
