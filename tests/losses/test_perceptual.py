"""LPIPS as a loss: its values, its isolation from training, its memory, and where its weights come from."""

import copy
import hashlib
import os
import pickle
import re
import warnings
from pathlib import Path

import lpips
import pytest
import torch
from torch import nn

from praxino.errors import ConfigError
from praxino.losses import perceptual
from praxino.losses.perceptual import LPIPS

pytestmark = [
    pytest.mark.filterwarnings("ignore:LPIPS has random"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]


def package(net: str, spatial: bool = False) -> nn.Module:
    """Build the package's own network, with a random trunk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lpips.LPIPS(net=net, pnet_rand=True, spatial=spatial, verbose=False)


def videos(frames: int = 3, size: int = 32, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.rand(batch, 3, frames, size, size) * 2 - 1
    return x, (x + 0.2 * torch.randn_like(x)).requires_grad_()


@pytest.fixture(scope="module")
def loss() -> LPIPS:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LPIPS("squeeze", weights="random", chunk=4)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A TORCH_HOME without anything in it, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setitem(perceptual.URLS, "squeeze", "http://127.0.0.1:9/squeezenet1_1-b8a52dc0.pth")
    return tmp_path


@pytest.fixture
def trunk(loss, tmp_path, monkeypatch) -> Path:
    """A file as torchvision's, and the URL it comes from, named by its hash."""
    state = {
        re.sub(r"^net\.slice\d+", "features", key): value * 1.1
        for key, value in loss.net.state_dict().items()
        if key.startswith("net.")
    }
    path = tmp_path / "server" / "trunk.pth"
    path.parent.mkdir()
    torch.save({**state, "classifier.1.weight": torch.zeros(3)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path = path.rename(path.with_name(f"squeezenet1_1-{digest[:8]}.pth"))
    monkeypatch.setitem(perceptual.URLS, "squeeze", path.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return path


# Values.


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_values_are_those_of_the_package(net, spatial):
    ours = LPIPS(net, weights="random", spatial=spatial)
    theirs = package(net, spatial)
    assert theirs.load_state_dict(ours.net.state_dict()).missing_keys == []  # its own scaling and linear weights, too
    x, y = videos()
    distance = ours(x, y)
    assert distance.shape == (2, 3)
    for b in range(2):
        for t in range(3):
            expected = theirs(x[b : b + 1, :, t], y[b : b + 1, :, t]).mean()
            torch.testing.assert_close(distance[b, t], expected, rtol=1e-5, atol=1e-8)


def test_the_packages_constants_are_kept():
    theirs = package("squeeze").state_dict()
    ours = LPIPS("squeeze", weights="random").net.state_dict()
    assert list(ours) == list(theirs)
    for key in ours:
        assert key.startswith("net.") or torch.equal(ours[key], theirs[key]), key


def test_no_distance_to_itself_and_more_with_more_noise(loss):
    x, y = videos()
    far = x + 3 * (y.detach() - x)
    assert not loss(x, x).any()
    assert (loss(x, y) > 0).all()
    assert (loss(x, far) > loss(x, y)).all()


def test_random_weights_are_the_same_every_time_and_named(loss):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="LPIPS has random squeeze weights"):
        other = LPIPS("squeeze", weights="random")
    assert torch.equal(torch.rand(3), expected)
    for a, b in zip(loss.net.parameters(), other.net.parameters(), strict=True):
        assert torch.equal(a, b)


# Isolation.


def test_training_cannot_reach_it(loss):
    parent = nn.ModuleList([loss])
    x, y = videos()
    before = loss(x, y)
    parent.train().requires_grad_(True)
    assert torch.equal(loss(x, y), before)
    assert not any(module.training for module in loss.net.modules())
    assert list(parent.state_dict()) == []
    assert list(parent.parameters()) == []
    assert list(parent.buffers()) == []
    assert list(parent.children()) == [loss]
    assert copy.deepcopy(parent)[0] is loss
    loss(x, y).sum().backward()
    assert y.grad is not None
    assert x.grad is None
    assert all(p.grad is None and not p.requires_grad for p in loss.net.parameters())


def test_it_moves_and_never_drops_below_float32():
    loss = LPIPS("squeeze", weights="random")
    parent = nn.Sequential(loss)
    weights = [p.clone() for p in loss.net.parameters()]
    for cast in (parent.half, parent.bfloat16, parent.float):
        cast()
        assert all(torch.equal(a, b) for a, b in zip(weights, loss.net.parameters(), strict=True))
    x, y = videos()
    single = loss(x, y)
    parent.double()
    assert loss(x, y).dtype == torch.float64
    torch.testing.assert_close(loss(x, y).float(), single, rtol=1e-4, atol=0)
    parent.to("meta")
    assert {t.device.type for t in (*loss.net.parameters(), *loss.net.buffers())} == {"meta"}


def test_autocast_ends_at_its_door(loss):
    x, y = videos()
    x, y = x.bfloat16(), y.detach().bfloat16().requires_grad_()
    expected = loss(x.float(), y.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = loss(x, y)
        distance.sum().backward()
    assert distance.dtype == torch.float32
    assert torch.equal(distance, expected)
    assert y.grad.dtype == torch.bfloat16
    assert y.grad.isfinite().all()


# Memory.


def test_chunks_change_nothing(loss):
    x, y = videos(frames=5)
    whole = LPIPS("squeeze", weights="random", chunk=100)
    distance, expected = loss(x, y), whole(x, y)
    torch.testing.assert_close(distance, expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(distance.square().sum(), y)
    (reference,) = torch.autograd.grad(expected.square().sum(), y)
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-8)


def test_the_backward_pass_holds_frames_only(loss):
    held = []
    x, y = videos(frames=8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.untyped_storage()) or t, lambda t: t):
        loss(x, y)
    held_bytes = sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())
    assert held_bytes <= 2 * 4 * x.numel()  # the two videos; the network's features take 30 times as much


def test_a_gradient_can_be_taken_twice(loss):
    x, y = videos()
    total = loss(x, y).sum()
    (first,) = torch.autograd.grad(total, y, retain_graph=True)
    total.backward()
    assert torch.equal(first, y.grad)


# Weights.


def test_weights_of_a_path(loss, trunk):
    digest = hashlib.sha256(trunk.read_bytes()).hexdigest()
    for sha256 in (None, digest, digest[:12].upper()):
        given = LPIPS("squeeze", weights=str(trunk), sha256=sha256)
        for key, value in loss.net.state_dict().items():
            scale = 1.1 if key.startswith("net.") else 1.0
            torch.testing.assert_close(given.net.state_dict()[key], value * scale)


def test_weights_are_downloaded_once(trunk, capsys):
    first = LPIPS("squeeze")
    assert "Downloading" in capsys.readouterr().err
    trunk.unlink()  # the "server" has them no more
    second = LPIPS("squeeze")
    assert capsys.readouterr() == ("", "")
    for a, b in zip(first.net.parameters(), second.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_printed_and_no_warning_shown(trunk, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LPIPS("squeeze", weights=str(trunk))
    assert capsys.readouterr() == ("", "")


def test_a_damaged_file_in_the_cache_is_refused(trunk):
    LPIPS("squeeze")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / trunk.name
    content = bytearray(cached.read_bytes())
    content[len(content) // 2] ^= 1
    cached.write_bytes(content)
    with pytest.raises(ConfigError, match=r"sha256 .* not"):
        LPIPS("squeeze")


def test_without_weights_and_network_the_error_says_what_to_do(home):
    with pytest.raises(ConfigError) as caught:
        LPIPS("squeeze")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert f"Put http://127.0.0.1:9/squeezenet1_1-b8a52dc0.pth at {home}/hub/checkpoints/squeezenet1_1-" in lines[1]
    assert "weights=PATH" in lines[2]


class Stranger:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "cannot be read"),
        (b"<html>not found</html>", "cannot be read"),
        (pickle.dumps(Stranger()), "cannot be read"),
        ({"features.0.weight": torch.zeros(64, 3, 3, 3)}, "do not fit squeeze"),
        ([1, 2], "no state dict"),
    ],
    ids=["missing", "empty", "html", "pickle", "other", "list"],
)
def test_files_that_hold_no_weights(tmp_path, content, message):
    path = tmp_path / "trunk.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=message) as caught:
        LPIPS("squeeze", weights=str(path))
    assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(ConfigError):
        LPIPS("squeeze", weights=str(path), sha256="0" * 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"net": "resnet"}, "vgg, alex, squeeze"), ({"chunk": 0}, "chunk=0"), ({"sha256": "md5:1"}, "hexadecimal")],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        LPIPS(**{"weights": "random", **settings})


def test_videos_that_do_not_fit(loss):
    x, y = videos(size=30)
    with pytest.raises(ValueError, match="30x30 are too small for LPIPS with squeeze: use 31 pixels"):
        loss(x, y)
    assert loss(*videos(size=31)).isfinite().all()
    with pytest.raises(ValueError, match="twice"):
        loss(x, y[:, :, :1])
