"""The work of an encoding, cut into parts that depend on the list of videos alone: each is a shard and a JSON file.

So the bytes of a cache are the same for any number of processes, and however often the encoding was stopped.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from praxino import stream
from praxino.data.latent_file import WIDTH, ShardWriter
from praxino.data.scan import Entry
from praxino.data.transforms import Resize
from praxino.errors import NonFiniteError
from praxino.metrics.latents import LatentStatistics, Spectrum, double
from praxino.models.vae import Posterior, VideoVAE
from praxino.tasks.reconstruct import fitting_chunk
from praxino.video import to_float

log = logging.getLogger(__name__)

PARTS, CLIPS, BYTES = 64, 512, 2**28  # about so many parts, of at most so many clips and bytes, but one clip
Shape = tuple[int, int, int]


def cut(sizes: Sequence[int], clips: int | None = None) -> list[range]:
    """Cut a list into parts: at most `clips` items (None: by the length of the list) and `BYTES` of latents in each."""
    most = clips or max(8, min(CLIPS, -(-len(sizes) // PARTS)))
    parts, begin, total = [], 0, 0
    for place, size in enumerate(sizes):
        if place > begin and (place - begin == most or total + size > BYTES):
            parts.append(range(begin, place))
            begin, total = place, 0
        total += size
    return [*parts, range(begin, len(sizes))] if sizes else []


def batched(places: range, size: int) -> Iterator[range]:
    """Cut the places of a part into batches."""
    for begin in range(0, len(places), size):
        yield places[begin : begin + size]


class Part:
    """What is known of the clips of one part; their latents go to a shard where there is a writer."""

    def __init__(self, model: VideoVAE, writer: ShardWriter | None = None) -> None:
        self.model, self.writer, self.weight = model, writer, next(model.parameters())
        self.first, self.rest = self.empty(), self.empty()
        self.spectrum = Spectrum(model.latent_channels)
        self.clips: list[dict[str, Any]] = []
        self.rejected: list[dict[str, Any]] = []

    def empty(self) -> LatentStatistics:
        return LatentStatistics.empty(self.model.latent_channels)

    @torch.inference_mode()
    def add(self, clips: list[dict[str, Any]], pieces: Iterable[tuple[Tensor, bool]]) -> None:
        """Encode clips given in pieces, uint8 `(B, t, H, W, 3)` that fit, each with whether it is the last.

        All of them count, or none where reading them fails midway. A lone clip is written piece by piece.

        Args:
            clips: what is known of each: the fields of `LatentClip` that do not depend on the encoding.
        """
        begin = self.writer.length if self.writer else 0
        first, rest, held, shape = self.empty(), self.empty(), [], [0, 0, 0, 0]
        frames, spectrum = 0, Spectrum(self.model.latent_channels)
        try:
            for piece, moments in self.encode(clips[0]["path"], pieces):
                frames += piece
                if moments is None:
                    continue
                self.measure(moments, first, rest)
                posterior = Posterior(moments)
                spectrum.update(posterior.mean)
                held.append(torch.cat((posterior.mean, posterior.logvar), dim=1).transpose(1, 2).bfloat16())
                shape = [self.model.latent_channels, shape[1] + moments.shape[2], *moments.shape[3:]]
                if len(clips) == 1:
                    self.write(held.pop())
            if held:
                self.write(torch.cat(held, dim=1))  # (B, T, 2C, H, W)
        except BaseException:
            if self.writer:
                self.writer.cut(begin)
            raise
        self.first.merge(first)
        self.rest.merge(rest)
        self.spectrum.merge(spectrum)
        channels, latents, height, width = shape
        step = 2 * channels * latents * height * width
        for place, clip in enumerate(clips):
            self.clips.append(clip | {"frames": frames, "shape": shape, "offset": begin + place * step})

    def encode(self, name: str, pieces: Iterable[tuple[Tensor, bool]]) -> Iterator[tuple[int, Tensor | None]]:
        """Yield for each piece the number of its frames, and the moments that are ready."""
        encoder = stream.Encoder(self.model)
        for piece, final in pieces:
            posterior = encoder.push(to_float(piece.to(self.weight.device)).to(self.weight.dtype), final)
            if posterior is not None and not posterior.moments.isfinite().all():
                raise NonFiniteError(f"the latents of {name!a} are not finite: use precision=32, or another VAE")
            yield piece.shape[1], None if posterior is None else posterior.moments

    def measure(self, moments: Tensor, first: LatentStatistics, rest: LatentStatistics) -> None:
        """Add the first latent frame of the clips to `first`, all others to `rest`."""
        wide, causal = double(moments), 0 if first.count else 1  # first latent frames in this piece
        for statistics, part in ((first, wide[:, :, :causal]), (rest, wide[:, :, causal:])):
            posterior = Posterior(part)
            statistics.update(posterior.mean, posterior.logvar.exp(), posterior.kl())

    def write(self, values: Tensor) -> None:
        if self.writer:
            self.writer.add(values)

    def figures(self) -> dict[str, Any]:
        """Return all figures of the latents as plain data; lists have an entry per channel."""
        whole = self.empty().merge(self.first).merge(self.rest)
        parts = {"first": self.first, "rest": self.rest}
        return {
            "mean": whole.mean.tolist(),
            "std": whole.std.tolist(),
            "scale": whole.std.reciprocal().tolist(),
            "shift": whole.mean.tolist(),
            "videos": len(self.clips),
            "frames": sum(clip["frames"] for clip in self.clips),
            "latents": whole.count,  # positions in time and space
            "kl": whole.kl.mean.tolist(),  # nats an element
            "active": int(whole.active.sum()),
            "min": whole.means.low.tolist(),  # of the posterior mean
            "max": whole.means.high.tolist(),
            "noise_share": whole.noise_share.tolist(),  # of the posterior in the variance
            **{
                name: {"mean": part.mean.tolist(), "std": part.std.tolist(), "latents": part.count}
                if part.count
                else None
                for name, part in parts.items()  # the causal first latent frame, and all others
            },
            **self.spectrum.figures(),  # of the posterior mean
        }

    def describe(self) -> dict[str, Any]:
        """Return all that is known as plain data, but for the shard."""
        statistics = {"first": self.first.state(), "rest": self.rest.state()}
        return {"clips": self.clips, "rejected": self.rejected, **statistics, "spectrum": self.spectrum.state()}


def merge(model: VideoVAE, parts: Iterable[dict[str, Any] | None]) -> tuple[Part, list[dict[str, Any]]]:
    """Return the parts as one, in their order, and their shards; what is known of a clip names its shard."""
    whole = Part(model)
    shards: list[dict[str, Any]] = []
    for part in parts:
        assert part is not None, "every part is encoded by now"
        whole.first.merge(LatentStatistics.from_state(part["first"]))
        whole.rest.merge(LatentStatistics.from_state(part["rest"]))
        whole.spectrum.merge(Spectrum.from_state(part["spectrum"]))
        whole.clips += [clip | {"shard": len(shards)} for clip in part["clips"]]
        whole.rejected += part["rejected"]
        if part["shard"] is not None:
            shards.append(part["shard"])
    return whole, shards


def fitting(model: VideoVAE, frames: int, height: int, width: int) -> Shape:
    """Return the largest clip in a video that the model takes, 0 where even its least is larger."""
    first, step = model.frame_rule
    fits = first + (frames - first) // step * step if frames >= first else 0
    return fits, height // model.stride[1] * model.stride[1], width // model.stride[2] * model.stride[2]


def push_size(model: VideoVAE, shape: Shape, chunk: int | None) -> int:
    """Return how many frames go through the encoder at once: all, where it cannot stream."""
    frames, height, width = shape
    return (chunk or fitting_chunk(height, width)) if model.streamable else frames


def due_bytes(model: VideoVAE, entry: Entry, frames: int | None, stride: int, resize: Resize) -> int:
    """Return how long the latents of a video will be, by what the scan knows of it."""
    info = entry.info
    t, h, w = fitting(model, frames or -(-info.frames // stride), *resize.target(info.height, info.width))
    positions = (model.latent_frames(t) if t else 0) * (h // model.stride[1]) * (w // model.stride[2])
    return WIDTH * 2 * model.latent_channels * positions
