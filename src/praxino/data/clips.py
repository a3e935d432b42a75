"""Which frames make a clip: count, stride or frame rate, start, and what to do with short videos."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

Short = Literal["drop", "pad", "slow"]
Where = Literal["random", "start", "center"]


@dataclass(frozen=True)
class ClipSampler:
    """Choose the frames of a clip; the start is uniform over all that fit, the last one included.

    Args:
        frames: frames of a clip.
        stride: distance of two frames in the video, which multiplies the speed seen.
        random_stride: draw the stride from 1 to `stride` for each clip, among those that fit.
        fps: frames per second of the clip instead of a stride: frame `i` is the one nearest to `start + i / fps` by the
            timestamps, so videos of a variable rate are right too. Slow videos repeat frames.
        short: videos shorter than a clip. drop: leave them out; pad: repeat the last frame; slow: spread the clip over
            the whole video, with a smaller stride and repeated frames where needed.
        where: start of the clip.
    """

    frames: int = 17
    stride: int = 1
    random_stride: bool = False
    fps: float | None = None
    short: Short = "drop"
    where: Where = "random"

    def __post_init__(self) -> None:
        if self.frames < 1 or self.stride < 1:
            raise ValueError(f"{self.frames} frames at stride {self.stride}: both must be at least 1.")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"{self.fps} frames per second: use a positive number, or null for a stride.")
        if self.fps is not None and (self.stride > 1 or self.random_stride):
            raise ValueError(f"fps {self.fps} and stride {self.stride} exclude each other: leave one of them out.")

    def fits(self, length: int, fps: Fraction | float) -> bool:
        """Tell whether a video of `length` frames at `fps` holds a clip."""
        if self.fps is not None:
            return self.frames == 1 or (self.frames - 1) / self.fps < length / float(fps)
        return length >= 1 + (self.frames - 1) * (1 if self.random_stride else self.stride)

    def rate(self, fps: Fraction | float) -> float:
        """Return the frames per second of clips of a video at `fps` that is not too short, on average."""
        return self.fps or float(fps) / ((1 + self.stride) / 2 if self.random_stride else self.stride)

    def step(self, frames: np.ndarray) -> float:
        """Return the distance of two frames of a clip in the video; repeats of the last one do not count."""
        steps = np.diff(frames)
        if not steps.any():  # one frame, once or repeated
            return 1.0
        return float(steps.max() if self.short == "pad" else steps.mean())

    def indices(self, length: int, rng: np.random.Generator, times: np.ndarray | None = None) -> np.ndarray | None:
        """Return the frame numbers `(frames,)` of a clip, or None where it does not fit and the policy is drop.

        Args:
            length: frames of the video.
            rng: source of the start and the stride; not drawn from unless `where` is random.
            times: seconds of each frame `(length,)`, needed with `fps`.
        """
        if self.fps is not None:
            if times is None:
                raise ValueError("A clip at a given fps needs the timestamps of the video.")
            return self._by_time(np.maximum.accumulate(times), rng)
        stride = self.stride
        if self.random_stride and self.frames > 1:
            most = min(stride, (length - 1) // (self.frames - 1))
            stride = int(rng.integers(1, most + 1)) if self.where == "random" and most > 1 else max(most, 1)
        room = length - 1 - (self.frames - 1) * stride
        if room < 0:
            return self._short(length, stride)
        return self._start(room, rng) + stride * np.arange(self.frames)

    def _start(self, room: int, rng: np.random.Generator) -> int:
        if self.where == "random":
            return int(rng.integers(0, room + 1))
        return room // 2 if self.where == "center" else 0

    def _short(self, length: int, stride: int) -> np.ndarray | None:
        if self.short == "drop":
            return None
        if self.short == "pad":
            return np.minimum(stride * np.arange(self.frames), length - 1)
        return np.rint(np.linspace(0, length - 1, self.frames)).astype(int)

    def _by_time(self, times: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        """Draw a clip by timestamps; the last frame counts as shown for the mean duration of a frame."""
        assert self.fps is not None
        if self.frames == 1:
            return np.array([self._start(len(times) - 1, rng)])
        lasting = (times[-1] - times[0]) / max(len(times) - 1, 1)
        room = times[-1] - times[0] - (self.frames - 1) / self.fps
        if room + lasting <= 1e-9:
            if self.short == "drop":
                return None
            if self.short == "slow":
                return nearest(times, np.linspace(times[0], times[-1], self.frames))
        room = max(room, 0.0)
        start = rng.uniform(0.0, room) if self.where == "random" else room / 2 if self.where == "center" else 0.0
        return nearest(times, times[0] + start + np.arange(self.frames) / self.fps)


def nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the number of the frame nearest to each wanted time, the earlier one of two equally near (to 1 µs)."""
    after = np.searchsorted(times, wanted).clip(1, max(len(times) - 1, 1))
    if len(times) == 1:
        return np.zeros(len(wanted), dtype=int)
    return np.where(wanted - times[after - 1] <= times[after] - wanted + 1e-6, after - 1, after)
