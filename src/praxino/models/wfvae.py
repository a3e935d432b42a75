"""WF-VAE: a causal video autoencoder with an energy flow of wavelet coefficients (arXiv 2411.17459).

The constructor's arguments are the keys of the official config.json, spelled as there, and the state dict is the
official one, key for key.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from praxino.errors import ConfigError
from praxino.models.vae import Piece, VideoVAE
from praxino.ops import wavelet
from praxino.ops.attention import AttnBlock3DFix
from praxino.ops.blocks import ResnetBlock2D, ResnetBlock3D
from praxino.ops.causal import CausalConv3d, Chain, FrameConv, Stream
from praxino.ops.norm import NormType, make_norm, norm_silu
from praxino.ops.resample import (
    Downsample,
    Interpolation,
    Spatial2xTime2x3DDownsample,
    Spatial2xTime2x3DUpsample,
    Upsample,
)

# What one level of the encoder and the decoder is made of, in the official names: in space only, or in time, too.
SPACE = ("Downsample", "HaarWaveletTransform2D", "Upsample", "InverseHaarWaveletTransform2D")
SPACE_TIME = (
    "Spatial2xTime2x3DDownsample",
    "HaarWaveletTransform3D",
    "Spatial2xTime2x3DUpsample",
    "InverseHaarWaveletTransform3D",
)
PARTS = ("dowmsample_block", "downsample_wavelet", "upsample_block", "upsample_wavelet")


def middle(first: ResnetBlock3D, last: ResnetBlock3D, width: int, attention: bool, norm_type: NormType) -> Chain:
    """Chain two blocks, with attention between them or without."""
    return Chain(first, AttnBlock3DFix(width, norm_type), last) if attention else Chain(first, last)


class Encoder(nn.Module):
    """Video to moments, and the wavelet coefficients of levels 2 and 3."""

    def __init__(
        self,
        latent_dim: int,
        base: int,
        flow: int,
        resblocks: int,
        attention: bool,
        dropout: float,
        norm_type: NormType,
        time_in_l1: bool,
    ) -> None:
        super().__init__()
        c = base
        self.down1 = Chain(
            FrameConv(24, c),
            *[ResnetBlock2D(c, c, dropout, norm_type) for _ in range(resblocks)],
            Spatial2xTime2x3DDownsample(c) if time_in_l1 else Downsample(c),
        )
        self.down2 = Chain(
            FrameConv(c + flow, 2 * c),
            *[ResnetBlock3D(2 * c, 2 * c, dropout, norm_type) for _ in range(resblocks)],
            Spatial2xTime2x3DDownsample(2 * c),
        )
        self.connect_l1 = FrameConv(24 if time_in_l1 else 12, flow)
        self.connect_l2 = FrameConv(24, flow)
        self.mid = middle(
            ResnetBlock3D(2 * c + flow, 4 * c, dropout, norm_type),
            ResnetBlock3D(4 * c, 4 * c, dropout, norm_type),
            4 * c,
            attention,
            norm_type,
        )
        self.norm_out = make_norm(norm_type, 4 * c)
        self.conv_out = CausalConv3d(4 * c, 2 * latent_dim)
        self.wavelet_transform_in = wavelet.HaarWaveletTransform3D()
        self.wavelet_transform_l1 = wavelet.HaarWaveletTransform3D() if time_in_l1 else wavelet.HaarWaveletTransform2D()
        self.wavelet_transform_l2 = wavelet.HaarWaveletTransform3D()

    def forward(self, x: Tensor | None, stream: Stream) -> Piece:
        w1 = self.wavelet_transform_in(x, stream)  # (B, 24, T', H/2, W/2)
        w2 = self.wavelet_transform_l1(low(w1), stream)  # (B, 12|24, T'|T'', H/4, W/4)
        w3 = self.wavelet_transform_l2(low(w2), stream)  # (B, 24, t, H/8, W/8)
        h = self.down1(w1, stream)  # (B, C, .., H/4, W/4), as many frames as w2
        h = join(h, self.connect_l1(w2, stream))  # (B, C + flow, ..)
        h = self.down2(h, stream)  # (B, 2C, t, H/8, W/8), as many frames as w3
        h = join(h, self.connect_l2(w3, stream))  # (B, 2C + flow, ..)
        h = self.mid(h, stream)  # (B, 4C, ..)
        if h is not None:
            h = self.conv_out(norm_silu(self.norm_out, h, stream), stream)  # (B, 2 latent, t, H/8, W/8)
        return Piece(h, (w2, w3))


class Decoder(nn.Module):
    """Latents to video, and the wavelet coefficients of levels 2 and 3 that it is built on."""

    def __init__(
        self,
        latent_dim: int,
        base: int,
        flow: int,
        resblocks: int,
        attention: bool,
        dropout: float,
        norm_type: NormType,
        t_interpolation: Interpolation,
        connect: int,
        time_in_l1: bool,
    ) -> None:
        super().__init__()

        def block(width: int, out: int) -> ResnetBlock3D:
            return ResnetBlock3D(width, out, dropout, norm_type)

        def outflow(channels: int) -> Chain:
            return Chain(*[block(flow, flow) for _ in range(connect)], FrameConv(flow, channels))

        c = base
        self.width = 4 * c
        self.conv_in = CausalConv3d(latent_dim, 4 * c)
        self.mid = middle(block(4 * c, 4 * c), block(4 * c, 4 * c + flow), 4 * c, attention, norm_type)
        self.up2 = Chain(
            *[block(4 * c, 4 * c) for _ in range(resblocks)],
            Spatial2xTime2x3DUpsample(4 * c, t_interpolation),
            block(4 * c, 4 * c + flow),
        )
        self.up1 = Chain(
            *[block(4 * c if i == 0 else 2 * c, 2 * c) for i in range(resblocks)],
            Spatial2xTime2x3DUpsample(2 * c, t_interpolation) if time_in_l1 else Upsample(2 * c),
            block(2 * c, 2 * c),
        )
        self.layer = Chain(block(2 * c, c), block(c, c))
        self.connect_l1 = outflow(24 if time_in_l1 else 12)
        self.connect_l2 = outflow(24)
        self.norm_out = make_norm(norm_type, c)
        self.conv_out = FrameConv(c, 24)
        self.inverse_wavelet_transform_out = wavelet.InverseHaarWaveletTransform3D()
        self.inverse_wavelet_transform_l1 = (
            wavelet.InverseHaarWaveletTransform3D() if time_in_l1 else wavelet.InverseHaarWaveletTransform2D()
        )
        self.inverse_wavelet_transform_l2 = wavelet.InverseHaarWaveletTransform3D()

    def forward(self, z: Tensor | None, stream: Stream) -> Piece:
        h = self.mid(self.conv_in(z, stream), stream)  # (B, 4C + flow, t, H/8, W/8)
        h, flow = self.split(h)
        w3 = self.connect_l2(flow, stream)  # (B, 24, t, H/8, W/8)
        l2 = self.inverse_wavelet_transform_l2(w3, stream)  # (B, 3, .., H/4, W/4)
        h, flow = self.split(self.up2(h, stream))  # (B, 4C + flow, .., H/4, W/4)
        w2 = self.connect_l1(flow, stream)  # (B, 12|24, .., H/4, W/4)
        w2 = add_low(w2, l2, stream, "l2")
        l1 = self.inverse_wavelet_transform_l1(w2, stream)  # (B, 3, .., H/2, W/2)
        h = self.layer(self.up1(h, stream), stream)  # (B, C, .., H/2, W/2)
        if h is not None:
            h = self.conv_out(norm_silu(self.norm_out, h, stream), stream)  # (B, 24, .., H/2, W/2)
        w1 = add_low(h, l1, stream, "l1")
        return Piece(self.inverse_wavelet_transform_out(w1, stream), (w2, w3))  # (B, 3, T, H, W)

    def split(self, h: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Part the channels that flow into the wavelet coefficients from the rest."""
        return (None, None) if h is None else (h[:, : self.width], h[:, self.width :])


def low(w: Tensor | None) -> Tensor | None:
    """Return the low band of wavelet coefficients: a video at half the size."""
    return None if w is None else w[:, :3]


def join(h: Tensor | None, flow: Tensor | None) -> Tensor | None:
    """Concatenate two branches that always bring equally many frames."""
    assert (h is None) == (flow is None)
    return None if h is None or flow is None else torch.cat((h, flow), dim=1)


def add_low(w: Tensor | None, coarse: Tensor | None, stream: Stream, name: str) -> Tensor | None:
    """Add the coarser level to the low band; it has passed no interpolation, so it may run ahead and wait."""
    coarse = stream.align(name, coarse, 0 if w is None else w.shape[2])
    if w is None:
        return None
    assert coarse is not None
    w[:, :3] += coarse
    return w


class WFVAE(VideoVAE):
    """WF-VAE, 4x8x8 or 8x8x8 (both blocks and wavelets of level 1 in space and time)."""

    official_name = "WFVAEModel"
    has_coefficients = True

    def __init__(
        self,
        latent_dim: int = 8,
        base_channels: int = 128,
        encoder_num_resblocks: int = 2,
        encoder_energy_flow_hidden_size: int = 64,
        decoder_num_resblocks: int = 2,
        decoder_energy_flow_hidden_size: int = 128,
        attention_type: Literal["AttnBlock3DFix"] = "AttnBlock3DFix",
        use_attention: bool = True,
        dropout: float = 0.0,
        norm_type: NormType = "groupnorm",
        t_interpolation: Interpolation = "nearest",
        connect_res_layer_num: int = 1,
        scale: Sequence[float] = (0.18215, 0.18215, 0.18215, 0.18215),
        shift: Sequence[float] = (0, 0, 0, 0),
        l1_dowmsample_block: str = SPACE[0],
        l1_downsample_wavelet: str = SPACE[1],
        l2_dowmsample_block: str = SPACE_TIME[0],
        l2_downsample_wavelet: str = SPACE_TIME[1],
        l1_upsample_block: str = SPACE[2],
        l1_upsample_wavelet: str = SPACE[3],
        l2_upsample_block: str = SPACE_TIME[2],
        l2_upsample_wavelet: str = SPACE_TIME[3],
    ) -> None:
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__({**config, "scale": list(scale), "shift": list(shift)})
        check_config(self.config)
        time_in_l1 = l1_dowmsample_block == SPACE_TIME[0]
        self.stride = (8 if time_in_l1 else 4, 8, 8)
        self.latent_channels = latent_dim
        self.encoder = Encoder(
            latent_dim,
            base_channels,
            encoder_energy_flow_hidden_size,
            encoder_num_resblocks,
            use_attention,
            dropout,
            norm_type,
            time_in_l1,
        )
        self.decoder = Decoder(
            latent_dim,
            base_channels,
            decoder_energy_flow_hidden_size,
            decoder_num_resblocks,
            use_attention,
            dropout,
            norm_type,
            t_interpolation,
            connect_res_layer_num,
            time_in_l1,
        )

    def push_encoder(self, x: Tensor | None, stream: Stream) -> Piece:
        return self.encoder(x, stream)

    def push_decoder(self, z: Tensor | None, stream: Stream) -> Piece:
        return self.decoder(z, stream)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    @property
    def moments_layer(self) -> nn.Conv3d:
        return self.encoder.conv_out.conv

    def fixed_filters(self) -> dict[str, Tensor]:
        constants = {
            **wavelet.filters_2d(),
            **wavelet.filters_3d(),
            **{f"{name}_conv.conv.weight": taps for name, taps in wavelet.filters_3d().items()},
        }
        return {
            f"{prefix}.{name}": constants[name]
            for prefix, module in self.named_modules()
            if isinstance(module, wavelet.TRANSFORMS)
            for name, _ in module.named_buffers()
        }


def check_config(config: dict) -> None:
    """Raise ConfigError for values that no official model has."""
    positive = ("latent_dim", "base_channels", "encoder_energy_flow_hidden_size", "decoder_energy_flow_hidden_size")
    for key in positive:
        if config[key] < 1:
            raise ConfigError(f"{key}={config[key]} does not fit: use 1 or more.")
    for key, least in (("encoder_num_resblocks", 0), ("decoder_num_resblocks", 1), ("connect_res_layer_num", 0)):
        if config[key] < least:
            raise ConfigError(f"{key}={config[key]} does not fit: use {least} or more.")
    for key, values in (
        ("attention_type", ("AttnBlock3DFix",)),
        ("norm_type", ("layernorm", "groupnorm")),
        ("t_interpolation", ("nearest", "trilinear")),
    ):
        if config[key] not in values:
            raise ConfigError(f"{key} {config[key]!r} is unknown: use {' or '.join(values)}.")
    for level, choices in (("l1", (SPACE, SPACE_TIME)), ("l2", (SPACE_TIME,))):
        keys = [f"{level}_{part}" for part in PARTS]
        given = tuple(config[key] for key in keys)
        if given not in choices:
            allowed = " or ".join(", ".join(choice) for choice in choices)
            raise ConfigError(f"{', '.join(keys)} = {', '.join(given)} do not go together: use {allowed}.")
