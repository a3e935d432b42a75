"""Learned halving and doubling of a video, in space or in space and time."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from praxino.ops.causal import CausalConv3d, Stream, fold, to_compute_dtype, unfold

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
    """Double H and W of every frame and the number of all frames but the first: T -> 1 + 2 (T - 1).

    Linear interpolation in time needs the next frame: one output frame is held back until that comes or the stream
    ends. In space it is bilinear in both modes.
    """

    def __init__(self, channels: int, t_interpolation: Interpolation) -> None:
        super().__init__()
        self.linear = t_interpolation == "trilinear"
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        x = self.double_time(x, stream)  # (B, C, t', H, W)
        if x is None:
            return None
        frames = F.interpolate(fold(x), scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.conv(unfold(frames, len(x)), stream)  # (B, C, t', 2H, 2W)

    def double_time(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        """Return those frames of the doubled video that are certain by now."""
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
