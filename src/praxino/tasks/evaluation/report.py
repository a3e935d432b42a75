"""Report: what was measured, as one HTML page that needs nothing beside itself; players, curves, tables, protocol.

The panels of a clip lie side by side in one H.264 video within the page, and the script draws each of them from the
same decoded frame: they are in step by construction. The page itself is made by the script in `report.html`, from the
one JSON object that is put into it.
"""

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from praxino.metrics.summary import DIRECTION
from praxino.tasks.console import ascii_safe
from praxino.tasks.rows import write_atomic
from praxino.video import write

Kind = Literal["reconstruction", "prediction", "samples", "leaderboard"]
Content = dict[str, Any]

BEST, WORST = 18, 46  # CRF of the players; six more halve a file
BUDGET = 0.165  # bits a pixel and frame of a clip
LEAST, MOST = 12_000, 70_000  # bytes a clip may always have, and is not to exceed: ten of any length stay under 1 MB
SMALL = 128  # clips with shorter sides are stored at twice their size, so that 4:2:0 keeps the colour of every pixel
BLOCK = 16  # panels begin at macroblocks, so that one does not bleed into the next
# label and unit of the columns that the tasks write; others are shown by their names
LABELS: dict[str, tuple[str, str]] = {
    "psnr": ("PSNR", "dB"),
    "psnr_clip": ("PSNR of the clip", "dB"),
    "psnr_pooled": ("PSNR, pooled", "dB"),
    "ssim": ("SSIM", ""),
    "ms_ssim": ("MS-SSIM", ""),
    "lpips": ("LPIPS", ""),
    "difference": ("Difference error", ""),
    "warped": ("Warped error", ""),
    "mse": ("MSE", ""),
    "fvd": ("FVD", ""),
    "fid": ("FID", ""),
    "kl": ("KL", ""),
    "encode_ms": ("Encoding", "ms"),
    "decode_ms": ("Decoding", "ms"),
    "peak_mib": ("Peak memory", "MiB"),
}
BETTER = {**DIRECTION, "mse": "down", "gain": "up", "distance": "down", "compression": "up"}
BETTER |= dict.fromkeys(("encode_ms", "decode_ms", "peak_mib", "parameters", "bits_per_pixel"), "down")


@dataclass(frozen=True)
class Clip:
    """A clip with what it is compared with.

    Args:
        path: of the row that it belongs to.
        panels: uint8 `(T, H, W, 3)` by label, all of one shape.
        curves: a value a frame by metric.
        tags: "worst", "best", "spread", "sample": the section that it is shown in is that of the first.
    """

    path: str
    fps: float
    panels: dict[str, Tensor]
    curves: dict[str, list[float | None]]
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shapes = {label: (str(panel.dtype), tuple(panel.shape)) for label, panel in self.panels.items()}
        first = next(iter(shapes.values()), None)
        if first is None or first[0] != "torch.uint8" or len(first[1]) != 4 or first[1][-1] != 3 or not all(first[1]):
            raise ValueError(f"panels {shapes} of {self.path!a} cannot be shown: use uint8 (T, H, W, 3)")
        if len(set(shapes.values())) > 1:
            raise ValueError(f"panels {shapes} of {self.path!a} differ: all of a clip have one shape")


@dataclass(frozen=True)
class Report:
    """What a page shows; whatever is empty is left out.

    Args:
        summary: metric to mean, std, low, high (the 95 % interval over videos) and n.
        values: figures of the whole set: a number, or {"value", "note"}.
        rows: as in metrics.csv; of a leaderboard, a model each.
        horizon: metric to {"frame": [...], name of a line: [...]}, means over videos, and perhaps "n": of how many.
    """

    title: str
    kind: Kind
    summary: dict[str, dict[str, float | None]]
    values: dict[str, Any]
    rows: list[dict[str, Any]]
    horizon: dict[str, dict[str, list[float | None]]]
    clips: list[Clip]
    rejected: list[dict[str, Any]]
    protocol: dict[str, Any]
    versions: dict[str, Any]
    command: str


class _Page(Template):
    delimiter = "%%"


def write_report(path: Path, report: Report) -> None:
    """Write a report as an HTML page."""
    keys = {*report.summary, *report.values, *report.horizon, *columns_of(report.rows)}
    keys |= {metric for clip in report.clips for metric in clip.curves}
    content = {
        "title": report.title,
        "kind": report.kind,
        "names": {key: name_of(key) for key in sorted(keys)},
        "summary": report.summary,
        "values": report.values,
        "rows": table_of(report.rows),
        "horizon": report.horizon,
        "clips": [show(clip) for clip in report.clips],
        "rejected": table_of(report.rejected),
        "protocol": report.protocol,
        "versions": report.versions,
        "command": report.command,
    }
    page = _Page(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    text = page.substitute(title=escape(ascii_safe(report.title)), data=embed(content))
    write_atomic(path, text)


def embed(content: Content) -> str:
    """Return content as JSON that can stand in a script element: no `<`, ASCII alone."""
    return json.dumps(plain(content), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def plain(value: Any) -> Any:
    """Return a value as JSON knows it: floats to seven digits, NaN as None, other infinities and types as text."""
    if isinstance(value, Mapping):
        return {ascii_safe(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    if hasattr(value, "item") and not isinstance(value, float):  # of numpy and torch
        return plain(value.item())
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.7g}") if math.isfinite(value) else str(value)
    return ascii_safe(value)


def name_of(key: str) -> Content:
    """Return how a column is called; one of a variant, such as psnr_mean, like that which it is a variant of."""
    parts = key.split("_")
    stems = ["_".join(parts[:length]) for length in range(len(parts), 0, -1)]
    stem = next((stem for stem in stems if stem in LABELS or stem in BETTER), key)
    label, unit = LABELS.get(stem, (stem.replace("_", " ").capitalize(), ""))
    rest = key[len(stem) + 1 :].replace("_", " ")
    found = {"label": f"{label}, {rest}" if rest else label, "unit": unit, "better": BETTER.get(stem)}
    return found | ({"of": stem, "variant": rest} if rest else {})


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return the keys of all rows, in the order in which they appear."""
    return list(dict.fromkeys(key for row in rows for key in row))


def table_of(rows: list[dict[str, Any]]) -> Content:
    """Return rows as lists under their columns."""
    columns = columns_of(rows)
    return {"columns": columns, "cells": [[row.get(key) for key in columns] for row in rows]}


def show(clip: Clip) -> Content:
    """Return a clip as the page holds it."""
    frames, height, width, _ = next(iter(clip.panels.values())).shape
    scale = 2 if max(height, width) < SMALL else 1
    size = (-(-height * scale // 2) * 2, -(-width * scale // BLOCK) * BLOCK)
    video = encode(tile(list(clip.panels.values()), scale, size), clip.fps)
    return {
        "path": clip.path,
        "fps": float(clip.fps),
        "frames": frames,
        "height": height,
        "width": width,
        "scale": scale,
        "pitch": size[1],
        "panels": list(clip.panels),
        "curves": clip.curves,
        "tags": clip.tags,
        "video": base64.b64encode(video).decode(),
    }


def tile(panels: list[Tensor], scale: int, size: tuple[int, int]) -> Tensor:
    """Return panels side by side, each enlarged, then filled up to `size` with its last row and column."""
    height, width = panels[0].shape[1:3]
    rows = (torch.arange(size[0]) // scale).clamp(max=height - 1)
    columns = (torch.arange(size[1]) // scale).clamp(max=width - 1)
    return torch.cat([panel.cpu()[:, rows][:, :, columns] for panel in panels], dim=2)


def encode(frames: Tensor, fps: float) -> bytes:
    """Return frames `(T, H, W, 3)` as MP4, in the best quality that keeps to the budget."""
    budget, quality = min(MOST, max(LEAST, BUDGET / 8 * frames[..., 0].numel())), BEST
    with TemporaryDirectory() as folder:
        while True:
            data = write(Path(folder) / "clip.mp4", frames, fps, quality=quality).read_bytes()
            if len(data) <= budget or quality == WORST:
                return data
            quality = min(WORST, quality + math.ceil(6 * math.log2(len(data) / budget)))
