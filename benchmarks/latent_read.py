"""Windows of latents per CPU second: the cache of praxino-encode against one `.pt` file a window.

    python benchmarks/latent_read.py [--rounds 7] [--windows 2000] [--out benchmarks/results/latent_read.md]

The cache holds moments of clips of 9 latents, 32 x 32 cells, 8 channels, in bf16; a window is 5 of these latents. Each
`.pt` file holds the moments of one window, in bf16 as well, and is read whole. Both methods bring the same values into
memory of their own (a view of the mapped shard would not count as read); they take turns in random order over the same
windows, with the page cache warm; CPU time is that of the process.
"""

import argparse
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from praxino.data.latent_file import ShardWriter
from praxino.data.latents import LatentClip, LatentReader, Manifest, read_manifest, write_manifest

CHANNELS, SIDE, LATENTS, WINDOW, SHARDS, CLIPS = 8, 32, 9, 5, 8, 125


def make_cache(root: Path) -> Manifest:
    """Write shards of random moments."""
    clips: list[LatentClip] = []
    shards, shape = [], (CHANNELS, LATENTS, SIDE, SIDE)
    for number in range(SHARDS):
        with ShardWriter(root / f"shard-{number:05d}.safetensors", root / "temporary") as writer:
            for _ in range(CLIPS):
                name = f"{len(clips)}.mp4"
                clips.append(LatentClip(name, "", 0, 4 * LATENTS - 3, 25.0, shape, number, writer.length))
                writer.add(torch.randn(LATENTS, 2 * CHANNELS, SIDE, SIDE).bfloat16())
            digest = writer.close()
        shards.append({"name": writer.path.name, "bytes": writer.path.stat().st_size, "sha256": digest})
    write_manifest(root / "manifest.jsonl", {"shards": shards}, clips)
    return read_manifest(root)


def cpu(read: Callable[[int], Tensor], order: list[int]) -> float:
    """Return windows per CPU second."""
    begin = time.process_time()
    for window in order:
        read(window)
    return len(order) / (time.process_time() - begin)


def measure(root: Path, rounds: int, count: int) -> dict[str, float]:
    """Return windows per CPU second of each method, the median over rounds."""
    torch.manual_seed(0)
    chance = random.Random(0)
    manifest = make_cache(root)
    reader = LatentReader(manifest)
    windows = [(manifest.clips[k % len(manifest.clips)], chance.randint(0, LATENTS - WINDOW)) for k in range(count)]
    for k, (clip, start) in enumerate(windows):
        torch.save(reader.read(clip, start, WINDOW).contiguous(), root / f"{k}.pt")
    methods: dict[str, Callable[[int], Tensor]] = {
        "one .pt file a window, torch.load(weights_only=True)": lambda k: torch.load(
            root / f"{k}.pt", weights_only=True
        ),
        "praxino's cache, shards kept open": lambda k: reader.read(*windows[k], WINDOW).contiguous(),
    }
    one, other = methods.values()
    assert all(torch.equal(one(k), other(k)) for k in range(count))
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        order = chance.sample(range(count), count)
        for name in chance.sample(list(methods), len(methods)):
            found[name].append(cpu(methods[name], order))
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--windows", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.rounds, arguments.windows)
    base = next(iter(found.values()))
    rows = [f"| {name} | {rate:,.0f} | {rate / base:.1f} |" for name, rate in found.items()]
    lines = [
        "# Windows of latents: reading per CPU second against one file a sample",
        "",
        f"`python benchmarks/latent_read.py --rounds {arguments.rounds} --windows {arguments.windows}` on a 2-core "
        f"{platform.machine()} CPU; torch {torch.__version__}, 1 thread.",
        f"A window is {WINDOW} of {LATENTS} latents of {SIDE}x{SIDE} cells, mean and log-variance of {CHANNELS} "
        "channels in bf16 (160 KiB), copied to memory of its own; interleaved, page cache warm, median of rounds.",
        "",
        "| method | windows per CPU second | times as many |",
        "|---|---|---|",
        *rows,
    ]
    text = "\n".join(lines) + "\n"
    if arguments.out is not None:
        arguments.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
