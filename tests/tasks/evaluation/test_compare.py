"""Two sets of videos: real ones are near each other, noise is far."""

import json
from pathlib import Path

import pytest
import torch

from praxino import video
from praxino.data.synthetic import draw
from praxino.errors import ConfigError, DataError
from praxino.tasks.evaluate import evaluate


def write(folder: Path, clips: list[torch.Tensor]) -> str:
    for number, clip in enumerate(clips):
        video.write(folder / f"{number:03d}.mp4", clip, 8, codec="lossless")
    return str(folder)


def shapes(begin: int, end: int) -> list[torch.Tensor]:
    return [draw(n, frames=5, size=16)[1] for n in range(begin, end)]


def test_real_videos_lie_at_the_floor_and_noise_at_the_ceiling(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    real = write(tmp_path / "real", shapes(0, 128))
    pixels = torch.stack(shapes(0, 128)).float()
    mean, std = pixels.mean((0, 1, 2, 3)), pixels.std((0, 1, 2, 3))
    noise = [(torch.randn(5, 16, 16, 3, generator=generator) * std + mean).clamp(0, 255).byte() for _ in range(64)]
    given = {"real": real, "paired": False, "frames": 5, "size": 16, "batch": 8, "workers": 0}
    found = {
        name: evaluate(
            str(tmp_path / f"out-{name}"),
            fake=write(tmp_path / name, clips),
            cache_dir=str(tmp_path / "cache"),
            **given,
        )
        for name, clips in {"other": shapes(128, 192), "noise": noise}.items()
    }
    assert {score["n"] for score in found.values()} == {64}
    assert len({score["floor"] for score in found.values()}) == 1  # a function of the real videos
    assert abs(found["other"]["position"]) < 0.1
    assert found["noise"]["position"] == pytest.approx(1, abs=0.05)
    assert json.loads((tmp_path / "out-other" / "metrics.json").read_text())["distance"] == found["other"]["distance"]


def test_too_few_clips_and_a_vae_are_refused(tmp_path: Path) -> None:
    real, fake = write(tmp_path / "real", shapes(0, 3)), write(tmp_path / "fake", shapes(3, 5))
    given = {"real": real, "fake": fake, "paired": False, "frames": 5, "size": 16, "workers": 0}
    with pytest.raises(DataError, match="3 clips under"):
        evaluate(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), **given)
    with pytest.raises(ConfigError, match="paired=false"):
        evaluate(str(tmp_path / "out"), real=real, paired=False)
