"""Norms of a video over its channels."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from praxino.errors import ConfigError
from praxino.ops.causal import Stream

NormType = Literal["layernorm", "groupnorm"]
EPS = 1e-6


class LayerNorm(nn.Module):
    """Layer norm over the channels of every position: causal, and equal for a video and its pieces."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=EPS)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class GroupNorm(nn.GroupNorm):
    """Group norm, 32 groups, over all frames: not causal, so it refuses a video in pieces."""

    def __init__(self, channels: int) -> None:
        if channels % 32:
            raise ConfigError(
                f"{channels} channels do not divide into the 32 groups of groupnorm: "
                "use base_channels and energy flow sizes that are multiples of 32, or norm_type layernorm."
            )
        super().__init__(32, channels, eps=EPS)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        if not stream.whole:
            raise ConfigError(
                "norm_type groupnorm takes its statistics over all frames, so this model cannot work in chunks: "
                "use chunk=null (the whole video at once)."
            )
        return super().forward(x)


def make_norm(kind: NormType, channels: int) -> LayerNorm | GroupNorm:
    """Build the norm that a configuration names."""
    if kind == "layernorm":
        return LayerNorm(channels)
    if kind == "groupnorm":
        return GroupNorm(channels)
    raise ConfigError(f"norm_type {kind!r} is unknown: use layernorm or groupnorm.")


def norm_silu(norm: nn.Module, x: Tensor, stream: Stream) -> Tensor:
    """Normalise, then SiLU, in place where no gradient needs the value between."""
    return F.silu(norm(x, stream), inplace=not torch.is_grad_enabled())
