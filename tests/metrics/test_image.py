"""PSNR and SSIM equal the reference's, and scikit-image's."""

import json
import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from praxino.metrics.image import mse_frames, psnr, psnr_frames, ssim, ssim_frames


def to_video(frames: np.ndarray) -> torch.Tensor:
    """uint8 `(T, H, W, C)` to `(1, C, T, H, W)` in [-1, 1]."""
    return (torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5) - 1


@pytest.mark.parametrize("clip", ["clipA", "clipB"])
def test_equal_to_reference(shared, clip):
    folder = shared("golden/eval_metrics")
    expected = json.loads((folder / "values.json").read_text())[clip]
    a, b = np.load(folder / f"{clip}.npz").values()
    x, y = to_video(a), to_video(b)
    assert psnr(x, y).item() == pytest.approx(expected["psnr_reference(mean over frames of per-frame psnr)"], abs=1e-5)
    assert ssim(x, y).item() == pytest.approx(expected["ssim_reference_mean"], abs=1e-6)
    for t, value in enumerate(expected["ssim_per_frame"]):
        assert ssim(x[:, :, t : t + 1], y[:, :, t : t + 1]).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("size", [(11, 11), (12, 43), (48, 100)])
def test_ssim_equal_to_scikit_image(size):
    x = torch.rand(2, 3, 2, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    frames = [
        structural_similarity(
            *((v[b, :, t].double().numpy() + 1) / 2 for v in (x, y)),
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=0,
        )
        for b in range(2)
        for t in range(2)
    ]  # fmt: skip
    assert ssim(x, y).tolist() == pytest.approx(np.array(frames).reshape(2, 2).mean(1).tolist(), abs=1e-12)


def test_identical_frames_count_100_db():
    x = torch.zeros(1, 3, 2, 16, 16)
    y = x.clone()
    y[:, :, 1] += 0.2  # 20 dB
    assert psnr(x, x).item() == 100
    assert psnr(x, y).item() == pytest.approx(60)
    assert ssim(x, x).item() == 1


@pytest.mark.parametrize(("bad", "words"), [(1.01, "from -1 to 1.01"), (-255.0, "from -255 to"), (math.nan, "nan")])
@pytest.mark.parametrize("metric", [psnr, ssim, psnr_frames, ssim_frames, mse_frames])
def test_values_outside_the_range_are_an_error(metric, bad, words):
    x = torch.linspace(-1, 1, 256).view(1, 1, 1, 16, 16)
    y = x.clone()
    y[..., 3, 3] = bad
    with pytest.raises(ValueError, match=f"the second video holds values.*{words}.*use"):
        metric(x, y)
    with pytest.raises(ValueError, match="the first video"):
        metric(y, x)
    metric(x, x * (1 + 5e-7))  # rounding is none


def test_small_frames_are_refused():
    x = torch.zeros(1, 3, 1, 8, 16)
    with pytest.raises(ValueError, match="8x16 are smaller"):
        ssim(x, x)
