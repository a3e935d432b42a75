"""Predictions far beyond the training length: PSNR against the horizon, and the memory that they take.

    make demo
    python benchmarks/rollout.py demo/dit --out DIR [--report FILE.md]

The demo's DiT has seen 17 frames (5 latent ones). It continues moving shapes from 5 frames to 17, 77 and 293: 1, 4 and
about 15 times as many latent frames. Memory is the peak of the whole process, PyTorch and everything it loads included.
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

RUNS = {  # name: frames and further settings; windows of 5 latent frames as in training
    "full, 17 frames": (17, ["rollout=full"]),
    "sliding, 77 frames": (77, ["rollout=sliding"]),
    "sliding, 293 frames": (293, ["rollout=sliding"]),
}
SHOWN = (5, 8, 16, 32, 48, 64, 76)  # frames of the horizon in the report


def run(*command: str) -> float:
    """Run a command; return the peak of its resident memory in MiB."""
    print("$", " ".join(command), flush=True)
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return usage.ru_maxrss / 1024


def predict(ckpt: Path, out: Path, limit: int, steps: int) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Yield name, figures and memory of every rollout."""
    for name, (frames, settings) in RUNS.items():
        videos = out / f"videos-{frames}"
        if not videos.exists():
            made = [f"frames={frames}", f"videos={limit}", "val_videos=0", "size=32", "texture=0"]
            run("praxino-make-data", f"out='{videos}'", *made)
        folder = out / name.replace(", ", "-").replace(" ", "-")
        memory = run(
            *("praxino-predict", f"ckpt='{ckpt}'", f"input='{videos}/train'", "context=5", f"frames={frames}"),
            *(*settings, f"limit={limit}", f"steps={steps}", "samples=1", "batch=1", f"out='{folder}'"),
        )
        yield name, json.loads((folder / "metrics.json").read_text(encoding="utf-8")), memory


def describe(found: list[tuple[str, dict[str, Any], float]]) -> Iterator[str]:
    """Give the lines of the report."""
    yield f"{found[0][1]['n']} clips, one prediction of each; torch {torch.__version__}, {platform.machine()}\n"
    yield f"| rollout | peak MiB | over copy-last | {' | '.join(f'frame {frame}' for frame in SHOWN)} |"
    yield "| --- " * (3 + len(SHOWN)) + "|"
    for name, scores, memory in found:
        horizon = dict(zip(scores["horizon"]["frame"], scores["horizon"]["psnr"]["sample"], strict=True))
        cells = [f"{horizon[frame]:.1f}" if frame in horizon else "" for frame in SHOWN]
        yield f"| {name} | {memory:.0f} | {scores['gain']['sample']:+.2f} dB | {' | '.join(cells)} |"


def main() -> None:
    """Run the rollouts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    text = "\n".join(describe(list(predict(args.ckpt.absolute(), args.out.absolute(), args.limit, args.steps)))) + "\n"
    print(text)
    if args.report:
        args.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
