"""FSDP2: weights, gradients, optimizer state and moving average in shards, one block gathered at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from praxino.errors import CheckpointError, ConfigError
from praxino.lit.optim import local


class FSDP(ModelParallelStrategy):
    """Fully sharded data parallelism over all devices; the module shards its network in `configure_model`.

    A checkpoint is one file as of any other strategy, or with `sharded_checkpoint` a directory that all ranks write.
    Either resumes on any number of devices.

    Args:
        sharded_checkpoint: let every rank write its own shards.
        process_group_backend: None: nccl on CUDA, gloo on the CPU.
        timeout: seconds that a rank waits for another.
    """

    def __init__(
        self,
        sharded_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: float = 1800.0,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1, process_group_backend=process_group_backend, timeout=timedelta(seconds=timeout)
        )
        self.sharded_checkpoint = sharded_checkpoint

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning hand the state of the optimizers to `load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """Use all devices of all nodes for data parallelism."""
        if not hasattr(self.lightning_module, "shard"):
            name = type(self.lightning_module).__name__
            raise ConfigError(f"trainer=fsdp: {name} does not shard its network: use trainer=ddp")
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights, in shards."""
        assert isinstance(self.lightning_module, LightningModule)
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer, in shards."""
        return (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write one file from the first rank, or a directory from all."""
        if self.sharded_checkpoint:
            self.checkpoint_io.save_shards(checkpoint, filepath)  # type: ignore[attr-defined]
            return
        whole = gather(checkpoint, self.is_global_zero)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(whole, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file or a directory of any strategy; of a directory each rank reads its own rows."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only, place=self.place)  # type: ignore[call-arg]

    def place(self, shape: list[int], rows: Callable[[int, int], Tensor]) -> Tensor:
        """Make a tensor of this rank's rows, cut as FSDP cuts it."""
        mesh = self.device_mesh["data_parallel"]
        each = -(-shape[0] // mesh.size())
        start = min(mesh.get_local_rank() * each, shape[0])
        part = rows(start, min(start + each, shape[0])).to(self.root_device)
        whole = torch.empty(shape, device="meta")
        return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give the network the weights of a checkpoint."""
        assert isinstance(self.lightning_module, LightningModule)
        load_weights(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each optimizer its state, what is of a weight's shape in shards like the weight."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            values = {
                number: {key: like(weights[number], value) for key, value in entry.items()}
                for number, entry in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": values})


def shard(net: nn.Module, blocks: Sequence[nn.Module], mesh: Any, precision: str) -> None:
    """Shard a network in place, block by block; bf16-mixed gathers the weights in bf16 and reduces in float32."""
    mixed = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if precision == "bf16-mixed" else {}
    policy = MixedPrecisionPolicy(**mixed, cast_forward_inputs=False)  # autocast casts: times stay float32
    for block in (*blocks, net):
        fully_shard(block, mesh=mesh, mp_policy=policy)


@contextmanager
def gathered(net: nn.Module) -> Iterator[None]:
    """Hold the weights of a sharded network whole, so that ranks may call it a different number of times."""
    parts = [module for module in net.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not net, recurse=False)
            part.reshard()


def gather(tree: Any, keep: bool) -> Any:
    """Return nested data with shards put together on the CPU; on ranks that do not keep it, they only take part."""
    if isinstance(tree, DTensor):
        whole = tree.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: gather(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([gather(value, keep) for value in tree])
    return tree


def like(weight: Tensor, value: Any) -> Any:
    """Return a tensor of a weight's shape sharded like the weight; anything else as it is."""
    if not isinstance(weight, DTensor) or not isinstance(value, Tensor) or value.shape != weight.shape:
        return value
    if isinstance(value, DTensor):
        return value
    whole = value.to(weight.device, weight.dtype)
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)


@torch.no_grad()
def load_weights(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights, whole or sharded, into a network, whole or sharded, all of them and nothing else."""
    own = net.state_dict()
    if own.keys() != state.keys():
        raise CheckpointError(f"the weights do not fit: {', '.join(sorted(own.keys() ^ state.keys())[:4])}")
    for key, weight in own.items():
        local(weight).copy_(local(like(weight, state[key])))
