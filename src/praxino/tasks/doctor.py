"""Doctor: look for what would make a training fail, or a model lie, before it costs days."""

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any, Literal

import torch
from omegaconf import DictConfig
from pydantic import Field
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from praxino import checkpoint, stream
from praxino.config import check_call
from praxino.data.clips import ClipSampler
from praxino.data.transforms import Size
from praxino.data.usable import Usable, find_usable
from praxino.errors import ConfigError, DataError, PraxinoError
from praxino.models.vae import VideoVAE, check_clip
from praxino.tasks.common import measure
from praxino.tasks.console import show_table
from praxino.tasks.device import pick_device
from praxino.tasks.doctor_check import Check, Colour
from praxino.tasks.doctor_dit import check_latent_training
from praxino.tasks.evaluation.score import Reading
from praxino.tasks.params import Kept
from praxino.tasks.rows import without_nan, write_atomic
from praxino.tasks.rundir import make_directory, versions
from praxino.video import to_float

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `doctor` and call it."""
    return doctor(**check_call(doctor, cfg))


def doctor(
    data: dict[str, str],
    out: str,
    vae: str | None = None,
    frames: Annotated[int, Field(ge=1)] = 17,
    stride: Annotated[int, Field(ge=1)] = 1,
    size: Size = 64,
    clips: Annotated[int, Field(ge=1)] = 8,
    weights: Literal["ema", "raw"] = "ema",
    device: str = "auto",
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Probe the videos under `data.root`, a VAE on clips of them, a small DiT on its latents; write out/doctor.json.

    Args:
        clips: videos that the VAE is tried on, one clip each.

    Returns:
        the content of doctor.json.

    Raises:
        PraxinoError: a check is red; the report is written all the same.
    """
    if size is None:
        raise ConfigError("size=null: give the pixels at which a model is to be trained, e.g. size=64")
    chosen = pick_device(device)
    model = None if vae is None else checkpoint.load(vae, weights=weights, device=chosen)
    if model is not None:
        check_clip(model, frames, size)
    target = make_directory(out)
    sampler = ClipSampler(frames, stride, short="drop", where="start")
    checks = list(check_data(data["root"], sampler, size, cache_dir))
    if model is not None and not any(check.colour == "red" for check in checks):
        reading = Reading(frames, stride, size=size, limit=clips, cache_dir=cache_dir)
        loader = reading.load(data["root"], reading.find(data["root"]).entries)
        videos = [to_float(batch["video"]).to(chosen) for batch in loader if "video" in batch]
        checks += check_vae(model, torch.cat(videos)) if videos else [Check("clips", 0, "red", "no clip can be read")]
    found = [without_nan(asdict(check)) for check in checks]
    red = [check.name for check in checks if check.colour == "red"]
    protocol = {"root": data["root"], "vae": vae, "frames": frames, "stride": stride, "size": size, "clips": clips}
    result = {"healthy": not red, "checks": found, "protocol": protocol, "versions": versions()}
    write_atomic(target / "doctor.json", json.dumps(result, indent=2) + "\n")
    rows = [
        (check.name, check.colour, None if math.isnan(check.value) else check.value, check.detail) for check in checks
    ]
    show_table(f"Report: {target / 'doctor.json'}", rows, ("check", "state", "value", "what it says"))
    if red:
        raise PraxinoError(
            f"{len(red)} of {len(checks)} checks are red: {', '.join(red)}; see {target / 'doctor.json'}"
        )
    return result


# ----------------------------------------------------------------------------------------------------------- data
def check_data(root: str, sampler: ClipSampler, size: Size, cache_dir: str | None) -> Iterator[Check]:
    """Look at the videos: how many can be read, how long, how fast and how large they are."""
    try:
        every = find_usable(root, ClipSampler(1), cache_dir=cache_dir)
    except DataError as error:
        yield Check("readable", 0.0, "red", str(error).splitlines()[0])
        return
    count, bad = len(every.entries), len(every.rejected)
    share = count / (count + bad)
    worst = f", e.g. {every.rejected[0].path!a}: {every.rejected[0].reason}" if bad else ""
    colour: Colour = "green" if not bad else "yellow" if share >= 0.5 else "red"
    yield Check("readable", share, colour, f"{count} of {count + bad} videos{worst}")
    yield from check_entries(every, sampler, size)


def check_entries(every: Usable, sampler: ClipSampler, size: Size) -> Iterator[Check]:
    """Look at what the readable videos are like."""
    infos = [entry.info for entry in every.entries]
    span = (sampler.frames - 1) * sampler.stride + 1
    short = sum(info.frames < span for info in infos)
    colour: Colour = "red" if short == len(infos) else "yellow" if short else "green"
    shortest = min(info.frames for info in infos)
    yield Check("length", shortest, colour, f"frames of the shortest; {short} of {len(infos)} are shorter than {span}")
    rates = sorted({round(float(info.fps), 3) for info in infos})
    detail = "frames a second" if len(rates) == 1 else f"to {rates[-1]:g} frames a second: data.fps makes them equal"
    yield Check("rate", rates[0], "green" if len(rates) == 1 else "yellow", detail)
    height, width = (size, size) if isinstance(size, int) else (size or (1, 1))
    small = sum(info.height < height or info.width < width for info in infos)
    least = min(min(info.height, info.width) for info in infos)
    detail = f"pixels of the shortest side; {small} of {len(infos)} are enlarged to {height}x{width}"
    yield Check("size", least, "yellow" if small else "green", detail)


# ------------------------------------------------------------------------------------------------------------ VAE
def check_vae(model: VideoVAE, x: Tensor) -> Iterator[Check]:
    """Try a VAE on clips `(B, 3, T, H, W)`."""
    started = time.perf_counter()
    with torch.inference_mode():
        posteriors = [model.encode(clip) for clip in x.split(1)]
        moments = torch.cat([posterior.moments for posterior in posteriors])
        z = torch.cat([posterior.mean for posterior in posteriors])
        variance = torch.cat([posterior.std.square() for posterior in posteriors])
        y = torch.cat([model.decode(mean) for mean in z.split(1)]).float().clamp(-1, 1)
        seconds = (time.perf_counter() - started) / len(x)
        finite = bool(z.isfinite().all() and y.isfinite().all())
        yield Check("finite", float(finite), "green" if finite else "red", "latents and reconstructions")
        if not finite:
            return
        yield from check_time(model, x[:1], z[:1])
        yield check_latents(model, z, variance)
        psnr = float(measure(x.float(), y)["psnr"].mean())
        colour: Colour = "green" if psnr >= 20 else "yellow" if psnr >= 10 else "red"
        yield Check("round trip", psnr, colour, f"dB of PSNR, mean of {len(x)} clips encoded and decoded")
    yield check_cost(model, x[:1], seconds)
    yield from check_latent_training(model, moments.clone())  # outside of inference mode


def check_time(model: VideoVAE, x: Tensor, z: Tensor) -> Iterator[Check]:
    """See that later frames change no earlier latent, and that pieces of a clip give the latents of the whole."""
    first, step = model.frame_rule
    at = first + step * ((x.shape[2] - first) // step // 2)  # frames that stay
    scale = float(z.std()) or 1.0
    other = torch.cat([x[:, :, :at], -x[:, :, at:] + 0.5], dim=2)
    kept = model.latent_frames(at)
    leak = float((model.encode(other).mean - z)[:, :, :kept].abs().max()) / scale
    bad: Colour = "red" if model.streamable else "yellow"
    detail = f"largest change of {kept} latents by the frames after them, in deviations"
    more = "" if model.streamable else "; this model mixes all frames, so given frames look different in prediction"
    yield Check("causality", leak, "green" if leak < 1e-4 else bad, detail + more)
    if model.streamable:
        gap = float((stream.encode(model, x, chunk=step).mean - z).abs().max()) / scale
        detail = f"largest difference of latents by {step} frames at a time, in deviations"
        yield Check("chunks", gap, "green" if gap < 1e-3 else "red", detail)


def check_latents(model: VideoVAE, mean: Tensor, variance: Tensor) -> Check:
    """See that the statistics stored with the VAE are those of these latents."""
    try:
        shift = model.normalize(mean).double().mean(dim=(0, 2, 3, 4))
        unit = model.normalize(torch.stack([torch.zeros_like(mean[:1]), torch.ones_like(mean[:1])]).flatten(0, 1))
    except ConfigError as error:
        return Check("statistics", math.nan, "yellow", str(error).splitlines()[0])
    scale = (unit[1] - unit[0]).double()[:, 0, 0, 0]
    axes = (0, 2, 3, 4)
    std = scale * (mean.double().var(dim=axes, correction=0) + variance.double().mean(dim=axes)).sqrt()
    fits = bool((shift.abs() < 1).all() and ((std > 0.5) & (std < 2)).all())
    detail = f"deviation of normalised latents, {float(std.min()):.3g} to {float(std.max()):.3g} by channel; "
    detail += f"largest mean {float(shift.abs().max()):.3g}"
    stored = "" if model.statistics is not None else "; none are stored: praxino-encode stats_only=true measures them"
    return Check("statistics", float(std.mean()), "green" if fits and not stored else "yellow", detail + stored)


def check_cost(model: VideoVAE, x: Tensor, seconds: float) -> Check:
    """Estimate the memory of training on one clip: AdamW's 16 bytes a parameter, and what a forward pass keeps."""
    kept = Kept(model)
    with saved_tensors_hooks(kept.add, lambda tensor: tensor), torch.enable_grad():
        model(x.clone())
    total = 16 * sum(p.numel() for p in model.parameters()) + kept.bytes
    detail = f"GiB to train on a clip, an estimate; {kept.bytes / 2**30:.3g} of them activations"
    return Check("cost", total / 2**30, "green", f"{detail}; {seconds:.3g} s a clip, encoded and decoded here")
