"""A video in chunks equals the whole video, for every length, chunk, stride and interpolation."""

import os
import random
import subprocess
import sys

import pytest
import torch

from praxino import stream
from praxino.models.wfvae import SPACE_TIME, WFVAE
from praxino.ops.causal import Stream

PARTS = ("dowmsample_block", "downsample_wavelet", "upsample_block", "upsample_wavelet")
CUBE = {f"l1_{part}": name for part, name in zip(PARTS, SPACE_TIME, strict=True)}
MODELS = {
    "4x8x8 nearest": {"t_interpolation": "nearest"},
    "4x8x8 trilinear": {"t_interpolation": "trilinear"},
    "8x8x8 nearest": {"t_interpolation": "nearest", **CUBE},
    "8x8x8 trilinear": {"t_interpolation": "trilinear", **CUBE},
}
LENGTHS = (1, 5, 9, 13, 17, 33, 49)
CHUNKS = (1, 2, 4, 8, 16)
BFLOAT16 = 0.0 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 2**-5  # emulated: off by a rounding or two
TOLERANCES = {"float32": 1e-5, "float64": 1e-12, "bfloat16": BFLOAT16, "autocast": BFLOAT16}


def make(name: str, **overrides) -> WFVAE:
    torch.manual_seed(0)
    config = {
        "latent_dim": 4,
        "base_channels": 8,
        "encoder_energy_flow_hidden_size": 8,
        "decoder_energy_flow_hidden_size": 8,
        "norm_type": "layernorm",
    }
    vae = WFVAE(**config | MODELS[name] | overrides)
    vae.initialize("fan_in")
    return vae.eval()


def video(frames: int, height: int = 32, width: int = 32, **kwargs) -> torch.Tensor:
    x = torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(frames), dtype=torch.float64)
    return (2 * x - 1).to(kwargs.get("dtype", torch.float32))


@torch.no_grad()
def check_grid(name: str, kind: str, lengths, chunks, size=(32, 32)) -> None:
    """Compare chunked with whole, both ways; `kind` is a dtype, or autocast to bfloat16 with float32 weights."""
    dtype = torch.float32 if kind == "autocast" else getattr(torch, kind)
    vae = make(name).to(dtype)
    worst = 0.0
    for frames in lengths:
        if (frames - 1) % vae.stride[0]:
            continue
        x = video(frames, *size, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            moments = vae.encode(x).moments
            z = moments[:, :4]
            y = vae.decode(z)
            assert y.shape == x.shape
            for chunk in chunks:
                chunked = stream.encode(vae, x, chunk).moments, stream.decode(vae, z, chunk)
                for a, b in zip(chunked, (moments, y), strict=True):
                    assert a.shape == b.shape
                    worst = max(worst, (a - b).abs().max().item())
    assert worst <= TOLERANCES[kind]


@pytest.mark.parametrize("kind", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_chunks_equal_the_whole(name, kind):
    check_grid(name, kind, lengths=(1, 5, 9, 17), chunks=(1, 2, 8))


@pytest.mark.parametrize("name", MODELS)
def test_chunks_equal_the_whole_at_a_few_pixels(name):
    check_grid(name, "float32", lengths=(9, 17, 49), chunks=(1, 2, 8), size=(16, 24))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("name", MODELS)
def test_full_grid(name, kind):
    check_grid(name, kind, LENGTHS, CHUNKS)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_uneven_pieces_and_a_separate_flush(name):
    vae, shuffle = make(name).double(), random.Random(0)
    s = vae.stride[0]
    x = video(1 + 4 * s, 16, 16, dtype=torch.float64)
    moments = vae.encode(x).moments
    y = vae.decode(moments[:, :4])
    for flush in (False, True):
        for whole, source, push in (
            (moments, x, lambda e, part, final: (p := e.push(part, final)) and p.moments),
            (y, moments[:, :4], lambda d, part, final: d.push(part, final)),
        ):
            coder = stream.Encoder(vae) if source is x else stream.Decoder(vae)
            pieces, start = [], 0
            while start < source.shape[2]:
                stop = min(start + shuffle.randint(1, 5), source.shape[2])
                pieces.append(push(coder, source[:, :, start:stop], stop == source.shape[2] and not flush))
                start = stop
            if flush:
                pieces.append(push(coder, None, True))
            got = torch.cat([piece for piece in pieces if piece is not None], dim=2)
            torch.testing.assert_close(got, whole, rtol=0, atol=1e-12)
            with pytest.raises(ValueError, match="use a new Stream"):
                coder.push(source)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("4x8x8 nearest", [1, 4, 4, 4, 0]),
        ("4x8x8 trilinear", [1, 2, 4, 4, 2]),
        ("8x8x8 nearest", [1, 8, 8, 8, 0]),
        ("8x8x8 trilinear", [1, 2, 8, 8, 6]),
    ],
)
def test_frames_that_each_latent_brings_out(name, counts):
    vae = make(name)
    decoder, z = stream.Decoder(vae), torch.randn(1, 4, 4, 2, 2)
    got = [decoder.push(z[:, :, i : i + 1]) for i in range(4)] + [decoder.push(None, final=True)]
    assert [0 if y is None else y.shape[2] for y in got] == counts


@torch.no_grad()
@pytest.mark.parametrize("name", ["4x8x8 trilinear", "8x8x8 trilinear"])
def test_a_latent_comes_with_its_last_frame(name):
    vae = make(name)
    s = vae.stride[0]
    encoder, x = stream.Encoder(vae), video(1 + 2 * s, 16, 16)
    got = [encoder.push(x[:, :, i : i + 1]) for i in range(1 + 2 * s)]
    assert [i for i, posterior in enumerate(got) if posterior is not None] == [0, s, 2 * s]


@torch.no_grad()
@pytest.mark.parametrize("name", ["4x8x8 trilinear", "8x8x8 trilinear"])
def test_coefficients_of_a_stream_equal_those_of_the_whole(name):
    vae = make(name).double()
    z = torch.randn(1, 4, 4, 2, 2, dtype=torch.float64)
    state, pieces = Stream(), []
    for i in range(4):
        state.final = i == 3
        pieces.append(vae.decode_stream(z[:, :, i : i + 1], state).coefficients)
    for level, whole in enumerate(vae.decode_stream(z, Stream(final=True)).coefficients):
        got = torch.cat([piece[level] for piece in pieces if piece[level] is not None], dim=2)
        torch.testing.assert_close(got, whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_state_does_not_grow_with_the_video():
    vae = make("8x8x8 trilinear")
    for pieces, push in (
        (video(48, 16, 16).split(8, dim=2), vae.encode_stream),
        (torch.randn(1, 4, 7, 2, 2).split(1, dim=2), vae.decode_stream),
    ):
        state, sizes = Stream(), []
        for piece in pieces:
            push(piece, state)
            sizes.append(sum(t.untyped_storage().nbytes() for t in state.tensors()))
        assert len(set(sizes[2:])) == 1


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunks_that_do_not_fit_are_refused(chunk):
    vae = make("4x8x8 nearest")
    for call in (
        lambda: stream.encode(vae, video(5), chunk),
        lambda: stream.decode(vae, torch.zeros(1, 4, 2, 1, 1), chunk),
        lambda: list(stream.reconstruct(vae, [video(5)], chunk)),
    ):
        with pytest.raises(ValueError, match="use 1 or more, or None"):
            call()


@torch.no_grad()
@pytest.mark.parametrize("name", ["4x8x8 trilinear", "8x8x8 nearest"])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 8, 9, 12, 18])
def test_reconstruct_takes_any_length_and_size(name, frames):
    vae = make(name).double()
    s = vae.stride[0]
    x = video(frames, 13, 22, dtype=torch.float64)
    fitting = -(-(frames - 1) // s) * s + 1
    rows = torch.cat((x, x[..., -1:, :].expand(-1, -1, -1, 3, -1)), dim=-2)
    wide = torch.cat((rows, rows[..., -1:].expand(-1, -1, -1, -1, 2)), dim=-1)
    whole = torch.cat((wide, wide[:, :, -1:].expand(-1, -1, fitting - frames, -1, -1)), dim=2)
    expected = vae(whole, sample=False).recon[:, :, :frames, :13, :22]
    for sizes in ([1] * frames, [frames], [2] * (frames // 2) + [1] * (frames % 2)):
        for chunk in (3, 8, None):
            pieces = list(stream.reconstruct(vae, iter(x.split(sizes, dim=2)), chunk))
            torch.testing.assert_close(torch.cat(pieces, dim=2), expected, rtol=0, atol=1e-12)
    unbatched = torch.cat(list(stream.reconstruct(vae, iter(x[0].split(4, dim=1)))), dim=1)
    torch.testing.assert_close(unbatched, expected[0], rtol=0, atol=1e-12)


def test_reconstruct_reads_lazily_and_needs_no_gradient():
    vae, taken = make("4x8x8 trilinear"), []

    def chunks():
        for i in range(6):
            taken.append(i)
            yield video(8, 16, 16)[0]

    pieces = stream.reconstruct(vae, chunks(), chunk=8)
    first = next(pieces)
    assert len(taken) <= 2
    assert not first.requires_grad
    assert torch.is_grad_enabled()
    assert first.shape[1] + sum(piece.shape[1] for piece in pieces) == 48


def test_reconstruct_keeps_the_dtype_given():
    vae = make("4x8x8 nearest").bfloat16()
    (y,) = stream.reconstruct(vae, [video(1, 8, 8)])
    assert y.dtype == torch.float32


def test_reconstruct_of_nothing_is_nothing():
    vae = make("4x8x8 nearest")
    assert list(stream.reconstruct(vae, [])) == []
    assert list(stream.reconstruct(vae, [], chunk=None)) == []
    assert list(stream.reconstruct(vae, [torch.zeros(3, 0, 8, 8)])) == []
    with pytest.raises(ValueError, match=r"use \(C, t, H, W\)"):
        list(stream.reconstruct(vae, [torch.zeros(3, 8, 8)]))


MEMORY = """
import resource
import sys

import torch

from praxino import stream
from praxino.models.wfvae import WFVAE

torch.manual_seed(0)
vae = WFVAE(latent_dim=4, base_channels=16, encoder_energy_flow_hidden_size=16, decoder_energy_flow_hidden_size=16,
            norm_type="layernorm", t_interpolation="trilinear").eval()
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
clips = (torch.rand(3, 8 if i else 1, 96, 96) for i in range(1 + int(sys.argv[1]) // 8))
print(sum(y.shape[1] for y in stream.reconstruct(vae, clips, chunk=8)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_memory_is_flat_in_the_length():
    """Peak resident memory above the loaded model, one process for each length."""
    peaks, environment = {}, {**os.environ, "OMP_NUM_THREADS": "1"}
    for frames in (33, 129):
        command = [sys.executable, "-c", MEMORY, str(frames)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        count, peaks[frames] = (int(line) for line in run.stdout.split())
        assert count == frames
    assert peaks[33] > 5e6  # it measures something
    assert peaks[129] < 1.2 * peaks[33]
