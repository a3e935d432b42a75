"""Rotary position embedding of a grid in time, height and width (arXiv 2104.09864, an axis at a time)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from praxino.errors import ConfigError

Axes = tuple[int, int, int]  # of t, h and w


def share(width: int, axes: Sequence[int] = (0, 1, 2)) -> Axes:
    """Divide the channels of a head among some of the axes t, h, w, evenly, in pairs; the first takes the rest."""
    if width < 2 or width % 2:
        raise ConfigError(f"qk_dim={width} cannot be rotated: use an even width of a head, e.g. 64.")
    even = width // 2 // len(axes) * 2
    widths = [even if axis in axes else 0 for axis in range(3)]
    widths[axes[0]] = width - even * (len(axes) - 1)
    return widths[0], widths[1], widths[2]


def rotary_table(
    grid: Axes,
    widths: Axes,
    base: float = 10000.0,
    start: int = 0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return cosines and sines `(2, T, H*W, d / 2)` of every place of a grid whose first frame is at `start`.

    Axis a of width `d_a` turns its pair i by `position * base ** (-2 i / d_a)`. An axis of no width has size 1.
    """
    sizes = [size if width else 1 for size, width in zip(grid, widths, strict=True)]
    angles = []
    for axis, (size, width) in enumerate(zip(sizes, widths, strict=True)):
        place = torch.arange(size, device=device, dtype=dtype) + (start if axis == 0 else 0)
        pairs = torch.arange(0, width, 2, device=device, dtype=dtype)
        turn = place[:, None] * base ** (-pairs / max(width, 1))  # (size, d_a / 2)
        shape = [1, 1, 1, -1]
        shape[axis] = size
        angles.append(turn.view(shape).expand(*sizes, -1))
    angle = torch.cat(angles, dim=-1).flatten(1, 2)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn channel pairs (i, i + d/2) of `(B, T, N, heads, d)` by their angles, in the precision of the table."""
    cos, sin = table[:, :, :, None]
    a, b = x.to(table.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
