"""The folder of a latent cache while it is written: what is done, and whether it may go on."""

import fcntl
import json
import logging
import shutil
from pathlib import Path
from typing import IO, Any, Self

from praxino.data.latent_file import ShardWriter, write_durably
from praxino.data.latents import MANIFEST, WORK, has_size, is_sound, read_manifest
from praxino.errors import BusyError, ConfigError, DataError
from praxino.tasks.encoding.parts import Part

log = logging.getLogger(__name__)


class Workplace:
    """A cache, and the folder in it of what is not finished.

    Args:
        out: the cache.
        latents: write shards; else statistics alone.
    """

    def __init__(self, out: Path, latents: bool) -> None:
        self.out, self.latents = out, latents
        self.folder, self.manifest = out / WORK, out / MANIFEST
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def claim(self) -> None:
        """Keep other processes from working here until the context ends; raises BusyError.

        The lock is not one that workers inherit: they may outlive this process by seconds when it is killed.
        """
        self.folder.mkdir(exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise BusyError(f"out={self.out} is being written by another run: wait, or choose another") from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): make sure that one run writes it", self.out, error.strerror)
        for stale in self.folder.glob("*.tmp"):  # of a run that was killed
            stale.unlink()

    def remove(self) -> None:
        """Remove what only an unfinished encoding needs, where it was claimed."""
        if self._lock is not None:
            shutil.rmtree(self.folder)

    def writer(self, number: int) -> ShardWriter | None:
        """Begin the shard of a part."""
        name = f"shard-{number:05d}.safetensors"
        return ShardWriter(self.out / name, self.folder / f"{name}.tmp") if self.latents else None

    def store(self, number: int, part: Part) -> None:
        """Finish the shard, then write what is known of the part: with that it is done. One without clips has none."""
        shard = None
        if part.writer and part.clips:
            digest, path = part.writer.close(), part.writer.path
            shard = {"name": path.name, "bytes": path.stat().st_size, "sha256": digest, "clips": len(part.clips)}
        content = json.dumps({**part.describe(), "shard": shard}).encode()
        write_durably(self._path(number), content)

    def load(self, number: int) -> dict[str, Any] | None:
        """Return what is known of a part that is done, None where it is not."""
        try:
            part = json.loads(self._path(number).read_bytes())
        except FileNotFoundError:
            return None
        return part if part["shard"] is None or has_size(self.out, part["shard"]) else None

    def holds_clips(self, parts: int) -> bool:
        """Tell whether a clip was encoded in any of so many parts."""
        return any((part := self.load(number)) and part["clips"] for number in range(parts))

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.json"


def begin(work: Workplace, identity: dict[str, Any], known: list[list[Any]], parts: int, verify: bool) -> list[int]:
    """Claim the folder and return the parts that are to be encoded; none where the cache is whole.

    Raises:
        ConfigError: it holds the latents of another VAE, protocol or list of videos.
        BusyError: another process is writing it.
    """
    if work.manifest.exists():
        manifest = read_manifest(work.out)
        check_identity(work.out, manifest.head, identity)
        encoded = [[clip.path, clip.stamp, clip.label] for clip in manifest.clips]
        check_sources(work.out, encoded + manifest.head.get("left_out", []), known)
        if work.latents:
            sound = is_sound if verify else has_size
            damaged = [part_of(shard) for shard in manifest.shards if not sound(work.out, shard)]
            if damaged:
                log.warning("%d of %d shards are damaged or gone: encoded again", len(damaged), len(manifest.shards))
            else:
                log.info("%d clips are encoded in %s already: nothing to do", len(manifest.clips), work.out)
            if damaged or work.folder.exists():
                work.claim()
            return damaged
    work.claim()
    job = work.folder / "job.json"
    if job.exists():
        before = json.loads(job.read_bytes())
        check_identity(work.out, before, identity)
        if before["latents"] != work.latents:
            raise ConfigError(f"{work.folder} is of a run with stats_only={work.latents}: finish that, or delete it")
        check_sources(work.out, before["sources"], known)
    else:
        job_content = {**identity, "latents": work.latents, "sources": known}
        write_durably(job, json.dumps(job_content).encode())
    todo = [number for number in range(parts) if work.load(number) is None]
    if len(todo) < parts:
        log.info("going on: %d of %d parts are encoded already", parts - len(todo), parts)
    return todo


def check_identity(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ConfigError where an encoding was of another VAE or protocol."""
    remedy = "choose another out, or delete this one"
    marks = before["fingerprint"], now["fingerprint"]
    if marks[0] != marks[1]:
        raise ConfigError(f"out={out} holds latents of another VAE ({marks[0][:12]}, not {marks[1][:12]}): {remedy}")
    old, new = before["settings"], now["settings"]
    if changed := [f"{key}={old.get(key)}, not {value}" for key, value in new.items() if old.get(key) != value]:
        raise ConfigError(f"out={out} holds latents of another protocol ({'; '.join(changed)}): {remedy}")
    if before["classes"] != now["classes"]:
        raise ConfigError(f"out={out} holds latents with other classes: {remedy}")


def check_sources(out: Path, before: list[list[Any]], now: list[list[Any]]) -> None:
    """Raise ConfigError where videos changed, came or went; each is path, stamp and label."""
    known = {path: rest for path, *rest in before}
    changed = [path for path, *rest in now if known.get(path) != rest]
    gone = known.keys() - {path for path, *_ in now}
    if changed or gone:
        counts = f"{len(changed)} new or changed, {len(gone)} gone, first {min([*changed, *gone])!a}"
        raise ConfigError(f"out={out} holds latents of other videos ({counts}): choose another out, or delete this one")


def repaired(work: Workplace, numbers: list[int]) -> dict[str, Any]:
    """Return the result of a finished encoding, once the parts encoded again turned out to be the same."""
    due = {part_of(shard): shard["sha256"] for shard in read_manifest(work.out).shards}
    for number in numbers:
        part = work.load(number)
        if part is None or part["shard"] is None or part["shard"]["sha256"] != due[number]:
            raise DataError(
                f"part {number} of {work.out} does not come out as it was (another machine or version?): "
                f"delete {MANIFEST} to encode all anew"
            )
    work.remove()
    return json.loads((work.out / "statistics.json").read_text(encoding="utf-8"))


def part_of(shard: dict[str, Any]) -> int:
    """Return the number of the part that a shard is of."""
    return int(Path(shard["name"]).stem.rpartition("-")[2])
