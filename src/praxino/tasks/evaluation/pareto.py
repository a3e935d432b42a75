"""The Pareto plot of praxino-benchmark: quality against cost."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from praxino.metrics.summary import DIRECTION
from praxino.tasks.evaluation.score import Row

INK, FAINT = "#2b2f36", "#8a9099"
MARKERS = "os^D"
LABELS = {
    "psnr": "PSNR (dB)",
    "decode_ms": "decoding a clip (ms)",
    "peak_mib": "peak memory (MiB)",
    "bits_per_pixel": "bits of latent a pixel",
}


def pareto(rows: Sequence[Row], path: Path, quality: str = "psnr") -> None:
    """Draw quality against what it costs, in a panel for each cost; what nothing beats in both is joined by a line."""
    quality = next((key for key in (quality, *DIRECTION) if rows[0].get(key) is not None), "")
    costs = [key for key in ("decode_ms", "peak_mib", "bits_per_pixel") if rows[0].get(key)]
    if not quality or not costs:
        return
    figure = Figure(figsize=(4.6 * len(costs), 4.4), layout="constrained")
    for axes, cost in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs, strict=True):
        points = points_of(rows, cost, quality)
        best = front(points, DIRECTION[quality] != "up")
        axes.plot(*zip(*[point[:2] for point in best], strict=True), color=FAINT, linewidth=1.2, zorder=1)
        for number, (x, y, name) in enumerate(points):  # names in a legend: similar models lie close together
            axes.scatter(x, y, color=f"C{number % 10}", marker=MARKERS[number // 10 % len(MARKERS)], s=40, label=name)
        axes.set_xlabel(LABELS[cost], color=INK)
        axes.set_xscale("log")
        axes.margins(0.25)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    label = LABELS.get(quality, quality.upper())
    figure.axes[0].set_ylabel(f"|{label}|" if DIRECTION[quality] == "zero" else label, color=INK)
    names = figure.axes[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path, dpi=150)


def points_of(rows: Sequence[Row], cost: str, quality: str) -> list[tuple[float, float, str]]:
    """Return the points `(cost, quality, name)` of the rows; of what is best at 0, the distance from it."""
    size: Callable[[float], float] = abs if DIRECTION[quality] == "zero" else float
    return [(row[cost], size(row[quality]), row["vae"]) for row in rows if row.get(quality) is not None]


def front(points: Sequence[tuple[float, float, str]], less: bool) -> list[tuple[float, float, str]]:
    """Return the points `(cost, quality, name)` that no other one beats, cheapest first."""
    found: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda p: (p[0], p[1] if less else -p[1])):
        if not found or (point[1] < found[-1][1] if less else point[1] > found[-1][1]):
            found.append(point)
    return found
