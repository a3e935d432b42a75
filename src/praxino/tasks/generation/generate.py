"""Draw videos from a denoiser: what sampling and prediction share, from noise to frames."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import torch
from torch import Tensor

from praxino import stream
from praxino.checkpoint import Trained
from praxino.diffusion import rollout as rollouts
from praxino.diffusion.noise import FrameNoise
from praxino.diffusion.solve import Solver
from praxino.errors import ConfigError
from praxino.models.conditioning import Condition
from praxino.models.denoiser import Denoiser
from praxino.models.vae import VideoVAE
from praxino.tasks.common import check_finite
from praxino.tasks.generation.guided import Guidance, Guided
from praxino.tasks.reconstruct import fitting_chunk

log = logging.getLogger(__name__)

Rollout = Literal["full", "autoregressive", "sliding", "pyramid", "cached"]


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
    def most(self) -> int:
        """The number of frames of the training."""
        return frames_of(self.vae, self.trained.shape[1])

    @property
    def conditions(self) -> frozenset[str]:
        """The conditions that are given, beside frames."""
        given = {"label": self.labels, "text": self.text}
        return frozenset(kind for kind, value in given.items() if value is not None)

    def check(self, length: int, given: int = 0, note: str = "") -> None:
        """Raise ConfigError unless clips of so many latent frames can be drawn, `given` of them known."""
        if given and not self.continues:
            raise ConfigError(
                "the model was trained without given frames (model.context.probability=0): it cannot go on"
            )
        if self.rollout == "full":
            self.check_length(length, note)
        else:
            self.check_window(length)
        if self.rollout == "pyramid" and not self.trained.per_frame:
            raise ConfigError("rollout=pyramid needs a model with a noise level per frame (model.loss.per_frame=true)")
        if self.rollout == "cached":
            self.check_cache(length, given)
        self.check_context(length, given)
        self.check_conditions()
        if self.guidance.scale != 1:
            self.check_guidance(given)

    def check_length(self, length: int, note: str) -> None:
        """Raise ConfigError for more frames at once than in training."""
        if length > self.trained.shape[1]:
            ways = ["sliding", "autoregressive", *(["pyramid"] if self.trained.per_frame else [])]
            ways += ["cached"] if self.net.causal else []
            more = f"; for more use rollout={'|'.join(ways)}" if self.continues else ""
            frames = note or frames_of(self.vae, length)
            raise ConfigError(f"frames={frames}: the model was trained on {self.most} at once{more}")

    def check_window(self, length: int) -> None:
        """Raise ConfigError for a window in which the model cannot go on, or that is longer than in training."""
        if self.window > self.trained.shape[1]:
            frames = frames_of(self.vae, self.window)
            raise ConfigError(f"window={frames}: the model was trained on {self.most} at once: use no more")
        if not 1 <= self.overlap < self.window:
            raise ConfigError(
                f"a rollout in windows of {self.window} latent frames cannot keep {self.overlap} of them: "
                "use a larger window, or another overlap"
            )
        if not self.continues and any(self.finished(length, 0)):
            raise ConfigError(
                f"rollout={self.rollout}: the model was trained without given frames (model.context.probability=0), so "
                f"it makes no more than frames={self.most}, with rollout=full"
            )

    def check_cache(self, length: int, given: int) -> None:
        """Raise ConfigError unless a cache can hold what is given and made, whole tokens at a time."""
        if not self.net.causal:
            raise ConfigError("rollout=cached needs a causal model (model.net.attention=causal)")
        if self.solver.context_noise:
            raise ConfigError("rollout=cached keeps finished frames clean: use context_noise=0")
        step, stride, block = self.net.new_cache().step, self.vae.stride[0], self.window - self.overlap
        tokens = f"rollout=cached holds whole tokens of {step} latent frames"
        if block % step:
            fits = [str(stride * k) for k in range(1, self.window) if (self.window - k) % step == 0]
            remedy = f"use overlap={' or '.join(fits)}" if fits else "use a larger window"
            raise ConfigError(f"{tokens}, and window less overlap is {block}: {remedy}")
        for name, before, count in (("context", 0, given), ("frames", given, length - given)):
            if surplus := count % step:
                fits = [str(frames_of(self.vae, before + k)) for k in (count - surplus, count - surplus + step) if k]
                raise ConfigError(f"{tokens}, not {count}: use {name}={' or '.join(fits)}")

    def check_context(self, length: int, given: int) -> None:
        """Warn of given and finished frames unlike those of the training."""
        context = self.trained.conditioning["context"]
        if not context["probability"] or self.rollout == "pyramid":
            return  # any frame may be finished: each has a noise level of its own
        if not given and context["probability"] == 1:
            log.warning("the model always had given frames in training (model.context.probability=1), here it has none")
        counts = {0, *context["frames"]}
        if unlike := sorted(self.finished(length, given) - counts):
            near = (range(length - 1, max(given, length - self.window), -1), range(length + 1, length + self.window))
            fits = [next((n for n in lengths if self.finished(n, given) <= counts), None) for lengths in near]
            better = " or ".join(str(frames_of(self.vae, n)) for n in fits if n is not None)
            log.warning(
                "%s latent frames of a window are given or finished, the model was trained with %s%s",
                " or ".join(map(str, unlike)),
                " or ".join(map(str, context["frames"])),
                f" (frames={better} keeps to that)" if better else "",
            )
        if any(self.finished(length, given)) and self.solver.context_noise > context["noise"]:
            noise = self.solver.context_noise
            log.warning("context_noise=%g: the model was trained with %g at most", noise, context["noise"])

    def finished(self, length: int, given: int) -> set[int]:
        """Return how many frames are given or finished in the windows of a clip."""
        if self.rollout == "full" or length <= given:
            return {given}
        first = self.window if self.rollout == "sliding" else 0
        windows = rollouts.spans(length, given, self.window, first, self.window - self.overlap)
        return {done - start for start, done, _ in windows}

    def check_conditions(self) -> None:
        """Raise ConfigError for a condition that is left out here and never was in training."""
        drop = self.trained.conditioning["drop"]
        if missing := sorted(kind for kind in self.net.kinds - self.conditions if not drop.get(kind)):
            never = " and ".join(f"model.drop.{kind}=0" for kind in missing)
            raise ConfigError(
                f"the model was never without {' and '.join(missing)} in training ({never}): "
                f"give {' and '.join(f'{kind}=...' for kind in missing)}"
            )

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

    Memory does not depend on the length where the VAE streams. `batch` rows are decoded at once. Raises NonFiniteError.
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
            if ready := [y for y in frames if y is not None]:
                y = torch.cat(ready).float()
                check_finite(y)
                yield y.clamp(-1, 1)


def seed_of(seed: int, *names: Any) -> int:
    """Return the seed of one sample, a function of the names alone."""
    return int.from_bytes(blake2b(repr((seed, *names)).encode(), digest_size=6).digest(), "little")
