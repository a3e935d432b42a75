"""However two ranks are launched, they make one run, in one directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from dit_run import FRAMES, SIZE, make_vae
from praxino import checkpoint
from praxino.config import conf_dir, register_resolvers
from praxino.data.synthetic import make_dataset
from praxino.tasks.encode import encode

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "lightning": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}
SETTINGS = [
    "trainer=ddp",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.precision=32-true",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "data.workers=0",
    "batch=1",
]
VAE = ["experiment=wfvae_tiny", "frames=5", "size=16"]
DIT = ["experiment=dit_tiny", f"frames={FRAMES}", "model.net.width=32", "model.net.depth=1", "model.net.num_heads=2"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("videos")
    make_dataset(folder, videos=4, val_videos=3, frames=5, size=16, workers=1)
    return [*VAE, f"data.root={folder / 'train'}", f"data.val_root={folder / 'val'}"]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("latents")
    make_dataset(folder / "videos", videos=4, val_videos=3, frames=FRAMES, size=SIZE, workers=1)
    checkpoint.save_vae(make_vae(), folder / "vae.ckpt")
    for part in ("train", "val"):
        root, settings = {"root": str(folder / "videos" / part)}, {"frames": FRAMES, "size": SIZE, "workers": 0}
        encode(str(folder / "vae.ckpt"), root, str(folder / part), **settings, device="cpu")  # type: ignore[arg-type]
    return [*DIT, f"data.root={folder / 'train'}", f"data.val_root={folder / 'val'}"]


def launch(folder: Path, launcher: str, settings: list[str]) -> None:
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PRAXINO_RUN_ID"}
    command = [*LAUNCHERS[launcher], str(ROOT / "train.py"), *SETTINGS, *settings]
    result = subprocess.run(
        command, cwd=folder, env={**environment, "OMP_NUM_THREADS": "1"}, timeout=600, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]


def last_row(run: Path) -> dict[str, float]:
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {key: value for key, value in row.items() if key.startswith("val/")}


@pytest.mark.slow
@pytest.mark.parametrize("data", ["videos", "latents"])
def test_one_directory_a_run(tmp_path: Path, data: str, request: pytest.FixtureRequest) -> None:
    found = {}
    for launcher in LAUNCHERS:
        launch(tmp_path / launcher, launcher, request.getfixturevalue(data))
        (run,) = (tmp_path / launcher / "runs").iterdir()
        assert [path.name for path in (run / "checkpoints").glob("step-*.ckpt")] == ["step-00000002.ckpt"]
        found[launcher] = last_row(run)
    assert found["lightning"] == found["torchrun"]


@pytest.mark.slow
def test_one_directory_a_job_of_a_sweep(tmp_path: Path, videos: list[str]) -> None:
    launch(tmp_path / "sweep", "lightning", [*videos, "-m", "seed=0,1", 'out="a sweep"'])
    sweep = tmp_path / "sweep" / "a sweep"
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["a sweep"]
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1", "multirun.yaml"]
    rows = [last_row(sweep / job) for job in "01"]
    assert rows[0]["val/psnr"] != rows[1]["val/psnr"]


# the keys of SlurmQueueConf in hydra-submitit-launcher 1.2, an extra that the tests do without
SLURM = [
    "submitit_folder", "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name",
    "stderr_to_stdout", "partition", "qos", "comment", "constraint", "exclude", "gres", "cpus_per_gpu", "gpus_per_task",
    "mem_per_gpu", "mem_per_cpu", "account", "signal_delay_s", "max_num_timeout", "additional_parameters",
    "array_parallelism", "setup",
]  # fmt: skip


def test_slurm_is_asked_for_a_task_a_device() -> None:
    node = {"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"}
    content = OmegaConf.create({**node, **dict.fromkeys(SLURM)})
    OmegaConf.set_struct(content, True)
    store = ConfigStore.instance()
    store.store(group="hydra/launcher", name="submitit_slurm", node=content)
    register_resolvers()
    words = ["launcher=slurm", "experiment=dit_s", "data.root=L", "trainer=ddp", "trainer.devices=8", "out=S"]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
            cfg = compose("train", overrides=[*words, "hydra.launcher.partition=gpu"], return_hydra_config=True)
    finally:
        store.repo["hydra"]["launcher"].pop("submitit_slurm.yaml")
    queue = cfg.hydra.launcher
    assert cfg.hydra.mode.name == "MULTIRUN"  # submitit queues jobs of a sweep alone
    assert (queue.nodes, queue.tasks_per_node, queue.gpus_per_node) == (1, cfg.trainer.devices, cfg.trainer.devices)
    assert (queue.partition, queue.max_num_timeout) == ("gpu", 0)
    assert (cfg.hydra.sweep.dir, queue.submitit_folder) == ("S", "S/.submitit/%j")
