"""A real, tiny training of a denoiser for the tests: latents of 3 channels and 4 frames, made in memory."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from praxino.diffusion.loss import DiffusionLoss
from praxino.diffusion.path import RectifiedFlow
from praxino.diffusion.time import LogitNormalTime
from praxino.lit.context import Context
from praxino.lit.dit import DiTModule
from praxino.lit.optim import warmup_cosine
from praxino.models.dit import VideoDiT
from training import Clips, Data

SHAPE = (3, 4, 4, 4)


def make_net(seed: int = 0, **options: Any) -> VideoDiT:
    """Return a net whose prediction is not zero, as it would be of a fresh one."""
    torch.manual_seed(seed)
    net = VideoDiT(**{"channels": 3, "width": 32, "depth": 2, "num_heads": 2, "classes": 3, **options})
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return net


def make_dit(**overrides: Any) -> DiTModule:
    arguments: dict[str, Any] = {
        "net": make_net(),
        "loss": DiffusionLoss(RectifiedFlow(), LogitNormalTime()),
        "optimizer": partial(torch.optim.AdamW, lr=1e-2, fused=True),
        "scheduler": partial(warmup_cosine, total=100, warmup=3),
        "context": Context(0.5, [1, 2]),
        "drop": {"label": 0.2},
    }
    return DiTModule(**{**arguments, **overrides})


class FixedLoss(DiffusionLoss):
    """Times and noise that are a function of the clip, so that batches may be put together in any way."""

    def __call__(self, denoise: Any, x: Tensor, **options: Any) -> dict[str, Tensor]:
        seeds = (x[:, 0, 0, 0, 0] * 1e6).long().tolist()
        draws = [torch.Generator().manual_seed(abs(seed)) for seed in seeds]
        options.setdefault("t", torch.stack([torch.rand((), generator=g, dtype=x.dtype) for g in draws]))
        options.setdefault("noise", torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in draws]))
        return super().__call__(denoise, x, **options)


class LatentSet(Clips):
    """Latents that are a function of (epoch, index): a label's mean and a little noise."""

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        latent = torch.randn(SHAPE, generator=generator) * 0.3 + (index % 3 - 1)
        return {"latent": latent, "first": True, "label": index % 3, "index": index, "path": f"{index}.mp4"}


class LatentBatches(Data):
    """`training.Data` with latents in the place of clips."""

    clips = LatentSet
