import pytest
import torch
from torch.nn import functional as F

from praxino.ops.causal import Stream
from praxino.ops.wavelet import (
    HaarWaveletTransform2D,
    HaarWaveletTransform3D,
    InverseHaarWaveletTransform2D,
    InverseHaarWaveletTransform3D,
    filters_2d,
    filters_3d,
)


@pytest.fixture
def x():
    return torch.randn(2, 3, 5, 8, 12, generator=torch.Generator().manual_seed(0))


def test_3d_equals_convolutions_with_the_stored_filters(x):
    padded = torch.cat((x[:, :, :1], x), dim=2)
    bands = [
        F.conv3d(padded.flatten(0, 1)[:, None], taps, stride=2)[:, 0].unflatten(0, (2, 3))
        for taps in filters_3d().values()
    ]
    y = HaarWaveletTransform3D()(x, Stream(final=True))
    assert y.shape == (2, 24, 3, 4, 6)
    torch.testing.assert_close(y, torch.cat(bands, dim=1), rtol=0, atol=1e-6)


def test_2d_equals_convolutions_with_the_stored_filters(x):
    frames = x.transpose(1, 2).reshape(-1, 1, 8, 12)
    bands = [F.conv2d(frames, taps, stride=2).view(2, 5, 3, 4, 6).transpose(1, 2) for taps in filters_2d().values()]
    torch.testing.assert_close(HaarWaveletTransform2D()(x, Stream()), torch.cat(bands, dim=1), rtol=0, atol=1e-6)


def test_there_and_back(x):
    there = HaarWaveletTransform3D()(x, Stream(final=True))
    back = InverseHaarWaveletTransform3D()(there, Stream(final=True))
    torch.testing.assert_close(back, x * 8 * 0.3536**2, rtol=0, atol=2e-6)  # the gain of the official filters
    flat = InverseHaarWaveletTransform2D()(HaarWaveletTransform2D()(x, Stream()), Stream())
    torch.testing.assert_close(flat, x, rtol=0, atol=1e-6)


def test_first_frame_doubled_in_and_dropped_once_out(x):
    there = HaarWaveletTransform3D()(x[:, :, :1], Stream(final=True))
    assert there.shape[2] == 1
    assert there[:, 12:].abs().max() == 0  # no change in time
    inverse, stream = InverseHaarWaveletTransform3D(), Stream()
    assert [inverse(there, stream).shape[2] for _ in range(3)] == [1, 2, 2]


@pytest.mark.parametrize("sizes", [[1] * 5, [2, 3], [3, 2], [1, 4]])
def test_pieces_equal_the_whole(sizes, x):
    transform, stream = HaarWaveletTransform3D(), Stream()
    pieces = [transform(part, stream) for part in x.split(sizes, dim=2)]
    whole = transform(x, Stream(final=True))
    assert torch.equal(torch.cat([p for p in pieces if p is not None], dim=2), whole)


def test_half_precision_is_rounded_once(x):
    half = x.bfloat16()
    for transform in (HaarWaveletTransform3D(), HaarWaveletTransform2D()):
        exact = transform(half.float(), Stream(final=True))
        assert torch.equal(transform(half, Stream(final=True)), exact.bfloat16())


def test_filters_are_no_parameters():
    for transform in (HaarWaveletTransform3D(), InverseHaarWaveletTransform3D(), HaarWaveletTransform2D()):
        assert list(transform.parameters()) == []
        assert transform.requires_grad_(True).state_dict()
