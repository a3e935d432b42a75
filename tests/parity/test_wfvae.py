"""WF-VAE against the official code: key for key, value for value."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from praxino import checkpoint, stream
from praxino.models.wfvae import WFVAE

TOLERANCE = 1e-5  # the binding one is 2e-5
SETS = {"wfvae_c4_ln": ["img", "t9", "t17"], "wfvae_888_c4": ["img", "t9", "t17", "t33"]}


def distance(a, b) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def check(vae: WFVAE, x, expected: dict[str, torch.Tensor]) -> None:
    """Compare everything that the official model gave for this input."""
    with torch.no_grad():
        posterior, encoder = vae._encode(x)
        recon, decoder = vae._decode(expected["mean"])
        output = vae(x, sample=False)
    assert distance(posterior.moments, expected["moments"]) < TOLERANCE
    assert distance(posterior.mean, expected["mean"]) < TOLERANCE
    assert distance(recon, expected["decoded"]) < TOLERANCE
    assert distance(output.recon, expected["decoded"]) < 2 * TOLERANCE  # from our own latents
    for name, coefficients in (("enc_coeffs", encoder), ("dec_coeffs", decoder)):
        for i, value in enumerate(coefficients):
            if f"{name}.{i}" in expected:
                assert distance(value, expected[f"{name}.{i}"]) < TOLERANCE


def of_tag(tensors, prefix: str):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize("name", ["wfvae_c4_ln", "wfvae_888_c4"])
def test_committed_figures(name, figures, build):
    vae = build(figures["configs"][name])
    tags = {key.split(".")[1] for key in figures["tensors"] if key.startswith(f"{name}.")}
    assert tags
    for tag in tags:
        expected = of_tag(figures["tensors"], f"{name}.{tag}.")
        check(vae, expected["input"], expected)


@pytest.mark.parametrize(("name", "tag"), [(name, tag) for name, tags in SETS.items() for tag in tags])
def test_golden(name, tag, shared):
    directory = shared(f"golden/{name}")
    vae = checkpoint.load(directory / "hf")
    expected = of_tag(load_file(directory / "output.safetensors"), f"{tag}.")
    x = load_file(directory / "input.safetensors")[tag]
    check(vae, x, expected)
    with torch.no_grad():
        posterior = stream.encode(vae, x, chunk=3)
        assert distance(posterior.moments, expected["moments"]) < TOLERANCE
        assert distance(posterior.logvar, expected["logvar"]) < TOLERANCE
        assert distance(stream.decode(vae, expected["mean"], chunk=1), expected["decoded"]) < TOLERANCE
    kl = json.loads((directory / "info.json").read_text())["runs"][tag]["kl"]
    assert posterior.kl().sum().item() == pytest.approx(kl[0], rel=1e-5)


@pytest.mark.parametrize("name", SETS)
def test_recipe_is_what_the_golden_sets_hold(name, shared, build):
    directory = shared(f"golden/{name}/hf")
    vae = build(json.loads((directory / "config.json").read_text()))
    stored = load_file(directory / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, stored[key]) for key, value in vae.state_dict().items())


@pytest.mark.parametrize("name", SETS)
def test_export_is_byte_equal(name, shared, tmp_path):
    original = shared(f"golden/{name}/hf")
    written = checkpoint.save_official(checkpoint.load(original), tmp_path / "export")
    for part in ("config.json", "diffusion_pytorch_model.safetensors"):
        a, b = ((directory / part).read_bytes() for directory in (original, written))
        if part.endswith("json"):
            assert json.loads(a) == json.loads(b)
        else:
            assert a == b  # not only every tensor: the file


MANIFESTS = json.loads((Path(__file__).parents[1] / "golden" / "manifests.json").read_text())


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name):
    manifest = MANIFESTS[name]
    with torch.device("meta"):
        vae = WFVAE(**{key: value for key, value in manifest["config"].items() if not key.startswith("_")})
    state = vae.state_dict()
    assert list(state) == list(manifest["keys"])  # and in the same order
    assert {key: list(value.shape) for key, value in state.items()} == manifest["keys"]
    for half in ("encoder", "decoder"):
        count = sum(p.numel() for p in getattr(vae, half).parameters() if p.requires_grad)
        assert count == manifest[f"params_{half}"]
    assert set(vae.fixed_filters()) == {key for key in state if "wavelet" in key}
    assert vae.config.keys() == {key for key in manifest["config"] if not key.startswith("_")}


def test_class_defaults_are_the_official_ones():
    with torch.device("meta"):
        config = WFVAE().config
    official = MANIFESTS["wfvae_class_defaults"]["config"]
    assert config == {key: value for key, value in official.items() if not key.startswith("_")}
