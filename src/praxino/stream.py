"""Encode and decode videos of any length in chunks, exactly as if in one piece.

Memory depends on the chunk, not on the length, and a chunk may have any size. Under `torch.no_grad()`, that is:
gradients flow through a stream, and then all of it is kept.

Two options trade exactness for memory and are lossy (see `praxino.tiling`), one trades time and is exact. Wherever
they occur:
    tile: height and width in pixels, or one number: frames go through the model in blended tiles of this size, which
        overlap by `overlap` of a tile. A tile as large as the frame changes nothing.
    tile_frames: 1 + s*k frames: how a model that cannot stream (group norm) works on long videos all the same, in
        tiles of time.
    offload: what the layers hold back of each tile waits in the host's memory for the tile's next turn, not on the
        model's device. All of it is copied there and back once a chunk: choose large ones.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from praxino import tiling
from praxino.models.vae import Posterior, VideoVAE
from praxino.tiling import Tile


class Encoder:
    """The encoding of one video, piece by piece."""

    def __init__(
        self,
        vae: VideoVAE,
        tile: Tile | None = None,
        overlap: float = 0.25,
        tile_frames: int | None = None,
        offload: bool = False,
    ) -> None:
        self._push = tiling.encoder(vae, tile, overlap, tile_frames, offload)

    def push(self, x: Tensor | None, final: bool = False) -> Posterior | None:
        """Take the next frames `(B, 3, t, H, W)` and return the latents that are ready; None flushes."""
        moments = self._push(x, final)
        return None if moments is None else Posterior(moments)


class Decoder:
    """The decoding of one video, piece by piece."""

    def __init__(
        self,
        vae: VideoVAE,
        tile: Tile | None = None,
        overlap: float = 0.25,
        tile_frames: int | None = None,
        offload: bool = False,
    ) -> None:
        self._push = tiling.decoder(vae, tile, overlap, tile_frames, offload)

    def push(self, z: Tensor | None, final: bool = False) -> Tensor | None:
        """Take the next latents `(B, C, t, h, w)` and return the frames that are ready; None flushes."""
        return self._push(z, final)


def encode(
    vae: VideoVAE,
    x: Tensor,
    chunk: int | None = 8,
    tile: Tile | None = None,
    overlap: float = 0.25,
    tile_frames: int | None = None,
) -> Posterior:
    """Encode a video in pieces of one frame, then `chunk` frames each (None: in one piece).

    Tiles are encoded one after the other: only one of them holds a state.
    """
    vae.check_video(x.shape)
    if tile is not None:
        grid = tiling.pixel_grid(vae, x.shape, tile, overlap)
        moments = grid.blend(encode(vae, crop, chunk, tile_frames=tile_frames).moments for crop in grid.crops(x))
        assert moments is not None
        return Posterior(moments)
    encoder = Encoder(vae, tile_frames=tile_frames)
    posteriors = [encoder.push(piece, final) for piece, final in pieces(x, chunk)]
    return Posterior(torch.cat([p.moments for p in posteriors if p is not None], dim=2))


def decode(
    vae: VideoVAE,
    z: Tensor,
    chunk: int | None = 2,
    tile: Tile | None = None,
    overlap: float = 0.25,
    tile_frames: int | None = None,
) -> Tensor:
    """Decode latents in pieces of one, then `chunk` latent frames each (None: in one piece).

    Tiles are decoded one after the other: only one of them holds a state.
    """
    vae.check_latent(z.shape)
    if tile is not None:
        grid = tiling.latent_grid(vae, z.shape, tile, overlap)
        y = grid.blend(decode(vae, crop, chunk, tile_frames=tile_frames) for crop in grid.crops(z))
        assert y is not None
        return y
    decoder = Decoder(vae, tile_frames=tile_frames)
    frames = [decoder.push(piece, final) for piece, final in pieces(z, chunk)]
    return torch.cat([y for y in frames if y is not None], dim=2)


def pieces(x: Tensor, chunk: int | None) -> Iterator[tuple[Tensor, bool]]:
    """Yield the first frame, then `chunk` frames at a time, each with whether it is the last piece."""
    check_chunk(chunk)
    rest = x.shape[2] - 1
    sizes = [rest + 1] if chunk is None else [1, *[min(chunk, rest - i) for i in range(0, rest, chunk)]]
    parts = x.split(sizes, dim=2)
    for i, part in enumerate(parts):
        yield part, i == len(parts) - 1


def check_chunk(chunk: int | None) -> None:
    """Raise ValueError unless the chunk size makes sense."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk {chunk} does not fit: use 1 or more, or None for the whole at once.")


@torch.no_grad()
def reconstruct(
    vae: VideoVAE,
    chunks: Iterable[Tensor],
    chunk: int | None = 8,
    tile: Tile | None = None,
    overlap: float = 0.25,
    tile_frames: int | None = None,
    offload: bool = False,
) -> Iterator[Tensor]:
    """Yield the reconstruction of a video of any length and size, through the posterior's mode.

    Args:
        vae: the model.
        chunks: the video in consecutive pieces of any lengths, `(C, t, H, W)` or `(B, C, t, H, W)` in [-1, 1]. It is
            read lazily; its length need not be known. H and W are padded to what the model takes by repeating the
            last row and column, T by repeating the last frame, and all of that is cut off again.
        chunk: at most how many frames go through the encoder at once (None: collect the whole video first).

    Yields:
        Pieces like the given ones (not of the same lengths), in all exactly as many frames.
    """
    check_chunk(chunk)
    options = (tile, overlap, tile_frames, offload)
    encoder, decoder = Encoder(vae, *options), Decoder(vae, *options)
    taken = given = 0
    for piece, like, final in look_ahead(vae, chunks, chunk):
        taken += piece.shape[2]
        if final:
            piece = pad_time(piece, vae.fitting_frames(taken) - taken)
        posterior = encoder.push(piece, final)
        y = None if posterior is None else decoder.push(posterior.mode(), final)
        if y is not None:
            y = y[:, :, : taken - given, : like.shape[-2], : like.shape[-1]].to(like.dtype)
            given += y.shape[2]
            yield y if like.dim() == 5 else y[0]


def look_ahead(vae: VideoVAE, chunks: Iterable[Tensor], chunk: int | None) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield pieces ready for the model, the tensor that each came from, and whether it is the last one."""
    if chunk is None:
        parts = list(chunks)
        chunks = [torch.cat(parts, dim=-3)] if parts else []
    waiting = None
    for given in chunks:
        if given.dim() not in (4, 5):
            raise ValueError(
                f"a piece of shape {tuple(given.shape)} does not fit: use (C, t, H, W) or (B, C, t, H, W)."
            )
        weight = next(vae.parameters())
        x = (given if given.dim() == 5 else given[None]).to(weight.device, weight.dtype)
        for part in x.split(chunk or max(x.shape[2], 1), dim=2):
            if part.shape[2] == 0:
                continue
            if waiting is not None:
                yield *waiting, False
            waiting = pad_space(part, vae.stride[1], vae.stride[2]), given
    if waiting is not None:
        yield *waiting, True


def pad_space(x: Tensor, height: int, width: int) -> Tensor:
    """Repeat the last row and column up to the next multiples."""
    right, bottom = -x.shape[-1] % width, -x.shape[-2] % height
    return F.pad(x, (0, right, 0, bottom, 0, 0), mode="replicate") if right or bottom else x


def pad_time(x: Tensor, frames: int) -> Tensor:
    """Repeat the last frame."""
    return torch.cat((x, x[:, :, -1:].expand(-1, -1, frames, -1, -1)), dim=2) if frames else x
