"""Detectors are called as their authors do, on the right values, and nothing of a wrong file is run."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from praxino.errors import ConfigError
from praxino.metrics.detector import Detector, TorchScriptDetector
from praxino.metrics.features import RandomFeatures

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class I3D(nn.Module):
    """Returns what it was given: a pixel, the sums of rows and columns, and its switches."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if not (rescale and resize and return_features):
            return x
        return torch.stack([x[:, 0, 0, 0, 0], x[:, 2, -1, -1, -1], x.mean((1, 2, 3, 4))], 1)


class Inception(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        if x.dtype != torch.uint8 or not return_features:
            return x
        return x.float().mean((2, 3))


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3, 4)), x.amax((2, 3, 4)), torch.full((len(x), 1), float(x.shape[-1]))], 1)


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def save(net: nn.Module, path: Path) -> str:
    torch.jit.script(net).save(str(path))
    return str(path)


def video(batch: int = 2, frames: int = 9) -> Tensor:
    return torch.rand(batch, 3, frames, 6, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_i3d_sees_values_up_to_255_and_resizes_itself(tmp_path: Path) -> None:
    detector: Detector = TorchScriptDetector(save(I3D(), tmp_path / "i3d.pt"), kind="i3d")
    x = video()
    x[0, 0, 0, 0, 0], x[1, 0, 0, 0, 0] = -1, 1
    found = detector(x)
    values = x * 127.5 + 127.5
    assert found[:, 0].tolist() == [0, 255]
    torch.testing.assert_close(found[:, 1:], torch.stack([values[:, 2, -1, -1, -1], values.mean((1, 2, 3, 4))], 1))
    assert not detector.frames
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 6, 8\) does not fit i3d.*9 frames or more"):
        detector(x[:, :, :8])


def test_inception_sees_frames_of_bytes(tmp_path: Path) -> None:
    detector: Detector = TorchScriptDetector(save(Inception(), tmp_path / "inception.pt"), kind="inception")
    x = video(2, 3)
    expected = (x * 127.5 + 127.5).round().mean((3, 4)).transpose(1, 2).reshape(6, 3)  # video by video
    torch.testing.assert_close(detector(x), expected)
    assert detector.frames


def test_a_plain_module_sees_the_video_resized_where_that_is_asked_for(tmp_path: Path) -> None:
    path, x = save(Plain(), tmp_path / "plain.pt"), video(2, 1)
    torch.testing.assert_close(TorchScriptDetector(path)(x.double()), Plain()(x))
    resized = TorchScriptDetector(path, size=(3, 4))(x)
    halved = x.view(2, 3, 1, 3, 2, 4, 2).mean((4, 6))
    assert resized[:, -1].tolist() == [4, 4]
    torch.testing.assert_close(resized[:, :3], halved.mean((2, 3, 4)), atol=0.05, rtol=0)  # an antialiased triangle
    assert (resized[:, 3:6] < Plain()(x)[:, 3:6]).all()


def test_the_fingerprint_is_the_hash_and_is_checked_first(tmp_path: Path) -> None:
    path = save(Plain(), tmp_path / "plain.pt")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert TorchScriptDetector(path).fingerprint == digest
    for right in (digest, digest[:12].upper()):
        assert TorchScriptDetector(path, sha256=right).name == "plain"
    for wrong in ("0" * 64, digest[:7], "", "not a hash"):
        with pytest.raises(ConfigError, match=f"sha256 {digest}, not {wrong}: nothing of it was run"):
            TorchScriptDetector(path, sha256=wrong)


def test_files_that_are_no_detectors_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.pt cannot be read: No such file"):
        TorchScriptDetector(str(tmp_path / "missing.pt"))
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(ConfigError, match=r"text\.pt cannot be read: no file of torch\.jit"):
        TorchScriptDetector(str(tmp_path / "text.pt"))
    with pytest.raises(ConfigError, match="detector of kind 'c3d' is unknown: use one of i3d, inception, plain"):
        TorchScriptDetector(str(tmp_path / "text.pt"), kind="c3d")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"returned \(2, 1, 6, 8\)"):
        TorchScriptDetector(save(Wrong(), tmp_path / "wrong.pt"))(video(2, 1))


def test_random_features_are_a_detector_too() -> None:
    detector: Detector = RandomFeatures()
    assert (detector.name, detector.fingerprint, detector.frames) == ("random", "random-0", False)
    assert detector(video()).shape == (2, 104)
    assert RandomFeatures(seed=3).fingerprint == "random-3"
    assert RandomFeatures(widths=(4, 8)).fingerprint == "random-0-4-8"
