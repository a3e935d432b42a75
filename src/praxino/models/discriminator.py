"""Patch discriminators in the official layouts, key for key: logits for patches of a video, not for the whole.

Their batch norm takes its statistics over all ranks, on a CPU as well as on a GPU, and can be differentiated twice.
"""

from abc import ABC, abstractmethod
from math import gcd
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from praxino.errors import ConfigError

Norm = Literal["batch", "group"]
GROUPS = 32


class JointBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all ranks, which may differ in size; alone, or in eval mode, torch's own.

    Values and gradients are those of one process with the joint batch, where the loss is the sum over the ranks.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, channels: int) -> None:
        super().__init__(channels)

    def forward(self, x: Tensor) -> Tensor:
        joint = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return self.joint_forward(x) if joint else super().forward(x)

    def joint_forward(self, x: Tensor) -> Tensor:
        """Normalise with the mean and variance over all ranks, taken at least in float32."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        own = values.new_full((1,), x.numel() // x.shape[1])
        total = all_reduce(torch.cat((values.sum(axes), own)))  # (C + 1,)
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centred = values - mean.view(shape)
        var = all_reduce(centred.square().sum(axes)) / count  # (C,)
        self.track(mean, var * (count / (count - 1).clamp(min=1)))
        scale = torch.rsqrt(var + self.eps) * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
    def track(self, mean: Tensor, unbiased: Tensor) -> None:
        """Move the running statistics as torch does."""
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)


class JointBatchNorm2d(JointBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` over all ranks."""


class JointBatchNorm3d(JointBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` over all ranks."""


class PatchDiscriminator(nn.Module, ABC):
    """What both discriminators share: convolutions, each but the first and the last with a norm."""

    conv: type[nn.Conv2d] | type[nn.Conv3d]
    batch_norm: type[JointBatchNorm]
    kernel: int

    def __init__(self, channels: int, width: int, layers: int, norm: Norm, dropout: float | None) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("width", width), ("layers", layers)):
            if value < 1:
                raise ConfigError(f"{name}={value} does not fit a discriminator: use 1 or more.")
        if norm not in ("batch", "group"):
            raise ConfigError(f"norm {norm!r} is unknown: use batch or group.")
        if dropout is not None and not 0 <= dropout < 1:
            raise ConfigError(f"dropout={dropout} does not fit: use a number in [0, 1), or null for no such layers.")
        self.channels, self.layers = channels, layers
        widths = [width * min(2**n, 8) for n in range(layers + 1)]
        parts: list[nn.Module] = [self.convolution(channels, width, 0), nn.LeakyReLU(0.2, inplace=True)]
        for n in range(1, layers + 1):
            parts += [self.convolution(widths[n - 1], widths[n], n, bias=False)]
            parts += [self.batch_norm(widths[n]) if norm == "batch" else group_norm(widths[n])]
            parts += [nn.LeakyReLU(0.2, inplace=True)]
            parts += [] if dropout is None else [nn.Dropout(dropout)]
        self.main = nn.Sequential(*parts, self.convolution(widths[-1], 1, layers + 1))
        self.initialize()

    @abstractmethod
    def stride(self, n: int) -> int | tuple[int, int, int]:
        """Return the stride of the n-th convolution."""

    def convolution(self, channels: int, out: int, n: int, bias: bool = True) -> nn.Module:
        """Build the n-th convolution."""
        return self.conv(channels, out, self.kernel, self.stride(n), padding=1, bias=bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the weights as the official code does: N(0, 0.02), gains N(1, 0.02), torch's own biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, JointBatchNorm | nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless the video fits."""
        if x.ndim != 5 or x.shape[1] != self.channels:
            raise ValueError(f"a video of shape {tuple(x.shape)} does not fit: use (B, {self.channels}, T, H, W).")


class NLayerDiscriminator3D(PatchDiscriminator):
    """The discriminator of WF-VAE and Open-Sora-Plan: video `(B, C, T, H, W)` to logits `(B, 1, t, h, w)`.

    Time is halved twice, space `layers` times. The files of the two differ: WF-VAE's have layers for dropout (0.3),
    Open-Sora-Plan's have none (`dropout=None`), which shifts the names of all the layers behind.
    """

    conv = nn.Conv3d
    batch_norm = JointBatchNorm3d
    kernel = 3

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        layers: int = 4,
        norm: Norm = "batch",
        dropout: float | None = 0.3,
    ) -> None:
        super().__init__(channels, width, layers, norm, dropout)

    def stride(self, n: int) -> int | tuple[int, int, int]:
        if n >= self.layers:
            return 1
        return 2 if n < 2 else (1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.main(x)


class NLayerDiscriminator2D(PatchDiscriminator):
    """The PatchGAN of pix2pix on every frame: video `(B, C, T, H, W)` to logits `(B, 1, T, h, w)`."""

    conv = nn.Conv2d
    batch_norm = JointBatchNorm2d
    kernel = 4

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        layers: int = 3,
        norm: Norm = "batch",
        dropout: float | None = None,
    ) -> None:
        super().__init__(channels, width, layers, norm, dropout)

    def stride(self, n: int) -> int:
        return 2 if n < self.layers else 1

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        least = 3 * 2**self.layers
        if min(x.shape[-2:]) < least:
            raise ValueError(
                f"frames of {x.shape[-2]}x{x.shape[-1]} are too small for {self.layers} layers: "
                f"use {least} pixels or more, or fewer layers."
            )
        logits = self.main(x.transpose(1, 2).flatten(0, 1))  # (B T, 1, h, w)
        return logits.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def group_norm(channels: int) -> nn.GroupNorm:
    """Build a group norm of 32 groups, or of as many as divide the channels."""
    return nn.GroupNorm(gcd(GROUPS, channels), channels)
