"""The demo on several seeds of its DiT: predictions against copying the last frame, samples against real clips.

    make demo
    python benchmarks/demo.py demo --out RUNS [--seeds 0 1 2] [--report FILE.md]

Each seed begins with the VAE and the latents of the finished demo and goes through the remaining stages of
`praxino-pipeline`. The seed that made the demo is read, not trained again. What counts was fixed before any of them was
trained: the PSNR of the mean of 8 predictions of every held-out clip, over the frames that are not given.
"""

import argparse
import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

LATER = ("dit", "sample", "predict", "evaluate")  # stages that a seed of the DiT changes


def run_seed(demo: Path, out: Path, seed: int) -> Path:
    """Return the folder of a demo whose DiT has this seed."""
    if seed == 0:
        return demo
    folder = out / f"seed-{seed}"
    if not folder.exists():
        shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("gallery", *LATER, *(f"{s}.json" for s in LATER)))
    subprocess.run(["praxino-pipeline", "experiment=demo", f"out='{folder}'", f"+dit.seed={seed}"], check=True)
    return folder


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def describe(folders: dict[int, Path]) -> Iterator[str]:
    """Give the lines of the report."""
    predict = {seed: read(folder / "predict/metrics.json") for seed, folder in folders.items()}
    samples = {seed: read(folder / "evaluate/metrics.json") for seed, folder in folders.items()}
    first = next(iter(predict.values()))
    yield (
        f"{first['n']} held-out clips, {first['context']} of {first['frames']} frames given, {first['samples']} "
        f"predictions of each; torch {torch.__version__}, {platform.machine()}\n"
    )
    yield "| seed | mean of all | one | copy-last | mean over copy-last | one over copy-last | floor to ceiling |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for seed, scores in predict.items():
        psnr, gain = scores["psnr"], scores["gain"]
        yield (
            f"| {seed} | {psnr['mean']:.2f} dB | {psnr['sample']:.2f} dB | {psnr['copy_last']:.2f} dB | "
            f"**{gain['mean']:+.2f} dB** | {gain['sample']:+.2f} dB | {100 * samples[seed]['position']:.1f} % |"
        )
    yield "\nPSNR by frame, dB:\n"
    yield f"| seed | of | {' | '.join(str(frame) for frame in first['horizon']['frame'])} |"
    yield "| --- " * (2 + len(first["horizon"]["frame"])) + "|"
    for seed, scores in predict.items():
        for name, values in scores["horizon"]["psnr"].items():
            yield f"| {seed} | {name} | {' | '.join(f'{value:.1f}' for value in values)} |"


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    folders = {seed: run_seed(args.demo.absolute(), args.out.absolute(), seed) for seed in args.seeds}
    text = "\n".join(describe(folders)) + "\n"
    print(text)
    if args.report:
        args.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
