"""From what a tree holds to what a run uses: long enough videos, a split by hash, clear words where nothing is left."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from praxino.data.clips import ClipSampler
from praxino.data.marks import Listed
from praxino.data.report import write_lines
from praxino.data.scan import Entry, Manifest, Rejection, scan
from praxino.errors import DataError

log = logging.getLogger(__name__)

L = TypeVar("L", bound=Listed)
T = TypeVar("T")


@dataclass
class Usable:
    """The videos of a tree that can give clips, and the ones that cannot.

    `short` lists the videos shorter than a clip: under the policy drop they are among `rejected`, else among `entries`.
    """

    root: str
    entries: list[Entry]
    rejected: list[Rejection]
    short: list[Rejection]


def find_usable(
    root: str | Path,
    clips: ClipSampler,
    *,
    images: bool = False,
    follow_links: bool = False,
    aliases: bool = False,
    workers: int | None = None,
    timeout: float = 60.0,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    limit: int | None = None,
) -> Usable:
    """Scan a tree and keep what can give clips; raises DataError where that is nothing.

    Args:
        aliases: keep a file under every name that it has in the tree: to measure, not to train.
        limit: keep that many videos, evenly spread over the sorted paths.
    """
    manifest = scan(
        root,
        images=images,
        follow_links=follow_links,
        aliases=aliases,
        workers=workers,
        timeout=timeout,
        cache_dir=cache_dir,
        progress=progress,
    )
    if not manifest.videos:
        raise DataError(_nothing(manifest))
    short = [entry for entry in manifest.videos if not clips.fits(entry.info.frames, entry.info.fps)]
    notes = [Rejection(e.path, "short", f"{e.info.frames} frames at {float(e.info.fps):g} fps") for e in short]
    entries, rejected = manifest.videos, manifest.rejected
    if clips.short == "drop":
        dropped = {entry.path for entry in short}
        entries = [entry for entry in entries if entry.path not in dropped]
        rejected = rejected + notes
    if not entries:
        raise DataError(
            f"{len(short)} of {len(short)} videos under {manifest.root} are too short for {_clip(clips)}: "
            "use fewer frames, or short=pad or slow."
        )
    _report(manifest, clips, short)
    return Usable(manifest.root, spread(entries, limit), rejected, notes)


def spread(entries: Sequence[T], limit: int | None) -> list[T]:
    """Keep at most `limit` entries, evenly spread."""
    if limit is None or limit >= len(entries):
        return list(entries)
    return [entries[place * len(entries) // limit] for place in range(limit)]


def _nothing(manifest: Manifest) -> str:
    if not manifest.rejected:
        seen = f"{manifest.ignored} other files" if manifest.ignored else "no files at all"
        return f"no videos under {manifest.root} ({seen}; lone pictures count with images=true)"
    counts = Counter(rejection.reason for rejection in manifest.rejected)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    first = manifest.rejected[0]
    total = len(manifest.rejected)
    return f"0 of {total} files usable under {manifest.root} ({reasons}). First: {first.path!a}: {first.detail}"


def _clip(clips: ClipSampler) -> str:
    pace = f"{clips.fps:g} fps" if clips.fps is not None else f"stride {1 if clips.random_stride else clips.stride}"
    return f"{clips.frames} frames at {pace}"


def _report(manifest: Manifest, clips: ClipSampler, short: list[Entry]) -> None:
    """Say what was left out or changed."""
    log.info("%d videos under %s, %d other files", len(manifest.videos), ascii(manifest.root), manifest.ignored)
    if manifest.rejected:
        first = manifest.rejected[0]
        log.warning(
            "%d files under %s cannot be used, first %s: %s",
            len(manifest.rejected),
            ascii(manifest.root),
            ascii(first.path),
            first.detail,
        )
    if short:
        fate = {"drop": "left out", "pad": "padded with their last frame", "slow": "slowed down"}[clips.short]
        log.warning(
            "%d of %d videos under %s are too short for %s and are %s (short=%s), first %s",
            len(short),
            len(manifest.videos),
            ascii(manifest.root),
            _clip(clips),
            fate,
            clips.short,
            ascii(short[0].path),
        )


def split(entries: Sequence[L], fraction: float) -> tuple[list[L], list[L]]:
    """Split into training and validation by a hash of the path, so that new files move no old ones.

    With two videos or more, no side is empty unless `fraction` is 0; a lone video is on both sides.
    """
    if fraction == 0:
        return list(entries), []
    if len(entries) == 1:
        log.warning("a single video: it is trained and validated on")
        return list(entries), list(entries)
    places = [int.from_bytes(hashlib.sha256(os.fsencode(e.path)).digest()[:8], "big") / 2**64 for e in entries]
    low, next_low = sorted(places)[:2]
    bound = next_low if fraction <= low else min(fraction, max(places))  # neither side is empty
    train = [entry for entry, place in zip(entries, places, strict=True) if place >= bound]
    return train, [entry for entry, place in zip(entries, places, strict=True) if place < bound]


def write_report(path: Path, trees: Sequence[Usable]) -> None:
    """Write the rejected files of all trees as JSON lines, and the short ones that are used to `short.jsonl` beside."""
    lines = [{"root": tree.root, **rejection.to_json()} for tree in trees for rejection in tree.rejected]
    write_lines(path, lines)
    dropped = {(line["root"], line["path"]) for line in lines if line["reason"] == "short"}
    short = [{"root": tree.root, **note.to_json()} for tree in trees for note in tree.short]
    used = [line for line in short if (line["root"], line["path"]) not in dropped]
    if used:
        write_lines(path.with_name("short.jsonl"), used)


def without(tree: Usable, inner: str) -> Usable:
    """Leave out the videos of a tree inside it."""
    inside = os.path.realpath(inner) + os.sep
    kept = [e for e in tree.entries if not os.path.realpath(os.path.join(tree.root, e.path)).startswith(inside)]
    if not kept:
        raise DataError(f"all {len(tree.entries)} videos under {tree.root} are in {inner}, too: nothing to train on.")
    if len(kept) < len(tree.entries):
        log.info("%d videos under %s are left to validation", len(tree.entries) - len(kept), ascii(inner))
    return replace(tree, entries=kept)
