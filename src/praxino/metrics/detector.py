"""Networks that turn videos into features, for distances between sets of videos."""

import hashlib
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from praxino.errors import ConfigError

Kind = Literal["i3d", "inception", "plain"]
LEAST_FRAMES = {"i3d": 9, "inception": 1, "plain": 1}  # I3D halves time three times, and pools over two of what is left


class Detector(Protocol):
    """What a distance between sets needs to know of its network.

    name, fingerprint: what it is, and what its features depend on, for the protocol and the cache of statistics.
    frames: features are of frames, `(B T, D)`, rather than of videos, `(B, D)`.
    """

    name: str
    fingerprint: str
    frames: bool

    def __call__(self, video: Tensor) -> Tensor:
        """Return the features of videos `(B, 3, T, H, W)` in [-1, 1]."""
        ...


class TorchScriptDetector:
    """A network that was saved by torch.jit, which needs no code beside the file.

    Args:
        path: the file. It holds code that is run: give `sha256`, or trust where it comes from.
        sha256: what the file must hash to, in full or its first digits (8 at least).
        kind: how it is called. i3d: StyleGAN-V's I3D, which enlarges frames to 224x224 itself. inception: StyleGAN's
            Inception, on single frames rounded to 8 bits. plain: any module of videos in [-1, 1], returning `(B, D)`.
        size: resize frames to [height, width] first, bilinear with antialiasing.
    """

    def __init__(
        self,
        path: str,
        sha256: str | None = None,
        kind: Kind = "plain",
        size: tuple[int, int] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if kind not in LEAST_FRAMES:
            raise ConfigError(f"detector of kind {kind!r} is unknown: use one of {', '.join(LEAST_FRAMES)}.")
        self.name: str = kind
        self.kind, self.size, self.frames = kind, size, kind == "inception"
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if sha256 is not None and (len(sha256) < 8 or not digest.startswith(sha256.lower())):
                    raise ConfigError(f"detector {path}: sha256 {digest}, not {sha256}: nothing of it was run.")
                file.seek(0)
                self.net = torch.jit.load(file, map_location=device).eval()
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or f"no file of torch.jit ({type(error).__name__})"
            raise ConfigError(f"detector {path} cannot be read: {reason}.") from error
        self.fingerprint, self.device = digest, torch.device(device)

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """Return the features of videos `(B, 3, T, H, W)` in [-1, 1], `(B, D)` or, of frames, `(B T, D)`; float32."""
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] < LEAST_FRAMES[self.kind]:
            least = LEAST_FRAMES[self.kind]
            raise ValueError(
                f"{tuple(video.shape)} does not fit {self.kind}: use (B, 3, T, H, W), {least} frames or more."
            )
        batch, colours, frames = video.shape[:3]
        x = video.to(self.device, torch.float32).transpose(1, 2).flatten(0, 1)  # (B T, 3, H, W)
        if self.size is not None:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True, align_corners=False).clamp(-1, 1)
        if self.kind == "inception":
            features = self.net((x * 127.5 + 127.5).round().to(torch.uint8), return_features=True)
        else:
            x = x.view(batch, frames, colours, *x.shape[-2:]).transpose(1, 2)  # (B, 3, T, H, W)
            if self.kind == "i3d":
                features = self.net(x * 127.5 + 127.5, rescale=True, resize=True, return_features=True)
            else:
                features = self.net(x)
        if features.ndim != 2 or len(features) != (batch * frames if self.frames else batch):
            raise ValueError(f"detector of kind {self.kind} returned {tuple(features.shape)} for {tuple(video.shape)}.")
        return features.float()
