"""What the datamodules share: the list of the first rank for all, planned loaders, and the state of an exact resume."""

import logging
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import lightning.pytorch as pl
from torch.utils.data import Dataset

from praxino.data.loader import Context, FailureLog, PlannedLoader, ResumableLoader
from praxino.data.marks import Listed, compare, marks
from praxino.data.plan import BatchPlan
from praxino.data.scan import fingerprint
from praxino.data.videos import Sample
from praxino.errors import ConfigError, DataError, PraxinoError, StorageError

log = logging.getLogger(__name__)


class Tree(Protocol):
    """The clips of a directory."""

    root: str

    @property
    def entries(self) -> list[Any]: ...


T = TypeVar("T", bound=Tree)


class PlannedData(pl.LightningDataModule, ABC, Generic[T]):
    """Batches of a plan; a subclass says what there is (`find`), how it is read (`dataset`) and stacked (`collate`).

    The trainer needs `use_distributed_sampler=False`: the plan deals the clips to the ranks.

    Args:
        batch, val_batch, workers, prefetch, seed, val_fraction, val_limit, max_bad, on_change, timeout, context,
            rejected: see `praxino.data.module.VideoData`.
    """

    collate: Callable[[list[Sample]], Sample]

    def __init__(
        self,
        *,
        batch: int,
        val_batch: int | None,
        workers: int,
        prefetch: int,
        seed: int,
        val_fraction: float,
        val_limit: int | None,
        max_bad: float,
        on_change: Literal["error", "warn"],
        timeout: float,
        context: Context | None,
        rejected: str | None,
    ) -> None:
        super().__init__()
        self.prepare_data_per_node = False
        for name, value, least in (
            ("batch", batch, 1),
            ("val_batch", val_batch, 1),
            ("val_limit", val_limit, 1),
            ("prefetch", prefetch, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"data.{name}={value}: use at least {least}.")
        for name, value in (("workers", workers), ("seed", seed)):
            if value < 0:
                raise ConfigError(f"data.{name}={value}: use 0 or more.")
        for name, share in (("val_fraction", val_fraction), ("max_bad", max_bad)):
            if not 0 <= share < 1:
                raise ConfigError(f"data.{name}={share}: use a share from 0 to below 1.")
        self.batch, self.val_batch, self.seed = batch, val_batch or batch, seed
        self.workers, self.prefetch, self.timeout, self.context = workers, prefetch, timeout, context
        self.val_fraction, self.val_limit = val_fraction, val_limit
        self.max_bad, self.on_change = max_bad, on_change
        self.rejected = None if rejected is None else Path(rejected)
        self.found: tuple[T, T] | None = None
        self._error: PraxinoError | None = None
        self._state: dict[str, Any] | None = None
        self._loader: ResumableLoader | None = None
        self._open: list[PlannedLoader] = []

    @abstractmethod
    def find(self) -> tuple[T, T]:
        """Return what there is for training and for validation; the first rank asks."""

    @abstractmethod
    def dataset(self, tree: T, training: bool) -> Dataset:
        """Return the clips of a tree, addressed by the keys of a `BatchPlan`."""

    @abstractmethod
    def rates(self, tree: T) -> list[float]:
        """Return the frames per second of the clips of a tree."""

    # What there is

    def rate(self) -> float:
        """Return the frames per second of the clips of training; where they differ, the median."""
        return statistics.median_low(self.rates(self._parts()[0]))

    def prepare_data(self) -> None:
        """Scan on the first rank, while the others wait without a time limit; `setup` tells all of an error."""
        self._attempt()

    def setup(self, stage: str | None = None) -> None:
        """Give every rank the list of the first one; raises DataError on all of them where nothing is usable."""
        if self.found is not None and self.trainer is None:
            return
        if self._rank_and_world()[0] == 0:
            self._attempt()
        outcome = self._error or self.found
        if self.trainer is not None:
            outcome = self.trainer.strategy.broadcast(outcome, src=0)
        if isinstance(outcome, PraxinoError):
            raise outcome
        self.found = outcome

    def _attempt(self) -> None:
        if self.found is None and self._error is None:
            try:
                self.found = self.find()
            except PraxinoError as error:
                self._error = error
            except OSError as error:
                self._error = StorageError(f"cannot write {error.filename}: {error.strerror}")

    # What is loaded

    def train_dataloader(self) -> ResumableLoader:
        if self.trainer is not None and self.trainer.world_size > 1 and self._replaces_samplers():
            raise ConfigError("trainer.use_distributed_sampler must be false: the data module deals the clips itself.")
        loader = self._make(ResumableLoader, 0, self.batch)
        if self._state is not None:
            loader.load_state_dict(self._state)
            self._state = None
        self._loader = loader
        return loader

    def val_dataloader(self) -> PlannedLoader | list[PlannedLoader]:
        """Load the same clips every time; ranks get equally many, the last ones perhaps with `repeat` above 0."""
        return self._make(PlannedLoader, 1, self.val_batch) if self._parts()[1].entries else []

    def _make(self, kind: type[Any], part: Literal[0, 1], batch: int) -> Any:
        tree, training = self._parts()[part], part == 0
        rank, world = self._rank_and_world()
        plan = BatchPlan(
            len(tree.entries), batch, seed=self.seed, rank=rank, world=world, shuffle=training, full=training
        )
        device = self.trainer.strategy.root_device.type if self.trainer is not None else "cpu"
        name = "quarantine.jsonl" if rank == 0 else f"quarantine.rank{rank}.jsonl"
        quarantine = None if self.rejected is None else self.rejected.with_name(name)
        loader = kind(
            self.dataset(tree, training),
            plan,
            FailureLog(tree.root, quarantine, self.max_bad),
            workers=self.workers,
            prefetch=self.prefetch,
            pin=device == "cuda",
            timeout=self.timeout,
            context=self.context,
            collate=self.collate,
        )
        self._open.append(loader)
        return loader

    def teardown(self, stage: str | None = None) -> None:
        """End the workers."""
        for loader in self._open:
            loader.close()
        self._open = []

    def _parts(self) -> tuple[T, T]:
        if self.found is None:
            self.setup()
        assert self.found is not None
        return self.found

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _replaces_samplers(self) -> bool:
        assert self.trainer is not None
        return self.trainer._accelerator_connector.use_distributed_sampler

    # What a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        entries: list[Listed] = self._parts()[0].entries
        state = self._state or (self._loader.state_dict() if self._loader is not None else None)
        return {"loader": state, "fingerprint": fingerprint(entries), "files": marks(entries), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint was; raises DataError where the order would not be that of its run."""
        entries: list[Listed] = self._parts()[0].entries
        changes = []
        if state["fingerprint"] != fingerprint(entries):
            changes.append(f"the training files changed ({compare(state['files'], entries)})")
        if state["seed"] != self.seed:
            changes.append(f"the seed was {state['seed']} and is {self.seed}")
        if changes:
            message = f"{' and '.join(changes)} under {self._parts()[0].root} since the checkpoint was written"
            if self.on_change == "error":
                raise DataError(f"{message}. To go on with another order of clips use data.on_change=warn.")
            log.warning("%s; the order of the clips is another one", message)
        self._state = state["loader"]
        if self._loader is not None and self._state is not None:
            self._loader.load_state_dict(self._state)
