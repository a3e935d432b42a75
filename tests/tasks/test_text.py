"""Text from captions to samples: embedded, cached beside latents, trained on, and stressed by guidance."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from dit_run import FRAMES, SIZE, make_run, make_vae
from praxino import checkpoint, video
from praxino.config import conf_dir, register_resolvers
from praxino.data.synthetic import draw
from praxino.errors import ConfigError, DataError
from praxino.tasks.embed_text import embed_text
from praxino.tasks.encode import encode
from praxino.tasks.predict import predict
from praxino.tasks.sample import sample
from praxino.tasks.train import run

from .test_embed_text import make_encoder, table

CAPTIONS = {f"{name}.mp4": text for name, text in zip("abcdef", ["a red ball", "ball rolls"] * 3, strict=True)}
NET = ["model.net.width=32", "model.net.depth=1", "model.net.num_heads=2", "model.net.mlp_width=32"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, their latents, and the embeddings of their captions, 16 wide."""
    root = tmp_path_factory.mktemp("text")
    for seed, name in enumerate(CAPTIONS):
        video.write(root / "videos" / name, draw(0, frames=FRAMES, size=SIZE, seed=seed)[1], 8, "lossless")
    checkpoint.save_vae(make_vae(), root / "vae.ckpt")
    encode(
        str(root / "vae.ckpt"),
        {"root": str(root / "videos")},
        str(root / "latents"),
        frames=FRAMES,
        size=SIZE,
        workers=0,
        device="cpu",
    )
    encoder = str(make_encoder(root / "t5", "t5"))
    embed_text(table(root, CAPTIONS), encoder, str(root / "texts"), videos=str(root / "videos"), device="cpu")
    return root


def trained(root: Path, out: Path, *overrides: str) -> Path:
    words = [f"data.root={root / 'latents'}", f"out={out}", f"frames={FRAMES}", "batch=4", "data.workers=0"]
    words += ["trainer.accelerator=cpu", "trainer.max_steps=12", "trainer.val_check_interval=12"]
    words += ["model.context.frames=[1]", "data.val_fraction=0.2", "model.optimizer.lr=0.02"]
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        run(compose("train", overrides=["experiment=dit_tiny", *words, *overrides]))
    return out


def test_from_captions_to_samples(root: Path, tmp_path: Path) -> None:
    done = trained(root, tmp_path / "run", *NET, f"data.text={root / 'texts'}", "model.net.text_width=16")
    settings: dict[str, Any] = {"n": 1, "steps": 2, "weights": "raw", "save_latents": True, "device": "cpu"}

    def latent(name: str, **given: Any) -> torch.Tensor:
        sample(str(done), str(tmp_path / name), **settings, **given)
        return load_file(tmp_path / name / "latents" / "00000.safetensors")["latent"]

    ball, rolls = (str(root / "texts" / f"{name}.mp4.safetensors") for name in "ab")
    free, one, other = latent("free"), latent("one", text=ball), latent("other", text=rolls)
    assert (one - free).abs().max() > 1e-4
    assert (one - other).abs().max() > 1e-4
    torch.testing.assert_close(latent("ignored", text=ball, guidance=0.0), free)
    assert (latent("stressed", text=ball, guidance=4.0) - one).abs().max() > 1e-4
    assert json.loads((tmp_path / "one" / "protocol.json").read_text())["text"] == ball
    result = predict(
        str(done),
        str(root / "videos"),
        str(tmp_path / "predicted"),
        context=1,
        frames=FRAMES,
        text=ball,
        samples=1,
        steps=2,
        limit=2,
        device="cpu",
    )
    assert result["n"] == 2
    with pytest.raises(ConfigError, match=r"guidance=2 needs a condition to stress: give text="):
        latent("none", guidance=2.0)


def test_texts_and_networks_that_do_not_fit(root: Path, tmp_path: Path) -> None:
    texts, unet = f"data.text={root / 'texts'}", ["model/net=unet3d_tiny"]
    online = ["data=video", f"data.root={root / 'videos'}", f"model.vae={root / 'vae.ckpt'}", f"size={SIZE}"]
    (tmp_path / "empty").mkdir()
    save_file({"text": torch.zeros(2, 8)}, tmp_path / "empty" / "of another.safetensors")
    for overrides, match in (
        ([*unet, texts], r"data\.text=.*texts: UNet3D takes no text: leave it out, or use a DiT"),
        ([*NET, texts], r"is of width 16, model\.net takes None: use model\.net\.text_width=16"),
        ([*NET, texts, "model.net.text_width=8"], r"of width 16, model\.net takes 8"),
        ([*NET, "model.net.text_width=8"], r"text_width=8: the data have no texts: give data\.text=DIR"),
        ([*NET, f"data.text={tmp_path / 'empty'}", "model.net.text_width=8"], "praxino-embed-text makes them"),
        ([*NET, *online, "model.net.text_width=8"], "text_width=8: the data have no texts: texts need data=latents"),
    ):
        with pytest.raises(ConfigError, match=match):
            trained(root, tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_texts_that_a_run_cannot_be_given(root: Path, tmp_path: Path) -> None:
    plain = make_run(tmp_path / "plain", drop=None)
    wide = make_run(tmp_path / "wide", {"text_width": 8}, drop={"text": 0.1})
    text = str(root / "texts" / "a.mp4.safetensors")
    for ckpt, match in ((plain, "the model takes no text: leave it out"), (wide, r"the model takes \(words, 8\)")):
        with pytest.raises(ConfigError, match=match):
            sample(str(ckpt), str(tmp_path / "out"), text=text, device="cpu")
    save_file({"words": torch.zeros(2, 8)}, tmp_path / "bad.safetensors")
    for name in ("bad.safetensors", "gone.safetensors"):
        with pytest.raises(DataError, match=f"{name} cannot be read as the embedding of a text"):
            sample(str(wide), str(tmp_path / "out"), text=str(tmp_path / name), device="cpu")
