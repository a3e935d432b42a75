"""Halving and doubling of a video, in space, in time, or in both."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from praxino.ops.causal import CausalConv3d, Conv3d, Stream, fold, to_compute_dtype, unfold

Interpolation = Literal["nearest", "trilinear"]


class Downsample(nn.Module):
    """Halve H and W of every frame: a zero row and column at the bottom right, then a strided 2D convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        if x is None:
            return None
        return unfold(self.conv(F.pad(fold(to_compute_dtype(x)), (0, 1, 0, 1))), len(x))


class Upsample(nn.Module):
    """Double H and W of every frame: nearest neighbour, then a 2D convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        if x is None:
            return None
        return unfold(self.conv(F.interpolate(fold(x), scale_factor=2.0, mode="nearest")), len(x))


class Spatial2xTime2x3DDownsample(nn.Module):
    """Halve T, H and W by a causal convolution: T -> (T - 1) // 2 + 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride=2, padding=0)

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        if x is None:
            return None
        return self.conv(F.pad(to_compute_dtype(x), (0, 1, 0, 1)), stream)


class Spatial2xTime2x3DUpsample(nn.Module):
    """Double H and W of every frame, bilinear in both modes, and the number of all frames but the first."""

    def __init__(self, channels: int, t_interpolation: Interpolation = "trilinear") -> None:
        super().__init__()
        self.double_time = TimeUpsample2x(t_interpolation)
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        x = self.double_time(x, stream)  # (B, C, t', H, W)
        if x is None:
            return None
        frames = F.interpolate(fold(x), scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.conv(unfold(frames, len(x)), stream)  # (B, C, t', 2H, 2W)


class SpatialDownsample2x(nn.Module):
    """Halve H and W of every frame as `Downsample` does, under the names of a causal convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (1, 3, 3), stride=(1, 2, 2), padding=0)

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        if x is None:
            return None
        return self.conv(F.pad(to_compute_dtype(x), (0, 1, 0, 1)), stream)


class SpatialUpsample2x(nn.Module):
    """Double H and W of every frame as `Upsample` does, under the names of a causal convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (1, 3, 3))

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        if x is None:
            return None
        return self.conv(unfold(F.interpolate(fold(x), scale_factor=2.0, mode="nearest"), len(x)), stream)


class TimeDownsample2x(nn.Module):
    """Halve T by the mean of every second frame and the two before it: T -> (T - 1) // 2 + 1."""

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        x = None if x is None else stream.window(self, x, size=3, step=2)
        return None if x is None else mean_of_three(x)


def mean_of_three(x: Tensor) -> Tensor:
    """Return the mean of frames 0 to 2, 2 to 4, ..."""
    return (x[:, :, :-2:2] + x[:, :, 1:-1:2] + x[:, :, 2::2]) / 3


class TimeUpsample2x(nn.Module):
    """Double the number of all frames but the first: T -> 1 + 2 (T - 1).

    Linear interpolation needs the next frame: one output frame is held back until that comes or the stream ends.
    """

    def __init__(self, t_interpolation: Interpolation = "trilinear") -> None:
        super().__init__()
        self.linear = t_interpolation == "trilinear"

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        first = None
        if x is not None and not stream.begun(self):
            stream.hold(self, None)
            first, x = x[:, :, :1], x[:, :, 1:] if x.shape[2] > 1 else None
        if self.linear:
            x = self.interpolate(x, stream)
        elif x is not None:
            x = x.repeat_interleave(2, dim=2)
        return first if x is None else x if first is None else torch.cat((first, x), dim=2)

    def interpolate(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        """Interpolate at -1/4, 1/4, 3/4, ... (half-pixel) between the frame held back and the newest one."""
        held = stream.held(self)
        newest = held if x is None else x[:, :, -1:]
        if newest is None or (x is None and not stream.final):
            return None
        before = x[:, :, :1] if held is None and x is not None else held  # the left edge is repeated
        after = newest if stream.final else None  # and so is the right one
        knots = torch.cat([part for part in (before, x, after) if part is not None], dim=2)
        stream.hold(self, newest)
        left, right = knots[:, :, :-1], knots[:, :, 1:]
        y = torch.stack((torch.lerp(left, right, 0.25), torch.lerp(left, right, 0.75)), dim=3).flatten(2, 3)
        return y[:, :, held is None : y.shape[2] - stream.final]  # an edge is one frame, not two


class Mixed(nn.Module):
    """A resampling without weights mixed with a learned one, in the proportion `sigmoid(mix_factor)`."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with 88 percent of the fixed one."""
        nn.init.constant_(self.mix_factor, 2.0)

    def mix(self, fixed: Tensor, learned: Tensor) -> Tensor:
        """Return the weighted mean."""
        share = torch.sigmoid(self.mix_factor).to(learned.dtype)
        return share * fixed + (1 - share) * learned


class TimeDownsampleRes2x(Mixed):
    """Halve T by the mean of three frames, mixed with a strided convolution of the same three."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3d(channels, channels, 3, stride=(2, 1, 1), padding=(0, 1, 1))

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        x = None if x is None else stream.window(self, to_compute_dtype(x), size=3, step=2)
        return None if x is None else self.mix(mean_of_three(x), self.conv(x))


class TimeUpsampleRes2x(Mixed):
    """Double the number of all frames but the first linearly, mixed with a convolution of the result."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.double_time = TimeUpsample2x()
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        x = self.double_time(x, stream)
        return None if x is None else self.mix(to_compute_dtype(x), self.conv(x, stream))
