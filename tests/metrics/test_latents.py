"""Statistics of latents equal numpy's over everything at once, however the work is split."""

import numpy as np
import pytest
import torch

from praxino.metrics.latents import ChannelStatistics, LatentStatistics

SHAPES = [(2, 3, 1, 4, 5), (1, 3, 7, 2, 2), (5, 3, 2, 1, 1), (1, 3, 1, 1, 1)]


def parts(offset: float = 0.0, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 30.0]).view(1, 3, 1, 1, 1)
    return [torch.randn(shape, generator=rng).mul(scale).double() + offset for shape in SHAPES]


def flat(tensors: list[torch.Tensor]) -> np.ndarray:
    """All elements, `(C, N)`."""
    return np.concatenate([z.numpy().swapaxes(0, 1).reshape(3, -1) for z in tensors], axis=1)


def collected(tensors: list[torch.Tensor]) -> ChannelStatistics:
    statistics = ChannelStatistics(3)
    for z in tensors:
        statistics.update(z)
    return statistics


def check(found: ChannelStatistics, whole: np.ndarray) -> None:
    assert found.count == whole.shape[1]
    np.testing.assert_allclose(found.mean, whole.mean(1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.variance, whole.var(1), rtol=1e-10)
    np.testing.assert_array_equal(found.low, whole.min(1))
    np.testing.assert_array_equal(found.high, whole.max(1))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_equal_to_numpy_in_any_order_and_split(offset: float) -> None:
    tensors = parts(offset)
    whole = flat(tensors)
    check(collected(tensors), whole)
    check(collected(tensors[::-1]), whole)
    check(collected([clip for z in tensors for clip in z.split(1)]), whole)
    first, second = collected(tensors[:1]), collected(tensors[1:])
    check(first.merge(second), whole)
    check(ChannelStatistics(3).merge(collected(tensors)).merge(ChannelStatistics(3)), whole)


def test_half_precision_is_widened_first() -> None:
    z = torch.full((1, 3, 70000), 1.0, dtype=torch.bfloat16)
    z[..., 0] = 3.0
    found = collected([z])
    assert found.mean.tolist() == pytest.approx([1 + 2 / 70000] * 3, rel=1e-14)
    check(found, flat([z.double()]))


def test_wrong_channels_are_refused_and_nothing_is_added_by_nothing() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 2\) does not fit: use \(B, 3, \.\.\.\)"):
        collected([torch.zeros(1, 4, 2)])
    assert collected([torch.zeros(1, 3, 0)]).count == 0


def test_samples_have_the_variance_of_means_and_noise() -> None:
    rng = torch.Generator().manual_seed(1)
    mean = torch.randn(400, 3, 50, generator=rng) * torch.tensor([2.0, 0.05, 1.0])[None, :, None] + 5
    std = torch.rand(400, 3, 50, generator=rng)
    statistics = LatentStatistics.empty(3)
    for m, s in zip(mean.split(100), std.split(100), strict=True):
        statistics.update(m, s.square(), m)
    samples = mean + std * torch.randn(mean.shape, generator=rng)
    assert statistics.count == 20000
    torch.testing.assert_close(statistics.mean.float(), samples.mean((0, 2)), atol=0.03, rtol=0)
    torch.testing.assert_close(statistics.std.float(), samples.std((0, 2)), atol=0, rtol=0.02)  # 20000 draws
    assert statistics.active.tolist() == [True, False, True]
    assert statistics.noise_share[1] > 0.99
    assert statistics.noise_share[0] == pytest.approx(1 / 13, rel=0.05)
