"""Curves: what is read of a run, how it is averaged, and what the figure shows of it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from praxino.callbacks.record import RunLog
from praxino.errors import ConfigError, DataError
from praxino.tasks.figure import draw, smoothed
from praxino.tasks.plot import names_of, order, plot, read_run


def make_run(folder: Path, steps: int, every: int = 1, **settings: Any) -> Path:
    """Log as a training does: a row a step, a validation now and then."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1, every):
        rows.append({"step": step, "epoch": 0, "time": 1e9 + step, "train/loss": 1 / step, "train/lr": 1e-3})
    rows.append({"step": steps, "epoch": 0, "time": 1e9 + steps + 100, "val/loss": 0.5, "val/psnr": 20.0})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"net": {"_target_": "praxino.models.wfvae.WFVAE"}, "optimizer": {"lr": 2e-3}, **settings}
    (folder / "config.yaml").write_text(json.dumps({"frames": 9, "model": model}))
    return folder


def shown(figure: Figure) -> dict[str, Any]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


@pytest.mark.parametrize("steps", [3, 10_000])
def test_a_picture_of_a_short_and_of_a_long_run(steps: int, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps)
    result = plot(str(folder))
    assert result["panels"] == ["loss", "psnr", "lr"]
    data = (folder / "curves.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert width > 1000
    assert height > 300


def test_panels_hold_all_points(tmp_path: Path) -> None:
    run = read_run(str(make_run(tmp_path / "run", 50)), "run")
    panels = shown(draw([run], ["loss", "psnr", "lr"], smooth=0.1, log_steps=False))
    assert set(panels) == {"loss", "PSNR (dB)", "learning rate"}
    raw, average, line, marks = panels["loss"].lines
    np.testing.assert_allclose(raw.get_ydata(), 1 / np.arange(1, 51))
    np.testing.assert_allclose(average.get_ydata(), smoothed(1 / np.arange(1, 51), 0.1))
    assert (line.get_xdata().tolist(), marks.get_ydata().tolist()) == ([50], [0.5])
    assert panels["loss"].get_yscale() == "log"
    assert len(panels["learning rate"].lines) == 1


def test_the_table_tells_what_differs(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", 5, clip=1.0)
    b = make_run(tmp_path / "b", 5, clip=2.0)
    runs = [read_run(str(folder), folder.name) for folder in (a, b)]
    texts = [text.get_text() for text in draw(runs, ["loss"], 0.02, False).texts]
    assert texts == ["2 runs", "clip", "a", "1", "b", "2"]
    alone = [text.get_text() for text in draw(runs[:1], ["loss"], 0.02, False).texts]
    assert dict(zip(alone[1::2], alone[2::2], strict=True)) == {
        "network": "WFVAE",
        "frames": "9",
        "learning rate": "0.002",
        "clip": "1",
        "steps": "5",
        "time": "1 min 44 s",
        "best PSNR": "20",
        "best loss": "0.5",
    }


def test_smoothing() -> None:
    assert smoothed(np.ones(7), 0.5) is None
    assert smoothed(np.ones(100), 0.0) is None
    line = np.arange(100.0)
    average = smoothed(line, 0.02)
    assert average is not None
    np.testing.assert_allclose(average[10:-10], line[10:-10])  # no lag
    impulse = np.zeros(101)
    impulse[50] = 1.0
    spread = smoothed(impulse, 0.03)
    assert spread is not None
    assert spread.argmax() == 50
    assert math.isclose(spread.sum(), 1.0, rel_tol=1e-9)
    np.testing.assert_allclose(np.sum((np.arange(101) - 50) ** 2 * spread), 3.03**2, rtol=0.05)  # its variance


def test_csv_and_jsonl_give_the_same_curves(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log = RunLog(str(folder))
    for step in (1, 2, 3):
        log.log_metrics({"epoch": 0, "train/loss": 0.1 * step}, step=step)
    log.log_metrics({"epoch": 0, "val/psnr": 30.0, "val/ssim": math.nan}, step=3)
    one, other = (read_run(str(folder / name), "run") for name in ("metrics.jsonl", "metrics.csv"))
    assert one.curves.keys() == other.curves.keys() == {"loss", "psnr"}
    for panel in one.curves:
        for split in one.curves[panel]:
            np.testing.assert_array_equal(one.curves[panel][split], other.curves[panel][split])


def test_a_cut_off_line_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 4)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')
    assert read_run(str(folder), "run").curves["loss"]["train"][0].tolist() == [1, 2, 3, 4]


def test_names_and_order() -> None:
    assert names_of(["/x/a/run", "/x/b/run"]) == ["a/run", "b/run"]
    assert names_of(["/x/a", "/x/b/metrics.jsonl"]) == ["a", "b"]
    assert names_of(["/x/a", "/x/a"]) == ["a (1)", "a (2)"]
    assert order({"lr", "kl", "psnr", "loss", "grad_norm"}) == ["loss", "psnr", "kl", "grad_norm", "lr"]


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    folder = str(make_run(tmp_path / "run", 3))
    with pytest.raises(ConfigError, match="several runs"):
        plot([folder, folder])
    with pytest.raises(ConfigError, match="did you mean psnr"):
        plot(folder, only=["pnsr"])
    with pytest.raises(ConfigError, match=r"\.png"):
        plot(folder, out=str(tmp_path / "curves.txt"))
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        plot(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0}\n')
    with pytest.raises(DataError, match="no training or validation values"):
        plot(str(tmp_path))
