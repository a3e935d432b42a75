"""What an evaluation measures, and what it writes: rows, curves, a summary with its protocol, a page."""

import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from praxino.config import check_call, nearest, redacted
from praxino.errors import ConfigError, DataError
from praxino.losses.perceptual import LPIPS, RANDOM, file_name, name_hash
from praxino.metrics.image import LEAST, Window, to_decibel
from praxino.metrics.suite import METRICS, PairSuite
from praxino.metrics.summary import describe
from praxino.tasks.console import show_table
from praxino.tasks.evaluation.compare import Fid, Fvd, SetDistance, open_distances
from praxino.tasks.evaluation.report import Clip, Kind, Report, write_report
from praxino.tasks.evaluation.score import Curves, Row, Scores
from praxino.tasks.rows import write_atomic, write_csv, write_jsonl
from praxino.tasks.rundir import versions

WORDS = {
    "psnr": "data range 1, 100 dB at most, mean over frames; psnr_clip: of the mean squared error of a video; "
    "psnr_pooled: of that of all pixels of all videos",
    "ssim": "data range 1, gaussian 11x11 of sigma 1.5, {window} window, mean over frames; none under {least} pixels",
    "ms_ssim": "data range 1, five scales, {window} window, mean over frames; none under {least} pixels",
    "difference": "mean absolute error of the differences to the frame before, of [0, 1]",
    "flicker": "mean absolute difference to the frame before, less that of the original, of [0, 1]",
}


@dataclass(frozen=True)
class Judge:
    """What is measured: of pairs the `metrics`, of sets what has a detector."""

    metrics: tuple[str, ...] = ("psnr", "ssim")
    window: Window = "valid"
    lpips: dict[str, Any] = field(default_factory=dict)
    fvd: Fvd = field(default_factory=Fvd)
    fid: Fid = field(default_factory=Fid)

    @classmethod
    def of(
        cls,
        metrics: Sequence[str],
        window: Window,
        lpips: dict[str, Any] | None,
        fvd: dict[str, Any] | None,
        fid: dict[str, Any] | None,
    ) -> "Judge":
        """Check settings of the configuration."""
        for name in metrics:
            if name in ("fvd", "fid"):
                raise ConfigError(f"metrics: {name} is measured where {name}.detector=FILE is given, leave it out here")
            if name not in (*METRICS, "lpips"):
                raise ConfigError(f"metrics: {name!r} is unknown{nearest(name, (*METRICS, 'lpips'))}")
        return cls(
            tuple(dict.fromkeys(metrics)),
            window,
            checked(LPIPS, "lpips", lpips),
            Fvd(**checked(Fvd, "fvd", fvd)),
            Fid(**checked(Fid, "fid", fid)),
        )

    def suite(self, device: torch.device) -> PairSuite:
        """Load the metrics of pairs."""
        lpips = {"lpips": LPIPS(**{"net": "alex", **self.lpips}).to(device)} if "lpips" in self.metrics else {}
        return PairSuite(self.metrics, self.window, lpips)

    def distances(self, frames: int | None, device: torch.device) -> list[SetDistance]:
        """Load the detectors, for clips of so many frames; None: whole videos."""
        return open_distances(self.fvd, self.fid, frames, device)

    def protocol(self) -> Row:
        """Word the metrics of pairs."""
        words = {
            name: WORDS[name].format(window=self.window, least=LEAST.get(name))
            for name in self.metrics
            if name in WORDS
        }
        return words | ({"lpips": lpips_settings({"net": "alex", **self.lpips})} if "lpips" in self.metrics else {})


def lpips_settings(settings: dict[str, Any]) -> Row:
    """Name the weights of LPIPS' network by their file and its SHA-256: in full, or as much as torchvision promises."""
    if (path := settings.get("weights")) == RANDOM:
        return settings
    if path is None:
        net = settings["net"]
        return settings | {"weights": file_name(net), "sha256": settings.get("sha256") or name_hash(net)}
    with Path(path).open("rb") as file:
        return settings | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def checked(function: Any, key: str, given: dict[str, Any] | None) -> dict[str, Any]:
    """Return the settings of a key, checked against the signature that takes them."""
    try:
        return check_call(function, OmegaConf.create(given or {}))
    except ConfigError as error:
        raise ConfigError("\n".join(f"{key}.{line}" for line in str(error).splitlines())) from error


@dataclass(frozen=True)
class Outcome:
    """Where the results of an evaluation go.

    Args:
        shown: videos of each kind on the page.
        protocol: the named protocol.
        device: what is computed on.
    """

    target: Path
    report: bool = True
    shown: int = 4
    protocol: Row = field(default_factory=dict)
    device: torch.device | None = None

    def write(
        self,
        kind: Kind,
        title: str,
        scores: Scores,
        values: Row,
        protocol: Row,
        clips: list[Clip],
        horizons: dict[str, dict[str, list[float | None]]],
    ) -> Row:
        """Write all files and print the means; returns the content of metrics.json."""
        rows, rejected = scores.table, sorted(scores.rejected, key=lambda row: (row["path"], row["reason"]))
        write_jsonl(self.target / "rejected.jsonl", rejected)
        if not rows and kind != "samples":
            raise DataError(f"no video could be measured: see {self.target / 'rejected.jsonl'}")
        metrics = [key for key in rows[0] if key not in ("path", "frames", "height", "width", "mse")] if rows else []
        summary = {name: describe(row[name] for row in rows) for name in metrics}
        if rows:
            values = {"psnr_pooled": pooled(rows), **values}
            write_csv(self.target / "metrics.csv", rows)
            write_jsonl(
                self.target / "curves.jsonl",
                ({"path": scores.rows[place]["path"], **scores.curves[place]} for place in sorted(scores.rows)),
            )
        values = values | note_short(self.target, scores.short)
        command, libraries = shlex.join(redacted(sys.argv)), versions(self.device)
        protocol = {**({"protocol": self.protocol} if self.protocol else {}), **protocol}
        counts = {"n": len(rows), "rejected": len(rejected)} if rows else {"rejected": len(rejected)}
        result: Row = {**summary, **values, **counts, "protocol": protocol, "versions": libraries}
        result |= {"seconds": {key: round(value, 3) for key, value in scores.seconds.items()}, "command": command}
        write_atomic(self.target / "metrics.json", json.dumps(result, indent=2) + "\n")
        if self.report:
            horizons = horizons if any(len(lines["frame"]) > 1 for lines in horizons.values()) else {}
            page = Report(title, kind, summary, values, rows, horizons, clips, rejected, protocol, libraries, command)
            write_report(self.target / "report.html", page)
        return result

    def tell(self, result: Row) -> None:
        """Print the means and the figures of the set."""
        lines: list[tuple[Any, ...]] = []
        for key, value in result.items():
            if isinstance(value, dict) and {"mean", "std", "low"} <= value.keys():
                lines.append((key, value["mean"], value["std"], value["low"], value["high"], value["n"]))
            elif isinstance(value, dict) and "value" in value:
                lines.append((key, value["value"], None, None, None, value.get("n")))
            elif isinstance(value, float):
                lines.append((key, value, None, None, None, result["n"]))
        counts = f"{result['n']} videos measured, " if "n" in result else ""
        columns = ("metric", "mean", "std", "95 % from", "to", "n")
        show_table(f"{counts}{result['rejected']} passed over; see {self.target}", lines, columns)


def pooled(rows: Sequence[Row]) -> float:
    """Return the PSNR of the mean squared error of all pixels."""
    pixels = [row["frames"] * row["height"] * row["width"] for row in rows]
    mean = sum(row["mse"] * count for row, count in zip(rows, pixels, strict=True)) / sum(pixels)
    return float(to_decibel(torch.tensor(mean, dtype=torch.float64)))


def note_short(target: Path, short: Sequence[Row]) -> Row:
    """List the videos that were padded or slowed down, and return their number, if there are any."""
    if not short:
        (target / "short.jsonl").unlink(missing_ok=True)
        return {}
    write_jsonl(target / "short.jsonl", short)
    return {"short": {"value": len(short), "note": f"shorter than a clip and {short[0]['reason']}: see short.jsonl"}}


def mean_curves(curves: Sequence[Curves]) -> dict[str, dict[str, list[float | None]]]:
    """Return the mean over the videos of each metric, frame by frame, as far as half of them go, and of how many."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for name in curves[0] if curves else ():
        lengths = sorted(len(curve[name]) for curve in curves)
        reach = range(lengths[len(lengths) // 2])
        columns = [[value for c in curves if k < len(c[name]) and (value := c[name][k]) is not None] for k in reach]
        means = [sum(column) / len(column) if column else None for column in columns]
        found[name] = {"frame": list(reach), "mean": means, "n": [len(column) for column in columns]}
    return found
