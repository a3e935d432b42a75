"""A training that the tests interrupt: python preempt_run.py OUT RANKS [SECONDS].

It tells of each step on stdout, takes so many seconds for the third, and tells of the signals received meanwhile.
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
    def __init__(self, pause: float, preemption: Preemption) -> None:
        self.pause, self.preemption = pause, preemption

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.is_global_zero:
            tell(f"step {pl_module.step}")
        end, received = time.monotonic() + (self.pause if pl_module.step == 3 else 0.05), set()
        while time.monotonic() < end:
            if received != self.preemption.received:
                received = set(self.preemption.received)
                tell("received")
            time.sleep(0.05)


def tell(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, ranks, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.05
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=120)) if ranks > 1 else "auto"
    preemption = Preemption()
    callbacks = (preemption, Tell(pause, preemption))
    module = make_module(accumulate=2)
    train(out, 100_000, module, Data(count=100), callbacks=callbacks, devices=ranks, strategy=strategy)
