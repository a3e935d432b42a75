"""Fixtures for the comparison with the official models."""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from praxino.models.causalvae import CausalVAE
from praxino.models.vae import VideoVAE
from praxino.models.wfvae import WFVAE

GOLDEN = Path(__file__).parents[1] / "golden"


def recipe(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return the weight that every test of the official models has under this name: nothing needs to be stored."""
    noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("mix_factor"):
        return torch.from_numpy(0.5 * noise)
    if len(shape) == 1:
        return torch.from_numpy(1 + 0.1 * noise if key.endswith("weight") else 0.05 * noise)
    return torch.from_numpy(noise / np.sqrt(math.prod(shape[1:]))).float()


def fill(net: nn.Module) -> None:
    """Give a model the weights of the recipe; wavelet filters stay."""
    state = {key: recipe(key, tuple(t.shape)) for key, t in net.state_dict().items() if "wavelet" not in key}
    assert net.load_state_dict(state, strict=False).unexpected_keys == []


def draw_clip() -> Tensor:
    """Return the input of the figures that are our own."""
    return torch.from_numpy(np.random.RandomState(0).uniform(-1, 1, (1, 3, 9, 16, 24)).astype(np.float32))


@pytest.fixture
def clip() -> Tensor:
    """Return the input of the figures that are our own."""
    return draw_clip()


@pytest.fixture(scope="session")
def build() -> Callable[[dict[str, Any]], VideoVAE]:
    """Build a model with the recipe's weights from an official config."""

    def make(config: dict[str, Any]) -> VideoVAE:
        cls = {cls.official_name: cls for cls in (WFVAE, CausalVAE)}[config["_class_name"]]
        vae = cls(**{key: value for key, value in config.items() if not key.startswith("_")}).eval()
        fill(vae)
        return vae

    return make


@pytest.fixture(scope="session")
def figures() -> dict[str, Any]:
    """Return the committed figures: `<set>.<tag>.<what>` -> array, and the configs."""
    with np.load(GOLDEN / "wfvae.npz") as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
    return {"tensors": arrays, "configs": json.loads((GOLDEN / "configs.json").read_text())}
