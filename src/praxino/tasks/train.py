"""Train: a composed configuration becomes data, model, callbacks and trainer, and `trainer.fit` does the rest."""

import inspect
import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from pydantic import Field, PositiveInt
from torch import Tensor

from praxino import checkpoint
from praxino.callbacks.checkpoint import Checkpoint
from praxino.callbacks.progress import SCORES
from praxino.callbacks.record import RunLog, SafeLogger
from praxino.config import check, instantiate, plain, redacted, report, type_error
from praxino.data.module import SyntheticData
from praxino.data.pool import cores
from praxino.errors import CheckpointError, ConfigError
from praxino.lit.base import StepModule
from praxino.models.vae import VideoVAE
from praxino.shards import is_sharded
from praxino.tasks.attach import attach, fill_in, keep_vae
from praxino.tasks.console import quiet_lightning
from praxino.tasks.rundir import check_outside, describe_run, make_directory

log = logging.getLogger(__name__)

# what no constructor checks
SETTINGS = {
    "out": str,
    "seed": Annotated[int, Field(ge=0, lt=2**32)],
    "ckpt": str | None,
    "weights": str | None,
    "threads": PositiveInt | None,
}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train the model of a configuration; return the step reached and the last metrics.

    Raises:
        PraxinoError: what can go wrong, in one message.
    """
    if cfg.data.get("root") is None:
        shapes_instead(cfg)
    fill_in(cfg)
    check(cfg)
    report([f"{key}: {why}" for key, hint in SETTINGS.items() if (why := type_error(hint, plain(cfg[key])))])
    if cfg.trainer.get("val_check_interval") == 0:
        raise ConfigError(
            "trainer.val_check_interval=0: use a positive number; trainer.limit_val_batches=0 never validates"
        )
    data = instantiate(cfg.data)
    if not hasattr(data, "manifest"):  # a tree that is scanned
        check_outside(cfg.out, {f"data.{key}": getattr(data, key, None) for key in ("root", "val_root")})
    out = make_directory(cfg.out)
    resume = resume_from(cfg.ckpt, out)
    quiet_lightning()
    pl.seed_everything(cfg.seed, workers=False, verbose=False)

    model: StepModule = instantiate(cfg.model)
    attach(model, cfg, out)
    model.check_data(cfg.frames, plain(cfg.size), cfg.batch, getattr(data, "manifest", None))
    if cfg.weights is not None:
        load_weights(model, cfg.weights)
    if resume is not None:
        check_resume(model, resume)
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values() if callback]
    for callback in callbacks:
        if isinstance(callback, Checkpoint):
            callback.config = redacted(plain(cfg))
    extra = [SafeLogger(partial(instantiate, logger)) for logger in cfg.logger.values() if logger]
    trainer: pl.Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=[RunLog(str(out)), *extra])
    torch.set_num_threads(cfg.threads or spare_threads(trainer.num_devices, cfg.data.get("workers", 0)))
    if trainer.is_global_zero:
        describe_run(cfg, out, HydraConfig.get().overrides.task if HydraConfig.initialized() else [])
        keep_vae(model, out)
        describe_training(model, trainer, out, resume)
        for logger in extra:
            logger.log_hyperparams(redacted(plain(cfg)))

    try:
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    except SystemExit as ended:
        if ended.code == 1 and trainer.interrupted:  # Lightning's end of Ctrl-C, without a word
            raise KeyboardInterrupt from None
        raise
    except MisconfigurationException as error:
        message = str(error).splitlines()[0]
        own = "; clip and accumulate are keys of model" if "manual optimization" in message else ""
        raise ConfigError(f"trainer: {message}{own}") from error
    step = trainer.global_step
    if model.validated != model.step and data.found[1].entries and trainer.limit_val_batches != 0:
        trainer.validate(model, datamodule=data, verbose=False)  # what training ended with
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if dist.is_initialized():
        dist.destroy_process_group()  # the next job of a sweep has a group of its own
    if trainer.is_global_zero:
        scores = ", ".join(f"{name} {metrics[name]:.4g}" for name in SCORES if name in metrics)
        log.info("done: step %d%s; everything is in %s", step, f", {scores}" if scores else "", out)
    return {"step": step, **metrics}


def shapes_instead(cfg: DictConfig) -> None:
    """Train on moving shapes where an experiment allows `data.root` to be left out, and say so."""
    shared = {key: cfg.data[key] for key in inspect.signature(SyntheticData).parameters if key in cfg.data}
    cfg.data = {**shared, "_target_": "praxino.data.module.SyntheticData", "root": f"{cfg.out}/shapes"}
    log.warning("data.root is not given: training on moving shapes, made under %s", cfg.data.root)


def spare_threads(ranks: int, workers: int) -> int:
    """Return how many cores the ranks of this node and their workers leave to the arithmetic of each rank.

    A convolution whose threads wait for a core that a worker has taken is many times slower than one thread alone.
    """
    return max(1, min(torch.get_num_threads(), cores() // ranks - workers))


def resume_from(ckpt: str | None, out: Path) -> Path | None:
    """Return the checkpoint to go on from: none, the newest good one of this run, or a named file."""
    existing = sorted((out / "checkpoints").glob("step-*.ckpt"))
    if ckpt is None:
        if existing:
            raise ConfigError(f"out={out} holds a run already: ckpt=last goes on with it, another out begins a new one")
        return None
    if ckpt == "last":
        if not existing:
            raise ConfigError(f"ckpt=last: {out / 'checkpoints'} holds no checkpoint; leave ckpt out to begin a run")
        if (found := checkpoint.find_last(out)) is None:
            raise CheckpointError(f"ckpt=last: none of the {len(existing)} files in {out / 'checkpoints'} is sound")
        return found
    path = Path(ckpt).expanduser()
    if not path.is_file() and not is_sharded(path):
        raise ConfigError(f"ckpt={ckpt}: no such file; ckpt=last takes the newest of out, a path takes that file")
    checkpoint.verify(path)
    return path


def check_resume(model: StepModule, path: Path) -> None:
    """Make sure that a checkpoint is one of a training, and of this model."""
    content = checkpoint.read(path)
    if "praxino" not in content or "loops" not in content:
        raise CheckpointError(f"{path}: holds no training to go on with; weights={path} begins with its weights")
    target = model.state_dict()
    if differing := differing_keys(target, content["state_dict"]):
        raise ConfigError(
            f"ckpt={path} does not fit the model: {len(differing)} of {len(target)} tensors differ, e.g. "
            f"{', '.join(differing[:3])}; resume with the model of {path.parent.parent / 'config.yaml'}"
        )


def load_weights(model: StepModule, path: str) -> None:
    """Copy the weights of any checkpoint that fits the module's kind, all of them and nothing else."""
    reader = checkpoint.load if isinstance(model.net, VideoVAE) else lambda path: checkpoint.load_denoiser(path)[0]
    source = reader(path).state_dict()
    target = model.net.state_dict()
    if differing := differing_keys(target, source):
        raise ConfigError(
            f"weights={path} do not fit model.net: {len(differing)} of {len(target)} tensors differ, e.g. "
            f"{', '.join(differing[:3])}; choose the model/net that they were trained with"
        )
    model.net.load_state_dict(source)


def differing_keys(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that only one of two models has, or in another shape."""
    return sorted(key for key in a.keys() | b.keys() if key not in a or key not in b or a[key].shape != b[key].shape)


def describe_training(model: StepModule, trainer: pl.Trainer, out: Path, resume: Path | None) -> None:
    """Say in two lines what is about to happen."""
    count = sum(parameter.numel() for parameter in model.net.parameters() if parameter.requires_grad)
    devices = f"{trainer.world_size} x {trainer.strategy.root_device.type}, {trainer.precision}"
    log.info("%s, %.1fM parameters, %s, on %s", type(model.net).__name__, count / 1e6, model.summary(), devices)
    steps = "no limit" if trainer.max_steps < 0 or math.isinf(trainer.max_steps) else f"{trainer.max_steps} steps"
    log.info("%s to %s, run directory %s", f"from {resume.name}" if resume else "from the start", steps, out)
