"""What the page shows: small copies of the worst, the best and some other videos, kept while they are scored."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from praxino.data.scan import Entry
from praxino.data.usable import spread
from praxino.data.videos import VideoClips
from praxino.tasks.common import make_resize
from praxino.tasks.evaluation.report import Clip
from praxino.tasks.evaluation.score import Curves, Reading, Row, Scores
from praxino.tasks.ranks import Ranks
from praxino.video import to_float, to_uint8

SIDE, LONGEST = 256, 64  # pixels of the longer side and frames, from the first on, of a copy
GAIN = 4  # of the difference
ORIGINAL, RECONSTRUCTION, DIFFERENCE = "original", "reconstruction", f"difference x{GAIN}"
Panels = dict[str, Tensor]


class Pictures:
    """Keeps the copies of the `count` worst and best videos and of `count` that are spread over the list; a `Watcher`.

    Which ones is a function of the errors and the list, not of the order or the processes in which they are scored.
    """

    def __init__(self, count: int, total: int) -> None:
        self.count, self.total = count, total
        self.errors: dict[int, float] = {}
        self.kept: dict[int, tuple[float, Panels]] = {}

    def begin(self, places: Sequence[int], fps: Sequence[float]) -> None:
        self.places, self.fps, self.held, self.frames = places, fps, list[list[Tensor]](), 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Copy the next frames while there are not enough."""
        if (room := LONGEST - self.frames) <= 0 or not self.count:
            return
        x, y = x[:, :, :room], y[:, :, :room]
        self.frames += x.shape[2]
        self.held.append([to_uint8(shrink(video)).cpu() for video in (x, y, amplify(x, y))])  # (B, t, H, W, 3)

    def end(self, rows: Sequence[Row]) -> None:
        """Keep the copies of videos that are among the worst or best so far."""
        self.errors |= {place: row["mse"] for place, row in zip(self.places, rows, strict=True)}
        wanted = tagged(self.errors, self.count, self.total)
        self.kept = {place: kept for place, kept in self.kept.items() if place in wanted}
        for index, place in enumerate(self.places):
            if place in wanted:
                videos = [torch.cat([piece[index] for piece in pieces]) for pieces in zip(*self.held, strict=True)]
                self.kept[place] = (
                    self.fps[index],
                    dict(zip((ORIGINAL, RECONSTRUCTION, DIFFERENCE), videos, strict=True)),
                )

    def gather(self, scores: Scores, ranks: Ranks) -> list[Clip]:
        """Return the clips of all processes that are shown, the worst first."""
        tags = tagged({place: row["mse"] for place, row in scores.rows.items()}, self.count, self.total)
        parts = ranks.on_all(lambda: {place: kept for place, kept in self.kept.items() if place in tags})
        kept = {place: both for part in parts for place, both in part.items()}
        return [
            Clip(scores.rows[place]["path"], *kept[place], cut(scores.curves[place]), tag)
            for place, tag in tags.items()
        ]


def tagged(errors: Mapping[int, float], count: int, total: int) -> dict[int, tuple[str, ...]]:
    """Return the places of a list that are shown, and as what."""
    order, places = sorted(errors, key=lambda place: (errors[place], place)), spread(range(total), count)
    tags = {"worst": order[::-1][:count], "best": order[:count], "spread": [k for k in places if k in errors]}
    found: dict[int, tuple[str, ...]] = {}
    for tag, chosen in tags.items():
        for place in chosen:
            found[place] = (*found.get(place, ()), tag)
    return found


def amplify(x: Tensor, y: Tensor) -> Tensor:
    """Return the difference of videos in [-1, 1] as one that can be shown, black where there is none."""
    return ((x - y).abs() * GAIN - 1).clamp(max=1)


def shrink(video: Tensor) -> Tensor:
    """Bring videos `(B, 3, t, H, W)` to at most `SIDE` pixels on the longer side."""
    height, width = video.shape[-2:]
    scale = SIDE / max(height, width)
    if scale >= 1:
        return video
    size = [max(1, round(side * scale)) for side in (height, width)]
    frames = F.interpolate(video.transpose(1, 2).flatten(0, 1).float(), size, mode="bilinear", antialias=True)
    return frames.unflatten(0, (video.shape[0], -1)).transpose(1, 2)


def cut(curves: Curves) -> Curves:
    """Return the curves of the frames that are shown."""
    return {name: values[:LONGEST] for name, values in curves.items()}


def thumbnails(root: str, entries: Sequence[Entry], reading: Reading, count: int, label: str) -> list[Clip]:
    """Read small clips of a few videos of a tree."""
    dataset = VideoClips(root, entries, reading.clips, make_resize(reading.size), seed=reading.seed, tries=0)
    samples = [dataset[place] for place in spread(range(len(entries)), count)]
    return [
        Clip(sample["path"], sample["fps"], {label: small(sample["video"])}, {}, ("sample",))
        for sample in samples
        if "video" in sample
    ]


def small(video: Tensor) -> Tensor:
    """Bring a video, uint8 `(T, H, W, 3)`, to the size of a copy."""
    return to_uint8(shrink(to_float(video[None, :LONGEST])))[0]
