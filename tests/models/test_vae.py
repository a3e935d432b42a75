import math
import re

import pytest
import torch

from praxino import __version__
from praxino.errors import ConfigError
from praxino.models.vae import Posterior, describe
from praxino.models.wfvae import WFVAE

TINY = {
    "latent_dim": 3,
    "base_channels": 8,
    "encoder_num_resblocks": 1,
    "encoder_energy_flow_hidden_size": 4,
    "decoder_num_resblocks": 1,
    "decoder_energy_flow_hidden_size": 4,
    "norm_type": "layernorm",
}


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return WFVAE(**TINY).eval()


def test_posterior_clamps_before_it_exponentiates():
    moments = torch.tensor([0.5, 1.0, -1.0, 100.0, -100.0, 0.0]).view(1, 6, 1, 1, 1)
    posterior = Posterior(moments)
    assert posterior.mean.flatten().tolist() == [0.5, 1.0, -1.0]
    assert posterior.logvar.flatten().tolist() == [20.0, -30.0, 0.0]
    torch.testing.assert_close(posterior.std.flatten(), torch.tensor([math.exp(10), math.exp(-15), 1.0]))
    kl = [0.5 * (m * m + math.exp(v) - 1 - v) for m, v in ((0.5, 20), (1.0, -30), (-1.0, 0))]
    torch.testing.assert_close(posterior.kl().flatten(), torch.tensor(kl))
    assert torch.equal(posterior.mode(), posterior.mean)


def test_samples_follow_the_posterior_and_the_generator():
    moments = torch.cat((torch.full((1, 2, 9, 32, 32), 3.0), torch.full((1, 2, 9, 32, 32), math.log(4.0))), dim=1)
    posterior = Posterior(moments)
    a, b = (posterior.sample(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, posterior.sample(torch.Generator().manual_seed(6)))
    assert a.mean().item() == pytest.approx(3.0, abs=0.1)
    assert a.std().item() == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 8, 8), "16 frames do not fit stride 4: use 1 + 4k, e.g. 13 or 17."),
        ((1, 3, 2, 8, 8), "2 frames do not fit stride 4: use 1 + 4k, e.g. 1 or 5."),
        ((1, 3, 0, 8, 8), "0 frames do not fit stride 4"),
        ((1, 3, 5, 12, 8), "12x8 pixels do not fit stride 8x8: use multiples of 8 and 8."),
        ((1, 4, 5, 8, 8), "a video of shape (1, 4, 5, 8, 8) does not fit: use (B, 3, T, H, W)."),
        ((3, 5, 8, 8), "use (B, 3, T, H, W)"),
    ],
)
def test_what_does_not_fit_is_refused(shape, message, vae):
    with pytest.raises(ValueError, match=re.escape(message)):
        vae.encode(torch.zeros(shape))


def test_bytes_are_refused(vae):
    with pytest.raises(ValueError, match=r"a video of torch.uint8 does not fit: use floats in \[-1, 1\]"):
        vae.encode(torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8))


def test_latents_that_do_not_fit_are_refused(vae):
    with pytest.raises(ValueError, match=r"use \(B, 3, T, H, W\)"):
        vae.decode(torch.zeros(1, 4, 1, 1, 1))
    with pytest.raises(ValueError, match="is empty"):
        vae.decode(torch.zeros(1, 3, 0, 1, 1))


@torch.no_grad()
def test_forward_gives_what_the_losses_need(vae):
    x = torch.rand(2, 3, 5, 16, 24) * 2 - 1
    a, b = (vae(x, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert a.recon.shape == x.shape
    assert torch.equal(a.recon, b.recon)
    assert torch.equal(a.recon, vae.decode(a.posterior.sample(torch.Generator().manual_seed(1))))
    assert torch.equal(vae(x, sample=False).recon, vae.decode(vae.encode(x).mode()))
    shapes = [c.shape for c in a.encoder_coefficients]
    assert shapes == [c.shape for c in a.decoder_coefficients] == [(2, 12, 3, 4, 6), (2, 24, 2, 2, 3)]


def test_fan_in_initialisation():
    torch.manual_seed(0)
    vae = WFVAE(**TINY)
    default = {key: value.clone() for key, value in vae.state_dict().items()}
    vae.initialize("fan_in")
    weight = vae.decoder.mid[0].conv1.conv.weight
    assert weight.std().item() * math.sqrt(weight[0].numel()) == pytest.approx(1.0, abs=0.05)
    assert not torch.equal(weight, default["decoder.mid.0.conv1.conv.weight"])
    out = vae.encoder.conv_out.conv
    mean, logvar = out.weight.chunk(2)
    assert logvar.std().item() == pytest.approx(0.1 * mean.std().item(), rel=0.1)
    assert out.bias[3:].tolist() == [-6.0] * 3
    logvar = vae.encode(torch.rand(1, 3, 1, 16, 16)).logvar
    assert logvar.mean().item() == pytest.approx(-6.0, abs=0.5)
    assert all(torch.equal(vae.state_dict()[key], default[key]) for key in vae.fixed_filters())
    with pytest.raises(ConfigError, match="init 'xavier' is unknown: use default or fan_in"):
        vae.initialize("xavier")


def test_initialisation_follows_the_seed():
    vae, states = WFVAE(**TINY), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        vae.initialize("default")
        states.append(vae.decoder.conv_out.weight.clone())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_statistics(vae):
    z = torch.randn(2, 3, 2, 2, 2)
    vae = WFVAE(**TINY | {"scale": [2.0, 4.0, 5.0], "shift": [1.0, 0.0, -1.0]})
    expected = torch.stack([(z[:, 0] - 1) * 2, z[:, 1] * 4, (z[:, 2] + 1) * 5], dim=1)
    torch.testing.assert_close(vae.normalize(z), expected)
    vae.set_statistics([1.0, 2.0, 3.0], [0.5, 1.0, 2.0])
    expected = torch.stack([(z[:, 0] - 1) / 0.5, z[:, 1] - 2, (z[:, 2] - 3) / 2], dim=1)
    torch.testing.assert_close(vae.normalize(z), expected)
    torch.testing.assert_close(vae.denormalize(vae.normalize(z)), z)
    with pytest.raises(ValueError, match="2 means and 2 deviations do not fit 3 latent channels"):
        vae.set_statistics([0.0, 0.0], [1.0, 1.0])


def test_wrong_official_statistics_are_not_applied(vae):
    assert len(vae.config["scale"]) == 4  # the official default, for any number of channels
    with pytest.raises(ConfigError, match="call set_statistics"):
        vae.normalize(torch.zeros(1, 3, 1, 1, 1))


def test_description_rebuilds_the_model(vae):
    block = describe(vae)
    assert block["kind"] == "vae"
    assert block["version"] == __version__
    assert block["stride"] == [4, 8, 8]
    assert block["statistics"] is None
    assert block["model"]["class"] == "praxino.models.wfvae.WFVAE"
    again = WFVAE(**block["model"]["config"])
    assert list(again.state_dict()) == list(vae.state_dict())
    assert again.config == vae.config
