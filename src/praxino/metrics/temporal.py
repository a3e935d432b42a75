"""How well the change from frame to frame is kept. All values are of [0, 1]; the first frame has none: NaN."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from praxino.metrics.image import check_pair, check_range
from praxino.metrics.latents import double


def difference_error(x: Tensor, y: Tensor, check: bool = True) -> Tensor:
    """Return the mean absolute error of the differences to the frame before, `(B, T)`, float64.

    Of videos `(B, C, T, H, W)` in [-1, 1], `x` the truth. An error that stays as it is from frame to frame counts
    nothing.
    """
    check_pair(x, y, check)
    errors = (double(b) - double(a) for a, b in zip(x.unbind(2), y.unbind(2), strict=True))
    return _first_without([_change(before, error) for before, error in pairwise(errors)], x)


def flicker(x: Tensor, y: Tensor, check: bool = True) -> Tensor:
    """Return by how much more `y` changes from frame to frame than the truth `x`, `(B, T)`, float64.

    The mean absolute difference to the frame before, which VBench (Huang et al. 2024) calls temporal flickering, less
    that of the truth: positive where a video flickers, negative where motion or grain is smoothed away, 0 at best.
    """
    check_pair(x, y, check)
    steps = zip(pairwise(x.unbind(2)), pairwise(y.unbind(2)), strict=True)
    return _first_without([_change(*of_y) - _change(*of_x) for of_x, of_y in steps], x)


def warped_error(y: Tensor, flow: Tensor, valid: Tensor, check: bool = True) -> Tensor:
    """Return the mean squared error between every frame and the one before, moved along the flow, `(B, T)`, float64.

    The warping error of Lai et al. 2018 (Learning Blind Video Temporal Consistency), over all colours.

    Args:
        y: video `(B, C, T, H, W)` in [-1, 1].
        flow: `(B, 2, T - 1, H, W)` in pixels, x then y: where to look in frame t - 1 for each pixel of frame t.
        valid: `(B, T - 1, H, W)` bool: pixels that are seen in both. Those that come from outside do not count either.
    """
    batch, _, frames, height, width = y.shape
    if flow.shape != (batch, 2, frames - 1, height, width) or valid.shape != (batch, frames - 1, height, width):
        raise ValueError(
            f"a flow of {tuple(flow.shape)} with a mask of {tuple(valid.shape)} does not fit a video of "
            f"{tuple(y.shape)}: use (B, 2, T - 1, H, W) and (B, T - 1, H, W)."
        )
    if check:
        check_range(y)
    rows = torch.arange(height, dtype=torch.float64, device=y.device)[:, None]
    columns = torch.arange(width, dtype=torch.float64, device=y.device)
    errors = []
    for t, (before, frame) in enumerate(pairwise(y.unbind(2))):
        at_x, at_y = columns + flow[:, 0, t], rows + flow[:, 1, t]  # (B, H, W)
        inside = valid[:, t] & (at_x >= 0) & (at_x <= width - 1) & (at_y >= 0) & (at_y <= height - 1)
        grid = torch.stack([at_x * (2 / max(1, width - 1)) - 1, at_y * (2 / max(1, height - 1)) - 1], dim=-1)
        moved = F.grid_sample(before.double(), grid, align_corners=True, padding_mode="border")
        square = (frame.double() - moved).square().mean(dim=1) / 4  # (B, H, W)
        errors.append(torch.where(inside, square, 0).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)))
    return _first_without(errors, y)


def _change(before: Tensor, frame: Tensor) -> Tensor:
    """Return the mean absolute difference of frames `(B, C, H, W)`, `(B,)`."""
    return (double(frame) - double(before)).abs().mean(dim=(1, 2, 3)) / 2


def _first_without(values: list[Tensor], x: Tensor) -> Tensor:
    """Join the values of all frames but the first, `(B, T)`."""
    nothing = torch.full_like(double(x[:, 0, 0, 0, 0]), torch.nan)
    return torch.stack([nothing, *values], dim=1)
