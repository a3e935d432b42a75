"""Gallery: what a pipeline has made, as one HTML page that needs nothing beside itself, and as GIFs.

Clips lie in the page as strips of frames, which a style sheet moves all by the same clock: they play in step, pixel by
pixel as they are, without a script.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from praxino.callbacks.media import write_png
from praxino.errors import DataError
from praxino.tasks.outputs import RECONSTRUCTIONS
from praxino.tasks.rows import write_atomic
from praxino.tasks.rundir import make_directory
from praxino.video import read, write

RATE = 8.0  # frames a second
LONGEST = 48  # frames of a clip that are shown
SHOWN = {"pairs": 8, "samples": 8, "predictions": 6}
COLUMNS = {"truth": "Truth", "full": "One prediction", "mean": "Mean of {}", "copy": "Last frame kept"}
LINES = {"mean": "mean of {}", "sample": "one prediction", "copy_last": "last frame kept"}
COLOURS = {"truth": "truth", "full": "one", "mean": "mean", "copy": "copy", "sample": "one", "copy_last": "copy"}
Content = dict[str, Any]


def gallery(run: str, out: str, title: str = "praxino demo") -> dict[str, Any]:
    """Write `out/index.html` and GIFs of what the stages under `run` have made; what is not there is left out.

    Returns:
        page, and figures, each with name, value and note.

    Raises:
        DataError: nothing is there to be shown.
    """
    source, target = Path(run), make_directory(out)
    scores = {name: load(source / name / "metrics.json") for name in ("reconstruct", "predict", "evaluate")}
    stamps = sorted(map(load, (source / "stages").glob("*.json")), key=lambda stamp: stamp["finished"])
    pairs, samples = find_pairs(source / "reconstruct"), find_videos(source / "sample")[: SHOWN["samples"]]
    predictions = find_predictions(source / "predict", scores["predict"])
    if not (pairs or samples or predictions):
        raise DataError(f"{run} holds no videos to show: run praxino-pipeline first")
    figures = figures_of(source, scores, stamps)
    clips = [show(path) for path in samples]
    context, count = scores["predict"].get("context", 0), scores["predict"].get("samples", 1)
    frames = len(predictions[0][1]["truth"]) if predictions else 1
    sections = [
        section_pairs(pairs),
        section_samples(clips, len(find_videos(source / "sample")), scores["evaluate"]),
        section_predictions(predictions, context, count, scores["predict"]),
        section_stages(stamps),
    ]
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        lead="A video autoencoder and a diffusion transformer on its latents, trained one after the other by a single "
        "command. None of the clips below was selected for its looks.",
        cards="\n".join(card(figure) for figure in figures),
        sections="\n".join(filter(None, sections)),
        columns=len(COLUMNS),
        given=f"{100 * context / frames:.2f}",
    )
    write_atomic(target / "index.html", page)
    for name, rows in {
        "reconstructions": [[clip for _, real, fake in pairs for clip in (real, fake)]],
        "samples": [clips],
        "predictions": [list(row.values()) for _, row in predictions],
    }.items():
        if rows and rows[0]:
            write(target / f"{name}.gif", mosaic(rows, 4), RATE)
    return {"page": str(target / "index.html"), "figures": figures}


# -------------------------------------------------------------------------------------------------------- what is there
def load(path: Path) -> Content:
    """Read a JSON object; an empty one where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def rows_of(path: Path) -> list[Content]:
    """Read a file of JSON lines; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def find_videos(folder: Path) -> list[Path]:
    """List the videos of a folder by name."""
    return sorted(folder.glob("*.mp4"))


def find_pairs(folder: Path) -> list[tuple[Content, Tensor, Tensor]]:
    """Return some of the reconstructions: their rows, the originals and what became of them."""
    rows = thinned(rows_of(folder / RECONSTRUCTIONS), SHOWN["pairs"])
    return [(row, show(folder / "origin" / row["output"]), show(folder / row["output"])) for row in rows]


def find_predictions(folder: Path, scores: Content) -> list[tuple[str, dict[str, Tensor]]]:
    """Return some of the predictions: name, and clips of the same length for each column."""
    found = []
    for path in thinned(sorted((folder / "truth").rglob("*.mp4")), SHOWN["predictions"]):
        name, context = path.relative_to(folder / "truth"), scores["context"]
        row = {kind: show(folder / kind / name) for kind in ("truth", "full", "mean")}
        length = min(map(len, row.values()))
        row = {kind: clip[:length] for kind, clip in row.items()}
        numbers = torch.arange(length).clamp(max=context - 1)
        found.append((str(name), {**row, "copy": row["truth"][numbers]}))
    return found


def thinned(items: Sequence[Any], count: int) -> list[Any]:
    """Return so many items at most, evenly from all of them: neighbours by name may be alike."""
    return [items[index * len(items) // count] for index in range(count)] if len(items) > count else list(items)


def show(path: Path) -> Tensor:
    """Read the frames of a video that are shown, uint8 `(T, H, W, 3)`."""
    return read(path)[:LONGEST]


def figures_of(run: Path, scores: Mapping[str, Content], stamps: Sequence[Content]) -> list[Content]:
    """Return the figures that say how good it is and what it took."""
    found: list[Content] = []
    log = rows_of(run / "vae" / "metrics.jsonl")
    if (vae := last(log, "val/psnr")) is not None:
        ssim = last(log, "val/ssim")
        note = "of held-out clips through the VAE" + (f", SSIM {ssim:.3f}" if ssim is not None else "")
        found.append({"name": "Reconstruction", "value": f"{vae:.1f} dB", "note": note})
    if gain := scores["predict"].get("gain"):
        count = scores["predict"]["samples"]
        note = f"over keeping the last frame, mean of {count}; one prediction {gain['sample']:+.2f}\u00a0dB"
        found.append({"name": "Prediction", "value": f"{gain['mean']:+.2f} dB", "note": note})
    if (part := scores["evaluate"].get("position")) is not None:
        note = f"of the way from real videos to noise, {scores['evaluate']['n']} samples"
        found.append({"name": "Samples", "value": f"{100 * part:.1f} %", "note": note})
    if stamps:
        note = f"in {len(stamps)} stages"
        found.append({"name": "Time", "value": clock(sum(stamp["seconds"] for stamp in stamps)), "note": note})
    return found


def last(rows: Sequence[Content], name: str) -> float | None:
    """Return the last value of a metric."""
    return next((row[name] for row in reversed(rows) if isinstance(row.get(name), int | float)), None)


def clock(seconds: float) -> str:
    """Return a duration as people read it."""
    return f"{seconds:.0f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


# ------------------------------------------------------------------------------------------------------------- the page
def card(figure: Content) -> str:
    """Return one figure."""
    name, value, note = (escape(figure[key]) for key in ("name", "value", "note"))
    return f'<div class="figure"><span>{name}</span><b>{value}</b><small>{note}</small></div>'


def section(title: str, text: str, body: str) -> str:
    """Return a part of the page."""
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{text}</p>\n{body}\n</section>"


def section_pairs(pairs: Sequence[tuple[Content, Tensor, Tensor]]) -> str:
    """Return real clips beside their reconstructions."""
    cells = [
        f'<figure><div class="pair">{clip(real, "real")}{clip(fake, "reconstruction")}</div>'
        f"<figcaption>{row['psnr']:.1f} dB</figcaption></figure>"
        for row, real, fake in pairs
    ]
    text = "Real clips on the left, through the autoencoder on the right."
    return section("Reconstructions", text, f'<div class="grid pairs">{"".join(cells)}</div>') if cells else ""


def section_samples(clips: Sequence[Tensor], count: int, scores: Content) -> str:
    """Return the first samples."""
    if not clips:
        return ""
    text = f"Drawn from noise: the first {len(clips)} of {count}, unselected."
    if "position" in scores:
        text += (
            f" In a fixed space of random features, {scores['n']} of them lie at a Fréchet distance of "
            f"{scores['distance']:.3g} from real clips; other real clips at {scores['floor']:.3g}, noise at "
            f"{scores['ceiling']:.3g}."
        )
    cells = "".join(f"<figure>{clip(frames, 'sample')}</figure>" for frames in clips)
    return section("Samples", text, f'<div class="grid">{cells}</div>')


def section_predictions(
    predictions: Sequence[tuple[str, dict[str, Tensor]]], context: int, count: int, scores: Content
) -> str:
    """Return rows that play in step, and the curve over the horizon."""
    if not predictions:
        return ""
    heads = "".join(f"<div>{dot(kind)}{escape(text.format(count))}</div>" for kind, text in COLUMNS.items())
    rows = [
        f'<div class="row" style="{timing(row["truth"])}">'
        + "".join(clip(frames, f"{kind}, {name}") for kind, frames in row.items())
        + '<div class="time"></div></div>'
        for name, row in predictions
    ]
    text = f"The first {context} frames are given, marked on the line below each row, the rest predicted."
    body = f'<div class="rows"><div class="row heads">{heads}</div>{"".join(rows)}</div>'
    curves = {key: scores["horizon"]["psnr"][key] for key in LINES}
    names = {key: text.format(count) for key, text in LINES.items()}
    body += f'<div class="plot">{chart(scores["horizon"]["frame"], curves, names)}</div>'
    return section("Predictions", text, body)


def section_stages(stamps: Sequence[Content]) -> str:
    """Return what was run, as it is typed, and how long it took."""
    rows = "".join(
        f'<tr><th>{escape(stamp["stage"])}</th><td class="command"><code>{escape(stamp["command"])}</code></td>'
        f'<td class="number">{clock(stamp["seconds"])}</td></tr>'
        for stamp in stamps
    )
    text = "Each stage is a command that can be typed by itself."
    return section("Stages", text, f'<div class="scroll"><table class="stages">{rows}</table></div>') if rows else ""


def clip(frames: Tensor, label: str) -> str:
    """Return a clip as a strip of its frames side by side."""
    length, height, width, _ = frames.shape
    still = ";animation:none" if length == 1 else ""
    rendering = "" if width < 64 else ";image-rendering:auto"
    style = f"{timing(frames)};aspect-ratio:{width}/{height};background-image:url({strip(frames)}){rendering}{still}"
    return f'<span class="clip" role="img" aria-label="{escape(label)}" style="{style}"></span>'


def timing(frames: Tensor) -> str:
    """Return the properties that clips play by."""
    return f"--frames:{len(frames)};--beat:{len(frames) / RATE:.3f}s"


def strip(frames: Tensor) -> str:
    """Return frames `(T, H, W, 3)` as the address of a PNG within the page."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "strip.png"
        write_png(path, frames.permute(1, 0, 2, 3).flatten(1, 2))  # (H, T W, 3)
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def dot(kind: str) -> str:
    """Return the colour of a column or a line."""
    return f'<i class="key" style="background:var(--{COLOURS[kind]})"></i>'


def chart(frames: Sequence[int], curves: Mapping[str, Sequence[float]], names: Mapping[str, str]) -> str:
    """Return curves of PSNR over the predicted frames as SVG, each with its name at its end."""
    left, right, top, bottom, width, height = 44.0, 132.0, 26.0, 34.0, 680.0, 300.0
    values = [value for curve in curves.values() for value in curve if math.isfinite(value)]
    step = 1 if max(values) - min(values) < 6 else 2 if max(values) - min(values) < 12 else 5
    low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
    high += step * (high == low)

    def x(frame: float) -> float:
        return left + (frame - frames[0]) / max(1, frames[-1] - frames[0]) * (width - left - right)

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    parts = ['<text x="0" y="14">PSNR, dB</text>']
    parts.append(f'<text x="{x(frames[-1]):.0f}" y="{height - 4:.0f}" text-anchor="end">frame</text>')
    for tick in range(low, high + 1, step):
        parts.append(
            f'<line class="grid-line" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        parts.append(f'<text x="{left - 10}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for frame in frames[:-2] if len(frames) < 10 else frames[:-2:2]:
        parts.append(f'<text x="{x(frame):.1f}" y="{height - 4:.0f}" text-anchor="middle">{frame}</text>')
    ends = spread({key: y(curve[-1]) for key, curve in curves.items()}, 18)
    for key, curve in reversed(list(curves.items())):
        line = " ".join(f"{x(frame):.1f},{y(value):.1f}" for frame, value in zip(frames, curve, strict=True))
        parts.append(f'<path d="M{line}" style="stroke:var(--{COLOURS[key]})"/>')
        style = f"fill:var(--{COLOURS[key]})"
        parts.append(
            f'<text x="{width - right + 10}" y="{ends[key] + 4:.1f}" style="{style}">{escape(names[key])}</text>'
        )
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="PSNR by frame">{"".join(parts)}</svg>'


def spread(places: Mapping[str, float], gap: float) -> dict[str, float]:
    """Move labels apart that would lie over each other."""
    found: dict[str, float] = {}
    for key in sorted(places, key=places.__getitem__):
        found[key] = max(places[key], max(found.values(), default=-math.inf) + gap)
    return found


# ----------------------------------------------------------------------------------------------------------------- GIFs
def mosaic(rows: Sequence[Sequence[Tensor]], columns: int, side: int = 64, gap: int = 6) -> Tensor:
    """Return clips `(T, H, W, 3)` beside and below each other, rows broken after `columns`, as one video."""
    lines = [row[i : i + columns] for row in rows for i in range(0, len(row), columns)]
    length = min(len(frames) for line in lines for frames in line)
    height, width = lines[0][0].shape[1:3]
    scale = max(1, round(side / height))
    paper = torch.tensor([251, 250, 247], dtype=torch.uint8)
    size = (len(lines) * (height * scale + gap) + gap, max(map(len, lines)) * (width * scale + gap) + gap)
    canvas = paper.expand(length, *size, 3).clone()
    for i, line in enumerate(lines):
        for j, frames in enumerate(line):
            top, left = gap + i * (height * scale + gap), gap + j * (width * scale + gap)
            large = F.interpolate(frames[:length].permute(0, 3, 1, 2), scale_factor=scale).permute(0, 2, 3, 1)
            canvas[:, top : top + height * scale, left : left + width * scale] = large
    return canvas
