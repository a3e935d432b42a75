"""What a denoiser is told beside the noisy latents, and how it is turned into vectors."""

import math
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = frozenset({"label", "text"})  # what can be dropped and guided
NULL = -1  # the label of a clip that has none


@dataclass(frozen=True)
class Condition:
    """What is known of a batch of clips; None where nothing is.

    known: `(B, T)` bool, the latent frames that are given.
    first: `(B,)` bool, whether frame 0 is the VAE's causal first latent; None: it is where the call's `start` is 0.
    label: `(B,)` long, a class, or -1 for none.
    text, text_mask: `(B, L, E)` float and `(B, L)` bool, embedded words and which of them count; no mask: all do.
    """

    known: Tensor | None = None
    first: Tensor | None = None
    label: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None

    def given(self) -> dict[str, Tensor]:
        """Return the parts that are there, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device | str) -> Self:
        """Move everything to a device."""
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in self.given().items()})

    def drop(self, names: Collection[str], where: Tensor) -> Self:
        """Forget the label, the text or both of the clips in `where` `(B,)` bool: theirs become the null ones."""
        if unknown := set(names) - KINDS:
            raise ValueError(f"{', '.join(sorted(unknown))} cannot be dropped: use {' or '.join(sorted(KINDS))}.")
        changed = {}
        if "label" in names and self.label is not None:
            changed["label"] = self.label.masked_fill(where, NULL)
        if "text" in names and self.text is not None:
            mask = self.text_mask if self.text_mask is not None else self.text.new_ones(self.text.shape[:2]).bool()
            changed["text_mask"] = mask & ~where[:, None]
        return replace(self, **changed)

    def without(self, names: Collection[str]) -> Self:
        """Forget the label, the text or both of all clips."""
        some = next(iter(self.given().values()), torch.empty(0))
        return self.drop(names, torch.ones(len(some), dtype=torch.bool, device=some.device))

    def repeat(self, n: int) -> Self:
        """Repeat every clip n times, its copies one after the other."""
        return replace(self, **{k: v.repeat_interleave(n, dim=0) for k, v in self.given().items()})


class TimeEmbedding(nn.Module):
    """Sines and cosines of a noise level in [0, 1], then two layers: `(..., )` to `(..., D)`."""

    def __init__(self, width: int, frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.fc1, self.fc2 = nn.Linear(2 * frequencies, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        t = t.to(torch.promote_types(t.dtype, torch.float32))  # half precision knows 256 levels only
        steps = torch.arange(self.frequencies, dtype=t.dtype, device=t.device) / self.frequencies
        angles = 1000.0 * t[..., None] * torch.exp(-math.log(10000.0) * steps)
        features = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.fc2(F.silu(self.fc1(features.to(self.fc1.weight.dtype))))


class LabelEmbedding(nn.Embedding):
    """A vector for each class and one, the last, for no class: `(B,)` to `(B, D)`."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(classes + 1, width)

    def forward(self, label: Tensor) -> Tensor:
        return super().forward(torch.where(label == NULL, self.num_embeddings - 1, label))


class TextEmbedding(nn.Module):
    """Project embedded words to the width of the net, behind one learned word that says nothing.

    The null word is always there: a clip whose words are all masked attends to it alone.
    """

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text_width, eps=1e-6)
        self.proj = nn.Linear(text_width, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, batch: int, text: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `(B, 1 + L, D)` and the mask `(B, 1 + L)`."""
        null = self.null.expand(batch, 1, -1)
        if text is None:
            return null, None
        words = self.proj(self.norm(text.to(self.proj.weight.dtype)))
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=True)
        return torch.cat((null.to(words.dtype), words), dim=1), mask
