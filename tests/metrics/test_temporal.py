"""Temporal metrics have known answers: what stays from frame to frame counts nothing, what moves or flickers does."""

import math

import pytest
import torch

from praxino.metrics.temporal import difference_error, flicker, warped_error


def still(frames: int = 4) -> torch.Tensor:
    picture = torch.rand(2, 3, 1, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    return picture.expand(-1, -1, frames, -1, -1)


def blinking(x: torch.Tensor, by: float) -> torch.Tensor:
    """Every other frame brighter, in [-1, 1]."""
    y = x.clone()
    y[:, :, 1::2] += by
    return y


def check(found: torch.Tensor, *expected: float) -> None:
    assert found.dtype == torch.float64
    for row in found.tolist():
        assert row == pytest.approx([math.nan, *expected], nan_ok=True, abs=1e-12)


def test_an_error_that_stays_is_none() -> None:
    x = still()
    check(difference_error(x, x + 0.3), 0, 0, 0)
    check(flicker(x, x + 0.3), 0, 0, 0)


def test_blinking_counts_half_of_its_step_in_the_range_of_two() -> None:
    x = still()
    check(difference_error(x, blinking(x, 0.4)), 0.2, 0.2, 0.2)
    check(flicker(x, blinking(x, 0.4)), 0.2, 0.2, 0.2)
    check(flicker(blinking(x, 0.4), x), -0.2, -0.2, -0.2)  # what moved stands still
    check(flicker(blinking(x, 0.1), blinking(x, 0.4)), 0.15, 0.15, 0.15)


def test_the_error_is_that_of_the_differences() -> None:
    x, y = (torch.rand(2, 3, 5, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    change_x, change_y = ((v[:, :, 1:].double() - v[:, :, :-1].double()) / 2 for v in (x, y))
    expected = (change_y - change_x).abs().mean((1, 3, 4))
    torch.testing.assert_close(difference_error(x, y)[:, 1:], expected, atol=1e-14, rtol=0)
    expected = change_y.abs().mean((1, 3, 4)) - change_x.abs().mean((1, 3, 4))
    torch.testing.assert_close(flicker(x, y)[:, 1:], expected, atol=1e-14, rtol=0)


def test_one_frame_has_no_value() -> None:
    x = still(1)
    check(difference_error(x, x))
    check(warped_error(x, torch.zeros(2, 2, 0, 6, 7), torch.ones(2, 0, 6, 7, dtype=torch.bool)))


def pan(frames: int = 4, step: int = 2) -> torch.Tensor:
    """A camera that moves to the right over a wide picture: what it shows moves to the left."""
    wide = torch.rand(1, 3, 8, 30, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return torch.stack([wide[..., step * t : step * t + 12] for t in range(frames)], dim=2)


def test_what_follows_the_flow_has_no_warping_error() -> None:
    y, valid = pan(), torch.ones(1, 3, 8, 12, dtype=torch.bool)
    flow = torch.zeros(1, 2, 3, 8, 12)
    flow[:, 0] = 2  # a pixel of frame t lay two columns further right in frame t - 1; the last two come from outside
    check(warped_error(y, flow, valid), 0, 0, 0)
    resting = warped_error(y, torch.zeros_like(flow), valid)
    expected = ((y[:, :, 1:].double() - y[:, :, :-1].double()) / 2).square().mean((1, 3, 4))
    torch.testing.assert_close(resting[:, 1:], expected, atol=1e-12, rtol=0)


def test_half_a_pixel_is_interpolated_and_masked_pixels_do_not_count() -> None:
    ramp = torch.linspace(-0.5, 0.5, 11, dtype=torch.float64).expand(1, 1, 3, 5, 11)
    flow = torch.zeros(1, 2, 2, 5, 11)
    flow[:, 0] = 0.5
    valid = torch.ones(1, 2, 5, 11, dtype=torch.bool)
    check(warped_error(ramp, flow, valid), *[(0.05 / 2) ** 2] * 2)
    y = ramp.clone()
    y[..., 1, 2, 3] = 1.0
    valid[..., 2, 2:4] = False  # in either frame it is seen, or looked at from
    check(warped_error(y, flow, valid), *[(0.05 / 2) ** 2] * 2)
    check(warped_error(y, flow, torch.zeros_like(valid)), math.nan, math.nan)


def test_values_out_of_range_and_flows_that_do_not_fit_are_refused() -> None:
    x = still()
    for metric in (difference_error, flicker):
        with pytest.raises(ValueError, match="the second video holds values"):
            metric(x, x + 1)
    with pytest.raises(ValueError, match="a flow of"):
        warped_error(x, torch.zeros(2, 2, 4, 6, 7), torch.ones(2, 3, 6, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="video holds values from"):
        warped_error(x + 1, torch.zeros(2, 2, 3, 6, 7), torch.ones(2, 3, 6, 7, dtype=torch.bool))
