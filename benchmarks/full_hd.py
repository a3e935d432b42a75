"""What a card must hold to take a clip of 1088x1920 through a VAE: streamed, in tiles, their states on the host.

    python benchmarks/full_hd.py --out benchmarks/results/full_hd.md

Counted are the bytes of all tensors, fp32, without the weights: every operation of `stream.Encoder` and `Decoder` is
run on tensors without data, so a large net on large frames takes a minute. Pixels of the chunk under way are among
them, the rest of the clip and what waits on the host are not. From the third piece on nothing grows with the clip.
What kernels use beside their results is not seen; so the count stands beside measured peaks: the resident memory of a
process on the CPU, minus that of the loaded model and minus what waits for its turn.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from praxino import stream, tiling
from praxino.config import conf_dir, instantiate, register_resolvers
from praxino.models.vae import VideoVAE
from praxino.ops import causal
from praxino.ops.causal import Stream

FULL, SMALL = (1088, 1920), (512, 512)
COUNTED = [  # net, frames, size, chunk, tile, offload
    ("wfvae_s", 9, FULL, 4, 512, False),
    ("wfvae_s", 9, FULL, 4, 512, True),
    ("wfvae_s", 9, FULL, 4, None, False),
    ("wfvae_s", 5, SMALL, 4, 256, True),
    ("wfvae_tiny", 9, FULL, 4, 512, True),
]
MEASURED = [("wfvae_tiny", 9, SMALL, 4, 256, True), ("wfvae_s", 5, SMALL, 4, 256, True)]
Setting = tuple[str, int, tuple[int, int], int, int | None, bool]


class Ledger(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and of these the states that wait on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.waiting = self.at_work = self.peak = self.most_waiting = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.known:
                self.enter(tensor.untyped_storage())
        self.peak = max(self.peak, self.alive - self.waiting)
        return out

    def enter(self, storage: Any) -> None:
        self.known.add(storage)
        self.alive += storage.nbytes()
        weakref.finalize(storage, self.leave, storage.nbytes())

    def leave(self, size: int) -> None:
        self.alive -= size

    def move(self, held: Stream, device: torch.device) -> None:
        """Take the place of `Stream.to`."""
        size = sum(t.untyped_storage().nbytes() for t in held.tensors())
        self.waiting += size if device is tiling.HOST else -size
        self.at_work = self.at_work if device is tiling.HOST else self.waiting  # with one tile's on the device
        self.most_waiting = max(self.most_waiting, self.waiting)


def build(net: str) -> VideoVAE:
    """Build a network of `conf/model/net` with random weights."""
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        cfg = compose("train", overrides=[f"model/net={net}", "out=none"])
    vae: VideoVAE = instantiate(cfg.model.net)
    return vae.eval().requires_grad_(False)


def through(vae: VideoVAE, setting: Setting) -> None:
    """Take the first pieces of a clip through the VAE; the last one of a clip would leave nothing behind."""
    _, frames, size, chunk, tile, offload = setting
    encoder, decoder = stream.Encoder(vae, tile, offload=offload), stream.Decoder(vae, tile, offload=offload)
    for first in range(1 - chunk, frames, chunk):
        posterior = encoder.push(torch.rand(1, 3, min(chunk, first + chunk), *size))
        assert posterior is not None
        decoder.push(posterior.mode())


def count(setting: Setting) -> tuple[float, float]:
    """Return the peak of tensors on the device, and on the host of states that wait, in GiB."""
    with FakeTensorMode(), torch.no_grad(), patch.object(causal, "ONEDNN", False):  # which knows tensors of data only
        vae = build(setting[0])
        with Ledger() as ledger, watching(ledger):
            through(vae, setting)
    return ledger.peak / 2**30, ledger.most_waiting / 2**30


@contextmanager
def watching(ledger: Ledger) -> Iterator[None]:
    """Tell the ledger of states that move."""
    with patch.object(Stream, "to", lambda held, device: ledger.move(held, device)):
        yield


def measure(setting: Setting) -> None:
    """Print the peak of this process, without the model and what waits, in GiB, and seconds."""
    vae, ledger = build(setting[0]), Ledger()
    torch.set_grad_enabled(False)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    started = time.perf_counter()
    with watching(ledger):
        through(vae, setting)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
    print((peak - ledger.at_work) / 2**30, ledger.most_waiting / 2**30, time.perf_counter() - started)


def row(setting: Setting, *values: str) -> str:
    net, frames, (height, width), chunk, tile, offload = setting
    ways = f"chunks of {chunk}" + (f", tiles of {tile}" if tile else "") + (", offload" if offload else "")
    return f"| {net}, {frames}x{height}x{width} | {ways} | " + " | ".join(values) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", type=int, help="the number of a setting, in a process of its own")
    parser.add_argument("--measured", action="store_true", help="peaks of real processes, too: many minutes on a CPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure is not None:
        return measure(MEASURED[args.measure])
    lines = [
        "# A clip of 1080p on a small card",
        "",
        f"`python benchmarks/full_hd.py` on {platform.machine()}, a CPU; torch {torch.__version__}; fp32, GiB.",
        "",
        "| counted | ways | peak on the card, without weights | waits on the host |",
        "|---|---|---|---|",
    ]
    for setting in COUNTED:
        lines.append(row(setting, *(f"{value:.2f}" for value in count(setting))))
    if args.measured:
        lines += ["", "| measured on a CPU | ways | peak | counted | waits | seconds |", "|---|---|---|---|---|---|"]
    for number, setting in enumerate(MEASURED if args.measured else ()):
        command = [sys.executable, __file__, "--measure", str(number), "--threads", str(args.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        peak, waits, seconds = map(float, done.stdout.split())
        values = (f"{peak:.2f}", f"{count(setting)[0]:.2f}", f"{waits:.2f}", f"{seconds:.0f}")
        lines.append(row(setting, *values))
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
