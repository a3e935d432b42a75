"""What every causal video autoencoder has in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from praxino.errors import ConfigError
from praxino.models.header import header
from praxino.ops.attention import AttnBlock3D
from praxino.ops.causal import Stream
from praxino.ops.norm import GroupNorm

HALVES = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents, from raw moments `(B, 2C, T, H, W)`: mean, then log-variance."""

    moments: Tensor

    @property
    def mean(self) -> Tensor:
        return self.moments.chunk(2, dim=1)[0]

    @property
    def logvar(self) -> Tensor:
        return self.moments.chunk(2, dim=1)[1].clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a latent; with a generator of another device the noise is drawn there and moved."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """Return the most probable latent."""
        return self.mean

    def kl(self) -> Tensor:
        """Return the divergence from the standard normal, per latent element, in nats, at least in float32."""
        wide = torch.promote_types(self.moments.dtype, torch.float32)
        mean, logvar = self.mean.to(wide), self.logvar.to(wide)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)


class Piece(NamedTuple):
    """What one push brings out: moments or video, and wavelet coefficients; None where no frame is ready."""

    main: Tensor | None
    coefficients: tuple[Tensor | None, ...]


@dataclass
class Output:
    """A reconstruction with what its losses need.

    The decoder is trained to give the wavelet coefficients of the input at the finer levels, too: the two tuples match.
    """

    recon: Tensor
    posterior: Posterior
    encoder_coefficients: tuple[Tensor, ...]
    decoder_coefficients: tuple[Tensor, ...]


class VideoVAE(nn.Module, ABC):
    """A causal video autoencoder: video `(B, 3, 1 + s*k, H, W)` in [-1, 1] to latents and back.

    `config` is the constructor's arguments as plain data; `extra` holds the keys of an official config that say
    nothing about the model (`_class_name`, ...), to be written back.
    """

    stride: tuple[int, int, int]
    latent_channels: int
    official_name: str
    official_prefix = ""  # what names of weights have here in front of the official ones
    has_coefficients = False  # whether encoder and decoder bring out wavelet coefficients to be compared
    unused_keys: tuple[str, ...] = ()  # of official configs, beside those with an underscore: kept in `extra`

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.extra: dict[str, Any] = {}
        self.statistics: dict[str, list[float]] | None = None
        self.pretrained = False  # it holds weights that an initialisation must not overwrite

    # The model proper: one push through the encoder or the decoder, which are all a subclass must have.

    @abstractmethod
    def push_encoder(self, x: Tensor | None, stream: Stream) -> Piece:
        """Take new frames and return the moments `(B, 2C, t, h, w)` that are ready."""

    @abstractmethod
    def push_decoder(self, z: Tensor | None, stream: Stream) -> Piece:
        """Take new latents and return the frames that are ready."""

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """The weight at which an adaptive adversarial loss compares its gradients."""

    @abstractmethod
    def fixed_filters(self) -> dict[str, Tensor]:
        """Return the constants that the official state dict holds beside the trained weights."""

    # Whole videos and streams.

    def encode_stream(self, x: Tensor | None, stream: Stream) -> Piece:
        """Push any number of frames, or None to flush a stream that was set final."""
        stream.open()
        piece = self.push_encoder(x, stream)
        stream.close()
        return piece

    def decode_stream(self, z: Tensor | None, stream: Stream) -> Piece:
        """Push any number of latents, or None to flush a stream that was set final."""
        stream.open()
        piece = self.push_decoder(z, stream)
        stream.close()
        return piece

    def encode(self, x: Tensor) -> Posterior:
        """Encode whole videos."""
        return self._encode(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Decode whole videos from latents `(B, C, T, H, W)`; values may leave [-1, 1] a little."""
        return self._decode(z)[0]

    def forward(self, x: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> Output:
        posterior, encoder_coefficients = self._encode(x)
        recon, decoder_coefficients = self._decode(posterior.sample(generator) if sample else posterior.mode())
        return Output(recon, posterior, encoder_coefficients, decoder_coefficients)

    def _encode(self, x: Tensor) -> tuple[Posterior, tuple[Tensor, ...]]:
        self.check_video(x.shape)
        if not x.is_floating_point():
            raise ValueError(f"a video of {x.dtype} does not fit: use floats in [-1, 1] (praxino.video.to_float).")
        moments, coefficients = self.encode_stream(x, Stream(final=True))
        assert moments is not None
        return Posterior(moments), tuple(c for c in coefficients if c is not None)

    def _decode(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.check_latent(z.shape)
        recon, coefficients = self.decode_stream(z, Stream(final=True))
        assert recon is not None
        return recon, tuple(c for c in coefficients if c is not None)

    # What fits.

    @property
    def streamable(self) -> bool:
        """Tell whether the model can work in chunks: group norm and the attention of CausalVAE v1.0 mix all frames."""
        return not any(isinstance(module, GroupNorm | AttnBlock3D) for module in self.modules())

    @property
    def frame_rule(self) -> tuple[int, int]:
        """The lengths that fit, as first and step: `first + step*k`. The first latent stands for `first` frames."""
        return 1, self.stride[0]

    def fitting_frames(self, frames: int) -> int:
        """Return the least length that fits, of so many frames or more."""
        first, step = self.frame_rule
        return first + max(-(-(frames - first) // step), 0) * step

    def latent_frames(self, frames: int) -> int:
        """Return how many latents a video of a length that fits has."""
        return -(-frames // self.stride[0])

    def check_video(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless the model takes a video of this shape and gives back the same."""
        self.check_channels(shape, 3, "video")
        frames, height, width = shape[2:]
        t, h, w = self.stride
        if frames < 1 or self.fitting_frames(frames) != frames:
            first, step = self.frame_rule
            low = first + max((frames - first) // step, 0) * step
            rule = f"use {first} + {step}k, e.g. {low} or {low + step}"
            raise ValueError(f"{frames} frames do not fit stride {t}: {rule}.")
        if height % h or width % w or not height or not width:
            raise ValueError(f"{height}x{width} pixels do not fit stride {h}x{w}: use multiples of {h} and {w}.")

    def check_latent(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless the model decodes latents of this shape."""
        self.check_channels(shape, self.latent_channels, "latent")
        if 0 in shape:
            raise ValueError(f"a latent of shape {tuple(shape)} is empty: give at least one frame and one position.")

    @staticmethod
    def check_channels(shape: Sequence[int], channels: int, what: str) -> None:
        """Raise ValueError unless the shape is `(B, channels, T, H, W)`."""
        if len(shape) != 5 or shape[1] != channels:
            raise ValueError(f"a {what} of shape {tuple(shape)} does not fit: use (B, {channels}, T, H, W).")

    # Weights.

    def prefixes(self, part: str) -> tuple[str, ...]:
        """Return how the names of a part's weights begin; the halves include the layers beside the latents."""
        return tuple(self.official_prefix + name for name in HALVES[part]) if part in HALVES else (f"{part}.",)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters in the order of the official optimizer: the decoder's, then the encoder's."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return [p for name, p in sorted(named, key=lambda item: item[0].startswith("encoder."))]

    def channels_last(self) -> Self:
        """Lay out the kernels as the activations are, which saves a conversion in every call; return the model.

        Values stay; but safetensors, for one, saves contiguous tensors only (`save_official` sees to that).
        """
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for parameter in self.parameters():
            if parameter.ndim in formats:
                parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
        return self

    @torch.no_grad()
    def initialize(self, scheme: Literal["default", "fan_in"] = "default") -> None:
        """Draw new weights.

        `default` is torch's own. `fan_in` draws every convolution from N(0, 1 / fan-in) and starts with a small
        posterior variance (log-variance near -6): short runs learn several dB faster.
        """
        if scheme not in ("default", "fan_in"):
            raise ConfigError(f"init {scheme!r} is unknown: use default or fan_in.")
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            if scheme == "fan_in" and isinstance(module, nn.Conv2d | nn.Conv3d):
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
        if scheme == "fan_in":
            moments = self.moments_layer
            assert moments.bias is not None
            moments.weight[self.latent_channels :] *= 0.1
            moments.bias[self.latent_channels :] = -6.0

    @property
    @abstractmethod
    def moments_layer(self) -> nn.Conv2d | nn.Conv3d:
        """The layer that gives mean and log-variance."""

    def official_config(self) -> dict[str, Any]:
        """Return the content of the official config.json."""
        return {"_class_name": self.official_name, **self.extra, **self.config}

    # Normalised latents, for a model that generates them.

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Store the per-channel statistics of the latents of a data set; a checkpoint keeps them."""
        if not len(mean) == len(std) == self.latent_channels:
            raise ValueError(
                f"{len(mean)} means and {len(std)} deviations do not fit {self.latent_channels} latent channels: "
                "give one of each per channel."
            )
        self.statistics = {"mean": [float(v) for v in mean], "std": [float(v) for v in std]}

    def normalize(self, z: Tensor) -> Tensor:
        """Bring latents to zero mean and unit variance per channel."""
        mean, std = self._statistics(z)
        return (z - mean) / std

    def denormalize(self, z: Tensor) -> Tensor:
        """Undo `normalize`."""
        mean, std = self._statistics(z)
        return z * std + mean

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.statistics is not None:
            mean, std = self.statistics["mean"], self.statistics["std"]
        else:  # the official config: (z - shift) * scale
            mean, scale = self.config["shift"], self.config["scale"]
            if not len(mean) == len(scale) == self.latent_channels or 0 in scale:
                raise ConfigError(
                    f"scale and shift have {len(scale)} and {len(mean)} values for {self.latent_channels} latent "
                    "channels, none may be missing or a scale of 0: measure them with praxino-encode stats_only=true, "
                    "or call set_statistics."
                )
            std = [1 / v for v in scale]
        pair = torch.tensor([mean, std], dtype=z.dtype, device=z.device)
        return pair[0].view(1, -1, 1, 1, 1), pair[1].view(1, -1, 1, 1, 1)


class TakesVideo(Protocol):
    """A network, or its training, that says which videos it takes."""

    @property
    def stride(self) -> tuple[int, int, int]: ...

    def check_video(self, shape: Sequence[int]) -> None: ...


def check_clip(net: TakesVideo, frames: int, size: Any, batch: int = 1) -> None:
    """Make sure that clips of the data, of a size in pixels, [height, width] or None for any, fit the model."""
    height, width = size if isinstance(size, list | tuple) else (size or net.stride[1], size or net.stride[2])
    try:
        net.check_video((batch, 3, frames, height, width))
    except ValueError as error:
        raise ConfigError(f"frames={frames} size={size}: {error}") from error


def describe(vae: VideoVAE) -> dict[str, Any]:
    """Return the "praxino" block of a checkpoint of this model, all but the run's own `config` and `step`."""
    head = header("vae", vae, {**vae.extra, **vae.config})
    return {**head, "stride": list(vae.stride), "statistics": vae.statistics}
