"""The leaderboard of VAEs."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from praxino.data.synthetic import make_dataset
from praxino.errors import ConfigError, DataError
from praxino.models.causalvae import CausalVAE
from praxino.models.vae import Posterior
from praxino.models.wfvae import WFVAE
from praxino.official import save_official
from praxino.tasks.benchmark import benchmark
from praxino.tasks.evaluate import evaluate
from praxino.tasks.evaluation.contest import Fitted
from praxino.tasks.evaluation.pareto import front, pareto, points_of

TINY: dict[str, Any] = {"base_channels": 8, "latent_dim": 4, "encoder_num_resblocks": 1, "decoder_num_resblocks": 1}
TINY |= {"encoder_energy_flow_hidden_size": 8, "decoder_energy_flow_hidden_size": 8, "norm_type": "layernorm"}
SMALL: dict[str, Any] = {"frames": 9, "size": 32, "workers": 0, "repeats": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = make_dataset(tmp_path_factory.mktemp("data") / "videos", videos=3, val_videos=1, frames=9, size=32)
    return str(folder / "train")


@pytest.fixture(scope="module")
def wf(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return str(save_official(WFVAE(**TINY), tmp_path_factory.mktemp("vaes") / "wf"))


@pytest.mark.slow
def test_three_families_on_the_same_clips(wf: str, videos: str, tmp_path: Path) -> None:
    import diffusers

    torch.manual_seed(0)
    options = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    wan = diffusers.AutoencoderKLWan(**options, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    wan.save_pretrained(tmp_path / "wan")
    causal = CausalVAE(hidden_size=8, z_channels=4, embed_dim=4, num_res_blocks=1, norm_type="layernorm")
    vaes = [wf, str(save_official(causal, tmp_path / "causal")), str(tmp_path / "wan")]
    result = benchmark(str(tmp_path / "board"), vaes, {"root": videos}, limit=2, **SMALL)
    rows = {row["vae"]: row for row in result["vaes"]}
    assert set(rows) == {"wf", "causal", "wan"}
    assert not result["failed"]
    scores = [row["psnr"] for row in result["vaes"]]
    assert scores == sorted(scores, reverse=True)
    for path, row in zip(vaes, (rows["wf"], rows["causal"], rows["wan"]), strict=True):
        alone = evaluate(
            str(tmp_path / row["vae"]), vae=path, data={"root": videos}, frames=9, size=32, workers=0, limit=2
        )
        for metric in ("psnr", "ssim", "flicker"):
            assert row[metric] == pytest.approx(alone[metric]["mean"], abs=1e-12)
        assert row["encode_ms"] > 0 < row["decode_ms"]
        assert 2**20 * row["peak_mib"] > 4 * row["parameters"] > 0
        assert row["encoder_parameters"] + row["decoder_parameters"] == row["parameters"]
        assert row["compression"] == pytest.approx(3 * 9 * 32 * 32 / (4 * 3 * 4 * 4))
        assert row["bits_per_pixel"] == pytest.approx(16 * 4 * 3 * 4 * 4 / (9 * 32 * 32))
        assert row["padded"] == ""
    with open(tmp_path / "board" / "leaderboard.csv", encoding="utf-8", newline="") as file:
        assert [row["vae"] for row in csv.DictReader(file)] == [row["vae"] for row in result["vaes"]]
    assert (tmp_path / "board" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "causal" in (tmp_path / "board" / "report.html").read_text(encoding="utf-8")
    written = json.loads((tmp_path / "board" / "metrics.json").read_text(encoding="utf-8"))
    assert written["protocol"]["frames"] == 9


def test_a_vae_that_fails_is_named_and_the_others_go_on(wf: str, videos: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    broken = WFVAE(**TINY)
    nn.init.constant_(broken.last_layer, float("nan"))
    save_official(broken, tmp_path / "broken")
    paths = [str(tmp_path / "broken"), wf]
    result = benchmark(str(tmp_path / "board"), paths, {"root": videos}, names=["bad", "good"], limit=1, **SMALL)
    assert [row["vae"] for row in result["vaes"]] == ["good"]
    assert [(row["vae"], "not finite" in row["reason"]) for row in result["failed"]] == [("bad", True)]
    with pytest.raises(DataError, match=r"none of 1 VAEs could be judged; bad: .*not finite"):
        benchmark(str(tmp_path / "none"), paths[:1], {"root": videos}, names=["bad"], limit=1, **SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vaes": []}, r"vaes=\[PATH,PATH\]"),
        ({"names": ["a", "a"], "vaes": ["x", "y"]}, "1 different names for 2 VAEs"),
        ({"frames": None}, "clips of one shape"),
        ({"fps": 30.0, "stride": 2}, "use stride=1"),
        ({"repeats": 0}, "repeats=0"),
    ],
)
def test_settings_are_refused_before_anything_is_loaded(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark(str(tmp_path), **{"vaes": ["none"], "data": {"root": "none"}, **SMALL, **changes})


class Blocks(nn.Module):
    """Means of blocks of 6x8x8, which takes 1 + 6k frames."""

    stride = (6, 8, 8)

    def fitting_frames(self, frames: int) -> int:
        return 1 + -(-(frames - 1) // 6) * 6

    def encode(self, x: Tensor) -> Posterior:
        assert x.shape[2:] == (13, 40, 48)
        return Posterior(torch.cat([x, x], dim=1))

    def decode(self, z: Tensor) -> Tensor:
        return z


def test_what_does_not_fit_is_padded_and_cut_again() -> None:
    x = torch.randn(2, 3, 9, 36, 41)
    fitted = Fitted(Blocks())  # type: ignore[arg-type]
    assert torch.equal(fitted.decode(fitted.encode(x).mode()), x)


def test_the_front_is_what_nothing_beats_in_both(tmp_path: Path) -> None:
    points = [(1.0, 20.0, "a"), (2.0, 19.0, "b"), (3.0, 25.0, "c"), (3.0, 24.0, "d"), (9.0, 25.0, "e")]
    assert [point[2] for point in front(points, less=False)] == ["a", "c"]
    assert [point[2] for point in front(points, less=True)] == ["a", "b"]
    rows = [{"vae": name, "psnr": None, "ssim": 0.5, "decode_ms": cost} for cost, _, name in points]
    pareto(rows, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").exists()
    rows = [{"vae": str(value), "flicker": value, "decode_ms": 1.0} for value in (-0.5, 0.1)]
    assert [point[2] for point in front(points_of(rows, "decode_ms", "flicker"), less=True)] == ["0.1"]
