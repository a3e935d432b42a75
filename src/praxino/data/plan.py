"""Which clip is read when: the order of a run as a pure function of (seed, epoch, rank, world)."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

Key = tuple[int, int]


@lru_cache(maxsize=4)
def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order `(length,)` in which an epoch visits its clips; the same on every rank and in every worker."""
    return np.random.default_rng([0, seed, epoch]).permutation(length)


class BatchPlan:
    """Deal the clips of an epoch to ranks and batches, disjoint and complete, with the same shapes on every rank.

    A key is `(epoch, index)`. Indices run past `length` where an epoch has to be filled up: index `i` stands for clip
    `i % length`, and `i // length` tells its repetitions apart, so a filler is another random clip of the same video in
    training and is recognised as a duplicate in validation. No key occurs twice in an epoch.

    Args:
        length: number of clips.
        batch: clips per batch and rank.
        shuffle: visit the clips in the order of `permutation`, else in their own.
        full: fill up the last batch; else only so far that all ranks have the same number of clips.
    """

    def __init__(
        self,
        length: int,
        batch: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        full: bool = True,
    ) -> None:
        if length < 1 or batch < 1:
            raise ValueError(f"{length} clips in batches of {batch}: both must be at least 1.")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: use 0 to {world - 1}.")
        self.length, self.batch, self.seed = length, batch, seed
        self.rank, self.world, self.shuffle, self.full = rank, world, shuffle, full
        unit = world * batch if full else world
        self.per_rank = -(-length // unit) * unit // world

    def __len__(self) -> int:
        """Count the batches of an epoch, which are the same for every rank."""
        return -(-self.per_rank // self.batch)

    def keys(self, epoch: int) -> list[Key]:
        """Return the keys of this rank in one epoch."""
        order = permutation(self.length, self.seed, epoch) if self.shuffle else np.arange(self.length)
        places = np.arange(self.rank, self.per_rank * self.world, self.world)
        indices = order[places % self.length] + places // self.length * self.length
        return [(epoch, int(index)) for index in indices]

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[Key]]:
        """Yield the batches of one epoch from batch `start` on."""
        keys = self.keys(epoch)
        for first in range(start * self.batch, len(keys), self.batch):
            yield keys[first : first + self.batch]
