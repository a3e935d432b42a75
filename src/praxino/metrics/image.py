"""PSNR, SSIM and MS-SSIM of every frame of a video, in float64, as the papers on video autoencoders report them.

torchmetrics is not underneath: its PSNR pools the errors of all frames, and its SSIM counts the border, where the
window reaches into a reflection of the frame. The latter is offered as `window="reflect"`.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from praxino.metrics.latents import double

PSNR_CAP = 100.0  # dB of identical frames, where the formula gives infinity
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of MS-SSIM, finest first
LEAST = {"ssim": WINDOW, "ms_ssim": WINDOW * 2 ** (len(SCALES) - 1)}  # pixels of a frame's shorter side
BLOCK = 32  # outputs of one product with the banded window matrix
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
    pairs = zip(x.unbind(2), y.unbind(2), strict=True)  # a frame at a time: sums do not depend on the others
    return torch.stack([((double(a) - double(b)) / 2).square().mean(dim=(1, 2, 3)) for a, b in pairs], dim=1)


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
    return per_frame(x, y, lambda a, b: _similarity(*(_pad(v, window) for v in (a, b)))[0])


def ms_ssim_frames(x: Tensor, y: Tensor, window: Window = "valid", check: bool = True) -> Tensor:
    """Return the multi-scale SSIM of every frame, `(B, T)`, float64: the mean over colours.

    Wang et al. 2003: five scales, each half of the one before by means of 2x2 pixels; a colour whose structure is
    opposite at a scale counts 0. `window` is that of the coarsest scale, where alone the border may count.

    Raises:
        ValueError: frames smaller than the window at the coarsest scale.
    """
    check_pair(x, y, check)
    check_size(x, "ms_ssim")

    def scales(a: Tensor, b: Tensor) -> Tensor:
        product = a.new_ones(len(a))
        for exponent in SCALES[:-1]:
            product = product * _similarity(a, b)[1].clamp(min=0) ** exponent
            a, b = (F.avg_pool2d(v[:, None], 2)[:, 0] for v in (a, b))
        return product * _similarity(_pad(a, window), _pad(b, window))[0].clamp(min=0) ** SCALES[-1]

    return per_frame(x, y, scales)


def check_size(x: Tensor, metric: str) -> None:
    """Raise ValueError where frames are smaller than the window of a metric."""
    if min(x.shape[-2:]) < LEAST[metric]:
        raise ValueError(
            f"frames of {x.shape[-2]}x{x.shape[-1]} are smaller than the window of {metric}: "
            f"use {LEAST[metric]} pixels or more."
        )


def per_frame(x: Tensor, y: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Score colour planes `(N, H, W)` in float64, values 0 to 2, some at a time; return means over colours `(B, T)`."""
    a, b = (v.transpose(1, 2).flatten(0, 2) for v in (x, y))  # (B T C, H, W)
    size = 1 if a.device.type in ("cpu", "mps") else max(1, 2**22 // (a.shape[-2] * a.shape[-1]))
    scores = [score(double(p) + 1, double(q) + 1) for p, q in zip(a.split(size), b.split(size), strict=True)]
    return torch.cat(scores).view(x.shape[0], x.shape[2], x.shape[1]).mean(dim=2)


def _similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean SSIM and mean structure term of planes `(N, H, W)` with values 0 to 2, each `(N,)`."""
    mx, my, squares, product = _blur(torch.stack([x, y, x * x + y * y, x * y]))
    means = mx * mx + my * my
    structure = (2 * (product - mx * my) + 4 * C2) / (squares - means + 4 * C2)
    luminance = (2 * mx * my + 4 * C1) / (means + 4 * C1)
    return (luminance * structure).mean(dim=(1, 2)), structure.mean(dim=(1, 2))


def _pad(x: Tensor, window: Window) -> Tensor:
    """Mirror planes `(N, H, W)` beyond their border where the window is to be centred there, too."""
    return x if window == "valid" else F.pad(x[:, None], (WINDOW // 2,) * 4, mode="reflect")[:, 0]


def _blur(x: Tensor) -> Tensor:
    """Filter the last two axes with the window, without padding."""
    return _blur_last(_blur_last(x).transpose(-1, -2)).transpose(-1, -2)


def _blur_last(x: Tensor) -> Tensor:
    """Filter the last axis as products with one banded matrix: blocks of outputs, much faster than a convolution."""
    size = x.shape[-1] - WINDOW + 1
    blocks = -(-size // BLOCK)
    x = F.pad(x, (0, blocks * BLOCK - size)).unfold(-1, BLOCK + WINDOW - 1, BLOCK)  # (..., blocks, BLOCK + 10)
    return (x @ _band(x.device)).flatten(-2)[..., :size]


def _band(device: torch.device) -> Tensor:
    """Return the window as a matrix `(BLOCK + 10, BLOCK)`, one shifted window a column."""
    window = torch.exp(
        -torch.linspace(-(WINDOW // 2), WINDOW // 2, WINDOW, dtype=torch.float64).square() / (2 * SIGMA**2)
    )
    band = torch.zeros(BLOCK + WINDOW - 1, BLOCK, dtype=torch.float64)
    for column in range(BLOCK):
        band[column : column + WINDOW, column] = window / window.sum()
    return band.to(device)
