"""What an evaluation costs beside encoding and decoding alone: all of it, from reading the videos to the page.

Clips of moving shapes, as H.264 files, go through a WF-VAE. `alone` encodes and decodes tensors of the same number and
size that are in memory already. Both in turn, in one process; the best of the rounds. CPU time is that of this process,
without the workers that decode ahead of it.

    python benchmarks/evaluate.py [--clips 100] [--frames 17] [--size 128] [--rounds 3] [--device cpu] [--out FILE.md]
"""

import argparse
import os
import platform
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from praxino import checkpoint
from praxino.data.synthetic import make_dataset
from praxino.models.wfvae import WFVAE
from praxino.tasks.evaluate import evaluate


def make_vae(folder: Path, channels: int) -> WFVAE:
    """Save a VAE with random weights."""
    torch.manual_seed(0)
    vae = WFVAE(latent_dim=4, base_channels=channels, norm_type="layernorm", scale=[1.0] * 4, shift=[0.0] * 4)
    vae.initialize("fan_in")
    checkpoint.save_official(vae.eval(), folder)
    return vae


@torch.inference_mode()
def alone(vae: WFVAE, args: argparse.Namespace) -> list[float]:
    """Return the seconds of encoding and decoding, on the clock and of this process's CPU time."""
    vae = vae.to(args.device)
    x = torch.rand(args.batch, 3, args.frames, args.size, args.size, device=args.device) * 2 - 1
    begun = clocks()
    for _ in range(args.clips // args.batch):
        y = vae.decode(vae.encode(x).mode())
    y.sum().item()  # waits for the device
    return since(begun)


def clocks() -> list[float]:
    return [time.perf_counter(), time.process_time()]


def since(begun: list[float]) -> list[float]:
    return [now - then for now, then in zip(clocks(), begun, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--channels", type=int, default=64, help="of the VAE; WF-VAE-S has 128")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        work = Path(folder)
        root = make_dataset(work / "videos", videos=args.clips, val_videos=0, frames=args.frames + 8, size=args.size)
        vae = make_vae(work / "vae", args.channels)
        settings = {"data": {"root": str(root)}, "frames": args.frames, "size": args.size, "batch": args.batch}
        settings |= {"workers": args.workers, "device": args.device, "cache_dir": str(work / "cache")}
        evaluate(str(work / "first"), vae=str(work / "vae"), **{**settings, "limit": 2})  # scans and probes the files
        plain, whole, parts = [], [], {}
        for number in range(args.rounds):
            plain.append(alone(vae, args))
            begun = clocks()
            result = evaluate(str(work / f"out-{number}"), vae=str(work / "vae"), **settings)
            whole.append(since(begun))
            if whole[-1] == min(whole):
                parts = result["seconds"]
        assert result["n"] == args.clips
    a, b = min(plain), min(whole)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    text = (
        f"{args.clips} clips of {args.frames}x{args.size}x{args.size}, WF-VAE with {args.channels} channels, batch "
        f"{args.batch}, {args.workers} workers, {where}, torch {torch.__version__}\n\n"
        "| | seconds | ratio | of CPU time | ratio |\n| --- | --- | --- | --- | --- |\n"
        f"| encode and decode alone | {a[0]:.1f} | 1.00 | {a[1]:.1f} | 1.00 |\n"
        f"| the whole evaluation | {b[0]:.1f} | {b[0] / a[0]:.2f} | {b[1]:.1f} | {b[1] / a[1]:.2f} |\n\n"
        f"Beside its own encoding and decoding, as disturbed as it: {b[0] / (parts['encode'] + parts['decode']):.2f}.\n"
        f"Of the evaluation: {', '.join(f'{key} {value:.1f} s' for key, value in parts.items())}.\n"
    )
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
