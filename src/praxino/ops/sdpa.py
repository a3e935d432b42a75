"""Scaled dot-product attention with the kernel that suits the device."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LOOP = 256  # tokens a frame from which a call for every frame costs less than a mask over all of them
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@torch.compiler.assume_constant_result
def prefers_cudnn() -> bool:
    """Tell whether cuDNN's attention, which torch tries last, is the fastest: on Hopper about twice as fast."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)


def kernels(x: Tensor) -> AbstractContextManager[None]:
    """Order the kernels for the device of a tensor."""
    return sdpa_kernel(BACKENDS, set_priority=True) if x.is_cuda and prefers_cudnn() else nullcontext()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, frame: int | None = None) -> Tensor:
    """Let queries `(B, H, N, d)` read values `(B, K, M, e)` by keys `(B, K, M, d)`; K divides H.

    Args:
        mask: what may be read, `(B, M)` bool.
        frame: tokens a frame: a token then reads its own frame and earlier ones, where the queries are the last N of
            the M.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    with kernels(q):
        if frame is None or k.shape[2] == frame:
            return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        if frame == 1 and q.shape[2] == k.shape[2]:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        past = k.shape[2] - q.shape[2]
        if frame < LOOP:
            reader = torch.arange(past, k.shape[2], device=q.device) // frame
            read = torch.arange(k.shape[2], device=q.device) // frame
            return F.scaled_dot_product_attention(q, k, v, reader[:, None] >= read)
        parts = []
        for end in range(past + frame, k.shape[2] + 1, frame):
            now = q[:, :, end - past - frame : end - past].contiguous()  # see ops.attention.to_tokens
            seen = k[:, :, :end].contiguous(), v[:, :, :end].contiguous()
            parts.append(F.scaled_dot_product_attention(now, *seen))
        return torch.cat(parts, dim=2)
