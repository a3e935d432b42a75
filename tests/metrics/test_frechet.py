"""The Frechet distance against closed forms and scipy's matrix root, and the random features that it is taken in."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from praxino.data.synthetic import draw
from praxino.metrics.features import RandomFeatures
from praxino.metrics.frechet import Moments, fit, frechet_distance, gaussian_distance
from praxino.video import to_float


def covariance(size: int, seed: int, rank: int | None = None) -> torch.Tensor:
    a = torch.randn(size, rank or 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / size


def test_independent_normals_have_a_closed_form() -> None:
    mean_x, mean_y = torch.tensor([1.0, -2.0, 0.0]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
    std_x, std_y = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 0.5, 1.0]).double()
    expected = float((mean_x - mean_y).square().sum() + (std_x - std_y).square().sum())
    found = gaussian_distance(mean_x, torch.diag(std_x**2), mean_y, torch.diag(std_y**2))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [None, 5])
def test_any_covariances_agree_with_scipy(rank: int | None) -> None:
    first, second = covariance(12, 0), covariance(12, 1, rank)
    mean = torch.linspace(-1, 1, 12, dtype=torch.float64)
    root = scipy.linalg.sqrtm(first.numpy() @ second.numpy()).real
    expected = float(mean @ mean) + np.trace((first + second).numpy() - 2 * root)
    assert gaussian_distance(mean, first, torch.zeros_like(mean), second) == pytest.approx(expected, rel=1e-6)


def test_the_fit_is_numpys_and_needs_two_samples() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    mean, cov = fit(x)
    np.testing.assert_allclose(mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)
    with pytest.raises(ValueError, match="two samples"):
        fit(x[:1])
    with pytest.raises(ValueError, match="widths"):
        frechet_distance(x, x[:, :2])


def test_moments_of_parts_are_the_fit_of_all_in_any_order() -> None:
    x = 50 + torch.randn(60, 5, generator=torch.Generator().manual_seed(2)).exp()
    found = []
    for order in (torch.arange(12), torch.arange(12).flip(0)):
        first, second = Moments(), Moments()
        for part in order.tolist():
            (first if part % 3 else second).add(x[5 * part : 5 * part + 5])
        first.merge(Moments())
        first.merge(second)
        found.append(first.fit())
    for one, other, expected in zip(*found, fit(x), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="two or more"):
        Moments().fit()


def test_a_set_is_at_no_distance_from_itself_and_a_shift_is_its_square() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(3)).double()
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(6 * 4, rel=1e-9)
    turn = torch.linalg.qr(covariance(6, 9)).Q
    y = torch.randn(40, 6, generator=torch.Generator().manual_seed(4)).double() * 2
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(frechet_distance(x, y), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(8, 8), (5, 11), (12, 40), (40, 12), (64, 64)])
def test_few_samples_agree_with_scipy_and_with_a_closed_form(n: int, m: int) -> None:
    """16 features: of a line through few of them, of a shift and a scale of one set, and of any two sets."""
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(k, 16, generator=generator, dtype=torch.float64) for k in (n, m))
    y = y * torch.linspace(0.2, 3, 16, dtype=torch.float64) + 0.3
    (mean_x, cov_x), (mean_y, cov_y) = fit(x), fit(y)
    gap = (mean_x - mean_y).square().sum()
    # scipy's root of a singular product loses half of its digits: that of the regular Gram matrices has the same trace
    rows_x, rows_y = ((v - v.mean(0)).numpy() / np.sqrt(len(v) - 1) for v in (x, y))
    cross = rows_x @ rows_y.T
    gram = cross @ cross.T if n <= m else cross.T @ cross  # one direction is lost to the mean
    base = np.linalg.svd(gram)[0][:, : min(n, m, 17) - 1]
    trace = np.trace(scipy.linalg.sqrtm(base.T @ gram @ base).real)
    expected = float(gap + cov_x.trace() + cov_y.trace()) - 2 * trace
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert gaussian_distance(mean_x, cov_x, mean_y, cov_y) == pytest.approx(expected, rel=1e-7)
    plain = np.trace(scipy.linalg.sqrtm(cov_x.numpy() @ cov_y.numpy()).real)
    assert frechet_distance(x, y) == pytest.approx(float(gap + cov_x.trace() + cov_y.trace()) - 2 * plain, rel=1e-6)
    scaled = (9 - 1) ** 2 / 81 * fit(x)[1].trace() + (mean_x * 8 / 9 - 2).square().sum()  # of x and x / 9 + 2
    assert frechet_distance(x, x / 9 + 2) == pytest.approx(float(scaled), rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


class Pixels(nn.Module):
    """A network for torchmetrics: a few means of the pixels."""

    num_features = 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)


@pytest.mark.parametrize("count", [60, 8])
def test_torchmetrics_fid_agrees(count: int) -> None:
    generator = torch.Generator().manual_seed(7)
    real, fake = (torch.randint(high, (count, 3, 8, 8), generator=generator, dtype=torch.uint8) for high in (256, 200))
    theirs = FrechetInceptionDistance(feature=Pixels()).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert frechet_distance(Pixels()(real), Pixels()(fake)) == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_features_are_fixed_and_tell_videos_from_others() -> None:
    def clips(numbers: range, **settings: float) -> torch.Tensor:
        return to_float(torch.stack([draw(n, frames=9, size=16, **settings)[1] for n in numbers]))  # type: ignore[arg-type]

    net = RandomFeatures()
    assert torch.equal(net.layers[0].weight, RandomFeatures().layers[0].weight)  # type: ignore[arg-type]
    assert net(torch.zeros(2, 3, 1, 7, 9)).shape == (2, 104)
    real, other = net(clips(range(48))), net(clips(range(48, 96)))
    still = net(clips(range(48, 96))[:, :, :1].expand(-1, -1, 9, -1, -1))
    noise = net(torch.rand(48, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    floor, frozen, ceiling = (frechet_distance(real, y) for y in (other, still, noise))
    assert floor < frozen < ceiling
    assert ceiling > 10 * floor
