"""The Frechet distance between two sets of features, each taken as a Gaussian."""

import torch
from torch import Tensor


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Return the distance of the Gaussians fitted to features `(N, D)` and `(M, D)`; biased upward by few samples.

    Raises:
        ValueError: fewer than two samples in a set, or sets of different widths.
    """
    return gaussian_distance(*fit(x), *fit(y))


def fit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean `(D,)` and unbiased covariance `(D, D)` of features `(N, D)`, in float64."""
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features {tuple(x.shape)}: a covariance takes (N, D) with two samples or more.")
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def gaussian_distance(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    """Return |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x^1/2 C_y C_x^1/2)^1/2) (Dowson and Landau 1982).

    The trace of the root is the sum of the roots of the eigenvalues of a symmetric matrix: no root of a matrix that is
    not symmetric is taken, which is what fails for few samples.
    """
    if mean_x.shape != mean_y.shape:
        raise ValueError(f"features of widths {len(mean_x)} and {len(mean_y)} cannot be compared.")
    values, vectors = torch.linalg.eigh(cov_x)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    return float((mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross)
