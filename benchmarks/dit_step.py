"""The cost of a denoiser's step: parameters, operations, seconds, MFU; Trainer against a raw loop; compiled or not.

    python benchmarks/dit_step.py                              # a CPU: tiny, latents 8x3x8x8 (9 frames, 64 pixels)
    python benchmarks/dit_step.py --nets dit_b dit_l --latent 16 5 32 32 --batch 16 --compile --precision bf16-mixed

A step is forward, backward, clipping, optimizer and, through the Trainer, average, finite guard and schedule. The
raw loop has the same network, loss, clipping and optimizer, and nothing else. Medians of `--steps`, the best
of `--repeats`. On a CPU the seconds of a conv unit (see vae_cpu.py) stand beside them, to compare machines by.
"""

import argparse
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from hydra import compose, initialize_config_dir
from torch.utils.data import DataLoader
from vae_cpu import Unit

from praxino.callbacks.ema import EMA
from praxino.config import conf_dir, instantiate, register_resolvers
from praxino.lit.dit import DiTModule
from praxino.lit.parallel import compile_blocks, peak_flops


class Latents(torch.utils.data.Dataset):
    """Random latents."""

    def __init__(self, shape: list[int], count: int) -> None:
        self.shape, self.count = shape, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"latent": torch.randn(self.shape, generator=generator), "first": True, "index": index, "path": ""}


class Clock(pl.Callback):
    """Takes the time of every step, wall and CPU."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        synchronize()
        self.times.append((time.perf_counter(), time.process_time()))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build(net: str, channels: int, compiled: bool) -> DiTModule:
    """Build the module of an experiment."""
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        cfg = compose("train", overrides=["experiment=dit_tiny", f"model/net={net}", "data.root=none", "out=none"])
    cfg.model.net.channels, cfg.model.compile = channels, compiled
    torch.manual_seed(0)
    return instantiate(cfg.model)


def spans(times: list[tuple[float, float]], warmup: int) -> dict[str, float]:
    """Return the medians of the steps after the first ones."""
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(times[warmup:], times[warmup + 1 :], strict=False)]
    wall, cpu = (statistics.median(column) for column in zip(*steps, strict=True))
    return {"wall": wall, "cpu": cpu}


def through_trainer(args: argparse.Namespace, net: str, compiled: bool) -> dict[str, float]:
    """Train by the Trainer."""
    module, clock = build(net, args.latent[0], compiled), Clock()
    total = args.warmup + args.steps + 1
    with TemporaryDirectory() as out:
        trainer = pl.Trainer(
            accelerator="auto", devices=1, precision=args.precision, max_steps=total, logger=False,
            callbacks=[EMA(), clock], enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=out, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, DataLoader(Latents(args.latent, args.batch * total), batch_size=args.batch))
    return spans(clock.times, args.warmup)


def raw(args: argparse.Namespace, net: str, compiled: bool) -> dict[str, float]:
    """Train by a plain loop."""
    module = build(net, args.latent[0], False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device)
    if compiled:
        compile_blocks(module.net.blocks)
    optimizer = module.make_optimizer(module.groups(""))
    clock = Clock()
    total = args.warmup + args.steps + 1
    for batch in DataLoader(Latents(args.latent, args.batch * total), batch_size=args.batch):
        z = batch["latent"].to(device)
        known = module.context.draw(len(z), z.shape[2])
        known = known.to(device) if known is not None else None
        _, cond = module.read({**batch, "latent": z, "first": batch["first"].to(device)}, sample=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16-mixed"):
            cond = type(cond)(**{**cond.given(), **({} if known is None else {"known": known})})
            loss = module.loss(partial(module.net, cond=cond), z, known=known)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.on_train_batch_end()
    return spans(clock.times, args.warmup)


def measure(args: argparse.Namespace, net: str, compiled: bool) -> dict[str, Any]:
    """Return the figures of one network."""
    module = build(net, args.latent[0], False)
    flops = 3 * args.batch * module.net.flops((1, *args.latent))
    unit, units, rounds = Unit(), [], []
    for _ in range(args.repeats):
        rounds.append((through_trainer(args, net, compiled), raw(args, net, compiled)))
        units.append(unit()[1])
    best = {
        name: {key: min(pair[i][key] for pair in rounds) for key in ("wall", "cpu")}
        for i, name in enumerate(("trainer", "raw"))
    }
    peak = peak_flops(torch.device("cuda")) if torch.cuda.is_available() else None
    return {
        "net": net,
        "compile": compiled,
        "parameters": sum(p.numel() for p in module.net.parameters()),
        "flops_per_step": flops,
        **best,
        "conv_unit_cpu": None if torch.cuda.is_available() else min(units),
        "trainer_over_raw": best["trainer"]["wall"] / best["raw"]["wall"],
        "mfu": None if peak is None else flops / best["trainer"]["wall"] / peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["dit_tiny"])
    parser.add_argument("--latent", nargs=4, type=int, default=[8, 3, 8, 8], metavar=("C", "T", "H", "W"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--compile", action="store_true", help="measure compiled blocks as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(args, net, on) for net in args.nets for on in ([False, True] if args.compile else [False])]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    result = {
        "device": device,
        "torch": torch.__version__,
        "args": {k: str(v) for k, v in vars(args).items()},
        "rows": rows,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
