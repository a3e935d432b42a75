"""Where a clip is cut out of the picture and to which size it is scaled."""

from typing import Literal

import numpy as np

from praxino.video import Geometry

Mode = Literal["crop", "keep"]
Size = int | list[int] | tuple[int, int] | None


class Resize:
    """Choose the cut and the scale of a clip; one `Geometry` for all of its frames.

    Args:
        size: an int, `[height, width]`, or None for the pictures as they are.
        mode: crop: fill `size` (an int is a square) and cut off what stands over, the aspect kept; keep: bring the
            short side to `size` and the long side to the multiple of 8 below, with less than 8 pixels cut off, so the
            sizes of the clips follow their videos.
        flip: probability of a left-right mirror.
        random_crop: place the cut at random, else in the centre.
    """

    def __init__(self, size: Size = 64, mode: Mode = "crop", flip: float = 0.0, random_crop: bool = False) -> None:
        if mode == "keep" and size is not None and not isinstance(size, int):
            raise ValueError(f"size {list(size)} and mode keep: give the short side as one number, or mode crop.")
        sides = [] if size is None else [size] if isinstance(size, int) else list(size)
        if len(sides) > 2 or any(side < 1 for side in sides) or (isinstance(size, list | tuple) and len(sides) != 2):
            raise ValueError(f"size {size}: use a positive number, [height, width], or null.")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip {flip}: use a probability, 0 to 1.")
        self.size, self.mode, self.flip, self.random_crop = size, mode, flip, random_crop

    def __call__(self, height: int, width: int, rng: np.random.Generator | None = None) -> Geometry:
        """Return the geometry for a video of `height` x `width` as shown; without `rng`, centred and not mirrored."""
        out_height, out_width = self.target(height, width)
        scale = max(out_height / height, out_width / width)
        cut_height = min(height, max(1, round(out_height / scale)))
        cut_width = min(width, max(1, round(out_width / scale)))
        top, left = (height - cut_height) // 2, (width - cut_width) // 2
        if self.random_crop and rng is not None:
            top = int(rng.integers(0, height - cut_height + 1))
            left = int(rng.integers(0, width - cut_width + 1))
        flip = bool(rng is not None and self.flip > 0 and rng.random() < self.flip)
        return Geometry(out_height, out_width, (top, left, cut_height, cut_width), flip)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of a clip of a video."""
        if self.size is None:
            return height, width
        if isinstance(self.size, list | tuple):
            return self.size[0], self.size[1]
        if self.mode == "crop":
            return self.size, self.size
        scale = self.size / min(height, width)
        long = max(int(max(height, width) * scale + 1e-6) // 8 * 8, self.size)
        return (self.size, long) if height <= width else (long, self.size)
