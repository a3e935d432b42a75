"""Attention over the positions of a video."""

from torch import Tensor, nn
from torch.nn import functional as F

from praxino.errors import ConfigError
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
        h = self.attend(*(layer(h, stream) for layer in (self.q, self.k, self.v)))
        return x + self.proj_out(h, stream)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values `(B, C, T, H, W)` of each frame."""
        h = F.scaled_dot_product_attention(to_tokens(q), to_tokens(k), to_tokens(v))  # frames in place of heads
        return h.movedim(-1, 1).unflatten(-1, q.shape[-2:])


class AttnBlock3D(AttnBlock3DFix):
    """The attention of CausalVAE v1.0, which takes channels for frames where there is more than one frame.

    Its `T` attentions each see the `C` rows of numbers that follow one another in memory, whatever channel and frame
    they belong to: weights that were trained so need it so. No frame can be computed without the others.
    """

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        if not stream.whole:
            raise ConfigError(
                "attention AttnBlock3D (CausalVAE v1.0) mixes all frames, so this model cannot work in chunks: use "
                "chunk=null (the whole video at once), overlapping tiles of frames (tile_frames, not exact), or train "
                "with AttnBlock3DFix."
            )
        return super().forward(x, stream)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, c, t, height, width = q.shape
        q, k, v = (y.reshape(b, t, c, height * width).mT.contiguous() for y in (q, k, v))  # not (B, C, T, ..) moved
        return F.scaled_dot_product_attention(q, k, v).mT.reshape(b, c, t, height, width)


def to_tokens(x: Tensor) -> Tensor:
    """Reshape `(B, C, T, H, W) -> (B, T, H*W, C)`: a view if channels are last.

    Contiguous, because inductor on a CPU computes wrong attention of strided views.
    """
    return x.flatten(3).movedim(1, -1).contiguous()
