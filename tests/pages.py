"""What the tests put on pages of evaluations: clips whose frames carry their number, and a report of each kind."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from praxino.tasks.evaluation.report import Clip, Report, write_report

COLOURS = ((200, 40, 40), (40, 160, 60), (50, 70, 190))
EVIL = "a \"<b>&'</script><script>window.hit = 1</script> \udcff.mp4"


def numbered(frames: int, height: int, width: int, panel: int) -> Tensor:
    """Draw frames that carry their number, as eight fields in two rows of which the bright ones count."""
    clip = torch.empty(frames, height, width, 3, dtype=torch.uint8)
    clip[:] = torch.tensor(COLOURS[panel], dtype=torch.uint8)
    for k in range(frames):
        for bit in range(8):
            top, left = height // 2 * (bit // 4), width // 4 * (bit % 4)
            clip[k, top + 2 : top + height // 4, left + 2 : left + width // 4 - 2] = 235 if k >> bit & 1 else 20
    return clip


def numbered_clip(path: str, frames: int, height: int, width: int, fps: float, *tags: str) -> Clip:
    panels = {label: numbered(frames, height, width, k) for k, label in enumerate(("original", "reconstruction", "x4"))}
    curves: dict[str, list[float | None]] = {"psnr": [20 + math.sin(k) for k in range(frames)]}
    curves["difference"] = [None, *(0.01 * k for k in range(1, frames))]
    return Clip(path, fps, panels, curves, tags)


CLIPS = [
    numbered_clip("v/10.mp4", 17, 64, 96, 24000 / 1001, "worst", "spread"),
    numbered_clip("v/9.mp4", 9, 37, 51, 30, "worst"),
    numbered_clip("v/2.mp4", 40, 144, 80, 12.5, "best"),
    numbered_clip("v/1.mp4", 1, 32, 32, 8, "best"),
    *(numbered_clip(f"v/more-{k}.mp4", 5, 64, 64, 8, "spread") for k in range(4)),
    numbered_clip(EVIL, 5, 64, 64, 8, "spread"),
]
ROWS: list[dict[str, Any]] = [
    {"path": "v/10.mp4", "frames": 17, "psnr": 9.5, "ssim": None},
    {"path": "v/9.mp4", "frames": 9, "psnr": 100.0, "ssim": 0.5},
    {"path": "v/2.mp4", "frames": 40, "psnr": math.nan, "ssim": 0.25},
    {"path": "v/1.mp4", "frames": 1, "psnr": -3.0, "ssim": 0.75},
    {"path": EVIL, "frames": 5, "psnr": -20.0, "ssim": 0.125},
]
SUMMARY: dict[str, dict[str, float | None]] = {
    "psnr": {"mean": 31.625, "std": 47.5, "low": -1.5, "high": 77.25, "n": 4},
    "ssim": {"mean": 0.40625, "std": 0.28, "low": 0.2, "high": 0.65, "n": 4},
}
RECONSTRUCTION = Report(
    title="Reconstruction </title><script>window.hit = 1</script>",
    kind="reconstruction",
    summary=SUMMARY,
    values={"psnr_pooled": 12.5, "fvd": {"value": 321.5, "note": "16 frames & <more>"}},
    rows=ROWS,
    horizon={
        "psnr": {"frame": list(range(17)), "mean": [30 - k / 10 for k in range(17)]},
        "difference": {"frame": list(range(3)), "mean": [None, 0.25, 0.5], "n": [0, 5, 2]},
    },
    clips=CLIPS,
    rejected=[{"path": "broken.mp4", "reason": "decode", "detail": "<no> frames"}],
    protocol={"frames": 17, "ssim": {"window": "valid"}, "metrics": ["psnr", "ssim"]},
    versions={"torch": "2.13.0", "cuda": None},
    command="praxino-evaluate vae=a 'data.root=my videos'",
)
EMPTY = Report("Nothing", "samples", {}, {}, [], {}, [], [], {}, {}, "")
PREDICTION = replace(
    RECONSTRUCTION,
    title="Prediction",
    kind="prediction",
    horizon={"psnr": {"frame": [5, 6, 7], "sample": [20, 19, 18], "mean": [21, 20.5, 20], "copy_last": [19, None, 15]}},
    summary=SUMMARY | {"psnr_copy_last": {"mean": 11.5, "std": 1.0, "low": 11.0, "high": 12.0, "n": 4}},
    clips=CLIPS[:2],
    protocol={"context": 5},
)
SAMPLES = replace(
    EMPTY,
    title="Samples",
    clips=[
        Clip(f"{label}-{k}", 8, {label: numbered(5, 64, 64, k)}, {}, ("sample",))
        for label in ("sample", "real")
        for k in range(3)
    ],
    values={"distance": 3.25, "n": 6},
)
LEADERBOARD = replace(
    EMPTY,
    title="Models",
    kind="leaderboard",
    rows=[
        {"name": "small", "psnr": 30.0, "lpips": 0.2, "decode_ms": 10.0, "parameters": 1_000_000},
        {"name": "middle", "psnr": 34.0, "lpips": 0.3, "decode_ms": 40.0, "parameters": 20_000_000},
        {"name": "large", "psnr": 36.0, "lpips": 0.1, "decode_ms": 900.0, "parameters": 400_000_000},
        {"name": "slow <b>", "psnr": 33.0, "lpips": None, "decode_ms": 50.0, "parameters": 30_000_000},
    ],
)
LONG = replace(EMPTY, title="Long", rows=[{"path": f"{k}.mp4", "psnr": float(k * 7919 % 5003)} for k in range(5000)])


def write_pages(folder: Path) -> dict[str, Path]:
    """Write a page of each kind into the folder; return the files by their names."""
    reports = {
        "reconstruction": RECONSTRUCTION,
        "prediction": PREDICTION,
        "samples": SAMPLES,
        "leaderboard": LEADERBOARD,
    }
    for name, content in (reports | {"empty": EMPTY, "long": LONG}).items():
        write_report(folder / f"{name}.html", content)
    return {path.stem: path for path in folder.iterdir()}
