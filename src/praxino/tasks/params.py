"""Params: parameters by part, and what a training step costs, of a configuration, on tensors without memory."""

import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from praxino import checkpoint
from praxino.config import instantiate, plain, report, target_errors, type_error
from praxino.data.latents import read_manifest
from praxino.errors import ConfigError, DataError
from praxino.lit.base import StepModule
from praxino.lit.dit import DiTModule
from praxino.lit.parallel import recompute_blocks
from praxino.models.vae import check_clip
from praxino.tasks.attach import is_latents
from praxino.tasks.common import make_resize
from praxino.tasks.console import show_table
from praxino.tasks.rows import write_atomic
from praxino.tasks.rundir import make_directory

log = logging.getLogger(__name__)

WORDS = 128  # tokens of a text
SETTINGS = {
    "report": str | None,
    "frames": PositiveInt,
    "size": int | list[int],
    "batch": PositiveInt,
    "latent.channels": PositiveInt,
    "latent.stride": Annotated[list[PositiveInt], Field(min_length=3, max_length=3)],
}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Describe the training of a configuration, that of train.py.

    Beside its keys: `report`, a JSON file to be written, and `latent.channels` and `latent.stride` of a denoiser's VAE
    where neither `data.root`, a cache, nor `model.vae` says it; `model.net.channels` counts before `latent.channels`.
    """
    values = {key: plain(OmegaConf.select(cfg, key)) for key in SETTINGS}
    report([f"{key}: {why}" for key, hint in SETTINGS.items() if (why := type_error(hint, values[key]))])
    make_resize(values["size"])
    net: Any = cfg.model.get("net") or {}
    given = net.get("channels")
    if given is not None:
        cfg.latent.channels = given
    elif "channels" in net:
        net.channels = cfg.latent.channels  # until cache or VAE say otherwise
    report([*target_errors(cfg.model, "model"), *(target_errors(cfg.data, "data") if cfg.data.get("root") else ())])
    latents = latent_shape(cfg)
    if given not in (None, latents[0]):
        raise ConfigError(
            f"the VAE has {latents[0]} latent channels, model.net takes {given}: use model.net.channels={latents[0]}"
        )
    if "channels" in net:
        net.channels = latents[0]
    without_weights(cfg.model)
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes and types alone
        result = describe(cfg, latents)
    show(result)
    if cfg.report is not None:
        path = Path(cfg.report).expanduser()
        make_directory(path.parent)
        write_atomic(path, json.dumps(result, indent=2) + "\n")
    return result


def latent_shape(cfg: DictConfig) -> list[int]:
    """Return channels, frames, rows and columns of a clip's latents: those cached, those of the VAE, or assumed."""
    if is_latents(cfg) and cfg.data.root is not None:
        manifest = read_manifest(cfg.data.root)
        channels, length, *cells = manifest.clips[0].shape
        if cfg.data.frames:
            length = manifest.latents(cfg.data.frames)
            if cfg.data.short != "pad" and length > max(clip.shape[1] for clip in manifest.clips):
                count = len(manifest.clips)
                raise DataError(f"none of {count} clips in {manifest.root} has {length} latents: use fewer frames")
        return [channels, length, *cells]
    size, vae = plain(cfg.size), cfg.model.get("vae")
    height, width = [size, size] if isinstance(size, int) else size
    if vae is None:
        time, rows, columns = cfg.latent.stride
        length = math.ceil((cfg.frames - 1) / time) + 1
        return [cfg.latent.channels, length, math.ceil(height / rows), math.ceil(width / columns)]
    vae = instantiate(vae) if isinstance(vae, DictConfig) else checkpoint.load(vae)
    check_clip(vae, cfg.frames, size)
    _, rows, columns = vae.stride
    return [vae.latent_channels, vae.latent_frames(cfg.frames), height // rows, width // columns]


def without_weights(model: DictConfig) -> None:
    """Take out what would read weights: they change no figure."""
    with open_dict(model):
        model.update({key: None for key in ("val_lpips", "vae") if key in model})
        lpips = OmegaConf.select(model, "loss.lpips")
        if lpips is not None:
            lpips.weights = "random"


def describe(cfg: DictConfig, latents: list[int]) -> dict[str, Any]:
    """Return all figures as plain data: numbers, bytes, floating-point operations."""
    module = build(cfg.model)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in children(module.net)}
    total = sum(p.numel() for p in module.net.parameters())
    parts |= {"other": total - sum(parts.values())} if total != sum(parts.values()) else {}
    learners = module.learners()
    learning = {prefix: sum(p.numel() for p in weights) for prefix, weights in learners.items()}
    half = str(cfg.trainer.precision).startswith("bf16")
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        flops, activations = measure_step(module, make_batch(module, cfg, latents))
    devices = cfg.trainer.devices if isinstance(cfg.trainer.devices, int) else 1
    shards = devices if "fsdp" in str(cfg.trainer.strategy).lower() else 1
    averaged = total if cfg.callbacks.get("ema") else 0
    memory = {
        "weights": 4 * (total + sum(n for prefix, n in learning.items() if prefix)) // shards,
        "gradients": 4 * sum(learning.values()) // shards,
        "optimizer": optimizer_bytes(module) // shards,
        "average": 4 * averaged // shards,
        "activations": activations,
    }
    return {
        "class": type(module.net).__name__,
        "parameters": total,
        "trainable": learning[""],
        "adversary": sum(n for prefix, n in learning.items() if prefix),
        "parts": parts,
        "batch": cfg.batch,
        "accumulate": module.accumulate,
        "forward_flops": flops["forward"] * module.accumulate,
        "step_flops": flops["step"] * module.accumulate,
        "memory": {**memory, "total": sum(memory.values())},
        "devices": devices,
        "shards": shards,
        "precision": str(cfg.trainer.precision),
    }


def build(model: DictConfig) -> StepModule:
    """Build what is trained; of LPIPS, which takes its weights as they come, with real ones."""
    lpips = OmegaConf.select(model, "loss.lpips")
    if lpips is None:
        return instantiate(model)
    with unset_fake_temporarily(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LPIPS has random")
        distance = instantiate(lpips)
    model.loss.lpips = None
    module = instantiate(model)
    module.loss.lpips, module.loss.weights["perceptual"] = distance, model.loss.perceptual
    return module


def children(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of a network that hold parameters; a lone part is taken apart."""
    found = [(name, part) for name, part in net.named_children() if any(True for _ in part.parameters())]
    if len(found) == 1:
        name, part = found[0]
        found = [(f"{name}.{below}", inner) for below, inner in children(part)] or found
    yield from found


# ------------------------------------------------------------------------------------------------------ one step
def make_batch(module: StepModule, cfg: DictConfig, latents: list[int]) -> dict[str, Any]:
    """Return a batch of the configuration's size, without memory."""
    count, frames, size = cfg.batch, cfg.frames, plain(cfg.size)
    height, width = [size, size] if isinstance(size, int) else size
    batch: dict[str, Any] = {"index": torch.arange(count), "path": [""] * count}
    if not isinstance(module, DiTModule):
        check_clip(module.net, frames, size)  # type: ignore[arg-type]
        return {**batch, "video": torch.empty(count, frames, height, width, 3, dtype=torch.uint8)}
    batch["latent"] = torch.empty(count, *latents)
    batch["first"] = torch.ones(count, dtype=torch.bool)
    if "label" in module.net.kinds:
        batch["label"] = torch.zeros(count, dtype=torch.long)
    if "text" in module.net.kinds:
        batch |= {"text": torch.empty(count, WORDS, module.net.text_width or 1)}
        batch |= {"text_mask": torch.ones(count, WORDS, dtype=torch.bool)}
    return batch


def measure_step(module: StepModule, batch: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Return the operations of a network's step on one batch, and the bytes that its forward pass keeps.

    Where network and adversary learn in turns, a step counts one turn of each. Recomputed blocks count twice in the
    operations; what the recomputation of one block keeps for a moment is not in the bytes.
    """
    kept, forward = Kept(module), [0]
    counters: list[FlopCounterMode] = []

    def backward(loss: Tensor, *_: Any, **__: Any) -> None:
        kept.open, forward[0] = False, counters[-1].get_total_flops()
        loss.backward()

    module.manual_backward = backward  # type: ignore[method-assign]
    if isinstance(module, DiTModule) and module.checkpoint_activations:
        recompute_blocks(module.net.blocks)
    adversary = getattr(module, "adversary", None)
    if adversary is not None:
        module.step = adversary.start + adversary.warmup
    turns = [module.turn()]
    if adversary is not None and adversary.alternate:
        turns = [("",), tuple(prefix for prefix in module.learners() if prefix)]
    for turn in turns:
        counters.append(FlopCounterMode(display=False))
        with kernels(), saved_tensors_hooks(kept.add, lambda x: x), counters[-1]:
            module.learn(batch, turn, 1.0)
        kept.open = False
    return {"forward": forward[0], "step": sum(c.get_total_flops() for c in counters)}, kept.bytes


class Kept:
    """Count what the forward pass keeps for the backward pass, each memory once, without the parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.seen = {p.untyped_storage()._cdata for p in (*module.parameters(), *module.buffers())}
        self.alive: list[Tensor] = []  # so that no two memories share an address
        self.open, self.bytes = True, 0

    def add(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if self.open and storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(x)
            self.bytes += storage.nbytes()
        return x


class FusedAttention(torch.autograd.Function):
    """Attention as the fused kernels count and keep it: no weights between queries and keys are stored."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.mT) @ v
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _ = ctx.saved_tensors
        weights, pull = q @ k.mT, grads[0] @ v.mT
        return pull @ k, pull.mT @ q, weights.mT @ grads[0]


def convolution(x: Tensor, weight: Tensor, bias: Any, padding: Any, stride: Any, dilation: Any, groups: int) -> Tensor:
    """Convolve as `torch.mkldnn_convolution`, which looks into the memory, does."""
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


@contextmanager
def kernels() -> Iterator[None]:
    """Stand in for what tensors without memory lack, in the backward pass, too, which leaves a `TorchFunctionMode`."""
    attention, own = F.scaled_dot_product_attention, torch.mkldnn_convolution
    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: FusedAttention.apply(q, k, v)
    torch.mkldnn_convolution = convolution  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, torch.mkldnn_convolution = attention, own


def optimizer_bytes(module: StepModule) -> int:
    """Return the size of the optimizers' state, after a step of theirs on tensors without memory."""
    total = 0
    for optimizer in module._make_optimizers():
        for group in optimizer.param_groups:
            group |= {key: False for key in ("fused", "foreach") if key in group}
            for p in group["params"]:
                p.grad = torch.empty_like(p)
        optimizer.step()
        states = (value for state in optimizer.state.values() for value in state.values())
        total += sum(value.nbytes for value in states if isinstance(value, Tensor))
    return total


# ---------------------------------------------------------------------------------------------------------- words
def show(result: dict[str, Any]) -> None:
    """Print the figures."""
    total = result["parameters"]
    rows = [(name, f"{count:,}", f"{100 * count / max(total, 1):.1f} %") for name, count in result["parts"].items()]
    show_table(result["class"], [*rows, ("sum", f"{total:,}", "")], ("part", "parameters", "share"))
    if result["adversary"]:
        log.info("adversary beside it: %s parameters", f"{result['adversary']:,}")
    log.info(
        "a step of %d x %d clips: %s forward, %s in all (matrices and convolutions; recomputation included)",
        result["accumulate"],
        result["batch"],
        operations(result["forward_flops"]),
        operations(result["step_flops"]),
    )
    title = f"Memory of each of {result['devices']} devices, {result['precision']}: an estimate, without kernels' own"
    rows = [(name, f"{size / 2**30:.2f} GiB", "") for name, size in result["memory"].items()]
    show_table(title, [row[:2] for row in rows], ("for", "memory"))


def operations(count: int) -> str:
    """Return a number of floating-point operations with its unit."""
    scale = min(5, int(math.log10(max(count, 1))) // 3)
    return f"{count / 1000**scale:.3g} {('', 'k', 'M', 'G', 'T', 'P')[scale]}FLOP"
