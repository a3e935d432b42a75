"""The datamodule: scan, split, plan and load, and the state that makes a resume exact."""

import logging
import os
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from praxino.data.clips import ClipSampler, Short
from praxino.data.loader import Context, FailureLog, PlannedLoader, ResumableLoader
from praxino.data.marks import compare, marks
from praxino.data.plan import BatchPlan
from praxino.data.scan import fingerprint
from praxino.data.synthetic import make_dataset
from praxino.data.transforms import Mode, Resize
from praxino.data.usable import Usable, find_usable, split, spread, without, write_report
from praxino.data.videos import VideoClips
from praxino.errors import ConfigError, DataError, PraxinoError, StorageError

log = logging.getLogger(__name__)


class VideoData(pl.LightningDataModule):
    """Clips of the videos of a directory tree: batches with uint8 `video` `(B, T, H, W, 3)`.

    The trainer needs `use_distributed_sampler=False`: the plan deals the clips to the ranks. A batch also holds `path`
    (relative), `index` (of the video), `repeat` (above 0 for a clip that fills up a validation batch and must not be
    counted), `epoch`, `start` (first frame) and `fps`.

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
        super().__init__()
        self.prepare_data_per_node = False
        for name, value, least in (
            ("batch", batch, 1),
            ("val_batch", val_batch, 1),
            ("val_limit", val_limit, 1),
            ("prefetch", prefetch, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"data.{name}={value}: use at least {least}.")
        for name, value in (("workers", workers), ("seed", seed)):
            if value < 0:
                raise ConfigError(f"data.{name}={value}: use 0 or more.")
        for name, share in (("val_fraction", val_fraction), ("max_bad", max_bad)):
            if not 0 <= share < 1:
                raise ConfigError(f"data.{name}={share}: use a share from 0 to below 1.")
        try:
            self.clips = ClipSampler(frames, stride, random_stride, fps, short, "random")
            self.val_clips = ClipSampler(frames, stride, random_stride, fps, short, val_where)
            self.resize = Resize(size, mode, flip, random_crop)
            self.val_resize = Resize(size, mode)
        except ValueError as error:
            raise ConfigError(f"data: {error}") from error
        self.root, self.val_root = root, val_root
        self.batch, self.val_batch, self.seed = batch, val_batch or batch, seed
        self.workers, self.prefetch, self.timeout, self.context = workers, prefetch, timeout, context
        self.val_fraction, self.val_limit = val_fraction, val_limit
        self.images, self.follow_links, self.scan_workers = images, follow_links, scan_workers
        self.cache_dir, self.max_bad, self.on_change = cache_dir, max_bad, on_change
        self.rejected = None if rejected is None else Path(rejected)
        self.found: tuple[Usable, Usable] | None = None
        self._error: PraxinoError | None = None
        self._state: dict[str, Any] | None = None
        self._loader: ResumableLoader | None = None
        self._open: list[PlannedLoader] = []

    # What there is

    def prepare_data(self) -> None:
        """Scan on the first rank, while the others wait without a time limit; `setup` tells all of an error."""
        self._attempt()

    def setup(self, stage: str | None = None) -> None:
        """Give every rank the list of the first one; raises DataError on all of them where nothing is usable."""
        if self.found is not None and self.trainer is None:
            return
        if self._rank_and_world()[0] == 0:
            self._attempt()
        outcome = self._error or self.found
        if self.trainer is not None:
            outcome = self.trainer.strategy.broadcast(outcome, src=0)
        if isinstance(outcome, PraxinoError):
            raise outcome
        self.found = outcome

    def _attempt(self) -> None:
        if self.found is None and self._error is None:
            try:
                self.found = self.find()
            except PraxinoError as error:
                self._error = error
            except OSError as error:
                self._error = StorageError(f"cannot write {error.filename}: {error.strerror}")

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

    # What is loaded

    def train_dataloader(self) -> ResumableLoader:
        if self.trainer is not None and self.trainer.world_size > 1 and self._replaces_samplers():
            raise ConfigError("trainer.use_distributed_sampler must be false: the data module deals the clips itself.")
        loader = self._make(ResumableLoader, 0, self.batch)
        if self._state is not None:
            loader.load_state_dict(self._state)
            self._state = None
        self._loader = loader
        return loader

    def val_dataloader(self) -> PlannedLoader | list[PlannedLoader]:
        """Load the same clips every time; ranks get equally many, the last ones perhaps with `repeat` above 0."""
        return self._make(PlannedLoader, 1, self.val_batch) if self._parts()[1].entries else []

    def _make(self, kind: type[Any], part: Literal[0, 1], batch: int) -> Any:
        tree, training = self._parts()[part], part == 0
        clips = VideoClips(
            tree.root,
            tree.entries,
            self.clips if training else self.val_clips,
            self.resize if training else self.val_resize,
            seed=self.seed,
            shuffle=training,
            index_dir=None if self.cache_dir is None else Path(self.cache_dir).expanduser() / "index",
        )
        rank, world = self._rank_and_world()
        plan = BatchPlan(
            len(tree.entries), batch, seed=self.seed, rank=rank, world=world, shuffle=training, full=training
        )
        device = self.trainer.strategy.root_device.type if self.trainer is not None else "cpu"
        name = "quarantine.jsonl" if rank == 0 else f"quarantine.rank{rank}.jsonl"
        quarantine = None if self.rejected is None else self.rejected.with_name(name)
        loader = kind(
            clips,
            plan,
            FailureLog(tree.root, quarantine, self.max_bad),
            workers=self.workers,
            prefetch=self.prefetch,
            pin=device == "cuda",
            timeout=self.timeout,
            context=self.context,
        )
        self._open.append(loader)
        return loader

    def teardown(self, stage: str | None = None) -> None:
        """End the workers."""
        for loader in self._open:
            loader.close()
        self._open = []

    def _parts(self) -> tuple[Usable, Usable]:
        if self.found is None:
            self.setup()
        assert self.found is not None
        return self.found

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _replaces_samplers(self) -> bool:
        assert self.trainer is not None
        return self.trainer._accelerator_connector.use_distributed_sampler

    # What a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        entries = self._parts()[0].entries
        state = self._state or (self._loader.state_dict() if self._loader is not None else None)
        return {"loader": state, "fingerprint": fingerprint(entries), "files": marks(entries), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint was; raises DataError where the order would not be that of its run."""
        entries = self._parts()[0].entries
        changes = []
        if state["fingerprint"] != fingerprint(entries):
            changes.append(f"the training files changed ({compare(state['files'], entries)})")
        if state["seed"] != self.seed:
            changes.append(f"the seed was {state['seed']} and is {self.seed}")
        if changes:
            message = f"{' and '.join(changes)} under {self._parts()[0].root} since the checkpoint was written"
            if self.on_change == "error":
                raise DataError(f"{message}. To go on with another order of clips use data.on_change=warn.")
            log.warning("%s; the order of the clips is another one", message)
        self._state = state["loader"]
        if self._loader is not None and self._state is not None:
            self._loader.load_state_dict(self._state)


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
