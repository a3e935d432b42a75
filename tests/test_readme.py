"""The Python of the README runs, and its commands exist."""

import re
from pathlib import Path

import pytest
import torch

from praxino import checkpoint
from praxino.config import conf_dir
from praxino.models.wfvae import WFVAE

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vae = WFVAE(latent_dim=4, base_channels=8, norm_type="layernorm", t_interpolation="trilinear")
    checkpoint.save_official(vae, tmp_path / "runs" / "first")
    found = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    names: dict[str, torch.Tensor] = {}
    exec(found[1], names)
    assert names["z"].shape == (1, 4, 9, 8, 8)
    assert names["y"].shape == names["x"].shape


def test_what_the_readme_names_exists() -> None:
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path
    for group, choices in re.findall(r"^\| `([\w/]+)` \| ((?:`\w+`(?:, )?)+)", README, re.MULTILINE):
        for choice in re.findall(r"`(\w+)`", choices):
            assert (Path(conf_dir()) / group / f"{choice}.yaml").is_file(), f"{group}={choice}"
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
