"""Parameters, operations and memory without weights, against what a real step counts and keeps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from praxino.checkpoint import save_vae
from praxino.config import conf_dir, instantiate, plain, register_resolvers
from praxino.data.latents import LatentClip, write_manifest
from praxino.errors import ConfigError, DataError
from praxino.lit.parallel import recompute_blocks
from praxino.tasks.params import Kept, latent_shape, run

SMALL = ["model.net.base_channels=8", "model.net.encoder_energy_flow_hidden_size=8", "model.net.latent_dim=4"]
SMALL += ["model.net.decoder_energy_flow_hidden_size=8", "frames=5", "size=16", "batch=2"]


def composed(*overrides: str) -> Any:
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        return compose("params", overrides=["out=runs/test", *overrides])


def test_a_vae_costs_what_a_real_step_costs(tmp_path: Path) -> None:
    overrides = ["experiment=wfvae_tiny", *SMALL]
    result = run(composed(*overrides, f"report={tmp_path / 'params.json'}"))
    assert json.loads((tmp_path / "params.json").read_text()) == result

    module = instantiate(composed(*overrides).model)
    count = sum(p.numel() for p in module.net.parameters())
    assert result["parameters"] == sum(result["parts"].values()) == count
    video = torch.randint(256, (2, 5, 16, 16, 3), dtype=torch.uint8)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        module.net(module.to_input(video))
    kept = Kept(module)
    module.manual_backward = lambda loss: (setattr(kept, "open", False), loss.backward())
    with FlopCounterMode(display=False) as step, saved_tensors_hooks(kept.add, lambda x: x):
        module.learn({"video": video}, ("",), 1.0)
    # the counter passes over a CPU's own convolution, which the model calls where gradients are not needed
    assert forward.get_total_flops() <= result["forward_flops"]
    assert step.get_total_flops() <= result["step_flops"] <= 3.2 * result["forward_flops"]
    assert result["memory"]["activations"] == pytest.approx(kept.bytes, rel=0.05)
    assert result["memory"]["weights"] == result["memory"]["gradients"] == result["memory"]["average"] == 4 * count
    assert 8 * count <= result["memory"]["optimizer"] < 8.2 * count  # two moments, and a count a tensor


def test_a_denoiser_of_known_cost() -> None:
    overrides = ["experiment=dit_tiny", "batch=3", "frames=9", "size=64", "latent.channels=8"]
    overrides += ["latent.stride=[4,8,8]", "model.context.probability=0"]
    result = run(composed(*overrides))
    cfg = composed(*overrides)
    cfg.model.net.channels = 8
    net = instantiate(cfg.model.net)
    assert result["parameters"] == sum(result["parts"].values()) == sum(p.numel() for p in net.parameters())
    assert result["forward_flops"] == 3 * net.flops((1, 8, 3, 8, 8))
    assert 2.5 < result["step_flops"] / result["forward_flops"] < 3.5


def test_latents_are_those_of_the_cache_or_of_the_vae(tmp_path: Path) -> None:
    """Not what `latent` assumes: it is for those who have neither yet."""
    head = {"fingerprint": "f", "statistics": {}, "stride": (4, 4, 4), "channels": 6, "frame_rule": (1, 4)}
    clip = LatentClip("a.mp4", "", start=0, frames=33, fps=25.0, shape=(6, 9, 7, 5), shard=0, offset=0)
    write_manifest(tmp_path / "manifest.jsonl", {**head, "classes": None, "protocol": {}, "shards": []}, [clip])
    cached = composed("experiment=dit_tiny", f"data.root={tmp_path}", "frames=17", "model.context.probability=0")
    assert latent_shape(cached) == [6, 5, 7, 5]
    figures = run(cached)  # which sets the channels
    assert figures["forward_flops"] == cached.batch * instantiate(cached.model.net).flops((1, 6, 5, 7, 5))
    vae = instantiate({**plain(composed("model=wfvae").model.net), "base_channels": 8, "latent_dim": 4})
    save_vae(vae, tmp_path / "vae.ckpt")
    own = ["experiment=dit_tiny", f"model.vae={tmp_path / 'vae.ckpt'}"]
    assert latent_shape(composed(*own, "frames=9", "size=[40,64]")) == [4, 3, 5, 8]
    for words, message in (
        (own, r"the VAE has 4 latent channels, model.net takes 32: use model.net.channels=4"),
        (["experiment=dit_tiny", f"data.root={tmp_path}"], "use model.net.channels=6"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(composed(*words, "model.net.channels=32"))
    for word, message in (("frames=16", r"use 1 \+ 4k"), ("size=33", "use multiples of 8")):
        with pytest.raises(ConfigError, match=message):
            run(composed(*own, word))
    with pytest.raises(DataError, match=r"none of 1 clips in .* has 10 latents: use fewer frames"):
        run(composed("experiment=dit_tiny", f"data.root={tmp_path}", "frames=37"))


def test_the_channels_of_a_network_without_cache_and_vae_are_its_own() -> None:
    words = ["experiment=dit_tiny", "batch=2", "frames=9", "size=32"]
    assert run(composed(*words, "model.net.channels=32")) == run(composed(*words, "latent.channels=32"))


@pytest.mark.parametrize("experiment", ["dit_b", "dit_seed000", "unet_pixels"])
def test_shipped_experiments(experiment: str) -> None:
    cfg = composed(f"experiment={experiment}")
    assert latent_shape(cfg) == ([3, 8, 32, 32] if experiment == "unet_pixels" else [16, 5, 32, 32])
    figures = run(cfg)
    assert figures["step_flops"] > 2 * figures["forward_flops"]


@pytest.mark.parametrize(
    "overrides", [[], ["model.checkpoint_activations=true"], ["model.net.attention=factorised", "model.net.mlp=swiglu"]]
)
def test_a_denoiser_keeps_what_a_real_step_keeps(overrides: list[str]) -> None:
    """The activations are within 2 % of those that torch saves for the backward pass of a real step."""
    words = ["experiment=dit_tiny", "batch=4", "frames=17", "size=64", "latent.channels=4", *overrides]
    cfg = composed(*words, "latent.stride=[4,8,8]")
    estimate = run(composed(*words, "latent.stride=[4,8,8]"))["memory"]["activations"]
    cfg.model.net.channels = 4
    module = instantiate(cfg.model)
    if module.checkpoint_activations:
        recompute_blocks(module.net.blocks)
    kept = {"bytes": 0}
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    alive: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights | alive.keys():
            alive[storage.data_ptr()] = x
            kept["bytes"] += storage.nbytes()
        return x

    seen = {}
    module.manual_backward = lambda loss: seen.update(kept)
    batch = {"latent": torch.randn(4, 4, 5, 8, 8), "first": torch.ones(4).bool(), "index": torch.arange(4)}
    with saved_tensors_hooks(keep, lambda x: x):
        module.learn(batch, ("",), 1.0)
    assert estimate == pytest.approx(seen["bytes"], rel=0.02)


def test_what_changes_the_figures() -> None:
    base = ["experiment=dit_tiny", "batch=16", "frames=9", "size=32"]
    plain = run(composed(*base))
    spared = run(composed(*base, "model.checkpoint_activations=true"))
    assert spared["memory"]["activations"] < 0.5 * plain["memory"]["activations"]
    assert spared["step_flops"] > 1.2 * plain["step_flops"]
    half = run(composed(*base, "trainer.precision=bf16-mixed"))
    assert half["memory"]["activations"] < 0.8 * plain["memory"]["activations"]
    assert half["step_flops"] == plain["step_flops"]
    shards = run(composed(*base, "trainer=fsdp", "trainer.devices=4"))
    assert shards["memory"]["weights"] == plain["memory"]["weights"] // 4
    assert run(composed(*base, "model.accumulate=3"))["step_flops"] == 3 * plain["step_flops"]


def test_an_adversary_counts_beside_the_network() -> None:
    small = ["model.adversary.discriminator.width=8", "model.adversary.discriminator.layers=2"]
    alone = run(composed("experiment=wfvae_tiny", *SMALL))
    both = run(composed("experiment=wfvae_tiny_gan", *SMALL, *small, "model.adversary.alternate=true"))
    assert both["parameters"] == alone["parameters"]
    assert both["adversary"] > 0
    assert both["step_flops"] > alone["step_flops"] + alone["forward_flops"]  # the adversary's turn has a forward pass


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match="did you mean base_channels"):
        run(composed("experiment=wfvae_tiny", "+model.net.base_chanels=8"))
    with pytest.raises(ConfigError, match="frames"):
        run(composed("experiment=wfvae_tiny", "frames=16"))
    with pytest.raises(ConfigError, match="batch: 0"):
        run(composed("experiment=wfvae_tiny", "batch=0"))
    for word, message in (
        ("latent.stride=[4,8]", r"latent\.stride: \[4, 8\]: .* at least 3 items"),
        ("latent.stride=[4,8,0]", r"latent\.stride: .* greater than 0"),
        ("latent.channels=abc", r"^latent\.channels: 'abc': .* valid integer"),
        ("size=[64]", r"size \[64\]: use a positive number, \[height, width\]"),
        ("model.net.channels=abc", r"^model\.net\.channels: 'abc': "),
    ):
        with pytest.raises(ConfigError, match=message):
            run(composed("experiment=dit_tiny", word))
    with pytest.raises(ConfigError, match=r"use model\.net\.channels=3"):
        run(composed("experiment=unet_pixels", "model.net.channels=4"))
    for gone in ("data.root=/nowhere", "model.vae=/nowhere"):  # is not what is wrong first
        with pytest.raises(ConfigError, match="did you mean width"):
            run(composed("experiment=dit_tiny", gone, "+model.net.widht=8"))
