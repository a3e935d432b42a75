"""Features of sets of videos: collected over processes, and the statistics of real sets, kept from run to run."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from praxino.checkpoint import replace
from praxino.metrics.frechet import Moments, fit

VERSION = 1  # of kept statistics: to be raised whenever the same facts give other features

Features = dict[int, Tensor]  # (n, D) by the place of a video


@dataclass(frozen=True)
class Gaussian:
    """Mean `(D,)` and covariance `(D, D)` of so many features, float64."""

    mean: Tensor
    covariance: Tensor
    count: int

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"mean": self.mean, "covariance": self.covariance, "count": torch.tensor(self.count)}
        replace(path, lambda temporary: save_file(content, temporary))

    @classmethod
    def load(cls, path: Path) -> "Gaussian | None":
        """Read it, if it is there and whole."""
        try:
            with safe_open(path, "pt") as file:
                mean, covariance, count = (file.get_tensor(key) for key in ("mean", "covariance", "count"))
        except (OSError, SafetensorError):
            return None
        return cls(mean, covariance, int(count))


class Collected:
    """The features of a set: one of each clip, by place; or of its frames, which are many, the moments alone."""

    def __init__(self, single: bool) -> None:
        self.places, self.features = set[int](), Features()
        self.moments = Moments() if single else None

    def add(self, places: Sequence[int], features: Tensor) -> None:
        """Take the features `(B, n, D)` of videos."""
        self.places.update(places)
        if self.moments is None:
            self.features |= dict(zip(places, features, strict=True))
        else:
            self.moments.add(features.flatten(0, 1))

    def merge(self, others: "Iterable[Collected]") -> "Collected":
        """Add what other processes collected; return self."""
        for other in others:
            self.places |= other.places
            self.features |= other.features
            if self.moments is not None and other.moments is not None:
                self.moments.merge(other.moments)
        return self

    @property
    def count(self) -> int:
        """How many features there are."""
        return sum(map(len, self.features.values())) if self.moments is None else self.moments.count

    def gaussian(self) -> Gaussian | None:
        """Fit the features; None for fewer than two."""
        if self.count < 2:
            return None
        moments = fit(stack(self.features, sorted(self.features))) if self.moments is None else self.moments.fit()
        return Gaussian(*moments, self.count)


def stack(features: Features, places: Iterable[int]) -> Tensor:
    """Return features `(N, D)` in the order of the places."""
    return torch.cat([features[place] for place in places])


def place_of(folder: Path, facts: Sequence[Mapping[str, Any] | str]) -> Path:
    """Return where the statistics of a real set lie that depend on these facts."""
    key = hashlib.sha256(json.dumps([VERSION, *facts], sort_keys=True).encode()).hexdigest()[:32]
    return folder / "statistics" / f"{key}.safetensors"
