"""An official training checkpoint, as its own loader reads it."""

import pytest
import torch
from safetensors.torch import load_file

from praxino import checkpoint

CASES = {"ema": "loaded_output_ema", "raw": "loaded_output_noema"}


@pytest.fixture
def official(shared):
    return shared("golden/ckpt_layout")


def outputs(vae, x):
    with torch.no_grad():
        posterior = vae.encode(x)
        return posterior.moments, vae.decode(posterior.mode())


@pytest.mark.parametrize("weights", CASES)
def test_outputs(weights, official):
    expected = load_file(official / f"{CASES[weights]}.safetensors")
    vae = checkpoint.load(official / "checkpoint-6.ckpt", weights=weights)
    moments, decoded = outputs(vae, expected["x"])
    assert (moments - expected["moments"]).abs().max() < 1e-5
    assert (decoded - expected["decoded"]).abs().max() < 2e-5


def test_directory_with_a_ckpt(official):
    a = checkpoint.load(official).state_dict()
    b = checkpoint.load(official / "checkpoint-6.ckpt").state_dict()
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_average_and_raw_differ_in_trained_weights_alone(official):
    ema, raw = (checkpoint.load(official, weights=weights) for weights in ("ema", "raw"))
    differing = {key for key, value in ema.state_dict().items() if not torch.equal(value, raw.state_dict()[key])}
    assert differing
    assert not differing & set(ema.fixed_filters())


def test_round_trip(official, tmp_path):
    ema, raw = (checkpoint.load(official, weights=weights) for weights in ("ema", "raw"))
    path = checkpoint.save_official_ckpt(raw, tmp_path / "checkpoint-7.ckpt", ema=ema, step=7)
    original, written = (
        torch.load(p, map_location="cpu", weights_only=True) for p in (official / "checkpoint-6.ckpt", path)
    )
    assert written.keys() == original.keys()
    for part in (lambda c: c["state_dict"]["gen_model"], lambda c: c["ema_state_dict"]):
        assert list(part(written)) == list(part(original))
        assert all(torch.equal(value, part(original)[key]) for key, value in part(written).items())
    again = checkpoint.load(path)
    assert again.config == ema.config
    assert again.extra == ema.extra
    assert all(torch.equal(value, ema.state_dict()[key]) for key, value in again.state_dict().items())


def test_order_of_the_official_optimizer(official):
    state = torch.load(official / "checkpoint-6.ckpt", weights_only=True)["optimizer_state"]["gen_optimizer"]["state"]
    ours = checkpoint.load(official).trainable_parameters()
    assert len(ours) == 172
    assert [tuple(state[i]["exp_avg"].shape) for i in sorted(state)] == [tuple(p.shape) for p in ours[: len(state)]]
