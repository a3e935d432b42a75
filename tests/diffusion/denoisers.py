"""Denoisers that are known exactly: of a point, of a Gaussian, of a stationary Gaussian process."""

import torch
from torch import Tensor

from praxino.diffusion.path import Cosine, LinearBeta, LinearLogSNR, Path, RectifiedFlow, Sigmoid, expand
from praxino.diffusion.prediction import PREDICTIONS, Prediction, join

PATHS = {
    "flow": RectifiedFlow(),
    "linear": LinearBeta(),
    "cosine": Cosine(),
    "sigmoid": Sigmoid(),
    "vdm": LinearLogSNR(),
}
CASES = [(path, prediction) for path in PATHS.values() for prediction in PREDICTIONS]
IDS = [f"{name}-{prediction}" for name in PATHS for prediction in PREDICTIONS]


def point(path: Path, prediction: Prediction, datum: Tensor | float):
    """Return the denoiser of data that are all `datum`."""

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = expand(path.alpha(t), z), expand(path.sigma(t), z)
        x = torch.zeros_like(z) + datum
        return join(path, prediction, x, (z - alpha * x) / sigma.clamp(min=1e-12), t)

    return denoise


def points(path: Path, prediction: Prediction, data: list[float]):
    """Return the denoiser of a mixture of few points, each element on its own."""

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = expand(path.alpha(t), z), expand(path.sigma(t), z)
        grid = torch.tensor(data, dtype=z.dtype).view(-1, *[1] * z.ndim)
        weight = (-(z - alpha * grid).square() / (2 * sigma.square()).clamp(min=1e-12)).softmax(0)
        x = (weight * grid).sum(0)
        return join(path, prediction, x, (z - alpha * x) / sigma.clamp(min=1e-12), t)

    return denoise


def gaussian(path: Path, prediction: Prediction, mean: float, std: float):
    """Return the denoiser of independent normal elements."""

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = expand(path.alpha(t), z), expand(path.sigma(t), z)
        rest = (z - alpha * mean) / (alpha.square() * std**2 + sigma.square())
        return join(path, prediction, mean + alpha * std**2 * rest, sigma * rest, t)

    return denoise


class Process:
    """A stationary autoregressive process over frames, `x_k = rho x_(k-1) + ...` of variance 1, in every cell its own.

    As a model of rollouts it gives the exact denoiser of a window, frames at any levels, and notes what it was asked.
    """

    def __init__(self, path: Path, prediction: Prediction, rho: float = 0.8, mean: float = 0.0) -> None:
        self.path, self.prediction, self.rho, self.mean = path, prediction, rho, mean
        self.windows: list[tuple[int, int]] = []  # start and length of every call
        self.known: list[int] = []  # frames called known, of every binding

    def covariance(self, frames: int) -> Tensor:
        k = torch.arange(frames, dtype=torch.float64)
        return self.rho ** (k[:, None] - k).abs()

    def bind(self, known: Tensor | None, start: int):
        self.known.append(0 if known is None else int(known[0].sum()))
        return lambda z, t: self.denoise(z, t, start)

    def denoise(self, z: Tensor, t: Tensor, start: int) -> Tensor:
        """Return the output for `z` `(B, C, T, H, W)`; all clips are at the same times `(B,)` or `(B, T)`."""
        frames = z.shape[2]
        self.windows.append((start, frames))
        levels = (t if t.ndim == 2 else t[:, None].expand(-1, frames))[0].double()
        alpha, sigma = self.path.alpha(levels), self.path.sigma(levels)
        clean = levels == 0
        alpha, sigma = alpha.masked_fill(clean, 1), sigma.masked_fill(clean, 0)
        prior = self.covariance(frames)
        joint = alpha[:, None] * prior * alpha + torch.diag(sigma.square())
        rest = torch.linalg.inv(joint)
        of_x, of_eps = (prior * alpha) @ rest, torch.diag(sigma) @ rest
        centred = z - expand(alpha.to(z).expand(len(z), -1), z) * self.mean
        x = torch.einsum("ij,bcjhw->bcihw", of_x.to(z), centred) + self.mean
        eps = torch.einsum("ij,bcjhw->bcihw", of_eps.to(z), centred)
        return join(self.path, self.prediction, x, eps, t)
