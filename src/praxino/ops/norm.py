"""Norms of a video over its channels."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from praxino.errors import ConfigError
from praxino.ops.causal import Stream, fold, unfold

NormType = Literal["layernorm", "groupnorm", "framenorm"]
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
        super().__init__(groups_of(channels), channels, eps=EPS)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        if not stream.whole:
            raise ConfigError(
                "norm_type groupnorm takes its statistics over all frames, so this model cannot work in chunks: "
                "use chunk=null (the whole video at once), overlapping tiles of frames (tile_frames, not exact), or "
                "train with norm_type layernorm or framenorm."
            )
        return super().forward(to_exact_layout(x))


class FrameNorm(nn.GroupNorm):
    """Group norm, 32 groups, over each frame alone: equal for a video and its pieces."""

    def __init__(self, channels: int) -> None:
        super().__init__(groups_of(channels), channels, eps=EPS)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        return unfold(super().forward(to_exact_layout(fold(x))), len(x))


def to_exact_layout(x: Tensor) -> Tensor:
    """Lay out a tensor so that group norm keeps its digits: on a CPU torch's kernel for channels last loses most."""
    return x.contiguous() if x.is_cpu else x


def groups_of(channels: int) -> int:
    """Return the number of groups of a group norm: 32, whatever the width."""
    if channels % 32:
        raise ConfigError(
            f"{channels} channels do not divide into the 32 groups of groupnorm and framenorm: use widths that are "
            "multiples of 32 (base_channels and energy flow sizes, or hidden_size), or norm_type layernorm."
        )
    return 32


def make_norm(kind: NormType, channels: int) -> LayerNorm | GroupNorm | FrameNorm:
    """Build the norm that a configuration names."""
    norms: dict[str, type[LayerNorm | GroupNorm | FrameNorm]] = {
        "layernorm": LayerNorm,
        "groupnorm": GroupNorm,
        "framenorm": FrameNorm,
    }
    if kind not in norms:
        raise ConfigError(f"norm_type {kind!r} is unknown: use {' or '.join(norms)}.")
    return norms[kind](channels)


def norm_silu(norm: nn.Module, x: Tensor, stream: Stream) -> Tensor:
    """Normalise, then SiLU, in place where no gradient needs the value between."""
    return F.silu(norm(x, stream), inplace=not torch.is_grad_enabled())
