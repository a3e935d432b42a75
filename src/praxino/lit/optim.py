"""Learning-rate schedules, parameter groups, gradient norms and the finite guard."""

import hashlib
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from praxino.errors import ConfigError


def warmup_constant(optimizer: Optimizer, warmup: int = 0) -> LambdaLR:
    """Rise linearly over `warmup` steps, then stay."""
    return LambdaLR(optimizer, lambda step: _rise(step, warmup))


def warmup_cosine(optimizer: Optimizer, total: int, warmup: int | float = 0, floor: float = 0.0) -> LambdaLR:
    """Rise linearly over `warmup` steps (below 1: that share of `total`), then fall along a cosine.

    It ends with `floor`, a factor, at step `total`.
    """
    warmup = _steps(warmup, total)
    _check(total, warmup)

    def factor(step: int) -> float:
        done = min(1.0, max(0, step - warmup) / max(1, total - warmup))
        return _rise(step, warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))

    return LambdaLR(optimizer, factor)


def warmup_stable_decay(
    optimizer: Optimizer, total: int, warmup: int | float = 0, decay: int | float = 0, floor: float = 0.0
) -> LambdaLR:
    """Rise linearly over `warmup` steps, stay, then fall linearly to `floor` (a factor) over the last `decay` steps.

    A warm-up or decay below 1 is a share of `total`.
    """
    warmup, decay = _steps(warmup, total), _steps(decay, total)
    _check(total, warmup + decay)

    def factor(step: int) -> float:
        left = min(1.0, max(0, total - step) / decay) if decay else 1.0
        return _rise(step, warmup) * (floor + (1 - floor) * left)

    return LambdaLR(optimizer, factor)


def _steps(length: int | float, total: int) -> int:
    return round(length * total) if length < 1 else int(length)


def _rise(step: int, warmup: int) -> float:
    """Return the warm-up factor; the first step already moves."""
    return min(1.0, (step + 1) / max(1, warmup))


def _check(total: int, phases: int) -> None:
    if total < 1 or phases > total:
        raise ConfigError(
            f"a schedule of total={total} steps cannot hold {phases} steps of warm-up and decay: "
            "set total to the number of training steps, e.g. trainer.max_steps"
        )


def parameter_groups(parameters: list[nn.Parameter], decay: Literal["all", "matrices"]) -> list[dict[str, Any]]:
    """Return parameters as optimizer groups; `matrices`: no weight decay on biases and norm gains."""
    if decay == "all":
        return [{"params": parameters}]
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients together, a scalar."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, clip: float | None) -> None:
    """Scale gradients of the norm `norm` down to `clip` where they are larger; None leaves them."""
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_([p for p in parameters if p.grad is not None], clip, norm)


def norms_by_block(module: nn.Module, depth: int = 2) -> dict[str, float]:
    """Return the gradient norm of each part of a network, named by the first `depth` components of its weights."""
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        blocks.setdefault(".".join(name.split(".")[:depth]), []).append(parameter)
    return {name: float(gradient_norm(parameters)) for name, parameters in blocks.items()}


def seed_of(*numbers: int) -> int:
    """Return a seed of 63 bits that is a function of some integers, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()) >> 1
