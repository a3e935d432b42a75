"""Cut and scale: the aspect is kept, the box lies inside, and chance comes from the generator only."""

import numpy as np
import pytest

from praxino.data.transforms import Resize

SHAPES = [(64, 64), (180, 320), (320, 180), (24, 960), (101, 77), (16, 16), (1080, 1920), (7, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, [48, 64], [64, 24]])
def test_crop_fills_the_size_and_keeps_the_aspect(shape, size):
    geometry = Resize(size)(*shape)
    height, width = (size, size) if isinstance(size, int) else size
    assert (geometry.height, geometry.width) == (height, width)
    top, left, h, w = geometry.crop
    assert 0 <= top <= shape[0] - h
    assert 0 <= left <= shape[1] - w
    assert h == shape[0] or w == shape[1]  # as much of the picture as possible
    assert abs(top - (shape[0] - h - top)) <= 1
    assert abs(left - (shape[1] - w - left)) <= 1
    assert abs(h / w - height / width) <= height / width * (0.5 / h + 0.5 / w) + 1e-9 or min(h, w) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_keep_sets_the_short_side_and_rounds_the_long_one(shape):
    geometry = Resize(64, "keep")(*shape)
    assert min(geometry.height, geometry.width) == 64
    long = max(geometry.height, geometry.width)
    assert long % 8 == 0
    exact = max(shape) * 64 / min(shape)
    assert exact - 8 < long <= exact + 1e-6
    _, _, h, w = geometry.crop
    assert h / geometry.height == pytest.approx(w / geometry.width, rel=0.6 / min(h, w))


def test_no_size_keeps_the_picture():
    geometry = Resize(None)(33, 21)
    assert (geometry.height, geometry.width, geometry.crop) == (33, 21, (0, 0, 33, 21))


def test_chance_comes_from_the_generator():
    resize = Resize(32, flip=0.5, random_crop=True)
    drawn = [resize(60, 100, np.random.default_rng(i)) for i in range(300)]
    assert drawn == [resize(60, 100, np.random.default_rng(i)) for i in range(300)]
    assert 110 < sum(g.flip for g in drawn) < 190
    lefts = {g.crop[1] for g in drawn}
    assert {0, 40} <= lefts  # both ends are reached
    assert all(g.crop[2:] == (60, 60) for g in drawn)
    assert resize(60, 100) == Resize(32)(60, 100)  # none without a generator
    assert not any(Resize(32)(60, 100, np.random.default_rng(i)).flip for i in range(50))
    assert all(Resize(32, flip=1.0)(60, 100, np.random.default_rng(i)).flip for i in range(50))


def test_bad_arguments_are_refused():
    for size in (0, [32], [32, 0], [1, 2, 3], []):
        with pytest.raises(ValueError, match="size"):
            Resize(size)
    with pytest.raises(ValueError, match="mode keep"):
        Resize([32, 64], "keep")
    with pytest.raises(ValueError, match="flip 2"):
        Resize(32, flip=2)
