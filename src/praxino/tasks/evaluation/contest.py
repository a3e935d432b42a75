"""Contest: VAEs that encode and decode the same clips: their scores, seconds, memory and size."""

import logging
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any, Literal

import torch
from torch import Tensor, nn

from praxino import checkpoint
from praxino.data.scan import Entry
from praxino.errors import DataError
from praxino.metrics.summary import describe
from praxino.models.vae import HALVES, Posterior, VideoVAE
from praxino.stream import pad_space, pad_time
from praxino.tasks.device import Precision, precision_context
from praxino.tasks.evaluation.compare import known_statistics, settle
from praxino.tasks.evaluation.protocol import identify
from praxino.tasks.evaluation.report import Clip
from praxino.tasks.evaluation.score import Reading, Row, Scores, score_vae
from praxino.tasks.evaluation.shown import Pictures
from praxino.tasks.evaluation.verdict import Judge, pooled
from praxino.tasks.ranks import Ranks
from praxino.video import to_float

log = logging.getLogger(__name__)

BITS = 16  # of a number of a latent, as praxino-encode stores it
Weights = Literal["ema", "raw"]
MEMORY = {
    True: "allocated on the device while it encodes and decodes one clip, weights included",
    False: "resident memory of a process of its own that loads the VAE, encodes and decodes one clip, less that before",
}


class Fitted(nn.Module):
    """A VAE that takes videos of any length and size: padded at the end, and cut again."""

    def __init__(self, vae: VideoVAE) -> None:
        super().__init__()
        self.vae = vae

    def check_video(self, shape: Sequence[int]) -> None:
        """Take anything."""

    def encode(self, x: Tensor) -> Posterior:
        """Encode a video, padded where it has to be."""
        self.shape = x.shape
        x = pad_time(x, self.vae.fitting_frames(x.shape[2]) - x.shape[2])
        return self.vae.encode(pad_space(x, *self.vae.stride[1:]))

    def decode(self, z: Tensor) -> Tensor:
        """Decode the latents of the last video, without the padding."""
        frames, height, width = self.shape[2:]
        return self.vae.decode(z)[:, :, :frames, :height, :width]


@dataclass
class Contender:
    """A VAE, and all that is found out about it."""

    name: str
    path: str
    model: Fitted | None = None

    def open(self, weights: Weights) -> None:
        """Load it, on the CPU."""
        self.model = Fitted(vae := checkpoint.load(self.path, weights=weights))
        self.identity = identify(self.path, vae)
        self.scores, self.values, self.clips = Scores(), Row(), list[Clip]()
        self.seconds: dict[str, list[float]] = {"encode": [], "decode": []}
        self.bytes = 0.0
        self.shape: Sequence[int] = ()  # of the clip that time and memory were measured with

    @property
    def vae(self) -> VideoVAE:
        assert self.model is not None
        return self.model.vae

    def mean(self, metric: str) -> float:
        """Return the mean of a metric, minus infinity where there is none."""
        value = describe(row.get(metric) for row in self.scores.table)["mean"]
        return -math.inf if value is None else value

    def row(self) -> Row:
        """Return its line of the table."""
        table = self.scores.table
        row: Row = {"vae": self.name}
        for metric in [key for key in table[0] if key not in ("path", "frames", "height", "width", "mse")]:
            found = describe(line[metric] for line in table)
            row |= {metric: found["mean"], f"{metric}_low": found["low"], f"{metric}_high": found["high"]}
        row |= {"psnr_pooled": pooled(table)} | {key: value["value"] for key, value in self.values.items()}
        row |= {f"{part}_ms": 1000 * statistics.median(times) for part, times in self.seconds.items()}
        row |= {"peak_mib": self.bytes / 2**20, "parameters": sum(p.numel() for p in self.vae.parameters())}
        for half in HALVES:
            names = self.vae.prefixes(half)
            row[f"{half}_parameters"] = sum(p.numel() for n, p in self.vae.named_parameters() if n.startswith(names))
        shape, (t, h, w) = self.shape[-3:], self.vae.stride
        padded = self.vae.fitting_frames(shape[0]), -(-shape[1] // h) * h, -(-shape[2] // w) * w
        numbers = self.vae.latent_channels * self.vae.latent_frames(padded[0]) * (padded[1] // h) * (padded[2] // w)
        row |= {"compression": 3 * math.prod(shape) / numbers, "bits_per_pixel": BITS * numbers / math.prod(shape)}
        row |= {"stride": f"{t}x{h}x{w}", "latent_channels": self.vae.latent_channels}
        padding = "" if padded == tuple(shape) else "to " + "x".join(map(str, padded))
        return row | {"padded": padding, "videos": len(table), "path": self.path}


@dataclass
class Contest:
    """The clips that all VAEs get, and how they are judged by them."""

    judge: Judge
    reading: Reading
    root: str
    entries: list[Entry]
    device: torch.device
    precision: Precision
    shown: int

    def __post_init__(self) -> None:
        single = replace(self.reading, batch=1, workers=0).load(self.root, self.entries)
        first = next((clips["video"] for clips in single if "video" in clips), None)
        if first is None:
            raise DataError(f"no video under {self.root} has {self.reading.frames} frames that can be read")
        self.distances: Row = {}  # their protocols
        self.clip = to_float(first)  # (1, 3, T, H, W), what times and memory are measured with

    def score(self, contender: Contender) -> None:
        """Send all clips through a VAE."""
        assert contender.model is not None
        log.info("%s: %d videos", contender.name, len(self.entries))
        alone = Ranks(0, 1, self.device)
        distances = self.judge.distances(self.reading.frames, self.device)
        self.distances = {distance.name: distance.protocol() for distance in distances}
        pictures = Pictures(self.shown, len(self.entries))
        known_statistics(distances, self.root, self.entries, self.reading, alone)
        contender.model.to(self.device)
        loader = self.reading.load(self.root, self.entries, pin=self.device.type == "cuda")
        contender.scores = score_vae(contender.model, loader, self.judge.suite(self.device), [pictures, *distances])
        contender.model.cpu()
        if not contender.scores.rows:
            raise DataError("no video could be measured")
        for distance in distances:
            contender.values |= settle(distance, self.reading.batches(len(self.entries)), alone)
        contender.clips = pictures.gather(contender.scores, alone)

    @torch.inference_mode()
    def time(self, contender: Contender, counts: bool = True) -> None:
        """Encode and decode the clip once."""
        model, cuda = contender.model, self.device.type == "cuda"
        assert model is not None
        model.to(self.device)
        x = self.clip.to(self.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        wait: Callable[[], Any] = torch.cuda.synchronize if cuda else time.perf_counter
        wait()
        begun = time.perf_counter()
        z = model.encode(x).mode()
        wait()
        encoded = time.perf_counter()
        model.decode(z)
        wait()
        if counts:
            contender.seconds["encode"].append(encoded - begun)
            contender.seconds["decode"].append(time.perf_counter() - encoded)
        if cuda:
            contender.bytes = torch.cuda.max_memory_allocated(self.device)
        model.cpu()

    def weigh(self, contender: Contender, weights: Weights) -> None:
        """Find the peak memory of a VAE; on a CPU by a process of its own."""
        contender.shape = self.clip.shape
        if self.device.type == "cpu":
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                job = pool.submit(peak_memory, contender.path, weights, tuple(self.clip.shape), self.precision)
                contender.bytes = job.result()


@torch.inference_mode()
def peak_memory(path: str, weights: Weights, shape: tuple[int, ...], precision: Precision) -> float:
    """Return how many bytes more this process takes when a VAE is loaded and sent a clip `(B, 3, T, H, W)`."""
    before = resident("VmRSS")
    model = Fitted(checkpoint.load(path, weights=weights))
    with precision_context(torch.device("cpu"), precision):
        model.decode(model.encode(torch.zeros(shape)).mode())
    return resident("VmHWM") - before


def resident(key: Literal["VmRSS", "VmHWM"]) -> float:
    """Return the resident memory of this process, or the most it ever was, in bytes."""
    if os.path.exists("/proc/self/status"):  # where ru_maxrss counts what the process was started by, too
        with open("/proc/self/status", encoding="ascii") as file:
            return 1024 * float(next(line.split()[1] for line in file if line.startswith(key)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
