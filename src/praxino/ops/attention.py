"""Attention inside each frame of a video."""

from torch import Tensor, nn
from torch.nn import functional as F

from praxino.ops.causal import CausalConv3d, Stream
from praxino.ops.norm import NormType, make_norm


class AttnBlock3DFix(nn.Module):
    """Full single-head attention over the H*W positions of each frame, with a residual connection."""

    def __init__(self, channels: int, norm_type: NormType) -> None:
        super().__init__()
        self.norm = make_norm(norm_type, channels)
        self.q = CausalConv3d(channels, channels, 1)
        self.k = CausalConv3d(channels, channels, 1)
        self.v = CausalConv3d(channels, channels, 1)
        self.proj_out = CausalConv3d(channels, channels, 1)

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        if x is None:
            return None
        h = self.norm(x, stream)
        q, k, v = (to_tokens(layer(h, stream)) for layer in (self.q, self.k, self.v))  # each (B, T, H*W, C)
        h = F.scaled_dot_product_attention(q, k, v)  # frames take the place of heads
        h = h.movedim(-1, 1).unflatten(-1, x.shape[-2:])  # (B, C, T, H, W)
        return x + self.proj_out(h, stream)


def to_tokens(x: Tensor) -> Tensor:
    """Reshape `(B, C, T, H, W) -> (B, T, H*W, C)`: a view if channels are last.

    Contiguous, because inductor on a CPU computes wrong attention of strided views.
    """
    return x.flatten(3).movedim(1, -1).contiguous()
