"""The datamodules of videos: scan, split, read; those of files and of moving shapes."""

import logging
import os
from pathlib import Path
from typing import Literal

from praxino.data.base import PlannedData
from praxino.data.clips import ClipSampler, Short
from praxino.data.loader import Context
from praxino.data.synthetic import make_dataset
from praxino.data.transforms import Mode, Resize
from praxino.data.usable import Usable, find_usable, split, spread, without, write_report
from praxino.data.videos import VideoClips, collate
from praxino.errors import ConfigError

log = logging.getLogger(__name__)


class VideoData(PlannedData[Usable]):
    """Clips of the videos of a directory tree: batches with uint8 `video` `(B, T, H, W, 3)`.

    A batch also holds `path` (relative), `index` (of the video), `repeat` (above 0 for a clip that fills up a
    validation batch and must not be counted), `epoch`, `start` (first frame) and `fps`.

    Args:
        root: directory of the training videos.
        val_root: directory of the validation videos; None to split `root` by a hash of the paths.
        frames, stride, random_stride, fps, short: see `ClipSampler`.
        size, mode, flip, random_crop: see `Resize`; the validation is neither mirrored nor cropped at random.
        batch: clips per step and rank. `val_batch`: None for the same.
        workers: decoding processes for each of training and validation; 0 to decode in the main process.
        prefetch: batches that each worker prepares ahead.
        val_fraction: share of the videos for validation where there is no `val_root`; 0 for none.
        val_limit: number of validation videos, evenly spread over the sorted paths; None for all.
        val_where: start of the validation clips.
        images, follow_links: see `scan`. `scan_workers`: its processes, None for one per core.
        cache_dir: folder of the manifests and frame indices; None for the user's cache.
        rejected: file that lists what cannot be used; `quarantine.jsonl` beside it lists what fails while training.
        max_bad: share of clips that may fail in training before the run ends with a DataError.
        on_change: what to do on resume when the training files are not those of the checkpoint.
        timeout: seconds to wait for a batch, and to probe a file.
        context: how workers start; None for fork on Linux, spawn elsewhere.
    """

    collate = staticmethod(collate)

    def __init__(
        self,
        root: str,
        val_root: str | None = None,
        *,
        frames: int = 17,
        size: int | list[int] | None = 64,
        stride: int = 1,
        random_stride: bool = False,
        fps: float | None = None,
        short: Short = "drop",
        mode: Mode = "crop",
        flip: float = 0.0,
        random_crop: bool = False,
        batch: int = 4,
        val_batch: int | None = None,
        workers: int = 2,
        prefetch: int = 2,
        seed: int = 0,
        val_fraction: float = 0.1,
        val_limit: int | None = None,
        val_where: Literal["start", "center"] = "center",
        images: bool = False,
        follow_links: bool = False,
        scan_workers: int | None = None,
        cache_dir: str | None = None,
        rejected: str | None = None,
        max_bad: float = 0.05,
        on_change: Literal["error", "warn"] = "error",
        timeout: float = 300.0,
        context: Context | None = None,
    ) -> None:
        super().__init__(
            batch=batch,
            val_batch=val_batch,
            workers=workers,
            prefetch=prefetch,
            seed=seed,
            val_fraction=val_fraction,
            val_limit=val_limit,
            max_bad=max_bad,
            on_change=on_change,
            timeout=timeout,
            context=context,
            rejected=rejected,
        )
        try:
            self.clips = ClipSampler(frames, stride, random_stride, fps, short, "random")
            self.val_clips = ClipSampler(frames, stride, random_stride, fps, short, val_where)
            self.resize = Resize(size, mode, flip, random_crop)
            self.val_resize = Resize(size, mode)
        except ValueError as error:
            raise ConfigError(f"data: {error}") from error
        self.root, self.val_root = root, val_root
        self.images, self.follow_links, self.scan_workers = images, follow_links, scan_workers
        self.cache_dir = cache_dir

    def find(self) -> tuple[Usable, Usable]:
        """Scan and split: the videos of training and of validation."""
        root, val_root = (
            None if path is None else os.path.abspath(os.path.expanduser(path)) for path in (self.root, self.val_root)
        )
        assert root is not None
        train = self._usable("root", root, self.clips)
        if val_root is None or os.path.realpath(val_root) == os.path.realpath(root):
            if val_root is None:
                ours, theirs = split(train.entries, self.val_fraction)
            else:
                log.warning("data.val_root is data.root: the training videos are validated on")
                ours = theirs = train.entries
            trees = [train]
            val = Usable(train.root, theirs, [], [])
            train = Usable(train.root, ours, train.rejected, train.short)
        else:
            val = self._usable("val_root", val_root, self.val_clips)
            train = without(train, val_root)
            trees = [train, val]
        if self.rejected is not None:
            write_report(self.rejected, trees)
        val.entries = spread(val.entries, self.val_limit)
        log.info("%d videos to train on, %d to validate on", len(train.entries), len(val.entries))
        return train, val

    def _usable(self, name: str, root: str, clips: ClipSampler) -> Usable:
        if not os.path.isdir(root):
            fault = "is not a directory" if os.path.exists(root) else "does not exist"
            raise ConfigError(f"data.{name}: {root} {fault}")
        return find_usable(
            root,
            clips,
            images=self.images,
            follow_links=self.follow_links,
            workers=self.scan_workers,
            cache_dir=self.cache_dir,
        )

    def rates(self, tree: Usable) -> list[float]:
        """Return the frames per second of the clips, by those of the videos."""
        return [self.clips.rate(entry.info.fps) for entry in tree.entries]

    def dataset(self, tree: Usable, training: bool) -> VideoClips:
        """Read clips of videos; the validation is neither random nor shuffled."""
        return VideoClips(
            tree.root,
            tree.entries,
            self.clips if training else self.val_clips,
            self.resize if training else self.val_resize,
            seed=self.seed,
            shuffle=training,
            index_dir=None if self.cache_dir is None else Path(self.cache_dir).expanduser() / "index",
        )


class SyntheticData(VideoData):
    """Moving shapes, written once as video files under `root` in a folder named after their parameters.

    Args:
        videos, val_videos, texture, quality: see `praxino.data.synthetic.make_dataset`.
        length: frames of a file; None for twice a clip less one, so that clips start at different frames.
        data_seed: seed of the files; `seed` is that of the order.
        The others: see `VideoData`.
    """

    def __init__(
        self,
        root: str,
        *,
        videos: int = 256,
        val_videos: int = 32,
        length: int | None = None,
        texture: float = 0.15,
        quality: int = 0,
        data_seed: int = 0,
        frames: int = 17,
        size: int | list[int] = 32,
        stride: int = 1,
        random_stride: bool = False,
        flip: float = 0.0,
        batch: int = 4,
        val_batch: int | None = None,
        workers: int = 2,
        prefetch: int = 2,
        seed: int = 0,
        val_limit: int | None = None,
        val_where: Literal["start", "center"] = "center",
        cache_dir: str | None = None,
        rejected: str | None = None,
        max_bad: float = 0.05,
        on_change: Literal["error", "warn"] = "error",
        timeout: float = 300.0,
        context: Context | None = None,
    ) -> None:
        self.length = length or max(2 * ((frames - 1) * stride + 1) - 1, 1)
        sides = f"{size}x{size}" if isinstance(size, int) else "x".join(map(str, size))
        key = f"{self.length}x{sides}-{videos}-{val_videos}-t{texture:g}-q{quality}-s{data_seed}"
        self.folder = Path(root) / key
        super().__init__(
            str(self.folder / "train"),
            str(self.folder / "val") if val_videos else None,
            frames=frames,
            size=size,
            stride=stride,
            random_stride=random_stride,
            flip=flip,
            batch=batch,
            val_batch=val_batch,
            workers=workers,
            prefetch=prefetch,
            seed=seed,
            val_fraction=0.0,
            val_limit=val_limit,
            val_where=val_where,
            cache_dir=cache_dir,
            rejected=rejected,
            max_bad=max_bad,
            on_change=on_change,
            timeout=timeout,
            context=context,
        )
        self.videos, self.val_videos, self.video_size = videos, val_videos, size
        self.texture, self.quality, self.data_seed = texture, quality, data_seed

    def find(self) -> tuple[Usable, Usable]:
        """Write the files if they are not there, then scan."""
        make_dataset(
            self.folder,
            videos=self.videos,
            val_videos=self.val_videos,
            frames=self.length,
            size=self.video_size,
            seed=self.data_seed,
            texture=self.texture,
            quality=self.quality,
        )
        return super().find()
