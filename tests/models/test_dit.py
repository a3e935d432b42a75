"""The video diffusion transformer."""

import math
import warnings

import pytest
import torch
from torch.utils import checkpoint

from praxino.errors import ConfigError
from praxino.models.conditioning import Condition
from praxino.models.denoiser import describe
from praxino.models.dit import Attention, VideoDiT
from praxino.ops import sdpa
from praxino.ops.position import rotary_table, rotate, share

OPTIONS = {
    "plain": {},
    "factorised": {"attention": "factorised"},
    "causal": {"attention": "causal"},
    "factorised causal": {"attention": "factorised_causal"},
    "parallel": {"block": "parallel", "mlp": "swiglu", "text_width": 5},
    "parallel factorised": {"block": "parallel", "attention": "factorised", "adaln": "shared"},
    "seed": {"num_kv_heads": 1, "qk_dim": 6, "v_dim": 10, "mlp_width": 20, "block": "parallel"},
    "grouped": {"num_kv_heads": 2, "v_dim": 3},
    "shared": {"adaln": "shared", "mlp": "swiglu"},
    "patches": {"patch": (2, 2, 2), "attention": "causal"},
    "conditions": {"classes": 3, "text_width": 5},
}


def make(trained=True, dtype=torch.float32, **options):
    """A small net; `trained` gives every weight a value, as training would."""
    torch.manual_seed(0)
    net = VideoDiT(**{"channels": 3, "width": 32, "depth": 2, "num_heads": 4, "patch": (1, 2, 2)} | options).to(dtype)
    if trained:
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2 if p.ndim < 2 else 1.5 * p.shape[1] ** -0.5)
    return net.eval()


def inputs(net, frames=3, height=4, width=6, batch=2, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, net.channels, frames, height, width, generator=g, dtype=dtype)
    t = torch.rand(batch, frames, generator=g, dtype=dtype)
    cond = Condition(known=torch.rand(batch, frames, generator=g) < 0.5)
    if net.classes:
        cond = Condition(known=cond.known, label=torch.arange(batch) % net.classes)
    if net.text_width:
        text = torch.randn(batch, 4, net.text_width, generator=g, dtype=dtype)
        mask = torch.arange(4) < torch.arange(1, batch + 1)[:, None]
        cond = Condition(known=cond.known, label=cond.label, text=text, text_mask=mask)
    return z, t, cond


# --------------------------------------------------------------------------------------------- initialisation
@pytest.mark.parametrize("name", OPTIONS)
def test_adaln_zero_is_zero(name):
    """Every block is the identity and the prediction zero, bit for bit, whatever the condition."""
    net = make(trained=False, **OPTIONS[name])
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append(torch.equal(args[0], out)))
    z, t, cond = inputs(net)
    assert not net(z, t, cond).any()
    assert seen == [True, True]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_learns(name):
    """Adam moves every weight within four steps from the closed gates of the initialisation."""
    net = make(trained=False, **OPTIONS[name]).train()
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(4):
        z, t, cond = inputs(net, frames=4, batch=4, seed=step)
        if step % 2:  # both the labels and the null label
            cond = cond.without({"label"})
        optimizer.zero_grad()
        (net(z, t, cond) - z.roll(1, 2)).square().mean().backward()
        optimizer.step()
    assert [key for key, p in net.named_parameters() if torch.equal(p, before[key])] == []


def test_initialize_again_closes_the_gates():
    net = make(**OPTIONS["conditions"])
    z, t, cond = inputs(net)
    assert net(z, t, cond).abs().max() > 0.1
    net.initialize()
    assert not net(z, t, cond).any()
    assert all((p == 1).all() for key, p in net.named_parameters() if key.endswith("_norm.weight"))


# -------------------------------------------------------------------------------------------------- attention
def plain_attention(layer, x, table):
    """Token by token: who may read whom, and the weighted mean of what is read."""
    batch, frames, tokens = x.shape[:3]
    q, k, v = layer.qkv(x).split(layer.sizes, dim=-1)
    q, k, v = (y.unflatten(-1, (-1, d)) for y, d in ((q, layer.qk_dim), (k, layer.qk_dim), (v, layer.v_dim)))

    def norm(y, weight):
        return rotate(y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight, table)

    q, k = norm(q, layer.q_norm.weight), norm(k, layer.k_norm.weight)
    heads, groups = q.shape[3], q.shape[3] // k.shape[3]
    out = x.new_zeros(batch, frames, tokens, heads, layer.v_dim)
    for b in range(batch):
        for f in range(frames):
            for n in range(tokens):
                read = [
                    (g, m)
                    for g in range(frames)
                    for m in range(tokens)
                    if (layer.reach != "space" or g == f)
                    and (layer.reach != "time" or m == n)
                    and not (layer.causal and g > f)
                ]
                for h in range(heads):
                    scores = torch.stack([q[b, f, n, h] @ k[b, g, m, h // groups] for g, m in read])
                    weights = (scores / math.sqrt(layer.qk_dim)).softmax(0)
                    out[b, f, n, h] = sum(w * v[b, g, m, h // groups] for w, (g, m) in zip(weights, read, strict=True))
    return layer.out(out.flatten(3))


@pytest.mark.parametrize("heads", [(2, 2, 6, 6), (4, 1, 6, 5), (4, 2, 4, 7)], ids=["plain", "one", "grouped"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reach", ["all", "space", "time"])
def test_attention_is_a_plain_one(reach, causal, heads, monkeypatch):
    torch.manual_seed(0)
    layer = Attention(8, *heads, reach, causal).double()
    torch.nn.init.uniform_(layer.q_norm.weight, 0.5, 2)
    torch.nn.init.uniform_(layer.k_norm.weight, 0.5, 2)
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    axes = {"all": (0, 1, 2), "space": (1, 2), "time": (0,)}[reach]
    table = rotary_table((3, 2, 2), share(heads[2], axes), dtype=torch.float64)
    with torch.no_grad():
        expected = plain_attention(layer, x, table)
        torch.testing.assert_close(layer(x, table), expected, rtol=0, atol=1e-12)
        monkeypatch.setattr(sdpa, "LOOP", 0)  # a call for every frame in place of a mask
        torch.testing.assert_close(layer(x, table), expected, rtol=0, atol=1e-12)


def test_kernels_in_another_order_change_nothing(monkeypatch):
    q, k, v = (torch.randn(2, 2, 8, 16) for _ in range(3))
    expected = sdpa.attend(q, k, v)
    with torch.nn.attention.sdpa_kernel(sdpa.BACKENDS, set_priority=True):
        torch.testing.assert_close(sdpa.attend(q, k, v), expected)


@pytest.mark.parametrize("name", ["causal", "factorised causal", "patches"])
def test_no_frame_sees_a_later_one(name):
    net = make(**OPTIONS[name])
    z, t, cond = inputs(net, frames=6)
    y = net(z, t, cond)
    changed = z.clone()
    changed[:, :, 4] += 1
    later = t.clone()
    later[:, 4] = 1 - later[:, 4]
    moved = (net(changed, later, cond) - y).abs().amax(dim=(0, 1, 3, 4))
    assert not moved[:4].any()
    assert (moved[4:] > 1e-3).all()


@pytest.mark.parametrize("name", ["plain", "factorised"])
def test_every_frame_sees_every_other(name):
    net = make(**OPTIONS[name])
    z, t, cond = inputs(net, frames=4)
    for frame in range(4):
        changed = z.clone()
        changed[:, :, frame] += 1
        assert ((net(changed, t, cond) - net(z, t, cond)).abs().amax(dim=(0, 1, 3, 4)) > 1e-4).all()


# ------------------------------------------------------------------------------------------------------ cache
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("loop", [0, 256])
@pytest.mark.parametrize("name", ["causal", "factorised causal", "patches"])
@torch.no_grad()
def test_frames_in_pieces_equal_the_whole(name, loop, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(sdpa, "LOOP", loop)
    net = make(dtype=dtype, num_kv_heads=2, **OPTIONS[name])
    z, t, cond = inputs(net, frames=8, dtype=dtype)
    whole, cache, parts = net(z, t, cond), net.new_cache(), []
    for start, stop in ((0, 2), (2, 6), (6, 8)):
        piece = slice(start, stop)
        args = t[:, piece], Condition(known=cond.known[:, piece]), cache, start
        cache.keep = False
        net(torch.randn_like(z[:, :, piece]), *args)  # a step of a solver, which leaves no trace
        cache.keep = True
        parts.append(net(z[:, :, piece], *args))
    assert (cache.frames, cache.end) == (8, 8)
    scale = whole.abs().max()
    assert (torch.cat(parts, dim=2) - whole).abs().max() < tolerance * scale


@torch.no_grad()
def test_a_trimmed_cache_holds_the_newest_frames():
    net = make(attention="causal", depth=1, dtype=torch.float64)
    z, t, _ = inputs(net, frames=6, dtype=torch.float64)
    cache = net.new_cache()
    net(z[:, :, :5], t[:, :5], None, cache)
    held = cache.layers[0].k.numel()
    cache.trim(2)
    assert cache.frames == 2
    assert cache.layers[0].k.numel() == held * 2 // 5
    y = net(z[:, :, 5:], t[:, 5:], None, cache, 5)
    # one layer: the same as a clip that begins with the two frames kept
    torch.testing.assert_close(y, net(z[:, :, 3:], t[:, 3:], None, None, 3)[:, :, 2:], rtol=0, atol=1e-12)


def test_what_cannot_be_cached_is_refused():
    z = torch.zeros(1, 3, 2, 4, 4)
    with pytest.raises(ConfigError, match="VideoDiT is not causal"):
        make().new_cache()
    net = make(patch=(2, 2, 2), attention="causal")
    cache = net.new_cache()
    net(z, torch.zeros(1), None, cache)
    with pytest.raises(ValueError, match="start=0 does not follow the cached frames: use 2"):
        net(z, torch.zeros(1), None, cache)
    with pytest.raises(ValueError, match="1 frames cannot be cached: use a positive multiple of 2"):
        net(z[:, :, :1], torch.zeros(1), None, cache, 2)
    with pytest.raises(ValueError, match="3 frames cannot be cached"):
        cache.trim(3)
    with pytest.raises(ValueError, match="start=1 is inside a token of 2 frames"):
        net(z, torch.zeros(1), None, None, 1)
    with pytest.raises(ConfigError, match="not causal"):
        make()(z, torch.zeros(1), None, cache)


# ------------------------------------------------------------------------------------------------- conditions
def test_a_level_of_the_clip_is_that_of_every_frame():
    for patch in ((1, 2, 2), (2, 2, 2)):
        net = make(patch=patch)
        z, t, cond = inputs(net, frames=5)
        torch.testing.assert_close(net(z, t[:, 0], cond), net(z, t[:, :1].expand(-1, 5), cond), rtol=0, atol=1e-5)


def test_conditions_matter_and_can_be_dropped():
    net = make(**OPTIONS["conditions"])
    z, t, cond = inputs(net)
    y = net(z, t, cond)
    assert net.kinds == {"label", "text"}
    for kind, gone in (("label", {"label": None}), ("text", {"text": None, "text_mask": None})):
        missing = net(z, t, Condition(**{**cond.given(), **gone}))
        assert (missing - y).abs().max() > 1e-3
        torch.testing.assert_close(net(z, t, cond.without({kind})), missing, rtol=0, atol=1e-5)
    half = net(z, t, cond.drop({"label", "text"}, torch.tensor([True, False])))
    torch.testing.assert_close(half[1], y[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(half[0], net(z, t, Condition(known=cond.known))[0], rtol=0, atol=1e-5)


def test_masked_words_do_not_matter():
    net = make(**OPTIONS["conditions"])
    z, t, cond = inputs(net)
    text = torch.where(cond.text_mask[..., None], cond.text, 7.0)
    other = Condition(cond.known, None, cond.label, text, cond.text_mask)
    torch.testing.assert_close(net(z, t, other), net(z, t, cond), rtol=0, atol=0)


def test_marks_of_given_frames_and_of_the_first():
    net = make()
    z, t, _ = inputs(net)
    y = net(z, t)
    none, every = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    assert torch.equal(net(z, t, Condition(known=torch.zeros(2, 3, dtype=torch.bool))), y)
    assert torch.equal(net(z, t, Condition(first=every)), y)
    assert (net(z, t, Condition(first=none)) - y).abs().max() > 1e-3
    assert (net(z, t, Condition(known=torch.ones(2, 3, dtype=torch.bool))) - y).abs().max() > 1e-3
    later = net(z, t, Condition(first=none))
    torch.testing.assert_close(net(z, t, None, None, 5), later, rtol=0, atol=1e-4)  # places are relative


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, z, t: net(z[:, :2], t), r"latents of shape \(2, 2, 3, 4, 6\) do not fit: use \(B, 3, T, H, W\)"),
        (lambda net, z, t: net(z, t[:, :2]), r"noise levels of shape \(2, 2\) do not fit: use \(2,\) or \(2, 3\)"),
        (lambda net, z, t: net(z, t, Condition(label=torch.zeros(2).long())), "takes no label: .* with classes"),
        (lambda net, z, t: net(z, t, Condition(text=torch.zeros(2, 1, 5))), "takes no text: .* with text_width"),
        (
            lambda net, z, t: net(z, t, Condition(first=torch.ones(3) > 0)),
            r"first of shape \(3,\) does not fit: use \(2,",
        ),
        (
            lambda net, z, t: make(text_width=5)(z, t, Condition(text=torch.zeros(2, 4, 6))),
            r"text of shape \(2, 4, 6\) does not fit: use \(2, 4, 5\)",
        ),
    ],
)
def test_inputs_that_do_not_fit(call, message):
    net = make()
    with pytest.raises(ValueError, match=message):
        call(net, *inputs(net)[:2])


# ------------------------------------------------------------------------------------------------------ shapes
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 6), (3, 5, 7), (4, 1, 9), (5, 2, 2)])
@pytest.mark.parametrize("name", ["plain", "factorised", "patches"])
def test_any_shape(name, shape):
    net = make(**OPTIONS[name])
    z, t, cond = inputs(net, *shape)
    y = net(z, t, cond)
    assert y.shape == z.shape
    assert y.isfinite().all()


def test_patches_and_back():
    """With an identity for every layer the latents come back, each in its place."""
    net = make(trained=False, channels=2, width=4 * 2 * 2 * 3, num_heads=4, depth=1, patch=(2, 2, 3))
    torch.nn.init.zeros_(net.embed.weight)
    torch.nn.init.eye_(net.embed.weight[:, : net.head.out_features])  # channels come first, then the marks
    z = torch.randn(2, 2, 3, 5, 7)
    x, grid = net.tokens(net.mark(z, Condition(), 0))
    assert grid == (2, 3, 3)
    assert torch.equal(net.latents(x[..., : net.head.out_features], grid, z), z)


def test_batches_are_independent():
    net = make(**OPTIONS["conditions"])
    z, t, cond = inputs(net, batch=3)
    order = [2, 0, 1]
    moved = Condition(**{name: value[order] for name, value in cond.given().items()})
    torch.testing.assert_close(net(z[order], t[order], moved), net(z, t, cond)[order], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- training
def test_dropout_is_honoured():
    z, t, cond = inputs(make())
    still = make().train()
    assert torch.equal(still(z, t, cond), still(z, t, cond))
    for block in ("sequential", "parallel"):
        noisy = make(dropout=0.5, block=block).train()
        assert not torch.equal(noisy(z, t, cond), noisy(z, t, cond))
        noisy.eval()
        assert torch.equal(noisy(z, t, cond), make(block=block)(z, t, cond))


@pytest.mark.parametrize("name", ["conditions", "factorised causal", "seed"])
def test_bfloat16(name):
    """Under autocast and as a type of the weights: no warning, nearly the same numbers, the type of the latents."""
    net = make(**OPTIONS[name])
    z, t, cond = inputs(net)
    y = net(z, t, cond)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", torch.bfloat16):
            half = net(z, t, cond)
            half.square().mean().backward()
        whole = net.bfloat16()(z, t, cond)
    for other in (half, whole):
        assert other.dtype == torch.float32
        assert (other - y).norm() < 0.05 * y.norm()


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        net = make(**OPTIONS["conditions"])
        if recompute:
            for block in net.blocks:
                run = block.forward
                block.forward = lambda *args, run=run: checkpoint.checkpoint(run, *args, use_reentrant=False)
        z, t, cond = inputs(net)
        net(z, t, cond).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conditions", "factorised causal", "seed"])
def test_compiled_blocks(name):
    net, twin = make(**OPTIONS[name]), make(**OPTIONS[name])
    for block in twin.blocks:
        block.compile(fullgraph=True)
    z, t, cond = inputs(net)
    y = net(z, t, cond)
    torch.testing.assert_close(twin(z, t, cond), y, rtol=1e-4, atol=1e-4)
    y.square().mean().backward()
    twin(z, t, cond).square().mean().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4)
    assert twin.state_dict().keys() == net.state_dict().keys()


# ------------------------------------------------------------------------------------------------------- figures
def test_flops_are_those_of_the_formula():
    """Two a multiplication: linear layers by their weights, attention 2 N^2 (d + e) a head."""
    net = make(**OPTIONS["seed"])
    tokens, batch = 3 * 2 * 3, 2
    sizes = {key: p.numel() for key, p in net.named_parameters() if p.ndim == 2}
    once = sum(n for key, n in sizes.items() if key.startswith("time") or "modulation" in key)
    linear = batch * (once + tokens * (sum(sizes.values()) - once))
    attention = batch * net.config["depth"] * 4 * tokens**2 * (6 + 10)
    assert net.flops((batch, 3, 3, 4, 6)) == 2 * (linear + attention)


def test_a_description_rebuilds_the_net():
    net = make(**OPTIONS["seed"])
    block = describe(net)
    assert block["kind"] == "denoiser"
    assert block["model"]["class"] == "praxino.models.dit.VideoDiT"
    assert all(isinstance(v, int | float | str | list | None) for v in block["model"]["config"].values())
    twin = VideoDiT(**block["model"]["config"]).eval()
    twin.load_state_dict(net.state_dict())
    z, t, cond = inputs(net)
    assert torch.equal(twin(z, t, cond), net(z, t, cond))
    with torch.device("meta"):
        assert VideoDiT(**block["model"]["config"]).state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide width=32"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"qk_dim": 7}, "qk_dim=7 cannot be rotated"),
        ({"patch": (2, 2)}, "use three sizes"),
        ({"depth": 0}, "depth=0 does not fit: use 1 or more"),
        ({"attention": "sparse"}, "attention 'sparse' is unknown: use full or factorised or causal"),
        ({"mlp": "relu"}, "mlp 'relu' is unknown"),
    ],
)
def test_configs_that_no_net_has(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)
