"""Every configuration composes, and fits the constructors it configures."""

from pathlib import Path
from typing import Annotated

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from praxino.config import check, check_call, conf_dir, locate, redacted, register_resolvers, type_error
from praxino.errors import ConfigError

CONF = Path(conf_dir())
PIPELINES = ("demo", "demo_own")  # of praxino-pipeline: tests/tasks/test_pipeline.py
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if path.stem not in PIPELINES)
CHOICES = [
    f"{group}={path.stem}"
    for group in ("data", "trainer", "logger", "debug", "model/net", "model/diffusion", "model/optimizer")
    for path in sorted((CONF / group).glob("*.yaml"))
]


def composed(*overrides: str, root: str = "train") -> DictConfig:
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        return compose(root, overrides=["out=runs/test", *overrides])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_fit_their_constructors(experiment: str) -> None:
    cfg = composed(f"experiment={experiment}", "data.root=videos")
    if "channels" in cfg.model.net:  # of the latents, which the VAE tells
        cfg.model.net.channels = 8
    check(cfg)


@pytest.mark.parametrize("choice", CHOICES)
def test_choices_fit_their_constructors(choice: str) -> None:
    group, _, name = choice.partition("=")
    required = ["model.net.path=vae"] if choice == "model/net=foreign" else []
    if group in ("model/diffusion", "model/optimizer"):
        choice = f"{group}{'@model.loss' if 'diffusion' in group else ''}={name}"
        required = ["model=dit", "model.net.channels=8"]
    if group == "model/net" and name.startswith(("dit_", "unet3d")):
        required = ["model=dit", "model.net.channels=8"]
    check(composed(choice, "data.root=videos", *required))


def test_every_yaml_is_reached() -> None:
    groups = {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")}
    known = {".", "callbacks", "data", "debug", "experiment", "hydra/help", "hydra/job_logging", "logger", "model"}
    parts = {f"model/{part}" for part in ("adversary", "diffusion", "lpips", "net", "optimizer", "val_lpips")}
    assert groups <= known | parts | {"trainer", "launcher", "local", "protocol"}


def test_all_problems_are_told_at_once() -> None:
    cfg = composed("data.root=videos", "frames=x", "+model.loss.l3=1", "+trainer.max_stepps=1", "+data.rot=1")
    with pytest.raises(ConfigError) as caught:
        check(cfg)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 3
    assert "more:" in lines[-1]


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "numpy.load",
        "pathlib.Path",
        "subprocess.Popen",
        "praxino.config.os.system",
        "praxino.config.os",
        "praxino.nothing.Here",
        "praxino.cli.Path",
        "urllib.request.urlopen",
        "praxino.tasks.rows.json.dumps",
        "torch.optim.Optimizer",
        "lightning.pytorch.callbacks.LambdaCallback",
    ],
)
def test_foreign_targets_are_refused(target: str) -> None:
    with pytest.raises(ConfigError):
        locate(target)


@pytest.mark.parametrize(
    ("hint", "value", "fits"),
    [
        (int, 3, True),
        (int, "x", False),
        (int, 3.5, False),
        (int, True, False),
        (float, 3, True),
        (int | None, None, True),
        (int | list[int], [3, 4], True),
        (int | list[int], ["a"], False),
        (str, None, False),
        (Annotated[int, Field(ge=1)], 1, True),
        (Annotated[int, Field(ge=1)], 0, False),
    ],
)
def test_types(hint: object, value: object, fits: bool) -> None:
    assert (type_error(hint, value) is None) == fits


def test_ranges_in_annotations_are_checked() -> None:
    def task(frames: Annotated[int, Field(ge=1)] = 17) -> None: ...

    assert check_call(task, OmegaConf.create({"frames": 1})) == {"frames": 1}
    with pytest.raises(ConfigError, match="frames: 0: input should be greater than or equal to 1"):
        check_call(task, OmegaConf.create({"frames": 0}))


def test_secrets_are_hidden() -> None:
    environment = {"WANDB_API_KEY": "0123456789abcdef", "HOME": "/root/home"}
    tree = {"logger": {"api_key": "abc", "name": "x0123456789abcdef"}, "paths": ["/root/home", 3]}
    assert redacted(tree, environment) == {"logger": {"api_key": "***", "name": "***"}, "paths": ["/root/home", 3]}
    overrides = ["+logger.wandb.api_key=abc", "seed=0", "data.root=/a=b"]
    assert redacted(overrides, environment) == ["+logger.wandb.api_key=***", "seed=0", "data.root=/a=b"]


def test_run_ids_agree_within_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRAXINO_RUN_ID", raising=False)
    register_resolvers()
    cfg = OmegaConf.create({"a": "${run_id:}", "b": "${run_id:}"})
    assert cfg.a == cfg.b
