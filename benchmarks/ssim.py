"""SSIM of a clip on a CPU: praxino against the per-frame OpenCV `filter2D` loop of the published evaluations.

Interleaved in one process; median of rounds.

    python benchmarks/ssim.py [--rounds 7] [--frames 17] [--size 256] [--out FILE.md]
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from praxino.metrics.image import ssim_frames

try:
    import cv2
except ImportError as error:
    raise SystemExit("this benchmark compares with OpenCV: pip install opencv-python-headless") from error

METHODS = ("OpenCV filter2D, a frame and a colour at a time", "praxino")


def filter2d_loop(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the SSIM of every frame of `(1, C, T, H, W)`, `(1, T)`: five filters of the 2D window a colour."""
    window = np.outer(*2 * [cv2.getGaussianKernel(11, 1.5).ravel()])

    def blur(plane: np.ndarray) -> np.ndarray:
        return cv2.filter2D(plane, -1, window)[5:-5, 5:-5]

    def of_plane(a: np.ndarray, b: np.ndarray) -> float:
        mean_a, mean_b = blur(a), blur(b)
        squares, product = mean_a**2 + mean_b**2, mean_a * mean_b
        variances, covariance = blur(a**2) + blur(b**2) - squares, blur(a * b) - product
        quotient = (2 * product + 0.01**2) * (2 * covariance + 0.03**2)
        return float((quotient / ((squares + 0.01**2) * (variances + 0.03**2))).mean())

    frames = [((v[0].double() + 1) / 2).transpose(0, 1).numpy() for v in (x, y)]  # (T, C, H, W)
    pairs = zip(*frames, strict=True)
    return torch.tensor([[statistics.fmean(map(of_plane, a, b)) for a, b in pairs]], dtype=torch.float64)


def clip(frames: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a clip and a noisy copy of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, frames, size, size, generator=generator) * 2 - 1
    return x, (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Return the median milliseconds of each call, interleaved: wall and CPU time."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: (1e3 * statistics.median(w for w, _ in rows), 1e3 * statistics.median(c for _, c in rows))
        for name, rows in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    x, y = clip(args.frames, args.size)
    calls = dict(zip(METHODS, (lambda: filter2d_loop(x, y), lambda: ssim_frames(x, y)), strict=True))
    off = float((filter2d_loop(x, y) - ssim_frames(x, y)).abs().max())
    default = torch.get_num_threads(), cv2.getNumThreads()
    lines = [
        "# SSIM of a clip: time against a loop of OpenCV's filter2D",
        "",
        f"`python benchmarks/ssim.py --rounds {args.rounds}` on a {default[0]}-core {platform.machine()} CPU; torch "
        f"{torch.__version__}, OpenCV {cv2.__version__}.",
        f"{args.frames} frames of {args.size}x{args.size} in RGB, float64 inside; interleaved in one process, medians. "
        f"Largest difference between the two in a frame: {off:.1e}.",
        "",
        "| threads (torch, OpenCV) | method | ms | CPU ms | times faster |",
        "|---|---|---|---|---|",
    ]
    for threads in ((1, 1), default):
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
        found = measure(calls, args.rounds)
        first = found[METHODS[0]][0]
        name = "{}, {}".format(*threads) + (" (default)" if threads == default else "")
        lines += [f"| {name} | {m} | {w:.1f} | {c:.1f} | {first / w:.2f} |" for m, (w, c) in found.items()]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
