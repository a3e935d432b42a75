"""Pretrained autoencoders of diffusers behind `VideoVAE`: the arithmetic is diffusers' own, the contract is ours.

Of diffusers' own options none is touched: no slicing, no spatial tiles. Its HunyuanVideo works in overlapping windows
of 17 frames from 17 frames on, as published; `vae.model.use_framewise_encoding = False` (and `_decoding`) ends that.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from praxino.errors import ConfigError
from praxino.models.vae import Piece, VideoVAE
from praxino.ops.causal import Stream, fold, unfold

NO_NOISE = -30.0  # log-variance of a posterior that is a point; the least that `Posterior` knows
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of attention, before 2023


class Family:
    """An autoencoder of diffusers that takes 1 + s*k frames at once, and says its ratios itself."""

    streamable = False

    def build(self, cls: Callable[..., Any], options: dict[str, Any]) -> Any:
        """Construct the model, on the default device."""
        return cls(**options)

    def stride(self, model: Any) -> tuple[int, int]:
        """Return the ratios in time and space."""
        return int(model.temporal_compression_ratio), int(model.spatial_compression_ratio)

    def frame_rule(self, stride: int) -> tuple[int, int]:
        """Return the lengths that fit, as first and step."""
        return 1, stride

    def colours(self, model: Any) -> int:
        """Return the number of output channels of a model for RGB."""
        return 3

    def encode(self, model: Any, x: Tensor) -> Tensor:
        """Return the moments `(B, 2C, t, h, w)` of whole videos."""
        return model.encode(x).latent_dist.parameters

    def decode(self, model: Any, z: Tensor) -> Tensor:
        """Return whole videos."""
        return model.decode(z).sample


class Wan(Family):
    """Wan 2.1 (4x8x8) and 2.2 (4x16x16, on patches of 2x2 pixels); diffusers always takes four frames at a time."""

    def stride(self, model: Any) -> tuple[int, int]:
        config = model.config
        time = 2 ** sum(config.temperal_downsample)
        if time > 4:
            raise ConfigError(
                f"temperal_downsample {list(config.temperal_downsample)} gives {time}x: diffusers encodes four frames "
                "at a time, use two true entries at most."
            )
        return time, 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)

    def frame_rule(self, stride: int) -> tuple[int, int]:
        return 1, 4

    def colours(self, model: Any) -> int:
        return 3 * (model.config.patch_size or 1) ** 2


class CogVideoX(Family):
    """CogVideoX: of an even number of latents diffusers makes 4 frames each; the first stands for one, its last."""

    def stride(self, model: Any) -> tuple[int, int]:
        return int(model.config.temporal_compression_ratio), 2 ** (len(model.config.block_out_channels) - 1)

    def decode(self, model: Any, z: Tensor) -> Tensor:
        frames = 1 + (z.shape[2] - 1) * self.stride(model)[0]
        return model.decode(z).sample[:, :, -frames:]


class LTXVideo(Family):
    """LTX-Video; a decoder that denoises gets the timestep 0 of diffusers' pipeline, which adds no noise to latents.

    Versions 0.9.1 and later may inject noise inside of the decoder: then it is random, seeded by torch's generator.
    """

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return model.decode(z, z.new_zeros(len(z)) if model.config.timestep_conditioning else None).sample


class Cosmos(Family):
    """Cosmos: the posterior is a point."""

    def build(self, cls: Callable[..., Any], options: dict[str, Any]) -> Any:
        with torch.device("cpu"):  # it makes wavelets that no file holds
            return cls(**options)

    def stride(self, model: Any) -> tuple[int, int]:
        return model.config.temporal_compression_ratio, model.config.spatial_compression_ratio

    def encode(self, model: Any, x: Tensor) -> Tensor:
        mean = super().encode(model, x)
        return torch.cat((mean, torch.full_like(mean, NO_NOISE)), dim=1)


class Allegro(Family):
    """Allegro, which is not causal: 4k frames, a picture is shown four times.

    diffusers runs it in overlapping tiles only, of 24 frames and 320x320 pixels, and needs sizes that these cover
    exactly. Here it is one tile of any size.
    """

    def stride(self, model: Any) -> tuple[int, int]:
        return model.config.temporal_compression_ratio, int(model.spatial_compression_ratio)

    def frame_rule(self, stride: int) -> tuple[int, int]:
        return stride, stride

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return unfold(model.quant_conv(fold(model.encoder(x))), len(x))

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return model.decoder(unfold(model.post_quant_conv(fold(z)), len(z)))


class PerFrame(Family):
    """An autoencoder of pictures, frame by frame."""

    streamable = True

    def stride(self, model: Any) -> tuple[int, int]:
        return 1, 2 ** (len(model.config.block_out_channels) - 1)

    def encode(self, model: Any, x: Tensor) -> Tensor:
        return unfold(super().encode(model, fold(x)), len(x))

    def decode(self, model: Any, z: Tensor) -> Tensor:
        return unfold(super().decode(model, fold(z)), len(z))


FAMILIES: dict[str, Family] = {
    "AutoencoderKL": PerFrame(),
    "AutoencoderKLAllegro": Allegro(),
    "AutoencoderKLCogVideoX": CogVideoX(),
    "AutoencoderKLCosmos": Cosmos(),
    "AutoencoderKLHunyuanVideo": Family(),
    "AutoencoderKLLTXVideo": LTXVideo(),
    "AutoencoderKLMochi": Family(),
    "AutoencoderKLWan": Wan(),
}


def find_class(name: str) -> Callable[..., Any]:
    """Return the class of diffusers, if it is one of those known here."""
    if name not in FAMILIES:
        raise ConfigError(f"class_name {name!r} is unknown: use {', '.join(FAMILIES)}.")
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError(f"{name} is a model of diffusers: pip install 'praxino[diffusers]'.") from error
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise ConfigError(f"diffusers {diffusers.__version__} has no {name}: pip install -U 'praxino[diffusers]'.")
    return cls


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a diffusers file under this model's names."""

    def modern(key: str) -> str:
        *path, last, kind = key.split(".")
        old = last in OLD_NAMES and path[-2:-1] == ["attentions"]
        return ".".join([*path, OLD_NAMES[last] if old else last, kind])

    return {ForeignVAE.official_prefix + (modern(key) if "." in key else key): value for key, value in state.items()}


class ForeignVAE(VideoVAE):
    """A pretrained autoencoder of diffusers.

    Args:
        class_name: one of `FAMILIES`.
        options: the model's own config.json, without `_class_name` and its like.
    """

    official_prefix = "model."

    def __init__(self, class_name: str, options: dict[str, Any]) -> None:
        super().__init__({"class_name": class_name, "options": dict(options)})
        cls, self.family = find_class(class_name), FAMILIES[class_name]
        self.official_name = class_name
        try:
            self.model = self.family.build(cls, dict(options))
        except TypeError as error:
            raise ConfigError(f"{error}: use the config.json of the weights, and a diffusers that knows it.") from error
        if self.model.config.out_channels != self.family.colours(self.model):
            raise ConfigError(f"out_channels {self.model.config.out_channels} is not RGB: give a model for RGB.")
        time, space = self.family.stride(self.model)
        self.stride = (time, space, space)
        self.latent_channels = self.model.config.get("latent_channels") or self.model.config.z_dim

    def official_config(self) -> dict[str, Any]:
        return {"_class_name": self.official_name, **self.extra, **self.config["options"]}

    @property
    def frame_rule(self) -> tuple[int, int]:
        return self.family.frame_rule(self.stride[0])

    @property
    def streamable(self) -> bool:
        return self.family.streamable

    def checkpoint_activations(self) -> None:
        """Compute blocks again in the backward pass, where diffusers' class can; raises ConfigError where not."""
        if not getattr(self.model, "_supports_gradient_checkpointing", False):
            raise ConfigError(f"checkpoint_activations: {self.official_name} of diffusers cannot: leave it off")
        self.model.enable_gradient_checkpointing()

    def push_encoder(self, x: Tensor | None, stream: Stream) -> Piece:
        return self.push(self.family.encode, x, stream)

    def push_decoder(self, z: Tensor | None, stream: Stream) -> Piece:
        return self.push(self.family.decode, z, stream)

    def push(self, call: Callable[[Any, Tensor], Tensor], x: Tensor | None, stream: Stream) -> Piece:
        """Encode or decode a whole video, or a piece of one where frames are independent."""
        if not (self.streamable or stream.whole):
            raise ConfigError(
                f"{self.official_name} takes whole videos only: use chunk=null (the whole video at once), or "
                "overlapping tiles of frames (tile_frames, not exact)."
            )
        return Piece(None if x is None else call(self.model, x), ())

    @property
    def last_layer(self) -> Tensor:
        decoder = self.model.decoder
        layers = getattr(decoder, "conv_out", None) or decoder.proj_out  # the latter is Mochi's
        return last_of(layers, nn.Conv2d | nn.Conv3d | nn.Linear).weight

    @property
    def moments_layer(self) -> nn.Conv2d | nn.Conv3d:
        layers = getattr(self.model, "quant_conv", None) or getattr(self.model.encoder, "conv_out", None)
        if layers is None or isinstance(self.family, Cosmos):
            raise ConfigError(f"{self.official_name} has no layer for mean and log-variance: use init=default.")
        return last_of(layers, nn.Conv2d | nn.Conv3d)

    def fixed_filters(self) -> dict[str, Tensor]:
        return {}

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.statistics is not None:
            return super()._statistics(z)
        config, buffers = self.model.config, dict(self.model.named_buffers())
        mean, std = (buffers.get(name, config.get(name)) for name in ("latents_mean", "latents_std"))
        mean = (config.get("shift_factor") or 0.0) if mean is None else mean
        scale = config.get("scaling_factor") or 1.0
        return self.table(mean, z), self.table(1.0 if std is None else std, z) / scale

    def table(self, values: Any, z: Tensor) -> Tensor:
        """Lay out statistics `(1, C, 1 or t, 1, 1)`: one for all, one a channel, or Cosmos' for each latent frame."""
        table = torch.as_tensor(values, dtype=z.dtype, device=z.device).flatten()
        if table.numel() != 1 and table.numel() % self.latent_channels:
            raise ConfigError(
                f"{table.numel()} statistics do not fit {self.latent_channels} latent channels: "
                "measure the latents and call set_statistics."
            )
        table = table.expand(self.latent_channels) if table.numel() == 1 else table
        table = table.view(1, self.latent_channels, -1, 1, 1)
        if 1 < table.shape[2] < z.shape[2]:
            raise ConfigError(
                f"{self.official_name} has statistics for {table.shape[2]} latent frames, not {z.shape[2]}: "
                "use shorter clips, or measure the latents and call set_statistics."
            )
        return table[:, :, : z.shape[2]]


def last_of(layers: nn.Module, kind: Any) -> Any:
    """Return the last layer of a kind: convolutions of diffusers come bare, wrapped, or in pairs."""
    return [module for module in layers.modules() if isinstance(module, kind)][-1]
