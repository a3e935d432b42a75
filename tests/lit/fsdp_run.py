"""A training of a denoiser that the tests launch on ranks: python fsdp_run.py OUT SCENARIO RANKS [RESUME]."""

import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).parents[1]))
from dit_training import FixedLoss, LatentBatches, make_dit, make_net
from praxino.callbacks.checkpoint import Checkpoint
from praxino.diffusion.path import RectifiedFlow
from praxino.diffusion.time import UniformTime
from praxino.lit import dit, parallel
from praxino.lit.context import Context
from praxino.lit.fsdp import FSDP, gather
from praxino.lit.optim import MuonAdamW, local
from training import train

dit.compile_blocks = partial(parallel.compile_blocks, backend="aot_eager")  # all but the last stage of the compiler
VALIDATE = {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}


def main(out: Path, scenario: str, ranks: int, resume: Path | None) -> None:
    """Scenarios are words and steps: ddp or fsdp, sharded, muon, adamw, momentum, recompute, compile, bf16, ..."""
    torch.set_num_threads(1)
    kind, *words, steps = scenario.split("-")
    options: dict = dict(VALIDATE)
    if kind == "fsdp":
        options["strategy"] = FSDP("sharded" in words, process_group_backend="gloo", timeout=120)
    elif ranks > 1:
        options["strategy"] = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=120))
    optimizer = partial(MuonAdamW, lr=1e-3) if "muon" in words else partial(torch.optim.SGD, lr=0.1)
    if "momentum" in words:  # an optimizer with a state, and one that does not divide what rounding makes differ
        optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    if "adamw" in words:
        optimizer = partial(torch.optim.AdamW, lr=1e-2)
    module = make_dit(
        net=make_net(width=32, depth=2),
        loss=FixedLoss(RectifiedFlow(), UniformTime()),
        optimizer=optimizer,
        scheduler=None,
        clip=0.05,  # always
        context=Context(1.0, [1]),
        drop={},
        accumulate=2 if "accumulate" in words else 1,
        checkpoint_activations="recompute" in words,
        compile="compile" in words,
    )
    if "double" in words:
        module, options["precision"] = module.double(), "64-true"
    if "bf16" in words:
        options["precision"] = "bf16-mixed"
    data = LatentBatches(count=24, batch=4 // ranks, val_batch=1)
    if "best" in words:  # of all runs beside this one
        options["callbacks"] = (Checkpoint(str(out.parent / "best"), every=None, monitor="val/loss"),)
    trainer = train(out, int(steps), module, data, resume, devices=ranks, **{"every": 4, **options})
    weights, ema = (gather(dict(net.state_dict()), True) for net in (module.net, module.ema_net))
    torch.save(
        {
            "weights": torch.cat([value.flatten() for value in weights.values()]),
            "ema": torch.cat([value.flatten() for value in ema.values()]),
            "step": module.step,
            "graphs": counters["stats"]["unique_graphs"],
            "local": sum(local(p).numel() for p in module.parameters()),
            "ema_local": sum(local(p).numel() for p in module.ema_net.parameters()),
        },
        out / f"rank{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]) if len(sys.argv) > 4 else None)
