"""Norms, attention and residual blocks."""

import pytest
import torch
from torch.nn import functional as F

from praxino.errors import ConfigError
from praxino.ops.attention import AttnBlock3D, AttnBlock3DFix
from praxino.ops.blocks import ResnetBlock2D, ResnetBlock3D
from praxino.ops.causal import Stream
from praxino.ops.norm import FrameNorm, GroupNorm, LayerNorm, make_norm


def test_layer_norm_of_every_position():
    norm = LayerNorm(6)
    torch.nn.init.normal_(norm.norm.weight)
    torch.nn.init.normal_(norm.norm.bias)
    x = 3 + torch.randn(2, 6, 3, 4, 5)
    variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
    gain, bias = (p.view(1, -1, 1, 1, 1) for p in (norm.norm.weight, norm.norm.bias))
    expected = (x - mean) / (variance + 1e-6).sqrt() * gain + bias
    torch.testing.assert_close(norm(x, Stream()), expected, rtol=0, atol=1e-5)


def test_layer_norm_under_autocast():
    norm, x = LayerNorm(32), torch.randn(1, 32, 2, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x, Stream())
    assert (y.float() - norm(x.float(), Stream())).abs().max() < 0.02


def test_group_norm_takes_the_whole_video_alone():
    norm, x = GroupNorm(64), torch.randn(1, 64, 3, 2, 2)
    torch.testing.assert_close(norm(x, Stream(final=True)), F.group_norm(x, 32, eps=1e-6))
    with pytest.raises(ConfigError, match="use chunk=null"):
        norm(x, Stream())


def test_frame_norm_is_group_norm_of_every_frame():
    norm, x = FrameNorm(64), torch.randn(2, 64, 3, 2, 2)
    torch.nn.init.normal_(norm.weight)
    y = norm(x, Stream())
    for frame in range(3):
        expected = F.group_norm(x[:, :, frame], 32, norm.weight, norm.bias, eps=1e-6)
        torch.testing.assert_close(y[:, :, frame], expected)


@pytest.mark.parametrize("norm", [GroupNorm(32), FrameNorm(32)])
def test_group_norm_keeps_its_digits_with_channels_last(norm):
    """The kernel of torch for this layout would be off by 1e-3 on a CPU."""
    x = 30 + torch.randn(1, 32, 5, 32, 32).contiguous(memory_format=torch.channels_last_3d)
    exact = norm.double()(x.double(), Stream(final=True))
    assert (norm.float()(x, Stream(final=True)) - exact).abs().max() < 2e-5


def test_norm_is_chosen_by_name():
    assert isinstance(make_norm("layernorm", 8), LayerNorm)
    assert isinstance(make_norm("framenorm", 32), FrameNorm)
    with pytest.raises(ConfigError, match="40 channels do not divide into the 32 groups"):
        make_norm("groupnorm", 40)
    with pytest.raises(ConfigError, match="'batchnorm' is unknown: use layernorm or groupnorm"):
        make_norm("batchnorm", 32)


def test_attention_inside_each_frame():
    block = AttnBlock3DFix(8, "layernorm").double()
    x = torch.randn(2, 8, 3, 4, 5, dtype=torch.float64)
    h = block.norm(x, Stream())
    q, k, v = (layer.conv(h).permute(0, 2, 3, 4, 1).reshape(2, 3, 20, 8) for layer in (block.q, block.k, block.v))
    mixed = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
    expected = x + block.proj_out.conv(mixed.view(2, 3, 4, 5, 8).permute(0, 4, 1, 2, 3))
    torch.testing.assert_close(block(x, Stream()), expected, rtol=0, atol=1e-12)
    assert block(None, Stream()) is None


def test_attention_of_v10_takes_channels_for_frames():
    block = AttnBlock3D(8, "layernorm").double()
    x = torch.randn(2, 8, 3, 4, 5, dtype=torch.float64)
    h = block.norm(x, Stream())
    q, k, v = (layer.conv(h).contiguous().view(6, 8, 20).mT for layer in (block.q, block.k, block.v))
    mixed = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
    expected = x + block.proj_out.conv(mixed.mT.contiguous().view(2, 8, 3, 4, 5))
    torch.testing.assert_close(block(x, Stream(final=True)), expected, rtol=0, atol=1e-12)
    fixed = AttnBlock3DFix(8, "layernorm").double()
    fixed.load_state_dict(block.state_dict())
    picture = x[:, :, :1]
    same = block(picture, Stream(final=True)), fixed(picture, Stream(final=True))
    torch.testing.assert_close(*same, rtol=0, atol=1e-12)
    with pytest.raises(ConfigError, match="mixes all frames"):
        block(x, Stream())


def test_group_norm_of_a_2d_block_sees_one_frame_at_a_time():
    block, stream = ResnetBlock2D(32, 32, 0.0, "groupnorm"), Stream(final=True)
    x = torch.randn(1, 32, 3, 4, 4)
    torch.testing.assert_close(block(x, stream)[:, :, 1:2], block(x[:, :, 1:2], stream), rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [ResnetBlock2D, ResnetBlock3D])
@pytest.mark.parametrize("width", [8, 12])
def test_resnet_block(block, width):
    layer = block(8, width, 0.0, "layernorm")
    x = torch.randn(2, 8, 3, 4, 4)
    stream = Stream(final=True)
    h = layer.conv1(F.silu(layer.norm1(x, stream)), stream)
    h = layer.conv2(F.silu(layer.norm2(h, stream)), stream)
    expected = h + (x if width == 8 else layer.nin_shortcut(x, stream))
    before = x.clone()
    torch.testing.assert_close(layer(x, Stream(final=True)), expected)
    with torch.no_grad():  # where SiLU works in place
        torch.testing.assert_close(layer(x, Stream(final=True)), expected)
    assert torch.equal(x, before)
    assert layer(None, stream) is None


def test_dropout_in_training_alone():
    layer = ResnetBlock3D(8, 8, 0.5, "layernorm")
    x = torch.randn(1, 8, 2, 4, 4)
    assert not torch.equal(layer(x, Stream()), layer(x, Stream()))
    layer.eval()
    assert torch.equal(layer(x, Stream()), layer(x, Stream()))
