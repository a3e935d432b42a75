"""The gallery: a page that fetches nothing, of what is there."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from praxino import video
from praxino.data.synthetic import draw
from praxino.errors import DataError
from praxino.tasks.gallery import chart, clock, gallery, mosaic, spread, strip, thinned

VOID = {"meta", "input", "line", "br", "img"}


def shapes(number: int, **settings: Any) -> torch.Tensor:
    return draw(number, frames=9, size=16, **settings)[1]


def make_run(run: Path) -> Path:
    """Lay out the results of a pipeline as its stages do."""

    def write(path: Path, clip: torch.Tensor) -> None:
        video.write(path, clip, 8, codec="lossless")

    def text(path: Path, content: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps(line) + "\n" for line in content) if isinstance(content, list) else json.dumps(content)
        )

    for n in range(3):
        write(run / "reconstruct" / "origin" / "disc" / f"{n}.mp4", shapes(n))
        write(run / "reconstruct" / "disc" / f"{n}.mp4", shapes(n, texture=0.0))
        write(run / "sample" / f"{n:05d}.mp4", shapes(n, seed=1))
        for kind in ("truth", "full", "mean"):
            write(
                run / "predict" / kind / "disc" / f"a <b> & {n}.mp4", shapes(n, texture=0.0 if kind == "mean" else 0.3)
            )
    text(
        run / "reconstruct" / "reconstructions.jsonl",
        [{"path": "x", "output": f"disc/{n}.mp4", "psnr": 27.04 + n} for n in range(3)],
    )
    text(
        run / "vae" / "metrics.jsonl",
        [{"step": 5, "val/psnr": 20.0}, {"step": 9, "val/psnr": 26.5, "val/ssim": 0.912}, {"step": 9}],
    )
    curve = {
        "mean": [24.0, 21.0, 19.0, 18.5],
        "sample": [23.0, 20.0, 18.0, 17.0],
        "copy_last": [24.5, 19.0, 17.0, 16.0],
    }
    text(
        run / "predict" / "metrics.json",
        {"n": 3, "context": 5, "frames": 9, "samples": 8, "gain": {"mean": 2.0512, "sample": -0.3},
         "horizon": {"frame": [5, 6, 7, 8], "psnr": curve}},
    )  # fmt: skip
    text(
        run / "evaluate" / "metrics.json",
        {"n": 128, "distance": 0.0203, "floor": 0.01, "ceiling": 0.09, "position": 0.129},
    )
    for n, name in enumerate(("vae", "dit")):
        stamp = {
            "stage": name,
            "command": f"praxino-train 'a=<{name}>'",
            "seconds": 61.2,
            "finished": f"2020-01-0{n + 1}",
        }
        text(run / "stages" / f"{name}.json", stamp)
    return run


class Page(HTMLParser):
    """Checks that tags are closed in order; collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    run = make_run(tmp_path_factory.mktemp("run"))
    summary = gallery(str(run), str(run / "gallery"), title="A & B")
    return run, summary, (run / "gallery" / "index.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_fetches_nothing(made: tuple[Path, dict[str, Any], str]) -> None:
    page = Page(made[2])
    assert not {tag for tag, *_ in page.attributes} & {"script", "link", "iframe", "object", "video", "img"}
    assert not [value for _, key, value in page.attributes if key in ("src", "href")]
    urls = re.findall(r"url\((.*?)\)", made[2])
    assert urls
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", made[2]).replace("http-equiv", "")
    assert "$" not in re.sub(r"base64,[\w+/=]+", "", made[2])  # every place of the template is filled
    assert "A & B" in page.text
    assert "a=<vae>" in page.text  # names are text, not tags


def test_the_page_shows_what_was_made(made: tuple[Path, dict[str, Any], str]) -> None:
    page = Page(made[2])
    labels = [value for _, key, value in page.attributes if key == "aria-label"]
    assert [labels.count(kind) for kind in ("real", "reconstruction", "sample")] == [3, 3, 3]
    assert "truth, disc/a <b> & 0.mp4" in labels
    for text in ("26.5 dB", "SSIM 0.912", "+2.05 dB", "-0.30\u00a0dB", "12.9 %", "2 min 02 s", "27.0 dB", "Mean of 8"):
        assert text in page.text, text
    assert {row["name"] for row in made[1]["figures"]} == {"Reconstruction", "Prediction", "Samples", "Time"}
    for name in ("reconstructions", "samples", "predictions"):
        assert video.probe(made[0] / "gallery" / f"{name}.gif").frames == 9


def test_a_strip_is_the_clip_and_a_kept_frame_is_the_last_one_given(
    made: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    clip = shapes(0, texture=0.3)
    assert strip(clip) in made[2]  # truth
    kept = torch.cat([clip[:5], clip[4:5].expand(4, -1, -1, -1)])
    assert strip(kept) in made[2]
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.png").write_bytes(base64.b64decode(strip(clip).partition(",")[2]))
    stored = video.read(tmp_path / "frames")[0]  # (H, T W, 3)
    assert torch.equal(stored.view(16, 9, 16, 3).transpose(0, 1), clip)


def test_parts_that_are_missing_are_left_out(tmp_path: Path) -> None:
    video.write(tmp_path / "sample" / "0.mp4", shapes(0), 8)
    summary = gallery(str(tmp_path), str(tmp_path / "out"))
    page = Page(Path(summary["page"]).read_text(encoding="utf-8"))
    assert "Samples" in page.text
    assert "Predictions" not in page.text
    assert summary["figures"] == []
    with pytest.raises(DataError, match="no videos"):
        gallery(str(tmp_path / "nothing"), str(tmp_path / "out"))


def test_the_chart_puts_every_point_in_its_place() -> None:
    root = ElementTree.fromstring(
        chart([5, 6, 7], {"mean": [20.0, 18.0, 16.0], "copy_last": [20.0, 16.0, 16.5]}, {"mean": "a", "copy_last": "b"})
    )
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    lines = [
        np.array([list(map(float, p.split(","))) for p in path.attrib["d"][1:].split()]) for path in root.iter("path")
    ]
    copy, mean = lines
    assert all((line >= 0).all() and (line <= [width, height]).all() for line in lines)
    np.testing.assert_allclose(np.diff(mean[:, 0], 2), 0, atol=0.11)  # frames and decibels are spaced evenly
    np.testing.assert_allclose(mean[1, 1] - mean[0, 1], mean[2, 1] - mean[1, 1], atol=0.11)
    assert copy[1, 1] == mean[2, 1]  # 16 dB
    assert copy[0, 1] == mean[0, 1]
    flat = ElementTree.fromstring(chart([1], {"mean": [3.0]}, {"mean": "a"}))
    assert all(math.isfinite(float(value)) for value in next(flat.iter("path")).attrib["d"][1:].split(","))


def test_small_parts() -> None:
    assert [thinned(range(n), 3) for n in (2, 3, 9)] == [[0, 1], [0, 1, 2], [0, 3, 6]]
    assert spread({"a": 10.0, "b": 12.0, "c": 50.0}, 18) == {"a": 10.0, "b": 28.0, "c": 50.0}
    assert [clock(s) for s in (3.4, 60, 223.9)] == ["3 s", "1 min 00 s", "3 min 43 s"]
    clip = torch.zeros(2, 4, 6, 3, dtype=torch.uint8)
    picture = mosaic([[clip, clip, clip]], columns=2, side=8, gap=1)
    assert picture.shape == (2, 2 * 9 + 1, 2 * 13 + 1, 3)
    assert int((picture == 0).all(-1).sum()) == 2 * 3 * 8 * 12
