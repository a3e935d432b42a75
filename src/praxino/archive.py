"""Checkpoint files: whole or not at all, checked byte by byte, and read without running what they hold."""

import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from praxino import shards
from praxino.errors import CheckpointError


def verify(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless the file is whole: torch.load itself ignores the checksums of the zip archive."""
    if Path(path).is_dir():
        if (broken := shards.fault(Path(path))) is not None:
            raise CheckpointError(f"{path}: not a whole checkpoint ({broken}): give another one.")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint ({one_line(error)}): give another one.") from error
    if broken is not None:
        raise CheckpointError(f"{path}: damaged (checksum of {broken}): give another one.")


def read(path: Path) -> Mapping[str, Any]:
    """Return what a checkpoint holds, a file or a directory of shards: tensors and plain data; nothing is executed."""
    verify(path)
    try:
        content = (
            shards.read(path) if path.is_dir() else torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        )
    except Exception as error:  # whatever a crafted file provokes
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors and plain data ({one_line(error)}): "
            "export the weights to safetensors where you trust them."
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a checkpoint: give another file.")
    return content


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, then move it there: a reader sees the old one or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, short."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
