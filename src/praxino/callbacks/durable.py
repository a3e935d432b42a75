"""Files of checkpoints, written whole or not at all."""

import errno
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO

from praxino import shards

PATTERN = "step-*.ckpt"
TEMPORARY = ".tmp-"
OLD = f"{TEMPORARY}old-"


class DurableIO(TorchCheckpointIO):
    """Write a checkpoint whole or not at all: temporary file beside the target, fsync, verify, rename, fsync.

    A failure of the disk is kept in `failure` and not raised: on one rank alone that would leave the others waiting.
    """

    failure: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write and set `failure`; the file that had the name before stays if this one cannot be written."""
        self.failure = None
        target = Path(path)
        temporary = target.with_name(f"{TEMPORARY}{target.name}.{os.getpid()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_space(target.parent)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if not is_whole(temporary):
                raise OSError(errno.EIO, "the file read back is not the file written", str(temporary))
            move(temporary, target)
        except OSError as error:
            self.failure = error
        except RuntimeError as error:  # torch's writer, when the disk under it fails
            if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
                raise
            self.failure = OSError(errno.EIO, str(error).splitlines()[0], str(target))
        finally:
            temporary.unlink(missing_ok=True)

    def save_shards(self, checkpoint: dict[str, Any], path: Any) -> None:
        """Write a checkpoint with shards as a directory, from all ranks together; the first one moves it in place."""
        self.failure = None
        target, rank, world = Path(path), dist.get_rank(), dist.get_world_size()
        temporary = target.with_name(f"{TEMPORARY}{target.name}")
        plain, rows = shards.split(checkpoint)
        steps = (
            lambda: _make_empty(temporary) if rank == 0 else None,
            lambda: _sync_file(shards.write_rows(rows, temporary, rank, world)),
            lambda: _finish(temporary, target, plain, world) if rank == 0 else None,
        )
        for step in steps:
            try:
                step()
            except OSError as error:
                self.failure = error
            except RuntimeError as error:  # the writers of torch and safetensors, when the disk under them fails
                self.failure = OSError(errno.EIO, str(error).splitlines()[0], str(target))
            failures: list[Any] = [None] * world
            dist.all_gather_object(failures, None if self.failure is None else str(self.failure))
            if reasons := [reason for reason in failures if reason is not None]:
                self.failure = self.failure or OSError(errno.EIO, reasons[0], str(target))
                break
        if rank == 0:
            remove(temporary)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = True, place: Any = None
    ) -> dict[str, Any]:
        """Read a file, or a directory of shards (see `shards.read`), tensors on the CPU; nothing in it is executed."""
        if Path(path).is_dir():
            return shards.read(Path(path), place)
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def is_whole(path: Path) -> bool:
    """Tell whether every byte of a checkpoint is as it was written (`torch.load` does not look)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, RuntimeError):
        return False


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    _sync_file(temporary)
    os.replace(temporary, path)


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint, a file or a directory; None where it cannot be read."""
    try:
        content = torch.load(path / shards.META if path.is_dir() else path, mmap=True, weights_only=True)
        return int(content["praxino"]["step"])
    except Exception:  # whatever a damaged file provokes
        return None


def clean(directory: Path) -> None:
    """Take away what a killed process was writing, and put back what it was about to replace."""
    for old in directory.glob(f"{OLD}*"):
        target = directory / old.name.removeprefix(OLD)
        if not target.exists():
            os.replace(old, target)
    for stale in directory.glob(f"{TEMPORARY}*"):
        remove(stale)


def link(source: Path, target: Path) -> None:
    """Give a checkpoint, a file or a directory, a second name beside its own; raises OSError.

    Files of checkpoints are never changed, so both names may be of the same bytes on the disk.
    """
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    remove(temporary)
    try:
        if source.is_dir():
            shutil.copytree(source, temporary, copy_function=_link)
            _sync_directory(temporary)
        else:
            _link(source, temporary)
        move(temporary, target)
    finally:
        remove(temporary)


def move(temporary: Path, target: Path) -> None:
    """Move a checkpoint to its place; a directory that is there, or goes there, takes two moves (see `clean`)."""
    if target.is_dir() or (temporary.is_dir() and target.exists()):
        old = target.with_name(f"{OLD}{target.name}")
        remove(old)
        os.replace(target, old)
        os.replace(temporary, target)
        remove(old)
    else:
        os.replace(temporary, target)
    _sync_directory(target.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint, a file or a directory, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _link(source: Any, target: Any) -> None:
    """Link a file, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        _check_space(Path(source).parent)
        shutil.copyfile(source, target)
        _sync_file(Path(target))


def _check_space(directory: Path) -> None:
    """Raise OSError before a write that would fill the disk, judged by the newest checkpoint."""
    newest = max(directory.glob(PATTERN), default=None)
    if newest is None:
        return
    size = sum(path.stat().st_size for path in ([newest] if newest.is_file() else newest.iterdir()))
    if shutil.disk_usage(directory).free < 1.2 * size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def _make_empty(directory: Path) -> None:
    remove(directory)
    directory.mkdir(parents=True)
    _check_space(directory.parent)


def _finish(temporary: Path, target: Path, plain: Any, world: int) -> None:
    """Complete a directory of shards and move it to its place; what was there goes first."""
    torch.save(plain, temporary / shards.META)
    _sync_file(temporary / shards.META)
    shards.finish(temporary, world)
    _sync_file(temporary / shards.COMPLETE)
    _sync_directory(temporary)
    if (fault := shards.fault(temporary)) is not None:
        raise OSError(errno.EIO, fault, str(temporary))
    move(temporary, target)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
