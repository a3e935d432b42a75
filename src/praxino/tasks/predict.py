"""Predict: continue videos from their first frames, and compare with what came, and with the last frame held."""

import json
import logging
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from torch import Tensor

from praxino import stream
from praxino.config import check_call
from praxino.data.transforms import Resize, Size
from praxino.diffusion.solve import Sampler
from praxino.errors import ConfigError, DataError, NonFiniteError
from praxino.tasks.common import at_least, check_written, make_resize, pass_over
from praxino.tasks.device import Precision, precision_context
from praxino.tasks.generation.generate import Generator, Rollout, decode, latents_of, seed_of
from praxino.tasks.generation.horizon import PROTOCOL, SCORES, judge, report, score, summary
from praxino.tasks.generation.opening import Settings, open_generator
from praxino.tasks.outputs import PREDICTIONS, written
from praxino.tasks.ranks import launch
from praxino.tasks.reconstruct import find_sources, fitting_chunk, output_names
from praxino.tasks.rows import without_nan, write_atomic, write_jsonl
from praxino.tasks.rundir import check_outside, make_directory, versions
from praxino.video import DecodeFailure, Video, Writer, to_float, to_uint8

log = logging.getLogger(__name__)

GAIN = 4.0  # of the error in side_by_side
BESIDE = ("rejected.jsonl", "metrics.json", "horizon.csv")  # the record
Row = dict[str, Any]


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `predict` and call it."""
    return predict(**check_call(predict, cfg))


def predict(
    ckpt: str,
    input: str,
    out: str,
    context: int = 5,
    frames: int = 17,
    start: int = 0,
    stride: int = 1,
    size: Size | Literal["source"] = None,
    compare: bool = True,
    samples: int = 8,
    limit: int | None = None,
    vae: str | None = None,
    label: int | str | None = None,
    text: str | None = None,
    guidance: float = 1.0,
    guidance_interval: list[float] | tuple[float, float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
    sampler: Sampler = "euler",
    steps: int = 50,
    shift: float = 1.0,
    rollout: Rollout = "full",
    window: int | None = None,
    overlap: int | None = None,
    context_noise: float = 0.0,
    seed: int = 0,
    batch: int = 8,
    fps: float | None = None,
    images: bool = False,
    lossless: bool = True,
    quality: int = 18,
    weights: Literal["ema", "raw"] = "ema",
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    precision: Precision = "32",
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Continue videos; write them, a row for each, and how good predictions are at each distance.

    What is predicted of a video depends on `seed` and its path under `input`, not on the others, `samples`, the batch
    or the number of processes. What an earlier run wrote to the same `out` is removed; until all is written,
    predictions.jsonl says `unfinished`.

    Args:
        ckpt: a run of a denoiser or a checkpoint of it.
        input: a video, a folder of frames, or a tree of them, which is mirrored under each folder of `out`.
        limit: continue that many videos, evenly spread over the sorted paths.
        context: frames that are given, 1 + 4k for a VAE of stride 4; they come back as they were read.
        frames: frames in all, any number: the surplus of the last latent is cut off.
        start: the first given frame; then every `stride`-th.
        size: a square of that many pixels, or [height, width], resized and centre-cropped. None: as trained. source:
            the video's own, padded to what the model takes and cut again.
        compare: measure videos that are long enough against what came, and write truth, mean and side_by_side.
        samples: predictions of each video, 1 without compare: the first is written, it and the mean are measured.
        label, text, guidance, shift, rollout, window, overlap, context_noise: as in `praxino.tasks.sample.sample`;
            guidance without label and text stresses the given frames.
        batch: samples at a time through network and decoder.
        fps: of the written videos; None: of the source.
        lossless: write full, context, prediction, mean and truth without loss, else as H.264 of `quality`.

    Returns:
        the content of metrics.json; without a measured video its counts only.
    """
    settings = Settings.among(locals())
    at_least(1, context=context, stride=stride, samples=samples, limit=limit, devices=devices, num_nodes=num_nodes)
    at_least(0, start=start)
    check_written(quality, fps)
    if frames <= context:
        raise ConfigError(f"frames={frames} counts the context={context}: use more, e.g. {context + 12}")
    check_outside(out, {"input": input})
    root, target = Path(input).expanduser().absolute(), Path(out).expanduser().absolute()
    with launch(device, devices, num_nodes) as ranks:
        generator = open_generator(settings, ranks.device)
        given = latents_of(generator.vae, context, "context")
        length = generator.vae.latent_frames(generator.vae.fitting_frames(frames))
        generator.check(length, given, note=str(frames))
        resize = resize_of(generator, size)
        ranks.on_first(lambda: make_directory(target))
        root, sources, rejected = ranks.on_first(lambda: find_sources(root, images, cache_dir, limit))
        kinds = ["context", "prediction", "full", *(["truth", "mean", "side_by_side"] if compare else [])]
        names = output_names(sources)
        planned = [f"{kind}/{name}" for name in names for kind in kinds]
        read = [root / source for source in sources]
        drawn = samples if compare else 1
        plan = Plan(generator, context, frames, length, start, stride, resize, drawn, compare, seed, fps)

        def work() -> tuple[list[Row], list[Row]]:
            rows, failed = [], []
            with precision_context(ranks.device, precision):
                for source, name in list(zip(sources, names, strict=True))[ranks.rank :: ranks.world]:
                    writers = {kind: (target / kind / name, codec_of(kind, lossless), quality) for kind in kinds}
                    try:
                        row = plan.predict(root, source, writers)
                    except (DecodeFailure, NonFiniteError) as error:
                        failed.append(pass_over(source, error))
                    else:
                        files = [f"{kind}/{name}" for kind in kinds if (target / kind / name).exists()]
                        rows.append({"path": source, "output": name, "files": files, **row})
                        log.info("%s", summary(rows[-1]))
            return rows, failed

        protocol = asdict(settings) | {"window_latents": generator.window, "overlap_latents": generator.overlap}
        protocol |= {"input": input, "start": start, "stride": stride, "size": size, "seed": seed}
        protocol |= {"precision": precision, **PROTOCOL}

        def finish(rows: list[Row], rejected: list[Row]) -> dict[str, Any]:
            write_jsonl(target / "rejected.jsonl", rejected)
            curves = [row.pop("curves") for row in rows]
            if not rows:
                raise DataError(f"none of {len(sources)} videos under {input} could be continued: see {target}")
            counts = {"n": sum(curve is not None for curve in curves), "videos": len(rows), "rejected": len(rejected)}
            result: Row = {**counts, "context": context, "frames": frames, "samples": drawn}
            result |= score([curve for curve in curves if curve is not None], context)
            result |= {"protocol": protocol, "versions": versions()}
            write_atomic(target / "metrics.json", json.dumps(result, indent=2) + "\n")
            report(result, target, compare)
            write_jsonl(target / PREDICTIONS, rows)
            return result

        with written(target, PREDICTIONS, planned, BESIDE, read, ranks, ckpt=ckpt, seed=seed):
            parts = ranks.on_all(work)
            rows = sorted((row for part in parts for row in part[0]), key=lambda row: sources.index(row["path"]))
            rejected += [row for part in parts for row in part[1]]
            return ranks.on_first(lambda: finish(rows, rejected))


def resize_of(generator: Generator, size: Size | Literal["source"]) -> Resize | None:
    """Return the resizing of a size: that of the training where none is given, none for that of the source."""
    if size == "source":
        return None
    assert not isinstance(size, str)
    _, h, w = generator.vae.stride
    return make_resize([generator.trained.shape[2] * h, generator.trained.shape[3] * w] if size is None else size)


def codec_of(kind: str, lossless: bool) -> Literal["lossless"] | None:
    """Return the codec of a kind of video; side by side is to be looked at."""
    return "lossless" if lossless and kind != "side_by_side" else None


class Frames:
    """The frames of a video, taken in pieces of any size while reading on."""

    def __init__(self, chunks: Iterable[Tensor], name: str) -> None:
        self.chunks, self.name = iter(chunks), name
        self.held: list[Tensor] = []

    def take(self, count: int) -> Tensor:
        """Return the next frames, uint8 `(count, H, W, 3)`."""
        while (have := sum(map(len, self.held))) < count:
            chunk = next(self.chunks, None)
            if chunk is None:
                raise DecodeFailure(self.name, "corrupt", f"{count - have} frames fewer than its index promised")
            self.held.append(chunk)
        held = torch.cat(self.held) if self.held else torch.empty(0)
        self.held = [held[count:]]
        return held[:count]


@dataclass(frozen=True)
class Plan:
    """What is done with every video."""

    generator: Generator
    context: int
    frames: int
    length: int  # in latents
    start: int
    stride: int
    resize: Resize | None
    samples: int
    compare: bool
    seed: int
    fps: float | None

    def predict(self, root: Path, name: str, writers: dict[str, tuple[Path, Literal["lossless"] | None, int]]) -> Row:
        """Continue a video, write what `writers` asks for, and return its row."""
        begun = time.perf_counter()
        with Video(root / name) as video, ExitStack() as stack:
            info = video.info
            have = len(range(self.start, info.frames, self.stride))
            if have < self.context:
                raise DecodeFailure(
                    name, "short", f"{have} frames from {self.start} on, fewer than context={self.context}"
                )
            known = self.compare and have >= self.frames
            taken = self.frames if known else self.context
            geometry = self.resize(info.height, info.width) if self.resize else None
            size = [geometry.height, geometry.width] if geometry else [info.height, info.width]
            stop = self.start + (taken - 1) * self.stride + 1
            reader = Frames(video.chunks(fitting_chunk(*size), self.start, stop, self.stride, geometry), name)
            fps = self.fps or info.fps / self.stride
            open_ = {
                kind: stack.enter_context(Writer(path, fps, codec, quality))
                for kind, (path, codec, quality) in writers.items()
                if known or kind not in ("truth", "side_by_side")
            }
            given = reader.take(self.context)
            curves: dict[str, list[Tensor]] = {}
            show(open_, dict.fromkeys(("context", "full", "mean", "truth"), given))
            show(open_, {"side_by_side": beside(given, given, given)})
            for predictions in self.futures(name, given):
                count = next(iter(predictions.values())).shape[1]
                drawn = {key: to_uint8(y) for key, y in predictions.items()}
                one = drawn["sample"]
                show(open_, {"prediction": one, "full": one, "mean": drawn.get("mean", one)})
                if known:
                    truth, last = reader.take(count), given[-1:].expand(count, -1, -1, -1)
                    predictions["copy_last"] = to_float(last)
                    show(open_, {"truth": truth, "side_by_side": beside(truth, one, last)})
                    for key, scores in judge(to_float(truth), predictions).items():
                        curves.setdefault(key, []).append(scores)
        joined = {key: torch.cat(scores, dim=1).tolist() for key, scores in curves.items()}  # (2, frames)
        row: Row = {"frames": self.frames, "context": self.context, "size": size, "fps": float(fps), "measured": known}
        for index, metric in enumerate(SCORES):
            row[metric] = {key: statistics.fmean(both[index]) for key, both in joined.items()} if known else None
            row[metric] = without_nan(row[metric]) if known else None
        return {**row, "seconds": round(time.perf_counter() - begun, 3), "curves": joined if known else None}

    @torch.no_grad()
    def futures(self, name: str, given: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield the frames after the given ones as predicted, by kind, `(3, t, H, W)` on the CPU."""
        generator, (height, width) = self.generator, given.shape[1:3]
        vae, batch = generator.vae, generator.batch
        x = stream.pad_space(to_float(given[None]).to(generator.device), vae.stride[1], vae.stride[2])
        chunk = fitting_chunk(*x.shape[3:]) if vae.streamable else None
        z = vae.normalize(stream.encode(vae, x, chunk).mode().float())  # (1, C, K, h, w)
        seeds = [seed_of(self.seed, name, number) for number in range(self.samples)]
        pieces = generator.draw(seeds, range(self.samples), self.length, (z.shape[3], z.shape[4]), z)
        if self.samples > 1:
            pieces = (torch.cat([piece, piece.mean(dim=0, keepdim=True)]) for piece in pieces)
        done = 0
        for y in decode(vae, pieces, self.length, batch):
            begin, end = max(0, self.context - done), min(y.shape[2], self.frames - done)
            done += y.shape[2]
            if begin < end:
                y = y[:, :, begin:end, :height, :width].cpu()
                yield (
                    {"sample": y[0]}
                    if self.samples == 1
                    else {
                        "sample": y[0],
                        "mean": y[:-1].mean(dim=0),
                        "mean_latent": y[-1],
                    }
                )


def show(writers: dict[str, Writer], videos: dict[str, Tensor]) -> None:
    """Hand frames to the writers that there are."""
    for kind, video in videos.items():
        if kind in writers:
            writers[kind].add(video)


def beside(truth: Tensor, prediction: Tensor, last: Tensor) -> Tensor:
    """Join truth, prediction, the last given frame and the amplified error of the prediction, uint8 `(t, H, W, 3)`."""
    error = (GAIN * (prediction.float() - truth.float()).abs()).clamp(max=255).to(torch.uint8)
    return torch.cat([truth, prediction, last, error], dim=2)
