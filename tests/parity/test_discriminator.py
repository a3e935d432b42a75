"""The 3D discriminator against the official one."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from praxino.losses.adversarial import hinge_discriminator, linear_generator, vanilla_discriminator
from praxino.models.discriminator import NLayerDiscriminator3D

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # measured: equal


@pytest.fixture
def golden(shared):
    return shared("golden/discriminator3d")


def official(golden, dropout: float | None = 0.3) -> NLayerDiscriminator3D:
    net = NLayerDiscriminator3D(width=8, layers=3, dropout=dropout)
    net.load_state_dict(load_file(golden / "model.safetensors"))
    return net


def test_the_default_is_the_official_one_key_for_key(golden):
    manifest = json.loads((golden / "default_manifest.json").read_text())
    net = NLayerDiscriminator3D()
    assert [(key, list(value.shape)) for key, value in net.state_dict().items()] == list(manifest["keys"].items())
    assert [f"{n}: {type(part).__name__.removeprefix('Joint')}" for n, part in enumerate(net.main)] == manifest[
        "modules"
    ]
    assert sum(p.numel() for p in net.parameters()) == manifest["params"]


def test_logits_and_losses(golden):
    data, info = load_file(golden / "data.safetensors"), json.loads((golden / "info.json").read_text())
    net = official(golden).eval()
    with torch.no_grad():
        real, fake = net(data["real"]), net(data["fake"])
        trained = official(golden, dropout=0.0).train()(data["real"])
    torch.testing.assert_close(real, data["eval.real"], **TOLERANCE)
    torch.testing.assert_close(fake, data["eval.fake"], **TOLERANCE)
    torch.testing.assert_close(trained, data["train.real(dropout0)"], **TOLERANCE)
    assert float(hinge_discriminator(real, fake)) == pytest.approx(info["hinge_d"], rel=1e-5)
    assert float(vanilla_discriminator(real, fake)) == pytest.approx(info["vanilla_d"], rel=1e-5)
    assert float(linear_generator(fake)) == pytest.approx(info["g_loss"], rel=1e-5)


def test_the_layout_without_dropout_is_the_same_network(golden):
    data, state = load_file(golden / "data.safetensors"), load_file(golden / "model.safetensors")
    numbers = {0: 0, 2: 2, 3: 3, 6: 5, 7: 6, 10: 8, 11: 9, 14: 11}  # with and without the layers of dropout
    moved = {re.sub(r"\d+", lambda m: str(numbers[int(m[0])]), key): value for key, value in state.items()}
    net = NLayerDiscriminator3D(width=8, layers=3, dropout=None)
    net.load_state_dict(moved)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(data["real"]), data["eval.real"], **TOLERANCE)
        torch.testing.assert_close(net.train()(data["real"]), data["train.real(dropout0)"], **TOLERANCE)
