"""What `load` takes, what it refuses and how it says so; official files written back."""

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import praxino
from praxino import checkpoint
from praxino.errors import CheckpointError, ConfigError
from praxino.models.wfvae import WFVAE

TINY = {
    "latent_dim": 2,
    "base_channels": 8,
    "encoder_num_resblocks": 1,
    "encoder_energy_flow_hidden_size": 4,
    "decoder_num_resblocks": 1,
    "decoder_energy_flow_hidden_size": 4,
    "norm_type": "layernorm",
    "t_interpolation": "trilinear",
}


def make(seed: int) -> WFVAE:
    torch.manual_seed(seed)
    return WFVAE(**TINY)


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


def content(raw: WFVAE, ema: WFVAE | None = None, **header) -> dict:
    """Return what a training writes."""
    return {
        "epoch": 0,
        "global_step": 3,
        "state_dict": {
            **{f"net.{key}": value for key, value in raw.state_dict().items()},
            "discriminator.weight": torch.zeros(3),
        },
        **({} if ema is None else {"ema": {"decay": 0.9, "updates": 3, "weights": ema.state_dict()}}),
        "praxino": {**checkpoint.describe(raw), "config": {"seed": 0}, "step": 3, **header},
    }


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "run" / "checkpoints" / "step-00000003.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(content(make(0), make(1)), path)
    return path


@pytest.fixture
def official(tmp_path) -> Path:
    return checkpoint.save_official(make(0), tmp_path / "official")


def message(path, **kwargs) -> str:
    """Return the message of the refusal: short, and naming the path."""
    with pytest.raises(CheckpointError) as info:
        checkpoint.load(path, **kwargs)
    text = str(info.value)
    assert len(text.splitlines()) == 1
    assert str(path) in text
    return text


def test_praxino_checkpoint(saved):
    assert equal(checkpoint.load(saved), make(1))
    assert equal(checkpoint.load(str(saved), weights="raw"), make(0))
    vae = praxino.load(saved, dtype=torch.float64)
    assert not vae.training
    assert vae.config == make(0).config
    assert next(vae.parameters()).dtype == torch.float64
    assert all(p.requires_grad for p in vae.parameters())


def test_without_an_average_the_raw_weights_are_taken(saved, caplog):
    torch.save(content(make(2)), saved)
    with caplog.at_level(logging.INFO, "praxino.checkpoint"):
        assert equal(checkpoint.load(saved), make(2))
    assert "no moving average" in caplog.text


def test_the_copy_of_a_vae_is_not_said_to_lack_an_average(tmp_path, caplog):
    checkpoint.save_vae(make(2), tmp_path / "vae.ckpt")
    with caplog.at_level(logging.INFO, "praxino.checkpoint"):
        assert equal(checkpoint.load(tmp_path / "vae.ckpt"), make(2))
    assert not caplog.text


def test_statistics_come_back(saved):
    vae = make(0)
    vae.set_statistics([0.5, 1.0], [2.0, 3.0])
    torch.save(content(vae), saved)
    again = checkpoint.load(saved)
    assert again.statistics == {"mean": [0.5, 1.0], "std": [2.0, 3.0]}
    z = torch.randn(1, 2, 1, 2, 2)
    assert torch.equal(again.normalize(z), vae.normalize(z))


def test_the_model_does_not_hang_on_its_file(saved):
    vae = checkpoint.load(saved)
    saved.write_bytes(bytes(saved.stat().st_size))
    assert equal(vae, make(1))


def test_run_directory_takes_the_newest_sound_checkpoint(saved, caplog):
    run = saved.parents[1]
    newer, newest = (saved.with_name(f"step-{step:08d}.ckpt") for step in (12, 100000012))
    torch.save(content(make(3)), newer)
    damaged = bytearray(newer.read_bytes())
    middle = damaged.index(make(3).decoder.conv_out.weight.detach().numpy().tobytes()[:64])
    damaged[middle] ^= 1  # a single bit in a weight: torch.load does not notice
    newest.write_bytes(damaged)
    torch.load(newest, weights_only=True)
    (saved.with_name("step-00000099.ckpt")).write_bytes(newer.read_bytes()[:5000])
    (saved.with_name("step-00000098.ckpt")).touch()
    (saved.with_name(".step-00000200.ckpt.tmp")).touch()
    assert checkpoint.find_last(run) == newer
    assert equal(checkpoint.load(run), make(3))
    rejections = [record.getMessage() for record in caplog.records][:3]
    assert [name in text for name, text in zip(("100000012", "00000099", "00000098"), rejections, strict=True)] == [
        True
    ] * 3
    assert all(len(text.splitlines()) == 1 for text in rejections)
    for path in (newer, saved):
        path.unlink()
    assert checkpoint.find_last(run) is None
    with pytest.raises(CheckpointError, match=r"no sound step-\*.ckpt"):
        checkpoint.load(run)


def test_damaged_file_is_refused(saved):
    data = bytearray(saved.read_bytes())
    data[data.index(make(1).decoder.conv_out.weight.detach().numpy().tobytes()[:64])] ^= 1
    saved.write_bytes(data)
    assert "damaged (checksum of" in message(saved)
    saved.write_bytes(data[:-2000])
    assert "not a whole checkpoint" in message(saved)


def test_missing_path_and_foreign_directory(tmp_path):
    assert "no such file or directory" in message(tmp_path / "nothing")
    assert "neither a run" in message(tmp_path)
    (tmp_path / "some.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"some.ckpt: not a whole checkpoint"):
        checkpoint.load(tmp_path)
    with pytest.raises(ConfigError, match="use ema or raw"):
        checkpoint.load(tmp_path, weights="best")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"kind": "dit"}, "holds the dit"),
        ({"model": {"class": "os.system", "config": {}}}, "holds the vae os.system: give a video autoencoder"),
        ({"model": {"class": "praxino.models.wfvae.WFVAE", "config": TINY | {"latent_dim": 0}}}, "latent_dim=0"),
        ({"model": {"class": "praxino.models.wfvae.WFVAE", "config": {"latent_dims": 2}}}, "did you mean latent_dim?"),
        (
            {"model": {"class": "praxino.models.wfvae.WFVAE", "config": TINY | {"latent_dim": "4"}}},
            "does not fit WFVAE",
        ),
        ({"model": None}, "its description is not readable"),
    ],
)
def test_descriptions_that_are_refused(saved, header, expected):
    torch.save(content(make(0), **header), saved)
    assert expected in message(saved)


def test_weights_must_fit_exactly(saved):
    state = content(make(0))
    weights = state["state_dict"]
    del weights["net.encoder.conv_out.conv.bias"]
    weights["net.encoder.surplus"] = torch.zeros(1)
    weights["net.decoder.conv_out.bias"] = torch.zeros(3)
    torch.save(state, saved)
    text = message(saved)
    assert "1 missing (encoder.conv_out.conv.bias)" in text
    assert "1 unexpected (encoder.surplus)" in text
    assert "1 of another shape (decoder.conv_out.bias (3,), not (24,))" in text


def test_many_wrong_keys_are_counted(official, tmp_path):
    state = load_file(official / checkpoint.SAFETENSORS)
    save_file({f"vae.{key}": value for key, value in state.items()}, official / checkpoint.SAFETENSORS)
    with pytest.raises(CheckpointError) as info:
        checkpoint.load(official)
    assert f"{len(state)} unexpected (" in str(info.value)
    assert len(str(info.value)) < 1000


class Bomb:
    """A pickle that runs a command."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


@pytest.mark.parametrize("variable", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_code_in_a_checkpoint_never_runs(tmp_path, variable, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, "1")
    flag = tmp_path / "executed"
    torch.save({"praxino": Bomb(flag), "state_dict": {}}, tmp_path / "zip.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Bomb(flag)))
    torch.save({"state_dict": Bomb(flag)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert "holds more than tensors" in message(tmp_path / "zip.ckpt")
    for name in ("plain.ckpt", "old.ckpt"):
        assert "not a whole checkpoint" in message(tmp_path / name)
    assert not flag.exists()
    torch.load(tmp_path / "zip.ckpt", weights_only=False)
    assert flag.exists()  # it would have


def test_official_directory(official):
    assert equal(checkpoint.load(official), make(0))
    assert equal(checkpoint.load(official / checkpoint.SAFETENSORS), make(0))
    (official / "stray.ckpt").write_text("never read")
    assert equal(checkpoint.load(official), make(0))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.update(_class_name="AutoencoderTiny"), "holds a AutoencoderTiny: give one of WFVAEModel"),
        (lambda c: c.update(base_chanels=4), "config key 'base_chanels' is unknown: did you mean base_channels?"),
        (lambda c: c.update(base_channels=16), "of another shape (encoder.down1.0.weight"),
    ],
)
def test_official_configs_that_are_refused(official, change, expected):
    path = official / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as info:
        checkpoint.load(official)
    assert expected in str(info.value)


def test_official_config_that_cannot_be_read(official):
    path = official / "config.json"
    for text, expected in (("{", "not readable as JSON"), ("[]", "holds no JSON object")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=expected):
            checkpoint.load(official)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"put the official config.json beside the weights"):
        checkpoint.load(official)


def test_safetensors_that_cannot_be_read(official):
    (official / checkpoint.SAFETENSORS).write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="not readable as safetensors"):
        checkpoint.load(official)


def test_official_files_are_written_back_identically(official, tmp_path):
    config = json.loads((official / "config.json").read_text())
    config |= {"_diffusers_version": "0.42.1", "_name_or_path": "somewhere", "shift": [0, 0.5]}
    (official / "config.json").write_text(json.dumps(config))
    state = load_file(official / checkpoint.SAFETENSORS)
    save_file({key: value.bfloat16() for key, value in state.items()}, official / checkpoint.SAFETENSORS)
    vae = checkpoint.load(official)
    assert next(vae.parameters()).dtype == torch.bfloat16  # as stored
    written = checkpoint.save_official(vae, tmp_path / "again")
    assert json.loads((written / "config.json").read_text()) == config
    a, b = (load_file(d / checkpoint.SAFETENSORS) for d in (official, written))
    assert a.keys() == b.keys()
    assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)
    assert sorted(p.name for p in written.iterdir()) == ["config.json", checkpoint.SAFETENSORS]


def test_official_origin_survives_a_praxino_checkpoint(official, tmp_path):
    config = json.loads((official / "config.json").read_text()) | {"_diffusers_version": "0.42.1"}
    (official / "config.json").write_text(json.dumps(config))
    torch.save(content(checkpoint.load(official)), tmp_path / "a.ckpt")
    written = checkpoint.save_official(checkpoint.load(tmp_path / "a.ckpt"), tmp_path / "again")
    assert json.loads((written / "config.json").read_text()) == config


def test_any_layout_is_written(tmp_path):
    vae = make(0).channels_last()
    assert equal(checkpoint.load(checkpoint.save_official(vae, tmp_path)), make(0))
    assert equal(checkpoint.load(checkpoint.save_official_ckpt(vae, tmp_path / "a" / "a.ckpt", ema=vae)), make(0))


def test_official_ckpt(tmp_path, caplog):
    path = checkpoint.save_official_ckpt(make(0), tmp_path / "checkpoint-7.ckpt", ema=make(1), step=7)
    assert equal(checkpoint.load(path), make(1))
    assert equal(checkpoint.load(path, weights="raw"), make(0))
    checkpoint.save_official_ckpt(make(2), tmp_path / "checkpoint-12.ckpt")
    assert equal(checkpoint.load(tmp_path), make(2))  # no average in it; the highest step
    assert "2 checkpoints, the one of the highest step is taken: checkpoint-12.ckpt" in caplog.text


def test_only_all_fixed_filters_may_be_missing(tmp_path):
    path = checkpoint.save_official_ckpt(make(0), tmp_path / "checkpoint-7.ckpt", ema=make(1))
    state = torch.load(path, weights_only=True)
    filters = make(0).fixed_filters()
    some = next(iter(filters))
    state["ema_state_dict"] |= {f"module.{some}": filters[some]}
    torch.save(state, path)
    assert f"{len(filters) - 1} missing (encoder.wavelet" in message(path)
    state["ema_state_dict"] = {"module.other": torch.zeros(1)}
    torch.save(state, path)
    assert "unexpected (other)" in message(path)


def test_other_filters_than_haar_are_refused(official):
    state = load_file(official / checkpoint.SAFETENSORS)
    state["encoder.wavelet_transform_l1.ad"] += 0.1
    save_file(state, official / checkpoint.SAFETENSORS)
    with pytest.raises(CheckpointError, match=r"wavelet_transform_l1.ad is not the Haar filter"):
        checkpoint.load(official)


def test_a_checkpoint_without_weights(official):
    path = official / "a.ckpt"
    torch.save({"epoch": 3, "state_dict": {}}, path)
    assert "no weights" in message(path)
    torch.save([1, 2], path)
    assert "holds a list, not a checkpoint" in message(path)


def test_written_files_are_whole_or_not_there(official, monkeypatch):
    before = (official / checkpoint.SAFETENSORS).read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("praxino.official.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save_official(make(5), official)
    assert (official / checkpoint.SAFETENSORS).read_bytes() == before
    assert not [p for p in official.iterdir() if p.name.startswith(".")]


def test_rebuilt_without_the_training_code(saved):
    """A checkpoint is enough: neither Lightning nor Hydra nor the data code is imported to use it."""
    code = (
        "import sys, praxino; praxino.load(sys.argv[1]); "
        "print([m for m in ('lightning', 'hydra', 'av', 'praxino.lit') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
