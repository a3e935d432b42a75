"""Compare two sets of videos that have no partners, such as samples with real ones."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from praxino.data.clips import ClipSampler
from praxino.data.transforms import Resize
from praxino.errors import DataError
from praxino.metrics.features import RandomFeatures
from praxino.metrics.frechet import frechet_distance
from praxino.tasks.common import load_clips, show_table, versions, write_atomic, write_jsonl
from praxino.video import to_float


def compare_sets(
    real: str,
    fake: str,
    target: Path,
    clips: ClipSampler,
    resize: Resize,
    limit: int | None,
    batch: int,
    workers: int,
    cache_dir: str | None,
) -> dict[str, Any]:
    """Measure the Frechet distance of random features between the videos under `real` and under `fake`.

    The real videos are halved, every other one. Floor: the distance between the halves. Distance: the mean of those
    from `fake` to either half. Ceiling: the same for noise in place of `fake`, normal in each pixel with mean and
    deviation of each colour of the real videos. All sets are of one size, for the distance depends on it.

    Returns:
        the content of metrics.json: distance, floor, ceiling, position (0 at the floor, 1 at the ceiling), n of a set.
    """
    rejected: list[dict[str, Any]] = []

    def load(folder: str) -> Iterator[Tensor]:
        return batches(load_clips(folder, clips, resize, limit, batch, workers, cache_dir, rejected), rejected)

    net = RandomFeatures()
    found, colours, shape = survey(load(real), net)
    others, _, _ = survey(load(fake), net)
    write_jsonl(target / "rejected.jsonl", rejected)
    n = min(len(found) // 2, len(others))
    if n < 2:
        counts = f"{len(found)} clips under {real} and {len(others)} under {fake}"
        raise DataError(f"{counts}: 4 real ones and 2 others are the least; see {target / 'rejected.jsonl'}")
    halves, samples = [spread(found[0::2], n), spread(found[1::2], n)], spread(others, n)
    noise, _, _ = survey(draw_noise(n, batch, colours, shape), net)
    floor = frechet_distance(*halves)
    distance, ceiling = (sum(frechet_distance(half, other) for half in halves) / 2 for other in (samples, noise))
    result: dict[str, Any] = {"distance": distance, "floor": floor, "ceiling": ceiling}
    result |= {"position": (distance - floor) / (ceiling - floor), "n": n, "rejected": len(rejected)}
    protocol = {"real": real, "fake": fake, "frames": clips.frames, "stride": clips.stride, "size": resize.size}
    protocol |= {"features": f"{found.shape[1]} of a convolutional network with random weights, seed 0"}
    result |= {"protocol": protocol, "versions": versions()}
    write_atomic(target / "metrics.json", json.dumps(result, indent=2) + "\n")
    rows = [("real against real", floor, 0.0), ("fake", distance, result["position"]), ("noise", ceiling, 1.0)]
    show_table(f"{n} clips a set; see {target / 'metrics.json'}", rows, ("set", "Frechet distance", "position"))
    return result


def batches(loader: DataLoader, rejected: list[dict[str, Any]]) -> Iterator[Tensor]:
    """Yield videos `(B, 3, T, H, W)`; list those that cannot be read."""
    for clips in loader:
        rejected += [failure.to_json() for failure in clips["failures"]]
        if "error" in clips:
            raise DataError(clips["error"])
        if "video" in clips:
            yield to_float(clips["video"])


@torch.inference_mode()
def survey(videos: Iterable[Tensor], net: RandomFeatures) -> tuple[Tensor, Tensor, torch.Size]:
    """Return the features `(N, D)` of videos, mean and deviation of their colours `(2, 3)`, and the shape of one."""
    features, sums, count, shape = [torch.empty(0, net.width)], torch.zeros(2, 3, dtype=torch.float64), 0, torch.Size()
    for x in videos:
        features.append(net(x))
        values = x.double().transpose(0, 1).flatten(1)  # (3, B T H W)
        sums += torch.stack([values.sum(1), values.square().sum(1)])
        count, shape = count + values.shape[1], x.shape[1:]
    mean, square = sums / max(1, count)
    return torch.cat(features), torch.stack([mean, (square - mean.square()).clamp(min=0).sqrt()]), shape


def spread(features: Tensor, count: int) -> Tensor:
    """Return so many rows, from all over: neighbours by name may be alike."""
    return features[torch.linspace(0, len(features) - 1, count).round().long()]


def draw_noise(count: int, batch: int, colours: Tensor, shape: torch.Size) -> Iterator[Tensor]:
    """Yield clips of noise of given colours, `(B, 3, T, H, W)`."""
    generator = torch.Generator().manual_seed(0)
    mean, std = colours.float().view(2, 3, 1, 1, 1)
    for begin in range(0, count, batch):
        x = torch.randn(min(batch, count - begin), *shape, generator=generator)
        yield (x * std + mean).clamp(-1, 1)
