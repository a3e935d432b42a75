"""Videos of any length: whole, in blocks, in overlapping windows, as a pyramid of noise levels, with a cache.

Every function yields finished latents `(B, C, n, H, W)` in order, the given ones first and unchanged, `length` frames
in all; `torch.cat(list(...), dim=2)` is the clip. Only a window is ever held.
"""

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from praxino.diffusion.loss import Denoise
from praxino.diffusion.noise import FrameNoise
from praxino.diffusion.solve import Past, Solver


class Model(Protocol):
    """A network with its conditions and its guidance."""

    def bind(self, known: Tensor | None, start: int) -> Denoise:
        """Return the denoiser of a window.

        Args:
            known: `(B, T)`, true at the frames that are given or finished; None where there are none.
            start: index of the window's first frame in the whole clip.
        """


class CachedModel(Model, Protocol):
    """A causal network that keeps keys and values; its denoisers get the new frames only."""

    def remember(self, z: Tensor, start: int) -> None:
        """Keep what finished frames `(B, C, n, H, W)` mean to later ones, at time 0."""

    def forget(self, before: int) -> None:
        """Drop the frames below the index `before`."""


def prefix(noise: FrameNoise, given: Tensor | None, length: int) -> Tensor:
    """Return the given frames, none as `(B, C, 0, H, W)`.

    Raises:
        ValueError: they are all the frames, or another batch.
    """
    channels, *cells = noise.shape
    if given is None:
        return torch.zeros(len(noise.seeds), channels, 0, *cells, device=noise.device)
    if given.shape[2] >= length:
        raise ValueError(f"{given.shape[2]} given latent frames leave none of {length} to make: ask for more frames.")
    if (given.shape[0], *given.shape[1:2], *given.shape[3:]) != (len(noise.seeds), channels, *cells):
        raise ValueError(f"given latents {tuple(given.shape)} do not fit {len(noise.seeds)} samples of {noise.shape}.")
    return given.to(noise.device, torch.promote_types(given.dtype, torch.float32))


def extend(model: Model, noise: FrameNoise, solver: Solver, past: Tensor, start: int, stop: int) -> Tensor:
    """Return the frames after `past`, which begins at `start`, up to `stop`."""
    window, count = noise(start, stop), past.shape[2]
    known, given = None, None
    if count:
        known = (torch.arange(stop - start, device=window.device) < count).expand(len(window), -1)
        given = torch.cat([past, torch.zeros_like(window[:, :, count:])], dim=2)
    denoise = model.bind(known, start)
    return solver(denoise, window, known, given, lambda j: noise(start, stop, draw=j + 1))[:, :, count:]


@torch.no_grad()
def full(model: Model, noise: FrameNoise, solver: Solver, length: int, given: Tensor | None = None) -> Iterator[Tensor]:
    """Make all frames at once."""
    past = prefix(noise, given, length)
    yield torch.cat([past, extend(model, noise, solver, past, 0, length)], dim=2)


def spans(length: int, done: int, window: int, first: int, block: int) -> Iterator[tuple[int, int, int]]:
    """Yield of every window its start, the first frame that it makes, and its end.

    Args:
        done: the given frames.
        first: the end of the first window; then `block` frames at a time.
    """
    while done < length:
        stop = min(max(first, done + block), length)
        yield max(0, stop - window), done, stop
        done = stop


@torch.no_grad()
def advance(
    model: Model,
    noise: FrameNoise,
    solver: Solver,
    length: int,
    window: int,
    first: int,
    block: int,
    given: Tensor | None,
) -> Iterator[Tensor]:
    """Make frames up to `first`, then `block` at a time, given the finished ones that the window has room for."""
    past = prefix(noise, given, length)
    if past.shape[2]:
        yield past
    for start, done, stop in spans(length, past.shape[2], window, first, block):
        past = past[:, :, past.shape[2] - (done - start) :]
        piece = extend(model, noise, solver, past, start, stop)
        past = torch.cat([past, piece], dim=2)
        yield piece


def autoregressive(
    model: Model,
    noise: FrameNoise,
    solver: Solver,
    length: int,
    window: int,
    block: int,
    given: Tensor | None = None,
) -> Iterator[Tensor]:
    """Make `block` frames at a time, given as many finished ones as fit into `window` with them."""
    if not 1 <= block <= window:
        raise ValueError(f"a block of {block} frames does not fit a window of {window}: choose 1 to {window}.")
    return advance(model, noise, solver, length, window, 0, block, given)


def sliding(
    model: Model,
    noise: FrameNoise,
    solver: Solver,
    length: int,
    window: int,
    overlap: int,
    given: Tensor | None = None,
) -> Iterator[Tensor]:
    """Make a whole window, then windows whose first `overlap` frames the one before gives (the last one takes more)."""
    if not 1 <= overlap < window:
        raise ValueError(f"an overlap of {overlap} frames does not fit a window of {window}: choose 1 to {window - 1}.")
    return advance(model, noise, solver, length, window, window, window - overlap, given)


@torch.no_grad()
def pyramid(
    model: Model,
    noise: FrameNoise,
    solver: Solver,
    length: int,
    window: int,
    context: int,
    given: Tensor | None = None,
) -> Iterator[Tensor]:
    """Make every frame a few steps after the one before, in a window that moves on by a frame when one is finished.

    For networks trained with a noise level per frame. The window holds up to `context` finished frames, and others at
    levels that rise from first to last (Chen et al. 2024; Ruhe et al. 2024); the delay is the least that fits them all.
    """
    if not 1 <= context < window:
        raise ValueError(f"a context of {context} frames does not fit a window of {window}: choose 1 to {window - 1}.")
    past = prefix(noise, given, length)
    if past.shape[2]:
        yield past
    ready, done, start = past.shape[2], past.shape[2], max(0, min(past.shape[2] - context, length - window))
    delay = -(-solver.steps // (window - context))
    stop = min(start + window, length)
    z = solver.begin(noise(start, stop))
    z[:, :, : ready - start] = past[:, :, start:]
    grid = solver.grid().to(z.device, z.dtype)
    memory: Past | None = None
    denoise: Denoise | None = None

    def times(j: int) -> Tensor:
        """Return the times of the window's frames `(B, T)` before step `j` of the whole."""
        frames = torch.arange(start, stop, device=z.device)
        index = (j - delay * (frames - ready)).clamp(0, solver.steps)
        return grid[torch.where(frames < ready, solver.steps, index)].expand(len(z), -1)

    for j in range(solver.steps + delay * (length - ready - 1)):
        if denoise is None:
            known = times(j) == 0
            denoise = model.bind(known if done > start else None, start)
            denoise = solver.noised(denoise, known, noise(start, stop))
        z, memory = solver.step(denoise, z, times(j), times(j + 1), memory, partial(noise, start, stop, j + 1))
        if bool(times(j + 1)[0, done - start] == 0):
            yield z[:, :, done - start : done - start + 1]
            done, denoise = done + 1, None
            begin = max(0, min(done - context, length - window))
            z, memory = shift_window(z, memory, begin - start, solver, noise, stop, min(begin + window, length))
            start, stop = begin, min(begin + window, length)


def shift_window(
    z: Tensor, memory: Past, drop: int, solver: Solver, noise: FrameNoise, stop: int, to: int
) -> tuple[Tensor, Past]:
    """Drop the first frames of the state and of the solver's memory, and begin new ones after the frame `stop - 1`."""
    fresh = solver.begin(noise(stop, to)) if to > stop else z[:, :, :0]
    x, t = memory
    x = torch.cat([x[:, :, drop:], torch.zeros_like(fresh)], dim=2)
    t = torch.cat([t[:, drop:], t.new_zeros(len(t), fresh.shape[2])], dim=1)  # at 0: nothing to recall
    return torch.cat([z[:, :, drop:], fresh], dim=2), (x, t)


@torch.no_grad()
def cached(
    model: CachedModel,
    noise: FrameNoise,
    solver: Solver,
    length: int,
    block: int,
    given: Tensor | None = None,
    window: int | None = None,
) -> Iterator[Tensor]:
    """Make `block` frames at a time with a causal network that remembers the frames before, all or a `window`."""
    if block < 1 or (window is not None and window < block):
        raise ValueError(f"a block of {block} frames does not fit: choose at least 1, at most the window ({window}).")
    if solver.context_noise:
        raise ValueError("a cache keeps finished frames as they are: context_noise must be 0.")
    past = prefix(noise, given, length)
    if past.shape[2]:
        model.remember(past, 0)
        yield past
    for start, done, stop in spans(length, past.shape[2], window or length, 0, block):
        model.forget(start)
        piece = extend(model, noise, solver, past[:, :, :0], done, stop)
        model.remember(piece, done)
        yield piece
