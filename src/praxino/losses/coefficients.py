"""The wavelet loss of WF-VAE: the decoder's outflow must carry the coefficients of the input (eq. 8 of 2411.17459)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from praxino.losses.pixel import full


def coefficient_l1(encoder: Sequence[Tensor], decoder: Sequence[Tensor]) -> Tensor:
    """Return the mean absolute difference over all coefficients of all levels together, a scalar.

    Every coefficient weighs the same, as in the official sum; the mean is that sum over the number of coefficients.

    Raises:
        ValueError: the two have not the same number of levels, or none.
    """
    if len(encoder) != len(decoder) or not encoder:
        raise ValueError(
            f"{len(encoder)} levels of encoder and {len(decoder)} of decoder coefficients cannot be compared: "
            "a network without coefficients needs wavelet=0."
        )
    total = torch.stack([(full(e) - full(d)).abs().sum() for e, d in zip(encoder, decoder, strict=True)]).sum()
    return total / sum(e.numel() for e in encoder)
