"""Features of videos from a fixed network with random weights: a space to compare sets of videos in without downloads.

Distances in it depend on no training and no data set, and mean nothing beside those of another network.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (12, 16, 24)


class RandomFeatures(nn.Module):
    """Strided 3D convolutions drawn from a seed; mean and deviation of every channel over time and space.

    Args:
        widths: channels of the convolutions; a video has `width`, twice as many features as there are channels.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, seed: int = 0) -> None:
        super().__init__()
        self.name, self.frames = "random", False  # a `Detector` of whole videos
        self.fingerprint = (
            f"random-{seed}" if tuple(widths) == WIDTHS else f"random-{seed}-{'-'.join(map(str, widths))}"
        )
        generator = torch.Generator().manual_seed(seed)
        self.layers, self.width = nn.ModuleList(), 2 * sum(widths)
        for before, after in zip((3, *widths[:-1]), widths, strict=True):
            layer = nn.Conv3d(before, after, 3, stride=(1, 2, 2) if before == 3 else 2, padding=1)
            with torch.no_grad():
                layer.weight.normal_(0, math.sqrt(2 / (27 * before)), generator=generator)
                layer.bias.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
            self.layers.append(layer)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return features `(B, D)` of videos `(B, 3, T, H, W)` in [-1, 1]."""
        features = []
        for layer in self.layers:
            x = F.relu(layer(x))  # (B, width, T', H / 2, W / 2)
            features += [x.mean((2, 3, 4)), x.std((2, 3, 4), correction=0)]
        return torch.cat(features, 1)
