"""Sample: new videos from a denoiser, or from the prior of a VAE; each a function of the seed and its number alone."""

import inspect
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor

from praxino import checkpoint
from praxino.callbacks.media import COLUMNS, contact_sheet, write_png
from praxino.config import check_call
from praxino.data.transforms import Size
from praxino.diffusion.noise import FrameNoise
from praxino.diffusion.solve import Sampler
from praxino.errors import ConfigError
from praxino.models.vae import VideoVAE
from praxino.tasks.common import at_least, check_written
from praxino.tasks.console import progress
from praxino.tasks.device import Precision, precision_context
from praxino.tasks.generation.generate import Rollout, decode, frames_of, seed_of
from praxino.tasks.generation.opening import Settings, is_denoiser, open_generator
from praxino.tasks.outputs import SAMPLES, written
from praxino.tasks.ranks import launch
from praxino.tasks.rows import write_atomic, write_jsonl
from praxino.tasks.rundir import make_directory, versions
from praxino.video import Video, Writer, to_uint8

log = logging.getLogger(__name__)

PRIOR_FRAMES, PRIOR_SIZE = 17, 64  # of draws from a VAE, which does not say what it was trained on
OF_A_VAE = ("ckpt", "weights", "batch")  # the settings that draws from a VAE know
RATE = 8.0  # frames a second where no training says another
PIECE = 4  # latents of the prior at a time
SHOWN = 32  # videos on the sheet
BESIDE = ("protocol.json", "sheet.png")  # the record
Draw = Callable[[Sequence[int], list[int]], Iterator[Tensor]]


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `sample` and call it."""
    return sample(**check_call(sample, cfg))


def sample(
    ckpt: str,
    out: str,
    n: int = 4,
    vae: str | None = None,
    label: int | str | list[int | str] | None = None,
    text: str | None = None,
    guidance: float = 1.0,
    guidance_interval: list[float] | tuple[float, float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
    sampler: Sampler = "euler",
    steps: int = 50,
    shift: float = 1.0,
    frames: int | None = None,
    size: Size = None,
    rollout: Rollout = "full",
    window: int | None = None,
    overlap: int | None = None,
    context_noise: float = 0.0,
    seed: int = 0,
    batch: int = 4,
    fps: float | None = None,
    weights: Literal["ema", "raw"] = "ema",
    save_latents: bool = False,
    lossless: bool = False,
    quality: int = 18,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    precision: Precision = "32",
) -> dict[str, Any]:
    """Draw videos and write them to `out/00000.mp4`, ..., with samples.jsonl and a sheet of a few frames of each.

    Sample k depends on `seed` and k, not on `n`, the batch or the number of processes. What an earlier run wrote to the
    same `out` is removed; until the samples are complete, samples.jsonl says `unfinished`.

    Args:
        ckpt: a run of a denoiser or a checkpoint of it; or whatever `praxino.load` reads: then N(0, 1) goes through the
            latent statistics and the decoder, and conditions, guidance, sampler and rollout have no meaning.
        vae: where the VAE of the denoiser lies now, if the checkpoint does not find it.
        label: a class by name, or by number unless names are numbers; a list goes round.
        text: a file of praxino-embed-text.
        guidance: 1 leaves it out, above 1 stresses the condition, 0 ignores it; guidance_interval and guidance_rescale
            as in `praxino.diffusion.guide`.
        shift: of the times of the steps; above 1 more of them see much noise.
        frames: any number; the surplus of the last latent is cut off. None: as trained.
        size: a square of that many pixels, or [height, width]. None: as trained.
        rollout: how videos longer than those of training come about: in windows of `window` frames, of which the
            first `overlap` are finished already.
        context_noise: the noise level at which the denoiser is shown finished frames.
        fps: frames a second of the files. None: as trained, or 8 where that is not known.
        save_latents: write the normalised latents `(C, T, H, W)` to `out/latents`.
        devices, num_nodes: processes, which share the batches.

    Returns:
        samples, frames, size and seconds.
    """
    settings = Settings.among(locals())
    at_least(1, n=n, frames=frames, devices=devices, num_nodes=num_nodes)
    check_written(quality, fps)
    started = time.perf_counter()
    with launch(device, devices, num_nodes) as ranks:
        draw: Draw
        if is_denoiser(ckpt):
            generator, protocol = open_generator(settings, ranks.device), asdict(settings)
            model, trained = generator.vae, generator.trained.shape
            count = frames or frames_of(model, trained[1])
            cells = cells_of(model, size, trained[2:])
            rate = fps or generator.trained.fps or RATE
            length = model.latent_frames(model.fitting_frames(count))
            generator.check(length, note=str(count))
            labels, classes = generator.labels, generator.trained.classes

            def draw(seeds: Sequence[int], numbers: list[int]) -> Iterator[Tensor]:
                return generator.draw(seeds, numbers, length, cells)
        else:
            protocol = of_a_vae(settings)
            model = checkpoint.load(ckpt, weights=weights, device=ranks.device)
            count, rate, labels, classes = frames or PRIOR_FRAMES, fps or RATE, None, None
            cells = cells_of(model, PRIOR_SIZE if size is None else size, ())
            length = model.latent_frames(model.fitting_frames(count))
            log.warning(
                "%s is a VAE: its samples are decoded N(0, 1), its prior, which is not where it puts videos", ckpt
            )

            def draw(seeds: Sequence[int], numbers: list[int]) -> Iterator[Tensor]:
                return prior(FrameNoise(seeds, (model.latent_channels, *cells), ranks.device), length)

        model.denormalize(torch.zeros(1, model.latent_channels, 1, 1, 1))  # says now that statistics are missing
        target = ranks.on_first(lambda: make_directory(out))
        paths = [target / f"{number:05d}.mp4" for number in range(n)]
        planned = [name for path in paths for name in files_of(path, save_latents)]
        batches = [list(range(k, min(k + batch, n))) for k in range(0, n, batch)]
        pixels = [cells[0] * model.stride[1], cells[1] * model.stride[2]]

        def work() -> list[dict[str, Any]]:
            rows = []
            with precision_context(ranks.device, precision), progress("samples", n, ranks.rank == 0) as done:
                for numbers in batches[ranks.rank :: ranks.world]:
                    begun, seeds = time.perf_counter(), [seed_of(seed, number) for number in numbers]
                    files = [paths[number] for number in numbers]
                    pieces = keep(draw(seeds, numbers), files) if save_latents else draw(seeds, numbers)
                    write_videos(decode(model, pieces, length, batch), files, count, rate, lossless, quality)
                    seconds = round((time.perf_counter() - begun) / len(numbers), 3)
                    for k in numbers:
                        row = describe(k, paths[k], seed, count, pixels, labels, classes, seconds)
                        rows.append(row | {"fps": rate, "files": files_of(paths[k], save_latents)})
                    done(len(numbers) * ranks.world)
            return rows

        protocol |= {"seed": seed, "precision": precision, "versions": versions()}

        def finish() -> dict[str, Any]:
            write_atomic(target / "protocol.json", json.dumps(protocol, indent=2) + "\n")
            write_png(target / "sheet.png", contact_sheet([thumbnails(path) for path in paths[:SHOWN]]))
            write_jsonl(target / SAMPLES, rows)
            log.info("%d samples of %d frames in %s", n, count, target)
            seconds = round(time.perf_counter() - started, 3)
            return {"samples": n, "frames": count, "size": pixels, "seconds": seconds, "out": str(target)}

        with written(target, SAMPLES, planned, BESIDE, ranks=ranks, ckpt=ckpt, seed=seed):
            rows = sorted((row for part in ranks.on_all(work) for row in part), key=lambda row: row["number"])
            return ranks.on_first(finish)


def shape_of(
    ckpt: str,
    vae: str | None = None,
    weights: Literal["ema", "raw"] = "ema",
    frames: int | None = None,
    size: Size = None,
) -> tuple[int, list[int]]:
    """Return how many frames samples have, and their height and width, without drawing any."""
    if is_denoiser(ckpt):
        _, trained = checkpoint.load_denoiser(ckpt, weights=weights)
        model, latents = checkpoint.load_vae_of(trained, path=vae), trained.shape
        count, cells = frames or frames_of(model, latents[1]), cells_of(model, size, latents[2:])
    else:
        model = checkpoint.load(ckpt, weights=weights)
        count, cells = frames or PRIOR_FRAMES, cells_of(model, PRIOR_SIZE if size is None else size, ())
    return count, [cells[0] * model.stride[1], cells[1] * model.stride[2]]


def files_of(path: Path, latents: bool) -> list[str]:
    """Return the files of a sample, relative to the folder of its video."""
    return [path.name, *([f"latents/{path.stem}.safetensors"] if latents else [])]


def describe(
    number: int,
    path: Path,
    seed: int,
    frames: int,
    size: list[int],
    labels: tuple[int, ...] | None,
    classes: list[str] | None,
    seconds: float,
) -> dict[str, Any]:
    """Return the row of a sample."""
    label = None if labels is None else labels[number % len(labels)]
    name = None if label is None or classes is None else classes[label]
    row = {"file": path.name, "number": number, "seed": seed, "frames": frames, "size": size}
    return row | {"label": label, "class": name, "seconds": seconds}


def of_a_vae(settings: Settings) -> dict[str, Any]:
    """Return the settings that mean something where a VAE decodes noise; raise ConfigError where others are given."""
    defaults = Settings.among({name: known.default for name, known in inspect.signature(sample).parameters.items()})
    for name, value in vars(settings).items():
        if name not in OF_A_VAE and value != getattr(defaults, name):
            raise ConfigError(f"{name}={value}: ckpt is a VAE, whose samples are decoded noise: leave {name} out")
    return {name: getattr(settings, name) for name in OF_A_VAE}


def cells_of(vae: VideoVAE, size: Size, trained: Sequence[int]) -> tuple[int, int]:
    """Return height and width in latents, of a size in pixels or as trained."""
    if size is None:
        return trained[0], trained[1]
    height, width = (size, size) if isinstance(size, int) else size
    _, h, w = vae.stride
    if height < h or width < w or height % h or width % w:
        raise ConfigError(f"size={size} does not fit: use multiples of {h} and {w} pixels")
    if trained and tuple(trained) != (height // h, width // w):
        log.warning("size=%s: the model was trained on %dx%d", size, trained[0] * h, trained[1] * w)
    return height // h, width // w


def prior(noise: FrameNoise, length: int) -> Iterator[Tensor]:
    """Yield draws from the standard normal, a few latents at a time."""
    for start in range(0, length, PIECE):
        yield noise(start, min(start + PIECE, length))


def keep(pieces: Iterator[Tensor], files: list[Path]) -> Iterator[Tensor]:
    """Pass latents on, and write those of each file when all are there."""
    held = []
    for piece in pieces:
        held.append(piece.cpu())
        yield piece
    folder = make_directory(files[0].parent / "latents")
    for file, latent in zip(files, torch.cat(held, dim=2), strict=True):
        place = folder / f"{file.stem}.safetensors"
        checkpoint.replace(place, lambda path, z=latent: save_file({"latent": z.contiguous()}, path))  # type: ignore[misc]


def write_videos(
    videos: Iterator[Tensor], paths: list[Path], frames: int, fps: float, lossless: bool, quality: int
) -> None:
    """Write the first `frames` frames of each row."""
    written = 0
    with ExitStack() as stack:
        codec = "lossless" if lossless else None
        writers = [stack.enter_context(Writer(path, fps, codec, quality)) for path in paths]  # type: ignore[arg-type]
        for y in videos:
            y = to_uint8(y[:, :, : frames - written]).cpu()
            for writer, video in zip(writers, y, strict=True):
                writer.add(video)
            written += y.shape[1]


def thumbnails(path: Path) -> Tensor:
    """Return a few frames of a written video."""
    with Video(path, index_dir=None) as video:
        count = video.info.frames
        return video.read(torch.linspace(0, count - 1, min(COLUMNS, count)).round().long().tolist())
