"""Causal layers that work alike on a whole video and on its pieces.

Every layer is called as `layer(x, stream)`: `x` is the next piece of the sequence, `(B, C, t, H, W)`, or None where
no frame has come yet, and `stream` holds what the layers must remember between pieces. A whole video is one piece
pushed into a fresh `Stream(final=True)`, so that there is only one path to get right.
"""

from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stream:
    """The memory of one pass over one video, in one direction: layer -> what it holds back.

    Set `final` with (or before) the last push. States are replaced, never changed in place: `fork` copies no tensor.
    """

    def __init__(self, final: bool = False) -> None:
        self.final = final
        self.pushes = 0
        self.closed = False
        self._states: dict[Hashable, Tensor | None] = {}
        self._queues: dict[Hashable, Tensor] = {}

    @property
    def whole(self) -> bool:
        """Tell whether the piece under way is the whole video."""
        return self.final and self.pushes <= 1

    def open(self) -> None:
        """Begin a push through the model."""
        if self.closed:
            raise ValueError("this stream has had its last piece: use a new Stream for the next video.")
        self.pushes += 1

    def close(self) -> None:
        """End a push; after the final one nothing may be left waiting."""
        if not self.final:
            return
        assert not self._queues, f"frames left in the queues of {list(self._queues)}"
        self._states.clear()
        self.closed = True

    def fork(self) -> "Stream":
        """Return a stream that goes on from here on its own."""
        copy = Stream(self.final)
        copy.pushes, copy.closed = self.pushes, self.closed
        copy._states, copy._queues = dict(self._states), dict(self._queues)
        return copy

    def begun(self, layer: Hashable) -> bool:
        """Tell whether the layer has stored anything yet."""
        return layer in self._states

    def held(self, layer: Hashable) -> Tensor | None:
        """Return the frames that the layer stored at the last push."""
        return self._states.get(layer)

    def hold(self, layer: Hashable, frames: Tensor | None) -> None:
        """Store frames for the next push; a copy, since a slice would keep its whole chunk alive."""
        self._states[layer] = None if frames is None or self.final else frames.clone()

    def to(self, device: torch.device) -> None:
        """Move everything that is held to a device."""
        self._states = {layer: None if t is None else t.to(device) for layer, t in self._states.items()}
        self._queues = {layer: t.to(device) for layer, t in self._queues.items()}

    def tensors(self) -> list[Tensor]:
        """Return everything that is held, e.g. to measure it."""
        return [t for t in (*self._states.values(), *self._queues.values()) if t is not None]

    def window(self, layer: Hashable, x: Tensor, size: int, step: int) -> Tensor | None:
        """Return the frames for every complete window of `size` frames every `step`, None if there is none yet.

        The first frame of the video is repeated `size - 1` times in front.
        """
        if self.begun(layer):
            held = self.held(layer)
            frames = x if held is None else torch.cat((held, x), dim=2)
        else:  # no expand: its stride of 0 would make cat forget the memory format
            frames = torch.cat((*[x[:, :, :1]] * (size - 1), x), dim=2)
        windows = max((frames.shape[2] - size) // step + 1, 0)
        used = windows * step
        self.hold(layer, frames[:, :, used:] if used < frames.shape[2] else None)
        return frames[:, :, : used - step + size] if windows else None

    def align(self, layer: Hashable, leading: Tensor | None, count: int) -> Tensor | None:
        """Queue the frames of a branch that runs ahead and return the oldest `count` of them."""
        queue = self._queues.pop(layer, None)
        if leading is not None:
            queue = leading if queue is None else torch.cat((queue, leading), dim=2)
        if queue is None:
            return None
        if queue.shape[2] > count:
            self._queues[layer] = queue[:, :, count:].clone()
        return queue[:, :, :count] if count else None


def to_compute_dtype(x: Tensor) -> Tensor:
    """Cast to what the next convolution computes in, so that nothing wider is copied or held; exact under autocast."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def fold(x: Tensor) -> Tensor:
    """Fold the frames into the batch, `(B, C, T, H, W) -> (B*T, C, H, W)`: a view if channels are last."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold(x: Tensor, batch: int) -> Tensor:
    """Undo `fold`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


class Conv3d(nn.Conv3d):
    """A 3D convolution that chooses its kernel on a CPU by the size of a frame, never by their number.

    Left alone, torch decides by the number of frames too, and its two kernels differ in memory, time and rounding.
    Large frames take oneDNN's: torch's own unfolds 27 copies of the input, three times the memory and the time.
    Tiny ones are computed in double: matrices of so few columns are summed in an order that changes with their
    number, which a deep decoder would amplify to 1e-5 between a chunk and the whole. Training, which has no chunks, is
    spared the cost.
    """

    LARGE = 20480  # elements of a frame; torch's own limit for pictures
    TINY = 32  # pixels of a frame

    def forward(self, x: Tensor) -> Tensor:
        plain = x.is_cpu and x.dtype == self.weight.dtype == torch.float32 and not kernel_is_chosen()
        assert isinstance(self.padding, tuple)
        if plain and x.shape[-2] * x.shape[-1] <= self.TINY and not torch.is_grad_enabled():
            bias = None if self.bias is None else self.bias.double()
            y = F.conv3d(x.double(), self.weight.double(), bias, self.stride, self.padding)
            return y.to(torch.float32, memory_format=torch.channels_last_3d)
        if plain and x[0, :, 0].numel() > self.LARGE and ONEDNN:
            return torch.mkldnn_convolution(
                x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
            )
        return super().forward(x)


ONEDNN = torch.backends.mkldnn.is_available()


def kernel_is_chosen() -> bool:
    """Tell whether autocast or a compiler takes its own choice."""
    return torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()


Size = int | tuple[int, int, int]  # of all three dimensions, or of T, H and W


def triple(size: Size) -> tuple[int, int, int]:
    """Return the sizes of T, H and W."""
    return (size, size, size) if isinstance(size, int) else size


class CausalConv3d(nn.Module):
    """A 3D convolution that sees no later frame: the first frame is repeated in front, H and W are padded with zeros.

    Activations are kept in `channels_last_3d`, where the norms and the folding of frames cost no copy.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size = 3, stride: Size = 1, padding: int | None = None
    ) -> None:
        super().__init__()
        kernel, steps = triple(kernel_size), triple(stride)
        self.size, self.step = kernel[0], steps[0]
        space = kernel[1] // 2 if padding is None else padding
        self.conv = Conv3d(in_channels, out_channels, kernel, steps, (0, space, space))

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        if x is None:
            return None
        x = to_compute_dtype(x).contiguous(memory_format=torch.channels_last_3d)
        if self.size > 1:
            x = stream.window(self, x, self.size, self.step)
        return None if x is None else self.conv(x)


class FrameConv(nn.Conv2d):
    """A 2D convolution of every frame of a video, size kept."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:  # type: ignore[override]
        if x is None:
            return None
        return unfold(super().forward(fold(x).contiguous(memory_format=torch.channels_last)), len(x))


class Chain(nn.Sequential):
    """Layers one after the other, all with the same stream."""

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:  # type: ignore[override]
        for layer in self:
            x = layer(x, stream)
        return x
