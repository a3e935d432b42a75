"""The loss of a denoiser: the squared error of its prediction on the frames to make, weighted by noise level."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from praxino.diffusion.path import Path, expand
from praxino.diffusion.prediction import Prediction, check, sensitivity, target
from praxino.diffusion.time import TimeSampler

Denoise = Callable[[Tensor, Tensor], Tensor]  # z_t `(B, C, T, H, W)` and t `(B,)` or `(B, T)` to a prediction
Weight = Literal["none", "min_snr", "sigmoid"]


def weight_of(path: Path, prediction: Prediction, weight: Weight, t: Tensor, gamma: float, bias: float) -> Tensor:
    """Return the weight of the squared error of the output at times `t`, the same loss whatever is predicted.

    `min_snr` weighs the error of x0 by min(SNR, gamma) (Hang et al. 2023); `sigmoid` that of eps by
    sigmoid(bias - log SNR) (Kingma & Gao 2023; Hoogeboom et al. 2024). The distribution of t comes on top.
    """
    if weight == "none":
        return torch.ones_like(t)
    of_x, of_eps = sensitivity(path, prediction, t)
    if weight == "min_snr":
        return torch.minimum(of_eps.square(), gamma * of_x.square())  # SNR of_x^2 = of_eps^2
    return torch.sigmoid(bias - path.log_snr(t).clamp(-50, 50)) * of_eps.square()


class DiffusionLoss:
    """Noise clips, let a network predict, and compare.

    Args:
        path: from data to noise.
        time: the distribution of noise levels.
        prediction: what the network puts out.
        weight: of noise levels, see `weight_of`.
        per_frame: draw a level for every frame (Chen et al. 2024, diffusion forcing) instead of one for the clip.
        gamma: the SNR at which `min_snr` cuts.
        bias: of `sigmoid`, the log-SNR at which it is a half; higher stresses detail.
    """

    def __init__(
        self,
        path: Path,
        time: TimeSampler,
        prediction: Prediction = "flow",
        weight: Weight = "none",
        per_frame: bool = False,
        gamma: float = 5.0,
        bias: float = 0.0,
    ) -> None:
        check(prediction)
        if weight not in ("none", "min_snr", "sigmoid"):
            raise ValueError(f"weight {weight!r} is unknown: choose one of none, min_snr, sigmoid.")
        if not gamma > 0:
            raise ValueError(f"a gamma of {gamma} is not positive, e.g. 5.")
        self.path, self.time, self.prediction = path, time, prediction
        self.weight, self.per_frame, self.gamma, self.bias = weight, per_frame, gamma, bias

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        *,
        known: Tensor | None = None,
        context_noise: float = 0.0,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return `loss`, `mse` (unweighted) and `per_sample` `(B,)` of clips `x` `(B, C, T, H, W)`.

        A clip's loss is the mean over its target elements, the batch's that over clips: it does not depend on how clips
        are spread over processes. Given frames enter as they are, or noised to a time drawn uniformly up to
        `context_noise` for every clip; the network sees them at that time, and all times as `(B, T)`.

        Args:
            known: `(B, T)`, true at given frames.
            t: times to use instead of drawn ones, `(B,)` or `(B, T)`.
            noise: noise to use instead of drawn one, shaped as `x`.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if t is None:
            t = self.time.draw((x.shape[0], x.shape[2]) if self.per_frame else x.shape[:1], x.device, generator)
        if noise is None:
            noise = draw_normal(x, generator)
        counted = torch.ones_like(t) if known is None else (~known).to(t.dtype)
        if known is not None:
            level = context_noise * draw_uniform(x.shape[0], x.device, generator)[:, None]
            t = torch.where(known, level, t if t.ndim == 2 else t[:, None])
        z = self.path.mix(x, noise, t)
        if known is not None:  # exactly the data where the level is zero, in every path
            z = torch.where(expand(known & (t == 0), x), x, z)

        error = (denoise(z, t).to(x.dtype) - target(self.path, self.prediction, x, noise, t)).square()
        weights = weight_of(self.path, self.prediction, self.weight, t, self.gamma, self.bias) * counted
        share = expand(counted, x).expand_as(x).flatten(1).sum(1).clamp(min=1)
        per_sample = (torch.where(expand(counted > 0, x), error, 0) * expand(weights, x)).flatten(1).sum(1) / share
        mse = (torch.where(expand(counted > 0, x), error.detach(), 0)).flatten(1).sum(1) / share
        return {"loss": per_sample.mean(), "mse": mse.mean(), "per_sample": per_sample}


def draw_normal(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return noise like `x`; the generator may live on another device."""
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def draw_uniform(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Return uniform numbers; the generator may live on another device."""
    source = generator.device if generator is not None else device
    return torch.rand(count, generator=generator, device=source).to(device)
