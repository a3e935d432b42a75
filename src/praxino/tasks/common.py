"""What the tasks on videos share: checks of settings and frames, the two scores, and names."""

import logging
import os

from torch import Tensor

from praxino.data.transforms import Resize, Size
from praxino.errors import ConfigError, NonFiniteError
from praxino.metrics.suite import PairSuite
from praxino.models.vae import VideoVAE
from praxino.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, DecodeFailure

log = logging.getLogger(__name__)


def at_least(bound: int, **settings: int | None) -> None:
    """Raise ConfigError for the first setting below the bound."""
    for name, value in settings.items():
        if value is not None and value < bound:
            raise ConfigError(f"{name}={value}: use {bound} or more")


def check_written(quality: int, fps: float | None = None) -> None:
    """Raise ConfigError for a quality or a frame rate at which no video can be written."""
    if not 0 <= quality <= 51:
        raise ConfigError(f"quality={quality}: use 0 (best) to 51, e.g. 18")
    if not (fps is None or 0 < fps < 1e6):
        raise ConfigError(f"fps={fps}: use more than 0 frames a second, e.g. 25")


def make_resize(size: Size) -> Resize:
    """Return the resizing that a size asks for."""
    try:
        return Resize(size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_chunk(net: VideoVAE, chunk: int | None, remedy: str = "") -> None:
    """Refuse chunks for a model that only takes whole videos, rather than not to use them."""
    if chunk is not None and not net.streamable:
        raise ConfigError(f"chunk={chunk}: this model cannot stream: leave chunk out (the whole video at once){remedy}")


def check_finite(y: Tensor) -> None:
    """Raise NonFiniteError for frames that cannot be shown or measured."""
    if not y.isfinite().all():
        raise NonFiniteError("what was decoded is not finite: use precision=32, or other weights")


def pass_over(path: str, error: DecodeFailure | NonFiniteError) -> dict[str, str]:
    """Warn of a video of which nothing is made; return its row of rejected.jsonl."""
    if isinstance(error, DecodeFailure):
        log.warning("%s", error)
        return {"path": path, "reason": error.reason, "detail": error.detail}
    log.warning("%s: not_finite: %s", ascii(path)[1:-1], error)
    return {"path": path, "reason": "not_finite", "detail": str(error)}


def measure(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return psnr and ssim of videos `(B, C, T, H, W)`, `(B,)`; ssim is NaN where its window does not fit."""
    check_finite(y)
    scores = PairSuite(("psnr", "ssim")).score(x, y)
    return {name: scores[name] for name in ("psnr", "ssim")}


def stem(path: str) -> str:
    """Return the path of a video without the suffix of its file; a folder of frames, or `prefix*` in one, has none."""
    name, suffix = os.path.splitext(path)
    file = suffix.lower() in VIDEO_SUFFIXES or (suffix.lower() in IMAGE_SUFFIXES and "*" not in name)
    return name if file else path
