"""The adversarial game: losses of both players, their regularisation, and the weight against reconstruction."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from praxino.errors import ConfigError
from praxino.losses.pixel import full

Kind = Literal["hinge", "vanilla", "nonsaturating"]

# epsilon and largest value of the adaptive weight in the two references; Open-Sora-Plan has LDM's
ADAPTIVE = {"wfvae": (1e-6, 1e6), "opensora": (1e-4, 1e4)}
LECAM_DECAY = 0.99


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Return the hinge loss of the discriminator: real logits above 1, others below -1 cost nothing."""
    return 0.5 * (F.relu(1 - full(real)).mean() + F.relu(1 + full(fake)).mean())


def vanilla_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Return half the cross entropy of both: the discriminator's loss in the vanilla and the non-saturating game."""
    return 0.5 * (F.softplus(-full(real)).mean() + F.softplus(full(fake)).mean())


def linear_generator(fake: Tensor) -> Tensor:
    """Return minus the mean logit: the generator's loss in the references, beside hinge and vanilla alike."""
    return -full(fake).mean()


def nonsaturating_generator(fake: Tensor) -> Tensor:
    """Return -log D(fake) (Goodfellow et al. 2014), whose gradient fades where the discriminator is fooled."""
    return F.softplus(-full(fake)).mean()


DISCRIMINATOR = {
    "hinge": hinge_discriminator,
    "vanilla": vanilla_discriminator,
    "nonsaturating": vanilla_discriminator,
}
GENERATOR = {"hinge": linear_generator, "vanilla": linear_generator, "nonsaturating": nonsaturating_generator}


def r1_penalty(logits: Tensor, real: Tensor) -> Tensor:
    """Return the mean over the batch of the squared gradient of the summed logits (Mescheder et al. 2018).

    `real` `(B, ...)` must have required its gradient when the logits were computed.
    """
    (gradient,) = torch.autograd.grad(full(logits).sum(), real, create_graph=True)
    return full(gradient).square().flatten(1).sum(dim=1).mean()


def lecam(real: Tensor, fake: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """Return the LeCam regularisation: logits that pass the running mean of the other side (Tseng et al. 2021)."""
    return F.relu(full(real) - fake_mean).square().mean() + F.relu(real_mean - full(fake)).square().mean()


def adaptive_weight(
    reconstruction_gradient: Tensor, adversarial_gradient: Tensor, epsilon: float, largest: float
) -> Tensor:
    """Return the ratio of the two gradients' norms, at most `largest`: both terms then pull equally hard."""
    ratio = full(reconstruction_gradient).norm() / (full(adversarial_gradient).norm() + epsilon)
    return ratio.clamp(0.0, largest).detach()


class Adversary(nn.Module):
    """A discriminator with everything the game needs.

    Args:
        weight: of the generator's adversarial loss.
        adaptive: multiply it by the ratio of the gradients at the last layer, with the constants of this reference.
        start: the step at which the game begins; the discriminator's own loss is 0 before it, too.
        warmup: steps over which `factor` rises to 1 from there.
        alternate: for the training step: the players take turns, as in the published code; else both use every batch.
        lecam: weight of the LeCam regularisation, e.g. 0.001.
        r1: weight of the gradient penalty on real videos, e.g. 10; halved, as usual.
        r1_every: updates from one penalty to the next, which counts as many times.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(
        self,
        discriminator: nn.Module,
        loss: Kind = "hinge",
        weight: float = 0.5,
        adaptive: Literal["wfvae", "opensora"] | None = "wfvae",
        start: int = 0,
        warmup: int = 0,
        alternate: bool = False,
        lecam: float = 0.0,
        r1: float = 0.0,
        r1_every: int = 16,
    ) -> None:
        super().__init__()
        if loss not in DISCRIMINATOR:
            raise ConfigError(f"adversarial loss {loss!r} is unknown: use one of {', '.join(DISCRIMINATOR)}.")
        if adaptive is not None and adaptive not in ADAPTIVE:
            raise ConfigError(f"adaptive {adaptive!r} is unknown: use one of {', '.join(ADAPTIVE)}, or null.")
        for name, value in (("weight", weight), ("start", start), ("warmup", warmup), ("lecam", lecam), ("r1", r1)):
            if not value >= 0:
                raise ConfigError(f"{name}={value} does not fit an adversarial loss: use 0 or more.")
        if r1_every < 1:
            raise ConfigError(f"r1_every={r1_every} does not fit an adversarial loss: use 1 or more.")
        self.discriminator = discriminator
        self.loss, self.weight, self.adaptive = loss, weight, adaptive
        self.start, self.warmup, self.alternate = start, warmup, alternate
        self.lecam, self.r1, self.r1_every = lecam, r1, r1_every
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def factor(self, step: int) -> float:
        """Return the share of the game at this step: 0 before its start, rising over the warm-up, then 1."""
        if step < self.start:
            return 0.0
        return min((step - self.start + 1) / max(self.warmup, 1), 1.0)

    def generator_loss(self, recon: Tensor) -> Tensor:
        """Return the generator's loss, unweighted; the caller freezes the discriminator."""
        return GENERATOR[self.loss](self.discriminator(recon))

    def weigh(self, nll_gradient: Tensor | None = None, adversarial_gradient: Tensor | None = None) -> Tensor:
        """Return the weight of the generator's loss; gradients at the last layer, needed where it is adaptive.

        On several ranks both gradients must be averaged before, or every rank weighs differently.
        """
        if self.adaptive is None:
            return torch.full_like(self.real_mean, self.weight)
        if nll_gradient is None or adversarial_gradient is None:
            raise ValueError(
                f"the adaptive weight ({self.adaptive}) needs both gradients: give them, or adaptive=None."
            )
        return self.weight * adaptive_weight(nll_gradient, adversarial_gradient, *ADAPTIVE[self.adaptive])

    def discriminator_loss(self, x: Tensor, recon: Tensor, step: int, update: int | None = None) -> dict[str, Tensor]:
        """Return "loss", to be minimised, and what it is made of, unweighted.

        "real" and "fake" are mean logits, "accuracy" is the share of patches that were judged right. `update` counts
        the discriminator's own updates, for `r1_every`; it is `step` unless the players take turns.
        """
        penalised = self.r1 > 0 and (step if update is None else update) % self.r1_every == 0
        x, recon = x.detach(), recon.detach()
        real = self.discriminator(x.requires_grad_() if penalised else x)
        fake = self.discriminator(recon)
        terms = {
            self.loss: DISCRIMINATOR[self.loss](real, fake),
            "real": full(real).mean(),
            "fake": full(fake).mean(),
            "accuracy": 0.5 * (full(real > 0).mean() + full(fake < 0).mean()),
        }
        loss = terms[self.loss]
        if self.lecam:
            terms["lecam"] = lecam(real, fake, self.real_mean, self.fake_mean)
            loss = loss + self.lecam * terms["lecam"]
        if penalised:
            terms["r1"] = r1_penalty(real, x)
            loss = loss + 0.5 * self.r1 * self.r1_every * terms["r1"]
        logged = {name: term.detach() for name, term in terms.items()}
        return {"loss": self.factor(step) * loss, **logged}

    @torch.no_grad()
    def observe(self, real: Tensor, fake: Tensor) -> None:
        """Move LeCam's running means towards these mean logits, which must be the same on all ranks."""
        for mean, logit in ((self.real_mean, real), (self.fake_mean, fake)):
            mean.lerp_(torch.where(logit.isfinite(), logit.to(mean), mean), 1 - LECAM_DECAY)
