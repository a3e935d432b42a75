"""A training that the tests interrupt: python preempt_run.py OUT RANKS [SECONDS].

It tells of each step on stdout, and takes so many seconds for the third.
"""

import sys
import time
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from praxino.callbacks.preemption import Preemption
from training import Data, make_module, train


class Tell(pl.Callback):
    def __init__(self, pause: float) -> None:
        self.pause = pause

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.is_global_zero:
            sys.stdout.write(f"step {pl_module.step}\n")
            sys.stdout.flush()
        time.sleep(self.pause if pl_module.step == 3 else 0.05)


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, ranks, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.05
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=120)) if ranks > 1 else "auto"
    callbacks = (Preemption(), Tell(pause))
    module = make_module(accumulate=2)
    train(out, 100_000, module, Data(count=100), callbacks=callbacks, devices=ranks, strategy=strategy)
