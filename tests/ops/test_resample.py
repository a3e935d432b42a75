import pytest
import torch
from torch.nn import functional as F

from praxino.ops.causal import Stream
from praxino.ops.resample import (
    Downsample,
    Spatial2xTime2x3DDownsample,
    Spatial2xTime2x3DUpsample,
    SpatialDownsample2x,
    SpatialUpsample2x,
    TimeDownsample2x,
    TimeDownsampleRes2x,
    TimeUpsample2x,
    TimeUpsampleRes2x,
    Upsample,
)

MODES = ("trilinear", "nearest")


@pytest.fixture
def x():
    return torch.randn(2, 4, 6, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def doubled(x, mode):
    """Double all frames but the first with torch's own interpolation."""
    rest = F.interpolate(x[:, :, 1:], scale_factor=(2, 1, 1), mode=mode)
    return torch.cat((x[:, :, :1], rest), dim=2)


@pytest.mark.parametrize("mode", MODES)
def test_time_is_doubled_as_torch_does(mode, x):
    layer = Spatial2xTime2x3DUpsample(4, mode).double()
    y = layer.double_time(x, Stream(final=True))
    torch.testing.assert_close(y, doubled(x, mode), rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_upsampling_is_interpolation_then_convolution(mode, x):
    layer = Spatial2xTime2x3DUpsample(4, mode).double()
    wide = F.interpolate(doubled(x, mode), scale_factor=(1, 2, 2), mode="trilinear")
    assert torch.allclose(layer(x, Stream(final=True)), layer.conv(wide, Stream(final=True)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [1, 5], [3, 1, 2], [1, 1, 4]])
@pytest.mark.parametrize("flush", [False, True])
def test_pieces_equal_the_whole(mode, sizes, flush, x):
    layer, stream = Spatial2xTime2x3DUpsample(4, mode).double(), Stream()
    parts = [*x.split(sizes, dim=2), *([None] if flush else [])]
    pieces = []
    for i, part in enumerate(parts):
        stream.final = i == len(parts) - 1
        pieces.append(layer(part, stream))
    y = torch.cat([p for p in pieces if p is not None], dim=2)
    torch.testing.assert_close(y, layer(x, Stream(final=True)), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("mode", "counts"), [("nearest", [1, 2, 2, 0]), ("trilinear", [1, 1, 2, 1])])
def test_what_each_frame_brings_out(mode, counts, x):
    layer, stream = Spatial2xTime2x3DUpsample(4, mode).double(), Stream()
    got = []
    for part in (x[:, :, :1], x[:, :, 1:2], x[:, :, 2:3], None):
        stream.final = part is None
        y = layer.double_time(part, stream)
        got.append(0 if y is None else y.shape[2])
    assert got == counts


@pytest.mark.parametrize("mode", MODES)
def test_one_frame_stays_one(mode, x):
    layer, stream = Spatial2xTime2x3DUpsample(4, mode).double(), Stream()
    assert layer(x[:, :, :1], stream).shape == (2, 4, 1, 8, 12)
    stream.final = True
    assert layer(None, stream) is None


def test_down_in_space_pads_right_and_bottom(x):
    layer = Downsample(4).double()
    expected = layer.conv(F.pad(x[:, :, 2], (0, 1, 0, 1)))
    torch.testing.assert_close(layer(x, Stream())[:, :, 2], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("frames", range(1, 7))
def test_down_in_time(frames, x):
    layer = Spatial2xTime2x3DDownsample(4).double()
    y = layer(x[:, :, :frames], Stream(final=True))
    assert y.shape == (2, 4, (frames - 1) // 2 + 1, 2, 3)
    padded = F.pad(torch.cat((x[:, :, :1], x[:, :, :1], x[:, :, :frames]), dim=2), (0, 1, 0, 1))
    expected = F.conv3d(padded, layer.conv.conv.weight, layer.conv.conv.bias, stride=2)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)


def test_up_in_space(x):
    layer = Upsample(4).double()
    expected = layer.conv(x[:, :, 3].repeat_interleave(2, -1).repeat_interleave(2, -2))
    torch.testing.assert_close(layer(x, Stream())[:, :, 3], expected, rtol=0, atol=1e-14)


def test_space_of_causalvae_is_that_of_pictures(x):
    for layer, picture in ((SpatialDownsample2x(4), Downsample(4)), (SpatialUpsample2x(4), Upsample(4))):
        weight, bias = layer.conv.conv.weight, layer.conv.conv.bias
        picture.load_state_dict({"conv.weight": weight[:, :, 0], "conv.bias": bias})
        y, expected = layer.double()(x, Stream(final=True)), picture.double()(x, Stream())
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)


IN_TIME = {
    "mean": TimeDownsample2x(),
    "mean, mixed": TimeDownsampleRes2x(4).double(),
    "linear": TimeUpsample2x(),
    "linear, mixed": TimeUpsampleRes2x(4).double(),
}


@pytest.mark.parametrize("frames", range(1, 7))
@pytest.mark.parametrize("share", [-1.0, 2.0])
def test_down_in_time_of_causalvae(share, frames, x):
    x = x[:, :, :frames]
    padded = torch.cat((x[:, :, :1], x[:, :, :1], x), dim=2)
    means = F.avg_pool3d(padded, (3, 1, 1), (2, 1, 1))
    torch.testing.assert_close(TimeDownsample2x()(x, Stream(final=True)), means, rtol=0, atol=1e-14)
    layer = IN_TIME["mean, mixed"]
    layer.mix_factor.data.fill_(share)
    learned = F.conv3d(padded, layer.conv.weight, layer.conv.bias, stride=(2, 1, 1), padding=(0, 1, 1))
    s = 1 / (1 + torch.e ** -torch.tensor(share, dtype=torch.float64))
    expected = s * means + (1 - s) * learned
    torch.testing.assert_close(layer(x, Stream(final=True)), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("frames", [1, 2, 6])
def test_up_in_time_of_causalvae(frames, x):
    x = x[:, :, :frames]
    linear = doubled(x, "trilinear") if frames > 1 else x
    torch.testing.assert_close(TimeUpsample2x()(x, Stream(final=True)), linear, rtol=0, atol=1e-14)
    layer = IN_TIME["linear, mixed"]
    padded = torch.cat((linear[:, :, :1], linear[:, :, :1], linear), dim=2)
    learned = F.conv3d(padded, layer.conv.conv.weight, layer.conv.conv.bias, padding=(0, 1, 1))
    s = torch.sigmoid(layer.mix_factor)
    torch.testing.assert_close(layer(x, Stream(final=True)), s * linear + (1 - s) * learned, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", IN_TIME)
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [1, 5], [3, 1, 2], [1, 1, 4]])
def test_pieces_of_causalvae_equal_the_whole(name, sizes, x):
    layer, stream = IN_TIME[name], Stream()
    pieces = [layer(part, stream) for part in x.split(sizes, dim=2)]
    stream.final = True
    pieces.append(layer(None, stream))
    y = torch.cat([p for p in pieces if p is not None], dim=2)
    torch.testing.assert_close(y, layer(x, Stream(final=True)), rtol=0, atol=1e-14)


def test_nothing_in_nothing_out():
    stream = Stream(final=True)
    layers = [Downsample(4), Upsample(4), Spatial2xTime2x3DDownsample(4), Spatial2xTime2x3DUpsample(4, "nearest")]
    layers += [SpatialDownsample2x(4), SpatialUpsample2x(4), *IN_TIME.values()]
    assert [layer(None, stream) for layer in layers] == [None] * len(layers)
