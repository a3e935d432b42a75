"""Checkpoints as a directory that all ranks write: tensors in shards, everything else in one file of plain data.

    step-00001000.ckpt/
        meta.pt                          the checkpoint; a sharded tensor is `{"__shard__": name, "shape": [...]}`
        shard-00000-of-00008.safetensors rows of every sharded tensor, one file a rank
        complete.json                    size and CRC of each file; a directory without it does not count

A tensor is cut along its first dimension into equal runs of rows, the last ranks' shorter or empty (`torch.chunk`).
Nothing is pickled but `meta.pt`, which holds plain data only.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

META, COMPLETE, MARK = "meta.pt", "complete.json", "__shard__"


def split(tree: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Return nested data with references in place of its sharded tensors, and this rank's rows of these by name."""
    if isinstance(tree, DTensor):
        if tuple(tree.placements) != (Shard(0),):
            raise ValueError(f"{name} is placed {tree.placements}: only shards along the first dimension are written.")
        return {MARK: name, "shape": list(tree.shape)}, {name: tree.to_local().detach().cpu().contiguous()}
    if isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        parts = {key: split(value, f"{name}/{key}") for key, value in items}
        rows = {key: value for _, found in parts.values() for key, value in found.items()}
        if isinstance(tree, Mapping):
            return {key: part for key, (part, _) in parts.items()}, rows
        return [part for part, _ in parts.values()], rows
    return tree, {}


def write_rows(rows: dict[str, Tensor], directory: Path, rank: int, world: int) -> Path:
    """Write this rank's rows."""
    path = directory / f"shard-{rank:05d}-of-{world:05d}.safetensors"
    save_file(rows, path)
    return path


def finish(directory: Path, world: int) -> None:
    """Declare a directory complete: everything of it is written."""
    files = sorted(path for path in directory.iterdir() if path.name != COMPLETE)
    content = {"world": world, "files": {path.name: [path.stat().st_size, checksum(path)] for path in files}}
    (directory / COMPLETE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def is_sharded(path: Path) -> bool:
    """Tell whether a path is such a directory, complete or not."""
    return (path / META).is_file() or (path / COMPLETE).is_file()


def fault(directory: Path) -> str | None:
    """Return what is wrong with a directory, None where every byte is as it was written."""
    try:
        files = json.loads((directory / COMPLETE).read_text(encoding="utf-8"))["files"]
        for name, (size, crc) in files.items():
            path = directory / Path(name).name
            if path.stat().st_size != size or checksum(path) != crc:
                return f"{path.name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{COMPLETE} is not readable ({error})"
    return None


def read(directory: Path, place: Callable[[list[int], Callable[[int, int], Tensor]], Tensor] | None = None) -> Any:
    """Return the nested data of a directory.

    Args:
        place: makes a tensor of its shape and of a function that reads the rows from `start` to `stop`; None reads all.
    """
    files = [safe_open(path, framework="pt") for path in sorted(directory.glob("shard-*-of-*.safetensors"))]

    def tensor(name: str, shape: list[int]) -> Tensor:
        each = -(-shape[0] // len(files))

        def rows(start: int, stop: int) -> Tensor:
            parts = []
            for number, file in enumerate(files):
                low, high = max(start, number * each), min(stop, (number + 1) * each, shape[0])
                if low < high:
                    parts.append(file.get_slice(name)[low - number * each : high - number * each])
            return torch.cat(parts) if parts else files[0].get_slice(name)[0:0]

        return rows(0, shape[0]) if place is None else place(shape, rows)

    def fill(tree: Any) -> Any:
        if isinstance(tree, Mapping):
            return tensor(tree[MARK], tree["shape"]) if MARK in tree else {k: fill(v) for k, v in tree.items()}
        return [fill(value) for value in tree] if isinstance(tree, list | tuple) else tree

    return fill(torch.load(directory / META, map_location="cpu", weights_only=True))
