"""praxino-convert: files in and out, equal after the round trip; what it refuses."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file
from torch import Tensor

from praxino import checkpoint, cli
from praxino.errors import CheckpointError, ConfigError
from praxino.models.causalvae import CausalVAE
from praxino.models.wfvae import WFVAE
from praxino.tasks.convert import convert

TINY: dict[str, Any] = {
    "latent_dim": 4,
    "base_channels": 8,
    "encoder_num_resblocks": 1,
    "encoder_energy_flow_hidden_size": 4,
    "decoder_num_resblocks": 1,
    "decoder_energy_flow_hidden_size": 4,
    "norm_type": "layernorm",
}


def make(seed: int, **changes: Any) -> WFVAE:
    torch.manual_seed(seed)
    return WFVAE(**{**TINY, **changes})


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


def save_run(out: Path, raw: WFVAE, ema: WFVAE | None = None) -> Path:
    """Write what a training with an adversary writes."""
    path = out / "checkpoints" / "step-00000003.ckpt"
    path.parent.mkdir(parents=True)
    state = {f"net.{key}": value for key, value in raw.state_dict().items()}
    state |= {f"adversary.{key}": value for key, value in discriminator().items()}
    average = {} if ema is None else {"ema": {"decay": 0.9, "updates": 3, "weights": ema.state_dict()}}
    header = {**checkpoint.describe(raw), "config": {}, "step": 3}
    torch.save({"global_step": 6, "state_dict": state, **average, "praxino": header}, path)
    return out


def discriminator() -> dict[str, Tensor]:
    return {
        "discriminator.main.0.weight": torch.arange(6.0),
        "discriminator.main.3.num_batches_tracked": torch.tensor(7),
    }


def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Call the command; return its exit code and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", ["praxino-convert", *arguments])
    GlobalHydra.instance().clear()
    code = 0
    try:
        cli.convert()
    except SystemExit as error:
        code = int(error.code or 0)
    return code, capfd.readouterr().err.strip()


# -------------------------------------------------------------------------------------------------- round trips
def test_a_run_becomes_official_files_and_comes_back(tmp_path: Path) -> None:
    source = save_run(tmp_path / "run", make(0), make(1))
    for weights, origin in (("ema", make(1)), ("raw", make(0))):
        first = convert(str(source), str(tmp_path / weights), weights=weights)  # type: ignore[arg-type]
        assert first["class"] == "WFVAEModel"
        assert equal(checkpoint.load(first["out"]), origin)
        second = convert(first["out"], str(tmp_path / f"{weights}-2"))
        third = convert(convert(first["out"], str(tmp_path / f"{weights}-ckpt"), to="ckpt")["out"], f"{first['out']}-3")
        for name in (checkpoint.CONFIG, checkpoint.SAFETENSORS):
            content = Path(first["out"], name).read_bytes()
            assert Path(second["out"], name).read_bytes() == content
            assert Path(third["out"], name).read_bytes() == content


def test_a_run_becomes_an_official_ckpt(tmp_path: Path) -> None:
    source = save_run(tmp_path / "run", make(0), make(1))
    path = convert(str(source), str(tmp_path / "out"), to="ckpt")["out"]
    assert Path(path).name == "checkpoint-3.ckpt"
    written = torch.load(path, weights_only=True)
    assert written["current_step"] == 3
    assert all(key.startswith("module.") for key in written["ema_state_dict"])
    assert not any("wavelet" in key for key in written["ema_state_dict"])
    expected = discriminator()
    assert written["state_dict"]["dics_model"].keys() == expected.keys()
    assert all(torch.equal(v, expected[key]) for key, v in written["state_dict"]["dics_model"].items())
    assert equal(checkpoint.load(path), make(1))
    assert equal(checkpoint.load(path, "raw"), make(0))
    raw = torch.load(convert(str(source), str(tmp_path / "raw"), to="ckpt", weights="raw")["out"], weights_only=True)
    assert raw["ema_state_dict"] == {}
    again = torch.load(convert(path, str(tmp_path / "again"), to="ckpt")["out"], weights_only=True)
    assert again["state_dict"]["dics_model"].keys() == expected.keys()
    assert again["current_step"] == 3


def test_measured_statistics_become_scale_and_shift(tmp_path: Path) -> None:
    vae = make(0)
    mean, std = [0.5, -1.0, 2.0, 0.0], [2.0, 4.0, 0.5, 1.0]
    vae.set_statistics(mean, std)
    out = convert(str(save_run(tmp_path / "run", vae)), str(tmp_path / "out"))["out"]
    config = json.loads(Path(out, checkpoint.CONFIG).read_text())
    assert (config["shift"], config["scale"]) == (mean, [0.5, 0.25, 2.0, 1.0])
    z = torch.randn(1, 4, 2, 3, 3)
    assert torch.allclose(checkpoint.load(out).normalize(z), vae.normalize(z))


def test_the_official_checkpoint_read_written_and_read(shared: Any, tmp_path: Path) -> None:
    source = shared("golden/ckpt_layout")
    path = convert(str(source), str(tmp_path / "out"), to="ckpt")["out"]
    original, written = (
        torch.load(p, map_location="cpu", weights_only=True) for p in (source / "checkpoint-6.ckpt", path)
    )
    assert written.keys() == original.keys()
    for part in (lambda c: c["state_dict"]["gen_model"], lambda c: c["ema_state_dict"]):
        assert list(part(written)) == list(part(original))
        assert all(torch.equal(value, part(original)[key]) for key, value in part(written).items())
    judge, judged = (c["state_dict"]["dics_model"] for c in (original, written))
    assert judge.keys() - judged.keys() == {"logvar"}
    assert all(torch.equal(value, judge[key]) for key, value in judged.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


@pytest.mark.parametrize("name", ["wfvae_c4_ln", "wfvae_888_c4", "causalvae_v10", "causalvae_v12"])
def test_official_directories_are_written_back_byte_for_byte(name: str, shared: Any, tmp_path: Path) -> None:
    source = shared(f"golden/{name}/hf")
    convert(str(source), str(tmp_path))
    for file in (checkpoint.CONFIG, checkpoint.SAFETENSORS):
        assert (tmp_path / file).read_bytes() == (source / file).read_bytes()


def test_checkpoints_of_lightning_are_read(tmp_path: Path) -> None:
    """Open-Sora-Plan v1.0 and v1.1: one flat state dict with the loss in it, and the config as hyperparameters."""
    torch.manual_seed(0)
    vae = CausalVAE(hidden_size=32, hidden_size_mult=[1, 1, 1, 1], num_res_blocks=1)
    state = {**vae.state_dict(), "loss.logvar": torch.zeros(()), "loss.perceptual_loss.lin0.weight": torch.ones(1)}
    state |= {f"loss.{key}": value for key, value in discriminator().items()}
    config = {**vae.config, "lr": 1e-5, "loss_type": "opensora.models.ae.LPIPSWithDiscriminator"}
    content = {"epoch": 0, "global_step": 9, "pytorch-lightning_version": "2.2.1", "state_dict": state}
    torch.save({**content, "hyper_parameters": config}, tmp_path / "epoch=0-step=9.ckpt")
    path = convert(str(tmp_path / "epoch=0-step=9.ckpt"), str(tmp_path / "out"), to="ckpt")["out"]
    assert Path(path).name == "checkpoint-9.ckpt"
    assert equal(checkpoint.load(path), vae)
    assert torch.load(path, weights_only=True)["state_dict"]["dics_model"].keys() == discriminator().keys()


# ------------------------------------------------------------------------------------------- changes on the way
def test_merge_and_growth_from_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_a = save_run(tmp_path / "a", make(0), make(1))
    official = checkpoint.save_official(make(2), tmp_path / "b")
    given = [f"vae={run_a}", f"encoder={official}", f"out={tmp_path}/merged", "to=ckpt"]
    assert run(capfd, monkeypatch, *given) == (0, "")
    for weights, decoder in (("ema", make(1)), ("raw", make(0))):
        state = checkpoint.load(tmp_path / "merged", weights).state_dict()  # type: ignore[arg-type]
        for half, model in (("encoder", make(2)), ("decoder", decoder)):
            assert all(torch.equal(state[key], v) for key, v in model.state_dict().items() if key.startswith(half))
    given = [f"vae={official}", "latent_dim=6", "base_channels=16", "+net.t_interpolation=trilinear"]
    code, error = run(capfd, monkeypatch, *given, f"out={tmp_path}/grown")
    assert code == 0, error
    grown = checkpoint.load(tmp_path / "grown")
    assert (grown.latent_channels, grown.config["base_channels"]) == (6, 16)
    assert grown.config["t_interpolation"] == "trilinear"
    narrow = make(2).state_dict()["decoder.conv_in.conv.weight"]  # (32, 4, 3, 3, 3)
    assert torch.equal(grown.state_dict()["decoder.conv_in.conv.weight"][:32, :4], narrow)


def test_growth_to_an_official_config(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = CausalVAE(hidden_size=8, hidden_size_mult=[1, 1, 1, 1], num_res_blocks=1, norm_type="layernorm")
    source = checkpoint.save_official(vae, tmp_path / "a")
    config = {**vae.official_config(), "hidden_size": 16, "_diffusers_version": "0.1", "lr": 1}
    (tmp_path / "wide.json").write_text(json.dumps(config))
    result = convert(str(source), str(tmp_path / "b"), config=str(tmp_path / "wide.json"))
    assert checkpoint.load(result["out"]).config["hidden_size"] == 16
    alike = convert(str(source), str(tmp_path / "c"), base_channels=16)
    assert equal(checkpoint.load(result["out"]), checkpoint.load(alike["out"]))


def test_a_model_of_pictures_from_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    vae = CausalVAE(hidden_size=32, hidden_size_mult=[1, 1, 2, 2], num_res_blocks=1, **two_dimensional(levels=4))
    state = {  # without the level of names that its attention has
        key.replace(".conv.", ".") if "attn_1" in key else key: value[:, :, 0] if value.ndim == 5 else value
        for key, value in vae.state_dict().items()
    }
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "vae.safetensors")
    given = [f"vae={tmp_path}/vae.safetensors", "inflate=tail", "model/net@net=causalvae_v12"]
    code, error = run(capfd, monkeypatch, *given, f"out={tmp_path}/out")
    assert code == 0, error
    inflated = checkpoint.load(tmp_path / "out")
    assert (inflated.stride, inflated.config["hidden_size_mult"]) == ((4, 8, 8), [1, 1, 2, 2])
    x = torch.randn(1, 3, 1, 32, 32)
    with torch.no_grad():
        assert (inflated.encode(x).moments - vae.eval().encode(x).moments).abs().max() < 1e-5


def two_dimensional(levels: int) -> dict[str, Any]:
    """Return a layout without time."""
    return {
        "encoder_conv_in": "Conv2d",
        "encoder_conv_out": "Conv2d",
        "decoder_conv_in": "Conv2d",
        "decoder_conv_out": "Conv2d",
        "q_conv": "Conv2d",
        "encoder_mid_resnet": "ResnetBlock2D",
        "decoder_mid_resnet": "ResnetBlock2D",
        "encoder_attention": "AttnBlock3DFix",
        "decoder_attention": "AttnBlock3DFix",
        "encoder_resnet_blocks": ["ResnetBlock2D"] * levels,
        "decoder_resnet_blocks": ["ResnetBlock2D"] * levels,
        "encoder_spatial_downsample": [*["Downsample"] * (levels - 1), ""],
        "decoder_spatial_upsample": ["", *["Upsample"] * (levels - 1)],
        "encoder_temporal_downsample": [""] * levels,
        "decoder_temporal_upsample": [""] * levels,
    }


# ---------------------------------------------------------------------------------------------------- refusals
BAD = [
    (["vae={here}/vae"], 2, "out: a value is required"),
    (["vae={here}/vea", "out={here}/o"], 2, "vae: {here}/vea does not exist; did you mean {here}/vae"),
    (["vae={here}/vae", "out={here}/o", "too=ckpt"], 2, "too: unknown key; did you mean to"),
    (["vae={here}/vae", "out={here}/o", "to=cpkt"], 2, "to: 'cpkt'"),
    (["vae={here}/vae", "out={here}/o", "weights=all"], 2, "weights: 'all'"),
    (["vae={here}/vae", "out={here}/vae"], 2, "give a directory without a model"),
    (["vae={here}/vae", "out={here}/o", "latent_dim=0"], 2, "latent_dim=0: use 1 or more"),
    (["vae={here}/vae", "out={here}/o", "latent_dim=2"], 2, "a model can only grow"),
    (["vae={here}/vae", "out={here}/o", "+net.base_chanels=16"], 2, "did you mean base_channels"),
    (["vae={here}/vae", "out={here}/o", "+net.base_channels=wide"], 2, "net.base_channels: 'wide'"),
    (["vae={here}/vae", "out={here}/o", "model/net@net=causalvae_v12"], 2, "give a config of WFVAE"),
    (["vae={here}/vae", "out={here}/o", "config={here}/vae/diffusion_pytorch_model.safetensors"], 2, "as JSON"),
    (["vae={here}/vae", "out={here}/o", "encoder={here}/wide"], 2, "base_channels is 16 there and 8 in vae"),
    (["vae={here}/vae", "out={here}/o", "inflate=middle"], 2, "inflate: 'middle'"),
    (["vae={here}/vae", "out={here}/o", "inflate=tail"], 2, "a layout is required"),
    (["vae={here}/vae", "out={here}/o", "inflate=tail", "latent_dim=8"], 2, "grow in a second step"),
    (["vae={here}/vae", "out={here}/o", "inflate=tail", "model/net@net=causalvae_v12"], 3, "no 2D autoencoder"),
    (["vae={here}/bomb.ckpt", "out={here}/o"], 3, "holds more than tensors"),
    (["vae={here}/vae", "encoder={here}/bomb.ckpt", "out={here}/o"], 3, "holds more than tensors"),
    (["vae={here}/bomb.ckpt", "inflate=tail", "model/net@net=causalvae_v12", "out={here}/o"], 3, "more than tensors"),
    (["vae={here}/plain.ckpt", "out={here}/o", "to=ckpt"], 3, "not a whole checkpoint"),
    (["vae={here}/vae", "config={here}/plain.ckpt", "out={here}/o"], 2, "not readable as JSON"),
]


class Bomb:
    """A pickle that runs a command."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.flag),)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    checkpoint.save_official(make(0), path / "vae")
    checkpoint.save_official(make(0, base_channels=16), path / "wide")
    torch.save({"state_dict": {"gen_model": Bomb(path / "executed")}}, path / "bomb.ckpt")
    (path / "plain.ckpt").write_bytes(pickle.dumps(Bomb(path / "executed")))
    return path


@pytest.mark.parametrize(("arguments", "code", "expected"), BAD, ids=[expected for _, _, expected in BAD])
def test_refusals(
    arguments: list[str],
    code: int,
    expected: str,
    here: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(here)
    found, error = run(capfd, monkeypatch, *(argument.format(here=here) for argument in arguments))
    assert expected.format(here=here) in error
    assert found == code
    assert len(error.splitlines()) <= 3
    assert "Traceback" not in error
    assert not (here / "executed").exists()
    assert not list((here / "o").glob("*"))


def test_foreign_models_neither_grow_nor_keep_statistics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 2, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(**sizes, **blocks).save_pretrained(tmp_path / "a")
    with pytest.raises(ConfigError, match="a AutoencoderKL cannot grow: give a WFVAE or CausalVAE"):
        convert(str(tmp_path / "a"), str(tmp_path / "b"), latent_dim=8)
    with pytest.raises(CheckpointError, match="norm_num_groups 2"):
        convert(str(tmp_path / "a"), str(tmp_path / "b"), inflate="tail", net={"norm_type": "groupnorm"})
    convert(str(tmp_path / "a"), str(tmp_path / "c"))
    path = convert(str(tmp_path / "a"), str(tmp_path / "d"), to="ckpt")["out"]
    assert equal(checkpoint.load(path), checkpoint.load(tmp_path / "a"))
    first, second = (load_file(tmp_path / name / checkpoint.SAFETENSORS) for name in "ac")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_pipeline_of_diffusers_is_inflated(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    net = diffusers.AutoencoderKL(block_out_channels=(32,) * 4, layers_per_block=1, scaling_factor=0.36, **blocks)
    net.eval().save_pretrained(tmp_path / "pipeline" / "vae")
    layout = {**two_dimensional(levels=4), "encoder_conv_out": "CausalConv3d", "decoder_conv_in": "CausalConv3d"}
    vae = checkpoint.load(
        convert(str(tmp_path / "pipeline"), str(tmp_path / "out"), inflate="average", net=layout)["out"]
    )
    assert (vae.config["scale"], vae.stride) == ([0.36] * 4, (1, 8, 8))
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert (vae.encode(x[:, :, None]).mean[:, :, 0] - net.encode(x).latent_dist.mean).abs().max() < 1e-5


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['praxino-convert', '--help']\nfrom praxino.cli import convert\n"
    code += "try: convert()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "inflate=tail|average" in done.stdout
