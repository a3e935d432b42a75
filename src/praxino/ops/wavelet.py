"""Haar transforms of videos, as sums and differences of neighbours.

The official models store their fixed filters in the state dict. They are kept here under the same names, as buffers
that are only written and checked: the transforms themselves never convolve.
"""

import torch
from torch import Tensor, nn

from praxino.ops.causal import Stream

TAP_3D = 0.3536  # of the official filters: not exactly 1 / (2 sqrt 2), so that there and back again gains 1.00026
TAP_2D = 0.5
NAMES_3D = ("h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v")  # bit 0: high in W, bit 1: in H, bit 2: in T
NAMES_2D = ("aa", "ad", "da", "dd")  # bit 0: high in H, bit 1: in W


def filters_3d() -> dict[str, Tensor]:
    """Return the eight filters `(1, 1, 2, 2, 2)`."""
    signs = {0: torch.tensor([1.0, 1.0]), 1: torch.tensor([1.0, -1.0])}
    return {
        name: TAP_3D * torch.einsum("t,h,w->thw", signs[i >> 2 & 1], signs[i >> 1 & 1], signs[i & 1])[None, None]
        for i, name in enumerate(NAMES_3D)
    }


def filters_2d() -> dict[str, Tensor]:
    """Return the four filters `(1, 1, 2, 2)`."""
    signs = {0: torch.tensor([1.0, 1.0]), 1: torch.tensor([1.0, -1.0])}
    return {
        name: TAP_2D * torch.einsum("h,w->hw", signs[i & 1], signs[i >> 1 & 1])[None, None]
        for i, name in enumerate(NAMES_2D)
    }


def widen(x: Tensor) -> Tensor:
    """Return at least float32: three rounded additions in half precision would cost the detail."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def analyse(x: Tensor, dim: int) -> Tensor:
    """Put the sums of neighbours along `dim` in the first half of the channels, their differences in the second."""
    first, second = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return torch.cat((first + second, first - second), dim=1)


def synthesise(x: Tensor, dim: int) -> Tensor:
    """Undo `analyse`, but for a factor of 2."""
    low, high = x.chunk(2, dim=1)
    return torch.stack((low + high, low - high), dim=dim + 1).flatten(dim, dim + 1)


class HaarWaveletTransform2D(nn.Module):
    """Transform every frame: `(B, C, T, H, W) -> (B, 4C, T, H/2, W/2)`, bands low, H-high, W-high, both high."""

    def __init__(self) -> None:
        super().__init__()
        for name, taps in filters_2d().items():
            self.register_buffer(name, taps)

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        if x is None:
            return None
        y = analyse(analyse(widen(x), dim=3), dim=4)
        return (y * TAP_2D).to(x.dtype)


class InverseHaarWaveletTransform2D(nn.Module):
    """Undo the 2D transform: `(B, 4C, T, H, W) -> (B, C, T, 2H, 2W)`."""

    def __init__(self) -> None:
        super().__init__()
        for name, taps in filters_2d().items():
            self.register_buffer(name, taps)

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        if x is None:
            return None
        y = synthesise(synthesise(widen(x), dim=4), dim=3)
        return (y * TAP_2D).to(x.dtype)


class FixedFilter(nn.Module):
    """One filter under the name that a convolution would give it."""

    def __init__(self, taps: Tensor) -> None:
        super().__init__()
        self.conv = nn.Module()
        self.conv.register_buffer("weight", taps)


class HaarWaveletTransform3D(nn.Module):
    """Transform a video, first frame doubled: `(B, C, T, H, W) -> (B, 8C, (T-1)//2 + 1, H/2, W/2)`.

    Channel `C * band + c`; a band is W-high if its bit 0 is set, H-high for bit 1, T-high for bit 2.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, taps in filters_3d().items():
            self.add_module(f"{name}_conv", FixedFilter(taps))

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        pairs = None if x is None else stream.window(self, x, size=2, step=2)
        if pairs is None:
            return None
        y = analyse(analyse(analyse(widen(pairs), dim=4), dim=3), dim=2)
        return (y * TAP_3D).to(pairs.dtype)


class InverseHaarWaveletTransform3D(nn.Module):
    """Undo the 3D transform and drop the doubled first frame: `(B, 8C, T, H, W) -> (B, C, 2T-1, 2H, 2W)`."""

    def __init__(self) -> None:
        super().__init__()
        for name, taps in filters_3d().items():
            self.register_buffer(name, taps)

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        if x is None:
            return None
        y = synthesise(synthesise(synthesise(widen(x), dim=2), dim=3), dim=4)
        if not stream.begun(self):
            stream.hold(self, None)
            y = y[:, :, 1:]
        return (y * TAP_3D).to(x.dtype)


TRANSFORMS = (
    HaarWaveletTransform2D,
    InverseHaarWaveletTransform2D,
    HaarWaveletTransform3D,
    InverseHaarWaveletTransform3D,
)
