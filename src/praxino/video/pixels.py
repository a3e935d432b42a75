"""From decoded pictures to uint8 RGB tensors: colours, rotation, pixel aspect, crop and resize."""

import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from torch import Tensor

from praxino.video.types import Geometry


@dataclass(frozen=True)
class Turn:
    """One of the eight ways to lay down a picture: transpose first, then mirror."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def of(cls, frame: VideoFrame) -> "Turn":
        """Read the display matrix, mirrors included, to the nearest quarter turn.

        PyAV cannot list the side data of frames that carry EXIF: for them, `frame.rotation` gives the turn of the
        orientation, and mirrored EXIF orientations, which it does not know, come out wrong.
        """
        try:
            side = frame.side_data.get("DISPLAYMATRIX")
        except ValueError:
            quarter = round(frame.rotation / 90) % 4  # counter-clockwise
            return cls(quarter % 2 == 1, quarter in (2, 3), quarter in (1, 2))
        if side is None:
            return cls()
        a, b, _, c, d = struct.unpack(
            "=5i", bytes(cast(SideData, side))[:20]
        )  # shown (x, y) = stored (a x + c y, b x + d y)
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, a < 0, d < 0)
        return cls(True, c < 0, b < 0)

    def apply(self, picture: Tensor) -> Tensor:
        """Turn `(H, W, 3)`."""
        if self.transpose:
            picture = picture.transpose(0, 1)
        axes = [axis for axis, flip in ((0, self.flip_y), (1, self.flip_x)) if flip]
        return picture.flip(axes) if axes else picture

    def undo(self, box: tuple[int, int, int, int], height: int, width: int) -> tuple[int, int, int, int]:
        """Return where a box of the shown picture (`height` x `width`) lies before turning."""
        top, left, h, w = box
        top = height - top - h if self.flip_y else top
        left = width - left - w if self.flip_x else left
        return (left, top, w, h) if self.transpose else (top, left, h, w)


@dataclass(frozen=True)
class Layout:
    """How the stored picture becomes the shown one: square pixels first (the width gives way), then the turn."""

    height: int  # stored
    width: int
    square_width: int  # stored width in square pixels
    turn: Turn

    @classmethod
    def of(cls, frame: VideoFrame, aspect: Fraction | None, max_pixels: int) -> "Layout":
        """Read the layout off a frame; a pixel aspect that makes the picture empty or too large is ignored."""
        height, width = frame.height, frame.width
        square = round(width * aspect) if aspect and aspect > 0 else width
        if square < 1 or square * height > max_pixels:
            square = width
        return cls(height, width, square, Turn.of(frame))

    @property
    def shown(self) -> tuple[int, int]:
        """Height and width as shown."""
        return (self.square_width, self.height) if self.turn.transpose else (self.height, self.square_width)

    def box(self, crop: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Return the stored pixels that cover a box of shown pixels."""
        top, left, h, w = self.turn.undo(crop, *self.shown)
        if self.square_width != self.width:
            scale = Fraction(self.width, self.square_width)
            right = min(self.width, -(-(left + w) * scale // 1))
            left = int(left * scale)
            w = max(1, int(right) - left)
        return top, left, h, w


class Converter:
    """Turn decoded frames of one video into RGB.

    Colours follow libswscale: the matrix and range that the stream states, BT.601 where it states none, limited range
    unless it says full; more than 8 bits are rounded to 8, gray is copied to the three channels, alpha is dropped.
    A frame of another size than the first is scaled to the first one's (streams may change size on the way).
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._reformatter = VideoReformatter()

    def rgb(self, frame: VideoFrame) -> Tensor:
        """Return the stored picture as a view `(H, W, 3)`."""
        rgb = self._reformatter.reformat(frame, self.layout.width, self.layout.height, "rgb24", threads=1)
        plane = rgb.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: rgb.height, : rgb.width * 3]
        return torch.from_numpy(rows).unflatten(1, (rgb.width, 3))

    def __call__(self, frame: VideoFrame, geometry: Geometry | None) -> Tensor:
        """Return the shown picture `(H, W, 3)`, cut out and resized as `geometry` says."""
        layout = self.layout
        height, width = layout.shown if geometry is None else (geometry.height, geometry.width)
        crop = (0, 0, *layout.shown) if geometry is None else geometry.crop
        top, left, h, w = layout.box(crop)
        picture = self.rgb(frame)[top : top + h, left : left + w]
        target = (width, height) if layout.turn.transpose else (height, width)
        if picture.shape[:2] != target:
            batch = picture.permute(2, 0, 1).unsqueeze(0)
            picture = F.interpolate(batch, target, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
        picture = layout.turn.apply(picture)
        return picture.flip(1) if geometry is not None and geometry.flip else picture
