"""The 3D U-Net, and pixels in place of latents."""

import warnings

import pytest
import torch

from praxino import stream
from praxino.errors import ConfigError
from praxino.models.conditioning import Condition
from praxino.models.denoiser import describe
from praxino.models.identity import IdentityVAE
from praxino.models.unet import UNet3D


def make(trained=True, **options):
    torch.manual_seed(0)
    tiny = {"channels": 3, "width": 8, "multipliers": (1, 2), "depth": 1, "attention": (1,), "head_dim": 8}
    net = UNet3D(**tiny | options)
    if trained:
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2 if p.ndim < 2 else p[0].numel() ** -0.5)
    return net.eval()


def inputs(frames=3, height=6, width=8, batch=2, channels=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, channels, frames, height, width, generator=g)
    return z, torch.rand(batch, frames, generator=g), Condition(known=torch.rand(batch, frames, generator=g) < 0.5)


@pytest.mark.parametrize("options", [{}, {"classes": 3}, {"multipliers": (1, 2, 3), "depth": 2, "attention": ()}])
def test_it_begins_as_zero_and_everything_learns(options):
    net = make(trained=False, **options).train()
    assert not net(*inputs()).any()
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(4):
        z, t, cond = inputs(seed=step)
        if net.classes and step % 2:
            cond = Condition(known=cond.known, label=torch.tensor([1, 2]) - step // 3)
        optimizer.zero_grad()
        (net(z, t, cond) - z.roll(1, 2)).square().mean().backward()
        optimizer.step()
    assert [key for key, p in net.named_parameters() if torch.equal(p, before[key])] == []


def test_blocks_are_the_identity_where_widths_agree():
    net = make(trained=False)
    seen = []
    for block in net.blocks:
        if block.skip is None:
            block.register_forward_hook(lambda _, args, out: seen.append(torch.equal(args[0], out)))
    net(*inputs())
    assert len(seen) == 3
    assert all(seen)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (3, 5, 7), (4, 9, 2)])
def test_any_shape(shape):
    net = make(multipliers=(1, 2, 2))
    z, t, cond = inputs(*shape)
    y = net(z, t, cond)
    assert y.shape == z.shape
    assert y.isfinite().all()


def test_conditions():
    net = make(classes=3)
    z, t, cond = inputs()
    y = net(z, t)
    assert (net(z, t, cond) - y).abs().max() > 1e-3
    assert (net(z, t.flip(1)) - y).abs().max() > 1e-3
    torch.testing.assert_close(net(z, t[:, 0]), net(z, t[:, :1].expand(-1, 3)), rtol=0, atol=1e-5)
    label = Condition(label=torch.tensor([0, 2]))
    assert net.kinds == {"label"}
    assert (net(z, t, label) - y).abs().max() > 1e-3
    torch.testing.assert_close(net(z, t, label.without({"label"})), y, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="UNet3D is not causal"):
        net.new_cache()
    with pytest.raises(ValueError, match=r"this UNet3D takes no label: .* with classes"):
        make()(z, t, label)
    with pytest.raises(ValueError, match=r"this UNet3D takes no text: leave it out\.$"):
        net(z, t, Condition(text=torch.zeros(2, 1, 5)))


def test_batches_are_independent():
    net = make()
    z, t, cond = inputs(batch=3)
    order = [2, 0, 1]
    moved = net(z[order], t[order], Condition(known=cond.known[order]))
    torch.testing.assert_close(moved, net(z, t, cond)[order], rtol=0, atol=1e-5)


def test_dropout_and_bfloat16():
    net = make().train()
    z, t, cond = inputs()
    y = net(z, t, cond)
    assert torch.equal(net(z, t, cond), y)
    noisy = make(dropout=0.5).train()
    assert not torch.equal(noisy(z, t, cond), noisy(z, t, cond))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", torch.bfloat16):
            half = net(z, t, cond)
            half.square().mean().backward()
    assert half.dtype == torch.float32
    assert (half - y).norm() < 0.05 * y.norm()


def test_a_description_rebuilds_the_net():
    net = make(classes=2)
    config = describe(net)["model"]["config"]
    twin = UNet3D(**config).eval()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(*inputs()), net(*inputs()))
    convolutions = UNet3D(3, 4, (1,), 1, (), 4)
    per_place = sum(p.numel() for p in convolutions.parameters() if p.ndim == 5)
    assert convolutions.flops((1, 3, 2, 4, 4)) > 2 * per_place * 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth=0 does not fit: use 1 or more"),
        ({"multipliers": ()}, "multipliers=.* do not fit"),
        ({"attention": (2,)}, "attention=.2. does not fit: use levels from 0 to 1"),
        ({"head_dim": 7}, "qk_dim=7 cannot be rotated"),
    ],
)
def test_configs_that_no_net_has(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)(*inputs())


# ---------------------------------------------------------------------------------------------------- identity
def test_pixels_are_the_latents(tmp_path):
    vae = IdentityVAE()
    x = torch.rand(2, 3, 5, 7, 6) * 2 - 1
    posterior = vae.encode(x)
    assert torch.equal(posterior.mean, x)
    assert (posterior.sample() - x).abs().max() < 1e-5
    assert torch.equal(vae.decode(x), x)
    assert torch.equal(vae.normalize(x), x)
    assert torch.equal(vae.denormalize(x), x)
    pieces = list(stream.reconstruct(vae, [x[:, :, :2], x[:, :, 2:]], chunk=2))
    assert torch.equal(torch.cat(pieces, dim=2), x)
    vae.initialize()
    assert not [p for p in vae.parameters() if p.requires_grad]
