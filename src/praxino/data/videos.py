"""The data set: keys to clips, with a substitute where a file cannot be read."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from praxino.data.clips import ClipSampler
from praxino.data.plan import Key, permutation
from praxino.data.scan import Entry
from praxino.data.transforms import Resize
from praxino.video import DecodeFailure, Video

Sample = dict[str, Any]
LATEST = 512  # videos whose frame index each process keeps


@dataclass(frozen=True)
class Failure:
    """A file that could not be read when its clip was due."""

    path: str
    reason: str
    detail: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


class VideoClips(Dataset):
    """Read clips as uint8 `(T, H, W, 3)`, addressed by `(epoch, index)` or by a plain index.

    Everything random is a function of (seed, epoch, index), so a clip is the same in any worker and on any rank.
    Reading by key never raises: where a file fails, the clip comes from the next video in the order of the epoch, up to
    `tries` times, and the sample lists the failures; a sample without `video` means that all of them failed.

    Args:
        entries: the videos, by path relative to `root`.
        shuffle: the order of an epoch is `plan.permutation`, else the order of `entries`.
        tries: substitutes to try; 0 for evaluation, where each video stands for itself.
        index_dir: folder of the frame indices; None for the user's cache.
    """

    def __init__(
        self,
        root: str | Path,
        entries: Sequence[Entry],
        clips: ClipSampler,
        resize: Resize,
        *,
        seed: int = 0,
        shuffle: bool = False,
        tries: int = 8,
        index_dir: Path | None = None,
    ) -> None:
        self.root, self.entries, self.clips, self.resize = os.fspath(root), entries, clips, resize
        self.seed, self.shuffle, self.tries, self.index_dir = seed, shuffle, tries, index_dir
        self._latest: dict[str, tuple[tuple[int, int], Video]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_latest": {}}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: int | Key) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        failures: list[Failure] = []
        for video in self._candidates(epoch, index % len(self)):
            try:
                return {**self.read(video, epoch, index), "failures": failures}
            except DecodeFailure as failure:
                failures.append(Failure(self.entries[video].path, failure.reason, failure.detail))
            except Exception as error:  # must not leave a worker: it may not even be picklable
                failures.append(Failure(self.entries[video].path, "error", f"{type(error).__name__}: {str(error)!a}"))
        return {"failures": failures}

    def read(self, video: int, epoch: int = 0, index: int | None = None) -> Sample:
        """Read the clip of key `(epoch, index)` from a video; raises DecodeFailure."""
        index = video if index is None else index
        rng = np.random.default_rng([1, self.seed, epoch, index])
        entry = self.entries[video]
        with self._video(entry) as source:
            info = source.info
            times = source.timestamps if self.clips.fps is not None else None
            frames = self.clips.indices(info.frames, rng, times)
            if frames is None:
                raise DecodeFailure(entry.path, "no_frames", f"{info.frames} frames, too short for a clip")
            geometry = None if self.resize.size is None else self.resize(info.height, info.width, rng)
            clip = source.read(frames.tolist(), geometry)
        return {
            "video": clip,
            "path": entry.path,
            "index": video,
            "repeat": index // len(self),
            "epoch": epoch,
            "start": int(frames[0]),
            "fps": self.clips.fps or float(info.fps) / self.clips.step(frames),
        }

    def _video(self, entry: Entry) -> Video:
        """Return a closed video: one of the latest, which has its frame index at hand, if its file is the same."""
        path = os.path.join(self.root, entry.path)
        options: dict[str, Any] = {} if self.index_dir is None else {"index_dir": self.index_dir}
        if entry.info.kind != "file":
            return Video(path, **options)
        try:
            status = os.stat(path)
            stamp = (status.st_size, status.st_mtime_ns)
        except OSError:
            return Video(path, **options)
        known = self._latest.pop(path, None)
        if known is None or known[0] != stamp:
            known = (stamp, Video(path, **options))
        self._latest[path] = known
        if len(self._latest) > LATEST:
            del self._latest[next(iter(self._latest))]
        return known[1]

    def _candidates(self, epoch: int, video: int) -> Iterator[int]:
        """Yield the video itself, then the ones after it in the order of the epoch."""
        yield video
        count = len(self)
        order = permutation(count, self.seed, epoch) if self.shuffle else np.arange(count)
        place = int(np.flatnonzero(order == video)[0])
        for step in range(1, min(self.tries, count - 1) + 1):
            yield int(order[(place + step) % count])


def collate(samples: list[Sample]) -> Sample:
    """Stack clips to uint8 `(B, T, H, W, 3)`; what went wrong is returned as data, for the main process to judge.

    A sample without a clip is left out and counted in `missing`; `error` says why clips cannot be stacked.
    """
    good = [sample for sample in samples if "video" in sample]
    batch: Sample = {
        "failures": [failure for sample in samples for failure in sample["failures"]],
        "missing": len(samples) - len(good),
    }
    if not good:
        return batch
    shapes = {tuple(sample["video"].shape): sample["path"] for sample in good}
    if len(shapes) > 1:
        sizes = ", ".join(f"{shape[1]}x{shape[2]} ({path!a})" for shape, path in list(shapes.items())[:2])
        return batch | {"error": f"clips of different sizes in a batch, {sizes}: use batch=1 or mode=crop"}
    return batch | {
        "video": torch.stack([sample["video"] for sample in good]),
        "path": [sample["path"] for sample in good],
        "index": torch.tensor([sample["index"] for sample in good]),
        "repeat": torch.tensor([sample["repeat"] for sample in good]),
        "epoch": torch.tensor([sample["epoch"] for sample in good]),
        "start": torch.tensor([sample["start"] for sample in good]),
        "fps": torch.tensor([sample["fps"] for sample in good], dtype=torch.float32),
    }
