"""An exponential moving average of the weights, kept beside them."""

import logging
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from praxino.errors import ConfigError
from praxino.lit.fsdp import load_weights
from praxino.lit.optim import local

log = logging.getLogger(__name__)


class EMA(pl.Callback):
    """Average the weights of `pl_module.net` into a frozen copy, `pl_module.ema_net`, which validation uses.

    Of a network in shards the copy lies in the same shards, and each rank averages its own.

    The copy lies outside of the module tree: it is never trained, wrapped or swapped in place. A checkpoint holds it as
    `ema`: `{"decay", "updates", "weights"}`. The module must have `net` and the counter `step`.

    Args:
        decay: share of the old average that an update keeps.
        ramp: begin with a short memory, min(decay, (1 + n) / (10 + n)) at update n.
        every: steps an update.
    """

    def __init__(self, decay: float = 0.999, ramp: bool = True, every: int = 1) -> None:
        if not 0 <= decay < 1 or every < 1:
            raise ConfigError(f"EMA decay={decay} must lie in [0, 1) and every={every} be at least 1")
        self.decay, self.ramp, self.every = decay, ramp, every
        self.updates = 0
        self._step = 0
        self._loaded: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Copy the network, or take the average of the checkpoint."""
        pl_module.__dict__["ema_net"] = pl_module.copy_net().requires_grad_(False).eval()
        self._go_on(pl_module)

    def _go_on(self, pl_module: Any) -> None:
        """Take the average of the checkpoint, if there is one."""
        if self._loaded is not None:
            load_weights(pl_module.ema_net, self._loaded["weights"])
            self.updates = self._loaded["updates"]
            self._loaded = None
        self._step = pl_module.step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update after a step that was made."""
        if pl_module.step != self._step:
            self._step = pl_module.step
            if self._step % self.every == 0:
                self.update(pl_module.net, pl_module.ema_net)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Follow the module to its device: a validation after training moves it there again."""
        if "ema_net" in pl_module.__dict__:
            pl_module.ema_net.to(pl_module.device)

    @torch.no_grad()
    def update(self, net: nn.Module, average: nn.Module) -> None:
        """Move the average towards the weights; copy the buffers."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.ramp else self.decay
        self.updates += 1
        torch._foreach_lerp_([local(p) for p in average.parameters()], [local(p) for p in net.parameters()], 1 - decay)
        targets: list[Tensor] = list(average.buffers())
        if targets:
            torch._foreach_copy_(targets, list(net.buffers()))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the average."""
        if "ema_net" in pl_module.__dict__:
            weights = dict(pl_module.ema_net.state_dict())
            checkpoint["ema"] = {"decay": self.decay, "updates": self.updates, "weights": weights}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the average until the network is on its device; of one in shards, which already is, take it now."""
        self._loaded = checkpoint.get("ema")
        if self._loaded is None:
            log.warning("the checkpoint holds no EMA: the average begins with its weights")
        if "ema_net" in pl_module.__dict__:
            if self._loaded is None:
                load_weights(pl_module.ema_net, pl_module.net.state_dict())
            self._go_on(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Follow the module back to the CPU."""
        if "ema_net" in pl_module.__dict__:
            pl_module.ema_net.to(pl_module.device)
