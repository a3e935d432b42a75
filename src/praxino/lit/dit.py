"""The training of a denoiser on latents of videos."""

import inspect
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from praxino.diffusion.loss import DiffusionLoss
from praxino.diffusion.noise import FrameNoise
from praxino.diffusion.solve import Solver
from praxino.errors import CheckpointError, ConfigError
from praxino.lit.base import StepModule
from praxino.lit.context import Context, forget
from praxino.lit.fsdp import FSDP, gathered, load_weights, shard
from praxino.lit.optim import block_groups, seed_of
from praxino.lit.parallel import compile_blocks, recompute_blocks
from praxino.models.conditioning import Condition
from praxino.models.denoiser import Denoiser, describe
from praxino.models.vae import VideoVAE, check_clip
from praxino.video import to_float


class DiTModule(StepModule):
    """Train a `Denoiser` on `{"latent": (B, C, T, H, W), "first", "label", "text", "text_mask", "index", "path"}`.

    Latents are normalised. In their place a batch may have `"video"`, uint8 `(B, T, H, W, C)`, which the frozen `vae`
    encodes. The VAE lies outside of the module tree: it is never trained, and no checkpoint holds its weights.

    Args:
        net: the denoiser.
        loss: path, times, prediction and weights of the diffusion.
        optimizer, scheduler, clip, accumulate, decay, max_bad_steps, seed: see `StepModule`.
        vae: the autoencoder, or where it lies: `attach` then gives it.
        context: the frames that are given.
        drop: probability of a clip to lose its `label` and its `text`, for guidance without a classifier.
        val_times: noise levels at which a validation sample is judged.
        preview_steps: Euler steps of the samples that validation shows.
        checkpoint_activations: compute every block again in the backward pass: less memory, a third more time.
        compile: compile every block in place.
    """

    net: Denoiser

    def __init__(
        self,
        net: Denoiser,
        loss: DiffusionLoss,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        vae: VideoVAE | str | None = None,
        context: Context | None = None,
        drop: Mapping[Literal["label", "text"], float] | None = None,
        clip: float | None = 1.0,
        accumulate: int = 1,
        decay: Literal["all", "matrices"] = "matrices",
        max_bad_steps: int = 5,
        seed: int = 0,
        compile: bool = False,
        checkpoint_activations: bool = False,
        val_times: int = 4,
        preview_steps: int = 20,
    ) -> None:
        super().__init__(net, optimizer, scheduler, clip, accumulate, decay, max_bad_steps, seed, compile)
        self.drop: dict[str, float] = {str(kind): value for kind, value in (drop or {}).items()}
        if any(not 0 <= value <= 1 for value in self.drop.values()) or val_times < 1 or preview_steps < 1:
            raise ConfigError(
                f"drop={self.drop} must lie in [0, 1], val_times={val_times} and preview_steps={preview_steps} "
                "be positive"
            )
        self.loss, self.context = loss, context or Context(probability=0.0)
        self.val_times, self.preview_steps = val_times, preview_steps
        self.checkpoint_activations = checkpoint_activations
        self.validated = -1  # step of the last validation
        self.previews = 0  # samples that a validation shows, set by who shows them
        self.shape: list[int] = []  # (C, T, H, W) of the latents learned last, T of the longest
        self.seen: list[int] = []  # (C, T, H, W) of the last batch
        self.fps: float | None = None  # frames a second of the clips
        self.reference: dict[str, Any] = {}  # what a checkpoint says of the VAE
        self.statistics: dict[str, Any] | None = None  # of the latents, for checkpoints
        self.classes: list[str] | None = None  # their names, for checkpoints
        self._described = describe(net)  # before it is sharded, which changes its class
        self._prepared = False
        self._rows: dict[int, dict[str, float]] = {}  # validation: sample index -> values
        self._flops: dict[tuple[int, ...], int] = {}
        self.attach(vae if isinstance(vae, VideoVAE) else None)

    def attach(self, vae: VideoVAE | None, reference: dict[str, Any] | None = None) -> None:
        """Take the autoencoder, in evaluation mode, and what a checkpoint is to say of it."""
        self.__dict__["vae"] = None if vae is None else vae.eval().requires_grad_(False)
        self.reference = dict(reference or {})
        if vae is not None and vae.latent_channels != self.net.channels:
            raise ConfigError(
                f"the VAE has {vae.latent_channels} latent channels, model.net takes {self.net.channels}: "
                f"use model.net.channels={vae.latent_channels}"
            )
        self.statistics = None if vae is None else vae.statistics

    # ------------------------------------------------------------------------------------------------ set-up

    def configure_model(self) -> None:
        """Recompute, compile and shard the blocks, in this order, once."""
        if self._prepared:
            return
        self._prepared = True
        if self.checkpoint_activations:
            recompute_blocks(self.net.blocks)
        if self.compile_net:
            compile_blocks(self.net.blocks)
        if isinstance(self.trainer.strategy, FSDP):
            self.shard(self.net)

    def shard(self, net: Denoiser) -> None:
        """Shard a network of this kind over all ranks, in place."""
        strategy: Any = self.trainer.strategy
        shard(net, net.blocks, strategy.device_mesh["data_parallel"], str(self.trainer.precision))

    def copy_net(self) -> nn.Module:
        """Return a copy of the network; of one in shards, in the same shards."""
        if not isinstance(self.trainer.strategy, FSDP):
            return super().copy_net()
        with torch.device("meta"):
            copy = type(self.net)(**self.net.config)
        self.shard(copy)
        copy.to_empty(device=self.device)
        load_weights(copy, self.net.state_dict())
        for own, buffer in zip(copy.buffers(), self.net.buffers(), strict=True):
            own.copy_(buffer)
        return copy

    def learners(self) -> dict[str, list[nn.Parameter]]:
        """Return the weights of the network."""
        return {"": [p for p in self.net.parameters() if p.requires_grad]}

    def groups(self, prefix: str) -> list[dict[str, Any]]:
        """Return the weights as groups that tell the matrices of the blocks from the rest."""
        return block_groups(self.net, self.net.blocks, self.decay)

    def describe(self) -> dict[str, Any]:
        """Return the "praxino" block of a checkpoint: network, diffusion, conditioning, latents and their VAE."""
        path = self.loss.path
        names = inspect.signature(type(path)).parameters
        return {
            **self._described,
            "diffusion": {
                "path": {"class": type(path).__name__, "config": {name: getattr(path, name) for name in names}},
                "prediction": self.loss.prediction,
                "per_frame": self.loss.per_frame,
            },
            "conditioning": {
                "drop": self.drop,
                "context": {
                    "probability": self.context.probability,
                    "frames": self.context.frames,
                    "noise": self.context.noise,
                },
            },
            "shape": self.shape,
            "fps": self.fps,
            "statistics": self.statistics,
            "vae": self.reference,
            "classes": self.classes,
        }

    def summary(self) -> str:
        """Return what the network takes and predicts."""
        kinds = ", ".join([*sorted(self.net.kinds), *(["context"] if self.context.probability else [])])
        return f"{self.net.channels} latent channels, predicts {self.loss.prediction} given {kinds or 'nothing'}"

    def check_data(self, frames: int, size: Any, batch: int, manifest: Any) -> None:
        """Raise ConfigError unless clips of the data fit the VAE and leave something to predict."""
        vae: VideoVAE | None = self.__dict__["vae"]
        if manifest is not None:
            if vae is not None:
                manifest.check_vae(self.reference.get("fingerprint"))
            self.statistics = dict(manifest.statistics)
            length = manifest.latents(frames) if frames else min(clip.shape[1] for clip in manifest.clips)
            self._check_classes(manifest.classes)
        else:
            vae = self.need_vae("data=video: videos cannot be encoded")
            check_clip(vae, frames, size)
            vae.normalize(torch.zeros(1, vae.latent_channels, 1, 1, 1))  # says it where the statistics are missing
            length = vae.latent_frames(frames)
        if vae is not None and self.statistics is not None:
            vae.set_statistics(self.statistics["mean"], self.statistics["std"])
        if self.context.probability:
            self.context.check(length)

    def _check_classes(self, classes: list[str] | None) -> None:
        have = len(classes or ())
        if self.net.classes is not None and have != self.net.classes:
            raise ConfigError(
                f"model.net.classes={self.net.classes}, the latents have {have} classes: use "
                f"model.net.classes={have or 'null'}"
            )
        self.classes = list(classes) if classes and self.net.classes else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters and what was known of the latents."""
        theirs = checkpoint["praxino"].get("vae", {}).get("fingerprint")
        ours = self.reference.get("fingerprint")
        if theirs and ours and theirs != ours:
            raise CheckpointError(
                f"the checkpoint learned the latents of another VAE ({theirs[:12]}, not {ours[:12]}): give that one"
            )
        learned, due = checkpoint["praxino"].get("diffusion", {}), self.describe()["diffusion"]
        if differing := [key for key in ("path", "prediction") if key in learned and learned[key] != due[key]]:
            raise CheckpointError(
                f"the checkpoint learned another diffusion (model.loss.{differing[0]} was {learned[differing[0]]}, is "
                f"{due[differing[0]]}): resume with that one, or take the weights alone with weights=PATH"
            )
        classes = checkpoint["praxino"].get("classes")
        for number, (was, name) in enumerate(zip(classes or (), self.classes or (), strict=False)):
            if was != name:
                raise CheckpointError(
                    f"class {number} is {name!r} in the latents and was {was!r} to the checkpoint: resume with latents "
                    "of the same classes in the same order, or take the weights alone with weights=PATH"
                )
        super().on_load_checkpoint(checkpoint)
        self.shape = list(checkpoint["praxino"].get("shape", ()))

    # ------------------------------------------------------------------------------------------------ training

    def on_train_start(self) -> None:
        """Take from the data what a checkpoint says of them."""
        super().on_train_start()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.fps = data.rate() if hasattr(data, "rate") else None

    def learn(self, batch: dict[str, Any], turn: tuple[str, ...], share: float) -> dict[str, Tensor]:
        """Learn to remove noise from a batch, some of it without label and text, some with given frames."""
        z, cond = self.read(batch, sample=True)  # (B, C, T, H, W)
        self.shape = [z.shape[1], max([z.shape[2], *self.shape[1:2]]), *z.shape[3:]]
        cond = forget(cond, self.drop)
        known = self.context.draw(len(z), z.shape[2])
        if known is not None:
            known = known.to(z.device)
            cond = replace(cond, known=known)
        terms = self.loss(partial(self.net, cond=cond), z, known=known, context_noise=self.context.noise)
        self.manual_backward(share * terms["loss"])
        return {"loss": terms["loss"], "mse": terms["mse"]}

    def read(self, batch: dict[str, Any], sample: bool) -> tuple[Tensor, Condition]:
        """Return the normalised latents of a batch, and the conditions in it that the network takes."""
        if "latent" in batch:
            z, first = batch["latent"], batch.get("first")
        else:
            z, first = self.encode(batch["video"], sample), None
        self.seen = list(z.shape[1:])
        if missing := sorted(self.net.kinds - batch.keys()):
            raise ConfigError(
                f"model.net takes {' and '.join(missing)}, which the data do not have: give them "
                "(folders or a table of classes; data.text=DIR), or build the network without"
            )
        taken = {kind: batch[kind] for kind in sorted(self.net.kinds)}
        mask = batch.get("text_mask") if "text" in taken else None
        if first is None:
            first = torch.ones(len(z), dtype=torch.bool, device=z.device)
        return z.to(next(self.net.parameters()).dtype), Condition(first=first, **taken, text_mask=mask)

    @torch.no_grad()
    def encode(self, video: Tensor, sample: bool) -> Tensor:
        """Encode uint8 videos `(B, T, H, W, C)` to normalised latents, by a sample of the posterior or by its mean."""
        vae = self.need_vae("data=video: a video cannot be encoded")
        posterior = vae.encode(to_float(video))
        return vae.normalize(posterior.sample() if sample else posterior.mode()).float()

    def need_vae(self, why: str) -> VideoVAE:
        """Return the VAE on the device of the network; raises ConfigError where there is none."""
        vae: VideoVAE | None = self.__dict__["vae"]
        if vae is None:
            raise ConfigError(f"{why} without a VAE: give model.vae=PATH")
        return vae.to(self.device)

    def cost(self, batch: dict[str, Any]) -> dict[str, float]:
        """Return clips, tokens and floating-point operations of a batch: forward and, twice that, backward."""
        clips = len(batch["index"])
        shape = tuple(self.seen)
        if shape not in self._flops:
            self._flops[shape] = self.net.flops((1, *shape))
        patch = self.net.config.get("patch", (1, 1, 1))
        tokens = 1
        for size, step in zip(shape[1:], patch, strict=True):
            tokens *= -(-size // step)
        return {"clips": clips, "tokens": clips * tokens, "flops": 3.0 * clips * self._flops[shape]}

    # ---------------------------------------------------------------------------------------------- validation

    @property
    def eval_net(self) -> Denoiser:
        """The network that is judged and shown: the average of the weights where a callback keeps one."""
        return self.__dict__.get("ema_net") or self.net

    def on_validation_start(self) -> None:
        """Put the weights together: ranks may have different numbers of samples."""
        self._rows = {}
        self.__dict__["whole"] = gathered(self.eval_net)
        self.__dict__["whole"].__enter__()

    def on_validation_end(self) -> None:
        """Go back to shards."""
        self.__dict__.pop("whole").__exit__(None, None, None)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Judge clips one by one, with noise and times that are a function of the sample's index alone."""
        z, cond = self.read(batch, sample=False)
        panels = []
        for number, index in enumerate(batch["index"].tolist()):
            one = Condition(**{name: value[number : number + 1] for name, value in cond.given().items()})
            self._rows[index] = self.judge(z[number : number + 1], one, index)
            if self.trainer.is_global_zero and len(self._rows) <= self.previews and self.__dict__["vae"] is not None:
                panels.append(self.preview(z[number : number + 1], one, index))
        return {"panels": panels}

    @torch.no_grad()
    def judge(self, z: Tensor, cond: Condition, index: int) -> dict[str, float]:
        """Return the losses of one clip, at the same noise and times each time: all of it, and with frames given."""
        count, length = self.val_times, z.shape[2]
        generator = torch.Generator().manual_seed(seed_of(self.seed, index))
        noise = torch.randn(count, *z.shape[1:], generator=generator).to(z)
        t = ((torch.arange(count) + 0.5) / count).to(z.device)
        share = self.context.probability
        masks: dict[str, Tensor | None] = {"free": None} if share < 1 else {}
        if share:
            masks["context"] = self.context.of(index, length).expand(count, -1).to(z.device)
        row: dict[str, float] = {}
        for name, known in masks.items():
            denoise = partial(self.eval_net, cond=replace(cond.repeat(count), known=known))
            row[f"loss_{name}"] = float(
                self.loss(denoise, z.expand(count, *z.shape[1:]), known=known, t=t, noise=noise)["loss"]
            )
        return {"loss": (1 - share) * row.get("loss_free", 0.0) + share * row.get("loss_context", 0.0), **row}

    @torch.no_grad()
    def preview(self, z: Tensor, cond: Condition, index: int) -> list[Tensor]:
        """Return truth, prediction from the context, and a sample without it, as videos `(C, T, H, W)`."""
        vae, length = self.need_vae("samples cannot be shown"), z.shape[2]
        noise = FrameNoise([seed_of(self.seed, index)], (z.shape[1], *z.shape[3:]), z.device)(0, length).to(z)
        solver = Solver(self.loss.path, self.loss.prediction, "euler", self.preview_steps)
        shown = [z]
        if self.context.probability:
            known = self.context.of(index, length).to(z.device)
            shown.append(solver(partial(self.eval_net, cond=replace(cond, known=known)), noise, known=known, given=z))
        if self.context.probability < 1:
            shown.append(solver(partial(self.eval_net, cond=cond), noise))
        return [vae.decode(vae.denormalize(x.float()))[0] for x in shown]

    def on_validation_epoch_end(self) -> None:
        """Log the means over all samples of all ranks, each sample once: the same for any number of ranks."""
        rows = self._rows
        if dist.is_initialized():
            gathered_rows: list[Any] = [None] * self.trainer.world_size
            dist.all_gather_object(gathered_rows, rows)
            rows = {index: row for part in gathered_rows for index, row in part.items()}
        if rows and not self.trainer.sanity_checking:
            names = rows[min(rows)]
            metrics = {f"val/{name}": statistics.fmean(rows[i][name] for i in sorted(rows)) for name in names}
            self._report(metrics)
            self.validated = self.step
            self.log_dict(metrics, logger=False, batch_size=1, sync_dist=True)  # for callbacks that monitor one
