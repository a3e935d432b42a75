"""Halves merged, channels grown, pictures' kernels inflated."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from praxino.convert import expand, inflate, merge
from praxino.errors import CheckpointError, ConfigError
from praxino.models.causalvae import CausalVAE
from praxino.models.wfvae import WFVAE

TINY: dict[str, Any] = {
    "latent_dim": 2,
    "base_channels": 8,
    "encoder_num_resblocks": 1,
    "encoder_energy_flow_hidden_size": 4,
    "decoder_num_resblocks": 1,
    "decoder_energy_flow_hidden_size": 4,
    "norm_type": "layernorm",
}
LEVELS = {"hidden_size": 32, "hidden_size_mult": [1, 1, 1, 1], "num_res_blocks": 1}
V11: dict[str, Any] = {
    "encoder_conv_in": "Conv2d",
    "encoder_attention": "AttnBlock3DFix",
    "encoder_resnet_blocks": ["ResnetBlock2D", "ResnetBlock2D", "ResnetBlock3D", "ResnetBlock3D"],
    "encoder_spatial_downsample": ["Downsample", "Downsample", "Downsample", ""],
    "encoder_temporal_downsample": ["", "TimeDownsampleRes2x", "TimeDownsampleRes2x", ""],
    "decoder_attention": "AttnBlock3DFix",
    "decoder_temporal_upsample": ["", "", "TimeUpsampleRes2x", "TimeUpsampleRes2x"],
}
V12 = {
    **V11,
    "encoder_spatial_downsample": ["Downsample", "Spatial2xTime2x3DDownsample", "Spatial2xTime2x3DDownsample", ""],
    "encoder_temporal_downsample": ["", "", "", ""],
    "decoder_spatial_upsample": ["", "SpatialUpsample2x", "Spatial2xTime2x3DUpsample", "Spatial2xTime2x3DUpsample"],
    "decoder_temporal_upsample": ["", "", "", ""],
}


def wfvae(seed: int, **changes: Any) -> WFVAE:
    torch.manual_seed(seed)
    return WFVAE(**{**TINY, **changes}).eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------ merge
@torch.no_grad()
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_merge_takes_one_half(half: Any) -> None:
    ours, theirs = wfvae(0), wfvae(1)
    theirs.set_statistics([1, 2], [3, 4])
    merged = merge(ours, theirs, half)
    x, z = noise(1, 3, 5, 16, 16), noise(1, 2, 2, 2, 2)
    encoder, decoder = (theirs, ours) if half == "encoder" else (ours, theirs)
    assert torch.equal(merged.encode(x).moments, encoder.encode(x).moments)
    assert torch.equal(merged.decode(z), decoder.decode(z))
    assert merged.statistics == encoder.statistics
    assert torch.equal(ours.decode(z), wfvae(0).decode(z))  # a copy


def test_merge_takes_the_layers_of_moments_along() -> None:
    torch.manual_seed(0)
    ours, theirs = (CausalVAE(**LEVELS) for _ in range(2))
    theirs.config["scale"] = [1.0, 2.0, 3.0, 4.0]
    merged = merge(ours, theirs, "encoder")
    state = merged.state_dict()
    for key, tensor in theirs.state_dict().items():
        theirs_now = key.startswith(("encoder.", "quant_conv."))
        assert torch.equal(state[key], tensor if theirs_now else ours.state_dict()[key])
    assert merged.config["scale"] == theirs.config["scale"]


def test_merge_refuses_another_architecture() -> None:
    with pytest.raises(ConfigError, match="encoder: t_interpolation is trilinear there and nearest in vae"):
        merge(wfvae(0), wfvae(1, t_interpolation="trilinear"), "encoder")
    with pytest.raises(ConfigError, match="a CausalVAEModel does not fit a WFVAEModel"):
        merge(wfvae(0), CausalVAE(**LEVELS), "decoder")


# ----------------------------------------------------------------------------------------------------- expand
def test_expand_keeps_the_leading_slice_and_draws_the_rest() -> None:
    narrow = wfvae(0, base_channels=16)
    wide, fresh = expand(narrow, {"base_channels": 32}, seed=3)
    assert fresh == []
    old, new = narrow.state_dict(), wide.state_dict()
    for key in old.keys() - narrow.fixed_filters().keys():
        assert torch.equal(new[key][tuple(slice(n) for n in old[key].shape)], old[key]), key
    key = "decoder.mid.0.conv1.conv.weight"  # (64, 64, 3, 3, 3) -> (128, 128, 3, 3, 3)
    drawn = new[key][64:]
    assert drawn.std() == pytest.approx(float(old[key].std()), rel=0.02)
    assert float(drawn.mean()) == pytest.approx(float(old[key].mean()), abs=0.02 * float(drawn.std()))
    for name, taps in wide.fixed_filters().items():
        assert torch.equal(new[name], taps)
    again, other = (expand(narrow, {"base_channels": 32}, seed=seed)[0].state_dict()[key] for seed in (3, 4))
    assert torch.equal(again, new[key])
    assert not torch.equal(other, new[key])


@torch.no_grad()
def test_expanded_latents_keep_the_old_ones() -> None:
    narrow = wfvae(0)
    narrow.set_statistics([1, 2], [3, 4])
    wide, _ = expand(narrow, {"latent_dim": 5})
    x = noise(1, 3, 5, 16, 16)
    before, after = narrow.encode(x), wide.encode(x)
    assert after.mean.shape[1] == 5
    assert (after.mean[:, :2] - before.mean).abs().max() < 1e-6
    assert (after.logvar[:, :2] - before.logvar).abs().max() < 1e-6
    assert wide.statistics is None


def test_expand_of_causalvae_resets_the_mix() -> None:
    narrow = CausalVAE(**LEVELS, **V11)
    assert {float(t) for k, t in narrow.state_dict().items() if k.endswith("mix_factor")} == {2.0}
    wide, _ = expand(narrow, {"z_channels": 6, "embed_dim": 6})
    assert wide.latent_channels == 6
    assert {float(t) for k, t in wide.state_dict().items() if k.endswith("mix_factor")} == {0.0}
    same, _ = expand(narrow, {})
    assert all(torch.equal(tensor, narrow.state_dict()[key]) for key, tensor in same.state_dict().items())


def test_expand_adds_layers_and_loses_none() -> None:
    shallow = CausalVAE(**LEVELS)
    deeper, fresh = expand(shallow, {"num_res_blocks": 2})
    assert {key.split(".block.")[1][0] for key in fresh} == {"1", "2"}
    assert len(deeper.state_dict()) == len(shallow.state_dict()) + len(fresh)
    for change in ({"base_channels": 4}, {"use_attention": False}, {"connect_res_layer_num": 2}):  # these renumber
        with pytest.raises(ConfigError, match=f"{next(iter(change))}: .* have no room"):
            expand(wfvae(0), change)


def test_expand_keeps_the_dtype() -> None:
    wide, _ = expand(wfvae(0).bfloat16(), {"latent_dim": 3})
    assert {tensor.dtype for tensor in wide.state_dict().values()} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------------- inflate
@pytest.fixture(scope="module")
def pictures() -> nn.Module:
    """A tiny 2D autoencoder with biases and gains that matter."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.36,
        shift_factor=0.11,
    ).eval()
    for parameter in net.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return net


def config_of(net: Any) -> dict[str, Any]:
    return dict(net.config)


def to_ldm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as latent diffusion's files hold them, inside of a whole model."""
    words = {
        "down_blocks.": "down.",
        "up_blocks.": "up.",
        "resnets.": "block.",
        "downsamplers.0.": "downsample.",
        "upsamplers.0.": "upsample.",
        "mid_block.block.0.": "mid.block_1.",
        "mid_block.block.1.": "mid.block_2.",
        "mid_block.attentions.0.": "mid.attn_1.",
        "group_norm.": "norm.",
        "to_q.": "q.",
        "to_k.": "k.",
        "to_v.": "v.",
        "to_out.0.": "proj_out.",
        "conv_shortcut.": "nin_shortcut.",
        "conv_norm_out.": "norm_out.",
    }
    renamed = {"model.diffusion_model.out.weight": torch.zeros(1)}
    for key, tensor in state.items():
        for old, new in words.items():
            key = key.replace(old, new)
        if key.startswith("decoder.up."):
            key = f"decoder.up.{3 - int(key[11])}{key[12:]}"
        attention = "attn_1" in key and tensor.ndim == 2
        renamed[f"first_stage_model.{key}"] = tensor[:, :, None, None] if attention else tensor
    return renamed


@torch.no_grad()
@pytest.mark.parametrize("how", ["tail", "average"])
@pytest.mark.parametrize("layout", [{}, V11], ids=["v1.0", "v1.1"])
def test_a_picture_goes_through_an_inflated_model_as_through_its_origin(
    pictures: Any, layout: dict[str, Any], how: Any
) -> None:
    origin = copy.deepcopy(pictures).double()  # in float32 they agree to 2e-5
    vae, fresh = inflate(pictures.state_dict(), config_of(pictures), layout, how)
    vae.double()
    assert vae.config["scale"] == [0.36] * 4
    assert vae.config["shift"] == [0.11] * 4
    assert {key.split(".")[3] for key in fresh} == ({"time_downsample", "time_upsample"} if layout else set())
    x = noise(2, 3, 1, 32, 48).double()
    posterior = origin.encode(x[:, :, 0]).latent_dist
    assert (vae.encode(x).moments[:, :, 0] - posterior.parameters).abs().max() < 1e-7  # a third is rounded in float32
    decoded = origin.decode(posterior.mean).sample
    assert (vae.decode(posterior.mean.unsqueeze(2))[:, :, 0] - decoded).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("how", ["tail", "average"])
def test_a_still_video_stays_one(pictures: Any, how: Any) -> None:
    """The kernels of both kinds sum to the 2D one: a video at rest is encoded as its picture, frame by frame."""
    vae, _ = inflate(pictures.state_dict(), config_of(pictures), V11, how)
    x = noise(1, 3, 1, 16, 16)
    moments = vae.encode(x.expand(-1, -1, 5, -1, -1)).moments
    assert (moments - vae.encode(x).moments).abs().max() < 1e-5


@torch.no_grad()
def test_tail_looks_at_the_newest_frame_alone(pictures: Any) -> None:
    tail, average = (inflate(pictures.state_dict(), config_of(pictures), V12, how)[0] for how in ("tail", "average"))
    conv_t, conv_a = (vae.decoder.conv_in.conv.weight for vae in (tail, average))
    kernel = pictures.decoder.conv_in.weight
    assert torch.equal(conv_t[:, :, -1], kernel)
    assert not conv_t[:, :, :-1].any()
    assert all(torch.equal(conv_a[:, :, i], kernel / 3) for i in range(3))


@torch.no_grad()
def test_the_encoder_of_od_vae_equals_its_origin_on_pictures(pictures: Any) -> None:
    vae, fresh = inflate(pictures.state_dict(), config_of(pictures), V12)
    assert fresh == []
    x = noise(2, 3, 1, 32, 32)
    assert (vae.encode(x).moments[:, :, 0] - pictures.encode(x[:, :, 0]).latent_dist.parameters).abs().max() < 1e-5
    z = noise(1, 4, 1, 4, 4)  # linear, not nearest: alike, not equal
    ours, theirs = vae.decode(z)[:, :, 0].flatten(), pictures.decode(z[:, :, 0]).sample.flatten()
    assert torch.corrcoef(torch.stack((ours, theirs)))[0, 1] > 0.5
    assert not torch.allclose(ours, theirs, atol=1e-3)


def test_names_of_latent_diffusion_and_of_old_diffusers(pictures: Any) -> None:
    state = pictures.state_dict()
    old = {
        key.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn"): v
        for key, v in state.items()
    }
    expected = inflate(state, {}, V12)[0].state_dict()
    for same in (to_ldm(state), old):
        found = inflate(same, {}, V12)[0].state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_inflate_refuses_what_does_not_fit(pictures: Any) -> None:
    state = pictures.state_dict()
    with pytest.raises(CheckpointError, match="no 2D autoencoder"):
        inflate({"weight": torch.zeros(3)}, {}, V12)
    with pytest.raises(CheckpointError, match="1 without a place"):
        inflate({**state, "encoder.extra.weight": torch.zeros(3)}, {}, V12)
    lacking = {key: tensor for key, tensor in state.items() if "mid_block.attentions" not in key}
    with pytest.raises(CheckpointError, match="20 tensors without an origin"):
        inflate(lacking, {}, V12)
    with pytest.raises(CheckpointError, match="norm_num_groups 16"):
        inflate(state, {"norm_num_groups": 16}, V12)
    with pytest.raises(CheckpointError, match="cannot be made of"):
        inflate({**state, "decoder.conv_in.weight": torch.zeros(64, 5, 3, 3)}, {}, V12)
