"""Every autoencoder of diffusers, tiny and random: loaded by praxino it computes what diffusers computes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

import praxino
from praxino import stream
from praxino.checkpoint import describe, save_official
from praxino.config import conf_dir, register_resolvers
from praxino.data.synthetic import make_dataset
from praxino.errors import CheckpointError, ConfigError
from praxino.lit.parallel import checkpoint_blocks
from praxino.models.foreign import FAMILIES, ForeignVAE
from praxino.tasks.evaluate import evaluate
from praxino.tasks.reconstruct import reconstruct
from praxino.tasks.train import run as train

diffusers = pytest.importorskip("diffusers", minversion="0.35")

TOLERANCE = 1e-5  # measured: 0 for all of them, the arithmetic is the same
OTHER_BATCH = 3e-5  # between frames in batches of other sizes; measured: 5e-6
WIDTHS = (8, 8, 8, 8)
NAMES = {  # name here -> class, options, stride; sizes of 32 pixels, so that one latent is left at 32x
    "wan": (
        "AutoencoderKLWan",
        {
            "base_dim": 4,
            "z_dim": 4,
            "dim_mult": [1, 1, 2, 2],
            "num_res_blocks": 1,
            "latents_mean": [-0.7, 0.1, 1.5, 0.0],
            "latents_std": [2.8, 1.4, 2.3, 0.5],
        },
        (4, 8, 8),
    ),
    "wan 2.2": (
        "AutoencoderKLWan",
        {
            "base_dim": 4,
            "decoder_base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 2, 2, 2],
            "num_res_blocks": 1,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        },
        (4, 16, 16),
    ),
    "hunyuan": (
        "AutoencoderKLHunyuanVideo",
        {"latent_channels": 4, "block_out_channels": WIDTHS, "layers_per_block": 1, "norm_num_groups": 4},
        (4, 8, 8),
    ),
    "cogvideox": (
        "AutoencoderKLCogVideoX",
        {"latent_channels": 4, "block_out_channels": WIDTHS, "layers_per_block": 1, "norm_num_groups": 2},
        (4, 8, 8),
    ),
    "ltx": (
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8,
            "block_out_channels": WIDTHS,
            "decoder_block_out_channels": WIDTHS,
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
        },
        (8, 32, 32),
    ),
    "ltx 0.9.1": (
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8,
            "block_out_channels": WIDTHS,
            "decoder_block_out_channels": (8, 16, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1),
            "decoder_spatio_temporal_scaling": (True, True, True),
            "decoder_inject_noise": (True, True, True, False),
            "upsample_residual": (True, True, True),
            "upsample_factor": (2, 2, 2),
            "timestep_conditioning": True,
        },
        (8, 32, 32),
    ),
    "cosmos": (
        "AutoencoderKLCosmos",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": WIDTHS,
            "decode_block_out_channels": WIDTHS,
            "attention_resolutions": (8,),
            "resolution": 64,
            "num_layers": 1,
            "latents_mean": [0.1 * i for i in range(12)],
            "latents_std": [1.0 + 0.1 * i for i in range(12)],
        },
        (8, 8, 8),
    ),
    "mochi": (
        "AutoencoderKLMochi",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "latents_mean": [0.5] * 4,
            "latents_std": [0.9] * 4,
        },
        (6, 8, 8),
    ),
    "allegro": (
        "AutoencoderKLAllegro",
        {
            "latent_channels": 4,
            "block_out_channels": WIDTHS,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "sample_size": 32,
        },
        (4, 8, 8),
    ),
    "2d": (
        "AutoencoderKL",
        {
            "latent_channels": 4,
            "block_out_channels": (8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "scaling_factor": 0.36,
            "shift_factor": 0.11,
        },
        (1, 4, 4),
    ),
}
# of 1, 5, 9 and 17 frames those that the family takes, and two of its own where these are few
LENGTHS = {"ltx": (1, 9, 17), "ltx 0.9.1": (1, 9, 17), "cosmos": (1, 9, 17), "mochi": (1, 7, 13), "allegro": (4, 8, 24)}


QUICK = ("wan", "allegro", "2d")
FAST = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def make(name: str) -> Any:
    """Build a tiny model with diffusers alone, with biases that matter."""
    torch.manual_seed(0)
    cls, options, _ = NAMES[name]
    net = getattr(diffusers, cls)(**options).eval()
    for key, buffer in net.named_buffers():
        if key == "latents_mean":
            buffer.uniform_(-1, 1)
        elif key == "latents_std":
            buffer.uniform_(0.5, 2)
    return net


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save every model as diffusers does."""
    root = tmp_path_factory.mktemp("foreign")
    for name in NAMES:
        make(name).save_pretrained(root / name)
    return {name: root / name for name in NAMES}


def video(frames: int, height: int = 32, width: int = 32, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return 2 * torch.rand(batch, 3, frames, height, width, generator=generator) - 1


def reference(name: str, net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the reconstruction that diffusers computes for one video."""
    if name == "2d":
        z = net.encode(x[0].transpose(0, 1)).latent_dist.mode()
        return z.transpose(0, 1)[None], net.decode(z).sample.transpose(0, 1)[None]
    if name == "allegro":  # it has tiled methods only; one tile is the whole
        net.enable_tiling()
        net.kernel = net.stride = tuple(x.shape[2:])
    z = net.encode(x).latent_dist.mode()
    torch.manual_seed(1)
    y = (net.decode(z, torch.zeros(1)) if name == "ltx 0.9.1" else net.decode(z)).sample
    return z, y.transpose(1, 2) if name == "allegro" else y  # which gives (B, T, C, H, W)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_equals_diffusers(name: str, saved: dict[str, Path]) -> None:
    net, vae = getattr(diffusers, NAMES[name][0]).from_pretrained(saved[name]).eval(), praxino.load(saved[name])
    assert isinstance(vae, ForeignVAE)
    assert vae.stride == NAMES[name][2]
    for frames in LENGTHS.get(name, (1, 5, 9, 17)):
        x = video(frames)
        z, y = reference(name, net, x)
        posterior = vae.encode(x)
        assert (posterior.mode() - z).abs().max() <= TOLERANCE
        assert z.shape[1:3] == (vae.latent_channels, vae.latent_frames(frames))
        torch.manual_seed(1)
        own = vae.decode(z)
        assert own.shape == x.shape
        # of an even number of latents CogVideoX gives 4 frames each, where 5 and 13 frames went in: 8 and 16
        assert y.shape[2] == (8 if (name, frames) == ("cogvideox", 5) else frames)
        assert (own - y[:, :, -frames:]).abs().max() <= TOLERANCE
        assert posterior.std.shape == z.shape


@pytest.mark.parametrize("name", FAST)
@torch.no_grad()
def test_posterior_has_the_moments_of_diffusers(name: str, saved: dict[str, Path]) -> None:
    vae = praxino.load(saved[name])
    frames = vae.fitting_frames(2)
    x = video(frames, batch=2)
    posterior = vae.encode(x)
    if name == "cosmos":
        assert posterior.std.max() < 1e-6
        assert (posterior.sample() - posterior.mode()).abs().max() < 1e-5
        return
    net = getattr(diffusers, NAMES[name][0]).from_pretrained(saved[name]).eval()
    if name == "allegro":  # whose tiles do not take two videos
        net.enable_tiling()
        net.kernel = net.stride = tuple(x.shape[2:])
    for i in range(2):
        one = x[i : i + 1]
        one = one[0].transpose(0, 1) if name == "2d" else one
        expected = net.encode(one).latent_dist
        std = expected.std.transpose(0, 1)[None] if name == "2d" else expected.std
        assert (posterior.std[i : i + 1] - std).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", FAST)
def test_any_length_and_size_is_reconstructed(name: str, saved: dict[str, Path]) -> None:
    vae = praxino.load(saved[name])
    for frames, height, width in ((1, 32, 32), (3, 27, 35), (6, 40, 32)):
        x = video(frames, height, width)[0]
        y = torch.cat([*stream.reconstruct(vae, x.split(2, dim=1), chunk=None)], dim=1)
        assert y.shape == x.shape
        high, wide = -height % vae.stride[1], -width % vae.stride[2]
        padded = torch.nn.functional.pad(
            x[None], (0, wide, 0, high, 0, vae.fitting_frames(frames) - frames), "replicate"
        )
        if name != "ltx 0.9.1":  # which is random
            with torch.no_grad():
                whole = vae.decode(vae.encode(padded).mode())[0, :, :frames, :height, :width]
            assert (y - whole).abs().max() <= TOLERANCE


def test_lengths_that_fit(saved: dict[str, Path]) -> None:
    expected = {"wan": (1, 4), "cogvideox": (1, 4), "ltx": (1, 8), "cosmos": (1, 8), "mochi": (1, 6), "allegro": (4, 4)}
    for name, rule in (expected | {"2d": (1, 1), "hunyuan": (1, 4)}).items():
        vae = praxino.load(saved[name])
        assert vae.frame_rule == rule
        for frames in range(1, 30):
            fits = frames >= rule[0] and (frames - rule[0]) % rule[1] == 0
            assert (vae.fitting_frames(frames) == frames) == fits
            if not fits:
                with pytest.raises(ValueError, match=rf"use {rule[0]} \+ {rule[1]}k"):
                    vae.encode(video(frames))


@torch.no_grad()
def test_wan_of_half_the_ratio_keeps_to_four_frames(tmp_path: Path) -> None:
    options = NAMES["wan"][1] | {"temperal_downsample": [False, False, True]}
    diffusers.AutoencoderKLWan(**options).save_pretrained(tmp_path)
    vae = praxino.load(tmp_path)
    assert (vae.stride, vae.frame_rule) == ((2, 8, 8), (1, 4))
    z = vae.encode(video(5)).mode()
    assert z.shape[2] == vae.latent_frames(5) == 3
    assert vae.decode(z).shape == (1, 3, 5, 32, 32)
    with pytest.raises(ValueError, match=r"use 1 \+ 4k"):
        vae.encode(video(3))


# Normalised latents.


def test_published_statistics(saved: dict[str, Path]) -> None:
    def check(name: str, mean: Any, std: Any) -> None:
        vae = praxino.load(saved[name])
        z = torch.randn(2, vae.latent_channels, 3, 2, 2)
        mean, std = (torch.as_tensor(v).expand(vae.latent_channels).view(1, -1, 1, 1, 1) for v in (mean, std))
        assert torch.allclose(vae.normalize(z), (z - mean) / std, atol=1e-6)
        assert torch.allclose(vae.denormalize(vae.normalize(z)), z, atol=1e-6)

    check("wan", torch.tensor([-0.7, 0.1, 1.5, 0.0]), torch.tensor([2.8, 1.4, 2.3, 0.5]))
    check("hunyuan", 0.0, 1 / 0.476986)
    check("cogvideox", 0.0, 1 / 1.15258426)
    check("mochi", 0.5, 0.9)
    check("allegro", 0.0, 1 / 0.13)
    check("2d", 0.11, 1 / 0.36)
    ltx = make("ltx")
    check("ltx", ltx.latents_mean, ltx.latents_std)


def test_cosmos_has_statistics_for_each_latent_frame(saved: dict[str, Path]) -> None:
    vae, z = praxino.load(saved["cosmos"]), torch.randn(1, 4, 2, 1, 1)
    mean = torch.arange(12).view(1, 4, 3, 1, 1) / 10
    assert torch.allclose(vae.normalize(z), (z - mean[:, :, :2]) / (1 + mean[:, :, :2]), atol=1e-6)
    with pytest.raises(ConfigError, match="3 latent frames, not 4"):
        vae.normalize(torch.randn(1, 4, 4, 1, 1))


def test_measured_statistics_win(saved: dict[str, Path]) -> None:
    vae, z = praxino.load(saved["wan"]), torch.randn(1, 4, 3, 2, 2)
    vae.set_statistics([1.0] * 4, [2.0] * 4)
    assert torch.allclose(vae.normalize(z), (z - 1) / 2)


def test_statistics_that_do_not_fit(tmp_path: Path) -> None:
    diffusers.AutoencoderKLWan(**NAMES["wan"][1] | {"latents_mean": [0.0] * 5}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="5 statistics do not fit 4 latent channels"):
        praxino.load(tmp_path).normalize(torch.zeros(1, 4, 1, 1, 1))


# In pieces.


@torch.no_grad()
def test_whole_only(saved: dict[str, Path]) -> None:
    vae = praxino.load(saved["wan"])
    assert not vae.streamable
    with pytest.raises(ConfigError, match="chunk=null"):
        stream.encode(vae, video(9), chunk=4)
    with pytest.raises(ConfigError, match="chunk=null"):
        stream.decode(vae, torch.zeros(1, 4, 3, 4, 4), chunk=1)
    assert torch.equal(stream.encode(vae, video(9), chunk=None).mode(), vae.encode(video(9)).mode())


@pytest.mark.parametrize("name", ["wan", "allegro"])
@torch.no_grad()
def test_tiles_of_time(name: str, saved: dict[str, Path]) -> None:
    vae, x = praxino.load(saved[name]), video(21)[0]
    size = vae.fitting_frames(16)
    y = torch.cat([*stream.reconstruct(vae, x.split(5, dim=1), chunk=5, tile_frames=size)], dim=1)
    assert y.shape == x.shape
    first = vae.decode(vae.encode(x[None, :, :size]).mode())[0]
    assert (y[:, :size] - first).abs().max() <= TOLERANCE


@torch.no_grad()
def test_pictures_work_in_chunks(saved: dict[str, Path]) -> None:
    vae, x = praxino.load(saved["2d"]), video(9)
    z = vae.encode(x).mode()
    assert vae.streamable
    assert (stream.encode(vae, x, chunk=3).mode() - z).abs().max() <= OTHER_BATCH
    assert (stream.decode(vae, z, chunk=2) - vae.decode(z)).abs().max() <= OTHER_BATCH


# Files.


@pytest.mark.parametrize("name", FAST)
def test_praxino_checkpoint(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    vae = praxino.load(saved[name])
    vae.set_statistics([0.5] * vae.latent_channels, [2.0] * vae.latent_channels)
    state = {f"net.{key}": value for key, value in vae.state_dict().items()}
    torch.save({"praxino": describe(vae), "state_dict": state}, tmp_path / "step-1.ckpt")
    again = praxino.load(tmp_path / "step-1.ckpt")
    assert (again.config, again.extra, again.statistics) == (vae.config, vae.extra, vae.statistics)
    assert all(torch.equal(a, b) for a, b in zip(vae.state_dict().values(), again.state_dict().values(), strict=True))


def test_diffusers_reads_what_is_written(saved: dict[str, Path], tmp_path: Path) -> None:
    vae = praxino.load(saved["wan"])
    net = diffusers.AutoencoderKLWan.from_pretrained(save_official(vae, tmp_path))
    assert all(torch.equal(value, vae.state_dict()[f"model.{key}"]) for key, value in net.state_dict().items())
    written, original = (json.loads((d / "config.json").read_text()) for d in (tmp_path, saved["wan"]))
    assert written == original


def test_shards_and_pipelines(tmp_path: Path) -> None:
    net = make("hunyuan")
    net.save_pretrained(tmp_path / "vae", max_shard_size="100KB")
    (tmp_path / "model_index.json").write_text("{}")
    assert len([*(tmp_path / "vae").glob("*.safetensors")]) > 1
    state = praxino.load(tmp_path).state_dict()
    assert all(torch.equal(value, state[f"model.{key}"]) for key, value in net.state_dict().items())
    index = tmp_path / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match="names no files beside it"):
        praxino.load(tmp_path)


def test_old_names_of_attention(saved: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = "diffusion_pytorch_model.safetensors"
    state = load_file(saved["2d"] / file)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for key, v in state.items()}
    assert any("proj_attn" in key for key in state)
    save_file(state, tmp_path / file)
    (tmp_path / "config.json").write_text((saved["2d"] / "config.json").read_text())
    again, vae = praxino.load(tmp_path).state_dict(), praxino.load(saved["2d"])
    assert all(torch.equal(value, again[key]) for key, value in vae.state_dict().items())


def test_what_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    def change(**entries: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config | entries))
        return tmp_path

    config = json.loads((saved["wan"] / "config.json").read_text())
    make("wan").save_pretrained(tmp_path)
    for entries, message in (
        ({"_class_name": "AutoencoderTiny"}, "holds a AutoencoderTiny: give one of"),
        ({"z_dim": 5}, "of another shape"),
        ({"out_channels": 1}, "not RGB"),
        ({"temperal_downsample": [True, True, True]}, "four frames"),
    ):
        with pytest.raises(CheckpointError, match=message):
            praxino.load(change(**entries))
    change()
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="a pickle, which can run code"):
        praxino.load(tmp_path)


def test_keys_that_diffusers_does_not_know_are_left_out(
    saved: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make("wan").save_pretrained(tmp_path)
    config = json.loads((saved["wan"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"clip_output": False}))
    assert praxino.load(tmp_path).config == praxino.load(saved["wan"]).config
    assert "AutoencoderKLWan does not know clip_output" in caplog.text


def test_without_diffusers(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'praxino\[diffusers\]'"):
        praxino.load(saved["wan"])


def test_another_version_of_diffusers(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        __version__ = "0.30"

    monkeypatch.setitem(sys.modules, "diffusers", Old)
    with pytest.raises(ConfigError, match=r"diffusers 0.30 has no AutoencoderKLWan: pip install -U"):
        praxino.load(saved["wan"])


def test_every_family_is_tested() -> None:
    assert {cls for cls, _, _ in NAMES.values()} == set(FAMILIES)


# Training and devices.


@pytest.mark.parametrize("name", FAST)
def test_layers_for_training(name: str, saved: dict[str, Path]) -> None:
    vae = praxino.load(saved[name])
    output = vae(video(vae.fitting_frames(2)))
    assert output.encoder_coefficients == output.decoder_coefficients == ()
    (output.recon.square().mean() + output.posterior.kl().mean()).backward()
    assert vae.last_layer.grad is not None
    assert len(vae.trainable_parameters()) == len([*vae.parameters()])
    # the last layer of the decoder: nothing after it has weights of its own
    assert vae.last_layer.shape[0] in (3, 12, 3 * 4**3, 3 * 4**2)
    if name in ("cosmos", "mochi"):
        with pytest.raises(ConfigError, match="no layer for mean and log-variance"):
            vae.initialize("fan_in")
    else:
        layer = vae.moments_layer
        assert isinstance(layer, nn.Conv2d | nn.Conv3d)
        assert layer.out_channels == (9 if name.startswith("ltx") else 2 * vae.latent_channels)
        vae.initialize("fan_in")
        assert vae.encode(video(vae.fitting_frames(2))).logvar.mean() < -4


@pytest.mark.parametrize("name", FAST)
@torch.no_grad()
def test_dtype_moves(name: str, saved: dict[str, Path]) -> None:
    dtype = torch.float64 if name == "cosmos" else torch.bfloat16  # torch pools no bfloat16 on a CPU
    vae = praxino.load(saved[name], dtype=dtype)
    x = video(vae.fitting_frames(2))
    y = vae.decode(vae.encode(x.to(dtype)).mode())
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert y.isfinite().all()


@pytest.mark.parametrize("name", ["hunyuan", "2d"])
def test_recomputed_activations_change_no_gradient(name: str, saved: dict[str, Path]) -> None:
    x, gradients = video(5), []
    for recompute in (False, True):
        vae = praxino.load(saved[name]).train()
        if recompute:
            checkpoint_blocks(vae)
        vae(x, sample=False).recon.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in vae.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_activations_that_cannot_be_recomputed(saved: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="AutoencoderKLWan of diffusers cannot: leave it off"):
        checkpoint_blocks(praxino.load(saved["wan"]))


def trained(out: Path, *overrides: str) -> dict[str, float]:
    """Train in memory for a few steps, as the command line does."""
    register_resolvers()
    settings = ["data.root=null", "frames=5", "size=16", "batch=2", "trainer=cpu", "checkpoint.every=1"]
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        return train(compose("train", overrides=["model=foreign", f"out={out}", *settings, *overrides]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "2d"])
def test_fine_tuning(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    net = f"model.net.path={saved[name]}"
    trained(tmp_path / "run", net, "trainer.max_steps=2", "model.freeze=[model.encoder]")
    trained(tmp_path / "run", net, "trainer.max_steps=3", "model.freeze=[model.encoder]", "ckpt=last")
    before, after = (praxino.load(path).state_dict() for path in (saved[name], tmp_path / "run"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert not any(key.startswith("model.encoder.") for key in changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "2d"])
def test_tasks(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    videos = make_dataset(tmp_path / "videos", videos=2, val_videos=1, frames=11, size=36)
    result = reconstruct(str(saved[name]), str(videos / "train"), str(tmp_path / "out"), device="cpu")
    assert (result["videos"], result["frames"]) == (2, 22)
    root = {"root": str(videos / "train")}
    assert evaluate(str(tmp_path / "scores"), str(saved[name]), root, frames=9, size=32, workers=0)["n"] == 2
