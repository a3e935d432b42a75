import pytest
import torch
from torch.nn import functional as F

from praxino.ops.causal import CausalConv3d, Conv3d, FrameConv, Stream, fold, unfold


def push_all(layer, x, sizes, stream=None):
    """Push a video in pieces and return what comes out, concatenated."""
    stream = stream or Stream()
    parts = x.split(sizes, dim=2)
    out = []
    for i, part in enumerate(parts):
        stream.final = i == len(parts) - 1
        out.append(layer(part, stream))
    return torch.cat([y for y in out if y is not None], dim=2)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("sizes", [[1] * 9, [2, 3, 4], [9], [4, 1, 1, 3], [1, 8]])
def test_causal_conv_equals_a_padded_convolution(step, sizes):
    layer = CausalConv3d(3, 5, 3, stride=step).double()
    x = torch.randn(2, 3, 9, 6, 8, dtype=torch.float64)
    padded = torch.cat((x[:, :, :1], x[:, :, :1], x), dim=2)
    expected = F.conv3d(padded, layer.conv.weight, layer.conv.bias, step, (0, 1, 1))
    assert expected.shape[2] == (9 - 1) // step + 1
    torch.testing.assert_close(push_all(layer, x, sizes), expected, rtol=0, atol=1e-14)


def test_what_is_held_between_pushes():
    for step, expected in ((1, [2, 2, 2, 2]), (2, [1, 2, 1, 2])):
        layer, stream = CausalConv3d(3, 3, 3, stride=step), Stream()
        for frames in expected:
            layer(torch.randn(1, 3, 1, 4, 4), stream)
            assert stream.held(layer).shape[2] == frames
            assert stream.held(layer).untyped_storage().nbytes() == 4 * stream.held(layer).numel()  # not a slice


def test_a_kernel_of_one_frame_holds_nothing():
    layer, stream = CausalConv3d(3, 4, 1), Stream()
    assert layer(torch.randn(1, 3, 2, 4, 4), stream).shape == (1, 4, 2, 4, 4)
    assert stream.tensors() == []
    assert layer(None, stream) is None


def test_the_whole_video_holds_nothing():
    stream = Stream(final=True)
    CausalConv3d(3, 4)(torch.randn(1, 3, 5, 4, 4), stream)
    assert stream.tensors() == []


def test_forks_go_on_alone():
    layer, stream = CausalConv3d(2, 2), Stream()
    head, tail = torch.randn(1, 2, 3, 4, 4), torch.randn(1, 2, 4, 4, 4)
    layer(head, stream)
    continuations = [push_all(layer, tail, sizes, stream.fork()) for sizes in ([4], [1, 3], [2, 2])]
    for y in continuations[1:]:
        torch.testing.assert_close(y, continuations[0], rtol=0, atol=1e-6)


def test_queue_gives_the_oldest_frames():
    stream = Stream()
    frames = torch.arange(5.0).view(1, 1, 5, 1, 1)
    assert stream.align("q", frames[:, :, :3], 2).flatten().tolist() == [0, 1]
    assert stream.align("q", None, 1).flatten().tolist() == [2]
    assert stream.align("q", None, 0) is None
    assert stream.align("q", frames[:, :, 3:], 0) is None
    stream.final = True
    with pytest.raises(AssertionError, match="queues of"):
        stream.close()
    assert stream.align("q", None, 2).flatten().tolist() == [3, 4]
    stream.close()


def test_a_finished_stream_takes_nothing():
    stream = Stream(final=True)
    stream.open()
    assert stream.whole
    stream.close()
    with pytest.raises(ValueError, match="use a new Stream"):
        stream.open()


def test_a_final_second_push_is_not_the_whole():
    stream = Stream()
    stream.open()
    assert not stream.whole
    stream.close()
    stream.final = True
    stream.open()
    assert not stream.whole


def test_channels_stay_last():
    layer, stream = CausalConv3d(8, 8), Stream()
    for frames in (1, 2, 3):
        y = layer(torch.randn(2, 8, frames, 4, 4), stream)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        assert fold(y).data_ptr() == y.data_ptr()  # a view
    assert FrameConv(8, 4)(y, stream).is_contiguous(memory_format=torch.channels_last_3d)


def test_autocast_holds_what_the_convolution_computes_in():
    layer, stream = CausalConv3d(4, 4), Stream()
    x = torch.randn(1, 4, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, stream)
    assert y.dtype == stream.held(layer).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.conv3d(
            torch.cat((x[:, :, :1], x[:, :, :1], x), 2), layer.conv.weight, layer.conv.bias, 1, (0, 1, 1)
        )
    assert torch.equal(y, expected)


@pytest.mark.parametrize("size", [4, 64])
def test_large_frames_take_another_kernel_but_give_the_same(size):
    layer = Conv3d(8, 8, 3, padding=(0, 1, 1))
    assert (8 * size * size > Conv3d.LARGE) == (size == 64)
    gradients = []
    for conv in (layer, lambda x: F.conv3d(x, layer.weight, layer.bias, padding=(0, 1, 1))):
        torch.manual_seed(0)
        x = torch.randn(1, 8, 4, size, size, requires_grad=True)
        y = conv(x)
        gradients.append([y, *torch.autograd.grad(y.square().mean(), [x, layer.weight, layer.bias])])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_frames_convolved_one_by_one():
    layer = FrameConv(3, 5)
    x = torch.randn(2, 3, 4, 6, 6)
    y = layer(x, Stream())
    for t in range(4):
        torch.testing.assert_close(y[:, :, t], F.conv2d(x[:, :, t], layer.weight, layer.bias, padding=1))
    assert torch.equal(unfold(fold(x), 2), x)
