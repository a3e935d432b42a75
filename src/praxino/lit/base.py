"""Manual optimisation that counts its own steps: what the training of every model has in common."""

import copy
import logging
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from praxino.errors import CheckpointError, ConfigError, NonFiniteError
from praxino.lit.optim import clip_gradients, gradient_norm, norms_by_block, parameter_groups, renew, seed_of
from praxino.lit.parallel import average

log = logging.getLogger(__name__)

COUNTERS = ("step", "epoch", "passes", "skipped", "bad_steps")


class StepModule(pl.LightningModule):
    """Train `net`, and whatever else learns beside it, on batches with "index" `(B,)` and "path".

    `step` counts the optimizer steps of the network and drives everything: schedules, noise, EMA, checkpoints, logs.
    It equals `trainer.global_step`. The noise of a step is a function of (seed, step, micro-batch, rank), so that a
    resumed run needs no state of a random generator.

    What learns are sets of weights under the prefix of what is logged of them: the network's under "". They have an
    optimizer each; only the network's is stepped through Lightning, which counts it. The others are no part of what DDP
    wraps: their gradients are averaged here.

    Args:
        net: the network.
        optimizer: makes the optimizer of parameter groups.
        scheduler: makes the schedule of an optimizer, advanced once a step; None keeps the learning rate.
        clip: largest norm of the gradient, of all that learns each; None never clips. Logged is the norm before.
        accumulate: batches an optimizer step; the last group of an epoch may be smaller and weighs its batches alike.
        decay: weight decay of all parameters, or of matrices and kernels only, without biases and norm gains.
        max_bad_steps: consecutive steps with a non-finite loss or gradient, each skipped, that end the run.
        seed: of the noise.
        compile: compile the network's blocks in place (`torch.compile`); the names of its weights stay.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None,
        clip: float | None,
        accumulate: int,
        decay: Literal["all", "matrices"],
        max_bad_steps: int,
        seed: int,
        compile: bool,
    ) -> None:
        super().__init__()
        if accumulate < 1 or max_bad_steps < 1 or (clip is not None and clip <= 0):
            raise ConfigError(
                f"accumulate={accumulate}, max_bad_steps={max_bad_steps} and clip={clip} must be positive "
                "(clip=null never clips)"
            )
        self.automatic_optimization = False
        self.net = net
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.clip, self.accumulate, self.decay = clip, accumulate, decay
        self.max_bad_steps, self.seed, self.compile_net = max_bad_steps, seed, compile

        self.step = 0  # optimizer steps of the network
        self.epoch = 0  # of the last batch; Lightning counts on when a training ends
        self.passes = 0  # steps that others made alone
        self.skipped = 0  # steps not made because something was not finite
        self.bad_steps = 0  # of these, without a good one since
        self.boundary = True  # no gradients are waiting: a checkpoint taken now is exact
        self.fault: dict[str, Any] | None = None  # what is known of a bad step, until the next batch
        self.latest: dict[str, float] = {}  # last logged values, for the progress bar
        self.gauges: dict[str, float] = {}  # values of callbacks, logged with the next training row
        self.batch_ended: float | None = None  # when the last batch was done with, on the monotonic clock
        self._group: list[dict[str, Any]] = []  # the micro-batches since the last step

    # ------------------------------------------------------------------------------- what a subclass fills in

    @abstractmethod
    def learners(self) -> dict[str, list[nn.Parameter]]:
        """Return the sets of weights that learn: the network's under "", others under their prefixes."""

    @abstractmethod
    def learn(self, batch: dict[str, Any], turn: tuple[str, ...], share: float) -> dict[str, Tensor]:
        """Add `share` of the gradients of a batch to the weights whose turn it is; return the values to log."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the "praxino" block of a checkpoint, from which the network can be rebuilt."""

    @abstractmethod
    def summary(self) -> str:
        """Return what is particular of the network, in a few words."""

    @abstractmethod
    def check_data(self, frames: int, size: Any, batch: int, manifest: Any) -> None:
        """Raise ConfigError unless clips of the data fit the network.

        Args:
            frames, size, batch: of clips of video.
            manifest: of a latent cache, None for videos.
        """

    def turn(self) -> tuple[str, ...]:
        """Return the prefixes of those who learn in this step."""
        return ("",)

    def groups(self, prefix: str) -> list[dict[str, Any]]:
        """Return one set of weights as the groups of its optimizer."""
        return parameter_groups(self.learners()[prefix], self.decay)

    def copy_net(self) -> nn.Module:
        """Return a copy of the network with its weights, to average them into."""
        return copy.deepcopy(self.net)

    def cost(self, batch: dict[str, Any]) -> dict[str, float]:
        """Return what a batch is worth, for gauges of the throughput: `clips`, and where it is known more."""
        return {"clips": len(batch["index"])}

    def optimizer_of(self, prefix: str) -> Callable[..., Optimizer]:
        """Return what makes the optimizer of one set of weights."""
        return self.make_optimizer

    def logs(self, turn: tuple[str, ...]) -> bool:
        """Tell whether the step that is being made will be logged."""
        if self._trainer is None:  # measured outside of a training
            return False
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = self.step + ("" in turn)
        return bool(every) and (step == 1 or step % every == 0)

    # ------------------------------------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Refuse what would silently train badly."""
        if self.trainer.precision not in ("32-true", "bf16-mixed", "64-true"):
            raise ConfigError(
                f"trainer.precision={self.trainer.precision} overflows, or rounds small steps of the weights away: "
                "use bf16-mixed or 32-true"
            )

    def configure_optimizers(self) -> Any:
        """Build an optimizer and a schedule for each set of weights."""
        optimizers = self._make_optimizers()
        return optimizers, [] if self.make_scheduler is None else [self.make_scheduler(o) for o in optimizers]

    def _make_optimizers(self) -> list[Optimizer]:
        try:
            return [self.optimizer_of(prefix)(self.groups(prefix)) for prefix in self.learners()]
        except ValueError as error:  # torch checks the ranges: a negative learning rate, betas outside of [0, 1)
            raise ConfigError(f"model.optimizer: {error}") from error

    def on_train_start(self) -> None:
        """Take the rates from the schedules, which may have changed; tell the loggers from where the run goes on."""
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(schedule := config.scheduler, LambdaLR):
                pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
                schedule._last_lr = [base * factor(schedule.last_epoch) for base, factor in pairs]
                for group, lr in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
                    group["lr"] = lr
        for logger in self.loggers:
            resume = getattr(logger, "resume", None)
            if callable(resume):
                resume(self.step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters."""
        checkpoint["train"] = {name: getattr(self, name) for name in COUNTERS}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters; refuse the state of another set of optimizers, which Lightning would load in part.

        Options of the optimizers are those of this run's configuration: rate, decay and others may be changed.
        """
        count = len(self.learners())
        expected = {"optimizer_states": count, "lr_schedulers": count if self.make_scheduler is not None else 0}
        for key, count in expected.items():
            if len(checkpoint.get(key, ())) != count:
                raise CheckpointError(
                    f"the checkpoint holds {len(checkpoint.get(key, ()))} {key}, this run has {count}: "
                    "resume with the configuration of its run, or take the weights alone with weights=PATH"
                )
        fresh = [optimizer.state_dict()["param_groups"] for optimizer in self._make_optimizers()]
        stored = [state["param_groups"] for state in checkpoint["optimizer_states"]]
        if [layout(groups) for groups in fresh] != [layout(groups) for groups in stored]:
            raise CheckpointError(
                "the checkpoint is of another optimizer, or of other groups of weights (optimizer, decay, freeze): "
                "resume with the configuration of its run, or take the weights alone with weights=PATH"
            )
        schedules = checkpoint.get("lr_schedulers") or [None] * len(stored)
        for prefix, *states in zip(self.learners(), stored, fresh, schedules, strict=True):
            for change in renew(*states):
                log.info("resumed with another %soptimizer: %s", prefix, change)
        for name in COUNTERS:
            setattr(self, name, checkpoint["train"].get(name, 0))

    # ------------------------------------------------------------------------------------------------ training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add the gradients of a batch; at the end of a group of `accumulate` make the step."""
        self.epoch = self.current_epoch
        micro = batch_idx % self.accumulate
        size = int(min(self.accumulate, self.trainer.num_training_batches - (batch_idx - micro)))
        self.boundary, self.fault = micro == size - 1, None
        torch.manual_seed(seed_of(self.seed, self.step + self.passes, micro, self.global_rank))

        turn = self.turn()
        values = self.learn(batch, turn, 1 / size)
        sample = {"index": batch.get("index"), "path": batch.get("path")}
        self._group.append({**sample, **{name: value.detach() for name, value in values.items()}})
        if self.boundary:
            self._make_step(turn)
            self._group = []

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Keep DDP from reducing gradients in all but the last backward of a group."""
        strategy = self.trainer.strategy
        waits = not self.boundary and isinstance(strategy, ParallelStrategy)
        with strategy.block_backward_sync() if waits else nullcontext():  # type: ignore[attr-defined]
            super().manual_backward(loss, *args, **kwargs)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the time, after all callbacks."""
        self.batch_ended = time.monotonic()

    def _make_step(self, turn: tuple[str, ...]) -> None:
        """Clip, step, advance the schedules; or skip the step on all ranks where anything is not finite."""
        names = [name for name in self._group[0] if name not in ("index", "path")]
        values = torch.stack([torch.stack([micro[name].double() for name in names]) for micro in self._group]).mean(0)
        learners = self.learners()
        average([p.grad for prefix in turn if prefix for p in learners[prefix] if p.grad is not None])
        norms = {prefix: gradient_norm(learners[prefix]) for prefix in turn}
        if not self._finite_everywhere(values, *norms.values()):
            self._skip_step(names, {f"{prefix}grad_norm": float(norm) for prefix, norm in norms.items()})
        else:
            shared: dict[str, float] = {}
            for prefix, norm in norms.items():
                shared |= {f"{prefix}grad_norm": float(norm), f"{prefix}lr": self._step_one(prefix, norm)}
            logs = self.logs(turn)
            self.step += "" in turn
            self.passes += "" not in turn
            self.bad_steps = 0
            if logs:
                average([values])
                row = dict(zip(names, values.tolist(), strict=True)) | shared | {"skipped": self.skipped}
                self._report({f"train/{name}": value for name, value in row.items()} | self.gauges)
        for prefix in turn:
            for parameter in learners[prefix]:
                parameter.grad = None

    def _step_one(self, prefix: str, norm: Tensor) -> float:
        """Step one optimizer and its schedule; return the learning rate of the step."""
        number = list(self.learners()).index(prefix)
        optimizers: Any = self.optimizers()
        optimizer = optimizers[number] if isinstance(optimizers, list) else optimizers
        lr: float = optimizer.param_groups[0]["lr"]
        clip_gradients(self.learners()[prefix], norm, self.clip)
        (optimizer.optimizer if prefix else optimizer).step()  # Lightning's wrapper counts
        if self.make_scheduler is not None:
            schedulers: Any = self.lr_schedulers()
            (schedulers[number] if isinstance(schedulers, list) else schedulers).step()
        return lr

    def _finite_everywhere(self, *values: Tensor) -> bool:
        """Tell whether losses and gradient norms are finite on every rank; the one synchronisation of a step."""
        finite = torch.stack([value.isfinite().all() for value in values]).all().float()
        if dist.is_initialized():
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        return bool(finite)

    def _skip_step(self, names: list[str], norms: dict[str, float]) -> None:
        """Count a bad step and keep what is known of it; raise NonFiniteError where there are too many in a row."""
        self.skipped += 1
        self.bad_steps += 1
        self.fault = {
            "step": self.step,
            "epoch": self.epoch,
            "rank": self.global_rank,
            "skipped": self.skipped,
            "bad_steps": self.bad_steps,
            **norms,
            "grad_norms": norms_by_block(self.net),
            "batches": [
                {
                    "seed": seed_of(self.seed, self.step + self.passes, number, self.global_rank),
                    "index": None if micro["index"] is None else micro["index"].tolist(),
                    "path": micro["path"],
                    **{name: float(micro[name]) for name in names},
                }
                for number, micro in enumerate(self._group)
            ],
        }
        log.warning("step %d skipped: loss or gradient not finite (%d in a row)", self.step + 1, self.bad_steps)
        if self.bad_steps >= self.max_bad_steps:
            raise NonFiniteError(
                f"{self.bad_steps} steps in a row after step {self.step} had a non-finite loss or gradient: "
                "lower the learning rate, or look at the batches named in the fault files"
            )

    def _report(self, metrics: dict[str, float]) -> None:
        """Write a row to every logger, under our own step; Lightning would count batches."""
        self.latest |= metrics
        for logger in self.loggers:
            logger.log_metrics({"epoch": self.epoch, **metrics}, step=self.step)


def layout(groups: list[dict[str, Any]]) -> list[tuple[int, list[str]]]:
    """Return how many weights each group of an optimizer's state has, and which options (a schedule adds one)."""
    return [(len(group["params"]), sorted(group.keys() - {"initial_lr"})) for group in groups]
