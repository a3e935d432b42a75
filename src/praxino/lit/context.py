"""Which frames of a training clip are given, and which labels and texts are kept from the network."""

from collections.abc import Sequence

import torch
from torch import Tensor

from praxino.errors import ConfigError
from praxino.models.conditioning import Condition


class Context:
    """Give the first latent frames of some clips: what continuing a video, or one picture, is learned from.

    Args:
        probability: of a clip to have frames given.
        frames: how many of them, drawn from a list, or from a range such as "1-4"; 1 is image to video.
        noise: largest noise level of given frames, drawn for each clip; 0 gives them clean.
    """

    def __init__(self, probability: float = 0.5, frames: Sequence[int] | str = (2,), noise: float = 0.0) -> None:
        self.probability, self.noise = probability, noise
        self.frames = _range(frames) if isinstance(frames, str) else sorted(set(frames))
        if not 0 <= probability <= 1 or not 0 <= noise < 1:
            raise ConfigError(f"context probability={probability} and noise={noise} must lie in [0, 1], noise below 1")
        if not self.frames or self.frames[0] < 1:
            raise ConfigError(f"context frames={frames}: give numbers of latent frames of 1 or more")

    def check(self, length: int) -> None:
        """Raise ConfigError unless every context leaves something to learn in clips of so many latent frames."""
        if self.probability and self.frames[-1] >= length:
            raise ConfigError(
                f"context frames={self.frames} leave nothing to predict in clips of {length} latent frames: "
                "use fewer, or longer clips (frames=N)"
            )

    def draw(self, batch: int, length: int) -> Tensor | None:
        """Return which frames are given, `(batch, length)` bool, of torch's generator; None where none ever are."""
        if not self.probability:
            return None
        self.check(length)
        choice = torch.tensor(self.frames)[torch.randint(len(self.frames), (batch,))]
        return self.first(torch.where(torch.rand(batch) < self.probability, choice, 0), length)

    def of(self, index: int, length: int) -> Tensor:
        """Return the context by which a validation sample is judged, `(1, length)` bool."""
        return self.first(torch.tensor([self.frames[index % len(self.frames)]]), length)

    @staticmethod
    def first(count: Tensor, length: int) -> Tensor:
        """Return the mask `(B, length)` of the first `count` `(B,)` frames."""
        return torch.arange(length) < count[:, None]


def forget(cond: Condition, drop: dict[str, float]) -> Condition:
    """Drop each kind of condition of random clips, with its probability, of torch's generator."""
    for kind, probability in sorted(drop.items()):
        value = getattr(cond, kind)
        if value is not None and probability:
            cond = cond.drop({kind}, (torch.rand(len(value)) < probability).to(value.device))
    return cond


def _range(text: str) -> list[int]:
    low, dash, high = text.partition("-")
    try:
        return list(range(int(low), int(high if dash else low) + 1))
    except ValueError:
        raise ConfigError(f"context frames={text!r}: give a list, or a range such as 1-4") from None
