"""How good predictions are at each distance from what was given."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from praxino.metrics.image import PSNR_CAP
from praxino.tasks.common import measure
from praxino.tasks.console import show_table
from praxino.tasks.rows import without_nan, write_csv

log = logging.getLogger(__name__)

SCORES = ("psnr", "ssim")
PROTOCOL = {
    "sample": "the first sample",
    "mean": "mean of the decoded samples",
    "mean_latent": "the decoded mean of their latents",
    "copy_last": "the last given frame",
    "truth": "frames as read, resized where size says so; predictions clamped, not rounded",
    "psnr": f"of every predicted frame, data range 1, {PSNR_CAP:g} dB at most; mean over frames, then over videos",
    "ssim": "data range 1, gaussian 11x11 of sigma 1.5, valid window; none under 11 pixels",
}


def judge(truth: Tensor, predictions: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return PSNR and SSIM of every frame `(2, t)` of predictions of a video `(3, t, H, W)`."""
    x = truth.transpose(0, 1)[:, :, None]  # a video of one frame each
    scores = {key: measure(x, y.transpose(0, 1)[:, :, None]) for key, y in predictions.items()}
    return {key: torch.stack([score[metric] for metric in SCORES]) for key, score in scores.items()}


def score(curves: list[dict[str, Any]], context: int) -> dict[str, Any]:
    """Return the means over videos of all scores, on the whole and frame by frame."""
    if not curves:
        return {}
    keys = list(curves[0])
    stacked = {key: torch.tensor([curve[key] for curve in curves], dtype=torch.float64) for key in keys}  # (N, 2, t)
    result: dict[str, Any] = {"horizon": {"frame": list(range(context, context + stacked[keys[0]].shape[2]))}}
    for index, metric in enumerate(SCORES):
        result[metric] = without_nan({key: float(values[:, index].mean()) for key, values in stacked.items()})
        means = {key: values[:, index].mean(dim=0).tolist() for key, values in stacked.items()}
        result["horizon"][metric] = {key: None if result[metric][key] is None else m for key, m in means.items()}
    videos = {key: values[:, 0].mean(dim=1) for key, values in stacked.items()}
    last = videos.pop("copy_last")
    result["gain"] = {key: float((values - last).mean()) for key, values in videos.items()}
    result["better"] = {key: float((values > last).double().mean()) for key, values in videos.items()}
    return result


def report(result: dict[str, Any], target: Path, compare: bool) -> None:
    """Write horizon.csv and print the means."""
    if not result["n"]:
        log.info("%d videos continued, none measured; see %s", result["videos"], target)
        if compare:
            log.warning("no video is as long as frames=%d: nothing is measured", result["frames"])
        return
    horizon = result["horizon"]
    columns = {f"{metric}_{key}": values for metric in SCORES for key, values in horizon[metric].items()}
    rows = [
        {"frame": frame, **{name: None if values is None else values[k] for name, values in columns.items()}}
        for k, frame in enumerate(horizon["frame"])
    ]
    write_csv(target / "horizon.csv", rows)
    show_table(
        f"{result['n']} of {result['videos']} videos measured, frames {result['context']} to {result['frames'] - 1} "
        f"after {result['context']} given, {result['rejected']} passed over; see {target / 'metrics.json'}",
        [
            (key, psnr, result["gain"].get(key), result["better"].get(key), result["ssim"][key])
            for key, psnr in result["psnr"].items()
        ],
        ("prediction", "PSNR dB", "over copy_last", "videos better", "SSIM"),
    )


def summary(row: dict[str, Any]) -> str:
    """Word the row of a video for the log."""
    scores = row["psnr"] or {}
    text = ", ".join(f"{key} {value:.2f} dB" for key, value in scores.items() if value is not None)
    return f"{ascii(os.fspath(row['path']))[1:-1]}: {row['frames']} frames{', ' if text else ''}{text}"
