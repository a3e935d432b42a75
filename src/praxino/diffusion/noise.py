"""Noise that belongs to a frame of a sample, whatever batch, window or process draws it."""

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor


class FrameNoise:
    """Standard normal noise that is a function of (seed of the sample, frame, draw) and nothing else.

    It is drawn on the CPU in float32, so that every device gets the same.

    Args:
        seeds: one of every sample.
        shape: of a frame, `(C, H, W)`.
        device: where the noise goes.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str | None = None) -> None:
        self.seeds, self.shape, self.device = tuple(seeds), tuple(shape), device

    def __call__(self, start: int, stop: int, draw: int = 0) -> Tensor:
        """Return the noise of the frames `start .. stop - 1`, `(B, C, stop - start, H, W)`; every `draw` is another."""
        clips = [torch.stack([self.frame(seed, k, draw) for k in range(start, stop)], dim=1) for seed in self.seeds]
        return torch.stack(clips).to(self.device)

    def frame(self, seed: int, index: int, draw: int) -> Tensor:
        key = int.from_bytes(blake2b(f"{seed} {index} {draw}".encode(), digest_size=4).digest(), "little")
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(key))
