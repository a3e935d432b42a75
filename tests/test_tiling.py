"""Tiles: a partition of unity, exact in time, equal to the whole where there is one, named lossy where not."""

import logging
import math

import pytest
import torch
from safetensors.torch import load_file

import praxino
from praxino import checkpoint, stream, tiling, video
from praxino.errors import ConfigError
from praxino.models.vae import VideoVAE
from praxino.models.wfvae import SPACE_TIME, WFVAE
from praxino.ops.causal import CausalConv3d, Stream
from praxino.tasks.reconstruct import reconstruct

PARTS = ("dowmsample_block", "downsample_wavelet", "upsample_block", "upsample_wavelet")
CUBE = {f"l1_{part}": name for part, name in zip(PARTS, SPACE_TIME, strict=True)}


def make(**overrides) -> WFVAE:
    torch.manual_seed(0)
    config = {
        "latent_dim": 4,
        "base_channels": 8,
        "encoder_energy_flow_hidden_size": 8,
        "decoder_energy_flow_hidden_size": 8,
        "norm_type": "layernorm",
        "t_interpolation": "trilinear",
    }
    vae = WFVAE(**config | overrides)
    vae.initialize("fan_in")
    return vae.eval()


def group_normed() -> WFVAE:
    widths = ("base_channels", "encoder_energy_flow_hidden_size", "decoder_energy_flow_hidden_size")
    return make(norm_type="groupnorm", **dict.fromkeys(widths, 32)).double()


def clip(frames: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(frames), dtype=torch.float64)
    return (2 * x - 1).to(dtype)


@pytest.mark.parametrize("overlap", [0.0, 0.125, 0.25, 0.3, 0.5])
@pytest.mark.parametrize("tile", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("cell", [1, 8])
def test_weights_are_a_partition_of_unity(tile: int, overlap: float, cell: int) -> None:
    for length in range(1, 41):
        axis = tiling.Axis.fit(length, tile, overlap)
        assert axis.size == min(tile, length)
        assert (axis.starts[0], axis.starts[-1] + axis.size) == (0, length)
        steps = [b - a for a, b in zip(axis.starts, axis.starts[1:], strict=False)]
        shared = min(overlap * tile, tile // 2)
        assert all(0 < step <= axis.size - shared + 1e-9 for step in steps)
        assert (len(steps) - 1) * max(steps, default=0) < length  # no tile too many
        total = torch.zeros(length * cell, dtype=torch.float64)
        for i, weights in enumerate(axis.weights(cell)):
            assert weights.min() > 0
            total[axis.span(i, cell)] += weights
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("tile", "overlap"), [(32, 0.25), ([16, 40], 0.0), ((24, 8), 0.5)])
def test_what_comes_out_lies_where_it_went_in(tile: tiling.Tile, overlap: float) -> None:
    vae, x = make(), clip(3, 72, 56)
    z = torch.nn.functional.avg_pool3d(x, (1, 8, 8))
    down, up = tiling.pixel_grid(vae, x.shape, tile, overlap), tiling.latent_grid(vae, z.shape, tile, overlap)
    assert len({crop.shape for crop in down.crops(x)}) == 1
    assert len(list(up.crops(z))) == len(up) > 2
    pooled = down.blend(torch.nn.functional.avg_pool3d(crop, (1, 8, 8)) for crop in down.crops(x))
    grown = up.blend(crop.repeat_interleave(8, 3).repeat_interleave(8, 4) for crop in up.crops(z))
    torch.testing.assert_close(pooled, z, rtol=0, atol=1e-14)
    torch.testing.assert_close(grown, z.repeat_interleave(8, 3).repeat_interleave(8, 4), rtol=0, atol=1e-14)


def test_a_seam_is_a_ramp() -> None:
    """Two tiles that disagree by 1: steps of at most pi / 2 over the pixels shared, and almost none at the ends."""
    vae = make()
    grid = tiling.latent_grid(vae, (1, 4, 1, 4, 12), 64, 0.5)
    assert len(grid) == 2
    y = grid.blend(torch.full((1, 3, 1, 32, 64), float(i)) for i in range(2))
    assert y[0, 0, 0, 0, [0, 31, 64, 95]].tolist() == [0.0, 0.0, 1.0, 1.0]
    steps = y.diff(dim=-1)
    assert steps.min() >= 0
    assert steps.max() <= math.pi / 2 / 32
    assert steps[..., 31].max() < 1e-3


def test_halves_are_blended_in_float32() -> None:
    grid = tiling.latent_grid(make(), (1, 4, 1, 4, 12), 64, 0.5)
    parts = [torch.full((1, 3, 1, 32, 64), 1.0 + i, dtype=torch.bfloat16) for i in range(2)]
    y = grid.blend(parts)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, grid.blend(part.float() for part in parts).bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("tile", [[32, 40], 64])
def test_a_tile_as_large_as_the_frame_changes_nothing(tile: tiling.Tile) -> None:
    vae, x = make(), clip(9, 32, 40, torch.float32)
    moments = stream.encode(vae, x).moments
    z = moments[:, :4]
    assert torch.equal(stream.encode(vae, x, tile=tile).moments, moments)
    assert torch.equal(stream.decode(vae, z, tile=tile), stream.decode(vae, z))
    for chunk in (4, None):
        pairs = zip(stream.reconstruct(vae, [x], chunk), stream.reconstruct(vae, [x], chunk, tile), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{}, CUBE, {"t_interpolation": "nearest"}], ids=["4x8x8", "8x8x8", "nearest"])
def test_tiles_in_chunks_equal_tiles_in_one_piece(overrides: dict[str, str]) -> None:
    vae = make(**overrides).double()
    x, options = clip(17, 16, 24), {"tile": [16, 16], "overlap": 0.25}
    moments = stream.encode(vae, x, None, **options).moments
    z = moments[:, :4]
    y = stream.decode(vae, z, None, **options)
    assert (moments - vae.encode(x).moments).abs().max() > 1e-3  # lossy in space
    for chunk in (1, 3):
        torch.testing.assert_close(stream.encode(vae, x, chunk, **options).moments, moments, rtol=0, atol=1e-12)
        torch.testing.assert_close(stream.decode(vae, z, chunk, **options), y, rtol=0, atol=1e-12)
    for sizes, chunk in (([17], None), ([2, 7, 1, 7], 3)):
        pieces = stream.reconstruct(vae, iter(x.split(sizes, dim=2)), chunk, **options)
        torch.testing.assert_close(torch.cat(list(pieces), dim=2), y, rtol=0, atol=1e-12)


@torch.no_grad()
def test_reconstruct_pads_to_what_tiles_need() -> None:
    vae, x = make().double(), clip(6, 29, 43)
    got = torch.cat(list(stream.reconstruct(vae, [x], 4, tile=16)), dim=2)
    padded = torch.nn.functional.pad(x, (0, 5, 0, 3, 0, 3), mode="replicate")
    z = stream.encode(vae, padded, tile=16).mode()
    expected = stream.decode(vae, z, tile=16)[:, :, :6, :29, :43]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_blending_removes_the_edges() -> None:
    """The step of the error across the border of a tile, over the steps elsewhere."""
    vae, z = make().double(), torch.randn(1, 4, 2, 8, 16, generator=torch.Generator().manual_seed(0)).double()
    whole, edges = vae.decode(z), {}
    for overlap in (0.0, 0.25, 0.5):
        steps = (stream.decode(vae, z, tile=64, overlap=overlap) - whole).diff(dim=-1).abs().mean((0, 1, 2, 3))
        axis = tiling.Axis.fit(16, 8, overlap)
        borders = {8 * cell - 1 for start in axis.starts for cell in (start, start + 8) if 0 < cell < 16}
        edges[overlap] = max(steps[border].item() for border in borders)
    assert edges[0.25] < 0.5 * edges[0.0]
    assert edges[0.5] < 0.5 * edges[0.0]


@torch.no_grad()
def test_no_layer_sees_more_than_a_tile() -> None:
    vae, seen = make(), []
    for module in vae.modules():
        if isinstance(module, CausalConv3d):
            module.register_forward_pre_hook(lambda _, args: args[0] is None or seen.append(args[0].shape[-2:]))
    list(stream.reconstruct(vae, clip(9, 64, 64, torch.float32).split(4, dim=2), tile=[16, 32]))
    assert max(h for h, _ in seen) == 8  # after the first wavelet transform
    assert max(w for _, w in seen) == 16


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{}, CUBE], ids=["4x8x8", "8x8x8"])
def test_state_of_tiles_does_not_grow_with_the_video(overrides: dict[str, str]) -> None:
    vae = make(**overrides)
    for coder, pieces in (
        (tiling.encoder(vae, 16, 0.25, None), clip(48, 32, 32, torch.float32).split(8, dim=2)),
        (tiling.decoder(vae, 16, 0.25, None), torch.randn(1, 4, 7, 4, 4).split(1, dim=2)),
    ):
        sizes = []
        for piece in pieces:
            coder(piece, False)
            tensors = [t for push in coder.passes for t in push.stream.tensors()]
            sizes.append(sum(t.untyped_storage().nbytes() for t in tensors))
        assert len(coder.passes) == 9
        assert len(set(sizes[2:])) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("make_vae", "options", "pieces"), [(make, {}, 6 + 6), (lambda: group_normed().float(), {"tile_frames": 9}, 6 + 4)]
)
def test_tiles_that_wait_keep_their_state_elsewhere(monkeypatch, make_vae, options, pieces) -> None:
    """With a strongroom for the host, where a state is of no use, and which tells how many are out of it."""
    vae, x = make_vae(), clip(21, 16, 24, torch.float32)
    expected = torch.cat(list(stream.reconstruct(vae, [x], 4, tile=16, **options)), dim=2)
    kind, name = (tiling.TiledInTime, "held") if options else (Stream, "_states")
    locked, out, most = {}, set(), []

    def to(push, device: torch.device) -> None:
        if device is tiling.HOST:
            out.discard(push)
            locked[push] = getattr(push, name)
            setattr(push, name, None)
        else:
            out.add(push)
            setattr(push, name, locked.pop(push, getattr(push, name)))
        most.append(len(out))

    monkeypatch.setattr(kind, "to", to)
    got = torch.cat(list(stream.reconstruct(vae, [x], 4, tile=16, **options, offload=True)), dim=2)
    assert torch.equal(got, expected)
    assert max(most) == 1
    assert len(most) == 2 * 2 * pieces  # there and back, of two tiles, for the pieces of both halves


def test_states_move_as_they_are() -> None:
    held, frames = Stream(), torch.rand(1, 2, 5, 3, 4).to(memory_format=torch.channels_last_3d)
    assert held.window("conv", frames, size=3, step=1) is not None
    held.align("branch", frames, 2)
    held.hold("begun", None)
    before = held.tensors()
    held.to(torch.device("meta"))
    assert [(t.shape, t.stride(), t.dtype) for t in before] == [(t.shape, t.stride(), t.dtype) for t in held.tensors()]
    assert len(before) == 2
    assert all(t.is_meta for t in held.tensors())
    assert held.begun("begun")


@torch.no_grad()
def test_tiles_can_be_flushed() -> None:
    vae, z = make().double(), torch.randn(1, 4, 3, 4, 4).double()
    decoder = stream.Decoder(vae, tile=16)
    assert decoder.push(None) is None
    got = [decoder.push(z), decoder.push(None, final=True)]
    torch.testing.assert_close(torch.cat(got, dim=2), stream.decode(vae, z, tile=16), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="use a new Stream"):
        decoder.push(z)


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (20, 0.25, "multiples of 8 and 8"),
        (0, 0.25, "multiples of 8"),
        ([16], 0.25, "height, width"),
        ([16, 12], 0.25, r"\[16, 12\]"),
        (16, 0.6, "0 to 0.5"),
        (16, -0.1, "0 to 0.5"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(tile: tiling.Tile, overlap: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stream.encode(make(), clip(1, 32, 32), tile=tile, overlap=overlap)


def test_frames_keep_their_size() -> None:
    encoder = stream.Encoder(make().double(), tile=16)
    encoder.push(clip(1, 32, 32))
    with pytest.raises(ValueError, match="32x32 of those before"):
        encoder.push(clip(4, 32, 40))


# Time


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "frames"), [(9, 1), (9, 5), (9, 9), (9, 13), (13, 9), (13, 13), (13, 17), (13, 21), (17, 21)]
)
def test_tiles_of_time_are_videos_of_their_own(size: int, frames: int) -> None:
    """Tile k covers the latents from k (n - 2) to n further, and gives all but its first two."""
    vae, x = group_normed(), clip(frames, 8, 16)
    n, latents = 1 + (size - 1) // 4, 1 + (frames - 1) // 4
    starts = range(0, max(latents - 2, 1), n - 2)
    parts = [vae.encode(x[:, :, 4 * k : 4 * (k + n - 1) + 1]).moments[:, :, 2 if k else 0 :] for k in starts]
    moments = torch.cat(parts, dim=2)
    z = moments[:, :4]
    y = torch.cat([vae.decode(z[:, :, k : k + n])[:, :, 5 if k else 0 :] for k in starts], dim=2)
    assert moments.shape[2] == latents
    assert y.shape == x.shape
    assert torch.equal(moments, vae.encode(x).moments) == (frames <= size)
    for chunk in (4, None):
        torch.testing.assert_close(stream.encode(vae, x, chunk, tile_frames=size).moments, moments, rtol=0, atol=1e-12)
        torch.testing.assert_close(stream.decode(vae, z, chunk, tile_frames=size), y, rtol=0, atol=1e-12)
    got = stream.reconstruct(vae, iter(x.split(3, dim=2)), 6, tile_frames=size)
    torch.testing.assert_close(torch.cat(list(got), dim=2), y, rtol=0, atol=1e-12)


@torch.no_grad()
def test_tiles_of_time_and_space_go_together() -> None:
    vae, x = group_normed(), clip(13, 16, 8)
    options = {"tile": 8, "overlap": 0.5, "tile_frames": 9}
    y = stream.decode(vae, stream.encode(vae, x, **options).mode(), **options)
    got = stream.reconstruct(vae, [x], 5, **options)
    torch.testing.assert_close(torch.cat(list(got), dim=2), y, rtol=0, atol=1e-12)


@torch.no_grad()
def test_tiles_of_time_hold_less_than_two_tiles() -> None:
    coder = tiling.encoder(group_normed(), None, 0.25, 9)
    for i in range(6):
        coder(clip(8 if i else 9, 8, 8), i == 5)
        assert coder.held.shape[2] < 9
        assert coder.held.untyped_storage().nbytes() <= 8 * 3 * 17 * 64
    with pytest.raises(ValueError, match="use a new one"):
        coder(clip(8, 8, 8), False)


def test_tiles_of_time_are_for_models_that_cannot_stream() -> None:
    with pytest.raises(ConfigError, match="streams exactly: use chunk"):
        stream.encode(make(), clip(9, 16, 16), tile_frames=9)
    for size in (0, 1, 5, 10):
        with pytest.raises(ConfigError, match=r"use 1 \+ 4k, 9 or more"):
            stream.decode(group_normed(), torch.zeros(1, 4, 3, 2, 2), tile_frames=size)


@torch.no_grad()
@pytest.mark.parametrize("name", ["causalvae_v10", "causalvae_v12"])
def test_tiles_of_time_equal_the_official_ones(shared, name: str) -> None:
    vae: VideoVAE = praxino.load(shared(f"golden/{name}/hf"))
    x = load_file(shared(f"golden/{name}/input.safetensors"))["t17"]
    expected = load_file(shared(f"golden/{name}/output.safetensors"))
    moments = stream.encode(vae, x, tile_frames=13).moments
    y = stream.decode(vae, expected["t17.mean"], tile_frames=13)
    torch.testing.assert_close(moments, expected["t17.tiled_moments"], rtol=0, atol=2e-5)
    torch.testing.assert_close(y, expected["t17.tiled_decoded"], rtol=0, atol=2e-5)


# The task


def test_reconstruct_in_tiles_says_that_it_is_lossy(tmp_path, caplog) -> None:
    checkpoint.save_official(make(), tmp_path / "streams")
    checkpoint.save_official(group_normed().float(), tmp_path / "whole")
    picture = torch.randint(0, 256, (10, 24, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    video.write(tmp_path / "in" / "x.mp4", picture, 25)
    psnr = {}
    for name, vae, options in (
        ("exact", "streams", {}),
        ("large", "streams", {"tile": [24, 16]}),
        ("tiles", "streams", {"tile": 16}),
        ("waiting", "streams", {"tile": 16, "offload": True}),
        ("whole", "whole", {}),
        ("time", "whole", {"tile_frames": 9}),
    ):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            result = reconstruct(
                vae=str(tmp_path / vae), input=str(tmp_path / "in"), out=str(tmp_path / name), device="cpu", **options
            )
        assert caplog.text.count("lossy") == len(options) - options.get("offload", False)
        assert result["frames"] == 10
        psnr[name] = result["psnr"]
    assert psnr["large"] == psnr["exact"]
    assert psnr["waiting"] == psnr["tiles"]
    assert len(set(psnr.values())) == 4
    with pytest.raises(ConfigError, match="streams exactly"):
        reconstruct(vae=str(tmp_path / "streams"), input=str(tmp_path / "in"), out=str(tmp_path / "no"), tile_frames=9)
    with pytest.raises(ConfigError, match="use it with tile"):
        reconstruct(vae=str(tmp_path / "streams"), input=str(tmp_path / "in"), out=str(tmp_path / "no"), offload=True)
