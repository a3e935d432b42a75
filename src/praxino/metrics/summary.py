"""The mean of a metric over videos, with an interval; and which way a metric is better."""

import math
import statistics
from collections.abc import Iterable, Sequence

import torch

# "zero": the closer to 0, on either side
DIRECTION = {
    "psnr": "up",
    "psnr_clip": "up",
    "psnr_pooled": "up",
    "ssim": "up",
    "ms_ssim": "up",
    "lpips": "down",
    "difference": "down",
    "flicker": "zero",
    "warped": "down",
    "frechet": "down",
    "fvd": "down",
    "fid": "down",
}
BLOCK = 2**22  # numbers drawn at a time


def bootstrap(values: Sequence[float], level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the percentile interval of the mean when the values are drawn again, with replacement.

    The same for the same values in the same order.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    x = torch.tensor(values, dtype=torch.float64)
    if not len(x) or not x.isfinite().all():
        raise ValueError(f"an interval of {len(x)} values needs one at least, all of them finite.")
    generator, means = torch.Generator().manual_seed(seed), []
    step = max(1, BLOCK // len(x))
    for first in range(0, draws, step):
        places = torch.randint(len(x), (min(step, draws - first), len(x)), generator=generator)
        means.append(x[places].mean(dim=1))
    tail = (1 - level) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def describe(values: Iterable[float | None]) -> dict[str, float | None]:
    """Return mean, sample standard deviation, 95 % interval of the mean and number of the values that there are.

    None and NaN are no values. Without any there is no mean, and of fewer than two neither deviation nor interval.
    """
    there = [value for value in values if value is not None and not math.isnan(value)]
    several = len(there) > 1 and all(map(math.isfinite, there))
    low, high = bootstrap(there) if several else (None, None)
    return {
        "mean": statistics.fmean(there) if there else None,
        "std": statistics.stdev(there) if several else None,
        "low": low,
        "high": high,
        "n": len(there),
    }
