"""Stages: commands run one after the other, each in a folder of its own, finished ones skipped.

`OUT/stages/NAME.json` is the stamp of a stage, written when it has ended: a digest of its settings and of the stamps of
the stages before it that it builds on. While a stage runs, `NAME.begun` holds that digest: a stage that was killed goes
on where its command can, and begins anew where the settings have changed since. Videos of others that have changed
since it began are told of, and nothing is thrown away for them.
"""

import fcntl
import hashlib
import json
import logging
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from praxino.data.scan import listing
from praxino.errors import BusyError, ConfigError, PraxinoError
from praxino.tasks.rows import write_atomic

log = logging.getLogger(__name__)

GRACE = 30.0  # seconds that an interrupted command has to end by itself


def begin_anew(folder: Path) -> list[str] | None:
    """Return no settings to go on with: what is in the folder is of no use."""
    return None


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        name: of the stage and of its folder.
        command: NAME of the console script `praxino-NAME`.
        settings: of the command, nested as in its configuration; `out` is the folder of the stage.
        inputs: stages before it whose results it reads.
        reads: folders of others whose videos it reads.
        resume: returns the settings with which a killed command goes on in its folder, None where it cannot.
    """

    name: str
    command: str
    settings: dict[str, Any]
    inputs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    resume: Callable[[Path], list[str] | None] = field(default=begin_anew, compare=False)

    def words(self, out: Path) -> list[str]:
        """Return the settings as they are typed."""
        return [*overrides(self.settings), *overrides({"out": str(out / self.name)})]


def run_stages(stages: Sequence[Stage], out: Path) -> Iterator[dict[str, Any]]:
    """Run what is not finished; yield the stamp of each stage in turn.

    Raises:
        BusyError: another process, or a stage that outlived one, writes to `out`.
        PraxinoError: a command failed, with its exit code.
    """
    with claimed(out) as lock:
        digests: dict[str, str] = {}
        states = {folder: listing(folder) for folder in {name for stage in stages for name in stage.reads}}
        for number, stage in enumerate(stages, 1):
            digest = digest_of(stage, out, digests)
            stamp = read_stamp(out, stage.name)
            reads = {name: states[name] for name in stage.reads}
            title = f"stage {number} of {len(stages)}: {stage.name}"
            if stamp and stamp["digest"] == digest and (out / stage.name).is_dir():
                log.info("== %s: finished before, %.0f s", title, stamp["seconds"])
                record = out / "stages" / f"{stage.name}.json"
                tell_changes(stamp.get("reads", {}), reads, f"to run the stage anew, remove {record}")
                stamp |= {"skipped": True}
            else:
                stamp = {**run_stage(stage, out, digest, reads, title, lock), "skipped": False}
            digests[stage.name] = stamp["id"]
            yield stamp


def run_stage(
    stage: Stage, out: Path, digest: str, reads: dict[str, str | None], title: str, lock: int | None
) -> dict[str, Any]:
    """Run one command, from where it was left or from its start, and write its stamp."""
    folder, records = out / stage.name, out / "stages"
    begun, extra = records / f"{stage.name}.begun", None
    (records / f"{stage.name}.json").unlink(missing_ok=True)
    if folder.exists():
        known, _, states = begun.read_text().partition("\n") if begun.is_file() else ("", "", "")
        extra = stage.resume(folder) if known == digest else None
        if extra is None:
            check_own(begun, folder)
            shutil.rmtree(folder)
        else:
            before = json.loads(states or "{}")
            tell_changes(before, reads, f"the stage goes on with it; to run the stage from its start, remove {folder}")
            reads = reads | before
    write_atomic(begun, f"{digest}\n{json.dumps(reads)}")
    words = stage.words(out) + (extra or [])
    goes_on = " (goes on)" if extra is not None else ""
    log.info("== %s%s\n$ %s", title, goes_on, shlex.join([f"praxino-{stage.command}", *words]))
    started = time.perf_counter()
    code = call([*program(stage.command), *words], lock)
    if code:
        error = PraxinoError(f"stage {stage.name}: its command ended with exit code {code}; {remedy(code)}")
        error.exit_code = code
        raise error
    stamp = {
        "stage": stage.name,
        "digest": digest,
        "reads": reads,
        "command": shlex.join([f"praxino-{stage.command}", *stage.words(out)]).replace(f"{out}/", f"{out.name}/"),
        "seconds": round(time.perf_counter() - started, 2),
        "resumed": extra is not None,
        "finished": datetime.now(UTC).isoformat(timespec="microseconds"),
    }
    stamp["id"] = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()
    write_atomic(records / f"{stage.name}.json", json.dumps(stamp, indent=2) + "\n")
    write_atomic(begun, "")  # who removes a stamp wants the stage from its start
    return stamp


def remedy(code: int) -> str:
    """Say what to do about a command that failed."""
    if code in (75, 128 + signal.SIGTERM, 130):
        return "it was interrupted: the same praxino-pipeline command goes on"
    return "its message is above. Once that is mended, the same praxino-pipeline command goes on"


def check_own(begun: Path, folder: Path) -> None:
    """Refuse to remove a folder that no stage has begun."""
    if not begun.is_file() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds files that no stage has made: choose another out, or remove them")


def digest_of(stage: Stage, out: Path, before: dict[str, str]) -> str:
    """Return what a finished stage is known again by; it stays the same where `out` is moved."""
    settings = json.dumps(stage.settings, sort_keys=True).replace(f"{out}/", "")
    content = [stage.command, settings, [before[name] for name in stage.inputs]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def tell_changes(before: dict[str, str | None], now: dict[str, str | None], remedy: str) -> None:
    """Warn of folders that are not as they were; of one whose state was not recorded nothing is known."""
    for name, state in now.items():
        if state is None:
            log.warning("%s is missing, or holds no videos", name)
        elif before.get(name, state) != state:
            log.warning("%s has changed since: %s", name, remedy)


def read_stamp(out: Path, name: str) -> dict[str, Any] | None:
    """Return the stamp of a finished stage; None where there is none, or not a whole one."""
    try:
        return json.loads((out / "stages" / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# ------------------------------------------------------------------------------------------- settings as they are typed
def overrides(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Return nested settings as `key=value` words of Hydra."""
    words: list[str] = []
    for key, value in settings.items():
        if isinstance(value, dict):
            words += overrides(value, f"{prefix}{key}.")
        else:
            words.append(f"{prefix}{key}={spelled(value)}")
    return words


def spelled(value: Any) -> str:
    """Return a plain value as Hydra reads it back."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(spelled, value))}]"
    if isinstance(value, int | float):
        return repr(value)
    if re.fullmatch(r"[A-Za-z0-9/._+-]+", value) and not reads_otherwise(value):
        return value
    doubled = re.sub(r"(\\+)(?='|\Z)", r"\1\1", value)  # backslashes count before a quote only
    return "'" + doubled.replace("'", "\\'") + "'"


def reads_otherwise(text: str) -> bool:
    """Tell whether a text without quotes is a number, a truth value or nothing."""
    try:
        float(text.replace("_", ""))
        return True
    except ValueError:
        return text.lower() in ("true", "false", "null")


# ------------------------------------------------------------------------------------------------------------ processes
def program(command: str) -> list[str]:
    """Return how a console script is called here; without an installed one, the function behind it is."""
    script = Path(sys.executable).with_name(f"praxino-{command}")
    if script.is_file():
        return [str(script)]
    return [sys.executable, "-c", f"from praxino.cli import {(name := command.replace('-', '_'))}; {name}()"]


def call(words: list[str], lock: int | None) -> int:
    """Run a program that holds the lock, too; pass on an interruption. Return its exit code."""
    child = subprocess.Popen(words, pass_fds=() if lock is None else (lock,))

    def stop(number: int, frame: Any) -> None:
        child.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        try:
            child.wait(GRACE)  # a terminal has interrupted it as well
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return code if code >= 0 else 128 - code


@contextmanager
def claimed(out: Path) -> Iterator[int | None]:
    """Claim a folder; the claim ends with the last process that has inherited it."""
    records = out / "stages"
    records.mkdir(parents=True, exist_ok=True)
    file: IO[str] = (records / ".lock").open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"{out} is in use by another pipeline, or by a stage that outlived one: wait for it"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning(
                "%s cannot be locked (%s): make sure that one pipeline at a time writes to it", out, error.strerror
            )
            yield None
            return
        yield file.fileno()
