"""Evaluate a denoiser: let it sample or predict, and measure what it wrote without loss."""

import json
from contextlib import ExitStack
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from praxino.errors import ConfigError, DataError
from praxino.metrics.suite import TEMPORAL, PairSuite
from praxino.tasks.device import FLOAT32, pick_device, precision_context
from praxino.tasks.evaluation.compare import LEAST_OTHERS, LEAST_REAL
from praxino.tasks.evaluation.report import Clip
from praxino.tasks.evaluation.score import Curves, Reading, Recorder, Row, Scores
from praxino.tasks.evaluation.shown import DIFFERENCE, LONGEST, amplify, shrink, tagged
from praxino.tasks.evaluation.verdict import Judge, Outcome, checked, mean_curves
from praxino.tasks.outputs import PREDICTIONS
from praxino.tasks.predict import predict
from praxino.tasks.ranks import is_first
from praxino.tasks.reconstruct import fitting_chunk
from praxino.tasks.sample import sample, shape_of
from praxino.video import Video, to_float, to_uint8

SAMPLE, MEAN, COPY = "sample", "mean", "copy_last"
PANELS = {SAMPLE: "prediction", MEAN: "mean of {}", COPY: "last given frame"}


def samples(target: Path, settings: dict[str, Any], real: str, reading: Reading, judge: Judge) -> Row | None:
    """Draw samples into `target/samples`, without loss; only the first process gets what was drawn.

    Before, the detectors are opened and the real videos are found, for drawing may take hours.

    Args:
        reading: of the real videos, but for frames and size, which are those of the samples.
    """
    given = checked(sample, "generate", {**settings, "out": str(target / "samples"), "lossless": True})
    if is_first():
        frames, size = shape_of(**{key: given[key] for key in signature(shape_of).parameters if key in given})
        detectors = judge.distances(frames, torch.device("cpu"))
        found = len(replace(reading, frames=frames, size=size).find(real).entries)
        least = (2, 2) if detectors else (LEAST_REAL, LEAST_OTHERS)
        if found < least[0] or given["n"] < least[1]:
            raise DataError(f"{found} clips under {real} and n={given['n']}: {least[0]} and {least[1]} are the least")
        del detectors
    made = sample(**given)
    return made if is_first() else None


def predictions(target: Path, settings: dict[str, Any], judge: Judge, outcome: Outcome) -> Row:
    """Predict into `target/predictions`, without loss, and measure predictions against what came."""
    if judge.fvd.detector or judge.fid.detector:
        raise ConfigError("fvd and fid are of sets: give real=DIR in the place of input=PATH")
    folder = target / "predictions"
    given = checked(predict, "generate", {**settings, "out": str(folder), "lossless": True, "compare": True})
    if is_first():
        judge.suite(torch.device("cpu"))  # says now what is wrong with the weights of LPIPS
    result = predict(**given)
    if not is_first():
        return {}
    if not result["n"]:
        raise DataError(f"no video is as long as frames={result['frames']}: there is nothing to compare with")
    device, count = pick_device(given.get("device", "auto")), result["samples"]
    rows = [json.loads(line) for line in (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()]
    rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    short = f"continued, but not as long as frames={result['frames']}: nothing to compare with"
    rejected += [{"path": row["path"], "reason": "short", "detail": short} for row in rows if not row["measured"]]
    rows = [row for row in rows if row["measured"]]
    files = [Files(folder, row["path"], row["output"], result["context"], count) for row in rows]
    with precision_context(device, "32"):
        found = measure(files, judge.suite(device), device)
    scores = Scores({place: beside(found, place) for place in range(len(files))}, found[SAMPLE].curves, rejected)
    tags = tagged({place: row["mse"] for place, row in scores.rows.items()}, outcome.shown, len(files))
    clips = [files[place].show(scores.curves[place], tag) for place, tag in tags.items()]
    protocol = {**given, **result["protocol"], "files": "8 bits, without loss", "float32": FLOAT32, **judge.protocol()}
    title = f"Prediction: {Path(given['ckpt']).name}"
    written = outcome.write(
        "prediction", title, scores, gains(scores.table), protocol, clips, horizons(found, result["context"])
    )
    outcome.tell(written)
    return written


class Files:
    """The prediction of one video as `predict` wrote it."""

    def __init__(self, folder: Path, path: str, name: str, context: int, count: int) -> None:
        self.path, self.context, self.count = path, context, count
        self.truth = folder / "truth" / name
        self.kinds = {SAMPLE: folder / "full" / name, **({MEAN: folder / "mean" / name} if count > 1 else {})}

    def record(self, place: int, recorders: dict[str, Recorder], device: torch.device) -> None:
        """Measure the predicted frames, and the last given one in their place."""
        with ExitStack() as stack:
            truth, *others = (
                stack.enter_context(Video(file, index_dir=None)) for file in (self.truth, *self.kinds.values())
            )
            info = truth.info
            size = fitting_chunk(info.height, info.width)
            last = to_float(truth.read([self.context - 1])).to(device)[None]
            for recorder in recorders.values():
                recorder.begin([place], [self.path], [float(info.fps)])
            for pieces in zip(*(video.chunks(size, self.context) for video in (truth, *others)), strict=True):
                x, *found = (to_float(piece.to(device))[None] for piece in pieces)
                videos = dict(zip(self.kinds, found, strict=True)) | {COPY: last.expand_as(x)}
                for key, recorder in recorders.items():
                    recorder.add(x, videos[key])
            for recorder in recorders.values():
                recorder.end()

    def show(self, curves: Curves, tags: tuple[str, ...]) -> Clip:
        """Return the first frames side by side; given ones have no score."""
        with Video(self.truth, index_dir=None) as video:
            fps, frames = float(video.info.fps), range(min(LONGEST, video.info.frames))
            truth = to_float(video.read(frames)[None])
        panels = {"truth": truth}
        for key, file in self.kinds.items():
            with Video(file, index_dir=None) as video:
                panels[PANELS[key].format(self.count)] = to_float(video.read(frames)[None])
        kept = torch.arange(len(frames)).clamp(max=self.context - 1)
        panels[PANELS[COPY]] = truth[:, :, kept]
        panels[DIFFERENCE] = amplify(truth, panels[PANELS[SAMPLE]])
        given: list[float | None] = [None] * self.context
        shown = {name: (given + values)[:LONGEST] for name, values in curves.items()}
        return Clip(self.path, fps, {label: to_uint8(shrink(x))[0] for label, x in panels.items()}, shown, tags)


@torch.inference_mode()
def measure(files: list[Files], suite: PairSuite, device: torch.device) -> dict[str, Scores]:
    """Return the scores of the first sample, of the mean where there is one, and of the last given frame."""
    recorders = {key: Recorder(suite) for key in (*files[0].kinds, COPY)}
    for place, video in enumerate(files):
        video.record(place, recorders, device)
    return {key: recorder.scores for key, recorder in recorders.items()}


def beside(found: dict[str, Scores], place: int) -> Row:
    """Return the row of a video: the scores of the sample, then those of the others with their names behind them."""
    row = dict(found[SAMPLE].rows[place])
    for key, scores in found.items():
        if key != SAMPLE:
            names = [name for name in scores.curves[place] if name not in TEMPORAL]
            row |= {f"{name}_{key}": scores.rows[place][name] for name in names}
    return row


def gains(rows: list[Row]) -> Row:
    """Return by how much predictions are better than the last given frame, of the PSNR in the rows."""
    values: Row = {}
    for key in ("psnr", f"psnr_{MEAN}"):
        found = [row[key] - row[f"psnr_{COPY}"] for row in rows if key in row]
        if found:
            better = sum(gain > 0 for gain in found) / len(found)
            note = f"dB of PSNR over keeping the last given frame, better for {better:.0%} of the videos"
            values[key.replace("psnr", "gain")] = {"value": sum(found) / len(found), "note": note}
    return values


def horizons(found: dict[str, Scores], context: int) -> dict[str, dict[str, list[float | None]]]:
    """Return the mean curves of each metric over the predicted frames."""
    lines: dict[str, dict[str, list[float | None]]] = {}
    for key, scores in found.items():
        for name, curve in mean_curves(list(scores.curves.values())).items():
            frames: list[float | None] = [context + k for k in range(len(curve["mean"]))]
            lines.setdefault(name, {"frame": frames, "n": curve["n"]})[key] = curve["mean"]
    return lines
