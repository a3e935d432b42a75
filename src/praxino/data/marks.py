"""Short marks of the files of a run, so that a checkpoint can tell how many of them changed."""

import hashlib
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

LISTED = 200_000  # files; each takes 16 bytes in the checkpoint


class Listed(Protocol):
    """A file of a list: its path, and a stamp that changes with its content."""

    @property
    def path(self) -> str: ...

    @property
    def stamp(self) -> str: ...


def marks(entries: Sequence[Listed]) -> Tensor | None:
    """Return short hashes of path and stamp of each file, int64 `(N, 2)`; None for more files than `LISTED`."""
    if len(entries) > LISTED:
        return None
    digests = [
        hashlib.sha256(os.fsencode(text)).digest()[:8] for entry in entries for text in (entry.path, entry.stamp)
    ]
    return torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.int64).reshape(-1, 2).copy())


def compare(before: Tensor | None, entries: Sequence[Listed]) -> str:
    """Count the files that came, went and changed since `before` was taken by `marks`."""
    now = marks(entries)
    if before is None or now is None:
        return f"{len(entries)} now"
    old, new = dict(before.tolist()), dict(now.tolist())
    changed = sum(1 for path in old.keys() & new.keys() if old[path] != new[path])
    return f"+{len(new.keys() - old.keys())} / -{len(old.keys() - new.keys())} / ~{changed} of {len(old)}"
