"""Import a configuration: another system's JSON becomes an experiment; what has no counterpart becomes a comment."""

import inspect
import json
import logging
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from praxino.config import check, check_call, conf_dir, nearest
from praxino.errors import ConfigError
from praxino.models.vae import VideoVAE
from praxino.official import OFFICIAL
from praxino.tasks.rows import write_atomic
from praxino.tasks.rundir import make_directory

log = logging.getLogger(__name__)

LEVELS = 6  # of the frame VAE: each halves the frame
STRIDE = 2**LEVELS
CHANNELS = 8  # of its first level
WIDTHS = [1, 2, 4, 8, 16, 32, 32]
# where the fields go, by part; "=" begins a reason why they are not used, in which {} stands for the value
VAE = {
    "seed": "seed",
    "lvm.n_latent": "model.net.embed_dim",
    "transcode.target_size": "size",
    "transcode.bs": "=the batch of another command: praxino-encode batch={}",
    "vae.size_multiplier": "model.net.hidden_size",
    "vae.sample.n_sample": "=of another command: praxino-sample ckpt=RUN n={}",
    "vae.reconstruct.n_sample": "=of another command: python reconstruct.py vae=RUN frames={}",
    "vae.reconstruct.video_file": "=of another command: python reconstruct.py vae=RUN input={}",
    "vae.reconstruct.generation_path": "=of another command: python reconstruct.py vae=RUN out={}",
    "vae.train.ckpt_dir": "out",
    "vae.train.lr": "model.optimizer.lr",
    "vae.train.ckpt_interval": "checkpoint.every",
    "vae.train.max_ckpts": "checkpoint.keep",
    "vae.train.data_dir_train": "data.root",
    "vae.train.data_dir_val": "data.val_root",
    "vae.train.bs": "batch",
    "vae.train.metrics_path": "=metrics.csv and metrics.jsonl always lie in out, not in {}",
    "vae.train.clip_norm": "model.clip",
    "vae.train.kl_alpha": "model.loss.kl",
    "checkpoints.ckpt_dir": "=read by no function of that system; ckpt_dir of vae.train and dt.train count, not {}",
    "checkpoints.ckpt_name": "=checkpoints are called step-N.ckpt, not {}",
    "checkpoints.ckpt_interval": "=read by no function of that system; set checkpoint.every={} for it",
    "checkpoints.max_ckpts": "=read by no function of that system; set checkpoint.keep={} for it",
}
DIT = {
    "seed": "seed",
    "dt.n_layers": "model.net.depth",
    "dt.d_l": "model.net.width",
    "dt.d_mlp": "model.net.mlp_width",
    "dt.n_q": "model.net.num_heads",
    "dt.d_qk": "model.net.qk_dim",
    "dt.d_dv": "model.net.v_dim",
    "dt.l_x": "model.context.frames",
    "dt.l_y": "frames",
    "dt.sample.n_sample": "=of another command: praxino-sample ckpt=RUN n={}",
    "dt.sample.n_steps": "=of another command: praxino-sample ckpt=RUN sampler=ddim steps={}",
    "dt.sample.generation_path": "=of another command: praxino-sample ckpt=RUN out={}",
    "dt.train.ckpt_dir": "out",
    "dt.train.lr": "model.optimizer.lr",
    "dt.train.ckpt_interval": "checkpoint.every",
    "dt.train.data_dir_train": "data.root",
    "dt.train.data_dir_val": "data.val_root",
    "dt.train.bs": "batch",
    "dt.train.metrics_path": "=metrics.csv and metrics.jsonl always lie in out, not in {}",
    "dt.train.vae_checkpoint": "=a label of its plots; here model.vae=PATH names the VAE, not {}",
    "dt.train.clip_norm": "model.clip",
}
Experiment = tuple[list[Any], dict[str, Any], list[str]]  # defaults, values by dotted key, comments


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `import_config` and call it."""
    return import_config(**check_call(import_config, cfg))


def import_config(input: str, out: str) -> dict[str, Any]:
    """Write the experiments that a JSON describes; each is composed and checked before anything is written.

    Args:
        input: the JSON of the frame VAE with latent transformer, or config.json of a WFVAE or CausalVAE.
        out: the YAML. A JSON with both models gives the VAE's, and the transformer's beside it as NAME_dit.yaml.
    """
    target = Path(out).expanduser().absolute()
    if target.suffix not in (".yaml", ".yml") or not re.fullmatch(r"[\w-]+", target.stem):
        raise ConfigError(f"out={out}: use a name of letters, digits, _ and - that ends in .yaml")
    content = read_json(Path(input).expanduser())
    sections = {"vae", "dt", "lvm"} & content.keys()
    experiments = from_sections(content) if sections else {"": from_official(content)}
    texts = {
        target.with_stem(target.stem + suffix): text_of(Path(input).name, *experiment)
        for suffix, experiment in experiments.items()
    }
    for path, text in texts.items():
        try_to_compose(path.stem, text)
    make_directory(target.parent)
    for path, text in texts.items():
        write_atomic(path, text)
        log.info("%s: %s", path, how_to_use(path))
    return {"out": [str(path) for path in texts]}


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"input={path} cannot be read as JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"input={path} holds no JSON object")
    return content


# -------------------------------------------------------------------------- the frame VAE and the latent transformer
def from_sections(content: Mapping[str, Any]) -> dict[str, Experiment]:
    """Translate the JSON with sections; raises ConfigError for unknown fields and wrong types."""
    fields = dict(flatten(content))
    known = {**VAE, **DIT}
    for name in fields:
        if name not in known:
            raise ConfigError(f"{name}: unknown field{nearest(name, known) or nearest_leaf(name, known)}")
    if not {"vae", "dt"} & content.keys():
        raise ConfigError("a section vae or dt is required: there is no model in this JSON")
    made: list[Experiment] = []
    if "vae" in content:
        made.append(frame_vae(fields))
    if "dt" in content:
        made.append(transformer(fields))
    if "vae" not in content:  # which lists them otherwise
        made[-1][2].extend(place(fields, VAE)[1])
    return dict(zip(("", "_dit"), made, strict=False))


def flatten(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every field by its dotted name."""
    for key, value in tree.items():
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict):
            yield from flatten(value, where)
        else:
            yield where, value


def nearest_leaf(name: str, known: Mapping[str, str]) -> str:
    """Suggest fields of the same section."""
    section, _, leaf = name.rpartition(".")
    return nearest(leaf, {k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section})


def number(fields: Mapping[str, Any], name: str, default: float) -> Any:
    """Return a positive number, or its default."""
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{name}: {value!r} is not a positive number")
    return value


def grid_of(fields: Mapping[str, Any]) -> tuple[list[int], int, int]:
    """Return the frame `[height, width]`, the cells of its latent, and the latent's channels."""
    given = fields.get("transcode.target_size", [512, 300])
    if not isinstance(given, list) or len(given) != 2 or not all(isinstance(n, int) and n > 0 for n in given):
        raise ConfigError(f"transcode.target_size: {given!r} is not [width, height]")
    height, width = (max(1, round(side / STRIDE)) * STRIDE for side in reversed(given))
    cells = height * width // STRIDE**2
    return [height, width], cells, math.ceil(number(fields, "lvm.n_latent", 1500) / cells)


def place(fields: Mapping[str, Any], table: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values by their new names, and a comment for each field that has none."""
    values, comments = {}, []
    for name, value in fields.items():
        goal = table.get(name)
        if goal is not None and goal.startswith("="):
            comments.append(f"not used: {name}, {goal[1:].format(json.dumps(value))}")
        elif goal is not None:
            values[goal] = value
    return values, comments


def frame_vae(fields: Mapping[str, Any]) -> Experiment:
    """Return a VAE of single frames: a CausalVAE without time, of the same levels and widths."""
    size, cells, channels = grid_of(fields)
    width = CHANNELS * number(fields, "vae.size_multiplier", 1)
    values, comments = place(fields, VAE)
    values |= {"frames": 1, "size": size, "model.net.z_channels": channels, "model.net.embed_dim": channels}
    values |= {"model.net.hidden_size": width, **frame_net(), "model.scheduler": None, "model.loss.l1": 0.0}
    values |= {"model.loss.l2": 0.5, "model.loss.perceptual": 0.0, "model.optimizer.weight_decay": 0.0}
    kl = number(fields, "vae.train.kl_alpha", 1e-4) * cells * channels / (3 * size[0] * size[1])
    values["model.loss.kl"] = float(f"{kl:.4g}")
    said = [
        f"lvm.n_latent: {fields.get('lvm.n_latent', 1500)} numbers a frame became {channels} channels of a grid of "
        f"{cells} cells: {channels * cells}",
        f"transcode.target_size: [width, height], here [height, width] in multiples of {STRIDE}",
        "vae.size_multiplier: of the widths 8, 16, ..., 256",
        "vae.train.kl_alpha: of a sum per value of the frame, here of the mean per latent element; the original system "
        "ignored it and took 1e-4",
        "the learned variance of each pixel became a constant one: l2",
    ]
    return ["override /model: causalvae", "override /model/net: causalvae_v12"], values, said + comments


def frame_net() -> dict[str, Any]:
    """Return the keys of a CausalVAE whose every layer sees one frame."""
    down, up = [*["Downsample"] * LEVELS, ""], ["", *["Upsample"] * LEVELS]
    net: dict[str, Any] = {
        "hidden_size_mult": WIDTHS,
        "num_res_blocks": 1,
        "norm_type": "layernorm",
        "q_conv": "Conv2d",
    }
    for half in ("encoder", "decoder"):
        net |= {f"{half}_{end}": "Conv2d" for end in ("conv_in", "conv_out")}
        net |= {f"{half}_mid_resnet": "ResnetBlock2D", f"{half}_resnet_blocks": ["ResnetBlock2D"] * len(WIDTHS)}
        net |= {f"{half}_attention": "AttnBlock3DFix"}
    net |= {"encoder_spatial_downsample": down, "encoder_temporal_downsample": [""] * len(WIDTHS)}
    net |= {"decoder_spatial_upsample": up, "decoder_temporal_upsample": [""] * len(WIDTHS)}
    return {f"model.net.{key}": value for key, value in net.items()}


def transformer(fields: Mapping[str, Any]) -> Experiment:
    """Return the latent transformer: a token a frame, one head of keys and values, parallel blocks, VDM's loss."""
    size, _, channels = grid_of(fields)
    prompt, rest = number(fields, "dt.l_x", 1), number(fields, "dt.l_y", 5)
    values, comments = place(fields, DIT)
    values |= {
        "frames": prompt + rest,
        "size": size,
        "model.context.frames": [prompt],
        "model.context.probability": 1.0,
    }
    values |= {"model.net.channels": channels, "model.net.patch": [1, size[0] // STRIDE, size[1] // STRIDE]}
    values |= {"model.scheduler": None}
    said = [
        "dt.l_x, dt.l_y: the given frames, and frames = l_x + l_y (that system learned a second sample of the prompt)",
        "dt.train.data_dir_train, data_dir_val: must be folders that praxino-encode wrote with this JSON's VAE",
        "dt.d_l, d_mlp, n_q, d_qk, d_dv: width, MLP, query heads, channels a head of queries and keys, of values",
    ]
    defaults = ["override /model: dit", "override /model/net: dit_seed000", "override /model/diffusion@model.loss: vdm"]
    return [*defaults, "override /data: latents"], values, said + comments


# ------------------------------------------------------------------------------------------------- official VAEs
def from_official(content: Mapping[str, Any]) -> Experiment:
    """Translate config.json of a WFVAE or CausalVAE; what it leaves out is what its class takes, not this project's."""
    cls = class_of(content)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is not parameter.empty
    }
    comments, net = [], {}
    for name, value in content.items():
        if name in defaults:
            net[name] = value
        elif name.startswith("_") or name in cls.unused_keys:
            comments.append(f"not used: {name} = {json.dumps(value)}, which says nothing about the network")
        else:
            raise ConfigError(f"{name}: unknown field of {cls.official_name}{nearest(name, defaults)}")
    whole = {name: list(value) if isinstance(value, tuple) else value for name, value in {**defaults, **net}.items()}
    if left := sorted(defaults.keys() - net.keys()):
        comments.append(f"not in the file, so as the class has them: {', '.join(left)}")
    base: list[Any] = ["wfvae_paper", "override /model/net: wfvae_s"] if cls.__name__ == "WFVAE" else ["odvae"]
    return base, {f"model.net.{name}": value for name, value in whole.items()}, comments


def class_of(content: Mapping[str, Any]) -> type[VideoVAE]:
    """Return the class that a config.json names, or whose arguments it has."""
    known: Mapping[str, type[VideoVAE]] = OFFICIAL
    name = content.get("_class_name")
    if name is not None and name not in known:
        raise ConfigError(f"_class_name: {name!r} cannot be imported{nearest(str(name), known)}")
    if name is not None:
        return known[name]
    shared = {n: len(content.keys() & inspect.signature(cls).parameters.keys()) for n, cls in known.items()}
    best = max(shared, key=shared.__getitem__)
    if not shared[best]:
        raise ConfigError(f"this is the configuration of neither {' nor '.join(known)}, nor has it a section vae or dt")
    return known[best]


# ---------------------------------------------------------------------------------------------------------- YAML
def text_of(source: str, defaults: list[Any], values: Mapping[str, Any], comments: list[str]) -> str:
    """Return the experiment as YAML."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    lines = ["# @package _global_", f"# imported from {source}", *(f"# {comment}" for comment in comments)]
    lines += ["defaults:", *(f"  - {entry}" for entry in defaults)]
    return "\n".join(lines) + "\n\n" + yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)


def try_to_compose(name: str, text: str) -> None:
    """Raise ConfigError unless train.py would take the experiment."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "experiment").mkdir()
        Path(folder, "experiment", f"{name}.yaml").write_text(text, encoding="utf-8")
        overrides = [f"experiment={name}", f"hydra.searchpath=[file://{folder}]", "out=runs/import"]
        GlobalHydra.instance().clear()  # of the command's own composition, which is done
        with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
            cfg = compose("train", overrides=overrides)
            if cfg.data.get("root", "???") is None or "root" not in yaml.safe_load(text).get("data", {}):
                cfg.data.root = "videos"
            check(cfg)


def how_to_use(path: Path) -> str:
    """Say how train.py finds the experiment."""
    if path.parent == Path(conf_dir()).resolve() / "experiment":
        return f"python train.py experiment={path.stem}"
    if path.parent.name == "experiment":
        return f"python train.py --config-dir {path.parent.parent} experiment={path.stem}"
    return "move it to conf/experiment, or to a folder DIR/experiment for train.py --config-dir DIR experiment=NAME"
