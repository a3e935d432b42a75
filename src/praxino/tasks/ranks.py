"""Several processes for tasks without a Trainer: Lightning launches them, they agree on objects, nothing else."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from praxino.errors import ConfigError, PraxinoError, StorageError
from praxino.tasks.console import quiet_lightning
from praxino.tasks.device import pick_device

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a task; as a context, the group ends with it."""

    rank: int
    world: int
    device: torch.device

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def on_first(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank; its result, or the expected error that it raised, is that of all."""
        outcome: list[Any] = [attempt(function) if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(outcome, src=0)
        return _result(outcome[0])

    def on_all(self, function: Callable[[], T]) -> list[T]:
        """Call a function on every rank; all get all results, or the first expected error."""
        outcomes: list[Any] = [attempt(function)]
        if self.world > 1:
            mine, outcomes = outcomes[0], [None] * self.world
            dist.all_gather_object(outcomes, mine)
        return [_result(outcome) for outcome in outcomes]


def launch(device: str, devices: int = 1, num_nodes: int = 1) -> Ranks:
    """Start the other processes of this command, or join those of torchrun and SLURM; one process costs nothing.

    The group talks over gloo and waits for a day, for ranks are done at different times.
    """
    if dist.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    chosen = pick_device(device)
    if devices * num_nodes == 1:
        return Ranks(0, 1, chosen)
    if chosen.index is not None:
        raise ConfigError(f"device={device} names one device: with devices={devices} use {chosen.type}")
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    quiet_lightning()
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(days=1))
    try:
        fabric = Fabric(accelerator=chosen.type, devices=devices, num_nodes=num_nodes, strategy=strategy)
        fabric.launch()
    except (ValueError, MisconfigurationException) as error:
        raise ConfigError(f"devices={devices} num_nodes={num_nodes}: {str(error).splitlines()[0]}") from error
    return Ranks(fabric.global_rank, fabric.world_size, fabric.device)


def is_first() -> bool:
    """Tell whether this is the first process of a task whose group has ended."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    return not rank_zero_only.rank  # type: ignore[attr-defined]


def attempt(function: Callable[[], T]) -> T | PraxinoError:
    """Return the result of a function, or the expected error that it raised."""
    try:
        return function()
    except PraxinoError as error:
        return error
    except OSError as error:
        return StorageError(f"{error.filename or 'the disk'} cannot be used: {error.strerror or error}")


def _result(outcome: Any) -> Any:
    if isinstance(outcome, PraxinoError):
        raise outcome
    return outcome
