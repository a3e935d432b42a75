"""Learning-rate schedules, parameter groups, gradient norms and the finite guard."""

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from praxino.errors import CheckpointError, ConfigError

STATEFUL = ("amsgrad", "centered")  # options of optimizers that keep a state of their own; so does RMSprop's momentum


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


def renew(stored: list[dict[str, Any]], fresh: list[dict[str, Any]], schedule: dict[str, Any] | None) -> list[str]:
    """Give the stored groups of an optimizer, and the state of its schedule, the options of a fresh one.

    A schedule goes on from its step; the rate there is taken when training starts (`StepModule.on_train_start`).

    Returns:
        what has changed, in words.

    Raises:
        CheckpointError: an option that keeps a state of its own was off and is on.
    """
    changes: dict[str, None] = {}
    for group, ours in zip(stored, fresh, strict=True):
        before = {**group, "lr": group.get("initial_lr", group["lr"])}
        now = {key: value for key, value in ours.items() if key not in ("params", "initial_lr")}
        changed = [key for key, value in now.items() if comparable(before[key]) != comparable(value)]
        stateful = (*STATEFUL, "momentum") if "centered" in group else STATEFUL
        if missing := [key for key in stateful if key in changed and not before[key]]:
            raise CheckpointError(
                f"{missing[0]}={now[missing[0]]} needs a state that the checkpoint lacks: resume with "
                f"{missing[0]}={before[missing[0]]}, or take the weights alone with weights=PATH"
            )
        changes |= {f"{key} {before[key]}, now {now[key]}": None for key in changed}
        if "initial_lr" in group:  # a schedule makes the rate of it when training starts
            now |= {"lr": group["lr"], "initial_lr": now["lr"]}
        group |= now
    if schedule is not None:
        schedule["base_lrs"] = [group["initial_lr"] for group in stored]
    return list(changes)


def comparable(value: Any) -> Any:
    """Return an option as it comes back from a checkpoint in shards, which has lists in place of tuples."""
    return list(value) if isinstance(value, tuple) else value


class WholeMuon(Muon):
    """Muon that makes whole matrices orthogonal, of weights in shards, too: pieces would round otherwise, in bf16.

    The same gradients give the same step, sharded or not. Those that differ in the last bit do not: bf16 rounds some
    entries the other way, and directions of little gradient count as much as any.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step the weights in shards, whose gradients it takes away, then the others."""
        for group in self.param_groups:
            for p in group["params"]:
                if isinstance(p, DTensor) and p.grad is not None:
                    self.step_shard(p, group)
                    p.grad = None
        return super().step(closure)

    def step_shard(self, p: DTensor, group: dict[str, Any]) -> None:
        """Step one weight: momentum in shards, the rest by Muon on the whole."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        whole = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=p.device))
        whole.grad = update.full_tensor() if isinstance(update, DTensor) else update
        Muon(
            [whole],
            **{key: group[key] for key in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")},
            weight_decay=0.0,
            momentum=0.0,
            nesterov=False,
        ).step()
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(distribute_tensor(whole.detach(), p.device_mesh, p.placements, src_data_rank=None))


class MuonAdamW(Optimizer):
    """Muon for the matrices of the blocks, AdamW for everything else, behind one optimizer.

    Muon takes the two-dimensional weights of the groups marked `hidden` (`block_groups`); its update is scaled to the
    size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training"), so that one learning rate fits both.

    Args:
        params: weights or groups.
        lr, betas, eps, weight_decay: of AdamW; `lr` and `weight_decay` also of Muon.
        momentum: of Muon.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        given, self.param_groups = self.param_groups, []
        adamw: list[dict[str, Any]] = []
        muon: list[dict[str, Any]] = []
        for group in given:
            options = {key: value for key, value in group.items() if key != "params"}
            matrices = [p for p in group["params"] if group.get("hidden") and p.ndim == 2]
            others = [p for p in group["params"] if not (group.get("hidden") and p.ndim == 2)]
            muon += [{**options, "params": matrices}] if matrices else []
            adamw += [{**options, "params": others}] if others else []
        self.parts: list[Optimizer] = []
        if muon:
            self.parts.append(WholeMuon(muon, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
        if adamw:
            self.parts.append(AdamW(adamw, betas=betas, eps=eps))
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self._share()

    def _share(self) -> None:
        """Let the two optimizers work on this one's groups and state."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both."""
        super().load_state_dict(state_dict)
        self._share()


def block_groups(
    net: nn.Module, blocks: Iterable[nn.Module], decay: Literal["all", "matrices"]
) -> list[dict[str, Any]]:
    """Return the trainable weights as `hidden` matrices of the blocks, other matrices and kernels, and vectors.

    The groups fit every optimizer: only `MuonAdamW` looks at the mark. Vectors do not decay with `decay=matrices`.
    """
    inside = {p for block in blocks for p in block.parameters() if p.ndim == 2}
    weights = [p for p in net.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if p in inside], "hidden": True},
        {"params": [p for p in weights if p not in inside and p.ndim > 1], "hidden": False},
        {"params": [p for p in weights if p.ndim <= 1], "hidden": False},
    ]
    if decay == "matrices":
        groups[2]["weight_decay"] = 0.0
    return [group for group in groups if group["params"]]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients together, a scalar; of weights in shards, over the shards of all ranks."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, clip: float | None) -> None:
    """Scale gradients of the norm `norm` down to `clip` where they are larger; None leaves them."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if clip is not None and gradients:
        torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor itself where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norms_by_block(module: nn.Module, depth: int = 2) -> dict[str, float]:
    """Return the gradient norm of each part of a network, named by the first `depth` components of its weights."""
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        blocks.setdefault(".".join(name.split(".")[:depth]), []).append(parameter)
    return {name: float(gradient_norm(parameters)) for name, parameters in blocks.items()}


def seed_of(*numbers: int) -> int:
    """Return a seed of 63 bits that is a function of some integers, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()) >> 1
