import pytest
import torch

from praxino import stream
from praxino.errors import ConfigError
from praxino.losses.vae import VAELoss
from praxino.models.causalvae import CausalVAE
from praxino.ops.causal import Stream

FLAT = ["", "", "", ""]
MIXED_BLOCKS = ["ResnetBlock2D", "ResnetBlock2D", "ResnetBlock3D", "ResnetBlock3D"]
V11 = {
    "encoder_conv_in": "Conv2d",
    "encoder_attention": "AttnBlock3DFix",
    "decoder_attention": "AttnBlock3DFix",
    "encoder_resnet_blocks": MIXED_BLOCKS,
    "encoder_spatial_downsample": ["Downsample", "Downsample", "Downsample", ""],
    "encoder_temporal_downsample": ["", "TimeDownsampleRes2x", "TimeDownsampleRes2x", ""],
    "decoder_temporal_upsample": ["", "", "TimeUpsampleRes2x", "TimeUpsampleRes2x"],
}
V12 = V11 | {
    "encoder_spatial_downsample": ["Downsample", *["Spatial2xTime2x3DDownsample"] * 2, ""],
    "encoder_temporal_downsample": FLAT,
    "decoder_spatial_upsample": ["", "SpatialUpsample2x", *["Spatial2xTime2x3DUpsample"] * 2],
    "decoder_temporal_upsample": FLAT,
}
FIXED = {"encoder_attention": "AttnBlock3DFix", "decoder_attention": "AttnBlock3DFix"}  # v1.0 as it was meant
LAYOUTS = {"v1.0": FIXED, "v1.1": V11, "v1.2": V12}
SMALL = {"hidden_size": 8, "hidden_size_mult": [1, 2, 1, 2], "num_res_blocks": 1, "norm_type": "layernorm"}
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}


def make(layout: dict, **overrides) -> CausalVAE:
    torch.manual_seed(0)
    vae = CausalVAE(**layout | SMALL | overrides)
    vae.initialize("fan_in")
    return vae.eval()


def video(frames: int, height: int = 16, width: int = 24, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return (torch.rand(1, 3, frames, height, width, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)


OPTIONS = {
    **LAYOUTS,
    "v1.0 as published": {"norm_type": "groupnorm", "hidden_size": 32},
    "v1.2 group norm": V12 | {"norm_type": "groupnorm", "hidden_size": 32},
    "v1.2 frame norm": V12 | {"norm_type": "framenorm", "hidden_size": 32},
    "2D convolutions": V12 | dict.fromkeys(("encoder_conv_out", "decoder_conv_in", "decoder_conv_out"), "Conv2d"),
    "2D all over": V12 | {"q_conv": "Conv2d", "encoder_mid_resnet": "ResnetBlock2D"},
    "no quant layer": V12 | {"use_quant_layer": False},
    "widths of latents differ": V12 | {"z_channels": 6},
    "two blocks": V11 | {"num_res_blocks": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_gives_back_the_shape_and_trains(name):
    vae = make({}, **OPTIONS[name])
    x = video(5, dtype=torch.float32).repeat(2, 1, 1, 1, 1)
    output = vae(x)
    assert output.recon.shape == x.shape
    assert output.posterior.mean.shape == (2, 4, 2, 2, 3)
    assert output.encoder_coefficients == output.decoder_coefficients == ()
    (output.recon.square().mean() + output.posterior.kl().mean()).backward()
    assert [key for key, p in vae.named_parameters() if p.grad is None] == []
    assert vae.fixed_filters() == {}
    assert output.posterior.logvar.mean().item() == pytest.approx(-6.0, abs=0.5)  # so fan_in found the moments' layer
    assert any(vae.last_layer is p for p in vae.decoder.conv_out.parameters())


def test_stride_follows_the_layout():
    assert make(V11).stride == make(V12).stride == (4, 8, 8)
    half = V12 | {
        "encoder_spatial_downsample": ["Downsample", "", "Spatial2xTime2x3DDownsample", "Downsample"],
        "decoder_spatial_upsample": ["", "Upsample", "SpatialUpsample2x", "Spatial2xTime2x3DUpsample"],
    }
    vae = make(half)
    assert vae.stride == (2, 8, 8)
    assert vae(video(3, dtype=torch.float32)).recon.shape == (1, 3, 3, 16, 24)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 does not fit: use 1 or more."),
        ({"hidden_size_mult": []}, r"hidden_size_mult=\[\] does not fit"),
        ({"hidden_size_mult": [1, 1]}, "encoder_resnet_blocks has 4 entries for the 2 of hidden_size_mult"),
        ({"encoder_attention": "AttnBlock2D"}, "encoder_attention 'AttnBlock2D' is unknown: use AttnBlock3D or "),
        ({"decoder_spatial_upsample": ["", "", "", "os.system"]}, "decoder_spatial_upsample 'os.system' is unknown"),
        ({"decoder_spatial_upsample": FLAT}, r"by \(4, 8, 8\), the decoder multiplies them by \(1, 1, 1\)"),
        ({"norm_type": "batchnorm"}, "'batchnorm' is unknown: use groupnorm or layernorm or framenorm"),
        ({"norm_type": "framenorm"}, "8 channels do not divide into the 32 groups"),
        ({"attn_resolutions": [16]}, r"attn_resolutions=\[16\] is not supported: use \[\]"),
        ({"double_z": False}, "double_z=False leaves no room"),
    ],
)
def test_configs_that_no_model_has(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make(V12, **overrides)


def test_optimizer_order_is_the_official_one():
    vae = make(V12)
    names = {id(p): name for name, p in vae.named_parameters()}
    order = [names[id(p)].split(".")[0] for p in vae.trainable_parameters()]
    assert list(dict.fromkeys(order)) == ["post_quant_conv", "decoder", "quant_conv", "encoder"]
    assert len(order) == len(names)
    vae.encoder.requires_grad_(False)
    assert not any(names[id(p)].startswith("encoder") for p in vae.trainable_parameters())


def test_initialisation_restores_the_mixture():
    vae = make(V11)
    mixture = vae.encoder.down[1].time_downsample.mix_factor
    mixture.data.zero_()
    vae.initialize("default")
    assert mixture.item() == 2.0


def test_latents_are_scaled_as_officially():
    z = torch.randn(2, 4, 2, 2, 2)
    torch.testing.assert_close(make(V12).normalize(z), z * 0.18215)


def test_loss_needs_no_coefficients():
    vae, x = make(V12), video(5, dtype=torch.float32)
    terms = VAELoss(wavelet=0.0)(x, vae(x))
    terms["loss"].backward()
    assert sorted(terms) == ["kl", "l1", "loss", "nll", "rest"]
    with pytest.raises(ValueError, match="a network without coefficients needs wavelet=0"):
        VAELoss()(x, vae(x))


# Streams.


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("norm", ["layernorm", "framenorm"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_chunks_equal_the_whole(name, norm, dtype):
    vae = make(LAYOUTS[name], norm_type=norm, hidden_size=8 if norm == "layernorm" else 32).to(dtype)
    assert vae.streamable
    for frames in (1, 5, 9, 17) if norm == "layernorm" else (9,):
        x = video(frames, dtype=dtype)
        moments = vae.encode(x).moments
        z = moments[:, :4]
        y = vae.decode(z)
        for chunk in (1, 3, 8):
            for a, b in ((stream.encode(vae, x, chunk).moments, moments), (stream.decode(vae, z, chunk), y)):
                assert a.shape == b.shape
                assert (a - b).abs().max().item() <= TOLERANCES[dtype]


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_separate_flush_and_any_length(name):
    vae = make(LAYOUTS[name]).double()
    x = video(13)
    moments = vae.encode(x).moments
    encoder, decoder = stream.Encoder(vae), stream.Decoder(vae)
    got = [encoder.push(piece) for piece in x.split([3, 1, 5, 4], dim=2)] + [encoder.push(None, final=True)]
    torch.testing.assert_close(torch.cat([p.moments for p in got if p], dim=2), moments, rtol=0, atol=1e-12)
    z = moments[:, :4]
    frames = [decoder.push(piece) for piece in z.split([2, 1, 1], dim=2)] + [decoder.push(None, final=True)]
    torch.testing.assert_close(
        torch.cat([y for y in frames if y is not None], dim=2), vae.decode(z), rtol=0, atol=1e-12
    )
    odd = torch.cat(list(stream.reconstruct(vae, [video(6, 13, 22)], chunk=2)), dim=2)
    assert odd.shape == (1, 3, 6, 13, 22)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_encoder_is_causal_and_the_decoder_looks_three_frames_ahead(name):
    vae = make(LAYOUTS[name]).double()
    x = video(17)
    z = vae.encode(x).moments
    for frame in (1, 4, 5, 16):
        touched = x.clone()
        touched[:, :, frame] += 0.5
        assert changed(vae.encode(touched).moments, z) == list(range(-(-frame // 4), 5))
    latents = z[:, :4]
    y = vae.decode(latents)
    for latent in (2, 3, 4):
        touched = latents.clone()
        touched[:, :, latent] += 0.5
        assert changed(vae.decode(touched), y) == list(range(4 * latent - 6, 17))


def changed(a, b) -> list[int]:
    return [t for t in range(a.shape[2]) if not torch.equal(a[:, :, t], b[:, :, t])]


@torch.no_grad()
def test_state_does_not_grow_with_the_video():
    vae = make(V11).double()
    for pieces, push in (
        (video(48).split(8, dim=2), vae.encode_stream),
        (torch.randn(1, 4, 7, 2, 2, dtype=torch.float64).split(1, dim=2), vae.decode_stream),
    ):
        state, sizes = Stream(), []
        for piece in pieces:
            push(piece, state)
            sizes.append(sum(t.untyped_storage().nbytes() for t in state.tensors()))
        assert len(set(sizes[2:])) == 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (V12 | {"norm_type": "groupnorm", "hidden_size": 32}, "groupnorm takes its statistics over all frames"),
        ({"norm_type": "framenorm", "hidden_size": 32}, r"AttnBlock3D \(CausalVAE v1.0\) mixes all frames"),
    ],
    ids=["group norm", "v1.0 attention"],
)
def test_what_mixes_frames_refuses_chunks_but_not_the_whole(overrides, message):
    vae, x = make({}, **overrides), video(5, dtype=torch.float32)
    assert not vae.streamable
    z = stream.encode(vae, x, chunk=None).mode()
    assert torch.equal(stream.decode(vae, z, chunk=None), vae.decode(z))
    for chunked in (lambda: stream.encode(vae, x, chunk=4), lambda: stream.decode(vae, z, chunk=1)):
        with pytest.raises(ConfigError, match=message) as caught:
            chunked()
        assert "use chunk=null (the whole video at once), overlapping tiles of frames (tile_frames" in str(caught.value)


def test_gradients_of_a_stream_equal_those_of_the_whole():
    vae, x = make(V11).double(), video(9)
    gradients = []
    for chunk in (None, 1):
        vae.zero_grad()
        stream.decode(vae, stream.encode(vae, x, chunk).mode(), chunk).square().sum().backward()
        gradients.append([p.grad.clone() for p in vae.trainable_parameters()])
    largest = max(g.abs().max().item() for g in gradients[0])
    assert max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True)) < 1e-12 * largest


# Layouts of memory, precision, compilers.


@pytest.mark.parametrize("name", LAYOUTS)
def test_bf16_computes_in_bf16(name):
    vae, x = make(LAYOUTS[name]), video(5, dtype=torch.float32)
    exact = vae(x, sample=False).recon
    with torch.autocast("cpu", torch.bfloat16):
        mixed = vae(x, sample=False).recon
    half = make(LAYOUTS[name]).bfloat16()(x.bfloat16(), sample=False).recon
    for y in (mixed, half):
        assert y.dtype == torch.bfloat16
        assert 0 < (y.float() - exact).abs().mean() < 0.05 * exact.abs().mean() + 0.02


def test_kernels_with_channels_last_compute_the_same():
    vae, x = make(V11), video(5, dtype=torch.float32)
    expected = vae(x, sample=False).recon
    torch.testing.assert_close(vae.channels_last()(x, sample=False).recon, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_compiles_to_one_graph(name):
    vae, x = make(LAYOUTS[name]), video(5, dtype=torch.float32)
    compiled = torch.compile(lambda x: vae(x, sample=False).recon, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), vae(x, sample=False).recon, rtol=0, atol=1e-5)
