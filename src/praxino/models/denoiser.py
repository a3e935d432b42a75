"""What every network that removes noise from latents has in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from praxino.errors import ConfigError
from praxino.models.conditioning import NULL, Condition, LabelEmbedding, TimeEmbedding
from praxino.models.header import header


class LayerCache:
    """Keys and values of the frames that one attention layer has seen, `(B, heads, frames * size, d)`."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.keep = True

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the held frames followed by the new ones, which are held, too, if `keep` is set."""
        if self.k is not None and self.v is not None:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        if self.keep:
            self.k, self.v = k, v
        return k, v


class Cache:
    """What a causal net remembers of the frames before: the layers' keys and values, and which frames they are.

    With `keep` (the default) a call's frames are held for the next; set it to False for the steps of a solver, and
    to True for a last call on the finished frames.
    """

    def __init__(self, layers: int, step: int = 1) -> None:
        self.layers = [LayerCache() for _ in range(layers)]
        self.step = step  # latent frames a token: only whole tokens are held
        self.keep = True
        self.frames = 0  # how many latent frames are held
        self.end: int | None = None  # the position of the frame after them

    def open(self, start: int, frames: int) -> None:
        """Begin a call with so many frames from position `start` on."""
        self.check(frames)
        if self.end is not None and start != self.end:
            raise ValueError(f"start={start} does not follow the cached frames: use {self.end}, or a new cache.")
        for layer in self.layers:
            layer.keep = self.keep

    def close(self, start: int, frames: int) -> None:
        """End a call."""
        if self.keep:
            self.frames, self.end = self.frames + frames, start + frames

    def trim(self, frames: int) -> None:
        """Forget all but the newest frames, so that the memory of a long rollout stays flat."""
        self.check(frames)
        for layer in self.layers:
            if layer.k is not None and layer.v is not None and frames < self.frames:
                kept = layer.k.shape[2] * frames // self.frames
                layer.k, layer.v = layer.k[:, :, -kept:].clone(), layer.v[:, :, -kept:].clone()
        self.frames = min(self.frames, frames)

    def check(self, frames: int) -> None:
        """Raise ValueError unless so many frames can be held."""
        if frames < 1 or frames % self.step:
            raise ValueError(f"{frames} frames cannot be cached: use a positive multiple of {self.step}.")


class Denoiser(nn.Module, ABC):
    """A network that predicts from noisy latents `(B, C, T, H, W)` of any size what the diffusion asks for.

    `config` is the constructor's arguments as plain data.
    """

    channels: int
    classes: int | None = None
    text_width: int | None = None
    time: TimeEmbedding
    label: LabelEmbedding | None
    causal = False  # no frame sees a later one, so that frames can be cached

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(
        self, z: Tensor, t: Tensor, cond: Condition | None = None, cache: Cache | None = None, start: int = 0
    ) -> Tensor:
        """Predict, in the shape of `z`.

        Args:
            z: noisy latents; at the frames in `cond.known` the given ones.
            t: noise level in [0, 1], of the clip `(B,)` or of each frame `(B, T)`.
            cond: what is known of the clips.
            cache: of a causal net (`new_cache`): the frames before, which the new ones follow.
            start: position in time of the first frame.
        """

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The parts whose activations are recomputed, that are compiled and sharded one by one."""

    @abstractmethod
    def initialize(self) -> None:
        """Draw new weights; the net then predicts zero."""

    @property
    def kinds(self) -> frozenset[str]:
        """The conditions that it takes and that guidance can use."""
        taken = {"label": self.classes, "text": self.text_width}
        return frozenset(kind for kind, size in taken.items() if size is not None)

    def new_cache(self) -> Cache:
        """Return an empty memory of frames."""
        raise ConfigError(f"this {type(self).__name__} is not causal: only attention: causal can cache frames.")

    def check(self, z: Tensor, t: Tensor, cond: Condition, cache: Cache | None) -> None:
        """Raise ValueError unless these fit the net and one another."""
        if z.ndim != 5 or z.shape[1] != self.channels or 0 in z.shape:
            raise ValueError(f"latents of shape {tuple(z.shape)} do not fit: use (B, {self.channels}, T, H, W).")
        batch, frames = z.shape[0], z.shape[2]
        if t.shape not in ((batch,), (batch, frames)):
            raise ValueError(f"noise levels of shape {tuple(t.shape)} do not fit: use ({batch},) or {(batch, frames)}.")
        words = -1 if cond.text is None else cond.text.shape[1]
        shapes = {"known": (batch, frames), "first": (batch,), "label": (batch,), "text_mask": (batch, words)}
        for kind in ("label", "text"):
            if getattr(cond, kind) is not None and kind not in self.kinds:
                size = "classes" if kind == "label" else "text_width"
                remedy = f", or build it with {size}" if size in self.config else ""
                raise ValueError(f"this {type(self).__name__} takes no {kind}: leave it out{remedy}.")
        for name, value in cond.given().items():
            shape = shapes.get(name, (batch, words, self.text_width))
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)} does not fit: use {shape}.")
        if cache is not None and not self.causal:
            self.new_cache()

    def mark(self, z: Tensor, cond: Condition, start: int) -> Tensor:
        """Append a channel that marks the given frames, and one for the causal first latent: `(B, C + 2, T, H, W)`."""
        first = z.new_full((len(z),), float(start == 0)) if cond.first is None else cond.first.to(z.dtype)
        known = z.new_zeros(z.shape[0], z.shape[2]) if cond.known is None else cond.known.to(z.dtype)
        marks = torch.stack((known, F.pad(first[:, None], (0, z.shape[2] - 1))), dim=1)  # (B, 2, T)
        return torch.cat((z, marks[..., None, None].expand(-1, -1, -1, *z.shape[3:])), dim=1)

    def vector(self, t: Tensor, label: Tensor | None, step: int = 1) -> Tensor:
        """Embed noise levels and label: `(B, 1, D)`, or `(B, T / step, D)` where each frame has its own level."""
        c = self.time(t if t.ndim > 1 else t[:, None])
        if t.ndim > 1 and step > 1:
            padding = c[:, -1:].expand(-1, -c.shape[1] % step, -1)
            c = torch.cat((c, padding), dim=1).unflatten(1, (-1, step)).mean(dim=2)
        if self.label is not None:
            label = torch.full((len(t),), NULL, device=t.device) if label is None else label
            c = c + self.label(label)[:, None]
        return c

    def flops(self, shape: Sequence[int]) -> int:
        """Count the operations of a forward pass on latents of this shape: two a multiplication in matrices."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            type(self)(**self.config)(torch.zeros(*shape), torch.zeros(shape[0]))
        return counter.get_total_flops()


def describe(net: Denoiser) -> dict[str, Any]:
    """Return the "praxino" block of a checkpoint of this network, all but what the run adds."""
    return header("denoiser", net, dict(net.config))
