"""PSNR, SSIM and MS-SSIM of every frame of a video, in float64, as the papers on video autoencoders report them.

torchmetrics is not underneath: its PSNR pools the errors of all frames, and its SSIM counts the border, where the
window reaches into a reflection of the frame. The latter is offered as `window="reflect"`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from praxino.metrics.latents import double
from praxino.metrics.similarity import WINDOW, similarity

PSNR_CAP = 100.0  # dB of identical frames, where the formula gives infinity
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of MS-SSIM, finest first
LEAST = {"ssim": WINDOW, "ms_ssim": WINDOW * 2 ** (len(SCALES) - 1)}  # pixels of a frame's shorter side
TOLERANCE = 1e-6  # how far rounding may carry a value beyond the range

Window = Literal["valid", "reflect"]


def check_range(x: Tensor, name: str = "video") -> None:
    """Raise ValueError unless every value lies in [-1, 1], but for rounding."""
    low, high = torch.stack(torch.aminmax(x.detach())).tolist() if x.numel() else (0.0, 0.0)
    if not (low >= -1 - TOLERANCE and high <= 1 + TOLERANCE):  # of NaN neither holds
        raise ValueError(f"{name} holds values from {low:.6g} to {high:.6g}: use [-1, 1], and clamp a reconstruction.")


def check_pair(x: Tensor, y: Tensor, values: bool = True) -> None:
    """Raise ValueError unless these are two videos `(B, C, T, H, W)` of one shape, with `values` in [-1, 1]."""
    if x.shape != y.shape or x.ndim != 5:
        raise ValueError(f"videos of {tuple(x.shape)} and {tuple(y.shape)} do not fit: use (B, C, T, H, W) twice.")
    if values:
        check_range(x, "the first video")
        check_range(y, "the second video")


def psnr(x: Tensor, y: Tensor, check: bool = True) -> Tensor:
    """Return the mean over frames of `psnr_frames`, `(B,)`."""
    return psnr_frames(x, y, check).mean(dim=1)


def ssim(x: Tensor, y: Tensor, window: Window = "valid", check: bool = True) -> Tensor:
    """Return the mean over frames of `ssim_frames`, `(B,)`."""
    return ssim_frames(x, y, window, check).mean(dim=1)


def psnr_frames(x: Tensor, y: Tensor, check: bool = True) -> Tensor:
    """Return the PSNR of every frame of videos `(B, C, T, H, W)` in [-1, 1], `(B, T)` in dB, float64.

    Data range 1 after mapping to [0, 1]; not rounded. A frame counts 100 dB at most, also an identical one.

    Args:
        check: of the range of the values; it makes the host wait for a GPU.
    """
    return to_decibel(mse_frames(x, y, check))


def to_decibel(mse: Tensor) -> Tensor:
    """Return the PSNR of mean squared errors of values in [0, 1]."""
    return (-10 * mse.log10()).clamp(max=PSNR_CAP)


def mse_frames(x: Tensor, y: Tensor, check: bool = True) -> Tensor:
    """Return the mean squared error of every frame, of values mapped to [0, 1], `(B, T)`, float64."""
    check_pair(x, y, check)
    columns = []
    for a, b in zip(x.unbind(2), y.unbind(2), strict=True):  # a frame at a time: its sum does not depend on the others
        error = (double(a) - double(b)).flatten(1)  # (B, C H W)
        columns.append(torch.linalg.vector_norm(error, dim=1).square() / (4 * error.shape[1]))
    return torch.stack(columns, dim=1)


def ssim_frames(x: Tensor, y: Tensor, window: Window = "valid", check: bool = True) -> Tensor:
    """Return the SSIM of every frame of videos `(B, C, T, H, W)` in [-1, 1], `(B, T)`, float64: the mean over colours.

    Wang et al. 2004: Gaussian window 11x11, sigma 1.5, population covariance, data range 1.

    Args:
        window: valid: inside the frame only; reflect: also round its border, beyond which the frame is mirrored.
        check: of the range of the values; it makes the host wait for a GPU.

    Raises:
        ValueError: frames smaller than the window.
    """
    check_pair(x, y, check)
    check_size(x, "ssim")
    a, b = (_padded(v.flatten(0, 2), window) for v in (x, y))  # (B C T, H, W)
    return similarity(a, b).view(x.shape[:3]).mean(dim=1)


def ms_ssim_frames(x: Tensor, y: Tensor, window: Window = "valid", check: bool = True) -> Tensor:
    """Return the multi-scale SSIM of every frame, `(B, T)`, float64: the mean over colours.

    Wang et al. 2003: five scales, each half of the one before by means of 2x2 pixels; a colour whose structure is
    opposite at a scale counts 0. `window` is that of the coarsest scale, where alone the border may count.

    Raises:
        ValueError: frames smaller than the window at the coarsest scale.
    """
    check_pair(x, y, check)
    check_size(x, "ms_ssim")
    a, b = (double(v).flatten(0, 2) for v in (x, y))  # (B C T, H, W)
    product = a.new_ones(len(a))
    for exponent in SCALES[:-1]:
        product *= similarity(a, b, luminance=False).clamp(min=0) ** exponent
        a, b = (F.avg_pool2d(v[:, None], 2)[:, 0] for v in (a, b))
    product *= similarity(_padded(a, window), _padded(b, window)).clamp(min=0) ** SCALES[-1]
    return product.view(x.shape[:3]).mean(dim=1)


def _padded(x: Tensor, window: Window) -> Tensor:
    """Mirror planes `(N, H, W)` beyond their border where the window is to be centred there, too."""
    return x if window == "valid" else F.pad(x[:, None], (WINDOW // 2,) * 4, mode="reflect")[:, 0]


def check_size(x: Tensor, metric: str) -> None:
    """Raise ValueError where frames are smaller than the window of a metric."""
    if min(x.shape[-2:]) < LEAST[metric]:
        raise ValueError(
            f"frames of {x.shape[-2]}x{x.shape[-1]} are smaller than the window of {metric}: "
            f"use {LEAST[metric]} pixels or more."
        )
