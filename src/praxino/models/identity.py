"""An autoencoder that does nothing, so that a denoiser works on pixels."""

import torch
from torch import Tensor, nn

from praxino.errors import ConfigError
from praxino.models.vae import Piece, VideoVAE
from praxino.ops.causal import Stream

LOGVAR = -30.0  # of the posterior: a deviation of 3e-7


class IdentityVAE(VideoVAE):
    """Pixels as latents: three channels, every length and size, nothing to train."""

    official_name = "IdentityVAE"

    def __init__(self) -> None:
        super().__init__({})
        self.stride = (1, 1, 1)
        self.latent_channels = 3
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # tells device and type, as other models' do
        self.set_statistics([0.0] * 3, [1.0] * 3)

    def push_encoder(self, x: Tensor | None, stream: Stream) -> Piece:
        return Piece(None if x is None else torch.cat((x, torch.full_like(x, LOGVAR)), dim=1), ())

    def push_decoder(self, z: Tensor | None, stream: Stream) -> Piece:
        return Piece(z, ())

    @property
    def last_layer(self) -> Tensor:
        raise ConfigError("IdentityVAE has no layers, so nothing can be trained: choose another model.net.")

    @property
    def moments_layer(self) -> nn.Conv3d:
        raise ConfigError("IdentityVAE has no layers to initialise: use init: default.")

    def fixed_filters(self) -> dict[str, Tensor]:
        return {}
