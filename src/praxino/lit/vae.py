"""The training of a video autoencoder, with an adversary or without."""

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import grad
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from praxino.errors import ConfigError
from praxino.lit.base import StepModule
from praxino.lit.parallel import average, checkpoint_blocks, compile_vae, freeze_parts, frozen
from praxino.losses.adversarial import Adversary
from praxino.losses.perceptual import LPIPS
from praxino.losses.vae import VAELoss
from praxino.metrics.image import psnr
from praxino.metrics.suite import METRICS, PairSuite
from praxino.models.vae import Output, VideoVAE, check_clip, describe
from praxino.video import to_float

JUDGE = "disc_"  # the prefix of the adversary


class VAEModule(StepModule):
    """Train a `VideoVAE` on batches `{"video": uint8 (B, T, H, W, C), "index": (B,), "path": [...]}`.

    Args:
        net: the autoencoder.
        loss: what it minimises.
        optimizer, scheduler, clip, accumulate, decay, max_bad_steps, seed, compile: see `StepModule`.
        adversary: discriminator and adversarial loss; None trains without.
        adversary_optimizer: makes the adversary's optimizer; None: as `optimizer`.
        init: initialisation of the network, see `VideoVAE.initialize`.
        freeze: parts of the network that stay as they are, by the beginnings of their names, e.g. `[encoder]`.
        sample_posterior: learn from a sample of the posterior rather than its mean.
        channels_last: memory layout of kernels and videos.
        checkpoint_activations: compute every block again in the backward pass: less memory, a third more time.
        val_metrics: of validation, by the names that evaluation has for them.
        val_lpips: perceptual distance of validation, usually AlexNet's.
    """

    kind = "vae"
    net: VideoVAE

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
        val_metrics: Sequence[str] = ("psnr", "ssim"),
        val_lpips: LPIPS | None = None,
    ) -> None:
        super().__init__(net, optimizer, scheduler, clip, accumulate, decay, max_bad_steps, seed, compile)
        self.loss, self.adversary, self.val_lpips = loss, adversary, val_lpips
        self.make_adversary_optimizer = adversary_optimizer or optimizer
        self.sample_posterior, self.channels_last = sample_posterior, channels_last
        self.val_metrics = tuple(val_metrics)
        if unknown := set(val_metrics) - set(METRICS):
            raise ConfigError(f"val_metrics: {sorted(unknown)[0]} is unknown: use some of {', '.join(METRICS)}")
        if init != "default":
            if net.pretrained:
                raise ConfigError(f"init={init} would draw the weights of a pretrained network anew: use init=default")
            net.initialize(init)
        freeze_parts(net, freeze)
        if loss.weights["wavelet"] and not net.has_coefficients:
            raise ConfigError(
                f"loss.wavelet={loss.weights['wavelet']} needs a network with wavelet coefficients: "
                "use model=causalvae (or foreign) for this one, or model.loss.wavelet=0"
            )
        if adversary is not None and adversary.adaptive is not None and not net.last_layer.requires_grad:
            raise ConfigError(
                "freeze: the adversary's adaptive weight is measured at the decoder's last layer, which is frozen: "
                "use model.adversary.adaptive=null"
            )
        if channels_last:
            net.channels_last()
        if compile:
            compile_vae(net)
        if checkpoint_activations:
            checkpoint_blocks(net)
        if adversary is not None:
            names = [name for name, _ in (*adversary.named_parameters(), *adversary.named_buffers())]
            self._ddp_params_and_buffers_to_ignore = [f"adversary.{name}" for name in names]
        self.validated = -1  # step of the last validation
        self._rows: dict[int, dict[str, float]] = {}  # validation: sample index -> values

    @property
    def stride(self) -> tuple[int, int, int]:
        return self.net.stride

    def check_video(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless network and losses take videos of this shape."""
        self.net.check_video(shape)
        if self.loss.lpips is not None:
            self.loss.lpips.check_size(*shape[-2:])
        if self.adversary is not None:
            copy.deepcopy(self.adversary.discriminator).to("meta")(torch.empty(tuple(shape), device="meta"))

    # ------------------------------------------------------------------------------------------------ training

    def learners(self) -> dict[str, list[nn.Parameter]]:
        """Return the weights of the network and of the adversary."""
        generator = {"": self.net.trainable_parameters()}
        return generator if self.adversary is None else {**generator, JUDGE: list(self.adversary.parameters())}

    def describe(self) -> dict[str, Any]:
        """Return the "praxino" block of a checkpoint."""
        return describe(self.net)

    def summary(self) -> str:
        """Return stride and latent channels."""
        return f"stride {'x'.join(map(str, self.net.stride))}, {self.net.latent_channels} latent channels"

    def check_data(self, frames: int, size: Any, batch: int, manifest: Any) -> None:
        """Raise ConfigError unless clips of the data fit the network and its losses."""
        if manifest is not None:
            raise ConfigError("data=latents: a video autoencoder learns from videos: use data=video")
        check_clip(self.net if size is None else self, frames, size, batch)

    def optimizer_of(self, prefix: str) -> Callable[..., Optimizer]:
        """Return what makes the optimizer of network or adversary."""
        return self.make_adversary_optimizer if prefix == JUDGE else self.make_optimizer

    def on_fit_start(self) -> None:
        """Let all ranks begin with the same adversary, which DDP does not know."""
        if self.adversary is not None and dist.is_initialized():
            for tensor in self.adversary.state_dict().values():
                dist.broadcast(tensor, 0)

    def turn(self) -> tuple[str, ...]:
        """Return who learns in this step."""
        if self.adversary is None or self.step < self.adversary.start:
            return ("",)
        if self.adversary.alternate:
            return (JUDGE,) if (self.step + self.passes) % 2 else ("",)
        return ("", JUDGE)

    def learn(self, batch: dict[str, Any], turn: tuple[str, ...], share: float) -> dict[str, Tensor]:
        """Reconstruct; let the network learn from the loss, the adversary from the reconstruction."""
        x = self.to_input(batch["video"])  # (B, C, T, H, W)
        with torch.set_grad_enabled("" in turn):
            output = self.net(x, sample=self.sample_posterior)
        values: dict[str, Tensor] = {}
        if "" in turn:
            objective, values = self.generator_loss(x, output)
            self.manual_backward(share * objective)
        if JUDGE in turn and self.adversary is not None:
            update = self.passes if self.adversary.alternate else None
            judged = self.adversary.discriminator_loss(x, output.recon, self.step, update)
            (share * judged["loss"]).backward()
            if self.adversary.lecam:
                logits = torch.stack([judged["real"], judged["fake"]])
                average([logits])
                self.adversary.observe(*logits)
            values |= {f"{JUDGE}{name}": value for name, value in judged.items()}
        if self.logs(turn):
            values |= {"psnr": psnr(x, output.recon.detach().clamp(-1, 1), check=False).mean()}
        return values

    def generator_loss(self, x: Tensor, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what has the gradients of the network's loss, and the values to log: "loss" and what it is made of."""
        terms = self.loss(x, output)
        nll, rest = terms.pop("nll"), terms.pop("rest")
        if self.adversary is None or (factor := self.adversary.factor(self.step)) == 0:
            return terms["loss"], terms
        with frozen(self.adversary):
            adversarial = self.adversary.generator_loss(output.recon)
        # Both gradients are taken at the reconstruction once; from there they go to the last layer, where they are
        # weighed, as of the joint batch of all ranks, and together through the network.
        pulls = [grad(term, output.recon)[0] for term in (nll, adversarial)]
        weighed = []
        if self.adversary.adaptive is not None:
            weighed = [grad(output.recon, self.net.last_layer, pull, retain_graph=True)[0] for pull in pulls]
            average(weighed)
        weight = factor * self.adversary.weigh(*weighed)
        objective = (output.recon * (pulls[0] + weight.to(pulls[1]) * pulls[1])).sum() + rest
        loss = (terms["loss"] + weight * adversarial).detach()
        return objective, terms | {"loss": loss, "adversarial": adversarial, "adversarial_weight": weight}

    # ---------------------------------------------------------------------------------------------- validation

    @property
    def eval_net(self) -> VideoVAE:
        """The network that is judged and shown: the average of the weights where a callback keeps one."""
        return self.__dict__.get("ema_net") or self.net

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._rows = {}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Judge videos one by one, so that values do not depend on the batch, by the mode as evaluation does."""
        videos = self.to_input(batch["video"])
        recons = []
        for x, index in zip(videos.split(1), batch["index"].tolist(), strict=True):
            output = self.eval_net(x, sample=False)
            row = {**self.loss(x, output), "latent_std": output.posterior.mean.std()}
            del row["nll"], row["rest"]
            values = torch.stack([value.float() for value in row.values()]).tolist()
            self._rows[index] = {**self.judge(x, output.recon), **dict(zip(row, values, strict=True))}
            recons.append(output.recon)
        return {"input": videos, "recon": torch.cat(recons)}

    def judge(self, x: Tensor, recon: Tensor) -> dict[str, float]:
        """Return the scores of a video as evaluation has them, NaN for a reconstruction that is not finite."""
        distances = {} if self.val_lpips is None else {"lpips": self.val_lpips}
        suite = PairSuite((*self.val_metrics, *distances), distances=distances)
        if not recon.isfinite().all():
            return dict.fromkeys(suite.metrics, math.nan)
        scores = suite.score(x.float(), recon.float().clamp(-1, 1))
        return {name: float(scores[name]) for name in suite.metrics if not scores[name].isnan()}

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
