"""The Haar transforms against the official convolutions."""

import json

import pytest
import torch
from safetensors.torch import load_file

from praxino.ops import wavelet
from praxino.ops.causal import Stream


@pytest.mark.parametrize(
    ("name", "transform", "source"),
    [
        ("haar3d", wavelet.HaarWaveletTransform3D, "x"),
        ("ihaar3d", wavelet.InverseHaarWaveletTransform3D, "haar3d"),
        ("haar2d", wavelet.HaarWaveletTransform2D, "x"),
        ("ihaar2d", wavelet.InverseHaarWaveletTransform2D, "haar2d"),
    ],
)
def test_golden(name, transform, source, shared):
    data = load_file(shared("golden/wavelets/data.safetensors"))
    y = transform()(data[source], Stream(final=True))
    assert y.shape == data[name].shape
    assert (y - data[name]).abs().max() < 1e-6


def test_filters(shared):
    taps = json.loads(shared("golden/wavelets/info.json").read_text())["filters"]
    state = wavelet.HaarWaveletTransform3D().state_dict()
    assert list(state) == list(taps)
    assert all(torch.equal(state[key].flatten(), torch.tensor(values)) for key, values in taps.items())
