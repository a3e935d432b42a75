"""The loss of a video autoencoder: a weighted sum of means per element."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from praxino.errors import ConfigError
from praxino.losses.coefficients import coefficient_l1
from praxino.losses.perceptual import LPIPS
from praxino.losses.pixel import charbonnier, l1, l2

PIXEL = ("l1", "l2", "charbonnier")
RECONSTRUCTION = (*PIXEL, "perceptual")  # what the adaptive weight of an adversary balances


class Reconstruction(Protocol):
    """What the loss needs of an autoencoder's output; `posterior` has `mean` and `kl()`."""

    recon: Tensor
    posterior: Any
    encoder_coefficients: Sequence[Tensor]
    decoder_coefficients: Sequence[Tensor]


class VAELoss(nn.Module):
    """Reconstruction, perception, wavelet coefficients and KL, weighted.

    Args:
        l1, l2, charbonnier: weights of the pixel losses, which may be summed.
        perceptual: weight of LPIPS, per frame; without `lpips` there is no such term.
        wavelet: weight of the coefficients' L1; 0 for networks that have none.
        kl: weight of the KL divergence from the standard normal, per latent element.
        lpips: the perceptual distance.
        reduction: `mean` weighs means per element, so that the weights hold for every size of clip. `official` weighs
            the sums of the published code: reconstruction per frame (with LPIPS added to each of its elements),
            coefficients and KL per video. The terms are logged as means in both.
        logvar: logarithm of the reconstruction's variance: its terms are divided by exp(logvar).
        free_bits: nats per element that every latent channel has for nothing: its KL only counts above.
        epsilon: of Charbonnier, in units of the pixel range [-1, 1].
    """

    def __init__(
        self,
        l1: float = 1.0,
        l2: float = 0.0,
        charbonnier: float = 0.0,
        perceptual: float = 1.0,
        wavelet: float = 0.1,
        kl: float = 1e-6,
        lpips: LPIPS | None = None,
        reduction: Literal["mean", "official"] = "mean",
        logvar: float = 0.0,
        free_bits: float = 0.0,
        epsilon: float = 1e-3,
    ) -> None:
        super().__init__()
        self.weights = {"l1": l1, "l2": l2, "charbonnier": charbonnier, "perceptual": perceptual, "wavelet": wavelet}
        self.weights["kl"] = kl
        self.lpips, self.reduction = lpips, reduction
        self.logvar, self.free_bits, self.epsilon = logvar, free_bits, epsilon
        if min(self.weights.values()) < 0 or not any(self.weights[name] for name in PIXEL):
            raise ConfigError(f"loss weights {self.weights}: none may be negative, and one pixel loss must count")
        if reduction not in ("mean", "official") or free_bits < 0:
            raise ConfigError(f"reduction={reduction!r} must be mean or official, and free_bits={free_bits} positive")
        if lpips is None:
            self.weights["perceptual"] = 0.0

    def forward(self, x: Tensor, output: Reconstruction) -> dict[str, Tensor]:
        """Return the weighted sum "loss", its parts "nll", which judges the reconstruction, and "rest", and every term.

        Video `x` and `output.recon` are `(B, C, T, H, W)` in [-1, 1]; all values are scalars, the terms unweighted.
        """
        means = {name: self.term(name, x, output) for name, weight in self.weights.items() if weight}
        sizes = self.sizes(x, output)
        weighted = {name: self.weights[name] * sizes[name] * mean for name, mean in means.items()}
        if "kl" in weighted and self.free_bits:
            weighted["kl"] = self.weights["kl"] * sizes["kl"] * self.kl_above_free_bits(output.posterior)
        nll = torch.stack([value for name, value in weighted.items() if name in RECONSTRUCTION]).sum()
        nll = nll / math.exp(self.logvar) + sizes["l1"] * self.logvar
        rest = sum((value for name, value in weighted.items() if name not in RECONSTRUCTION), start=nll.new_zeros(()))
        return {"loss": nll + rest, "nll": nll, "rest": rest, **means}

    def term(self, name: str, x: Tensor, output: Reconstruction) -> Tensor:
        """Return one unweighted term, a mean."""
        match name:
            case "l1":
                return l1(x, output.recon)
            case "l2":
                return l2(x, output.recon)
            case "charbonnier":
                return charbonnier(x, output.recon, self.epsilon)
            case "perceptual" if self.lpips is not None:
                return self.lpips(x, output.recon).mean()
            case "wavelet":
                return coefficient_l1(output.encoder_coefficients, output.decoder_coefficients)
            case "kl":
                return output.posterior.kl().mean()
            case _:
                raise ValueError(f"unknown loss term {name!r}: use one of {sorted(self.weights)}.")

    def sizes(self, x: Tensor, output: Reconstruction) -> dict[str, float]:
        """Return by what a mean is multiplied to be the sum that is weighed."""
        if self.reduction == "mean":
            return dict.fromkeys(self.weights, 1.0)
        frame = x[0, :, 0].numel()
        coefficients = sum(c[0].numel() for c in output.encoder_coefficients)
        per_video = {"wavelet": coefficients, "kl": output.posterior.mean[0].numel()}
        return {name: float(per_video.get(name, frame)) for name in self.weights}

    def kl_above_free_bits(self, posterior: Any) -> Tensor:
        """Return the mean KL of which each channel's mean counts only above `free_bits` (Kingma et al. 2016)."""
        channels = posterior.kl().mean(dim=(0, 2, 3, 4))
        return channels.clamp(min=self.free_bits).mean()
