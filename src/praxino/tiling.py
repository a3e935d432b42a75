"""Work on a video in tiles, where a whole frame, or a whole video, does not fit into memory.

In space, tiles overlap and are blended. A tile sees nothing beyond its border, where a model puts zeros, and
attention in frames and group norm look no further than the tile: the result is close to the whole but not equal to
it (`benchmarks/tiling.py` measures by how much). In time nothing is lost: every tile has a stream of its own. In
`stream.reconstruct` all of these hold their state at once, on a card more than anything else: `offload` keeps that of
the tiles that wait in the host's memory. `stream.encode` and `decode` take one tile after the other.

Blended are the raw moments, log-variances like means: a weighted mean of log-variances is what two estimates of one
posterior call for. Variances would let the more uncertain tile win; those of `w z1 + (1 - w) z2` would shrink in the
overlap, as independent noise averages out. And KL is convex in (mean, log-variance): blending cannot raise it.

Tiles of time are for models that cannot stream, whose group norm looks at all frames. They are lossier still:
statistics change from tile to tile, and nothing is blended, as the official CausalVAE does it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from praxino.errors import ConfigError
from praxino.models.vae import Piece, VideoVAE
from praxino.ops.causal import Stream

Tile = int | Sequence[int]
HOST = torch.device("cpu")


class Push(Protocol):
    """One pass over a video: takes the next piece, and whether it is the last, and returns what is ready."""

    def __call__(self, x: Tensor | None, final: bool = False) -> Tensor | None: ...

    def to(self, device: torch.device) -> None:
        """Move what is held between two pieces to a device."""


@dataclass(frozen=True)
class Axis:
    """Tiles of one size along `length` latent cells, spread evenly from end to end."""

    length: int
    size: int
    starts: tuple[int, ...]

    @classmethod
    def fit(cls, length: int, tile: int, overlap: float) -> "Axis":
        """Take as few tiles of `tile` cells as overlap by `overlap` of a tile, rounded up, or more."""
        size = min(tile, length)
        shared = min(math.ceil(overlap * size), size // 2)
        gaps = math.ceil((length - size) / max(size - shared, 1))
        return cls(length, size, tuple(round(i * (length - size) / max(gaps, 1)) for i in range(gaps + 1)))

    def span(self, index: int, cell: int) -> slice:
        """Return the place of a tile, in elements of which a latent cell has `cell`."""
        return slice(self.starts[index] * cell, (self.starts[index] + self.size) * cell)

    def weights(self, cell: int) -> list[Tensor]:
        """Return how much each tile counts at each of its elements, in float64; all sum to one.

        The ramps are raised cosines: the error of a tile is largest at its border, where they are flat.
        """
        at = torch.arange(self.size * cell, dtype=torch.float64) + 0.5
        total = torch.zeros(self.length * cell, dtype=torch.float64)
        ramps = []
        for i, start in enumerate(self.starts):
            ramp = torch.ones_like(at)
            if i > 0:
                ramp = torch.minimum(ramp, at / (cell * max(self.starts[i - 1] + self.size - start, 1)))
            if i + 1 < len(self.starts):
                ramp = torch.minimum(ramp, at.flip(0) / (cell * max(start + self.size - self.starts[i + 1], 1)))
            ramps.append(torch.sin(ramp * math.pi / 2).square())
            total[self.span(i, cell)] += ramps[-1]
        return [ramp / total[self.span(i, cell)] for i, ramp in enumerate(ramps)]


@dataclass(frozen=True)
class Grid:
    """Tiles over frames: how to cut what goes into a model and to blend what comes out.

    `cell_in` and `cell_out` are the elements `(height, width)` of a latent cell there: the stride, or 1.
    """

    rows: Axis
    columns: Axis
    cell_in: tuple[int, int]
    cell_out: tuple[int, int]

    def places(self) -> Iterator[tuple[int, int]]:
        """Yield the row and the column of each tile, row by row."""
        yield from product(range(len(self.rows.starts)), range(len(self.columns.starts)))

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def crops(self, x: Tensor) -> Iterator[Tensor]:
        """Yield what each tile sees of a piece of a video."""
        (down, across), size = self.cell_in, (self.rows.length, self.columns.length)
        if x.shape[-2:] != (size[0] * down, size[1] * across):
            raise ValueError(
                f"a piece of shape {tuple(x.shape)} does not fit the {size[0] * down}x{size[1] * across} of those "
                "before: use a new coder for a video of another size."
            )
        for i, j in self.places():
            yield x if len(self) == 1 else x[..., self.rows.span(i, down), self.columns.span(j, across)].contiguous()

    def blend(self, parts: Iterable[Tensor | None]) -> Tensor | None:
        """Blend what the tiles bring, in float32 at least; a single tile's is passed on as it is."""
        if len(self) == 1:
            return next(iter(parts))
        (down, across), total, dtype = self.cell_out, None, None
        for (i, j), part in zip(self.places(), parts, strict=True):
            if part is None:
                continue
            if total is None:
                dtype, wide = part.dtype, torch.promote_types(part.dtype, torch.float32)
                size = (*part.shape[:-2], self.rows.length * down, self.columns.length * across)
                total = part.new_zeros(size, dtype=wide)
                rows, columns = (
                    [w.to(total) for w in a.weights(c)] for a, c in zip(self.axes, self.cell_out, strict=True)
                )
            weight = rows[i][:, None] * columns[j]
            total[..., self.rows.span(i, down), self.columns.span(j, across)] += part * weight
        return total if total is None else total.to(dtype)

    @property
    def axes(self) -> tuple[Axis, Axis]:
        return self.rows, self.columns


def check_tile(vae: VideoVAE, tile: Tile, overlap: float) -> tuple[int, int]:
    """Return the height and width of a tile in latent cells; raise ConfigError unless the model takes such tiles."""
    sides = (tile, tile) if isinstance(tile, int) else tuple(tile)
    stride = vae.stride[1:]
    if len(sides) != 2 or any(side < 1 or side % step for side, step in zip(sides, stride, strict=True)):
        raise ConfigError(
            f"tile {tile if isinstance(tile, int) else list(sides)} does not fit: use a number of pixels or "
            f"[height, width], multiples of {stride[0]} and {stride[1]}, e.g. {32 * stride[0]}."
        )
    check_overlap(overlap)
    return sides[0] // stride[0], sides[1] // stride[1]


def check_overlap(overlap: float) -> None:
    """Raise ConfigError unless tiles can overlap by this part of them."""
    if not 0 <= overlap <= 0.5:
        raise ConfigError(f"overlap {overlap} does not fit: use 0 to 0.5 of a tile, e.g. 0.25.")


def pixel_grid(vae: VideoVAE, shape: Sequence[int], tile: Tile, overlap: float) -> Grid:
    """Lay tiles over videos of a shape, to be encoded."""
    down, across = vae.stride[1:]
    height, width = check_tile(vae, tile, overlap)
    rows, columns = Axis.fit(shape[-2] // down, height, overlap), Axis.fit(shape[-1] // across, width, overlap)
    return Grid(rows, columns, (down, across), (1, 1))


def latent_grid(vae: VideoVAE, shape: Sequence[int], tile: Tile, overlap: float) -> Grid:
    """Lay tiles over latents of a shape, to be decoded."""
    height, width = check_tile(vae, tile, overlap)
    rows, columns = Axis.fit(shape[-2], height, overlap), Axis.fit(shape[-1], width, overlap)
    return Grid(rows, columns, (1, 1), (vae.stride[1], vae.stride[2]))


class Streamed:
    """One pass through a model in pieces: exact."""

    def __init__(self, step: Callable[[Tensor | None, Stream], Piece]) -> None:
        self.step, self.stream = step, Stream()

    def __call__(self, x: Tensor | None, final: bool = False) -> Tensor | None:
        self.stream.final |= final
        return self.step(x, self.stream).main

    def to(self, device: torch.device) -> None:
        self.stream.to(device)


class TiledInSpace:
    """A pass over frames in tiles, each with a pass of its own in time.

    What the tiles hold stays on the `device` of the model, or comes there from the host for their turn (`offload`).
    """

    def __init__(
        self, make: Callable[[], Push], lay: Callable[[Sequence[int]], Grid], device: torch.device, offload: bool
    ) -> None:
        self.make, self.lay, self.device, self.offload = make, lay, device, offload
        self.grid: Grid | None = None
        self.passes: list[Push] = []

    def __call__(self, x: Tensor | None, final: bool = False) -> Tensor | None:
        if self.grid is None:
            if x is None:
                return None
            self.grid = self.lay(x.shape)
            self.passes = [self.make() for _ in self.grid.places()]
        crops = [None] * len(self.grid) if x is None else self.grid.crops(x)
        return self.grid.blend(self.turn(push, crop, final) for push, crop in zip(self.passes, crops, strict=True))

    def turn(self, push: Push, crop: Tensor | None, final: bool) -> Tensor | None:
        """Send a tile's next piece through the model."""
        if not self.offload:
            return push(crop, final)
        push.to(self.device)
        y = push(crop, final)
        push.to(HOST)
        return y

    def to(self, device: torch.device) -> None:
        for push in self.passes:
            push.to(device)


class TiledInTime:
    """A pass through a model that takes whole videos only, in tiles of time: lossy.

    Every tile is a video of its own, `size` frames that begin `carry` frames before the one before ends. Of what
    comes out, all but the first tile lose their first `drop` frames. Lengths of what goes in and what comes out
    differ: one is video, the other latents.
    """

    def __init__(self, whole: Callable[[Tensor], Tensor], size: int, carry: int, drop: int) -> None:
        self.whole, self.size, self.carry, self.drop = whole, size, carry, drop
        self.held: Tensor | None = None
        self.begun = self.done = False

    def __call__(self, x: Tensor | None, final: bool = False) -> Tensor | None:
        if self.done:
            raise ValueError("this pass has had its last piece: use a new one for the next video.")
        self.done = final
        if x is not None:
            self.held = x if self.held is None else torch.cat((self.held, x), dim=2)
        parts = []
        while self.held is not None and self.held.shape[2] >= self.size:
            parts.append(self.next(self.held[:, :, : self.size]))
            self.held = self.held[:, :, self.size - self.carry :].clone()
        if final and self.held is not None and self.held.shape[2] > self.carry * self.begun:
            parts.append(self.next(self.held))
        return torch.cat(parts, dim=2) if parts else None

    def to(self, device: torch.device) -> None:
        self.held = None if self.held is None else self.held.to(device)

    def next(self, tile: Tensor) -> Tensor:
        """Send the next tile through the model and return what is new."""
        y = self.whole(tile)
        y = y[:, :, self.drop if self.begun else 0 :]
        self.begun = True
        return y


def time_overlap(vae: VideoVAE) -> tuple[int, int]:
    """Return how many frames, and how many latents, a tile of time shares with the next: two latents as a rule."""
    frames = sum(vae.frame_rule)
    return frames, vae.latent_frames(frames)


def check_tile_frames(vae: VideoVAE, tile_frames: int) -> None:
    """Raise ConfigError unless the model needs tiles of time, and takes such ones."""
    if vae.streamable:
        raise ConfigError(
            f"tile_frames {tile_frames} is lossy, and this model streams exactly: use chunk, with tile_frames null."
        )
    (first, step), shared = vae.frame_rule, time_overlap(vae)[0]
    if tile_frames <= shared or vae.fitting_frames(tile_frames) != tile_frames:
        raise ConfigError(
            f"tile_frames {tile_frames} does not fit: use {first} + {step}k, {shared + step} or more (the official "
            f"code: {shared + 2 * step})."
        )


def encoder(vae: VideoVAE, tile: Tile | None, overlap: float, tile_frames: int | None, offload: bool = False) -> Push:
    """Begin to encode a video: pixels to moments."""
    if tile is not None:
        return TiledInSpace(
            lambda: encoder(vae, None, overlap, tile_frames),
            lambda shape: pixel_grid(vae, shape, tile, overlap),
            next(vae.parameters()).device,
            offload,
        )
    if tile_frames is None:
        return Streamed(vae.encode_stream)
    check_tile_frames(vae, tile_frames)
    frames, latents = time_overlap(vae)
    return TiledInTime(lambda x: vae.encode(x).moments, tile_frames, carry=frames, drop=latents)


def decoder(vae: VideoVAE, tile: Tile | None, overlap: float, tile_frames: int | None, offload: bool = False) -> Push:
    """Begin to decode a video: latents to pixels."""
    if tile is not None:
        return TiledInSpace(
            lambda: decoder(vae, None, overlap, tile_frames),
            lambda shape: latent_grid(vae, shape, tile, overlap),
            next(vae.parameters()).device,
            offload,
        )
    if tile_frames is None:
        return Streamed(vae.decode_stream)
    check_tile_frames(vae, tile_frames)
    frames, latents = time_overlap(vae)
    return TiledInTime(vae.decode, vae.latent_frames(tile_frames), carry=latents, drop=frames)
