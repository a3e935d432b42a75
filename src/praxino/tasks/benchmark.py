"""Benchmark: several VAEs judged by the same clips in one run; a table, a picture, a page."""

import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig

from praxino.config import check_call, redacted
from praxino.data.clips import Short, Where
from praxino.data.transforms import Size
from praxino.errors import ConfigError, DataError, PraxinoError
from praxino.metrics.image import Window
from praxino.tasks.common import at_least, make_resize
from praxino.tasks.console import show_table
from praxino.tasks.device import FLOAT32, Precision, pick_device, precision_context
from praxino.tasks.evaluation.contest import BITS, MEMORY, Contender, Contest
from praxino.tasks.evaluation.pareto import pareto
from praxino.tasks.evaluation.protocol import changes
from praxino.tasks.evaluation.report import Clip, Report, write_report
from praxino.tasks.evaluation.score import Reading, Row
from praxino.tasks.evaluation.shown import ORIGINAL, RECONSTRUCTION
from praxino.tasks.evaluation.verdict import Judge, note_short
from praxino.tasks.plot import names_of
from praxino.tasks.rows import write_atomic, write_csv, write_jsonl
from praxino.tasks.rundir import check_outside, make_directory, versions

log = logging.getLogger(__name__)

WARM_UP = 1  # rounds that do not count
# of the table on the console
HEADS = {"vae": "VAE", "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "fvd": "FVD", "fid": "FID"}
HEADS |= {
    "encode_ms": "enc ms",
    "decode_ms": "dec ms",
    "peak_mib": "MiB",
    "parameters": "M par",
    "compression": "ratio",
}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `benchmark` and call it."""
    return benchmark(**check_call(benchmark, cfg))


def benchmark(
    out: str,
    vaes: list[str],
    data: dict[str, str | None],
    names: list[str] | None = None,
    protocol: str | None = None,
    metrics: list[str] | tuple[str, ...] = ("psnr", "ssim", "difference", "flicker"),
    window: Window = "valid",
    lpips: dict[str, Any] | None = None,
    fvd: dict[str, Any] | None = None,
    fid: dict[str, Any] | None = None,
    frames: int | None = 17,
    stride: int = 1,
    fps: float | None = None,
    size: Size = 64,
    short: Short = "drop",
    where: Where = "start",
    seed: int = 0,
    limit: int | None = None,
    batch: int = 1,
    workers: int = 2,
    repeats: int = 5,
    weights: Literal["ema", "raw"] = "ema",
    shown: int = 4,
    report: bool = True,
    device: str = "auto",
    precision: Precision = "32",
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Measure autoencoders on the first clip of every video, and write a table, a Pareto plot and a page.

    All get the same clips, and all keys but these mean what they mean in `praxino.tasks.evaluate.evaluate`. A VAE that
    does not take a clip's length or size gets it padded, by its last frame, row and column, and what comes out is cut:
    it pays for that in time, and its row says so.

    Args:
        vaes: what `praxino.load` reads.
        names: of the VAEs in the table; None: what tells their paths apart.
        repeats: rounds in which every VAE, one after the other, encodes and decodes the same clip: the median counts.

    Returns:
        the content of metrics.json: a row for each VAE, best PSNR first, those that failed, protocol, versions.
    """
    protocols = changes(protocol, locals())
    at_least(1, frames=frames, stride=stride, limit=limit, batch=batch, repeats=repeats)
    at_least(0, workers=workers, shown=shown)
    if frames is None or size is None:
        raise ConfigError("frames and size: all VAEs are judged by clips of one shape, e.g. frames=17 size=256")
    if fps is not None and stride > 1:
        raise ConfigError(f"fps={fps:g} chooses frames by time: use stride=1 with it")
    if not vaes or not data["root"]:
        raise ConfigError("nothing to compare: give vaes=[PATH,PATH] data.root=DIR")
    if names is not None and (len(names) != len(vaes) or len(set(names)) < len(names)):
        raise ConfigError(f"names: {len(set(names))} different names for {len(vaes)} VAEs: give one of each")
    make_resize(size)
    check_outside(out, {"data.root": data["root"]})
    reading = Reading(frames, stride, fps, size, short, where, seed, limit, batch, workers, cache_dir)
    judge, target, chosen = Judge.of(metrics, window, lpips, fvd, fid), make_directory(out), pick_device(device)
    usable = reading.find(data["root"])
    contest = Contest(judge, reading, data["root"], usable.entries, chosen, precision, shown if report else 0)
    field = [Contender(name, path) for name, path in zip(names or names_of(vaes), vaes, strict=True)]
    failed = hold(contest, field, weights, repeats)
    ready = sorted((c for c in field if c.model is not None), key=lambda c: -c.mean("psnr"))
    if not ready:
        raise DataError(f"none of {len(vaes)} VAEs could be judged; {failed[-1]['vae']}: {failed[-1]['reason']}")
    rejected = [rejection.to_json() for rejection in usable.rejected] + ready[0].scores.rejected
    settings: Row = {"protocol": protocols} if protocols else {}
    settings |= {"vaes": {contender.name: contender.identity for contender in ready}, "root": data["root"]}
    settings |= {**reading.protocol(), "batch": batch, "weights": weights, "precision": precision}
    settings |= {"latent": "posterior mean", "reconstruction": "clamped, not rounded", **judge.protocol()}
    settings |= {**contest.distances, "float32": FLOAT32}
    settings |= {
        "time": f"of one clip, median of {repeats} rounds of all VAEs in turn, after {WARM_UP} that does not count"
    }
    settings |= {"peak_mib": MEMORY[chosen.type == "cuda"], "bits_per_pixel": f"latents at {BITS} bits a number"}
    padded = note_short(target, reading.stretched(usable.entries))
    return publish(ready, failed, rejected, padded, settings, target, report, versions(chosen))


def hold(contest: Contest, field: Sequence[Contender], weights: Literal["ema", "raw"], repeats: int) -> list[Row]:
    """Judge all VAEs; return why some could not be, which have no model then."""
    failed: list[Row] = []

    def attempt(contender: Contender, step: Callable[[Contender], None]) -> None:
        try:
            with precision_context(contest.device, contest.precision):
                step(contender)
        except (PraxinoError, ValueError, torch.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0]
            log.warning("%s is left out: %s", contender.name, reason)
            failed.append({"vae": contender.name, "path": contender.path, "reason": reason})
            contender.model = None

    steps: list[Callable[[Contender], None]] = [lambda c: c.open(weights), contest.score]
    steps += [lambda c: contest.time(c, counts=False)] * WARM_UP + [contest.time] * repeats
    steps += [lambda c: contest.weigh(c, weights)]
    for number, step in enumerate(steps):
        for contender in field:
            if number == 0 or contender.model is not None:
                attempt(contender, step)
    return failed


def publish(
    ready: Sequence[Contender],
    failed: list[Row],
    rejected: list[Row],
    values: Row,
    protocol: Row,
    target: Path,
    report: bool,
    libraries: Row,
) -> Row:
    """Write all files and print the table."""
    rows, command = [contender.row() for contender in ready], shlex.join(redacted(sys.argv))
    result: Row = {"vaes": rows, "failed": failed, "rejected": len(rejected), **values, "protocol": protocol}
    result |= {"versions": libraries, "command": command}
    write_csv(target / "leaderboard.csv", rows)
    write_jsonl(target / "rejected.jsonl", rejected)
    write_atomic(target / "metrics.json", json.dumps(result, indent=2) + "\n")
    pareto(rows, target / "pareto.png")
    title = f"{len(rows)} autoencoders on {rows[0]['videos']} videos"
    if report:
        left_out = [*failed, *rejected]
        page = Report(
            title, "leaderboard", {}, values, rows, {}, gallery(ready), left_out, protocol, libraries, command
        )
        write_report(target / "report.html", page)
    columns = {key: head for key, head in HEADS.items() if rows[0].get(key) is not None}
    show_table(
        f"{title}, {len(failed)} failed; see {target}",
        [tuple(row[key] / 1e6 if key == "parameters" else row[key] for key in columns) for row in rows],
        columns.values(),
    )
    return result


def gallery(ready: Sequence[Contender]) -> list[Clip]:
    """Return the clips that all VAEs were kept of, each with all reconstructions beside the original."""
    found: dict[str, Clip] = {}
    for contender in ready:
        for clip in contender.clips:
            if "spread" not in clip.tags:
                continue
            held = found.get(clip.path, Clip(clip.path, clip.fps, {ORIGINAL: clip.panels[ORIGINAL]}, {}, ("spread",)))
            panels = {**held.panels, contender.name: clip.panels[RECONSTRUCTION]}
            curves = {f"psnr {contender.name}": clip.curves["psnr"]} if "psnr" in clip.curves else {}
            found[clip.path] = replace(held, panels=panels, curves={**held.curves, **curves})
    return list(found.values())
