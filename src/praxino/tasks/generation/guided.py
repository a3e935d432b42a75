"""A denoiser with its conditions and its guidance, as the rollouts of `praxino.diffusion` call it."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from praxino.diffusion.guide import guide
from praxino.diffusion.loss import Denoise
from praxino.diffusion.noise import FrameNoise
from praxino.diffusion.path import Path as DiffusionPath
from praxino.diffusion.path import expand
from praxino.models.conditioning import Condition
from praxino.models.denoiser import Cache, Denoiser

HIDDEN = -1  # the draw of the noise that hides given frames from the unconditional prediction


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: how far, at which times, how much of the spread is put right; see `diffusion.guide`."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0


class Guided:
    """What a rollout asks for the prediction of a window, and tells of finished frames.

    Args:
        cond: of the batch.
        away: what guidance leads away from the lack of: `label`, `text`, or `known`, the given frames, which the
            unconditional prediction sees as noisy as the others.
        cached: keep keys and values of finished frames, for a rollout with a cache.
        marks: tell the network which frames are given; one that was never trained with any knows their level alone.
    """

    def __init__(
        self,
        net: Denoiser,
        cond: Condition,
        guidance: Guidance,
        away: frozenset[str],
        path: DiffusionPath,
        noise: FrameNoise,
        cached: bool = False,
        marks: bool = True,
    ) -> None:
        self.net, self.guidance, self.away, self.marks = net, guidance, away, marks
        self.path, self.noise = path, noise
        apart = guidance.scale != 1 and "known" not in away
        self.conditions = [cond, cond.without(away)] if apart else [cond]
        self.caches: list[Cache | None] = [net.new_cache() if cached else None for _ in self.conditions]

    def bind(self, known: Tensor | None, start: int) -> Denoise:
        """Return the denoiser of a window."""
        for cache in self.caches:
            if cache is not None:
                cache.keep = False
        predictions = [
            partial(self.predict, replace(cond, known=known if self.marks else None), cache, start)
            for cond, cache in zip(self.conditions, self.caches, strict=True)
        ]
        if self.guidance.scale == 1 or ("known" in self.away and known is None):
            return predictions[0]
        without = self.blind(known, start) if "known" in self.away and known is not None else predictions[1]
        scale, interval, rescale = self.guidance.scale, self.guidance.interval, self.guidance.rescale
        return guide(predictions[0], without, scale, interval, rescale, known)

    def predict(self, cond: Condition, cache: Cache | None, start: int, z: Tensor, t: Tensor) -> Tensor:
        """Call the network; only frames in a cache give positions in time a meaning."""
        first = torch.full((len(z),), start == 0, device=z.device)
        return self.net(z, t, replace(cond, first=first), cache, 0 if cache is None else start)

    def blind(self, known: Tensor, start: int) -> Denoise:
        """Return the prediction of a window whose given frames are hidden in noise."""
        noise = self.noise(start, start + known.shape[1], HIDDEN)

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            level = torch.where(known, t.masked_fill(known, 0).amax(dim=1, keepdim=True), t)
            hidden = torch.where(expand(known, z), self.path.mix(z, noise, level), z)
            return self.predict(self.conditions[0], None, start, hidden, level)

        return denoise

    def remember(self, z: Tensor, start: int) -> None:
        """Keep what finished frames mean to later ones."""
        for cond, cache in zip(self.conditions, self.caches, strict=True):
            assert cache is not None
            cache.keep = True
            known = torch.ones(len(z), z.shape[2], dtype=torch.bool, device=z.device) if self.marks else None
            self.predict(replace(cond, known=known), cache, start, z, torch.zeros(len(z), device=z.device))

    def forget(self, before: int) -> None:
        """Drop the frames below an index."""
        for number, cache in enumerate(self.caches):
            assert cache is not None
            kept = 0 if cache.end is None else -(-(cache.end - before) // cache.step) * cache.step
            if kept > 0:
                cache.trim(min(kept, cache.frames))
            else:
                self.caches[number] = self.net.new_cache()
