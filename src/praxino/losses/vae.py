"""The loss of a video autoencoder: a weighted sum of means per element."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from praxino.errors import ConfigError
from praxino.losses.coefficients import coefficient_l1
from praxino.losses.pixel import charbonnier, full, l1, l2


class Reconstruction(Protocol):
    """What the loss needs of an autoencoder's output; `posterior` has `mean` and clamped `logvar`."""

    recon: Tensor
    posterior: Any
    encoder_coefficients: Sequence[Tensor]
    decoder_coefficients: Sequence[Tensor]


class VAELoss(nn.Module):
    """Reconstruction, wavelet coefficients and KL, weighted.

    Args:
        l1, l2, charbonnier: weights of the pixel losses, which may be summed.
        wavelet: weight of the coefficients' L1; 0 for networks that have none.
        kl: weight of the KL divergence from the standard normal, per latent element.
        epsilon: of Charbonnier, in units of the pixel range [-1, 1].
    """

    def __init__(
        self,
        l1: float = 1.0,
        l2: float = 0.0,
        charbonnier: float = 0.0,
        wavelet: float = 0.1,
        kl: float = 1e-6,
        epsilon: float = 1e-3,
    ) -> None:
        super().__init__()
        self.weights = {"l1": l1, "l2": l2, "charbonnier": charbonnier, "wavelet": wavelet, "kl": kl}
        self.epsilon = epsilon
        if min(self.weights.values()) < 0 or not any(self.weights[name] for name in ("l1", "l2", "charbonnier")):
            raise ConfigError(f"loss weights {self.weights}: none may be negative, and one pixel loss must count")

    def forward(self, x: Tensor, output: Reconstruction) -> dict[str, Tensor]:
        """Return every term that has a weight, unweighted, and their weighted sum "loss", all scalars.

        Video `x` and `output.recon` are `(B, C, T, H, W)` in [-1, 1].
        """
        terms = {name: self.term(name, x, output) for name, weight in self.weights.items() if weight}
        loss = sum((self.weights[name] * term for name, term in terms.items()), start=full(x).new_zeros(()))
        return {"loss": loss, **terms}

    def term(self, name: str, x: Tensor, output: Reconstruction) -> Tensor:
        """Return one unweighted term; a new term (perceptual, adversarial) is a weight above and a case here."""
        match name:
            case "l1":
                return l1(x, output.recon)
            case "l2":
                return l2(x, output.recon)
            case "charbonnier":
                return charbonnier(x, output.recon, self.epsilon)
            case "wavelet":
                return coefficient_l1(output.encoder_coefficients, output.decoder_coefficients)
            case "kl":
                return kl(output.posterior.mean, output.posterior.logvar)
            case _:
                raise ValueError(f"unknown loss term {name!r}: use one of {sorted(self.weights)}.")


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the mean divergence of N(mean, exp(logvar)) from N(0, 1) per element, in nats, at least in float32."""
    mean, logvar = full(mean), full(logvar)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
