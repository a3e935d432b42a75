"""Shards: safetensors files of one flat bf16 tensor, written whole or not at all, and kept open by readers."""

import hashlib
import json
import os
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from praxino.errors import DataError

TENSOR = "moments"
HEADER = 256  # bytes before the values: length and JSON, padded with blanks as the format allows
WIDTH = 2  # bytes of a value
OPEN = 4096  # shards that a reader keeps mapped


class ShardWriter:
    """Write a shard of a length that is not known before; a context that ends without `close` leaves nothing.

    Args:
        path: of the finished shard.
        temporary: of the file until then, on the same file system.
    """

    def __init__(self, path: Path, temporary: Path) -> None:
        self.path, self.temporary, self.length = path, temporary, 0
        self._file = temporary.open("wb+")
        self._file.write(bytes(HEADER))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            self._file.close()
            self.temporary.unlink()

    def add(self, values: Tensor) -> None:
        """Append a bf16 tensor."""
        self._file.write(values.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self.length += values.numel()

    def cut(self, length: int) -> None:
        """Take back all values after the first `length`."""
        self._file.flush()
        self._file.truncate(HEADER + WIDTH * length)
        self._file.seek(0, os.SEEK_END)
        self.length = length

    def close(self) -> str:
        """Finish the shard, put it in its place, and return the SHA-256 of the file."""
        entry = {"dtype": "BF16", "shape": [self.length], "data_offsets": [0, WIDTH * self.length]}
        self._file.seek(0)
        self._file.write((HEADER - 8).to_bytes(8, "little"))
        self._file.write(json.dumps({TENSOR: entry}).encode().ljust(HEADER - 8))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest = sha256(self.temporary)
        move(self.temporary, self.path)
        return digest


class Shards:
    """The shards of a folder, mapped into memory at first use: reading touches the bytes that are asked for.

    A mapping holds no file handle and survives a fork; another process that is not forked opens the shards again.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.fspath(root)
        self._open: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"root": self.root, "_open": {}}

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Return the values `begin` to `end` of a shard, a view of the file; raises DataError."""
        values = self._open.get(name)
        if values is None:
            values = self._map(name)
        if end > len(values):
            raise DataError(f"{os.path.join(self.root, name)} has {len(values)} values, {end} are due: encode again")
        return values[begin:end]

    def _map(self, name: str) -> Tensor:
        path = os.path.join(self.root, name)
        try:
            with safe_open(path, framework="pt") as file:
                values = file.get_tensor(TENSOR)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read as a shard of latents ({error}): encode again") from error
        if len(self._open) >= OPEN:
            del self._open[next(iter(self._open))]
        self._open[name] = values
        return values


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, content: bytes, temporary: Path | None = None) -> None:
    """Write a file whole or not at all, even where the machine stops."""
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    move(temporary, path)


def move(source: Path, target: Path) -> None:
    """Rename a file, and see to it that the new name lasts."""
    os.replace(source, target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
