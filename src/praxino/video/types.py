"""What the video reader and writer speak: descriptions, requests, failures, and the conversions from and to float."""

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal, Self

import torch
from torch import Tensor

from praxino.errors import DataError

VIDEO_SUFFIXES: frozenset[str] = frozenset(
    {".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mj2", ".mkv", ".webm", ".avi", ".divx", ".gif", ".mpg", ".mpeg"}
    | {".mpe", ".m1v", ".m2v", ".vob", ".ts", ".m2ts", ".mts", ".m2t", ".flv", ".f4v", ".wmv", ".asf", ".ogv", ".ogg"}
    | {".ivf", ".mxf", ".dv", ".nut", ".y4m", ".h264", ".264", ".hevc", ".h265", ".265"}
)
IMAGE_SUFFIXES: frozenset[str] = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
MAX_PIXELS = 33_177_600  # 8K UHD, 7680 x 4320

Reason = Literal[
    "missing",  # no such file or folder
    "not_a_file",  # a pipe, a device, a socket, or a folder without pictures
    "permission",
    "empty",  # a file of zero bytes
    "container",  # not a video file, or of a kind that is not allowed (playlists, picture files named as videos)
    "no_video",  # sound only, or sound with a cover picture
    "codec",  # no decoder for it
    "too_large",  # more pixels than `max_pixels`
    "no_frames",  # opens, but no frame can be decoded
    "corrupt",  # damaged where it was read
    "mixed_sizes",  # pictures of different size in one sequence
    "several_sequences",  # a folder that holds more than one sequence: name one of them
    "short",  # fewer frames than are needed
    "timeout",
]


def _ascii(text: str) -> str:
    return " ".join(text.encode("ascii", "backslashreplace").decode().split())


class DecodeFailure(DataError):
    """A video that cannot be read: the only exception that reading raises, one line long and picklable."""

    def __init__(self, path: str, reason: Reason, detail: str) -> None:
        super().__init__(path, reason, detail)
        self.path = path
        self.reason: Reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{_ascii(self.path)}: {self.reason}: {_ascii(self.detail)}"


@dataclass(frozen=True)
class VideoInfo:
    """Describe a video as it is shown: after rotation, mirroring and pixel aspect."""

    path: str
    kind: Literal["file", "folder", "image"]
    frames: int  # that can really be read, never the count of a header
    height: int
    width: int
    fps: Fraction  # average rate; 25 for pictures
    codec: str
    pix_fmt: str  # as stored
    duration: float  # seconds, last frame included
    damage: str = ""  # why the frames end before the file does

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict that `json` can write."""
        return asdict(self) | {"fps": str(self.fps)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Rebuild from the dict of `to_json`."""
        return cls(**(data | {"fps": Fraction(data["fps"])}))


@dataclass(frozen=True)
class Geometry:
    """Cut out a box, then resize it, then mirror it.

    Resizing is antialiased bilinear in 8-bit RGB (`torch.nn.functional.interpolate`).
    """

    height: int
    width: int
    crop: tuple[int, int, int, int]  # top, left, height, width in shown pixels
    flip: bool = False

    def check(self, height: int, width: int) -> None:
        """Raise ValueError unless the box lies inside a picture of `height` x `width`."""
        top, left, h, w = self.crop
        if top < 0 or left < 0 or h < 1 or w < 1 or top + h > height or left + w > width:
            raise ValueError(f"crop {self.crop} is not inside {height}x{width}: use (top, left, height, width)")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"size {self.height}x{self.width} is empty: use at least 1x1")


def to_float(video: Tensor) -> Tensor:
    """Convert uint8 `(..., T, H, W, C)` to float32 `(..., C, T, H, W)` in [-1, 1]."""
    return video.movedim(-1, -4).contiguous().to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(video: Tensor) -> Tensor:
    """Convert float `(..., C, T, H, W)` in [-1, 1] to uint8 `(..., T, H, W, C)`, rounding and clamping."""
    scaled = video.detach().float().add(1.0).mul_(127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8).movedim(-4, -1).contiguous()
