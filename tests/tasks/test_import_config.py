"""Configurations of other systems become experiments that compose; every field is used, or named with the reason."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from praxino import cli
from praxino.config import conf_dir, instantiate, register_resolvers
from praxino.errors import ConfigError
from praxino.models.wfvae import WFVAE
from praxino.tasks.import_config import DIT, VAE, flatten, import_config

SECTIONS: dict[str, Any] = {
    "seed": 42,
    "lvm": {"n_latent": 1500},
    "transcode": {"bs": 32, "target_size": [512, 300]},
    "vae": {
        "size_multiplier": 2,
        "sample": {"n_sample": 8},
        "reconstruct": {"n_sample": 7, "video_file": "a: b.mp4", "generation_path": "generated"},
        "train": {
            "ckpt_dir": "vae_run",
            "lr": 5e-5,
            "ckpt_interval": 22000,
            "max_ckpts": 9,
            "data_dir_train": "videos",
            "data_dir_val": "held out",
            "bs": 128,
            "metrics_path": "loss.txt",
            "clip_norm": 5,
            "kl_alpha": 0.8,
        },
    },
    "dt": {
        **{"n_layers": 3, "d_l": 64, "d_mlp": 96, "n_q": 5, "d_qk": 16, "d_dv": 12, "l_x": 2, "l_y": 5},
        "sample": {"n_sample": 5, "n_steps": 100, "generation_path": "samples"},
        "train": {
            "ckpt_dir": "dit_run",
            "lr": 3e-5,
            "ckpt_interval": 31000,
            "data_dir_train": "latents",
            "data_dir_val": "val_latents",
            "bs": 64,
            "metrics_path": "dit.txt",
            "vae_checkpoint": "vae.pkl",
            "clip_norm": 10,
        },
    },
    "checkpoints": {"ckpt_dir": "c", "ckpt_name": "n", "ckpt_interval": 5, "max_ckpts": 3},
}


def imported(content: Any, folder: Path) -> list[Path]:
    source = folder / "seed.json"
    source.write_text(json.dumps(content))
    return [Path(path) for path in import_config(str(source), str(folder / "experiment" / "mine.yaml"))["out"]]


def composed(path: Path, *overrides: str) -> Any:
    register_resolvers()
    search = f"hydra.searchpath=[file://{path.parent.parent}]"
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        return compose("train", overrides=[f"experiment={path.stem}", search, *overrides])


def test_every_field_is_used_or_named(tmp_path: Path) -> None:
    fields = dict(flatten(SECTIONS))
    assert fields.keys() == VAE.keys() | DIT.keys()
    vae, dit = (path.read_text() for path in imported(SECTIONS, tmp_path))
    for name, goal in (VAE | DIT).items():
        text = dit if name in DIT and name not in VAE else vae
        if goal.startswith("="):
            line = next(line for line in text.splitlines() if line.startswith(f"# not used: {name}, "))
            assert json.dumps(fields[name]) in line
        else:
            found = yaml.safe_load(text)
            for key in goal.split("."):
                found = found[key]


def test_the_values_of_both_models(tmp_path: Path) -> None:
    vae, dit = (composed(path) for path in imported(SECTIONS, tmp_path))
    assert (vae.seed, vae.frames, vae.size, vae.batch, vae.out) == (42, 1, [320, 512], 128, "vae_run")
    assert (vae.checkpoint.every, vae.checkpoint.keep, vae.model.clip) == (22000, 9, 5)
    assert (vae.model.optimizer.lr, vae.data.root, vae.data.val_root) == (5e-5, "videos", "held out")
    assert vae.model.loss.kl == pytest.approx(0.8 * 38 * 40 / (3 * 320 * 512), rel=1e-3)  # 38 * 40 >= 1500 > 37 * 40
    net = instantiate(vae.model.net)
    assert net.stride == (1, 64, 64)
    assert net.encode(torch.zeros(1, 3, 2, 64, 128)).mean.shape == (1, 38, 2, 1, 2)

    assert (dit.frames, list(dit.model.context.frames), dit.model.context.probability) == (7, [2], 1.0)
    assert (dit.batch, dit.out, dit.model.clip, dit.model.optimizer.lr) == (64, "dit_run", 10, 3e-5)
    assert dit.model.loss.prediction == "eps"
    z = torch.zeros(1, 38, 7, 5, 8)
    assert instantiate(dit.model.net)(z, torch.zeros(1)).shape == z.shape
    attention = dit.model.net
    assert (attention.num_heads, attention.num_kv_heads, attention.qk_dim, attention.v_dim) == (5, 1, 16, 12)
    assert (attention.width, attention.depth, attention.mlp_width, attention.patch) == (64, 3, 96, [1, 5, 8])


def test_the_imported_frame_vae_trains_a_step(tmp_path: Path) -> None:
    small = {"lvm": {"n_latent": 8}, "transcode": {"target_size": [64, 64]}, "vae": {"size_multiplier": 1}}
    (path,) = imported(small, tmp_path)
    module = instantiate(composed(path, "data.root=videos").model)
    module.manual_backward = lambda loss: loss.backward()
    values = module.learn({"video": torch.randint(256, (2, 1, 64, 64, 3), dtype=torch.uint8)}, ("",), 1.0)
    assert values["loss"].isfinite()
    assert all(p.grad is not None for p in module.net.parameters())


@pytest.mark.parametrize("name", ["causalvae_v10", "causalvae_v12", "wfvae_c4_ln", "wfvae_888_c4"])
def test_official_configs_build_the_same_network(name: str, tmp_path: Path, shared: Callable[[str], Path]) -> None:
    content = json.loads(shared(f"golden/{name}/hf/config.json").read_text())
    (path,) = imported(content, tmp_path)
    net = instantiate(composed(path, "data.root=videos").model.net)
    for key, value in content.items():
        if not key.startswith("_"):
            assert net.config[key] == value
        else:
            assert f"# not used: {key} = " in path.read_text()


def test_what_an_official_config_leaves_out_is_as_its_class_has_it(tmp_path: Path) -> None:
    (path,) = imported({"latent_dim": 4, "base_channels": 32}, tmp_path)  # told by its keys
    with torch.device("meta"):
        net = instantiate(composed(path, "data.root=videos").model.net)
        assert net.config == WFVAE(latent_dim=4, base_channels=32).config
    assert net.config["norm_type"] == "groupnorm"
    assert "so as the class has them" in path.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"vae": {"train": {"kl_alhpa": 1}}}, "did you mean vae.train.kl_alpha"),
        ({"dt": {"n_layer": 3}}, "dt.n_layer: unknown field; did you mean dt.n_layers"),
        ({"dt": {"l_x": 0}}, "dt.l_x: 0 is not a positive number"),
        ({"vae": {"train": {"lr": "fast"}}}, "model.optimizer.lr"),
        ({"vae": {}, "transcode": {"target_size": 512}}, "is not .width, height."),
        ({"lvm": {"n_latent": 3}}, "a section vae or dt is required"),
        ({"_class_name": "WFVAEModell"}, "did you mean WFVAEModel"),
        ({"_class_name": "WFVAEModel", "base_chanels": 8}, "did you mean base_channels"),
        ({"_class_name": "WFVAEModel", "base_channels": "many"}, "model.net.base_channels"),
        ({"name": "bert"}, "neither WFVAEModel nor CausalVAEModel"),
        ([1], "no JSON object"),
    ],
)
def test_what_cannot_be_imported(content: Any, message: str, tmp_path: Path) -> None:
    register_resolvers()
    with pytest.raises(ConfigError, match=message):
        imported(content, tmp_path)
    assert not (tmp_path / "experiment").exists()


def test_the_file_may_stand_alone_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "it's a seed.json"
    source.write_text(json.dumps(SECTIONS))
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["praxino-import-config", str(source), f"out={tmp_path}/experiment/mine.yaml"])
    cli.import_config()
    assert (tmp_path / "experiment" / "mine_dit.yaml").is_file()
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["praxino-import-config", str(tmp_path / "none.json"), "out=mine.yaml"])
    with pytest.raises(SystemExit) as caught:
        cli.import_config()
    assert caught.value.code == 2
    assert "none.json does not exist" in capfd.readouterr().err
