"""The page of an evaluation: what is in the file."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pages import EMPTY, EVIL, RECONSTRUCTION, numbered
from praxino.metrics.summary import DIRECTION
from praxino.tasks.evaluation import report as module
from praxino.tasks.evaluation.report import BETTER, BUDGET, Clip, embed, encode, name_of, plain, tile, write_report
from praxino.video import Video


def content(path: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S
    )
    assert found is not None
    return json.loads(found[1])


def test_everything_is_escaped(pages: dict[str, Path]) -> None:
    text = pages["reconstruction"].read_text(encoding="utf-8")
    assert "window.hit" not in re.sub(r'id="data">.*?</script>', "", text, flags=re.S).replace(
        "&lt;script&gt;window.hit", ""
    )
    data = content(pages["reconstruction"])
    assert data["title"] == RECONSTRUCTION.title
    assert data["rows"]["cells"][4][0] == EVIL.replace("\udcff", "\\udcff")
    assert data["rows"]["columns"] == ["path", "frames", "psnr", "ssim"]
    assert [row[2] for row in data["rows"]["cells"]] == [9.5, 100, None, -3, -20]


def test_values_become_plain() -> None:
    value = {
        "a": math.nan,
        "b": [math.inf, -math.inf],
        "c": np.float32(0.1),
        "d": torch.tensor(2),
        "e": True,
        "f": Path("x"),
    }
    assert plain(value) == {"a": None, "b": ["inf", "-inf"], "c": 0.1, "d": 2, "e": True, "f": "x"}
    assert plain({"x": 1 / 3, "n": 12345678901}) == {"x": 0.3333333, "n": 12345678901}
    assert embed({"<": "</script>\u2028"}) == r'{"\u003c":"\u003c/script>\u2028"}'


def test_rows_may_have_different_columns() -> None:
    rows = [{"path": "a", "psnr": 1.0}, {"path": "b", "ssim": 0.5}]
    assert module.table_of(rows) == {"columns": ["path", "psnr", "ssim"], "cells": [["a", 1.0, None], ["b", None, 0.5]]}


def test_columns_are_named() -> None:
    psnr = {"label": "PSNR, copy last", "unit": "dB", "better": "up", "of": "psnr", "variant": "copy last"}
    assert name_of("psnr_copy_last") == psnr
    assert name_of("flicker") == {"label": "Flicker", "unit": "", "better": "zero"}
    assert name_of("peak_mib") == {"label": "Peak memory", "unit": "MiB", "better": "down"}
    assert name_of("own_thing") == {"label": "Own thing", "unit": "", "better": None}
    assert DIRECTION.items() <= BETTER.items()


def test_panels_are_tiled() -> None:
    a, b = numbered(2, 5, 7, 0), numbered(2, 5, 7, 1)
    found = tile([a, b], 2, (12, 16))
    assert found.shape == (2, 12, 32, 3)
    assert torch.equal(found[:, 0:10:2, 0:14:2], a)
    assert torch.equal(found[:, 1:10:2, 17:30:2], b)
    assert torch.equal(found[:, 10:, :14], found[:, 9:10, :14].expand(-1, 2, -1, -1))
    assert torch.equal(found[:, :, 14:16], found[:, :, 13:14].expand(-1, -1, 2, -1))


@pytest.mark.parametrize(
    "panels",
    [
        {},
        {"a": torch.zeros(2, 4, 4, 3)},
        {"a": torch.zeros(4, 4, 3).byte()},
        {"a": torch.zeros(0, 4, 4, 3).byte()},
        {"a": torch.zeros(2, 4, 4, 3).byte(), "b": torch.zeros(3, 4, 4, 3).byte()},
    ],
)
def test_panels_are_checked(panels: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="panels"):
        Clip("x", 8, panels, {})


def test_quality_follows_the_budget() -> None:
    noise = torch.randint(0, 256, (9, 16, 16, 3), generator=torch.Generator().manual_seed(0)).byte()
    smooth = torch.arange(128).byte().view(1, 1, 128, 1).expand(9, 128, 128, 3)
    rough = F.interpolate(noise.permute(0, 3, 1, 2), (128, 128), mode="bilinear").permute(0, 2, 3, 1)
    fine = torch.randint(0, 256, (5, 192, 192, 3), generator=torch.Generator().manual_seed(0)).byte()
    budget = BUDGET / 8 * 5 * 192 * 192
    assert len(encode(smooth, 8)) < len(encode(rough, 8)) <= module.LEAST
    assert budget < len(encode(fine, 8)) < 5 * 192 * 192  # nothing compresses noise; it ends all the same


@pytest.mark.slow
@pytest.mark.parametrize("length", [17, 64])
def test_size_of_natural_content(length: int, shared: Callable[[str], Path], tmp_path: Path) -> None:
    clips = []
    for path in sorted(shared("data/videos").rglob("*.mp4")):
        if len(clips) == 10:
            break
        with Video(path) as video:
            if min(video.info.height, video.info.width) < 256 or video.info.frames < length:
                continue
            frames = next(video.chunks(length))
        x = F.interpolate(frames.permute(0, 3, 1, 2).float(), (256, 256), mode="area")
        y = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        panels = {"original": x, "reconstruction": y, "difference": ((x - y).abs() * 4).clamp(max=255)}
        panels = {label: panel.byte().permute(0, 2, 3, 1) for label, panel in panels.items()}
        clips.append(Clip(path.name, 30, panels, {}))
    assert len(clips) == 10
    write_report(tmp_path / "report.html", replace(EMPTY, clips=clips))
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
