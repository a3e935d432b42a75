"""Loaders that know where they are: exact resume in mid-epoch, and one clear message when the data fails."""

import gc
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from praxino.data.plan import BatchPlan, Key
from praxino.data.pool import start_method
from praxino.data.report import append_lines
from praxino.data.videos import Failure, Sample, collate
from praxino.errors import DataError

log = logging.getLogger(__name__)

TOLD = 20  # files that cannot be read before only the list tells of them

Context = Literal["fork", "forkserver", "spawn"]


class FailureLog:
    """Count and list the files that fail while training, and end the run when there are too many.

    Args:
        root: named in the message.
        path: JSON lines, one for each file and reason; None to only log them.
        max_bad: share of clips that may need a substitute.
        after: clips to have seen before that share is judged.
    """

    def __init__(self, root: str, path: Path | None = None, max_bad: float = 0.05, after: int = 200) -> None:
        self.root, self.path, self.max_bad, self.after = root, path, max_bad, after
        self.clips = self.failed = 0
        self.known: dict[tuple[str, str], Failure] = {}

    def judge(self, batch: Sample) -> Sample:
        """Take the failures out of a batch; raises DataError where the run cannot go on."""
        failures, missing = batch.pop("failures"), batch.pop("missing")
        fresh = [f for f in failures if self.known.setdefault((f.path, f.reason), f) is f]
        if not missing:
            self._tell(fresh)
        if fresh and self.path is not None:
            append_lines(self.path, [failure.to_json() for failure in fresh])
        self.clips += len(batch.get("path", ())) + missing
        self.failed += len(failures)
        if "error" in batch:
            raise DataError(f"{self.root}: {batch['error']}")
        if missing:
            raise DataError(self._message(f"{missing} clips and all their substitutes failed"))
        if self.clips >= self.after and self.failed > self.max_bad * self.clips:
            share = f"{self.failed} of {self.clips} clips failed, more than max_bad={self.max_bad:g}"
            raise DataError(self._message(share))
        return batch

    def _tell(self, fresh: list[Failure]) -> None:
        for failure in fresh[: max(0, TOLD - len(self.known) + len(fresh))]:
            log.warning("cannot read %s: %s (%s)", ascii(failure.path), failure.reason, failure.detail)
        if len(self.known) - len(fresh) < TOLD <= len(self.known):
            log.warning(
                "more files that cannot be read are listed in %s", self.path or "no file: data.rejected is not set"
            )

    def _message(self, what: str) -> str:
        counts: dict[str, int] = {}
        for _, reason in self.known:
            counts[reason] = counts.get(reason, 0) + 1
        first = next(iter(self.known.values()))
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        return f"{what} under {self.root} ({reasons}). First: {first.path!a}: {first.detail or first.reason}"


class _Order:
    """The batch sampler: the rest of an epoch of a plan."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan, self.epoch, self.start = plan, 0, 0

    def __iter__(self) -> Iterator[list[Key]]:
        return self.plan.batches(self.epoch, self.start)

    def __len__(self) -> int:
        return len(self.plan)


class PlannedLoader(DataLoader):
    """Load the batches of a plan, the same ones for any number of workers; always from epoch 0.

    Args:
        workers: processes that decode; 0 to decode in this one.
        prefetch: batches that each worker prepares ahead.
        pin: copy batches into page-locked memory, for an accelerator.
        timeout: seconds to wait for a batch from the workers, after which the run ends with a DataError.
        context: how workers start; None for fork on Linux, spawn elsewhere.
        collate: makes a batch of samples; what `FailureLog.judge` takes out of it is in there.
    """

    def __init__(
        self,
        clips: Dataset,
        plan: BatchPlan,
        failures: FailureLog,
        *,
        workers: int = 0,
        prefetch: int = 2,
        pin: bool = False,
        timeout: float = 300.0,
        context: Context | None = None,
        collate: Callable[[list[Sample]], Sample] = collate,
    ) -> None:
        self.plan, self.failures = plan, failures
        self.order = _Order(plan)
        super().__init__(
            clips,
            batch_sampler=self.order,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin,
            timeout=timeout if workers else 0,
            worker_init_fn=_start_worker,
            multiprocessing_context=(context or start_method()) if workers else None,
            generator=torch.Generator().manual_seed(plan.seed),  # else a loader draws from the generator of the run
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
        )

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches, None)
                if batch is not None:
                    batch = self.failures.judge(batch)
            except (RuntimeError, DataError) as error:
                self.close()
                raise self._explain(error) from None
            if batch is None:
                return
            yield batch

    def close(self) -> None:
        """End the workers now: left to the garbage collector, each of them may take seconds."""
        if self._iterator is not None and self.num_workers > 0:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]
        self._iterator = None

    def _explain(self, error: RuntimeError | DataError) -> Exception:
        if isinstance(error, DataError) or "DataLoader" not in str(error):
            return error
        reason = str(error).strip().splitlines()[0]
        root = self.failures.root
        return DataError(f"a decoding process died or hung under {root}: {reason}. Try data.workers=0 to see where.")


class ResumableLoader(PlannedLoader):
    """Load the batches of a plan for training and go on from any of them.

    `position` counts the batches ever handed out, over all epochs; the workers may be further ahead. An iteration is
    the rest of the epoch at `position`, so it follows the plan however often a run stops and goes on.
    """

    position = 0

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        self.order.epoch, self.order.start = divmod(self.position, len(self))
        for batch in super().__iter__():
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        plan = self.plan
        return {"position": self.position, "length": len(plan), "clips": plan.batch * plan.world, "seed": plan.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches of `state`; under another batch or world size, after as many clips of its epoch."""
        epoch, done = divmod(state["position"], state["length"])
        if state["clips"] == self.plan.batch * self.plan.world and state["length"] == len(self):
            self.position = state["position"]
            return
        start = min(done * state["clips"] // (self.plan.batch * self.plan.world), len(self) - 1)
        self.position = epoch * len(self) + start
        log.warning(
            "%d clips per step before, %d now: epoch %d goes on at batch %d, some of its clips may come twice",
            state["clips"],
            self.plan.batch * self.plan.world,
            epoch,
            start,
        )


def _start_worker(number: int) -> None:
    """Leave an interrupt from the keyboard to the main process, which then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # what a fork inherits stays: collecting another loader here would end the workers of the main process
