"""WF-VAE on a CPU: encode and decode in conv units, what streaming costs, peak memory by length.

A conv unit is one `Conv3d(64, 64, 3, padding=1)` on `(1, 64, 9, 64, 64)` in float32, measured before and after every
timed call: a figure that travels between machines. The reference implementation (WF-VAE-S 4ch, 17x128x128, 2 threads)
takes 38.8 units to encode and 194.7 to decode.

    python benchmarks/vae_cpu.py [--threads 2] [--repeats 5] [--net s|tiny] [--channels-last] [--out FILE.md]
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from praxino import stream
from praxino.models.wfvae import WFVAE

REFERENCE = {"encode": 38.8, "decode": 194.7}
NETS = {"s": {"base": 128, "latent": 4}, "tiny": {"base": 16, "latent": 8}}
MEMORY = """
import resource, sys, torch
sys.path.insert(0, {here!r})
from vae_cpu import build
from praxino import stream
vae = build({net!r})
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
clips = (torch.rand(3, 8 if i else 1, {size}, {size}) for i in range(1 + {frames} // 8))
assert sum(y.shape[1] for y in stream.reconstruct(vae, clips, chunk=8)) == {frames}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident)
"""


def build(net: str) -> WFVAE:
    """Build a model of an official shape with random weights."""
    torch.manual_seed(0)
    base, latent = NETS[net]["base"], NETS[net]["latent"]
    vae = WFVAE(
        latent_dim=latent,
        base_channels=base,
        encoder_energy_flow_hidden_size=base,
        decoder_energy_flow_hidden_size=base,
        norm_type="layernorm",
        t_interpolation="trilinear",
    )
    return vae.eval()


class Unit:
    """The yardstick: seconds of wall and CPU time of one conv unit, now."""

    def __init__(self) -> None:
        self.conv = torch.nn.Conv3d(64, 64, 3, padding=1)
        self.x = torch.randn(1, 64, 9, 64, 64)

    def __call__(self) -> tuple[float, float]:
        wall, cpu = clock(lambda: [self.conv(self.x) for _ in range(5)])
        return wall / 5, cpu / 5


def clock(call: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Return the median conv units of each call, interleaved, by wall and by CPU time."""
    unit = Unit()
    unit()
    for call in calls.values():
        call()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            before, cost, after = unit(), clock(call), unit()
            samples[name].append(tuple(2 * c / (a + b) for c, a, b in zip(cost, before, after, strict=True)))
    return {
        name: {
            kind: statistics.median(values)
            for kind, values in zip(("wall", "cpu"), zip(*rows, strict=True), strict=True)
        }
        for name, rows in samples.items()
    }


def peak_memory(net: str, size: int, frames: int) -> float:
    """Return the peak MiB above the loaded model of a streamed reconstruction, in a process of its own."""
    code = MEMORY.format(here=str(Path(__file__).parent), net=net, size=size, frames=frames)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(run.stdout) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--net", choices=NETS, default="s")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)

    vae = build(args.net)
    if args.channels_last:
        vae.channels_last()
    x = torch.rand(1, 3, args.frames, args.size, args.size) * 2 - 1
    z = torch.randn(1, vae.latent_channels, (args.frames - 1) // 4 + 1, args.size // 8, args.size // 8)

    def half(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.autocast("cpu", torch.bfloat16):
                return call()

        return run

    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: vae.encode(x),
        "decode": lambda: vae.decode(z),
        "encode chunk 8": lambda: stream.encode(vae, x, chunk=8),
        "decode chunk 2": lambda: stream.decode(vae, z, chunk=2),
        "encode bf16": half(lambda: vae.encode(x)),
        "decode bf16": half(lambda: vae.decode(z)),
    }
    units = measure(calls, args.repeats)
    standard = (args.net, args.frames, args.size) == ("s", 17, 128)
    layout = "channels last" if args.channels_last else "as loaded"
    lines = [
        f"WF-VAE {args.net}, {args.frames}x{args.size}x{args.size}, {args.threads} threads, kernels {layout}, "
        f"median of {args.repeats}; {platform.machine()}, torch {torch.__version__}",
        "",
        "| | conv units (wall) | conv units (CPU) | reference (fp32, 2 threads) / ours |",
        "|---|---|---|---|",
    ]
    for name, row in units.items():
        ratio = f"{REFERENCE[name.split()[0]] / row['wall']:.2f}" if standard else ""
        lines.append(f"| {name} | {row['wall']:.1f} | {row['cpu']:.1f} | {ratio} |")
    memory = {frames: peak_memory(args.net, args.size, frames) for frames in (33, 129)}
    lines += [
        "",
        f"Peak memory above the loaded model, streamed reconstruction in chunks of 8: {memory[33]:.0f} MiB for 33 "
        f"frames, {memory[129]:.0f} MiB for 129, ratio {memory[129] / memory[33]:.2f}.",
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
