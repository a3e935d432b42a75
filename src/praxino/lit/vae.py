"""The training of a video autoencoder: manual optimisation with a step counter of its own."""

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.autograd import grad
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from praxino.errors import CheckpointError, ConfigError, NonFiniteError
from praxino.lit.optim import clip_gradients, gradient_norm, norms_by_block, parameter_groups, seed_of
from praxino.lit.parallel import average, checkpoint_blocks, freeze_parts, frozen
from praxino.losses.adversarial import Adversary
from praxino.losses.perceptual import LPIPS
from praxino.losses.vae import VAELoss
from praxino.metrics.image import WINDOW, psnr, ssim
from praxino.models.vae import Output, VideoVAE
from praxino.video import to_float

log = logging.getLogger(__name__)

COUNTERS = ("step", "passes", "skipped", "bad_steps")


class Player(NamedTuple):
    """One side of the adversarial game, with the prefix of what is logged of it."""

    prefix: str
    weights: list[nn.Parameter]
    optimizer: Any
    scheduler: Any


class VAEModule(pl.LightningModule):
    """Train a `VideoVAE` on batches `{"video": uint8 (B, T, H, W, C), "index": (B,), "path": [...]}`.

    `step` counts the optimizer steps of the generator and drives everything: schedules, noise, EMA, checkpoints, logs.
    It equals `trainer.global_step`. The noise of a step is a function of (seed, step, micro-batch, rank), so that a
    resumed run needs no state of a random generator. An adversary learns on the same batches, by an optimizer of its
    own that Lightning does not count; it is no part of what DDP wraps, its gradients are averaged here.

    Args:
        net: the autoencoder.
        loss: what it minimises.
        optimizer: makes the optimizer of parameter groups, one for the network, one for the adversary.
        scheduler: makes the schedule of an optimizer, advanced once a step; None keeps the learning rate.
        adversary: discriminator and adversarial loss; None trains without.
        adversary_optimizer: makes the adversary's optimizer; None: as `optimizer`.
        clip: largest norm of the gradient, of network and adversary each; None never clips. The norm is logged as it
            was before.
        accumulate: batches an optimizer step; the last group of an epoch may be smaller and weighs its batches alike.
        decay: weight decay of all parameters, or of matrices and kernels only, without biases and norm gains.
        init: initialisation of the network, see `VideoVAE.initialize`.
        freeze: parts of the network that stay as they are, by the beginnings of their names, e.g. `[encoder]`.
        sample_posterior: decode a sample of the posterior rather than its mean.
        max_bad_steps: consecutive steps with a non-finite loss or gradient, each skipped, that end the run.
        seed: of the noise.
        compile: compile the network in place (`torch.compile`); the names of its weights stay.
        channels_last: memory layout of kernels and videos.
        checkpoint_activations: compute every block again in the backward pass: less memory, a third more time.
        val_lpips: perceptual distance of validation, usually AlexNet's.
    """

    kind = "vae"

    def __init__(
        self,
        net: VideoVAE,
        loss: VAELoss,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        adversary: Adversary | None = None,
        adversary_optimizer: Callable[..., Optimizer] | None = None,
        clip: float | None = 1.0,
        accumulate: int = 1,
        decay: Literal["all", "matrices"] = "all",
        init: Literal["default", "fan_in"] = "default",
        freeze: Sequence[str] = (),
        sample_posterior: bool = True,
        max_bad_steps: int = 5,
        seed: int = 0,
        compile: bool = False,
        channels_last: bool = False,
        checkpoint_activations: bool = False,
        val_lpips: LPIPS | None = None,
    ) -> None:
        super().__init__()
        if accumulate < 1 or max_bad_steps < 1 or (clip is not None and clip <= 0):
            raise ConfigError(
                f"accumulate={accumulate}, max_bad_steps={max_bad_steps} and clip={clip} must be positive "
                "(clip=null never clips)"
            )
        self.automatic_optimization = False
        self.net, self.loss, self.adversary, self.val_lpips = net, loss, adversary, val_lpips
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.make_adversary_optimizer = adversary_optimizer or optimizer
        self.clip, self.accumulate, self.decay = clip, accumulate, decay
        self.sample_posterior, self.max_bad_steps, self.seed = sample_posterior, max_bad_steps, seed
        self.compile_net, self.channels_last = compile, channels_last
        if init != "default":
            net.initialize(init)
        freeze_parts(net, freeze)
        if channels_last:
            net.channels_last()
        if checkpoint_activations:
            checkpoint_blocks(net)
        if adversary is not None:
            names = [name for name, _ in (*adversary.named_parameters(), *adversary.named_buffers())]
            self._ddp_params_and_buffers_to_ignore = [f"adversary.{name}" for name in names]

        self.step = 0  # optimizer steps of the generator
        self.passes = 0  # steps of the discriminator alone, where the two alternate
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
        """Build optimizers and schedules: the generator's, then the adversary's."""
        try:
            optimizers = [self.make_optimizer(parameter_groups(self.net.trainable_parameters(), self.decay))]
            if self.adversary is not None:
                weights = list(self.adversary.parameters())
                optimizers.append(self.make_adversary_optimizer(parameter_groups(weights, self.decay)))
        except ValueError as error:  # torch checks the ranges: a negative learning rate, betas outside of [0, 1)
            raise ConfigError(f"model.optimizer: {error}") from error
        return optimizers, [] if self.make_scheduler is None else [self.make_scheduler(o) for o in optimizers]

    def on_fit_start(self) -> None:
        """Compile in place; let all ranks begin with the same adversary."""
        if self.compile_net:
            self.net.compile()
        if self.adversary is not None and dist.is_initialized():
            for tensor in self.adversary.state_dict().values():
                dist.broadcast(tensor, 0)

    def on_train_start(self) -> None:
        """Tell the loggers that keep files from which step the run goes on."""
        for logger in self.loggers:
            resume = getattr(logger, "resume", None)
            if callable(resume):
                resume(self.step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters."""
        checkpoint["train"] = {name: getattr(self, name) for name in COUNTERS}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters; refuse the state of another set of optimizers, which Lightning would load in part."""
        count = 1 if self.adversary is None else 2
        expected = {"optimizer_states": count, "lr_schedulers": count if self.make_scheduler is not None else 0}
        for key, count in expected.items():
            if len(checkpoint.get(key, ())) != count:
                raise CheckpointError(
                    f"the checkpoint holds {len(checkpoint.get(key, ()))} {key}, this run has {count}: "
                    "resume with the configuration of its run, or take the weights alone with weights=PATH"
                )
        for name in COUNTERS:
            setattr(self, name, checkpoint["train"].get(name, 0))

    # ------------------------------------------------------------------------------------------------ training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add the gradients of a batch; at the end of a group of `accumulate` make the step."""
        micro = batch_idx % self.accumulate
        size = int(min(self.accumulate, self.trainer.num_training_batches - (batch_idx - micro)))
        self.boundary, self.fault = micro == size - 1, None
        torch.manual_seed(seed_of(self.seed, self.step + self.passes, micro, self.global_rank))

        generator, discriminator = self._turn()
        x = self.to_input(batch["video"])  # (B, C, T, H, W)
        with torch.set_grad_enabled(generator):
            output = self.net(x, sample=self.sample_posterior)
        terms: dict[str, Tensor] = {}
        if generator:
            loss, terms = self._generator_loss(x, output)
            with self._gradients_shared(self.boundary):
                self.manual_backward(loss / size)
        if discriminator:
            assert self.adversary is not None
            judged = self.adversary.discriminator_loss(
                x, output.recon, self.step, update=self.passes if self.adversary.alternate else None
            )
            (judged["loss"] / size).backward()
            terms |= {f"disc_{name}": value for name, value in judged.items()}
        self._group.append(
            {"index": batch.get("index"), "path": batch.get("path"), **{k: v.detach() for k, v in terms.items()}}
        )
        if self.boundary:
            self._optimizer_step((generator, discriminator), psnr(x, output.recon.detach()).mean())
            self._group = []

    def _turn(self) -> tuple[bool, bool]:
        """Tell whether the generator learns on this batch, and whether the discriminator does."""
        if self.adversary is None or self.step < self.adversary.start:
            return True, False
        if self.adversary.alternate:
            odd = (self.step + self.passes) % 2 == 1
            return not odd, odd
        return True, True

    def _generator_loss(self, x: Tensor, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what the network minimises, and the values to log."""
        terms = self.loss(x, output)
        nll = terms.pop("nll")
        loss = terms["loss"]
        if self.adversary is not None and (factor := self.adversary.factor(self.step)) > 0:
            with frozen(self.adversary):
                adversarial, _ = self.adversary.generator_loss(output.recon)
            gradients = []
            if self.adversary.adaptive is not None:  # the same on all ranks, as of their joint batch
                gradients = [grad(term, self.net.last_layer, retain_graph=True)[0] for term in (nll, adversarial)]
                average(gradients)
            weight = self.adversary.weigh(*gradients)
            loss = loss + factor * weight * adversarial
            terms |= {"loss": loss, "adversarial": adversarial, "adversarial_weight": factor * weight}
        return loss, terms

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the time, after all callbacks."""
        self.batch_ended = time.monotonic()

    def _optimizer_step(self, learns: tuple[bool, bool], psnr: Tensor) -> None:
        """Clip, step, advance the schedules; or skip the step on all ranks where anything is not finite."""
        players = [player for player, active in zip(self._players(), learns, strict=False) if active]
        names = [name for name in self._group[0] if name not in ("index", "path")]
        values = torch.stack([torch.stack([micro[name].double() for name in names]) for micro in self._group]).mean(0)
        if learns[1]:
            average([p.grad for p in players[-1].weights if p.grad is not None])
        norms = [gradient_norm(player.weights) for player in players]
        if self._finite_everywhere(values, *norms):
            shared: dict[str, float] = {}
            for player, norm in zip(players, norms, strict=True):
                lr = player.optimizer.param_groups[0]["lr"]
                shared |= {f"{player.prefix}grad_norm": float(norm), f"{player.prefix}lr": lr}
                clip_gradients(player.weights, norm, self.clip)
                player.optimizer.step()
                if player.scheduler is not None:
                    player.scheduler.step()
            self.step += learns[0]
            self.passes += not learns[0]
            self.bad_steps = 0
            self._report_step([*names, "psnr"], torch.cat([values, psnr.to(values)[None]]), shared, learns[1])
        else:
            self._skip_step(names, {f"{p.prefix}grad_norm": float(n) for p, n in zip(players, norms, strict=True)})
        for player in players:
            player.optimizer.zero_grad()

    def _players(self) -> list[Player]:
        """Return the generator, with Lightning's wrapper that counts, and the adversary, with a bare optimizer."""
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        if self.adversary is None:
            return [Player("", list(self.net.parameters()), optimizers, schedulers)]
        return [
            Player("", list(self.net.parameters()), optimizers[0], schedulers and schedulers[0]),
            Player("disc_", list(self.adversary.parameters()), optimizers[1].optimizer, schedulers and schedulers[1]),
        ]

    def _report_step(self, names: list[str], values: Tensor, shared: dict[str, float], judged: bool) -> None:
        """Log the means of this step over micro-batches and ranks, and what is the same on all of them."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = bool(every) and (self.step == 1 or self.step % every == 0)
        observes = judged and self.adversary is not None and self.adversary.lecam > 0
        if not due and not observes:
            return
        average([values])
        if observes and self.adversary is not None:
            self.adversary.observe(*(values[names.index(name)] for name in ("disc_real", "disc_fake")))
        if due:
            row = dict(zip(names, values.tolist(), strict=True)) | shared | {"skipped": self.skipped}
            self._report({f"train/{name}": value for name, value in row.items()} | self.gauges)

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
            "epoch": self.current_epoch,
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

    def _gradients_shared(self, share: bool) -> AbstractContextManager[Any]:
        """Keep DDP from reducing gradients in all but the last backward of a group."""
        strategy = self.trainer.strategy
        return nullcontext() if share or not isinstance(strategy, ParallelStrategy) else strategy.block_backward_sync()

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
            row = {"psnr": psnr(x, output.recon)[0], **self.loss(x, output), "latent_std": output.posterior.mean.std()}
            del row["nll"]
            if min(x.shape[-2:]) >= WINDOW:
                row["ssim"] = ssim(x, output.recon)[0]
            if self.val_lpips is not None and min(x.shape[-2:]) >= self.val_lpips.smallest:
                row["lpips"] = self.val_lpips(x, output.recon).mean()
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
            self.log_dict(metrics, logger=False, batch_size=1, sync_dist=True)  # for callbacks that monitor one

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
