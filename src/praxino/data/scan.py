"""Find the videos of a directory tree: recursive, in parallel, cached, and robust against what trees hold."""

import contextlib
import hashlib
import logging
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from praxino.data.marks import Listed
from praxino.data.pool import Lost, cores, run_all
from praxino.data.report import read_lines, write_lines
from praxino.errors import ConfigError
from praxino.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, DecodeFailure, VideoInfo, frames_in, probe
from praxino.video.index import default_index_dir

log = logging.getLogger(__name__)

FORMAT = 1
PASSING = frozenset({"timeout", "crash", "permission"})  # reasons that may be gone at the next scan


@dataclass(frozen=True)
class Entry:
    """A video of the tree: `path` relative to the root, `stamp` its size and time of change."""

    path: str
    stamp: str
    info: VideoInfo

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "stamp": self.stamp, "info": self.info.to_json()}


@dataclass(frozen=True)
class Rejection:
    """A file that looked like a video and is none, or a folder that cannot be read."""

    path: str
    reason: str
    detail: str
    stamp: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "reason": self.reason, "detail": self.detail}


@dataclass
class Manifest:
    """What a tree holds, in the order of the bytes of the paths."""

    root: str
    videos: list[Entry]
    rejected: list[Rejection]
    ignored: int = 0

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.videos)

    def write_rejected(self, path: Path) -> None:
        write_lines(path, (rejection.to_json() for rejection in self.rejected))


@dataclass
class _Tree:
    """What a walk finds. `files`: `(is a link, path, stamp, bytes, device and inode)`."""

    root: str
    files: list[tuple[bool, str, str, int, tuple[int, int]]] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    ignored: int = 0
    folders: list[str] = field(default_factory=list)  # still to visit
    links: list[str] = field(default_factory=list)  # folders that are links, visited after all real ones
    linked: bool = False  # in the folders behind links now


def scan(
    root: str | Path,
    *,
    images: bool = False,
    follow_links: bool = False,
    aliases: bool = False,
    workers: int | None = None,
    timeout: float = 60.0,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Manifest:
    """Find and probe the videos under `root`.

    Files count by their suffix, folders of pictures as `praxino.video.frames_in` splits them. Links to files are
    followed, and a file with several names in the tree (links, hard links) counts once, under the first real one: else
    it could be trained and validated on. Files are probed, first frame included, in processes that a damaged one may
    crash or hang. Results are kept in `cache_dir` and used again while size and time of change agree.

    Args:
        images: take lone pictures as videos of one frame.
        follow_links: go into folders that are links; each real folder is visited once.
        aliases: keep a file under every name that it has: nothing is trained or split.
        workers: processes, None for one per core.
        timeout: seconds for a file, and one more for each 2 MB of it.
        cache_dir: None for the user's cache.
        progress: show a bar when it takes long and the output is a terminal.

    Raises:
        ConfigError: `root` is not a directory.
    """
    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(root):
        raise ConfigError(f"{root!a} {'is not a directory' if os.path.exists(root) else 'does not exist'}")
    tree = _walk(root, images, follow_links, aliases)
    folder = _open_cache(Path(cache_dir).expanduser() if cache_dir is not None else default_index_dir().parent)
    cache = folder / "manifests" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:24]}.jsonl" if folder else None
    known = _load(cache) if cache else {}
    results: dict[str, Entry | Rejection] = {}
    calls, stamps = {}, {}
    for _, path, stamp, size, _ in tree.files:
        if path in known and known[path].stamp == stamp:
            results[path] = known[path]
        else:
            calls[path] = ((os.path.join(root, path), folder and folder / "index"), timeout + size / 2e6)
            stamps[path] = stamp
    if calls:
        log.info("probing %d of %d files under %s", len(calls), len(tree.files), ascii(root))
        outcomes = run_all(_inspect, calls, workers or cores())
        for path, outcome in _with_bar(outcomes, len(calls), progress):
            results[path] = _judge(path, stamps[path], outcome)
    if cache and (calls or len(results) != len(known)):
        _save(cache, root, results)
    found = [results[path] for _, path, _, _, _ in tree.files]
    return Manifest(
        root,
        videos=[item for item in found if isinstance(item, Entry)],
        rejected=sorted(
            tree.rejected + [item for item in found if isinstance(item, Rejection)], key=lambda r: os.fsencode(r.path)
        ),
        ignored=tree.ignored,
    )


def fingerprint(entries: Sequence[Listed]) -> str:
    """Return the SHA-256 of the sorted paths, sizes and times of change."""
    return _digest((entry.path, entry.stamp) for entry in entries)


def listing(root: str) -> str | None:
    """Return the fingerprint of all files under a folder that could be videos, unopened; None where there are none."""
    files = _walk(root, images=True, follow_links=True, aliases=True).files
    return _digest((path, stamp) for _, path, stamp, *_ in files) if files else None


def _digest(stamps: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for name, stamp in sorted((os.fsencode(path), stamp) for path, stamp in stamps):
        digest.update(b"%d:%b%b\n" % (len(name), name, stamp.encode()))
    return digest.hexdigest()


def _walk(root: str, images: bool, follow_links: bool, aliases: bool) -> _Tree:
    """Collect what could be a video, in the order of the bytes of the paths, without opening any file."""
    tree = _Tree(root, folders=[""])
    visited = set()
    while tree.folders or (tree.links and follow_links):
        tree.linked |= not tree.folders
        folder = (tree.folders or tree.links).pop()
        try:
            here = os.stat(os.path.join(root, folder))
            if (here.st_dev, here.st_ino) not in visited:
                visited.add((here.st_dev, here.st_ino))
                with os.scandir(os.path.join(root, folder)) as listing:
                    _visit(tree, folder, sorted(listing, key=lambda item: os.fsencode(item.name)), images)
        except OSError as error:
            tree.rejected.append(_refuse(folder or ".", error))
    tree.ignored += len(tree.links)
    seen = set()
    unique = []
    for file in sorted(tree.files, key=lambda file: (file[0], os.fsencode(file[1]))):
        device, inode = file[4]
        if inode and (device, inode) in seen and not aliases:
            tree.ignored += 1
        else:
            seen.add((device, inode))
            unique.append(file)
    tree.files = sorted(unique, key=lambda file: os.fsencode(file[1]))
    return tree


def _visit(tree: _Tree, folder: str, items: list[os.DirEntry[str]], images: bool) -> None:
    pictures = {}
    for item in items:
        path = os.path.join(folder, item.name)
        suffix = os.path.splitext(item.name)[1].lower()
        wanted = suffix in VIDEO_SUFFIXES or suffix in IMAGE_SUFFIXES
        try:
            status = item.stat()
        except OSError as error:
            if wanted:
                tree.rejected.append(_refuse(path, error))
            continue
        if stat.S_ISDIR(status.st_mode):
            (tree.links if item.is_symlink() else tree.folders).append(path)
        elif not wanted:
            tree.ignored += 1
        elif not stat.S_ISREG(status.st_mode):
            tree.rejected.append(Rejection(path, "not_a_file", "a pipe, a socket or a device"))
        elif suffix in VIDEO_SUFFIXES:
            stamp = f"{status.st_size}:{status.st_mtime_ns}"
            link = tree.linked or item.is_symlink()
            tree.files.append((link, path, stamp, status.st_size, (status.st_dev, status.st_ino)))
        else:
            pictures[item.name] = status
    if pictures:
        _add_pictures(tree, folder, pictures, images)


def _add_pictures(tree: _Tree, folder: str, pictures: dict[str, os.stat_result], images: bool) -> None:
    """Add the sequences among the pictures of a folder."""
    try:
        sequences = frames_in(os.path.join(tree.root, folder))
    except DecodeFailure as failure:
        tree.rejected.append(Rejection(folder or ".", failure.reason, failure.detail))
        return
    unused = set(pictures)
    for address, files in sequences.items():
        names = [name for name in map(os.path.basename, files) if name in pictures]
        if not names or (len(names) == 1 and not images):
            continue
        unused.difference_update(names)
        size = sum(pictures[name].st_size for name in names)
        facts = "".join(f"{name!a} {pictures[name].st_size} {pictures[name].st_mtime_ns}\n" for name in names)
        stamp = f"{len(names)}:{size}:{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
        tree.files.append((False, os.path.relpath(address, tree.root), stamp, size, (0, 0)))
    tree.ignored += len(unused)


def _refuse(path: str, error: OSError) -> Rejection:
    reasons = {PermissionError: "permission", FileNotFoundError: "missing"}
    return Rejection(path, reasons.get(type(error), "not_a_file"), error.strerror or type(error).__name__)


def _inspect(path: str, index_dir: Path | None) -> tuple[dict[str, Any] | None, str, str]:
    """Probe a video; return `(info, "", "")` or `(None, reason, detail)`."""
    try:
        return probe(path, index_dir=index_dir).to_json(), "", ""
    except DecodeFailure as failure:
        return None, failure.reason, failure.detail
    except Exception as error:
        return None, "error", f"{type(error).__name__}: {str(error)!a}"


def _judge(path: str, stamp: str, outcome: Any) -> Entry | Rejection:
    if isinstance(outcome, Lost):
        return Rejection(path, outcome.reason, outcome.detail, stamp)
    info, reason, detail = outcome
    return Entry(path, stamp, VideoInfo.from_json(info)) if info else Rejection(path, reason, detail, stamp)


def _open_cache(folder: Path) -> Path | None:
    try:
        (folder / "manifests").mkdir(parents=True, exist_ok=True)
        return folder
    except OSError as error:
        log.warning("no cache in %s, so every run probes all files again: %s", folder, error)
        return None


def _load(cache: Path) -> dict[str, Entry | Rejection]:
    """Read the results of an earlier scan; none where the file is absent, damaged or of another format."""
    try:
        lines = read_lines(cache)
        if next(lines, {}).get("format") != FORMAT:
            return {}
        return {line["path"]: _parse(line) for line in lines}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the manifest %s cannot be used and is made anew: %s", cache, error)
        return {}


def _parse(line: dict[str, Any]) -> Entry | Rejection:
    if "info" in line:
        return Entry(line["path"], line["stamp"], VideoInfo.from_json(line["info"]))
    return Rejection(line["path"], line["reason"], line["detail"], line["stamp"])


def _save(cache: Path, root: str, results: dict[str, Entry | Rejection]) -> None:
    lines: list[dict[str, Any]] = [{"format": FORMAT, "root": root}]
    for path in sorted(results, key=os.fsencode):
        item = results[path]
        if isinstance(item, Entry) or item.reason not in PASSING:
            lines.append({**item.to_json(), "stamp": item.stamp})
    try:
        write_lines(cache, lines)
    except OSError as error:
        log.warning("the manifest %s cannot be kept, so the next run probes these files again: %s", cache, error)


def _with_bar(outcomes: Iterator[Any], total: int, show: bool) -> Iterator[Any]:
    """Show a progress bar on a terminal, from the second second on."""
    if not (show and sys.stderr.isatty()):
        yield from outcomes
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("probing videos"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        bar, task = None, None
        for done, outcome in enumerate(outcomes, 1):
            if bar is None and time.monotonic() - begin > 1.0:
                bar = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
                task = bar.add_task("probe", total=total)
            if bar is not None and task is not None:
                bar.update(task, completed=done)
            yield outcome
