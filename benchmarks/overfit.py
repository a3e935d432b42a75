"""Overfit on eight real clips, the first test of a video predictor: does it learn what it has seen?

    python benchmarks/overfit.py VIDEOS --out DIR

Takes the eight videos in which copying frame 4 predicts frames 5 to 16 worst, at 64x64, trains a tiny WF-VAE on clips
of these alone, caches the latents of their first 17 frames, trains a tiny DiT on them with 5 frames given, and predicts
the other 12. Printed is the PSNR over the predicted frames beside that of copying the last given frame, and of every
horizon. Finished stages in DIR are kept.
"""

import argparse
import json
import subprocess
from pathlib import Path

import torch

from praxino.data.transforms import Resize
from praxino.metrics.image import psnr
from praxino.video import Video, to_float

CONTEXT, FRAMES, SIZE, CLIPS = 5, 17, 64, 8


def copy_last(path: Path) -> float:
    """Return the PSNR of copying the last given frame, infinite for a video that is too short or stands still."""
    with Video(path) as video:
        if video.info.frames < FRAMES:
            return float("inf")
        resize = Resize(SIZE)(video.info.height, video.info.width)
        x = to_float(video.read(range(FRAMES), resize)[None])  # (1, 3, T, H, W)
    return float(psnr(x[:, :, CONTEXT:], x[:, :, CONTEXT - 1 : CONTEXT].expand(-1, -1, FRAMES - CONTEXT, -1, -1)))


def choose(videos: Path, folder: Path) -> None:
    """Link the eight videos that move most."""
    if folder.exists():
        return
    files = [path for path in sorted(videos.rglob("*")) if path.suffix in (".mp4", ".webm", ".mkv", ".mov", ".avi")]
    moving = sorted(files, key=copy_last)[:CLIPS]
    folder.mkdir(parents=True)
    for path in moving:
        (folder / path.name).symlink_to(path.absolute())
    print(f"clips: {', '.join(str(path.relative_to(videos)) for path in moving)}")


def run(done: Path, *command: str) -> None:
    """Run a command, unless what it makes is there."""
    if not done.exists():
        print("$", " ".join(command), flush=True)
        subprocess.run(command, check=True)


def main() -> None:
    """Run every stage and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae-steps", type=int, default=800)
    parser.add_argument("--dit-steps", type=int, default=1500)
    args = parser.parse_args()
    out = args.out.absolute()
    clips, vae, latents, dit, predicted = (out / name for name in ("clips", "vae", "latents", "dit", "predictions"))
    torch.set_num_threads(1)
    choose(args.videos.absolute(), clips)
    shape = [f"frames={FRAMES}", f"size={SIZE}"]
    train = ["praxino-train", "data.workers=0", "data.val_limit=8"]
    run(
        vae / f"checkpoints/step-{args.vae_steps:08d}.ckpt",
        *(*train, "experiment=wfvae_tiny", f"data.root='{clips}'", f"data.val_root='{clips}'", *shape, "batch=4"),
        *("data.follow_links=true", f"trainer.max_steps={args.vae_steps}", f"checkpoint.every={args.vae_steps}"),
        *("callbacks.ema.decay=0.99", f"out='{vae}'"),
    )
    run(
        latents / "manifest.jsonl", "praxino-encode", f"vae='{vae}'", f"data.root='{clips}'", *shape, f"out='{latents}'"
    )
    run(
        dit / f"checkpoints/step-{args.dit_steps:08d}.ckpt",
        *(*train, "experiment=dit_tiny", f"data.root='{latents}'", f"data.val_root='{latents}'"),
        *("model.context.probability=1.0", f"frames={FRAMES}", "batch=8", f"trainer.max_steps={args.dit_steps}"),
        *(f"checkpoint.every={args.dit_steps}", f"out='{dit}'"),
    )
    run(
        predicted / "metrics.json",
        *("praxino-predict", f"ckpt='{dit}'", f"input='{clips}'", f"context={CONTEXT}", f"frames={FRAMES}"),
        *("samples=8", "steps=10", f"out='{predicted}'"),
    )
    result = json.loads((predicted / "metrics.json").read_text())
    print("\n| predictor | PSNR, dB | over copy-last |\n| --- | --- | --- |")
    for name, value in result["psnr"].items():
        print(f"| {name} | {value:.2f} | {value - result['psnr']['copy_last']:+.2f} |")
    print("\nframe:", *result["horizon"]["frame"])
    for name, values in result["horizon"]["psnr"].items():
        print(f"{name}:", *(f"{value:.1f}" for value in values))


if __name__ == "__main__":
    main()
