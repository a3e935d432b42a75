"""LPIPS (Zhang et al. 2018) as a loss: the `lpips` package around torchvision's networks, frozen and in float32."""

import contextlib
import hashlib
import pickle
import re
import sys
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from praxino.errors import ConfigError

Net = Literal["vgg", "alex", "squeeze"]

# torchvision's file of every network; eight digits of the sha256 are part of its name
URLS = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}
LEAST = {"vgg": 16, "alex": 31, "squeeze": 31}  # pixels of a frame's shorter side
RANDOM = "random"
SECONDS = 20.0  # to wait for an answer before the network counts as missing


class LPIPS(nn.Module):
    """The perceptual distance of every frame of two videos `(B, 3, T, H, W)` in [-1, 1]: `(B, T)`.

    Its network is no submodule: it moves and casts with this module, but never below float32, and has no part in the
    state dict, the parameters, the training mode or copies.

    Args:
        weights: torchvision's file; None: the one in TORCH_HOME, downloaded where it is missing; "random": for tests.
        sha256: what the file must hash to, in full or its first digits (8 at least).
        spatial: average the map of lpips' `spatial` option, whose levels are first enlarged to the frame.
        chunk: frames at a time; each chunk is computed again in the backward pass, so memory does not grow with T.
    """

    net: nn.Module

    def __init__(
        self,
        net: Net = "vgg",
        weights: str | None = None,
        sha256: str | None = None,
        spatial: bool = False,
        chunk: int = 8,
    ) -> None:
        super().__init__()
        if net not in URLS:
            raise ConfigError(f"LPIPS network {net!r} is unknown: use one of {', '.join(URLS)}.")
        if chunk < 1:
            raise ConfigError(f"LPIPS with chunk={chunk} does not fit: use 1 frame or more.")
        if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{8,64}", sha256):
            raise ConfigError(f"sha256 {sha256!r} of the LPIPS weights is none: use its hexadecimal digits.")
        self.kind, self.chunk, self.smallest = net, chunk, LEAST[net]
        self.__dict__["net"] = build(net, trunk(net, weights, sha256), spatial)  # past nn.Module's registration

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape != y.shape or x.ndim != 5 or x.shape[1] != 3:
            raise ValueError(f"videos of {tuple(x.shape)} and {tuple(y.shape)} do not fit: use (B, 3, T, H, W) twice.")
        self.check_size(*x.shape[-2:])
        dtype = next(self.net.parameters()).dtype
        a, b = (video.transpose(1, 2).flatten(0, 1).to(dtype) for video in (x, y))  # (B T, 3, H, W)
        distances = [
            checkpoint(self.frames, p, q, use_reentrant=False, preserve_rng_state=False)
            for p, q in zip(a.split(self.chunk), b.split(self.chunk), strict=True)
        ]
        return torch.cat(distances).view(x.shape[0], x.shape[2])

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError unless frames are large enough."""
        if min(height, width) < self.smallest:
            raise ValueError(
                f"frames of {height}x{width} are too small for LPIPS with {self.kind}: "
                f"use {self.smallest} pixels or more{', or vgg (16)' if self.kind != 'vgg' else ''}."
            )

    def frames(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances of frames `(N, 3, H, W)`, `(N,)`."""
        with torch.autocast(x.device.type, enabled=False):
            return self.net(x, y).mean(dim=(1, 2, 3))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        weight = next(self.net.parameters())
        probe = fn(weight.new_empty(0))  # where would it go? half precision would lose digits
        self.net.to(probe.device, torch.promote_types(probe.dtype, torch.float32))
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def build(net: Net, features: dict[str, Tensor] | None, spatial: bool) -> nn.Module:
    """Build lpips' network of a trunk (None: a random one) and the linear weights that the package brings."""
    import lpips  # seconds: it imports torchvision and scipy

    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        model = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, spatial=spatial, verbose=False)
    scaling = model.scaling_layer  # its constants, in case they were built on meta, too
    scaling.shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scaling.scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if key.startswith("net.")}
    if features is None:
        state = random_trunk(shapes)
    else:  # features.10.weight, in lpips net.slice3.10.weight
        state = {key: features.get(re.sub(r"^net\.slice\d+", "features", key), torch.empty(0)) for key in shapes}
        wrong = [key for key, shape in shapes.items() if tuple(state[key].shape) != shape]
        if wrong:
            raise ConfigError(
                f"the LPIPS weights do not fit {net}: {len(wrong)} of {len(shapes)} tensors are missing or of another "
                f"shape.\nGive torchvision's {file_name(net)}."
            )
    linear = torch.load(f"{lpips.__path__[0]}/weights/v0.1/{net}.pth", map_location="cpu", weights_only=True)
    model.load_state_dict({**state, **linear}, strict=False, assign=True)
    return model.float().eval().requires_grad_(False)


def random_trunk(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Draw He-normal weights, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(shape, generator=generator) * (2 / torch.Size(shape[1:]).numel()) ** 0.5
        if len(shape) > 1
        else torch.zeros(shape)
        for key, shape in shapes.items()
    }


def trunk(net: Net, weights: str | None, sha256: str | None) -> dict[str, Tensor] | None:
    """Return torchvision's weights, from where the configuration says; None for random ones."""
    if weights == RANDOM:
        warnings.warn(
            f"LPIPS has random {net} weights, as asked (weights=random): its values compare with no others, "
            "and it teaches little of what people see.",
            stacklevel=3,
        )
        return None
    if weights is not None:
        return read(net, weights, sha256)
    path = f"{torch.hub.get_dir()}/checkpoints/{file_name(net)}"
    try:
        open(path, "rb").close()
    except FileNotFoundError:
        download(net, path)
    except OSError:  # named by `read`
        pass
    return read(net, path, sha256 or name_hash(net))


def read(net: Net, path: str, sha256: str | None) -> dict[str, Tensor]:
    """Read a file of weights that has the right hash."""
    remedy = f"Give torchvision's {file_name(net)} as weights=PATH (from {URLS[net]})."
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 is not None and not digest.startswith(sha256.lower()):
            raise ConfigError(f"LPIPS weights {path}: sha256 {digest[:16]}.., not {sha256}.\n{remedy}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or f"no safe file of torch ({type(error).__name__})"
        raise ConfigError(f"LPIPS weights {path} cannot be read: {reason}.\n{remedy}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"LPIPS weights {path}: no state dict.\n{remedy}")
    return content


def download(net: Net, path: str) -> None:
    """Fetch torchvision's file to its place under TORCH_HOME; torch.hub writes beside it, checks, and renames."""
    try:
        urllib.request.urlopen(URLS[net], timeout=SECONDS).close()  # torch.hub would wait for minutes
        with contextlib.redirect_stdout(sys.stderr):
            torch.hub.load_state_dict_from_url(
                URLS[net], map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n", 1)[0][:160]
        raise ConfigError(
            f"LPIPS needs the weights of {net}, and they could not be downloaded ({reason}).\n"
            f"Put {URLS[net]} at {path},\n"
            "or give the file as weights=PATH; weights=random is for tests."
        ) from error


def file_name(net: Net) -> str:
    return URLS[net].rpartition("/")[2]


def name_hash(net: Net) -> str:
    """Return the digits of the sha256 that torchvision writes into the file's name."""
    return file_name(net).removesuffix(".pth").rpartition("-")[2]
