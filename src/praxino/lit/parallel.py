"""What is done to a network from outside: parts frozen, activations recomputed, gradients averaged over ranks."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.utils.checkpoint import checkpoint

from praxino.errors import ConfigError
from praxino.models.foreign import ForeignVAE
from praxino.models.vae import VideoVAE
from praxino.ops.attention import AttnBlock3DFix
from praxino.ops.blocks import ResnetBlock
from praxino.ops.causal import Stream

log = logging.getLogger(__name__)

SHAPES = 64  # of blocks that are compiled before the rest runs as it is; a network has about twelve
# dense bf16 operations a second by the makers' data sheets, of the first name that the device's contains
PEAKS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "A6000": 155e12,
    "A10": 125e12,
    "V100": 125e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a device, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def freeze_parts(net: VideoVAE, names: Sequence[str]) -> None:
    """Stop the training of a half, `encoder` or `decoder`, or of weights by the beginning of their names."""
    parameters = dict(net.named_parameters())
    for name in names:
        found = [p for key, p in parameters.items() if key == name or key.startswith(net.prefixes(name))]
        if not found:
            near = f"encoder, decoder, or the beginning of a name such as {next(iter(parameters))}"
            raise ConfigError(f"freeze: {name} names no weights: use {near}")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ConfigError(f"freeze: {', '.join(names)} leaves nothing to train")


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let gradients pass through a module, but not into its weights."""
    weights = [p for p in module.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype by their means over all ranks, in one message."""
    if not tensors or not dist.is_initialized():
        return
    flat = _flatten_dense_tensors([t.contiguous() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, _unflatten_dense_tensors(flat, tensors), strict=True):
        tensor.copy_(mean)


def checkpoint_blocks(net: nn.Module) -> None:
    """Keep no activations inside residual blocks: the backward pass computes them again."""
    if isinstance(net, ForeignVAE):
        return net.checkpoint_activations()
    blocks = [module for module in net.modules() if isinstance(module, ResnetBlock)]
    if not blocks:
        raise ConfigError("checkpoint_activations: this network has no residual blocks of ours: leave it off")
    for block in blocks:
        block.forward = partial(recomputed, block.forward)  # type: ignore[method-assign]


def recompute_blocks(blocks: Sequence[nn.Module]) -> None:
    """Keep no activations inside these blocks: the backward pass computes them again."""
    for block in blocks:
        block.forward = partial(again, block.forward)


def again(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run a block under activation checkpointing; a function of ours, for torch compiles no call of its own."""
    return checkpoint(forward, *args, use_reentrant=False, **options)


def compile_blocks(blocks: Sequence[nn.Module], backend: str = "inductor") -> None:
    """Compile blocks in place; those of one kind share what is compiled, and the names of their weights stay.

    Activations are recomputed within what is compiled: call `recompute_blocks` before.
    """
    prepare_compiler()
    for block in blocks:
        block.compile(backend=backend)


def prepare_compiler() -> None:
    """Let blocks have many shapes, and DDP not cut them: they are small, and what recomputes cannot be cut."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    torch._dynamo.config.optimize_ddp = False


def compile_vae(net: VideoVAE, backend: str = "inductor") -> None:
    """Compile what an autoencoder computes in training, in place; the names of its weights stay.

    Compiled are the residual and the attention blocks, each shape of them once. Other layers, the last one among them,
    at which an adversary is weighed, stay as they are: a gradient there needs no backward pass of the rest. So do
    pieces of videos, and what is computed without gradients. A foreign network is compiled as a whole. Activations are
    recomputed around what is compiled: call this before `checkpoint_blocks`.
    """
    prepare_compiler()
    blocks = [module for module in net.modules() if isinstance(module, ResnetBlock | AttnBlock3DFix)]
    if not blocks:
        functorch.donated_buffer = False  # backward may run more than once: see VAEModule.generator_loss
        return net.compile(backend=backend)
    compiled = counted(torch.compile(whole, dynamic=False, backend=backend))
    for block in blocks:
        block.forward = partial(in_training, compiled, block)  # type: ignore[method-assign]


def counted(compiled: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """Warn once where there are more shapes of blocks than are compiled."""
    seen: set[tuple[Any, ...]] = set()

    def run(block: nn.Module, x: Tensor) -> Tensor:
        shape = (type(block), x.shape, *(p.shape for p in block.parameters()))
        if len(seen) <= SHAPES and shape not in seen:
            seen.add(shape)
            if len(seen) > SHAPES:
                log.warning(
                    "compile: %d shapes of blocks are compiled, further ones run slower, as they are: use clips of "
                    "fewer sizes, or compile=false",
                    SHAPES,
                )
        return compiled(block, x)

    return run


def whole(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block on a whole video."""
    stream = Stream(final=True)
    stream.open()
    return type(block).forward(block, x, stream)


def in_training(compiled: Callable[..., Any], block: nn.Module, x: Tensor | None, stream: Stream) -> Tensor | None:
    """Run a block: compiled where it learns from a whole video."""
    if x is None or not stream.whole or not torch.is_grad_enabled():
        return type(block).forward(block, x, stream)
    return compiled(block, x.contiguous(memory_format=torch.channels_last_3d))


def recomputed(forward: Callable[..., Any], x: Tensor | None, stream: Stream) -> Tensor | None:
    """Run a block under activation checkpointing; the second time with the stream as it was before the first."""
    if x is None or not torch.is_grad_enabled():
        return forward(x, stream)
    before, streams = stream.fork(), [stream]
    return checkpoint(lambda x: forward(x, streams.pop() if streams else before.fork()), x, use_reentrant=False)
