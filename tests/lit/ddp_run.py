"""A training that the tests launch on one or two ranks: python ddp_run.py OUT SCENARIO RANKS."""

import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).parents[1]))
from praxino.callbacks.guard import FiniteGuard
from praxino.lit import parallel, vae
from training import Data, make_adversary, make_module, train

vae.compile_vae = partial(parallel.compile_vae, backend="aot_eager")  # all but the last stage of the compiler


def main(out: Path, scenario: str, ranks: int) -> None:
    torch.set_num_threads(1)
    options = {
        "devices": ranks,
        "strategy": DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=120), broadcast_buffers=False)
        if ranks > 1
        else "auto",
    }
    steps, resume, callbacks = 3, None, ()
    if scenario in ("plain", "accumulate"):
        accumulate = 2 if scenario == "accumulate" else 1
        module = make_module(
            optimizer=partial(torch.optim.SGD, lr=0.1), scheduler=None, sample_posterior=False, accumulate=accumulate
        ).double()
        data = Data(count=24, batch=4 // ranks)
        options |= {"precision": "64-true", "limit_val_batches": 1.0, "val_check_interval": 3 * accumulate}
        options |= {"check_val_every_n_epoch": None}
    elif scenario.startswith("gan"):  # its start, turns and statistics over the batch
        turns, double = "turns" in scenario, "64" in scenario
        module = make_module(
            optimizer=partial(torch.optim.SGD, lr=0.05),
            scheduler=None,
            sample_posterior=False,
            adversary=make_adversary(start=1, norm="batch", alternate=turns, lecam=0.1),
            compile="compile" in scenario,
        )
        module, steps = module.double() if double else module, 5
        data, options["precision"] = Data(count=24, batch=4 // ranks), "64-true" if double else "32-true"
    else:
        adversary = make_adversary(start=2, norm="batch", dropout=0.3) if scenario.endswith("gan") else None
        module, data = make_module(adversary=adversary), Data(count=24)
    if scenario.startswith("resume"):
        steps = 4 if "first" in scenario else 8  # epochs of 6 batches
        resume = out / "checkpoints" / "step-00000004.ckpt" if "second" in scenario else None
    if scenario == "bad":
        callbacks = (FiniteGuard(str(out / "faults")),)
        backward = module.manual_backward

        def poisoned(loss: torch.Tensor) -> None:
            bad = module.global_rank == 1 and module.step == 1 and module.skipped == 0
            backward(loss * float("nan") if bad else loss)

        module.manual_backward = poisoned
    train(out, steps, module, data, resume, callbacks, **options)
    torch.save(
        {
            "weights": torch.cat([p.detach().flatten() for p in module.parameters()]),
            "ema": torch.cat([p.flatten() for p in module.ema_net.parameters()]),
            "step": module.step,
            "skipped": module.skipped,
            "graphs": counters["stats"]["unique_graphs"],
        },
        out / f"rank{module.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
