"""The page of an evaluation: what a browser makes of it."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from browser import Page, launch
from pages import CLIPS, EMPTY, EVIL, LONG, RECONSTRUCTION, SUMMARY
from praxino.tasks.evaluation.report import write_report


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with launch(tmp_path_factory.mktemp("browser") / "profile") as page:
        yield page


@pytest.fixture
def page(browser: Page, pages: dict[str, Path]) -> Iterator[Page]:
    """Give the browser; afterwards, nothing may have been fetched but the pages, and nothing have gone wrong."""
    yield browser
    browser.run("0")  # what was reported until now
    assert {address for address in browser.fetched if not address.startswith(("data:", "blob:"))} <= {
        path.as_uri() for path in pages.values()
    }
    assert browser.errors == []
    assert browser.run("typeof window.hit") == "undefined"


# the number that each panel of a clip shows, and null where nothing has been drawn
NUMBERS = """
window.pixels = canvas => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  return copy.getImageData(0, 0, canvas.width, canvas.height).data;
};
window.numbers = index => [...document.querySelectorAll(`#clip-${index} canvas`)].map(canvas => {
  const {width: w, height: h} = canvas, data = pixels(canvas);
  const at = (x, y) => data[4 * (y * w + x) + 1];
  if (data[3] === 0) return null;
  let number = 0;
  for (let bit = 0; bit < 8; bit++) {
    const y = Math.floor(h / 2) * Math.floor(bit / 4) + 1 + (h >> 3), x = Math.floor(w / 4) * (bit % 4) + (w >> 3);
    if (at(x, y) > 128) number |= 1 << bit;
  }
  return number;
});
"""
# functions to use what is on the page, and to tell where it is
HANDS = """
window.enter = (selector, value, index = 0) => {
  const field = document.querySelectorAll(selector)[index];
  field.value = value;
  field.dispatchEvent(new Event(field.tagName === "SELECT" ? "change" : "input"));
};
window.box = selector => {
  const {left, top, width, height} = document.querySelector(selector).getBoundingClientRect();
  return [left, top, width, height];
};
"""


def open_players(page: Page, path: Path, **settings: Any) -> None:
    page.open(path, **settings)
    page.run(NUMBERS + HANDS)


def go(page: Page, index: int) -> None:
    page.run(f"document.getElementById('clip-{index}').scrollIntoView({{block: 'center', behavior: 'instant'}})")


@pytest.mark.parametrize("old", [False, True])
def test_panels_play_in_step(page: Page, pages: dict[str, Path], old: bool) -> None:
    script = "delete HTMLVideoElement.prototype.requestVideoFrameCallback" if old else ""
    added = page.call("Page.addScriptToEvaluateOnNewDocument", source=script)
    open_players(page, pages["reconstruction"])
    page.call("Page.removeScriptToEvaluateOnNewDocument", **added)
    assert page.run("'requestVideoFrameCallback' in HTMLVideoElement.prototype") is not old
    for index in range(2):
        go(page, index)
        page.wait(f"numbers({index})[0] > 0")
        seen = page.run(f"""new Promise(done => {{
          const seen = [], begin = performance.now();
          (function look() {{
            seen.push(numbers({index}));
            const late = performance.now() - begin, moved = new Set(seen.map(String)).size >= 5;
            if (late < 500 || !moved && late < 40000) setTimeout(look, 5); else done(seen);
          }})();
        }})""")
        assert all(len(shown) == 3 and len(set(shown)) == 1 for shown in seen)
        assert len({shown[0] for shown in seen}) >= 5, "it does not move"
        assert max(shown[0] for shown in seen) < len(CLIPS[index].panels["x4"])


def scrub(page: Page, index: int, frame: int) -> None:
    page.run(f"enter('#clip-{index} input', {frame})")


def test_frames_are_found_exactly(page: Page, pages: dict[str, Path]) -> None:
    open_players(page, pages["reconstruction"])
    for index in range(3):
        go(page, index)
        page.wait(f"numbers({index})[0] !== null")
        last = len(CLIPS[index].panels["x4"]) - 1
        for frame in (last, 0, 1, last - 1, last // 2):
            scrub(page, index, frame)
            page.wait(f"numbers({index}).every(number => number === {frame})")
            assert page.run(f"document.querySelector('#clip-{index} output').textContent") == f"frame {frame}"
        for frame in range(last + 1):
            scrub(page, index, frame)  # faster than it can seek
        scrub(page, index, 3)
        page.wait(f"numbers({index}).every(number => number === 3)")
        page.run("new Promise(done => setTimeout(done, 100))")
        assert page.run(f"numbers({index})") == [3, 3, 3], "it does not stay"


def test_keys_step_and_play(page: Page, pages: dict[str, Path]) -> None:
    open_players(page, pages["reconstruction"], prefers_reduced_motion="reduce")
    page.run("document.querySelector('#clip-0 .panels').focus()")
    page.wait("numbers(0)[0] === 0")
    for key, frame in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", 16),
        ("ArrowRight", 0),
        ("ArrowLeft", 16),
        ("Home", 0),
    ):
        page.press(key)
        page.wait(f"numbers(0).every(number => number === {frame})")
    page.press(" ")
    page.wait("numbers(0)[0] > 3")
    assert page.run("document.querySelector('#clip-0 button').ariaLabel") == "Pause"
    page.press(" ")
    page.run("new Promise(done => setTimeout(done, 150))")
    frame = page.run("numbers(0)[0]")
    page.run("new Promise(done => setTimeout(done, 200))")
    assert page.run("numbers(0)") == [frame] * 3
    assert page.run("document.querySelector('#clip-0 output').textContent") == f"frame {frame}"


def test_colours_and_sizes(page: Page, pages: dict[str, Path]) -> None:
    open_players(page, pages["reconstruction"], prefers_reduced_motion="reduce")
    for index, clip in enumerate(CLIPS[:4]):
        go(page, index)
        page.wait(f"numbers({index})[0] === 0")
        for k, panel in enumerate(clip.panels.values()):
            canvas = f"document.querySelectorAll('#clip-{index} canvas')[{k}]"
            height, width = panel.shape[1:3]
            assert page.run(f"[{canvas}.height, {canvas}.width]") == [height, width]
            shown = torch.tensor(page.run(f"[...pixels({canvas})]")).view(height, width, 4)[..., :3]
            assert (shown - panel[0].int()).abs().float().mean() < 4  # another matrix or range would make it over 10
    assert page.run("document.querySelector('#clip-3 .control').checkVisibility()") is False, (
        "one frame has no controls"
    )


def test_only_clips_in_view_are_decoded(page: Page, pages: dict[str, Path]) -> None:
    open_players(page, pages["reconstruction"])
    go(page, 0)
    page.wait("numbers(0)[0] !== null")
    assert page.run(f"numbers({len(CLIPS) - 1})") == [None] * 3
    go(page, len(CLIPS) - 1)
    page.wait(f"numbers({len(CLIPS) - 1})[0] > 0")
    page.run("new Promise(done => setTimeout(done, 100))")
    left = page.run("numbers(0)")
    page.run("new Promise(done => setTimeout(done, 300))")
    assert page.run("numbers(0)") == left, "it goes on out of view"
    go(page, 0)
    page.wait(f"numbers(0)[0] !== {left[0]}")


def test_less_motion_means_no_autoplay(page: Page, pages: dict[str, Path]) -> None:
    open_players(page, pages["reconstruction"], prefers_reduced_motion="reduce")
    go(page, 0)
    page.wait("numbers(0)[0] !== null")
    page.run("new Promise(done => setTimeout(done, 300))")
    assert page.run("numbers(0)") == [0, 0, 0]
    assert page.run("document.getElementById('all').textContent") == "Play all"
    page.run("document.getElementById('all').click()")
    page.wait("numbers(0)[0] > 2")


def test_curve_follows_and_leads(page: Page, pages: dict[str, Path]) -> None:
    open_players(page, pages["reconstruction"], prefers_reduced_motion="reduce")
    go(page, 0)
    box = page.run("box('#clip-0 .curve')")
    x, y = box[0] + box[2] * 12 / 16, box[1] + box[3] / 2
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    page.wait("numbers(0).every(number => number === 12)")
    assert page.run("document.querySelector('#clip-0 .head').getAttribute('x1')") == "12"
    assert f"PSNR {20 + math.sin(12):.2f}" in page.run("document.querySelector('#clip-0 small').textContent")
    page.run("enter('#clips select', 'difference', 1)")
    assert "Difference error 0.12" in page.run("document.querySelector('#clip-0 small').textContent")
    slider, head = page.run("box('#clip-0 input')"), page.run("box('#clip-0 .head')")
    assert slider[0] + 8 + (slider[2] - 16) * 12 / 16 == pytest.approx(head[0] + head[2] / 2, abs=1.5)


def column(page: Page, number: int, section: str = "rows") -> list[str]:
    return page.run(
        f"[...document.querySelectorAll('#{section} tbody tr')].map(row => row.children[{number}].textContent)"
    )


def test_sorting(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["reconstruction"])
    heads = "[...document.querySelectorAll('#rows thead th')]"
    page.run(f"{heads}[2].querySelector('button').click()")
    assert column(page, 2) == ["\u221220.0", "\u22123.0", "9.5", "100.0", "\u2013"]  # as numbers; what is missing last
    assert page.run(f"{heads}.map(head => head.ariaSort)") == ["none", "none", "ascending", "none"]
    page.run(f"{heads}[2].querySelector('button').focus()")
    page.press("Enter")
    assert column(page, 2) == ["100.0", "9.5", "\u22123.0", "\u221220.0", "\u2013"]
    assert page.run(f"{heads}.map(head => head.ariaSort)") == ["none", "none", "descending", "none"]
    page.run(f"{heads}[0].querySelector('button').click()")
    assert column(page, 0)[1:] == ["v/1.mp4", "v/2.mp4", "v/9.mp4", "v/10.mp4"]
    assert column(page, 0)[0] == EVIL.replace("\udcff", "\\udcff")
    assert page.run("document.querySelector('#rows tbody a').getAttribute('href')") == f"#clip-{len(CLIPS) - 1}"


def test_long_tables(page: Page, pages: dict[str, Path]) -> None:
    open_players(page, pages["long"])
    assert len(column(page, 0)) == 30
    milliseconds = page.run("""(() => {
      const begin = performance.now();
      document.querySelectorAll("#rows thead button")[1].click();
      return performance.now() - begin;
    })()""")
    assert milliseconds < 1000
    assert column(page, 1)[:3] == ["0", "1", "2"]
    page.run("document.querySelector('#rows .more').click()")
    assert len(column(page, 0)) == 1030
    page.run("enter('#rows input', '499')")
    assert sorted(column(page, 0)) == sorted(row["path"] for row in LONG.rows if "499" in row["path"])
    assert page.run("document.querySelector('#rows [role=status]').textContent") == "15 of 5,000 rows"


def test_figures(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["reconstruction"])
    cards = page.run("[...document.querySelectorAll('.card')].map(card => card.innerText.replace(/\\s+/g, ' '))")
    assert cards == [
        "PSNR↑ 31.63 dB \u22121.50 to 77.25 deviation 47.50",
        "SSIM↑ 0.4063 0.2000 to 0.6500 deviation 0.2800",
        "PSNR, pooled↑ 12.50 dB",
        "FVD↓ 321.5 16 frames & <more>",
    ]
    assert page.run("document.querySelector('header p').textContent") == "5 videos measured, 1 passed over."
    assert page.run("document.querySelector('#rejected td:last-child').textContent") == "<no> frames"
    protocol = page.run("document.querySelector('#protocol').innerText")
    assert re.findall(r"\S+", protocol) == [
        "Protocol",
        "frames",
        "17",
        "ssim.window",
        "valid",
        "metrics",
        "psnr,",
        "ssim",
    ]
    page.run("document.querySelector('#command button').click()")
    page.wait("document.querySelector('#command button').textContent === 'Copied'")
    assert page.run("getSelection().toString()") == RECONSTRUCTION.command
    assert page.run("[...document.querySelectorAll('#clips h3')].map(head => head.textContent.split(':')[0])") == [
        "Worst",
        "Best",
        "Spread",
    ]


def test_curves_tell_of_how_many_videos_they_are(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["reconstruction"])
    told = "[...document.querySelectorAll('#frames .legend span:first-child')].map(span => span.textContent)"
    assert page.run(told) == ["by frame", "by frame, of 0 to 5 videos"]
    assert page.run("document.querySelectorAll('#frames .chart:last-child path[style]').length") == 1, "n is no curve"
    page.run(
        "[...document.querySelectorAll('#frames svg')].forEach(svg => svg.dispatchEvent(new PointerEvent("
        "'pointermove', {clientX: svg.getBoundingClientRect().right})))"
    )
    assert page.run(told) == ["frame 16", "frame 2, 2 videos"]


def test_bars_count_the_videos(page: Page, pages: dict[str, Path], tmp_path: Path) -> None:
    scores = [0.1, 0.1, 0.5, 0.6, 0.9]
    report = replace(
        EMPTY,
        rows=[{"path": str(k), "ssim": score} for k, score in enumerate(scores)],
        summary={"ssim": {"mean": 0.44}},
    )
    write_report(tmp_path / "bars.html", report)
    pages["bars"] = tmp_path / "bars.html"
    page.open(tmp_path / "bars.html")
    heights = page.run("[...document.querySelectorAll('#spread .bar')].map(bar => bar.height.baseVal.value)")
    unit = max(heights) / 2
    assert sum(round(height / unit) for height in heights) == len(scores)
    assert "5 samples" in page.run("document.querySelector('#spread .legend').textContent")


def test_leaderboard(page: Page, pages: dict[str, Path]) -> None:
    open_players(page, pages["leaderboard"])
    dim = "[...document.querySelectorAll('#pareto .dim')].map(point => point.getAttribute('aria-label').split(':')[0])"
    assert page.run(dim) == ["slow <b>"]
    assert page.run("document.querySelectorAll('#pareto circle').length") == 4
    page.run("enter('#pareto select', 'lpips', 1)")
    assert page.run(dim) == ["middle"]  # the lower the better, and one without a value has no point
    best = page.run("[...document.querySelectorAll('#rows .best')].map(cell => cell.textContent)")
    assert best == ["10", "1,000,000", "36", "0.1000"]


def test_prediction(page: Page, pages: dict[str, Path]) -> None:
    open_players(page, pages["prediction"], prefers_reduced_motion="reduce")
    go(page, 0)
    page.wait("numbers(0)[0] === 0")
    scrub(page, 0, 4)
    assert page.run("document.querySelector('#clip-0 output').textContent") == "given 4"
    scrub(page, 0, 5)
    assert page.run("document.querySelector('#clip-0 output').textContent") == "frame 5"
    page.wait("numbers(0)[0] === 5")
    lines = page.run("[...document.querySelectorAll('#frames .chart path')].map(path => path.getAttribute('d'))")
    assert [line.count("M") for line in lines] == [1, 1, 2], "a missing value is a gap"
    assert page.run("document.querySelectorAll('.card').length") == len(SUMMARY) + len(RECONSTRUCTION.values)
    assert "copy last: 11.50, 11.00\u00a0to\u00a012.00" in page.run("document.querySelector('.card').textContent")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["reconstruction", "prediction", "samples", "leaderboard", "long", "empty"])
def test_pages_are_readable(page: Page, pages: dict[str, Path], name: str, width: int) -> None:
    page.open(pages[name], width=width, prefers_color_scheme="dark" if width == 390 else "light")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(22, 24, 28)" if width == 390 else "rgb(251, 250, 247)")
    assert page.run("document.querySelectorAll('main, h1').length") == 2
    overlaps = page.run("""[...document.querySelectorAll("svg")].flatMap(svg => {
      const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
      return texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([, q]) => p.left < q.right && q.left < p.right
        && p.top + 3 < q.bottom && q.top + 3 < p.bottom).map(([b]) => [a, b]));
    })""")
    assert overlaps == []
    unnamed = page.run("""[...document.querySelectorAll("button, input, select, [role=group], [role=img]")].filter(
      node => !node.getAttribute("aria-label") && !node.textContent.trim() && !node.labels?.length
    ).map(node => node.outerHTML)""")
    assert unnamed == []


def test_the_page_may_not_fetch(browser: Page, pages: dict[str, Path]) -> None:
    browser.open(pages["empty"])
    assert browser.run("fetch('http://127.0.0.1:9/x').then(() => 'fetched', error => error.name)") == "TypeError"
    browser.run("0")
    assert any("Content Security Policy" in text for text in browser.errors)
    browser.open(pages["empty"])
