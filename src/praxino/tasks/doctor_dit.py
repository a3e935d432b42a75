"""The doctor's look at latents as data: cached, learned by a small denoiser, and turned back into frames."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from praxino.data.latent_file import Shards, ShardWriter
from praxino.diffusion.loss import DiffusionLoss
from praxino.diffusion.path import RectifiedFlow
from praxino.diffusion.solve import Solver
from praxino.diffusion.time import UniformTime
from praxino.models.dit import VideoDiT
from praxino.models.vae import VideoVAE
from praxino.tasks.doctor_check import Check, Colour

CELLS = 8  # rows and columns of latents that the denoiser is tried on
FAR = 4  # the mean square of what is drawn may be so many times that of normalised latents, 1, or smaller than it
STEPS, DRAWS = 20, 8  # of its training, each on as many noise levels


def check_latent_training(model: VideoVAE, posteriors: Tensor) -> Iterator[Check]:
    """Try what a denoiser's training does with the moments `(B, 2C, T, h, w)` of clips."""
    yield check_cache(posteriors)
    mean = posteriors[:1].chunk(2, dim=1)[0][..., :CELLS, :CELLS].float()
    axes = (0, 2, 3, 4)
    shift, scale = mean.mean(axes, keepdim=True), mean.std(axes, keepdim=True).clamp(min=1e-6)
    z = (mean - shift) / scale
    with torch.random.fork_rng(devices=[z.device] if z.is_cuda else []):
        torch.manual_seed(0)
        net = VideoDiT(z.shape[1], width=64, depth=2, num_heads=2).to(z.device)
        yield check_learning(net, z)
        noise = torch.randn(z.shape).to(z)
    yield check_sample(net, noise, z, lambda drawn: model.decode(drawn * scale + shift))


@torch.no_grad()
def check_sample(net: VideoDiT, noise: Tensor, z: Tensor, decode: Callable[[Tensor], Tensor]) -> Check:
    """See that what is drawn from noise has the scale of the normalised latents `z`, and can be decoded."""
    drawn = Solver(RectifiedFlow(), "flow", "euler", 4)(net.eval(), noise)
    y, square = decode(drawn), float(drawn.square().mean())
    least = float(z.square().mean()) / FAR  # of a still clip 0
    good = bool(y.isfinite().all()) and least < square < FAR
    detail = f"mean square of latents drawn, and decoded to finite frames; must lie in {least:.2g} to {FAR}"
    return Check("sample", square, "green" if good else "red", detail)


def check_cache(moments: Tensor) -> Check:
    """See that latents come back from a shard, and that bf16 is fine enough for them."""
    due = moments.transpose(1, 2).bfloat16().cpu()  # (B, T, 2C, h, w)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.safetensors"
        with ShardWriter(path, path.with_suffix(".tmp")) as writer:
            writer.add(due)
            writer.close()
        back = Shards(folder).read(path.name, 0, due.numel()).view_as(due).clone()
    mean = moments.chunk(2, dim=1)[0].float().cpu()
    error = (back.transpose(1, 2).chunk(2, dim=1)[0].float() - mean).square().mean().sqrt() / (mean.std() or 1)
    colour: Colour = "red" if not torch.equal(back, due) else "green" if error < 0.02 else "yellow"
    return Check("cache", float(error), colour, "rounding of the cached latents (bf16), in their deviations")


def check_learning(net: VideoDiT, z: Tensor) -> Check:
    """See that a few steps on the latents of one clip `(1, C, T, h, w)` lower the loss, at fixed times and noise."""
    x, t = z.expand(DRAWS, -1, -1, -1, -1), ((torch.arange(DRAWS) + 0.5) / DRAWS).to(z)
    measure = partial(DiffusionLoss(RectifiedFlow(), UniformTime()), net, x, t=t, noise=torch.randn(x.shape).to(z))
    optimizer, before = torch.optim.AdamW(net.parameters(), lr=3e-3), float(measure()["loss"].detach())
    for _ in range(STEPS):
        optimizer.zero_grad()
        measure()["loss"].backward()
        optimizer.step()
    share = float(measure()["loss"].detach()) / before
    colour: Colour = "green" if share < 0.9 else "yellow" if share < 1 else "red"  # not a number is red, too
    return Check("denoiser", share, colour, f"loss of a small DiT after {STEPS} steps on a clip, of that before")
