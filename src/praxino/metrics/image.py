"""PSNR and SSIM of videos, frame by frame, as the WF-VAE papers report them."""

import torch
import torch.nn.functional as F
from torch import Tensor

PSNR_CAP = 100.0  # dB of identical frames, where the formula gives infinity
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
BLOCK = 32  # outputs of one product with the banded window matrix


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Return the PSNR of videos `(B, C, T, H, W)` in [-1, 1], `(B,)` in dB, float64: the mean over frames.

    Data range 1 after mapping to [0, 1]; clamped, not rounded. A frame counts 100 dB at most, also an identical one.
    """
    x, y = _unit(x), _unit(y)
    error = (x - y).square().mean(dim=(1, 3, 4))  # (B, T)
    return (-10 * error.log10()).clamp(max=PSNR_CAP).mean(dim=1)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the SSIM of videos `(B, C, T, H, W)` in [-1, 1], `(B,)`, float64: the mean over frames and colours.

    Wang et al. 2004: Gaussian window 11x11, sigma 1.5, inside the frame only, population covariance, data range 1.

    Raises:
        ValueError: frames smaller than the window.
    """
    if min(x.shape[-2:]) < WINDOW:
        raise ValueError(
            f"frames of {x.shape[-2]}x{x.shape[-1]} are smaller than the {WINDOW}x{WINDOW} window of SSIM: "
            "use larger frames."
        )
    batch = x.shape[0]
    frames = max(1, 2**20 // (x.shape[1] * x.shape[-2] * x.shape[-1]))  # at a time: memory stays flat
    pairs = zip(
        x.transpose(1, 2).flatten(0, 1).split(frames), y.transpose(1, 2).flatten(0, 1).split(frames), strict=True
    )
    return torch.cat([_ssim_frames(_unit(a), _unit(b)) for a, b in pairs]).view(batch, -1).mean(dim=1)


def _unit(x: Tensor) -> Tensor:
    """Map [-1, 1] to [0, 1] in float64, which Apple's GPUs do not have."""
    x = x.cpu() if x.device.type == "mps" else x
    return x.double().clamp(-1, 1).add(1).div(2)


def _ssim_frames(x: Tensor, y: Tensor) -> Tensor:
    """Return the SSIM of frames `(N, C, H, W)` in [0, 1], `(N,)`."""
    mx, my, squares, product = _blur(torch.stack([x, y, x * x + y * y, x * y]))
    means = mx * mx + my * my
    luminance = (2 * mx * my + C1) / (means + C1)
    structure = (2 * (product - mx * my) + C2) / (squares - means + C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


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
