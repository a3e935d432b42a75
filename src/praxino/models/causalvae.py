"""CausalVAE: the video autoencoder of Open-Sora-Plan v1.0, v1.1 and v1.2 (OD-VAE, arXiv 2409.01199).

The constructor's arguments are the keys of the official config.json, and the state dict is the official one, key for
key. Every level names its parts, so that one class holds all three layouts.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from praxino.errors import ConfigError
from praxino.models.vae import Piece, VideoVAE
from praxino.ops import resample
from praxino.ops.attention import AttnBlock3D, AttnBlock3DFix
from praxino.ops.blocks import ResnetBlock, ResnetBlock2D, ResnetBlock3D
from praxino.ops.causal import CausalConv3d, Chain, FrameConv, Stream
from praxino.ops.norm import NormType, make_norm, norm_silu

CONVS = {"CausalConv3d": CausalConv3d, "Conv2d": FrameConv}
ATTENTIONS = {"AttnBlock3D": AttnBlock3D, "AttnBlock3DFix": AttnBlock3DFix}
BLOCKS: dict[str, type[ResnetBlock]] = {"ResnetBlock3D": ResnetBlock3D, "ResnetBlock2D": ResnetBlock2D}
SPACE_DOWN = ("Downsample", "SpatialDownsample2x")
SPACE_UP = ("Upsample", "SpatialUpsample2x")
TIME_DOWN = ("TimeDownsample2x", "TimeDownsampleRes2x")
TIME_UP = ("TimeUpsample2x", "TimeUpsampleRes2x")
BOTH_DOWN = ("Spatial2xTime2x3DDownsample",)
BOTH_UP = ("Spatial2xTime2x3DUpsample",)
WITHOUT_WEIGHTS = ("TimeDownsample2x", "TimeUpsample2x")
CHOICES = {  # of every part, the names that are known
    "q_conv": tuple(CONVS),
    "conv_in": tuple(CONVS),
    "conv_out": tuple(CONVS),
    "attention": tuple(ATTENTIONS),
    "mid_resnet": tuple(BLOCKS),
    "resnet_blocks": tuple(BLOCKS),
    "spatial_downsample": ("", *SPACE_DOWN, *BOTH_DOWN),
    "temporal_downsample": ("", *TIME_DOWN),
    "spatial_upsample": ("", *SPACE_UP, *BOTH_UP),
    "temporal_upsample": ("", *TIME_UP),
    "norm_type": ("groupnorm", "layernorm", "framenorm"),
}
PLAIN = (str, int, float)
ALL_3D = ("ResnetBlock3D",) * 4


@dataclass(frozen=True)
class Layout:
    """What one half is made of, in official names; sequences have one entry a level, the highest resolution first."""

    widths: Sequence[int]
    blocks: int  # a level
    dropout: float
    norm_type: NormType
    conv_in: str
    conv_out: str
    attention: str
    mid_resnet: str
    resnet_blocks: Sequence[str]
    spatial: Sequence[str]
    temporal: Sequence[str]

    def block(self, kind: str, channels: int, out: int) -> ResnetBlock:
        """Build a residual block."""
        return BLOCKS[kind](channels, out, self.dropout, self.norm_type)

    def level(self, i: int, channels: int, names: tuple[str, str]) -> Chain:
        """Chain the blocks of a level and what resamples it in space and in time, where there is any."""
        width, kind = self.widths[i], self.resnet_blocks[i]
        parts = {"block": Chain(*(self.block(kind, width if j else channels, width) for j in range(self.blocks)))}
        for name, resampling in zip(names, (self.spatial[i], self.temporal[i]), strict=True):
            if resampling:
                build: Callable[..., Any] = getattr(resample, resampling)
                parts[name] = build() if resampling in WITHOUT_WEIGHTS else build(width)
        return Chain(OrderedDict(parts))

    def middle(self) -> Chain:
        """Chain two blocks with attention between them, at the lowest resolution."""
        width = self.widths[-1]
        block = partial(self.block, self.mid_resnet, width, width)
        attention = ATTENTIONS[self.attention](width, self.norm_type)
        return Chain(OrderedDict({"block_1": block(), "attn_1": attention, "block_2": block()}))


class Encoder(nn.Module):
    """Video to moments."""

    def __init__(self, layout: Layout, out_channels: int) -> None:
        super().__init__()
        widths = layout.widths
        inputs = (widths[0], *widths[:-1])
        self.conv_in = CONVS[layout.conv_in](3, inputs[0])
        names = ("downsample", "time_downsample")
        self.down = Chain(*(layout.level(i, channels, names) for i, channels in enumerate(inputs)))
        self.mid = layout.middle()
        self.norm_out = make_norm(layout.norm_type, widths[-1])
        self.conv_out = CONVS[layout.conv_out](widths[-1], out_channels)

    def forward(self, x: Tensor | None, stream: Stream) -> Tensor | None:
        h = self.down(self.conv_in(x, stream), stream)  # (B, C, t, H/8, W/8)
        h = self.mid(h, stream)
        return None if h is None else self.conv_out(norm_silu(self.norm_out, h, stream), stream)


class Decoder(nn.Module):
    """Latents to video; its levels are numbered as the encoder's and run backwards."""

    def __init__(self, layout: Layout, in_channels: int) -> None:
        super().__init__()
        widths = layout.widths
        self.conv_in = CONVS[layout.conv_in](in_channels, widths[-1])
        self.mid = layout.middle()
        names = ("upsample", "time_upsample")
        inputs = (*widths[1:], widths[-1])
        self.up = nn.ModuleList(layout.level(i, channels, names) for i, channels in enumerate(inputs))
        self.norm_out = make_norm(layout.norm_type, widths[0])
        self.conv_out = CONVS[layout.conv_out](widths[0], 3)

    def forward(self, z: Tensor | None, stream: Stream) -> Tensor | None:
        h = self.mid(self.conv_in(z, stream), stream)  # (B, C, t, H/8, W/8)
        for level in reversed(self.up):
            h = level(h, stream)
        return None if h is None else self.conv_out(norm_silu(self.norm_out, h, stream), stream)


class CausalVAE(VideoVAE):
    """CausalVAE, 4x8x8 as published; the layout decides.

    `attn_resolutions`, `double_z` and `resolution` are kept for the official files and take their published values
    alone. A `norm_type` without statistics over time streams exactly: `layernorm`, or `framenorm` (group norm of each
    frame alone). Published weights have `groupnorm`.
    """

    official_name = "CausalVAEModel"
    unused_keys = ("lr", "loss_type", "loss_params")

    def __init__(
        self,
        hidden_size: int = 128,
        z_channels: int = 4,
        hidden_size_mult: Sequence[int] = (1, 2, 4, 4),
        attn_resolutions: Sequence[int] = (),
        dropout: float = 0.0,
        resolution: int = 256,
        double_z: bool = True,
        embed_dim: int = 4,
        num_res_blocks: int = 2,
        q_conv: str = "CausalConv3d",
        encoder_conv_in: str = "CausalConv3d",
        encoder_conv_out: str = "CausalConv3d",
        encoder_attention: str = "AttnBlock3D",
        encoder_resnet_blocks: Sequence[str] = ALL_3D,
        encoder_spatial_downsample: Sequence[str] = (*["SpatialDownsample2x"] * 3, ""),
        encoder_temporal_downsample: Sequence[str] = ("", *["TimeDownsample2x"] * 2, ""),
        encoder_mid_resnet: str = "ResnetBlock3D",
        decoder_conv_in: str = "CausalConv3d",
        decoder_conv_out: str = "CausalConv3d",
        decoder_attention: str = "AttnBlock3D",
        decoder_resnet_blocks: Sequence[str] = ALL_3D,
        decoder_spatial_upsample: Sequence[str] = ("", *["SpatialUpsample2x"] * 3),
        decoder_temporal_upsample: Sequence[str] = ("", "", *["TimeUpsample2x"] * 2),
        decoder_mid_resnet: str = "ResnetBlock3D",
        use_quant_layer: bool = True,
        norm_type: NormType = "groupnorm",
        scale: Sequence[float] = (0.18215, 0.18215, 0.18215, 0.18215),
        shift: Sequence[float] = (0, 0, 0, 0),
    ) -> None:
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__({name: value if isinstance(value, PLAIN) else list(value) for name, value in config.items()})
        check_config(self.config)
        widths = [hidden_size * factor for factor in hidden_size_mult]
        self.stride = stride_of(encoder_spatial_downsample, encoder_temporal_downsample)
        self.latent_channels = embed_dim if use_quant_layer else z_channels
        self.encoder = Encoder(
            Layout(
                widths,
                num_res_blocks,
                dropout,
                norm_type,
                encoder_conv_in,
                encoder_conv_out,
                encoder_attention,
                encoder_mid_resnet,
                encoder_resnet_blocks,
                encoder_spatial_downsample,
                encoder_temporal_downsample,
            ),
            2 * z_channels,
        )
        self.decoder = Decoder(
            Layout(
                widths,
                num_res_blocks + 1,
                dropout,
                norm_type,
                decoder_conv_in,
                decoder_conv_out,
                decoder_attention,
                decoder_mid_resnet,
                decoder_resnet_blocks,
                decoder_spatial_upsample,
                decoder_temporal_upsample,
            ),
            z_channels,
        )
        quant, outwards, inwards = CONVS[q_conv], (2 * z_channels, 2 * embed_dim, 1), (embed_dim, z_channels, 1)
        self.quant_conv = quant(*outwards) if use_quant_layer else None
        self.post_quant_conv = quant(*inwards) if use_quant_layer else None

    def push_encoder(self, x: Tensor | None, stream: Stream) -> Piece:
        h = self.encoder(x, stream)
        return Piece(h if self.quant_conv is None else self.quant_conv(h, stream), ())

    def push_decoder(self, z: Tensor | None, stream: Stream) -> Piece:
        h = z if self.post_quant_conv is None else self.post_quant_conv(z, stream)
        return Piece(self.decoder(h, stream), ())

    @property
    def last_layer(self) -> Tensor:
        return inner(self.decoder.conv_out).weight

    @property
    def moments_layer(self) -> nn.Conv2d | nn.Conv3d:
        return inner(self.encoder.conv_out if self.quant_conv is None else self.quant_conv)

    def fixed_filters(self) -> dict[str, Tensor]:
        return {}

    def trainable_parameters(self) -> list[nn.Parameter]:
        halves = (self.post_quant_conv, self.decoder, self.quant_conv, self.encoder)
        return [p for part in halves if part is not None for p in part.parameters() if p.requires_grad]


def inner(conv: CausalConv3d | FrameConv) -> nn.Conv2d | nn.Conv3d:
    """Return the module that holds the weights."""
    return conv.conv if isinstance(conv, CausalConv3d) else conv


def stride_of(spatial: Sequence[str], temporal: Sequence[str]) -> tuple[int, int, int]:
    """Return by what the levels divide (or multiply) T, H and W."""
    time = sum(name in (*BOTH_DOWN, *BOTH_UP) for name in spatial) + sum(map(bool, temporal))
    space = sum(map(bool, spatial))
    return 2**time, 2**space, 2**space


def check_config(config: dict[str, Any]) -> None:
    """Raise ConfigError for values that make no model."""
    for key in ("hidden_size", "z_channels", "embed_dim", "num_res_blocks"):
        if config[key] < 1:
            raise ConfigError(f"{key}={config[key]} does not fit: use 1 or more.")
    levels = len(config["hidden_size_mult"])
    if not levels or min(config["hidden_size_mult"]) < 1:
        raise ConfigError(f"hidden_size_mult={config['hidden_size_mult']} does not fit: use factors of 1 or more.")
    for key, value in config.items():
        part = key.removeprefix("encoder_").removeprefix("decoder_")
        if part not in CHOICES:
            continue
        names = value if isinstance(value, list) else [value]
        for name in names:
            if name not in CHOICES[part]:
                known = " or ".join(choice or '""' for choice in CHOICES[part])
                raise ConfigError(f"{key} {name!r} is unknown: use {known}.")
        if isinstance(value, list) and len(value) != levels:
            raise ConfigError(f"{key} has {len(value)} entries for the {levels} of hidden_size_mult: use one a level.")
    if config["attn_resolutions"]:
        raise ConfigError(
            f"attn_resolutions={config['attn_resolutions']} is not supported: use [], as every published model has."
        )
    if not config["double_z"]:
        raise ConfigError("double_z=False leaves no room for the variance of the latents: use true.")
    down = stride_of(config["encoder_spatial_downsample"], config["encoder_temporal_downsample"])
    up = stride_of(config["decoder_spatial_upsample"], config["decoder_temporal_upsample"])
    if down != up:
        raise ConfigError(
            f"the encoder divides T, H, W by {down}, the decoder multiplies them by {up}: "
            "name as many upsamplings as downsamplings."
        )
