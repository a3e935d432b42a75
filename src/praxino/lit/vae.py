"""The training of a video autoencoder: manual optimisation with a step counter of its own."""

import logging
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from praxino.errors import CheckpointError, ConfigError, NonFiniteError
from praxino.lit.optim import clip_gradients, gradient_norm, norms_by_block, parameter_groups, seed_of
from praxino.losses.vae import VAELoss
from praxino.metrics.image import WINDOW, psnr, ssim
from praxino.models.vae import VideoVAE
from praxino.video import to_float

log = logging.getLogger(__name__)


class VAEModule(pl.LightningModule):
    """Train a `VideoVAE` on batches `{"video": uint8 (B, T, H, W, C), "index": (B,), "path": [...]}`.

    `step` counts the optimizer steps of the generator and drives everything: schedules, noise, EMA, checkpoints, logs.
    It equals `trainer.global_step`. The noise of a step is a function of (seed, step, micro-batch, rank), so that a
    resumed run needs no state of a random generator.

    Args:
        net: the autoencoder.
        loss: what it minimises.
        optimizer: makes the optimizer of parameter groups.
        scheduler: makes the schedule of the optimizer, advanced once a step; None keeps the learning rate.
        clip: largest norm of the gradient; None never clips. The norm is logged as it was before.
        accumulate: batches an optimizer step; the last group of an epoch may be smaller and weighs its batches alike.
        decay: weight decay of all parameters, or of matrices and kernels only, without biases and norm gains.
        init: initialisation of the network, see `VideoVAE.initialize`.
        sample_posterior: decode a sample of the posterior rather than its mean.
        max_bad_steps: consecutive steps with a non-finite loss or gradient, each skipped, that end the run.
        seed: of the noise.
        compile: compile the network in place (`torch.compile`); the names of its weights stay.
        channels_last: memory layout of kernels and videos.
    """

    kind = "vae"

    def __init__(
        self,
        net: VideoVAE,
        loss: VAELoss,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        clip: float | None = 1.0,
        accumulate: int = 1,
        decay: Literal["all", "matrices"] = "all",
        init: Literal["default", "fan_in"] = "default",
        sample_posterior: bool = True,
        max_bad_steps: int = 5,
        seed: int = 0,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if accumulate < 1 or max_bad_steps < 1 or (clip is not None and clip <= 0):
            raise ConfigError(
                f"accumulate={accumulate}, max_bad_steps={max_bad_steps} and clip={clip} must be positive "
                "(clip=null never clips)"
            )
        self.automatic_optimization = False
        self.net, self.loss = net, loss
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.clip, self.accumulate, self.decay = clip, accumulate, decay
        self.sample_posterior, self.max_bad_steps, self.seed = sample_posterior, max_bad_steps, seed
        self.compile_net, self.channels_last = compile, channels_last
        if init != "default":
            net.initialize(init)
        if channels_last:
            net.channels_last()

        self.step = 0  # optimizer steps of the generator
        self.skipped = 0  # steps not made because something was not finite
        self.bad_steps = 0  # of these, without a good one since
        self.validated = -1  # step of the last validation
        self.boundary = True  # no gradients are waiting: a checkpoint taken now is exact
        self.fault: dict[str, Any] | None = None  # what is known of a bad step, until the next batch
        self.latest: dict[str, float] = {}  # last logged values, for the progress bar
        self.gauges: dict[str, float] = {}  # values of callbacks, logged with the next training row
        self.batch_ended: float | None = None  # when the last batch was done with, on the monotonic clock
        self._group: list[dict[str, Any]] = []  # the micro-batches since the last step
        self._rows: dict[int, dict[str, float]] = {}  # validation: sample index -> values

    # ------------------------------------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Refuse what would silently train badly."""
        if self.trainer.precision not in ("32-true", "bf16-mixed", "64-true"):
            raise ConfigError(
                f"trainer.precision={self.trainer.precision} overflows, or rounds small steps of the weights away: "
                "use bf16-mixed or 32-true"
            )

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule."""
        try:
            optimizer = self.make_optimizer(parameter_groups(self.net.trainable_parameters(), self.decay))
        except ValueError as error:  # torch checks the ranges: a negative learning rate, betas outside of [0, 1)
            raise ConfigError(f"model.optimizer: {error}") from error
        return optimizer if self.make_scheduler is None else ([optimizer], [self.make_scheduler(optimizer)])

    def on_fit_start(self) -> None:
        """Compile in place."""
        if self.compile_net:
            self.net.compile()

    def on_train_start(self) -> None:
        """Tell the loggers that keep files from which step the run goes on."""
        for logger in self.loggers:
            resume = getattr(logger, "resume", None)
            if callable(resume):
                resume(self.step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters."""
        checkpoint["train"] = {"step": self.step, "skipped": self.skipped, "bad_steps": self.bad_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters; refuse the state of another set of optimizers, which Lightning would load in part."""
        expected = {"optimizer_states": 1, "lr_schedulers": int(self.make_scheduler is not None)}
        for key, count in expected.items():
            if len(checkpoint.get(key, ())) != count:
                raise CheckpointError(
                    f"the checkpoint holds {len(checkpoint.get(key, ()))} {key}, this run has {count}: "
                    "resume with the configuration of its run, or take the weights alone with weights=PATH"
                )
        counters = checkpoint["train"]
        self.step, self.skipped, self.bad_steps = counters["step"], counters["skipped"], counters["bad_steps"]

    # ------------------------------------------------------------------------------------------------ training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add the gradient of a batch; at the end of a group of `accumulate` make the step.

        The adversarial step belongs here: the generator's terms before its backward, the discriminator's own backward
        after it, and its own optimizer at the boundary, stepped without Lightning's wrapper, so that only the
        generator counts.
        """
        micro = batch_idx % self.accumulate
        size = int(min(self.accumulate, self.trainer.num_training_batches - (batch_idx - micro)))
        self.boundary, self.fault = micro == size - 1, None
        torch.manual_seed(seed_of(self.seed, self.step, micro, self.global_rank))

        x = self.to_input(batch["video"])  # (B, C, T, H, W)
        output = self.net(x, sample=self.sample_posterior)
        terms = self.loss(x, output)
        with self._gradients_shared(self.boundary):
            self.manual_backward(terms["loss"] / size)
        self._group.append(
            {"index": batch.get("index"), "path": batch.get("path"), **{k: v.detach() for k, v in terms.items()}}
        )
        if self.boundary:
            self._optimizer_step(terms=list(terms), x=x, recon=output.recon.detach())
            self._group = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the time, after all callbacks."""
        self.batch_ended = time.monotonic()

    def _optimizer_step(self, terms: list[str], x: Tensor, recon: Tensor) -> None:
        """Clip, step, advance the schedule; or skip the step on all ranks where anything is not finite."""
        optimizer: Any = self.optimizers()
        values = torch.stack([torch.stack([micro[name].double() for name in terms]) for micro in self._group]).mean(0)
        norm = gradient_norm(self.net.parameters())
        if self._finite_everywhere(values, norm):
            lr = optimizer.param_groups[0]["lr"]
            clip_gradients(self.net.parameters(), norm, self.clip)
            optimizer.step()
            if self.make_scheduler is not None:
                scheduler: Any = self.lr_schedulers()
                scheduler.step()
            self.step += 1
            self.bad_steps = 0
            every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
            if every and (self.step == 1 or self.step % every == 0):
                self._log_training(terms, values, {"grad_norm": float(norm), "lr": lr}, psnr(x, recon).mean())
        else:
            self._skip_step(terms, norm)
        optimizer.zero_grad()

    def _finite_everywhere(self, values: Tensor, norm: Tensor) -> bool:
        """Tell whether losses and gradient norm are finite on every rank; the one synchronisation of a step."""
        finite = (values.isfinite().all() & norm.isfinite()).float()
        if dist.is_initialized():
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        return bool(finite)

    def _skip_step(self, terms: list[str], norm: Tensor) -> None:
        """Count a bad step and keep what is known of it; raise NonFiniteError where there are too many in a row."""
        self.skipped += 1
        self.bad_steps += 1
        self.fault = {
            "step": self.step,
            "epoch": self.current_epoch,
            "rank": self.global_rank,
            "skipped": self.skipped,
            "bad_steps": self.bad_steps,
            "grad_norm": float(norm),
            "grad_norms": norms_by_block(self.net),
            "batches": [
                {
                    "seed": seed_of(self.seed, self.step, number, self.global_rank),
                    "index": None if micro["index"] is None else micro["index"].tolist(),
                    "path": micro["path"],
                    **{name: float(micro[name]) for name in terms},
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

    def _gradients_shared(self, share: bool) -> AbstractContextManager[Any]:
        """Keep DDP from reducing gradients in all but the last backward of a group."""
        strategy = self.trainer.strategy
        return nullcontext() if share or not isinstance(strategy, ParallelStrategy) else strategy.block_backward_sync()

    def _log_training(self, terms: list[str], values: Tensor, shared: dict[str, float], psnr: Tensor) -> None:
        """Log the means of this step over micro-batches and ranks, and what is the same on all of them."""
        values = torch.cat([values, psnr.to(values)[None]])
        if dist.is_initialized():
            dist.all_reduce(values)
            values = values / self.trainer.world_size
        row = dict(zip([*terms, "psnr"], values.tolist(), strict=True)) | shared | {"skipped": self.skipped}
        self._report({f"train/{name}": value for name, value in row.items()} | self.gauges)

    # ---------------------------------------------------------------------------------------------- validation

    @property
    def eval_net(self) -> VideoVAE:
        """The network that is judged and shown: the average of the weights where a callback keeps one."""
        return self.__dict__.get("ema_net") or self.net

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._rows = {}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Judge videos one by one, so that noise and values are a function of the sample's index alone."""
        videos = self.to_input(batch["video"])
        recons = []
        for x, index in zip(videos.split(1), batch["index"].tolist(), strict=True):
            generator = torch.Generator(x.device).manual_seed(seed_of(self.seed, index))
            output = self.eval_net(x, sample=self.sample_posterior, generator=generator)
            row = {"psnr": psnr(x, output.recon)[0], **self.loss(x, output)}
            if min(x.shape[-2:]) >= WINDOW:
                row["ssim"] = ssim(x, output.recon)[0]
            self._rows[index] = dict(zip(row, torch.stack([v.float() for v in row.values()]).tolist(), strict=True))
            recons.append(output.recon)
        return {"input": videos, "recon": torch.cat(recons)}

    def on_validation_epoch_end(self) -> None:
        """Log the means over all samples of all ranks, each sample once: the same for any number of ranks."""
        rows = self._rows
        if dist.is_initialized():
            gathered: list[Any] = [None] * self.trainer.world_size
            dist.all_gather_object(gathered, rows)
            rows = {index: row for part in gathered for index, row in part.items()}
        if rows and not self.trainer.sanity_checking:
            columns: dict[str, list[float]] = {}
            for index in sorted(rows):
                for name, value in rows[index].items():
                    columns.setdefault(f"val/{name}", []).append(value)
            metrics = {name: statistics.fmean(values) for name, values in columns.items()}
            self._report(metrics)
            self.validated = self.step
            self.log_dict(metrics, logger=False, batch_size=1)  # for callbacks that monitor one

    # -------------------------------------------------------------------------------------------------- common

    def to_input(self, video: Tensor) -> Tensor:
        """Convert uint8 `(B, T, H, W, C)` to the network's `(B, C, T, H, W)` in [-1, 1]."""
        x = to_float(video).to(next(self.net.parameters()).dtype)
        return x.contiguous(memory_format=torch.channels_last_3d) if self.channels_last else x

    def _report(self, metrics: dict[str, float]) -> None:
        """Write a row to every logger, under our own step; Lightning would count batches."""
        self.latest |= metrics
        for logger in self.loggers:
            logger.log_metrics({"epoch": self.current_epoch, **metrics}, step=self.step)
