"""Make data: moving shapes as real video files, for the demo, tests and first steps."""

import logging
import time
from typing import Any

from omegaconf import DictConfig

from praxino.config import check_call
from praxino.data.synthetic import make_dataset
from praxino.tasks.rundir import make_directory

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `make_dataset` and call it."""
    arguments = check_call(make_dataset, cfg)
    make_directory(arguments["out"])
    started = time.perf_counter()
    out = make_dataset(**arguments)
    counts = {split: arguments[key] for split, key in (("train", "videos"), ("val", "val_videos"))}
    log.info(
        "%d videos in %s/train, %d in %s/val (%.1f s)",
        counts["train"],
        out,
        counts["val"],
        out,
        time.perf_counter() - started,
    )
    return {"out": str(out), **counts}
