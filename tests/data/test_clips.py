"""The frames of a clip: spacing, start, frame rate, and short videos."""

from fractions import Fraction

import numpy as np
import pytest

from praxino.data.clips import ClipSampler, nearest


def draws(sampler, length, count=400, times=None):
    return [sampler.indices(length, np.random.default_rng(i), times) for i in range(count)]


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_spacing_is_even_and_every_start_is_reached_equally(stride):
    sampler = ClipSampler(5, stride)
    length = 1 + 4 * stride + 7  # 8 starts
    clips = draws(sampler, length, 1600)
    for clip in clips:
        assert np.diff(clip).tolist() == [stride] * 4
        assert clip[0] >= 0
        assert clip[-1] < length
    counts = np.bincount([clip[0] for clip in clips], minlength=8)
    assert len(counts) == 8  # the last start as well, and none past it
    assert counts.min() > 140
    assert counts.max() < 260


def test_exact_fit_and_single_frames():
    assert ClipSampler(5, 3).indices(13, np.random.default_rng(0)).tolist() == [0, 3, 6, 9, 12]
    assert {int(c[0]) for c in draws(ClipSampler(1), 4)} == {0, 1, 2, 3}


def test_fixed_starts_draw_nothing():
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert ClipSampler(3, where="start").indices(11, rng).tolist() == [0, 1, 2]
    assert ClipSampler(3, where="center").indices(11, rng).tolist() == [4, 5, 6]
    assert ClipSampler(3, 4, True, where="center").indices(7, rng).tolist() == [0, 3, 6]
    assert rng.bit_generator.state == before


def test_random_stride_takes_every_value_that_fits():
    clips = draws(ClipSampler(5, 4, random_stride=True), 100)
    assert {int(np.diff(c)[0]) for c in clips} == {1, 2, 3, 4}
    clips = draws(ClipSampler(5, 4, random_stride=True), 12)  # 1 + 4 * 2 fit, 1 + 4 * 3 do not
    assert {int(np.diff(c)[0]) for c in clips} == {1, 2}
    assert all(c[-1] < 12 for c in clips)


def test_the_frame_rate_of_clips():
    rng = np.random.default_rng(0)
    for length, sampler, step in (
        (9, ClipSampler(5, 2), 2),
        (5, ClipSampler(33, short="pad"), 1),  # repeats of the last frame take as long as any other
        (5, ClipSampler(33, 2, short="pad"), 2),
        (5, ClipSampler(9, short="slow"), 0.5),
        (1, ClipSampler(9, short="pad"), 1),
        (9, ClipSampler(1), 1),
    ):
        assert sampler.step(sampler.indices(length, rng)) == step
    assert [sampler.rate(24) for sampler in (ClipSampler(), ClipSampler(stride=2), ClipSampler(fps=8))] == [24, 12, 8]
    assert ClipSampler(stride=3, random_stride=True).rate(24) == 12


@pytest.mark.parametrize("length", [1, 2, 3, 9, 16])
def test_short_videos(length):
    rng = np.random.default_rng(0)
    assert ClipSampler(17, short="drop").indices(length, rng) is None
    assert not ClipSampler(17).fits(length, 25)
    padded = ClipSampler(17, short="pad").indices(length, rng)
    assert padded.tolist() == list(range(length)) + [length - 1] * (17 - length)
    slowed = ClipSampler(17, 2, short="slow").indices(length, rng)
    assert len(slowed) == 17
    assert slowed[0] == 0
    assert slowed[-1] == length - 1
    assert set(np.diff(slowed)) <= {0, 1}
    assert set(slowed) == set(range(length))


def test_slow_lowers_the_stride_first():
    clip = ClipSampler(5, 4, short="slow").indices(9, np.random.default_rng(0))
    assert clip.tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("arguments", [(5,), (5, 3), (5, 3, True), (5, 1, False, 10)])
def test_fits_agrees_with_indices(arguments):
    sampler = ClipSampler(*arguments)
    for length in range(1, 40):
        clip = sampler.indices(length, np.random.default_rng(0), np.arange(length) / 25)
        assert sampler.fits(length, Fraction(25)) == (clip is not None)


def test_target_rate_follows_the_timestamps_of_a_variable_rate():
    rng = np.random.default_rng(1)
    times = np.cumsum(rng.uniform(0.02, 0.2, 300))
    times -= times[0]
    for clip in draws(ClipSampler(9, fps=8), 300, 200, times):
        error = np.abs(times[clip] - times[clip[0]] - np.arange(9) / 8)
        assert error.max() <= 0.2  # half a gap at either end
    starts = [c[0] for c in draws(ClipSampler(9, fps=8, where="start"), 300, 2, times)]
    assert starts == [0, 0]


def test_target_rate_on_a_constant_rate_is_a_stride():
    times = np.arange(100) / 24
    for clip in draws(ClipSampler(5, fps=12), 100, 50, times):
        assert np.diff(clip).tolist() == [2, 2, 2, 2]
    slower = ClipSampler(5, fps=48, where="start").indices(100, np.random.default_rng(0), times)
    assert slower.tolist() == [0, 0, 1, 1, 2]  # nearest, the earlier of two


def test_target_rate_reaches_both_ends():
    times = np.arange(60) / 30
    clips = draws(ClipSampler(5, fps=10), 60, 800, times)
    assert min(c[0] for c in clips) == 0
    assert max(c[-1] for c in clips) == 59


def test_target_rate_of_short_videos():
    times, rng = np.arange(5) / 10, np.random.default_rng(0)
    assert ClipSampler(9, fps=10).indices(5, rng, times) is None
    assert ClipSampler(9, fps=10, short="pad").indices(5, rng, times).tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 4]
    assert ClipSampler(9, fps=10, short="slow").indices(5, rng, times)[[0, 4, 8]].tolist() == [0, 2, 4]
    assert ClipSampler(3, fps=10, short="pad").indices(1, rng, times[:1]).tolist() == [0, 0, 0]


def test_nearest():
    times = np.array([0.0, 1.0, 1.5, 4.0])
    assert nearest(times, np.array([-1, 0.4, 0.6, 1.2, 2.7, 2.8, 9])).tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="0 frames"):
        ClipSampler(0)
    with pytest.raises(ValueError, match="exclude each other"):
        ClipSampler(5, 2, fps=10)
    with pytest.raises(ValueError, match="positive number"):
        ClipSampler(5, fps=0)
    with pytest.raises(ValueError, match="timestamps"):
        ClipSampler(5, fps=10).indices(20, np.random.default_rng(0))
