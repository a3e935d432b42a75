"""Draw videos from a denoiser: what sampling and prediction share, from the checkpoint to the frames."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from praxino import checkpoint, stream
from praxino.checkpoint import Trained
from praxino.diffusion import rollout as rollouts
from praxino.diffusion.guide import guide
from praxino.diffusion.loss import Denoise
from praxino.diffusion.noise import FrameNoise
from praxino.diffusion.path import Path as DiffusionPath
from praxino.diffusion.path import expand
from praxino.diffusion.solve import Sampler, Solver
from praxino.errors import ConfigError, DataError
from praxino.models.conditioning import Condition
from praxino.models.denoiser import Cache, Denoiser
from praxino.models.vae import VideoVAE
from praxino.tasks.reconstruct import fitting_chunk

log = logging.getLogger(__name__)

Rollout = Literal["full", "autoregressive", "sliding", "pyramid", "cached"]
HIDDEN = -1  # the draw of the noise that hides given frames from the unconditional prediction


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: how far, at which times, how much of the spread is put right; see `diffusion.guide`."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0


class Guided:
    """A denoiser with its conditions and its guidance, as the rollouts of `praxino.diffusion` call it.

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
        return guide(predictions[0], without, self.guidance.scale, self.guidance.interval, self.guidance.rescale)

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
            self.predict(cond, cache, start, z, torch.zeros(len(z), device=z.device))

    def forget(self, before: int) -> None:
        """Drop the frames below an index."""
        for number, cache in enumerate(self.caches):
            assert cache is not None
            kept = 0 if cache.end is None else -(-(cache.end - before) // cache.step) * cache.step
            if kept > 0:
                cache.trim(min(kept, cache.frames))
            else:
                self.caches[number] = self.net.new_cache()


@dataclass(frozen=True)
class Generator:
    """A denoiser, its autoencoder, and how it draws. Lengths are in latent frames.

    Args:
        window, overlap: of a rollout: the frames that the network sees at once, and how many of them are finished.
        label, text: conditions: a class for each sample or one for all, words `(L, E)`.
        batch: how many samples go through the network at once.
    """

    net: Denoiser
    trained: Trained
    vae: VideoVAE
    solver: Solver
    guidance: Guidance
    rollout: Rollout
    window: int
    overlap: int
    labels: tuple[int, ...] | None
    text: Tensor | None
    batch: int

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def continues(self) -> bool:
        """Whether the model was trained to go on from finished frames."""
        return self.trained.per_frame or self.trained.conditioning["context"]["probability"] > 0

    @property
    def conditions(self) -> frozenset[str]:
        """The conditions that are given, beside frames."""
        given = {"label": self.labels, "text": self.text}
        return frozenset(kind for kind, value in given.items() if value is not None)

    def check(self, length: int, given: int = 0, note: str = "") -> None:
        """Raise ConfigError unless clips of so many latent frames can be drawn, `given` of them known."""
        trained = frames_of(self.vae, self.trained.shape[1])
        if self.rollout == "full":
            ways = ["sliding", "autoregressive", *(["pyramid"] if self.trained.per_frame else [])]
            ways += ["cached"] if self.net.causal else []
            more = f"; for more use rollout={'|'.join(ways)}" if self.continues else ""
            if length > self.trained.shape[1]:
                raise ConfigError(
                    f"frames={note or frames_of(self.vae, length)}: the model was trained on {trained} at once{more}"
                )
        elif not self.continues and length > self.window:
            raise ConfigError(
                f"rollout={self.rollout}: the model was trained without given frames (model.context.probability=0), so "
                f"it makes no more than frames={trained}"
            )
        elif not 1 <= self.overlap < self.window:
            raise ConfigError(
                f"a rollout in windows of {self.window} latent frames cannot keep {self.overlap} of them: "
                "use a larger window, or another overlap"
            )
        if self.rollout == "pyramid" and not self.trained.per_frame:
            raise ConfigError("rollout=pyramid needs a model with a noise level per frame (model.loss.per_frame=true)")
        if self.rollout == "cached" and not self.net.causal:
            raise ConfigError("rollout=cached needs a causal model (model.net.attention=causal)")
        if self.rollout == "cached" and self.solver.context_noise:
            raise ConfigError("rollout=cached keeps finished frames clean: use context_noise=0")
        if not given and self.trained.conditioning["context"]["probability"] == 1:
            log.warning("the model always had given frames in training (model.context.probability=1), here it has none")
        if self.guidance.scale != 1:
            self.check_guidance(given)

    def check_guidance(self, given: int) -> None:
        """Raise ConfigError where there is nothing for guidance to stress; warn of what was never left out."""
        conditioning = self.trained.conditioning
        never = [kind for kind in sorted(self.conditions) if not conditioning["drop"].get(kind)]
        if never or (not self.conditions and conditioning["context"]["probability"] == 1):
            log.warning(
                "guidance=%g: the model was trained with %s always there, so what it leads away from is not learned",
                self.guidance.scale,
                " and ".join(never) or "given frames",
            )
        if self.conditions or (given and self.rollout != "cached"):
            return
        taken = " or ".join(f"{kind}=..." for kind in sorted(self.net.kinds))
        remedy = f"give {taken}, or leave it out" if taken else "the model takes none: leave it out"
        raise ConfigError(f"guidance={self.guidance.scale:g} needs a condition to stress: {remedy}")

    @torch.no_grad()
    def draw(
        self,
        seeds: Sequence[int],
        numbers: Sequence[int],
        length: int,
        cells: tuple[int, int],
        given: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield normalised latents `(B, C, n, h, w)`, in order.

        Args:
            seeds: one of each sample.
            numbers: of the samples, which choose among the labels.
            given: the first latents of all samples, `(1, C, K, h, w)`: they come first, unchanged.
        """
        rows = [slice(k, k + self.batch) for k in range(0, len(seeds), self.batch)]
        parts = [self.roll(seeds[part], numbers[part], length, cells, given) for part in rows]
        for pieces in zip(*parts, strict=True):
            yield torch.cat(pieces)

    def roll(
        self, seeds: Sequence[int], numbers: Sequence[int], length: int, cells: tuple[int, int], given: Tensor | None
    ) -> Iterator[Tensor]:
        """Yield the latents of samples that go through the network at once."""
        noise = FrameNoise(seeds, (self.net.channels, *cells), self.device)
        given = None if given is None else given.expand(len(numbers), -1, -1, -1, -1)
        away = self.conditions or frozenset({"known"})
        cond, cached = self.condition(numbers), self.rollout == "cached"
        marks = self.trained.conditioning["context"]["probability"] > 0
        model = Guided(self.net, cond, self.guidance, away, self.trained.path, noise, cached, marks)
        window, block = self.window, self.window - self.overlap
        match self.rollout:
            case "full":
                return rollouts.full(model, noise, self.solver, length, given)
            case "autoregressive":
                return rollouts.autoregressive(model, noise, self.solver, length, window, block, given)
            case "sliding":
                return rollouts.sliding(model, noise, self.solver, length, window, self.overlap, given)
            case "pyramid":
                return rollouts.pyramid(model, noise, self.solver, length, window, self.overlap, given)
            case "cached":
                return rollouts.cached(model, noise, self.solver, length, block, given, window)

    def condition(self, numbers: Sequence[int]) -> Condition:
        """Return the condition of samples by their numbers."""
        label = None
        if self.labels is not None:
            label = torch.tensor([self.labels[k % len(self.labels)] for k in numbers], device=self.device)
        text = None if self.text is None else self.text.to(self.device).expand(len(numbers), -1, -1)
        return Condition(label=label, text=text)


def is_denoiser(path: str) -> bool:
    """Tell whether a checkpoint holds a denoiser; anything else is left to `praxino.load`."""
    file = checkpoint.locate(path)
    if file.suffix in (".safetensors", ".json"):
        return False
    header = checkpoint.read(file).get("praxino")
    return isinstance(header, Mapping) and header.get("kind") == "denoiser"


def open_generator(
    ckpt: str,
    vae: str | None,
    weights: Literal["ema", "raw"],
    device: torch.device,
    *,
    sampler: Sampler,
    steps: int,
    shift: float,
    context_noise: float,
    guidance: float,
    guidance_interval: Sequence[float],
    guidance_rescale: float,
    rollout: Rollout,
    window: int | None,
    overlap: int | None,
    label: int | str | Sequence[int | str] | None,
    text: str | None,
    batch: int,
) -> Generator:
    """Load a denoiser and its VAE, and check the settings; `window` and `overlap` are in video frames."""
    net, trained = checkpoint.load_denoiser(ckpt, weights=weights, device=device)
    autoencoder = checkpoint.load_vae_of(trained, device=device, path=vae)
    if not 0 <= guidance < math.inf:
        raise ConfigError(f"guidance={guidance}: use 0 (no condition), 1 (none stressed) or more, e.g. 3")
    if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
        raise ConfigError(f"guidance_interval={list(guidance_interval)}: use two times in [0, 1], e.g. [0, 0.8]")
    if not 0 <= guidance_rescale <= 1:
        raise ConfigError(f"guidance_rescale={guidance_rescale}: use a part of the way, 0 to 1, e.g. 0.7")
    low, high = guidance_interval
    try:
        solver = Solver(trained.path, trained.prediction, sampler, steps, shift, context_noise)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    seen = trained.shape[1] if window is None else latents_of(autoencoder, window, "window")
    return Generator(
        net,
        trained,
        autoencoder,
        solver,
        Guidance(guidance, (low, high), guidance_rescale),
        rollout,
        seen,
        overlap_of(trained, autoencoder, seen, overlap),
        labels_of(net, trained, label),
        text_of(net, text),
        batch,
    )


def overlap_of(trained: Trained, vae: VideoVAE, window: int, overlap: int | None) -> int:
    """Return the overlap of windows in latent frames: by default the longest context that the model was trained on."""
    if overlap is None:
        context = trained.conditioning["context"]
        usable = [k for k in context["frames"] if k < window] if context["probability"] else []
        return max(usable, default=max(1, window // 2))
    if overlap < 1 or overlap % vae.stride[0]:
        raise ConfigError(f"overlap={overlap} does not fit: use a multiple of {vae.stride[0]} frames")
    return overlap // vae.stride[0]


def labels_of(net: Denoiser, trained: Trained, label: int | str | Sequence[int | str] | None) -> tuple[int, ...] | None:
    """Return classes by number or by name, as numbers."""
    if label is None:
        return None
    if net.classes is None:
        raise ConfigError(f"label={label}: the model takes no label: leave it out")
    names, found = trained.classes or [], []
    for item in [label] if isinstance(label, int | str) else label:
        if isinstance(item, str) and item in names:
            item = names.index(item)
        if not isinstance(item, int) or not 0 <= item < net.classes:
            known = f" or a name: {', '.join(names[:20])}" if names else ""
            raise ConfigError(f"label={item} is no class of the model: use 0 to {net.classes - 1}{known}")
        found.append(item)
    if not found:
        raise ConfigError("label=[]: give at least one class")
    return tuple(found)


def text_of(net: Denoiser, path: str | None) -> Tensor | None:
    """Return the embedded words `(L, E)` of a file of praxino-embed-text."""
    if path is None:
        return None
    if net.text_width is None:
        raise ConfigError(f"text={path}: the model takes no text: leave it out")
    try:
        words = load_file(path)["text"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"text={path}: not an embedded text ({checkpoint.one_line(error)})") from error
    if words.ndim != 2 or words.shape[1] != net.text_width:
        raise ConfigError(f"text={path} has shape {tuple(words.shape)}: the model takes (words, {net.text_width})")
    return words


# ------------------------------------------------------------------------------------------------------ frames
def latents_of(vae: VideoVAE, frames: int, name: str) -> int:
    """Return how many latents so many frames have; raises ConfigError unless they fit."""
    if frames < 1 or vae.fitting_frames(frames) != frames:
        first, step = vae.frame_rule
        low = first + max((frames - first) // step, 0) * step
        raise ConfigError(f"{name}={frames} does not fit: use {first} + {step}k frames, e.g. {low} or {low + step}")
    return vae.latent_frames(frames)


def frames_of(vae: VideoVAE, latents: int) -> int:
    """Return how many frames so many latents stand for."""
    first, step = vae.frame_rule
    return first + (latents - 1) * step


@torch.no_grad()
def decode(vae: VideoVAE, pieces: Iterator[Tensor], length: int, batch: int) -> Iterator[Tensor]:
    """Yield frames `(B, 3, t, H, W)` in [-1, 1] from normalised latents that come in order, `length` of them.

    Memory does not depend on the length where the VAE streams. `batch` rows are decoded at once.
    """
    if not vae.streamable:
        pieces = iter([torch.cat(list(pieces), dim=2)])
    decoders: list[stream.Decoder] = []
    done = 0
    for piece in pieces:
        height, width = piece.shape[3] * vae.stride[1], piece.shape[4] * vae.stride[2]
        chunk = max(1, fitting_chunk(height, width * min(batch, len(piece))) // vae.stride[0])
        for part in piece.split(chunk if vae.streamable else length, dim=2):
            done += part.shape[2]
            rows = vae.denormalize(part.float()).split(batch)
            decoders = decoders or [stream.Decoder(vae) for _ in rows]
            frames = [d.push(z, done == length) for d, z in zip(decoders, rows, strict=True)]
            ready = [y.float().clamp(-1, 1) for y in frames if y is not None]
            if ready:
                yield torch.cat(ready)


def seed_of(seed: int, *names: Any) -> int:
    """Return the seed of one sample, a function of the names alone."""
    return int.from_bytes(blake2b(repr((seed, *names)).encode(), digest_size=6).digest(), "little")


def check_written(quality: int, fps: float | None) -> None:
    """Raise ConfigError for a quality or a frame rate at which no video can be written."""
    if not 0 <= quality <= 51 or not (fps is None or 0 < fps < 1e6):
        raise ConfigError(
            f"quality={quality} fps={fps}: use a quality of 0 (best) to 51, and more than 0 frames a second, e.g. 25"
        )


def refuse_foreign(target: Path, record: str, paths: Sequence[Path]) -> None:
    """Raise ConfigError for files that would be overwritten, unless by the task that left `record` beside them."""
    foreign = [] if (target / record).exists() else [path for path in paths if path.exists()]
    if foreign:
        raise ConfigError(f"{str(foreign[0])!a} exists and is not of an earlier run: choose another out")
