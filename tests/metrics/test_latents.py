"""Statistics of latents equal numpy's over everything at once, however the work is split."""

import numpy as np
import pytest
import torch

from praxino.metrics.latents import BANDS, HAAR, ChannelStatistics, LatentStatistics, Spectrum

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


def spectrum(tensors: list[torch.Tensor], channels: int = 3) -> Spectrum:
    found = Spectrum(channels)
    for z in tensors:
        found.update(z)
    return found


def test_power_adds_up_to_the_mean_square_for_all_sizes() -> None:
    tensors = [
        torch.randn(2, 3, 2, h, w, generator=torch.Generator().manual_seed(h)) for h, w in ((8, 8), (7, 12), (1, 1))
    ]
    found, whole = spectrum(tensors), flat([z.double() for z in tensors])
    np.testing.assert_allclose(found.power.sum(1) / found.elements, (whole**2).mean(1), rtol=1e-12)
    even = flat([z.double()[..., : z.shape[-2] // 2 * 2, : z.shape[-1] // 2 * 2] for z in tensors])
    np.testing.assert_allclose(found.energy.sum(1) / found.paired, (even**2).mean(1), rtol=1e-12)
    assert found.elements == whole.shape[1]
    figures = found.figures()
    np.testing.assert_allclose(np.sum(figures["spectrum"]["power"], axis=0), (whole**2).mean(1), rtol=1e-12)
    np.testing.assert_allclose(np.sum([figures["haar"][name] for name in HAAR], axis=0), (even**2).mean(1), rtol=1e-12)


def test_a_wave_lies_in_the_band_of_its_frequency() -> None:
    place = torch.arange(64).double()
    constant = torch.full((64, 64), 3.0).double()
    slow = torch.cos(2 * torch.pi * 3 / 64 * place).expand(64, 64)  # 0.047 cycles a position, along the rows
    fast = torch.cos(2 * torch.pi * 22 / 64 * place)[:, None].expand(64, 64)  # 0.344, down the columns
    checked = torch.cos(torch.pi * (place[:, None] + place))  # 0.707, along the diagonal
    found = spectrum([torch.stack([constant, slow, fast, checked])[None, :, None]], 4).figures()
    expected = np.zeros((BANDS + 1, 4))
    for channel, (band, power) in enumerate([(0, 9), (1, 0.5), (6, 0.5), (BANDS, 1)]):
        expected[band, channel] = power
    np.testing.assert_allclose(found["spectrum"]["power"], expected, atol=1e-12)
    ends = found["spectrum"]["frequency"]
    assert ends[0] < 3 / 64 < ends[1]
    assert ends[5] < 22 / 64 < ends[6]


def test_haar_bands_tell_edges_across_from_edges_down() -> None:
    row, column = torch.meshgrid(*2 * [torch.tensor([1.0, -1.0]).repeat(4)], indexing="ij")
    found = spectrum([torch.stack([torch.ones(8, 8), row, column, row * column])[None, :, None]], 4).figures()
    assert [found["haar"][name] for name in HAAR] == np.eye(4).tolist()
    assert spectrum([torch.ones(1, 3, 2, 1, 9)]).figures()["haar"] is None


def test_spectra_of_parts_make_that_of_the_whole() -> None:
    tensors = [torch.randn(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    whole = spectrum(tensors)
    split = spectrum([frame for z in tensors for frame in z.split(1, dim=2)])
    merged = spectrum(tensors[:1]).merge(Spectrum.from_state(spectrum(tensors[1:]).state()))
    for other in (split, merged):
        torch.testing.assert_close(other.power, whole.power, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.energy, whole.energy, rtol=1e-12, atol=1e-12)
        assert (other.elements, other.paired) == (whole.elements, whole.paired)
    assert Spectrum.from_state(whole.state()).figures() == whole.figures()
    with pytest.raises(ValueError, match=r"does not fit: use \(B, 3, T, H, W\)"):
        whole.update(torch.zeros(1, 4, 1, 2, 2))
    whole.update(torch.zeros(1, 3, 0, 2, 2))
    assert whole.elements == merged.elements
