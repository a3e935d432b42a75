"""Samples: functions of seed and number alone, conditioned, of any length, and draws from a VAE's prior."""

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from torch import Tensor

from dit_run import FRAMES, SIZE, make_run, make_vae
from dit_training import make_net
from praxino import checkpoint, video
from praxino.config import check_call, conf_dir, register_resolvers
from praxino.diffusion.loss import DiffusionLoss
from praxino.diffusion.noise import FrameNoise
from praxino.diffusion.path import RectifiedFlow
from praxino.diffusion.time import UniformTime
from praxino.errors import CheckpointError, ConfigError
from praxino.lit.context import Context
from praxino.models.dit import VideoDiT
from praxino.tasks.generation import generate
from praxino.tasks.generation.generate import seed_of
from praxino.tasks.generation.opening import Settings, labels_of, open_generator
from praxino.tasks.sample import sample


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("plain") / "run", drop=None)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("classes") / "run", {"classes": 3})


def sampled(run: Path, out: Path, **settings: Any) -> list[Tensor]:
    given = {"n": 2, "steps": 2, "device": "cpu", "lossless": True, **settings}
    sample(ckpt=str(run), out=str(out), **given)
    return [video.read(path, index_dir=None) for path in sorted(out.glob("*.mp4"))]


def differ(a: list[Tensor], b: list[Tensor]) -> int:
    return max(int((x.int() - y.int()).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("sampler", ["heun", "ancestral"])
def test_a_sample_depends_on_seed_and_number_alone(plain: Path, tmp_path: Path, sampler: str) -> None:
    three = sampled(plain, tmp_path / "three", n=3, batch=3, sampler=sampler)
    apart = sampled(plain, tmp_path / "apart", n=2, batch=1, sampler=sampler)
    assert differ(three[:2], apart) <= 1  # rounding of floats
    assert differ(three[:1], three[1:2]) > 9
    assert differ(three[:2], sampled(plain, tmp_path / "other", seed=1, sampler=sampler)) > 9


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"shift": 0.0}, "shift of 0.0 is not positive"),
        ({"shift": float("nan")}, "shift of nan is not positive"),
        ({"fps": float("inf")}, "fps=inf"),
        ({"fps": 1e9}, "fps=1000000000.0"),
        ({"guidance": float("nan"), "label": 0}, "guidance=nan"),
    ],
)
def test_numbers_that_make_no_sense(classes: Path, tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        sampled(classes, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_what_is_written(plain: Path, tmp_path: Path) -> None:
    videos = sampled(plain, tmp_path, frames=7, fps=12, save_latents=True)
    assert [tuple(x.shape) for x in videos] == [(7, SIZE, SIZE, 3)] * 2
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["00000.mp4", "00001.mp4"]
    assert rows[1] | {"seconds": 0} == {
        "file": "00001.mp4",
        "number": 1,
        "seed": 0,
        "frames": 7,
        "size": [SIZE, SIZE],
        "label": None,
        "class": None,
        "fps": 12,
        "files": ["00001.mp4", "latents/00001.safetensors"],
        "seconds": 0,
    }
    assert video.probe(tmp_path / "00000.mp4", index_dir=None).fps == 12
    sampled(plain, tmp_path / "as trained")
    assert video.probe(tmp_path / "as trained" / "00000.mp4", index_dir=None).fps == 24
    assert (tmp_path / "sheet.png").exists()
    z = torch.stack([load_file(tmp_path / "latents" / f"0000{k}.safetensors")["latent"] for k in range(2)])
    vae = make_vae()
    with torch.no_grad():
        whole = vae.decode(vae.denormalize(z)).clamp(-1, 1)[:, :, :7]
    assert differ(list(video.to_uint8(whole)), videos) <= 1
    net, _ = checkpoint.load_denoiser(plain)
    noise = FrameNoise([seed_of(0, 0), seed_of(0, 1)], (3, 2, 2))(0, 3)
    with torch.no_grad():  # two steps of Euler
        for t in (1.0, 0.5):
            noise = noise - 0.5 * net(noise, torch.full((2,), t))
    torch.testing.assert_close(z, noise, atol=1e-5, rtol=1e-5)
    (tmp_path / "samples.jsonl").unlink()
    with pytest.raises(ConfigError, match="not of an earlier run"):
        sampled(plain, tmp_path)


def test_guidance_needs_a_condition(plain: Path, classes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"guidance=3 needs a condition.*takes none"):
        sampled(plain, tmp_path, guidance=3)
    with pytest.raises(ConfigError, match=r"guidance=3 needs a condition.*label="):
        sampled(classes, tmp_path, guidance=3)
    with pytest.raises(ConfigError, match="takes no label"):
        sampled(plain, tmp_path, label=0)
    with pytest.raises(ConfigError, match=r"label=3 is no class.*0 to 2"):
        sampled(classes, tmp_path, label=3)
    with pytest.raises(ConfigError, match=r"label=bat is no class.*a name: cat, cow, dog"):
        sampled(classes, tmp_path, label="bat")
    assert not list(tmp_path.iterdir())


def test_guidance_leads_away_from_no_label(classes: Path, tmp_path: Path) -> None:
    settings = {"n": 1, "steps": 1, "save_latents": True}

    def latent(name: str, **given: Any) -> Tensor:
        sampled(classes, tmp_path / name, **settings, **given)
        return load_file(tmp_path / name / "latents" / "00000.safetensors")["latent"]

    free, given = latent("free"), latent("given", label=1)
    assert (given - free).abs().max() > 1e-3
    torch.testing.assert_close(latent("ignored", label=1, guidance=0), free)
    torch.testing.assert_close(latent("guided", label=1, guidance=3), free + 3 * (given - free), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(latent("late", label=1, guidance=3, guidance_interval=[0, 0.5]), given)


def test_labels_go_round(classes: Path, tmp_path: Path) -> None:
    videos = sampled(classes, tmp_path / "list", n=3, label=[2, 0], batch=2)
    rows = [json.loads(line) for line in (tmp_path / "list" / "samples.jsonl").open()]
    assert [(row["label"], row["class"]) for row in rows] == [(2, "dog"), (0, "cat"), (2, "dog")]
    assert differ(videos[:1], sampled(classes, tmp_path / "two", n=1, label="dog")) <= 1


def test_a_number_that_is_the_name_of_a_class_means_that_class() -> None:
    net: Any = SimpleNamespace(classes=3)
    trained: Any = SimpleNamespace(classes=["2", "10", "0"])
    assert labels_of(net, trained, [10, "0", 2]) == (1, 2, 0)
    with pytest.raises(ConfigError, match=r"label=1 is no class of the model: use a name: 2, 10, 0$"):
        labels_of(net, trained, 1)


@pytest.mark.parametrize(
    ("word", "shown", "names"),
    [
        ("label=true", "true", ["cat", "true", "1.0"]),
        ("label=1e0", "1.0", ["cat", "true", "1.0"]),
        ("label=[cat,true]", "true", ["cat", "true", "1.0"]),
        ("label=1_0", "10", ["cat", "1_0", *"abcdefghijkl"]),
    ],
)
def test_a_label_that_reads_as_another_value_is_refused(word: str, shown: str, names: list[str]) -> None:
    """And not taken for the number of a class; in quotes it is a name."""
    net: Any = SimpleNamespace(classes=len(names))
    trained: Any = SimpleNamespace(classes=names)

    def typed(word: str) -> Any:
        with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
            return check_call(sample, compose("sample", overrides=["ckpt=a", "out=b", word]))["label"]

    with pytest.raises(ConfigError, match=rf"^label={shown} is no class of the model: .*a name: cat, {names[1]}"):
        labels_of(net, trained, typed(word))
    assert labels_of(net, trained, typed(f'label=["{names[1]}",cat]')) == (1, 0)


def test_draws_from_the_prior_of_a_vae(plain: Path, tmp_path: Path) -> None:
    videos = sampled(plain / "vae.ckpt", tmp_path / "out", frames=9, size=SIZE, steps=50)
    noise = FrameNoise([seed_of(0, 0), seed_of(0, 1)], (3, 2, 2))(0, 3)
    vae = make_vae()
    with torch.no_grad():
        whole = vae.decode(vae.denormalize(noise)).clamp(-1, 1)
    assert differ(list(video.to_uint8(whole)), videos) <= 1
    protocol = json.loads((tmp_path / "out" / "protocol.json").read_text())
    assert protocol.keys() == {"ckpt", "weights", "batch", "seed", "precision", "versions"}


@pytest.mark.parametrize(
    "setting",
    [{"guidance": 3}, {"guidance_interval": [0.0, 0.5]}, {"sampler": "heun"}, {"steps": 3}, {"shift": 2.0},
     {"label": 0}, {"rollout": "sliding"}, {"window": 9}, {"overlap": 4}, {"context_noise": 0.1}, {"text": "a"},
     {"vae": "b"}],
)  # fmt: skip
def test_a_vae_draws_without_settings_of_a_denoiser(plain: Path, tmp_path: Path, setting: dict[str, Any]) -> None:
    (name,) = setting
    given = {"ckpt": str(plain / "vae.ckpt"), "out": str(tmp_path / "no"), "device": "cpu", **setting}
    with pytest.raises(ConfigError, match=f"^{name}=.*: ckpt is a VAE"):
        sample(**given)
    assert not (tmp_path / "no").exists()


def rollouts() -> list[Any]:
    per_frame = {"loss": DiffusionLoss(RectifiedFlow(), UniformTime(), per_frame=True)}
    return [
        pytest.param("sliding", {}, {}, 3, id="sliding"),
        pytest.param("autoregressive", {}, {}, 3, id="autoregressive"),
        pytest.param("pyramid", {}, per_frame, 3, id="pyramid"),
        pytest.param("cached", {"attention": "causal"}, {}, 1, id="cached"),
    ]


@pytest.mark.parametrize(("rollout", "net", "module", "most"), rollouts())
def test_rollouts_see_a_window_only(
    rollout: str,
    net: dict[str, Any],
    module: dict[str, Any],
    most: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(tmp_path / "run", net, drop=None, **module)
    seen: list[int] = []
    held: list[int] = []
    forward, decode = VideoDiT.forward, generate.stream.Decoder.push

    def counted(self: VideoDiT, z: Tensor, t: Tensor, *rest: Any, **named: Any) -> Tensor:
        seen.append(z.shape[2])
        result = forward(self, z, t, *rest, **named)
        cache = rest[1] if len(rest) > 1 else None
        held.append(cache.frames if cache is not None else 0)
        return result

    def pushed(self: Any, z: Tensor, final: bool = False) -> Tensor | None:
        held.append(z.shape[2])
        return decode(self, z, final)

    monkeypatch.setattr(VideoDiT, "forward", counted)
    monkeypatch.setattr(generate.stream.Decoder, "push", pushed)
    settings: dict[str, Any] = {"n": 1, "rollout": rollout, "overlap": 8}
    if rollout in ("sliding", "autoregressive"):
        with pytest.raises(ConfigError, match=r"frames=37: the model was trained on 9 at once; .*rollout=sliding"):
            sampled(run, tmp_path / "full", frames=37)
    (video_,) = sampled(run, tmp_path / "out", frames=4 * FRAMES, **settings)
    assert video_.shape == (4 * FRAMES, SIZE, SIZE, 3)
    assert max(seen) == most
    assert max(held) <= 3
    assert video_[-1].float().std() > 1


def test_a_model_that_never_had_given_frames_cannot_go_on_from_any(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", drop=None, context=Context(0.0))
    with pytest.raises(ConfigError, match="trained without given frames"):
        sampled(run, tmp_path / "out", frames=13, rollout="sliding", overlap=4)
    with pytest.raises(ConfigError, match=r"at once$"):
        sampled(run, tmp_path / "out", frames=13)


@pytest.mark.parametrize(("probability", "marked"), [(0.0, False), (0.5, True)])
def test_the_mark_of_given_frames_is_for_models_that_learned_it(
    probability: float, marked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = DiffusionLoss(RectifiedFlow(), UniformTime(), per_frame=True)
    run = make_run(tmp_path / "run", drop=None, loss=loss, context=Context(probability))
    marks: list[bool] = []
    forward = VideoDiT.forward

    def spied(self: VideoDiT, z: Tensor, t: Tensor, cond: Any = None, *rest: Any, **named: Any) -> Tensor:
        marks.append(cond.known is not None)
        return forward(self, z, t, cond, *rest, **named)

    monkeypatch.setattr(VideoDiT, "forward", spied)
    sampled(run, tmp_path / "out", n=1, frames=13, rollout="sliding", overlap=4)
    assert any(marks) == marked


def test_guidance_away_from_what_was_never_learned_is_said(
    classes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = make_run(tmp_path / "kept", {"classes": 3}, drop={"label": 0.0})
    sampled(classes, tmp_path / "a", n=1, label=1, guidance=2.0)
    assert "always there" not in caplog.text
    sampled(kept, tmp_path / "b", n=1, label=1)
    assert "always there" not in caplog.text
    sampled(kept, tmp_path / "c", n=1, label=1, guidance=2.0)
    assert "label always there" in caplog.text


@pytest.mark.parametrize("drop", [None, {"label": 0.0}])
def test_a_condition_that_was_never_left_out_must_be_given(tmp_path: Path, drop: dict[str, float] | None) -> None:
    run = make_run(tmp_path / "run", {"classes": 3, "text_width": 8}, drop={"text": 0.1, **(drop or {})})
    with pytest.raises(ConfigError, match=r"never without label in training \(model.drop.label=0\): give label="):
        sampled(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    sampled(run, tmp_path / "out", n=1, label="cow")


def test_a_model_that_always_had_given_frames_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path / "run", drop=None, context=Context(1.0, [1]))
    sampled(run, tmp_path / "out", n=1)
    assert "always had given frames" in caplog.text


def test_a_window_beyond_the_training_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^window=13: the model was trained on 9 at once: use no more$"):
        sampled(plain, tmp_path / "out", frames=33, rollout="sliding", window=13)
    assert not (tmp_path / "out").exists()


def test_finished_frames_unlike_those_of_the_training_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run", drop=None, context=Context(0.5, [2], noise=0.1))  # of clips of 3 latent frames
    settings: dict[str, Any] = {"n": 1, "steps": 1, "frames": 13, "rollout": "sliding"}
    sampled(run, tmp_path / "a", context_noise=0.1, **settings)
    sampled(run, tmp_path / "b", **{**settings, "frames": 9, "overlap": 4, "context_noise": 0.5})  # one window
    assert "was trained with" not in caplog.text
    sampled(run, tmp_path / "c", **{**settings, "frames": 17, "overlap": 4, "context_noise": 0.5})
    expected = (
        "1 latent frames of a window are given or finished, the model was trained with 2 (frames=13 keeps to that)"
    )
    assert expected in caplog.messages
    assert "context_noise=0.5: the model was trained with 0.1 at most" in caplog.messages


def test_rollouts_that_the_model_cannot_do(plain: Path, tmp_path: Path) -> None:
    for rollout, match in {"pyramid": "noise level per frame", "cached": "needs a causal model"}.items():
        with pytest.raises(ConfigError, match=match):
            sampled(plain, tmp_path, frames=33, rollout=rollout)
    with pytest.raises(ConfigError, match=r"window=8 does not fit: use 1 \+ 4k"):
        sampled(plain, tmp_path, rollout="sliding", window=8)
    with pytest.raises(ConfigError, match="overlap=3 does not fit: use a multiple of 4"):
        sampled(plain, tmp_path, rollout="sliding", overlap=3)
    with pytest.raises(ConfigError, match="cannot keep 3 of them"):
        sampled(plain, tmp_path, rollout="sliding", overlap=12)
    with pytest.raises(ConfigError, match=r"size=20 .*multiples of 8"):
        sampled(plain, tmp_path, size=20)
    alone = make_run(tmp_path / "alone", drop=None, context=Context(0.0, [1]))
    for rollout, frames in (("sliding", 13), ("autoregressive", 9)):  # the second goes on within its first window
        with pytest.raises(ConfigError, match=r"without given frames .* no more than frames=9, with rollout=full$"):
            sampled(alone, tmp_path / "out", frames=frames, rollout=rollout)


def test_a_cache_of_tokens_of_several_frames(tmp_path: Path) -> None:
    """Latents of 3 frames in training, tokens of 2: refused before anything is drawn, with what fits."""
    run = make_run(tmp_path / "run", {"attention": "causal", "patch": (2, 1, 1)}, drop=None)
    for settings, match in (
        ({"frames": 33, "overlap": 8}, r"window less overlap is 1: use overlap=4$"),
        ({"frames": 33, "overlap": 4}, r"whole tokens of 2 latent frames, not 9: use frames=29 or 37$"),
        ({"frames": 33, "overlap": 4, "window": 5}, r"window less overlap is 1: use a larger window$"),
    ):
        with pytest.raises(ConfigError, match=match):
            sampled(run, tmp_path / "out", rollout="cached", **settings)
    assert not (tmp_path / "out").exists()
    (video_,) = sampled(run, tmp_path / "out", n=1, rollout="cached", frames=29, overlap=4)
    assert len(video_) == 29
    settings = {"ckpt": str(run), "rollout": "cached", "overlap": 4}
    defaults = {name: known.default for name, known in inspect.signature(sample).parameters.items()}
    generator = open_generator(Settings.among({**defaults, **settings}), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"not 3: use context=5 or 13$"):
        generator.check(6, given=3)
    with pytest.raises(ConfigError, match=r"not 1: use frames=13$"):
        generator.check(3, given=2)
    generator.check(6, given=2)


def test_the_vae_moves_with_its_run_or_is_named(plain: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(plain, moved)
    first = sampled(moved, tmp_path / "first", n=1)
    (moved / "vae.ckpt").rename(tmp_path / "elsewhere.ckpt")
    content = torch.load(moved / "checkpoints" / "step-00000001.ckpt", weights_only=True)
    content["praxino"]["vae"]["absolute"] = str(tmp_path / "gone.ckpt")
    torch.save(content, moved / "checkpoints" / "step-00000001.ckpt")
    with pytest.raises(CheckpointError, match="VAE is not there"):
        sampled(moved, tmp_path / "none", n=1)
    named = sampled(moved, tmp_path / "named", n=1, vae=str(tmp_path / "elsewhere.ckpt"))
    assert differ(first, named) == 0
    checkpoint.save_vae(make_vae(seed=1), tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="another VAE"):
        sampled(moved, tmp_path / "none", n=1, vae=str(tmp_path / "other.ckpt"))


def test_the_configuration_names_every_key() -> None:
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        cfg = compose("sample", overrides=["ckpt=a", "out=b", "label=[0,1]", "size=[32,64]"])
    given = check_call(sample, cfg)
    assert given["label"] == [0, 1]
    assert make_net(classes=None).kinds == frozenset()
