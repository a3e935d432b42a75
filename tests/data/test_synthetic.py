"""The synthetic set: real files, a function of its parameters, never written over something else."""

import numpy as np
import pytest
import torch

from praxino.data.report import read_lines, write_lines
from praxino.data.scan import scan
from praxino.data.synthetic import MARKER, SHAPES, draw, make_dataset
from praxino.errors import ConfigError
from praxino.video import read

SMALL = {"videos": 5, "val_videos": 3, "frames": 9, "size": 32}


def content(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_files_are_a_function_of_the_parameters(tmp_path):
    one = make_dataset(tmp_path / "one", **SMALL, workers=1)
    two = make_dataset(tmp_path / "two", **SMALL, workers=2)
    assert content(one) == content(two)
    assert content(one) != content(make_dataset(tmp_path / "three", **SMALL, seed=1))
    manifest = scan(one)
    assert [len([e for e in manifest.videos if e.path.startswith(part)]) for part in ("train", "val")] == [5, 3]
    assert {(e.info.frames, e.info.height, e.info.width, float(e.info.fps)) for e in manifest.videos} == {
        (9, 32, 32, 25)
    }
    assert {e.path.split("/")[1] for e in manifest.videos} <= set(SHAPES)
    assert manifest.rejected == []


def test_files_hold_what_was_drawn(tmp_path):
    out = make_dataset(tmp_path / "set", **SMALL)
    for part, number in (("train", 4), ("val", 0)):
        shape, clip = draw(number, frames=9, size=32, split=part)
        stored = read(out / part / shape / f"{number:06d}.mp4")
        assert torch.equal(stored, clip)
    small = make_dataset(tmp_path / "lossy", **SMALL, quality=20)
    shape, clip = draw(0, frames=9, size=32)
    error = (read(small / "train" / shape / "000000.mp4").float() - clip.float()).square().mean() / 255**2
    assert 26 < -10 * error.log10() < 45
    first = [draw(k, frames=2, split="train")[1] for k in range(5)]
    assert not any((a == b).all() for a in first for b in [draw(k, frames=2, split="val")[1] for k in range(5)])


@pytest.mark.parametrize("size", [32, [48, 80]])
def test_one_shape_moves_inside_the_frame(size):
    shapes = set()
    for number in range(40):
        shape, clip = draw(number, frames=60, size=size, texture=0.0)
        shapes.add(shape)
        height, width = (size, size) if isinstance(size, int) else size
        assert tuple(clip.shape) == (60, height, width, 3)
        lit = clip.float().amax(-1).numpy() > 120
        area = lit.sum((1, 2)) / min(height, width) ** 2
        assert area.min() > 0.02
        assert area.max() < 0.23
        assert area.max() - area.min() < 0.35 * area.max()  # whole in every frame
        rows, columns = np.arange(height)[:, None], np.arange(width)
        path = np.stack([(lit * axis).sum((1, 2)) / lit.sum((1, 2)) for axis in (rows, columns)], 1)
        speed = np.hypot(*np.diff(path, axis=0).T) / min(height, width)
        assert 0.01 < np.median(speed) < 0.06
        assert speed.max() < 0.08
    assert shapes == set(SHAPES)


def test_texture_is_seen_and_moves_with_the_shape():
    plain, striped = (draw(3, frames=5, texture=t)[1].float() for t in (0.0, 0.3))
    difference = (plain - striped).abs().amax(-1)
    inside = plain.amax(-1) > 120
    assert difference[inside].mean() > 5
    assert difference[~inside].mean() < 1
    assert (difference[0] != difference[4]).any()


def test_nothing_is_written_twice_or_over_something_else(tmp_path):
    out = make_dataset(tmp_path / "set", **SMALL)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    make_dataset(out, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")} == times
    with pytest.raises(ConfigError, match=r"holds another set \(frames=9\)"):
        make_dataset(out, **SMALL | {"frames": 13})
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty directory"):
        make_dataset(foreign, **SMALL)
    with pytest.raises(ConfigError, match="not an empty directory"):
        make_dataset(foreign / "thesis.txt", **SMALL)
    assert content(foreign).keys() == {(foreign / "thesis.txt").relative_to(foreign)}


def test_an_interrupted_set_is_completed(tmp_path):
    out = make_dataset(tmp_path / "set", **SMALL)
    whole = content(out)
    line = next(read_lines(out / MARKER))
    write_lines(out / MARKER, [line | {"complete": False}])
    next(out.rglob("*.mp4")).unlink()
    make_dataset(out, **SMALL)
    assert content(out) == whole


@pytest.mark.parametrize(
    "wrong",
    [
        {"videos": 0},
        {"frames": 0},
        {"size": 4},
        {"size": 33},
        {"fps": 0},
        {"texture": 2},
        {"seed": -1},
        {"quality": 60},
    ],
)
def test_bad_arguments_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        make_dataset(tmp_path / "set", **SMALL | wrong)
    assert not (tmp_path / "set").exists()
