"""A suite gives what its metrics give alone, for any pieces; LPIPS in it is that of the lpips package."""

import math
import warnings

import lpips
import pytest
import torch

from praxino.losses.perceptual import LPIPS
from praxino.metrics.image import ms_ssim_frames, mse_frames, psnr_frames, ssim_frames
from praxino.metrics.suite import PairSuite
from praxino.metrics.temporal import difference_error, flicker

ALL = ("psnr", "ssim", "difference", "flicker", "lpips")


def pair(batch: int = 2, frames: int = 7, size: int = 36) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.rand(batch, 3, frames, size, size) * 2 - 1
    return x, (x + 0.2 * torch.randn_like(x)).clamp(-1, 1)


def perceptual(net: str, spatial: bool = False) -> LPIPS:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LPIPS(net, weights="random", spatial=spatial, chunk=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("cuts", [[7], [1] * 7, [3, 1, 3]])
def test_pieces_do_not_change_a_bit(cuts: list[int]) -> None:
    x, y = pair()
    suite = PairSuite(ALL, distances={"lpips": perceptual("squeeze")})
    meter = suite.begin()
    for a, b in zip(x.split(cuts, dim=2), y.split(cuts, dim=2), strict=True):
        meter.add(a, b)
    curves = meter.curves()
    assert list(curves) == list(ALL)
    expected = {
        "psnr": psnr_frames(x, y),
        "ssim": ssim_frames(x, y),
        "difference": difference_error(x, y),
        "flicker": flicker(x, y),
        "lpips": perceptual("squeeze")(x, y).double(),
    }
    for name, curve in curves.items():
        assert curve.dtype == torch.float64
        torch.testing.assert_close(curve, expected[name], atol=0, rtol=0, equal_nan=True)


def test_scores_are_means_over_the_frames_that_have_a_value() -> None:
    x, y = pair()
    y[0, :, 2] = x[0, :, 2]
    scores = PairSuite(("psnr", "flicker")).score(x, y)
    assert list(scores) == ["psnr", "flicker", "psnr_clip"]
    torch.testing.assert_close(scores["psnr"], psnr_frames(x, y).mean(1))
    torch.testing.assert_close(scores["flicker"], flicker(x, y)[:, 1:].mean(1))
    mse = ((x.double() - y.double()) / 2).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(scores["psnr_clip"], -10 * mse.log10())
    assert scores["psnr"][0] > scores["psnr_clip"][0] + 5  # one frame of 100 dB
    meter = PairSuite(()).begin()
    meter.add(x, y)
    torch.testing.assert_close(meter.mse(), mse)
    assert PairSuite(("psnr",)).score(x, x)["psnr_clip"].tolist() == [100, 100]


def test_frames_smaller_than_a_window_have_no_value() -> None:
    x, y = pair(size=20)
    distance = perceptual("alex")
    scores = PairSuite(("ssim", "ms_ssim", "lpips"), distances={"lpips": distance}).score(x, y)
    assert scores["ms_ssim"].isnan().all()
    assert scores["lpips"].isnan().all()  # 31 pixels at least
    torch.testing.assert_close(scores["ssim"], ssim_frames(x, y).mean(1))
    assert PairSuite(("ssim",)).score(x[..., :10], y[..., :10])["ssim"].isnan().all()


def test_the_window_is_passed_on() -> None:
    x, y = pair(1, 1, 180)
    found = PairSuite(("ssim", "ms_ssim"), window="reflect").score(x, y)
    assert found["ssim"] == ssim_frames(x, y, "reflect")[0]
    assert found["ms_ssim"] == ms_ssim_frames(x, y, "reflect")[0]
    assert found["ssim"] != ssim_frames(x, y)[0]


def test_mse_of_a_frame_needs_no_metric() -> None:
    x, y = pair()
    meter = PairSuite(()).begin()
    meter.add(x[:, :, :2], y[:, :, :2])
    assert meter.curves() == {}
    torch.testing.assert_close(meter.mse(), mse_frames(x, y)[:, :2].mean(1))


def test_what_cannot_be_measured_is_refused() -> None:
    x, y = pair()
    with pytest.raises(ValueError, match=r"metric 'lpips' is unknown: use some of psnr, ssim, .*, fvd\."):
        PairSuite(("psnr", "lpips"), distances={"fvd": lambda a, b: a})
    meter = PairSuite(("psnr",)).begin()
    with pytest.raises(ValueError, match="nothing has been measured"):
        meter.scores()
    with pytest.raises(ValueError, match="the second video holds values"):
        meter.add(x, 2 * y)
    meter.add(x, y)
    with pytest.raises(ValueError, match="do not continue"):
        meter.add(x[:1], y[:1])
    with pytest.raises(ValueError, match="do not fit"):
        meter.add(x, y[:, :, :1])
    assert math.isfinite(meter.scores()["psnr"][0])


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("net", ["alex", "squeeze", pytest.param("vgg", marks=pytest.mark.slow)])
def test_lpips_of_every_frame_is_that_of_the_package(net: str, spatial: bool) -> None:
    ours = perceptual(net, spatial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net=net, pnet_rand=True, spatial=spatial, verbose=False)  # its shipped linear weights
    assert (
        theirs.load_state_dict({k: v for k, v in ours.net.state_dict().items() if k.startswith("net.")}, False)[1] == []
    )
    x, y = pair(2, 2)
    meter = PairSuite(("lpips",), distances={"lpips": ours}).begin()
    meter.add(x, y)
    with torch.no_grad():
        expected = [[theirs(x[b : b + 1, :, t], y[b : b + 1, :, t]).mean().item() for t in range(2)] for b in range(2)]
    torch.testing.assert_close(meter.curves()["lpips"], torch.tensor(expected).double(), atol=1e-6, rtol=1e-6)
