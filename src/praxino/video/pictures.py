"""Pictures as frames: single images, and folders of numbered pictures as sequences."""

import hashlib
import os
import re
import stat
from collections import defaultdict
from fractions import Fraction

import av
import numpy as np
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from praxino.video.index import Index
from praxino.video.pixels import Layout
from praxino.video.source import check_file, failures
from praxino.video.types import IMAGE_SUFFIXES, DecodeFailure, VideoInfo

RATE = Fraction(25)  # frames per second of a sequence of pictures, which states none
MAGIC = {b"\xff\xd8": "mjpeg", b"\x89P": "png", b"RI": "webp", b"BM": "bmp", b"II": "tiff", b"MM": "tiff"}
LAST_NUMBER = re.compile(r"^(?P<prefix>.*?)(?P<number>\d+)(?P<tail>\D*)$", re.DOTALL)
FIRST_NUMBER = re.compile(r"^(?P<prefix>\D*)(?P<number>\d+)(?P<tail>)", re.DOTALL)


def natural(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key under which `2.jpg` comes before `10.jpg`."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def decode_picture(path: str, max_pixels: int) -> VideoFrame:
    """Decode one picture file, told by its content, whole or not at all."""
    status = check_file(path)
    if status.st_size > 16 * max_pixels:
        raise DecodeFailure(path, "too_large", f"{status.st_size} bytes for one picture")
    with failures(path, "corrupt"):
        with open(path, "rb") as file:
            data = file.read()
        codec = MAGIC.get(data[:2])
        if codec is None:
            raise DecodeFailure(path, "container", "not a jpg, png, webp, bmp or tif picture")
        context = av.CodecContext.create(codec, "r")
        assert isinstance(context, VideoCodecContext)
        context.thread_count = 1
        context.options = {"max_pixels": str(max_pixels)}
        if codec == "mjpeg":  # otherwise what is missing of a picture is filled with gray
            context.options |= {"err_detect": "explode"}
        try:
            frames = context.decode(Packet(data)) or context.decode(None)
        except av.error.ArgumentError:
            detail = f"more than {max_pixels} pixels: raise max_pixels to read it"
            raise DecodeFailure(path, "too_large", detail) from None
    if not frames:
        raise DecodeFailure(path, "no_frames", "no picture comes out")
    return frames[0]


def _pictures(folder: str) -> list[str]:
    """List the visible picture files of a folder; raise DecodeFailure where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return [
                entry.name
                for entry in entries
                if not entry.name.startswith(".")
                and os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
                and entry.is_file()
            ]
    except PermissionError as error:
        raise DecodeFailure(folder, "permission", error.strerror or "not readable") from None
    except (OSError, ValueError) as error:
        raise DecodeFailure(folder, "missing", getattr(error, "strerror", None) or str(error)) from None


def _group(names: list[str], pattern: re.Pattern[str]) -> dict[str, list[str]]:
    """Put names that differ in one number together, under their common form: `left_*`."""
    groups: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in names:
        match = pattern.match(os.path.splitext(name)[0])
        if match:
            groups[f"{match['prefix']}*{match['tail']}"].append((int(match["number"]), name))
    for form, members in list(groups.items()):
        if len({number for number, _ in members}) < len(members):  # 1.jpg beside 1.png: two sequences
            del groups[form]
            for number, name in members:
                groups[form + os.path.splitext(name)[1]].append((number, name))
    return {form: [name for _, name in sorted(members)] for form, members in groups.items() if len(members) > 1}


def frames_in(folder: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Return the videos that the pictures of a folder are: address -> picture files in order.

    Pictures whose names differ in their last number (or, failing that, in their first) are the frames of one sequence,
    in the order of the numbers; holes in the numbers are kept as they are. A folder with one sequence is addressed by
    its own path, each of several by `folder/prefix*`. Pictures that belong to none are passed over if there is a
    sequence; without one, every picture stands alone, as a video of one frame addressed by its own path.
    """
    path = os.fspath(folder)
    names = sorted(_pictures(path), key=natural)
    groups = _group(names, LAST_NUMBER) or _group(names, FIRST_NUMBER)
    if not groups:
        return {os.path.join(path, name): [os.path.join(path, name)] for name in names}
    files = {form: [os.path.join(path, name) for name in members] for form, members in groups.items()}
    if len(files) == 1:
        return {path: next(iter(files.values()))}
    return {os.path.join(path, form): files[form] for form in sorted(files, key=natural)}


def is_sequence(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder holds at least one sequence of pictures."""
    return any(len(files) > 1 for files in frames_in(folder).values())


def picture_files(path: str) -> list[str] | None:
    """Return the pictures behind an address: a picture, a folder, `folder/prefix*`; None if it names another file."""
    if os.path.isdir(path):
        found = frames_in(path)
        if not found:
            raise DecodeFailure(path, "not_a_file", "a folder without pictures")
        if len(found) > 1:
            names = ", ".join(os.path.basename(address) for address in found)
            raise DecodeFailure(path, "several_sequences", f"{len(found)} videos in one folder, name one: {names}")
        return next(iter(found.values()))
    if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES and os.path.lexists(path):
        return [path]
    folder, form = os.path.split(path)
    if "*" in form and not os.path.lexists(path) and os.path.isdir(folder or "."):
        return {os.path.basename(address): files for address, files in frames_in(folder or ".").items()}.get(form)
    return None


def stamp(files: list[str]) -> str:
    """Return what changes when one of the pictures changes."""
    parts = []
    for file in files:
        try:
            status = os.stat(file)
            regular = stat.S_ISREG(status.st_mode)
            parts.append(f"{os.path.basename(file)} {status.st_size} {status.st_mtime_ns} {regular}")
        except OSError as error:
            parts.append(f"{os.path.basename(file)} {error.errno}")
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def build(path: str, files: list[str], max_pixels: int) -> Index:
    """Index a sequence by decoding every picture; it ends before the first one that cannot be read."""
    first, layout, damage, count = None, None, "", 0
    for file in files:
        try:
            frame = decode_picture(file, max_pixels)
        except DecodeFailure as failure:
            if first is None:
                raise DecodeFailure(path, failure.reason, f"{os.path.basename(file)}: {failure.detail}") from None
            damage = f"{os.path.basename(file)}: {failure.reason}: {failure.detail}"
            break
        this = Layout.of(frame, None, max_pixels)
        if first is None or layout is None:
            first, layout = frame, this
        elif this.shown != layout.shown:
            (h, w), (first_h, first_w) = this.shown, layout.shown
            detail = f"{os.path.basename(file)} is {h}x{w}, the first is {first_h}x{first_w}"
            raise DecodeFailure(path, "mixed_sizes", detail)
        count += 1
    if first is None or layout is None:
        raise DecodeFailure(path, "no_frames", "no pictures")
    info = VideoInfo(
        path=path,
        kind="image" if os.path.isfile(path) else "folder",
        frames=count,
        height=layout.shown[0],
        width=layout.shown[1],
        fps=RATE,
        codec=os.path.splitext(files[0])[1][1:].lower(),
        pix_fmt=first.format.name,
        duration=float(count / RATE),
        damage=damage,
    )
    return Index(info, layout, np.arange(count) / float(RATE))
