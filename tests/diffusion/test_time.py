"""Times of training: distributions, shift, stratification."""

import pytest
import torch

from praxino.diffusion.time import LogitNormalTime, UniformTime, shift_time


def quantiles(t: torch.Tensor) -> list[float]:
    return t.double().quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()


def draw(sampler, count: int = 100_000) -> torch.Tensor:
    t = sampler.draw((count,), generator=torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32
    assert 0 <= t.min() <= t.max() <= 1
    return t


def test_quantiles():
    normal = 1.2815516
    assert quantiles(draw(UniformTime())) == pytest.approx([0.1, 0.5, 0.9], abs=0.01)
    expected = torch.sigmoid(torch.tensor([0.3 - 0.8 * normal, 0.3, 0.3 + 0.8 * normal])).tolist()
    assert quantiles(draw(LogitNormalTime(mean=0.3, std=0.8))) == pytest.approx(expected, abs=0.01)
    shifted = [3 * u / (1 + 2 * u) for u in (0.1, 0.5, 0.9)]
    assert quantiles(draw(UniformTime(shift=3.0))) == pytest.approx(shifted, abs=0.01)


def test_a_shift_divides_the_ratio_of_signal_to_noise_and_moves_a_logit_normal():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    shifted = shift_time(t, 3.0)
    assert torch.allclose((1 - shifted) / shifted, (1 - t) / t / 3)
    assert shift_time(torch.tensor([0.0, 1.0]), 3.0).tolist() == [0, 1]
    assert torch.allclose(shift_time(shifted, 1 / 3), t)
    logits = torch.logit(draw(LogitNormalTime(shift=3.0)))
    assert logits.mean().item() == pytest.approx(torch.tensor(3.0).log().item(), abs=0.02)


@pytest.mark.parametrize("sampler", [UniformTime(stratified=True), LogitNormalTime(stratified=True)])
def test_stratified_times_fill_every_part_once_in_random_order(sampler):
    t = sampler.draw((64, 5), generator=torch.Generator().manual_seed(0))
    u = t if isinstance(sampler, UniformTime) else torch.special.ndtr(torch.logit(t))
    parts = (u * 64).floor()
    assert torch.equal(parts.sort(0).values, torch.arange(64.0)[:, None].expand(-1, 5))
    assert not torch.equal(parts[:, 0], parts[:, 1])
    assert not torch.equal(parts[:, 0], parts[:, 0].sort().values)


def test_a_single_stratified_time_is_distributed_as_before():
    generator = torch.Generator().manual_seed(0)
    sampler = UniformTime(stratified=True)
    third = torch.stack([sampler.draw((4,), generator=generator)[2] for _ in range(2000)])
    assert quantiles(third) == pytest.approx([0.1, 0.5, 0.9], abs=0.03)


def test_a_generator_repeats_itself():
    one, other = (UniformTime().draw((5,), generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, other)


def test_bad_settings():
    with pytest.raises(ValueError, match="shift of 0"):
        UniformTime(shift=0.0)
    with pytest.raises(ValueError, match="not positive"):
        LogitNormalTime(std=0.0)
