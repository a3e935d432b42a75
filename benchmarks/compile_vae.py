"""What `model.compile=true` costs and brings in a VAE's training with an adversary: its blocks compiled, or all of it.

    python benchmarks/compile_vae.py --out FILE.md
    python benchmarks/compile_vae.py --net wfvae_s --frames 33 --size 256 --whole      # also the network as one graph

The first step compiles; what the compiler has kept on disk is not used (`--cache DIR` goes on from what it left there).
Then steps, forward and backward of both players, eager and compiled in turn: medians of 5.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hydra import compose, initialize_config_dir
from torch._dynamo.utils import counters
from torch._functorch import config as functorch

from praxino.config import conf_dir, instantiate, register_resolvers
from praxino.lit.vae import VAEModule


def build(args: argparse.Namespace, way: str, device: torch.device) -> VAEModule:
    """Build the module of the training, to be stepped without a trainer."""
    settings = ["experiment=wfvae_tiny_gan", f"model/net={args.net}", "model.adversary.start=0", "out=none"]
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        cfg = compose("train", overrides=[*settings, f"model.compile={way == 'blocks'}"])
    torch.manual_seed(0)
    module: VAEModule = instantiate(cfg.model).to(device).train()
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    if way == "whole":
        functorch.donated_buffer = False  # the adaptive weight runs its backward pass three times
        module.net.compile(dynamic=False)
    return module


def step(module: VAEModule, video: torch.Tensor) -> float:
    """Return the seconds of forward and backward."""
    synchronize(video.device)
    start = time.perf_counter()
    with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
        module.learn({"video": video}, module.turn(), 1.0)
    synchronize(video.device)
    module.zero_grad()
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="wfvae_tiny")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    register_resolvers()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    video = torch.randint(256, (args.batch, args.frames, args.size, args.size, 3), dtype=torch.uint8).to(device)
    ways = ["eager", "blocks", *(["whole"] if args.whole else [])]
    modules = {way: build(args, way, device) for way in ways}
    first, graphs = {}, {}
    with TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(args.cache or folder)
        for way, module in modules.items():
            before = counters["stats"]["unique_graphs"]
            first[way] = step(module, video)
            graphs[way] = counters["stats"]["unique_graphs"] - before
        times: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(7):
            for way, module in modules.items():
                seconds = step(module, video)
                if repeat > 1:  # the first two are a warm-up
                    times[way].append(seconds)
    steps = {way: statistics.median(values) for way, values in times.items()}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, a CPU"
    lines = [
        f"{args.net}, {args.batch}x{args.frames}x{args.size}x{args.size}, on {machine}, {args.threads} threads, "
        f"torch {torch.__version__}; {'the compiler went on from its cache' if args.cache else 'nothing was cached'}.",
        "",
        "| way | graphs | first step, s | a step, ms (least to largest) | to eager |",
        "|---|---|---|---|---|",
    ]
    for way in ways:
        low, middle, high = (1000 * value for value in (min(times[way]), steps[way], max(times[way])))
        lines.append(
            f"| {way} | {graphs[way]} | {first[way]:.0f} | {middle:.0f} ({low:.0f} to {high:.0f}) "
            f"| {steps[way] / steps['eager']:.2f} |"
        )
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
