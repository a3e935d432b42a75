"""The adversarial game: by hand where it can be worked out, and the switches of `Adversary`."""

import math

import pytest
import torch
from torch import nn

from praxino.errors import ConfigError
from praxino.losses.adversarial import (
    Adversary,
    adaptive_weight,
    hinge_discriminator,
    lecam,
    linear_generator,
    nonsaturating_generator,
    r1_penalty,
    vanilla_discriminator,
)

REAL, FAKE = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])


class Linear(nn.Module):
    """Logits of every clip: the product with one weight; it remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1, 1))
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach())
        return (self.taps * x).sum(dim=1, keepdim=True)


def clips() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, 3, 4, 4), torch.randn(2, 3, 3, 4, 4)


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def test_losses_by_hand():
    assert float(hinge_discriminator(REAL, FAKE)) == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 2) / 2))
    vanilla = 0.5 * ((softplus(-2) + softplus(-0.5)) / 2 + (softplus(-3) + softplus(1)) / 2)
    assert float(vanilla_discriminator(REAL, FAKE)) == pytest.approx(vanilla)
    assert float(linear_generator(FAKE)) == 1.0
    assert float(nonsaturating_generator(FAKE)) == pytest.approx((softplus(3) + softplus(-1)) / 2)
    passed = (2 - 0.25) ** 2 + (0.5 - 0.25) ** 2 + (0.75 + 3) ** 2  # the fake logit 1 lies above the real mean
    assert float(lecam(REAL, FAKE, torch.tensor(0.75), torch.tensor(0.25))) == pytest.approx(passed / 2)


def test_half_precision_counts_in_float32():
    real, fake = torch.full((70000,), 2.0, dtype=torch.bfloat16), torch.full((70000,), 1.0, dtype=torch.bfloat16)
    for value in (hinge_discriminator(real, fake), vanilla_discriminator(real, fake), linear_generator(fake)):
        assert value.dtype == torch.float32
    assert hinge_discriminator(real.double(), fake.double()).dtype == torch.float64


def test_r1_of_a_linear_discriminator_is_its_squared_weight():
    net, (x, _) = Linear(), clips()
    x.requires_grad_()
    penalty = r1_penalty(net(x), x)
    assert float(penalty.detach()) == pytest.approx((1 + 4 + 0.25) * 3 * 4 * 4)
    penalty.backward()
    torch.testing.assert_close(net.taps.grad, 2 * 48 * net.taps.detach())


def test_adaptive_weight():
    a, b = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([0.0, 2.0])
    ratio = adaptive_weight(a, b, 0.5, 100.0)
    assert float(ratio) == 2.0
    assert not ratio.requires_grad
    assert float(adaptive_weight(a, torch.zeros(2), 1e-4, 1e4)) == 1e4
    assert float(adaptive_weight(torch.zeros(2), b, 1e-4, 1e4)) == 0.0


@pytest.mark.parametrize(("adaptive", "largest"), [("wfvae", 1e6), ("opensora", 1e4)])
def test_weights_of_the_references(adaptive, largest):
    adversary = Adversary(Linear(), weight=0.25, adaptive=adaptive)
    assert float(adversary.weigh(torch.tensor([10.0]), torch.tensor([1.0]))) == pytest.approx(2.5, rel=2e-4)
    assert float(adversary.weigh(torch.tensor([1e3]), torch.tensor([0.0]))) == pytest.approx(0.25 * largest)
    with pytest.raises(ValueError, match="needs both gradients"):
        adversary.weigh()
    assert float(Adversary(Linear(), weight=0.25, adaptive=None).weigh()) == 0.25


@pytest.mark.parametrize(
    ("start", "warmup", "expected"),
    [(0, 0, [1, 1, 1, 1, 1]), (2, 0, [0, 0, 1, 1, 1]), (1, 4, [0, 0.25, 0.5, 0.75, 1]), (3, 1, [0, 0, 0, 1, 1])],
)
def test_factor(start, warmup, expected):
    adversary = Adversary(Linear(), start=start, warmup=warmup)
    assert [adversary.factor(step) for step in range(5)] == expected
    assert adversary.factor(100) == 1.0


@pytest.mark.parametrize("loss", ["hinge", "vanilla", "nonsaturating"])
def test_a_step_of_the_discriminator(loss):
    net, (x, recon) = Linear(), clips()
    recon.requires_grad_()
    adversary = Adversary(net, loss=loss)
    terms = adversary.discriminator_loss(x, recon, step=0)
    assert [torch.equal(a, b) for a, b in zip(net.seen, (x, recon), strict=True)] == [True, True]  # real first
    assert list(terms) == ["loss", loss, "real", "fake", "accuracy"]
    real, fake = net(x).detach(), net(recon).detach()
    assert torch.equal(terms["real"], real.mean())
    assert torch.equal(terms["fake"], fake.mean())
    right = torch.cat((real > 0, fake < 0)).float().mean()
    assert float(terms["accuracy"]) == pytest.approx(float(right))
    assert float(terms["loss"].detach()) == float(terms[loss])
    terms["loss"].backward()
    assert recon.grad is None
    assert not x.requires_grad
    with torch.no_grad():
        net.taps -= 0.01 * net.taps.grad
    assert adversary.discriminator_loss(x, recon, step=0)[loss] < terms[loss]


def test_before_the_start_nothing_is_learned():
    net, (x, recon) = Linear(), clips()
    terms = Adversary(net, start=5, warmup=2).discriminator_loss(x, recon, step=4)
    terms["loss"].backward()
    assert float(terms["loss"].detach()) == 0.0
    assert float(terms["hinge"]) > 0.0
    assert not net.taps.grad.any()
    half = Adversary(net, start=5, warmup=2).discriminator_loss(x, recon, step=5)
    assert float(half["loss"].detach()) == pytest.approx(0.5 * float(half["hinge"]))


def test_r1_comes_every_so_many_updates_and_counts_as_many_times():
    net, (x, recon) = Linear(), clips()
    adversary = Adversary(net, r1=10.0, r1_every=4)
    assert ["r1" in adversary.discriminator_loss(x, recon, step) for step in range(6)] == [
        True,
        *[False] * 3,
        True,
        False,
    ]
    turns = [adversary.discriminator_loss(x, recon, step=2 * n + 1, update=n) for n in range(5)]
    assert ["r1" in terms for terms in turns] == [True, False, False, False, True]
    expected = turns[0]["hinge"] + 0.5 * 10 * 4 * turns[0]["r1"]
    torch.testing.assert_close(turns[0]["loss"].detach(), expected)
    turns[0]["loss"].backward()
    assert not x.requires_grad
    assert x.grad is None


def test_lecam_pulls_towards_the_running_means():
    net, (x, recon) = Linear(), clips()
    adversary = Adversary(net, lecam=0.5)
    for _ in range(2):
        adversary.observe(torch.tensor(1.0), torch.tensor(-2.0))
    assert float(adversary.real_mean) == pytest.approx(1 - 0.99**2)
    assert float(adversary.fake_mean) == pytest.approx(-2 * (1 - 0.99**2))
    terms = adversary.discriminator_loss(x, recon, step=0)
    expected = lecam(net(x), net(recon), adversary.real_mean, adversary.fake_mean).detach()
    assert torch.equal(terms["lecam"], expected)
    torch.testing.assert_close(terms["loss"].detach(), terms["hinge"] + 0.5 * expected)
    other = Adversary(Linear(), lecam=0.5)
    other.load_state_dict(adversary.state_dict())
    assert torch.equal(other.fake_mean, adversary.fake_mean)


def test_the_generator_learns_through_a_frozen_discriminator():
    net, (_, recon) = Linear(), clips()
    recon.requires_grad_()
    adversary = Adversary(net).requires_grad_(False)
    loss, logits = adversary.generator_loss(recon), net(recon).detach()
    assert torch.equal(loss, -logits.mean())
    loss.backward()
    torch.testing.assert_close(recon.grad, (-net.taps / logits.numel()).expand_as(recon))
    assert net.taps.grad is None
    saturating = Adversary(net, loss="nonsaturating").generator_loss(recon)
    assert torch.equal(saturating, nonsaturating_generator(logits))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "wgan"}, "hinge, vanilla, nonsaturating"),
        ({"adaptive": "ldm"}, "wfvae, opensora, or null"),
        ({"weight": -1.0}, "weight=-1.0"),
        ({"start": -1}, "start=-1"),
        ({"r1": float("nan")}, "r1=nan"),
        ({"r1_every": 0}, "r1_every=0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        Adversary(Linear(), **settings)
