"""The pipeline: the commands that it types, its gate, and the whole chain on a toy."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from praxino import video
from praxino.config import check_call, conf_dir, register_resolvers
from praxino.errors import ConfigError, DataError
from praxino.tasks.pipeline import check_gate, pipeline, plan, resume_training
from praxino.tasks.stages import Stage


def composed(root: str, *overrides: str) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        return compose(root, overrides=list(overrides))


def planned(out: Path, *overrides: str) -> dict[str, Stage]:
    arguments = check_call(pipeline, composed("pipeline", f"out={out}", *overrides))
    data, frames, size = (arguments.pop(key) for key in ("data", "frames", "size"))
    return {stage.name: stage for stage in plan(out, data, arguments, frames, size)}


@pytest.mark.parametrize("experiment", ["demo", "demo_own"])
def test_every_stage_is_a_command_that_composes(experiment: str, tmp_path: Path) -> None:
    own = [f"data.root={tmp_path}/it's mine"] if experiment == "demo_own" else []
    own = [word.replace("=", '="', 1) + '"' for word in own]
    stages = planned(tmp_path, f"experiment={experiment}", *own)
    names = ["vae", "reconstruct", "encode", "dit", "sample", "predict", "evaluate"]
    assert list(stages) == (names if own else ["videos", *names])
    for stage in stages.values():
        cfg = composed(stage.command.replace("-", "_"), *stage.words(tmp_path))
        assert cfg.out == str(tmp_path / stage.name)
        assert set(stage.inputs) <= set(stages)
    train = composed("train", *stages["vae"].words(tmp_path))
    assert train.data.root == (f"{tmp_path}/it's mine" if own else f"{tmp_path}/videos/train")
    assert (train.frames, train.size) == (17, 64 if own else 32)
    assert stages["dit"].inputs == ("encode",)


def test_every_stage_is_told_of_the_videos_that_it_reads(tmp_path: Path) -> None:
    train, val = str(tmp_path / "train"), str(tmp_path / "val")
    both = planned(tmp_path / "out", "experiment=demo_own", f"data.root={train}", f"data.val_root={val}")
    one = planned(tmp_path / "out", "experiment=demo_own", f"data.root={train}")
    reads = {"vae": (train, val), "reconstruct": (val,), "encode": (train,), "dit": (), "sample": ()}
    assert {name: stage.reads for name, stage in both.items()} == {**reads, "predict": (val,), "evaluate": (val,)}
    assert {stage.reads for stage in one.values()} == {(train,), ()}


def test_settings_of_the_user_win_over_frames_and_size_and_wiring_over_both(tmp_path: Path) -> None:
    stages = planned(tmp_path, "experiment=demo", "+encode.frames=null", "+vae.data.workers=3", "+sample.ckpt=other")
    assert "frames=null" in stages["encode"].words(tmp_path)
    assert stages["vae"].settings["data"]["workers"] == 3
    assert stages["vae"].settings["data"]["root"] == f"{tmp_path}/videos/train"
    assert stages["sample"].settings["ckpt"] == f"{tmp_path}/dit"


def test_the_gate_reads_the_last_validation(tmp_path: Path) -> None:
    rows = [{"val/psnr": 30.0}, {"val/psnr": 20.5}, {"train/loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_gate(tmp_path, 20.0)
    with pytest.raises(DataError, match=r"at 20\.50 dB, below gate=21"):
        check_gate(tmp_path, 21)
    with pytest.raises(DataError, match="has no val/psnr"):
        check_gate(tmp_path / "none", 21)


def test_a_training_goes_on_from_its_checkpoint_only(tmp_path: Path) -> None:
    assert resume_training(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.ckpt").touch()
    assert resume_training(tmp_path) == ["ckpt=last"]


def test_a_training_is_not_begun_with_the_settings_of_a_chain(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "from praxino.cli import train; train()"]
    done = subprocess.run([*program, "experiment=demo", f"out={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "praxino-pipeline" in done.stderr


def test_held_out_videos_without_others_are_refused(tmp_path: Path) -> None:
    cfg = composed("pipeline", "experiment=demo", f"out={tmp_path}", "data.val_root=x")
    with pytest.raises(ConfigError, match=r"without data\.root"):
        pipeline(**check_call(pipeline, cfg))


TOY: dict[str, Any] = {
    "frames": 5,
    "size": 16,
    "gate": 3,
    "videos": {"videos": 8, "val_videos": 12},  # fewer leave the samples no place between real videos and noise
    "vae": {
        "batch": 2,
        "trainer": {"max_steps": 4, "val_check_interval": 4, "accelerator": "cpu"},
        "model": {"net": {"base_channels": 8, "latent_dim": 4}},
    },
    "encode": {"batch": 4, "workers": 0, "device": "cpu"},
    "dit": {
        "batch": 2,
        "trainer": {"max_steps": 4, "val_check_interval": 4, "accelerator": "cpu"},
        "model": {"net": {"width": 32, "depth": 1, "num_heads": 2, "mlp_width": 64}, "context": {"frames": [1]}},
    },
    "sample": {"n": 6, "steps": 2, "device": "cpu"},
    "predict": {"context": 1, "limit": 2, "samples": 2, "steps": 2, "device": "cpu"},
    "evaluate": {"workers": 0},
}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # ten processes
def test_the_whole_chain_on_a_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cfg = composed("pipeline", "experiment=demo", f"out={tmp_path}/out")
    cfg = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(cfg)), TOY)
    arguments = check_call(pipeline, cfg)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="gate"):
        pipeline(**{**arguments, "gate": 90.0})
    assert not (tmp_path / "out" / "encode").exists()
    summary = pipeline(**arguments)
    out = tmp_path / "out"
    assert {figure["name"] for figure in summary["figures"]} == {"Reconstruction", "Prediction", "Samples", "Time"}
    stamps = {path.stem: path.stat().st_mtime_ns for path in (out / "stages").glob("*.json")}
    assert len(stamps) == 8
    assert video.probe(out / "sample" / "00000.mp4").frames == 5
    page = (out / "gallery" / "index.html").read_text()
    assert all(f"praxino-{name} " in page for name in ("make-data", "train", "encode", "sample", "predict", "evaluate"))

    pipeline(**arguments)  # nothing is done again
    assert {path.stem: path.stat().st_mtime_ns for path in (out / "stages").glob("*.json")} == stamps
    pipeline(**{**arguments, "sample": {**arguments["sample"], "steps": 1}})
    changed = {path.stem for path in (out / "stages").glob("*.json") if path.stat().st_mtime_ns != stamps[path.stem]}
    assert changed == {"sample", "evaluate"}
