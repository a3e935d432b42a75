"""Pair the videos of two trees by their relative path without suffix, and say what does not pair."""

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from praxino.data.clips import ClipSampler
from praxino.data.scan import Entry
from praxino.data.usable import find_usable
from praxino.errors import ConfigError, DataError
from praxino.tasks.common import stem
from praxino.tasks.outputs import RECONSTRUCTIONS, check_finished
from praxino.tasks.rows import write_jsonl
from praxino.video import VideoInfo, probe

log = logging.getLogger(__name__)

Kind = Literal["missing", "extra", "duplicate", "unreadable", "length", "size"]
WORDS: dict[Kind, str] = {
    "missing": "missing under fake",
    "extra": "under fake alone",
    "duplicate": "of a name that several videos have",
    "unreadable": "unreadable",
    "length": "of another length",
    "size": "of another size",
}


@dataclass(frozen=True)
class Problem:
    """Why an entry of the trees is not compared."""

    kind: Kind
    path: str
    detail: str

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "reason": self.kind, "detail": self.detail}


@dataclass(frozen=True)
class Pair:
    """Two videos of one length and size; `name` is the path of the second one in its tree."""

    name: str
    real: Path
    fake: Path
    frames: int
    height: int
    width: int
    fps: Fraction  # of the first


@dataclass(frozen=True)
class Tree:
    """The videos under a path, by relative path, with a stamp of each file, and why others cannot be read."""

    root: Path
    videos: dict[str, VideoInfo]
    stamps: dict[str, str]
    broken: dict[str, str]


def find_pairs(real: Tree, fake: Tree) -> tuple[list[Pair], list[Problem]]:
    """Match two trees; every video that is in no pair has a problem, or shares that of its namesakes.

    Videos that share their path but for the suffix are told apart by the whole path, on the other side, too, or are
    duplicates.
    """
    problems = [
        Problem("unreadable", path, f"under {side}: {why}")
        for side, tree in (("real", real), ("fake", fake))
        for path, why in tree.broken.items()
    ]
    names = [names_of(tree) for tree in (real, fake)]
    if len(real.videos) == len(fake.videos) == 1 and real.root.is_file() and fake.root.is_file():
        names = [{"": path} for name in names for path in name.values()]  # two files are a pair whatever their names
    problems += lone(real, fake, *names)
    pairs = []
    for key in sorted(names[0].keys() & names[1].keys(), key=os.fsencode):
        first, second = real.videos[names[0][key]], fake.videos[names[1][key]]
        shapes = [(v.frames, v.height, v.width) for v in (first, second)]
        if shapes[0] == shapes[1]:
            pairs.append(
                Pair(names[1][key], place(real, names[0][key]), place(fake, names[1][key]), *shapes[0], first.fps)
            )
            continue
        words = [f"{t} frames of {h}x{w}" for t, h, w in shapes]
        damage = "".join(f"; {v.damage}" for v in (first, second) if v.damage)
        kind: Kind = "size" if shapes[0][1:] != shapes[1][1:] else "length"
        problems.append(Problem(kind, names[1][key], f"{words[0]} under real, {words[1]} under fake{damage}"))
    return pairs, problems


def lone(real: Tree, fake: Tree, first: dict[str, str], second: dict[str, str]) -> list[Problem]:
    """Word what one side alone has: the name on the other side may be missing, broken, or stand for several videos."""
    counts = [Counter(map(stem, tree.videos)) for tree in (real, fake)]
    broken = {stem(path) for tree in (real, fake) for path in tree.broken}
    problems: dict[tuple[Kind, str], Problem] = {}
    for key in sorted(first.keys() ^ second.keys(), key=os.fsencode):
        path = first.get(key) or second[key]
        name = stem(path)
        if max(count[name] for count in counts) > 1:
            both = [[p for p in sorted(tree.videos) if stem(p) == name] for tree in (real, fake)]
            lists = [", ".join(map(repr, found)) or "none" for found in both]
            problems["duplicate", name] = Problem("duplicate", name, f"{lists[0]} under real, {lists[1]} under fake")
        elif name not in broken:
            side, root = ("fake", fake.root) if key in first else ("real", real.root)
            kind: Kind = "missing" if side == "fake" else "extra"
            problems[kind, path] = Problem(kind, path, f"no such video under {side}={root}")
    return list(problems.values())


def check_pairs(
    pairs: Sequence[Pair], problems: Sequence[Problem], real: Tree, fake: Tree, out: Path, unpaired: str
) -> None:
    """List the problems in `out/rejected.jsonl`; unless they are to be skipped, raise DataError with each kind."""
    write_jsonl(out / "rejected.jsonl", (problem.to_json() for problem in problems))
    texts = []
    for kind, words in WORDS.items():
        found = [problem for problem in problems if problem.kind == kind]
        if found:
            texts.append(f"{len(found)} {words} (first {found[0].path!a}: {found[0].detail})")
    if unpaired == "skip" and pairs:
        for text in texts:
            log.warning("left out: %s", text)
    elif texts or not pairs:
        counts = f"{len(real.videos)} videos under real={real.root} and {len(fake.videos)} under fake={fake.root}"
        remedy = f"unpaired=skip compares the other {len(pairs)} pairs" if pairs else "no pair is left"
        raise DataError(f"{counts} do not pair: {'; '.join(texts)}\nall are listed in {out}/rejected.jsonl; {remedy}")


def read_tree(path: str, cache_dir: str | None) -> Tree:
    """Find the videos under a path; a video file is its own tree, and of what `reconstruct` wrote only that counts."""
    root = Path(path).expanduser().absolute()
    check_finished(root)
    if root.is_file():
        return Tree(root, {root.name: probe(root)}, {root.name: str(root.stat().st_mtime_ns)}, {})
    if not root.is_dir():
        raise ConfigError(f"{path} does not exist")
    usable = find_usable(root, ClipSampler(1), aliases=True, cache_dir=cache_dir)
    entries: list[Entry] = usable.entries
    broken = {rejection.path: f"{rejection.reason}: {rejection.detail}" for rejection in usable.rejected}
    rows = root / RECONSTRUCTIONS  # of `reconstruct`, which may have written more than one tree
    if rows.is_file():
        outputs = read_outputs(rows, "output")
        entries = [entry for entry in entries if entry.path in outputs]
        broken = {path: why for path, why in broken.items() if path in outputs}
    return Tree(root, {e.path: e.info for e in entries}, {e.path: e.stamp for e in entries}, broken)


def read_outputs(rows: Path, key: str) -> set[str]:
    """Return the paths that a task says it wrote: the rows' values of a key."""
    try:
        return {json.loads(line)[key] for line in rows.read_text(encoding="utf-8").splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{rows} lists no files of praxino ({type(error).__name__}): take it away, or choose another folder"
        ) from error


def place(tree: Tree, path: str) -> Path:
    """Return where a video of a tree lies."""
    return tree.root if tree.root.is_file() else tree.root / path


def names_of(tree: Tree) -> dict[str, str]:
    """Return the paths under their names without suffix, or with it where two would be alike."""
    count = Counter(map(stem, tree.videos))
    return {stem(path) if count[stem(path)] == 1 else path: path for path in tree.videos}
