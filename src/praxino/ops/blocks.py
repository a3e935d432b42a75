"""Residual blocks."""

from torch import Tensor, nn

from praxino.ops.causal import CausalConv3d, FrameConv, Stream
from praxino.ops.norm import NormType, make_norm, norm_silu


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, dropout, conv, plus the input (by a 1x1 convolution if the width changes)."""

    conv: type[CausalConv3d] | type[FrameConv]

    def __init__(self, in_channels: int, out_channels: int, dropout: float, norm_type: NormType) -> None:
        super().__init__()
        self.norm1 = make_norm(norm_type, in_channels)
        self.conv1 = self.conv(in_channels, out_channels)
        self.norm2 = make_norm(norm_type, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = self.conv(out_channels, out_channels)
        self.nin_shortcut = self.conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        if x is None:
            return None
        h = self.conv1(norm_silu(self.norm1, x, stream), stream)
        h = self.conv2(self.dropout(norm_silu(self.norm2, h, stream)), stream)
        h += x if self.nin_shortcut is None else self.nin_shortcut(x, stream)
        return h


class ResnetBlock2D(ResnetBlock):
    """A residual block inside each frame: its group norm, too, sees one frame at a time."""

    conv = FrameConv

    def __init__(self, in_channels: int, out_channels: int, dropout: float, norm_type: NormType) -> None:
        super().__init__(in_channels, out_channels, dropout, "framenorm" if norm_type == "groupnorm" else norm_type)


class ResnetBlock3D(ResnetBlock):
    """A residual block over space and past frames."""

    conv = CausalConv3d
