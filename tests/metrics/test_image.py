"""PSNR, SSIM and MS-SSIM have known answers, and equal the reference's, scikit-image's and torchmetrics'."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from praxino.metrics import similarity
from praxino.metrics.image import ms_ssim_frames, mse_frames, psnr, psnr_frames, ssim, ssim_frames

METRICS = [psnr, ssim, psnr_frames, ssim_frames, mse_frames]


def to_video(frames: np.ndarray) -> torch.Tensor:
    """uint8 `(T, H, W, C)` to `(1, C, T, H, W)` in [-1, 1]."""
    return (torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5) - 1


def pair(*shape: int, noise: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return x, (x + noise * torch.randn(shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)


def smooth(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A video of waves, as structured at coarse scales as at fine ones, and one with noise on it."""
    y, x = torch.meshgrid(*2 * [torch.arange(size).float()], indexing="ij")
    waves = torch.stack([torch.sin(x / (3 + 9 * t)) * torch.cos(y / (2 + 7 * t)) for t in range(4)]).view(
        1, 1, 4, size, size
    )
    return waves, (waves + 0.3 * torch.randn(waves.shape, generator=torch.Generator().manual_seed(2))).clamp(-1, 1)


@pytest.mark.parametrize("clip", ["clipA", "clipB"])
def test_equal_to_reference(shared, clip):
    folder = shared("golden/eval_metrics")
    expected = json.loads((folder / "values.json").read_text())[clip]
    a, b = np.load(folder / f"{clip}.npz").values()
    x, y = to_video(a), to_video(b)
    # The reference's mean is a float32, whose neighbours are 3.8e-6 apart here.
    assert psnr(x, y).item() == pytest.approx(expected["psnr_reference(mean over frames of per-frame psnr)"], abs=3e-6)
    assert -10 * mse_frames(x, y).mean().log10().item() == pytest.approx(expected["psnr_of_mean_mse"], abs=1e-6)
    assert ssim(x, y).item() == pytest.approx(expected["ssim_reference_mean"], abs=1e-6)
    assert ssim_frames(x, y)[0].tolist() == pytest.approx(expected["ssim_per_frame"], abs=1e-6)


@pytest.mark.parametrize(("error", "decibel"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0), (2e-4, 80.0), (2e-6, 100.0)])
def test_a_known_error_has_a_known_psnr(error, decibel):
    x = torch.full((2, 3, 4, 5, 6), -1.0, dtype=torch.float64)
    found = psnr_frames(x, x + error)  # in [-1, 1], so half of it in [0, 1]
    assert found.shape == (2, 4)
    assert found.flatten().tolist() == pytest.approx([decibel] * 8, abs=1e-9)  # 120 dB count as 100
    assert mse_frames(x, x + error).flatten().tolist() == pytest.approx([error**2 / 4] * 8, rel=1e-9)


def test_psnr_at_either_range_is_that_of_torchmetrics():
    x, y = pair(1, 3, 4, 20, 24)
    for t, found in enumerate(psnr_frames(x, y)[0].tolist()):
        a, b = x[:, :, t].double(), y[:, :, t].double()
        assert found == pytest.approx(peak_signal_noise_ratio(b, a, data_range=2.0).item(), abs=1e-6)  # it is float32
        unit = peak_signal_noise_ratio((b + 1) / 2, (a + 1) / 2, data_range=1.0)
        assert found == pytest.approx(unit.item(), abs=1e-6)


def test_a_clip_is_the_mean_of_its_frames_and_identical_ones_count_100_db():
    x = torch.zeros(1, 3, 2, 16, 16)
    y = x.clone()
    y[:, :, 1] += 0.2  # 20 dB
    assert psnr_frames(x, y)[0].tolist() == pytest.approx([100, 20])
    assert psnr(x, y).item() == pytest.approx(60)
    assert ssim(x, x).item() == ms_ssim_frames(*2 * [torch.zeros(1, 1, 1, 176, 176)]).item() == 1


@pytest.mark.parametrize("size", [(11, 11), (12, 43), (27, 26), (48, 100)])
def test_ssim_is_that_of_scikit_image_on_the_valid_window(size):
    x, y = pair(2, 3, 2, *size)
    for b in range(2):
        for t in range(2):
            _, full = structural_similarity(
                *((v[b, :, t].double().numpy() + 1) / 2 for v in (x, y)),
                gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=0, full=True,
            )  # fmt: skip
            found = ssim_frames(x, y)[b, t].item()
            assert found == pytest.approx(full[:, 5:-5, 5:-5].mean(), abs=1e-12)


@pytest.mark.parametrize("size", [(11, 12), (33, 40)])
def test_the_mirrored_window_is_that_of_torchmetrics(size):
    x, y = pair(1, 3, 3, *size)
    frames = (((v[0].transpose(0, 1).double() + 1) / 2) for v in (y, x))
    expected = structural_similarity_index_measure(*frames, data_range=1.0, reduction="none")
    assert ssim_frames(x, y, window="reflect")[0].tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert ssim(x, y, "reflect").item() == pytest.approx(expected.mean().item(), abs=1e-12)
    assert ssim(x, y, "reflect").item() != pytest.approx(ssim(x, y).item(), abs=1e-4)


def plain_ms_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Of two planes in [0, 1], as it is written down by Wang et al. 2003."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    product = 1.0
    for scale, exponent in enumerate([0.0448, 0.2856, 0.3001, 0.2363, 0.1333]):

        def blur(v: np.ndarray) -> np.ndarray:
            w = window / window.sum()
            return correlate1d(correlate1d(v, w, axis=0), w, axis=1)[5:-5, 5:-5]

        ma, mb = blur(a), blur(b)
        structure = (2 * (blur(a * b) - ma * mb) + 9e-4) / (blur(a * a) - ma**2 + blur(b * b) - mb**2 + 9e-4)
        luminance = (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4) if scale == 4 else 1
        product *= (luminance * structure).mean() ** exponent
        h, w = (n // 2 * 2 for n in a.shape)
        a, b = (v[:h, :w].reshape(h // 2, 2, w // 2, 2).mean((1, 3)) for v in (a, b))
    return float(product)


@pytest.mark.parametrize("size", [(176, 176), (203, 190)])
def test_ms_ssim_is_that_of_the_paper(size):
    x, y = pair(1, 2, 2, *size)
    planes = [((v[0].double() + 1) / 2).numpy() for v in (x, y)]
    expected = [np.mean([plain_ms_ssim(planes[0][c, t], planes[1][c, t]) for c in range(2)]) for t in range(2)]
    assert ms_ssim_frames(x, y)[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_ms_ssim_with_the_mirrored_window_is_that_of_torchmetrics_in_grey():
    x, y = smooth(180)
    frames = [((v[0].transpose(0, 1).double() + 1) / 2) for v in (y, x)]
    expected = multiscale_structural_similarity_index_measure(*frames, data_range=1.0, reduction="none")
    assert ms_ssim_frames(x, y, window="reflect")[0].tolist() == pytest.approx(
        expected.tolist(), abs=1e-8
    )  # float32 exponents


def test_a_picture_turned_to_its_negative_counts_nothing_at_many_scales():
    x, _ = smooth(176)
    assert ssim(x, -x).item() < 0
    assert ms_ssim_frames(x, -x)[0, :1].tolist() == [0]


def test_neither_strips_nor_batches_of_planes_change_ssim(monkeypatch):
    x, y = (v[0, 0] for v in pair(1, 1, 5, 75, 53))
    whole = similarity.similarity(x, y)
    strip = similarity.Strip(*x.shape, x.device)  # as on a GPU: all planes at once
    for luminance in (True, False, True):  # the buffers are used again
        alone = similarity.similarity(x, y, luminance)
        torch.testing.assert_close(strip(x, y, luminance) / (65 * 43), alone, atol=1e-13, rtol=0)
    monkeypatch.setattr(similarity, "STRIP", 53 * 32)
    torch.testing.assert_close(similarity.similarity(x, y), whole, atol=1e-13, rtol=0)


def test_other_frames_and_other_layouts_do_not_change_a_frame():
    x, y = pair(2, 3, 5, 24, 40)
    for metric in (psnr_frames, ssim_frames):
        whole = metric(x, y)
        assert torch.equal(metric(x[1:, :, 2:4], y[1:, :, 2:4]), whole[1:, 2:4])
        for layout in (x.permute(0, 2, 3, 4, 1), x.permute(3, 0, 4, 1, 2)):
            order = sorted(range(5), key=[*map(x.stride().index, layout.stride())].__getitem__)
            strided = layout.contiguous().permute(order)
            assert strided.shape == x.shape
            assert not strided.is_contiguous()
            torch.testing.assert_close(metric(strided, y), whole, atol=1e-12, rtol=0)
    threads = torch.get_num_threads()
    ssim(x, y)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("bad", "words"), [(1.01, "from -1 to 1.01"), (-255.0, "from -255 to"), (math.nan, "nan")])
@pytest.mark.parametrize("metric", METRICS)
def test_values_outside_the_range_are_an_error(metric, bad, words):
    x = torch.linspace(-1, 1, 256).view(1, 1, 1, 16, 16)
    y = x.clone()
    y[..., 3, 3] = bad
    with pytest.raises(ValueError, match=f"the second video holds values.*{words}.*use"):
        metric(x, y)
    with pytest.raises(ValueError, match="the first video"):
        metric(y, x)
    metric(x, x * (1 + 5e-7))  # rounding is none


def test_what_the_caller_has_clamped_is_not_looked_at_again():
    x = torch.zeros(1, 1, 1, 16, 16)
    assert psnr(x, x + math.nan, check=False).isnan().all()


def test_videos_of_bytes_or_of_other_shapes_are_refused():
    x = torch.zeros(1, 3, 2, 16, 16)
    with pytest.raises(ValueError, match="holds values from 0 to 255"):
        psnr(x, torch.arange(256, dtype=torch.uint8).repeat(6).view(x.shape))
    for other in (x[:, :, :1], x[0]):
        with pytest.raises(ValueError, match=r"use \(B, C, T, H, W\) twice"):
            ssim(x, other)


def test_small_frames_are_refused():
    x = torch.zeros(1, 3, 1, 8, 16)
    with pytest.raises(ValueError, match="8x16 are smaller"):
        ssim(x, x)
    x = torch.zeros(1, 1, 1, 175, 300)
    with pytest.raises(ValueError, match=r"175x300 are smaller.*ms_ssim: use 176"):
        ms_ssim_frames(x, x)
