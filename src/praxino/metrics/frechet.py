"""The Frechet distance between two sets of features, each taken as a Gaussian."""

import math

import torch
from torch import Tensor

from praxino.metrics.latents import double


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Return the distance of the Gaussians fitted to features `(N, D)` and `(M, D)`; biased upward by few samples.

    Raises:
        ValueError: fewer than two samples in a set, or sets of different widths.
    """
    (mean_x, root_x), (mean_y, root_y) = map(centre, (x, y))
    roots = (r if len(r) <= r.shape[1] else root(r.T @ r) for r in (root_x, root_y))  # of few samples no (D, D) matrix
    return distance(mean_x, next(roots), mean_y, next(roots))


def fit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean `(D,)` and unbiased covariance `(D, D)` of features `(N, D)`, in float64."""
    mean, centred = centre(x)
    return mean, centred.T @ centred


def centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean `(D,)`, and what is left of features `(N, D)` over the root of N - 1, in float64."""
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features {tuple(x.shape)}: a covariance takes (N, D) with two samples or more.")
    x = double(x)
    mean = x.mean(0)
    return mean, (x - mean) / math.sqrt(len(x) - 1)


class Moments:
    """Sums of features and of their products, where the features of all samples are too many to be kept.

    What rounding takes from a sum is summed beside it (Neumaier 1974): the order of the samples changes nothing.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sums = self.lost = torch.zeros((), dtype=torch.float64)  # (1 + D, D): of features, and of products

    def add(self, x: Tensor) -> None:
        """Add features `(N, D)`."""
        x = double(x).cpu()
        self.count += len(x)
        self._sum(torch.cat([x.sum(0, keepdim=True), x.T @ x]))

    def merge(self, other: "Moments") -> None:
        """Add all that another one has seen."""
        if other.count:
            self.count += other.count
            self._sum(other.sums)
            self.lost = self.lost + other.lost

    def fit(self) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased covariance, as `fit` does."""
        if self.count < 2:
            raise ValueError(f"{self.count} samples: a covariance takes two or more.")
        total, *products = (self.sums + self.lost).split([1, self.sums.shape[1]])
        mean = total[0] / self.count
        return mean, (products[0] - mean[:, None] * total) / (self.count - 1)

    def _sum(self, x: Tensor) -> None:
        total = self.sums + x
        part = total - self.sums
        self.lost = self.lost + (self.sums - (total - part)) + (x - part)
        self.sums = total


def gaussian_distance(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    """Return the distance of two Gaussians, means `(D,)` and covariances `(D, D)`, of any rank."""
    return distance(mean_x, root(cov_x), mean_y, root(cov_y))


def distance(mean_x: Tensor, root_x: Tensor, mean_y: Tensor, root_y: Tensor) -> float:
    """Return |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^1/2) (Dowson and Landau 1982) for C = R^T R, R `(rank, D)`.

    The trace of the root is the sum of the singular values of R_x R_y^T: no root is taken of a matrix that is not
    symmetric, nor of eigenvalues that are 0 but for rounding, which is what fails or loses digits for few samples.
    """
    if mean_x.shape != mean_y.shape:
        raise ValueError(f"features of widths {len(mean_x)} and {len(mean_y)} cannot be compared.")
    cross = torch.linalg.svdvals(root_x @ root_y.T).sum()
    return float((mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * cross)


def root(cov: Tensor) -> Tensor:
    """Return R `(rank, D)` with R^T R = C, without the directions in which there is only rounding."""
    values, vectors = torch.linalg.eigh(double(cov))
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return (vectors[:, kept] * values[kept].sqrt()).T
