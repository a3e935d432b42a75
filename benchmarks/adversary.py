"""What an adversary costs and brings in a short training: the same run without and with it, for both families.

    python benchmarks/adversary.py VIDEOS --out RUNS

Trains a tiny WF-VAE and a tiny CausalVAE for `--steps` steps, with wavelet loss where the network has coefficients and
LPIPS of random weights: it takes part in the gradients, but means nothing to the eye. Finished runs in RUNS are kept.
Printed are the validation PSNR against steps, and the discriminator's logits and accuracy over its last hundred steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LPIPS = ["model/lpips=random", "model.loss.lpips.net=alex", "model.loss.perceptual=0.1"]
ADVERSARY = [
    "model/adversary=patch3d",
    "model.adversary.discriminator.width=16",
    "model.adversary.discriminator.layers=3",
    "model.adversary.discriminator.norm=group",
    "model.adversary.discriminator.dropout=null",
    "model.adversary.weight=0.1",
]
RUNS = {
    "wfvae_tiny": ["experiment=wfvae_tiny"],
    "wfvae_tiny_gan": ["experiment=wfvae_tiny_gan"],  # the adversary has an optimizer of its own
    "causalvae_tiny": ["experiment=causalvae_tiny"],
    "causalvae_tiny_gan": ["experiment=causalvae_tiny", *ADVERSARY],
}


def train(videos: str, settings: list[str], steps: int, out: Path) -> list[dict[str, Any]]:
    """Train, unless the run is there already; return the rows that were logged."""
    log = out / "metrics.jsonl"
    if not log.exists():
        game = [f"model.adversary.start={steps // 2}", f"model.adversary.warmup={steps // 5}"]
        command = [
            *(sys.executable, str(ROOT / "train.py"), *settings, f"data.root='{videos}'"),
            *("frames=9", "size=64", "batch=2", "data.workers=0", "threads=1", "model/val_lpips=random", *LPIPS),
            *(f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps // 5}", f"checkpoint.every={steps}"),
            *(game if out.name.endswith("_gan") else []),
            f"out='{out}'",
        ]
        subprocess.run(command, check=True)
    return [json.loads(line) for line in log.read_text().splitlines()]


def last(rows: list[dict[str, Any]], key: str, steps: int) -> str:
    """Return the mean of a logged value over the last fifth of a run, and its range."""
    values = [row[key] for row in rows if key in row and row["step"] > steps * 4 // 5]
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


def main() -> None:
    """Train four times and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", help="a tree of videos to train and validate on")
    parser.add_argument("--out", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    table = []
    for name, settings in RUNS.items():
        rows = train(str(Path(args.videos).absolute()), settings, args.steps, args.out.absolute() / name)
        curve = [f"{row['val/psnr']:.2f}" for row in rows if "val/psnr" in row]
        skipped = max(row.get("train/skipped", 0) for row in rows)
        logits = [last(rows, f"train/disc_{key}", args.steps) for key in ("real", "fake", "accuracy")]
        ssim = next(row["val/ssim"] for row in reversed(rows) if "val/ssim" in row)
        table.append([name, ", ".join(curve), f"{ssim:.3f}", *logits, str(int(skipped))])
    columns = ("run", "validation PSNR, dB", "SSIM", "logits of real", "logits of fake", "accuracy", "steps skipped")
    for row in (columns, ["---"] * len(columns), *table):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
