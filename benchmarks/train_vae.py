"""A training of a video autoencoder with everything on: its curve, the cost of a step, what bf16 changes.

    python benchmarks/train_vae.py VIDEOS --minutes 20 --net wfvae_s --size 256 --batch 4 --lpips vgg   # one GPU
    python benchmarks/train_vae.py VIDEOS                                                               # a laptop's CPU

1. `train.py` for so many minutes, with the adversary and a perceptual loss: validation PSNR against steps.
2. Forward and backward on clips of `--step-frames` frames: of the network alone, with the perceptual loss, with the
   adversary; median of 5, interleaved, and the peak memory of the device.
3. The same latents decoded in bf16 and in fp32: the PSNR between the two.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hydra import compose, initialize_config_dir

import praxino
from praxino.config import conf_dir, instantiate, register_resolvers
from praxino.lit.vae import VAEModule
from praxino.metrics.image import psnr

ROOT = Path(__file__).parents[1]
PARTS = ("network", "and perceptual loss", "and adversary")


def settings(args: argparse.Namespace) -> list[str]:
    """Return the overrides of the training."""
    return [
        "experiment=wfvae_tiny_gan",
        f"trainer={'gpu' if torch.cuda.is_available() else 'cpu'}",
        f"model/net={args.net}",
        f"model/lpips={args.lpips}",
        f"frames={args.frames}",
        f"size={args.size}",
        f"batch={args.batch}",
        f"data.root='{Path(args.videos).absolute()}'",
        *args.overrides,
    ]


def train(args: argparse.Namespace, out: Path) -> list[dict[str, float]]:
    """Train for so many minutes; return the logged rows."""
    limit = f"+trainer.max_time={{minutes:{args.minutes}}}"
    subprocess.run([sys.executable, str(ROOT / "train.py"), *settings(args), limit, f"out='{out}'"], check=True)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def build(overrides: list[str], part: str, device: torch.device) -> VAEModule:
    """Build the module of a configuration outside of a trainer, up to a part of what its steps consist of."""
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        cfg = compose("train", overrides=[*overrides, "model.adversary.start=0", "out=none"])
    module: VAEModule = instantiate(cfg.model).to(device)
    if part != "and adversary":
        module.adversary = None
    if part == "network":
        module.loss.weights["perceptual"] = 0.0
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    return module.train()


def time_steps(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return the milliseconds of forward and backward of each part of the step."""
    video = torch.randint(256, (args.batch, args.step_frames, args.size, args.size, 3), dtype=torch.uint8).to(device)
    modules = {part: build(settings(args), part, device) for part in PARTS}
    samples: dict[str, list[float]] = {name: [] for name in modules}
    for repeat in range(6):
        for name, module in modules.items():
            synchronize(device)
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                module.learn({"video": video}, module.turn(), 1.0)
            synchronize(device)
            module.zero_grad()
            if repeat:  # the first is a warm-up
                samples[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in samples.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def compare_precisions(run: Path, frames: int, size: int, device: torch.device) -> float:
    """Return the PSNR between decodings in bf16 and fp32 of the same latents, in dB."""
    vae = praxino.load(run, device=device)
    first, step = vae.frame_rule
    x = torch.rand(1, 3, first + (frames - first) // step * step, size // 8, size // 8, device=device)
    x = torch.nn.functional.interpolate(2 * x - 1, scale_factor=(1, 8, 8), mode="trilinear")
    z = vae.encode(x).mode()
    with torch.autocast(device.type, torch.bfloat16):
        half = vae.decode(z)
    return float(psnr(vae.decode(z).float(), half.float()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos")
    parser.add_argument("--minutes", type=int, default=3)
    parser.add_argument("--net", default="wfvae_tiny")
    parser.add_argument("--lpips", default="random")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--step-frames", type=int, default=None)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/train_vae.md")
    args, args.overrides = parser.parse_known_args()
    args.step_frames = args.step_frames or args.frames
    register_resolvers()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, a CPU"

    with TemporaryDirectory() as folder:
        rows = train(args, Path(folder) / "run")
        steps = time_steps(args, device)
        bf16 = compare_precisions(Path(folder) / "run", args.frames, args.size, device)

    curve = [row for row in rows if "val/psnr" in row]
    lines = [
        "# A training with everything on",
        "",
        f"`python benchmarks/train_vae.py VIDEOS {' '.join(sys.argv[2:])}` on {machine}; torch {torch.__version__}.",
        "",
        f"{args.minutes} minutes, clips of {args.frames} frames and {args.size} px, batch {args.batch}:",
        "",
        "| step | val PSNR | val SSIM |",
        "|---|---|---|",
        *[f"| {row['step']} | {row['val/psnr']:.2f} | {row.get('val/ssim', float('nan')):.3f} |" for row in curve],
        "",
        f"| part of a step at {args.batch} x {args.step_frames}x{args.size}x{args.size} | ms | to the network alone |",
        "|---|---|---|",
        *[f"| {name} | {ms:.0f} | {ms / steps['network']:.2f} |" for name, ms in steps.items()],
        "",
        f"bf16 against fp32, decoding the same latents: {bf16:.1f} dB.",
    ]
    if device.type == "cuda":
        lines.append(f"Peak memory of the steps: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB.")
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
