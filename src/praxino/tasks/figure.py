"""The figure of praxino-plot: small multiples of curves over a table of settings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

Curve = tuple[np.ndarray, np.ndarray]  # steps, values
RATES = ("lr", "disc_lr")  # drawn as they are
TITLES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "kl": "KL", "lr": "learning rate", "mse": "MSE"}
COLOURS = ("#1f5f8b", "#d9822b", "#3d8a5f", "#9b3d5e", "#6a5aa8", "#7f7a2f", "#3a9ba8", "#555555")
VALIDATION = "#d9822b"  # of a single run
INK, FAINT = "#2b2f36", "#8a9099"


@dataclass(frozen=True)
class Run:
    """What is drawn of a run: `curves` by panel, then by "train" or "val", and rows of the table."""

    name: str
    curves: Mapping[str, Mapping[str, Curve]]
    settings: Mapping[str, str]


def draw(runs: Sequence[Run], panels: Sequence[str], smooth: float, log_steps: bool) -> Figure:
    """Draw small multiples over a table of settings."""
    columns = min(4, len(panels)) if len(panels) != 4 else 2
    lines = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    if len(runs) > 1:  # what they have in common says nothing about their difference
        names = [name for name in names if len({run.settings.get(name) for run in runs}) > 1]
    width = 3.4 * max(columns, 2)
    table_height = 0.22 * table_lines(runs, names, width) + 0.3
    height = 2.35 * lines + 0.75 + table_height
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        lines,
        columns,
        left=0.62 / width,
        right=1 - 0.22 / width,
        top=1 - 0.85 / height,
        bottom=(table_height + 0.42) / height,
        wspace=0.24,
        hspace=0.42,
    )
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        draw_panel(axes, panel, runs, smooth, log_steps)
        if number + columns >= len(panels):
            axes.set_xlabel("step", fontsize=8, color=FAINT)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    figure.text(0.3 / width, 1 - 0.3 / height, title, fontsize=13, weight="bold", color=INK, va="center")
    figure.legend(
        handles=legend(runs, smooth),
        loc="center right",
        bbox_to_anchor=(1 - 0.15 / width, 1 - 0.3 / height),
        ncols=min(4, len(runs)) if len(runs) > 1 else 3,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=1.6,
    )
    draw_table(figure, runs, names, width, height, table_height)
    return figure


def draw_panel(axes: Axes, panel: str, runs: Sequence[Run], smooth: float, log_steps: bool) -> None:
    """Draw one quantity of all runs."""
    shown: list[np.ndarray] = []
    for run, colour in zip(runs, palette(len(runs)), strict=True):
        for split, (steps, values) in run.curves.get(panel, {}).items():
            shown.append(values)
            if split == "val":
                mark = VALIDATION if len(runs) == 1 else colour
                dense = len(steps) > 60
                axes.plot(steps, values, color=mark, lw=1.0, alpha=0.8, zorder=3)
                axes.plot(steps, values, "." if dense else "o", ms=3.5, mfc="white", mec=mark, mew=1.1, zorder=4)
                continue
            average = None if panel in RATES else smoothed(values, smooth)
            thin, faint = (0.7, 0.28) if average is not None else (1.3, 1.0)
            single = "o" if len(steps) < 4 else None
            axes.plot(steps, values, color=colour, marker=single, ms=2.6, lw=thin, alpha=faint, zorder=1)
            if average is not None:
                axes.plot(steps, average, color=colour, lw=1.5, zorder=2)
    axes.set_title(TITLES.get(panel, panel.replace("_", " ")), fontsize=9.5, color=INK, loc="left", pad=5)
    values = np.concatenate(shown)
    if panel not in ("psnr", "ssim", "data_wait", *RATES) and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel not in RATES and len(values) > 50:
        limit_outliers(axes, values)
    if log_steps:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
        last = max(steps[-1] for run in runs for splits in run.curves.values() for steps, _ in splits.values())
        axes.set_xlim(1 - 0.03 * last, 1.03 * last)
    if panel in RATES:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.grid(True, color="#e8eaed", lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7.5, colors=FAINT, length=0, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c7ccd1")


def limit_outliers(axes: Axes, values: np.ndarray) -> None:
    """Keep a few extreme values from flattening all others; the curve leaves the panel there."""
    low, high = np.quantile(values, [0.005, 0.995])
    if high > low and (values.max() - values.min()) > 4 * (high - low):
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))


def smoothed(values: np.ndarray, share: float) -> np.ndarray | None:
    """Return a curve averaged by a Gaussian of that share of its length, None where there is too little to average.

    It lags behind in neither direction, and counts only the points that there are at the ends.
    """
    sigma = share * len(values)
    if len(values) < 8 or sigma <= 0:
        return None
    sigma = max(sigma, 1.0)
    reach = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    kernel = np.exp(-0.5 * (reach / sigma) ** 2)
    pad = len(reach) // 2
    total = np.convolve(np.pad(values, pad), kernel, mode="valid")
    weight = np.convolve(np.pad(np.ones_like(values), pad), kernel, mode="valid")
    return total / weight


def palette(count: int) -> list[str]:
    """Return a colour a run."""
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def legend(runs: Sequence[Run], smooth: float) -> list[Line2D]:
    """Return what the lines mean."""
    if len(runs) > 1:
        return [Line2D([], [], color=c, lw=2, label=r.name) for r, c in zip(runs, palette(len(runs)), strict=True)]
    trained = [splits["train"] for splits in runs[0].curves.values() if "train" in splits]
    lines = [Line2D([], [], color=COLOURS[0], lw=1, alpha=0.4, label="training")]
    if any(smoothed(values, smooth) is not None for _, values in trained):
        lines.append(Line2D([], [], color=COLOURS[0], lw=1.8, label="smoothed"))
    marks = Line2D([], [], color=VALIDATION, marker="o", mfc="white", ms=4, lw=1, label="validation")
    return [*lines, marks] if any("val" in splits for splits in runs[0].curves.values()) else lines


def table_lines(runs: Sequence[Run], names: Sequence[str], width: float) -> int:
    """Return how many lines the table takes: its blocks stand side by side."""
    return -(-len(names) // blocks(runs, width)) + (len(runs) > 1) if names else 0


def blocks(runs: Sequence[Run], width: float) -> int:
    """Return how many columns of settings fit beside each other, each with a value for every run."""
    return max(1, int(width / 1.45) // (len(runs) + 1))


def draw_table(
    figure: Figure, runs: Sequence[Run], names: Sequence[str], width: float, height: float, table_height: float
) -> None:
    """Write the settings at the foot of the figure, in inches from its corner."""
    if not names:
        return
    top, left, room = table_height - 0.1, 0.3, width - 0.6
    column = room / blocks(runs, width) / (len(runs) + 1)
    head = len(runs) > 1
    lines = table_lines(runs, names, width) - head

    def write(cell: int, line: int, text: str, **style: Any) -> None:
        x, y = (left + cell * column) / width, (top - 0.22 * line) / height
        figure.text(x, y, cut(text, column), fontsize=8, va="top", **style)

    figure.add_artist(Line2D([left / width, 1 - left / width], [(top + 0.1) / height] * 2, color="#d5d9de", lw=0.8))
    for number, name in enumerate(names):
        cell, line = number // lines * (len(runs) + 1), number % lines + head
        write(cell, line, name, color=FAINT)
        for place, (run, colour) in enumerate(zip(runs, palette(len(runs)), strict=True), cell + 1):
            if head and line == 1:
                write(place, 0, run.name, color=colour, weight="bold")
            write(place, line, run.settings.get(name, "-"), color=INK)


def cut(text: str, inches: float) -> str:
    """Shorten a text to the room that it has in a table."""
    most = max(4, int(inches * 14))
    return text if len(text) <= most else text[: most - 1] + "…"
