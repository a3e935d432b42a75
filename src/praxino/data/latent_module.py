"""The datamodule of cached latents."""

import logging
import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from praxino.data.base import PlannedData
from praxino.data.clips import ClipSampler, Where
from praxino.data.latents import (
    Draw,
    LatentClip,
    LatentClips,
    Manifest,
    check_sizes,
    collate_latents,
    read_manifest,
    text_file,
    verify,
)
from praxino.data.loader import Context
from praxino.data.usable import split, spread
from praxino.errors import ConfigError, DataError

log = logging.getLogger(__name__)


@dataclass
class Cached:
    """The clips of a cache that a run uses."""

    root: str
    entries: list[LatentClip]
    manifest: Manifest


class LatentData(PlannedData[Cached]):
    """Windows of cached latents: batches with normalised float32 `latent` `(B, C, T, H, W)`.

    A batch also holds `first` `(B,)` bool (latent 0 is the VAE's causal first one), `path` (of the video, relative),
    `index` (of the clip), `start` (first latent), `fps` (of the clip's frames), `repeat` and `epoch` as `VideoData`;
    `label` `(B,)` where the cache has classes; `text` `(B, L, E)` and `text_mask` `(B, L)` with `text`. Window and
    noise of the posterior are functions of (seed, epoch, index).

    Args:
        root: folder that `praxino-encode` wrote; `manifest` tells of it.
        val_root: another one, of the same VAE; None to split `root` by a hash of the paths.
        frames: video frames that a window stands for; None for all latents of each clip.
        posterior: sample the latents anew at each reading, or take their means.
        where: start of the windows, `val_where` that of the validation. Only `start` is sure to be causal first ones.
        short: clips with fewer latents: drop: leave them out; pad: repeat the last latent.
        text: folder of embeddings: for `a/b.mp4` the tensor `text` `(L, E)` in `a/b.mp4.safetensors`.
        verify: compare all shards with their digests before the run.
        The others: see `VideoData`.
    """

    collate = staticmethod(collate_latents)

    def __init__(
        self,
        root: str,
        val_root: str | None = None,
        *,
        frames: int | None = 17,
        posterior: Draw = "sample",
        where: Where = "random",
        val_where: Literal["start", "center"] = "start",
        short: Literal["drop", "pad"] = "drop",
        text: str | None = None,
        verify: bool = False,
        batch: int = 4,
        val_batch: int | None = None,
        workers: int = 2,
        prefetch: int = 2,
        seed: int = 0,
        val_fraction: float = 0.1,
        val_limit: int | None = None,
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
            max_bad=0.0,
            on_change=on_change,
            timeout=timeout,
            context=context,
            rejected=None,
        )
        self.root, self.val_root, self.frames, self.posterior = root, val_root, frames, posterior
        self.where, self.val_where, self.short = where, val_where, short
        self.text = None if text is None else os.path.abspath(os.path.expanduser(text))
        self.verify = verify

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest of `root`: VAE, statistics, classes."""
        return read_manifest(self.root)

    def find(self) -> tuple[Cached, Cached]:
        """Read the manifests and split: the clips of training and of validation."""
        train = self._usable(self.manifest)
        if self.val_root is None:
            ours, theirs = split(train.entries, self.val_fraction)
            train, val = replace(train, entries=ours), replace(train, entries=theirs)
        else:
            manifest = read_manifest(self.val_root)
            manifest.check_vae(self.manifest.fingerprint)
            if manifest.classes != self.manifest.classes:
                raise ConfigError(f"data.val_root: the classes of {manifest.root} are not those of {train.root}")
            if manifest.root == train.root:
                log.warning("data.val_root is data.root: the training clips are validated on")
            val = self._usable(manifest)
        val.entries = spread(val.entries, self.val_limit)
        log.info("%d clips of latents to train on, %d to validate on", len(train.entries), len(val.entries))
        return train, val

    def _usable(self, manifest: Manifest) -> Cached:
        """Check a cache; keep the clips that are long enough. What decides the latents is part of their stamps."""
        verify(manifest) if self.verify else check_sizes(manifest)
        least = 1 if self.frames is None else manifest.latents(self.frames)
        clips = [
            replace(clip, stamp=f"{clip.stamp}:{manifest.key}")
            for clip in manifest.clips
            if clip.shape[1] >= least or self.short == "pad"
        ]
        if not clips:
            raise DataError(
                f"none of {len(manifest.clips)} clips in {manifest.root} has {least} latents: use fewer frames"
            )
        if dropped := len(manifest.clips) - len(clips):
            log.warning("%d of %d clips in %s are too short", dropped, len(manifest.clips), ascii(manifest.root))
        if self.text is not None:
            missing = [clip.path for clip in clips if not os.path.isfile(text_file(self.text, clip.path))]
            if missing:
                raise DataError(
                    f"{len(missing)} of {len(clips)} clips have no text, first {text_file(self.text, missing[0])!a}"
                )
        return Cached(manifest.root, clips, manifest)

    def rates(self, tree: Cached) -> list[float]:
        """Return the frames per second of the clips, as their encoding noted them."""
        return [clip.fps for clip in tree.entries]

    def dataset(self, tree: Cached, training: bool) -> LatentClips:
        """Read windows of clips, all normalised by the statistics of the training cache."""
        windows = None
        if self.frames is not None:
            where = self.where if training else self.val_where
            windows = ClipSampler(tree.manifest.latents(self.frames), short=self.short, where=where)
        return LatentClips(
            tree.manifest,
            tree.entries,
            windows,
            statistics=self.manifest.statistics,
            seed=self.seed,
            posterior=self.posterior if training else "mean",
            text=self.text,
        )
