"""Make a video autoencoder of others: halves merged, channels grown, the 2D kernels of pictures inflated.

`expand` and `inflate` also return the names of the tensors that have no origin.
"""

import copy
import re
from collections.abc import Callable, Mapping
from itertools import count, takewhile
from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor, nn

from praxino.errors import CheckpointError, ConfigError
from praxino.models.causalvae import CausalVAE
from praxino.models.vae import VideoVAE

Half = Literal["encoder", "decoder"]
Inflation = Literal["tail", "average"]
FREE = ("scale", "shift", "dropout")  # what two models of one architecture may differ in
IN_TIME = re.compile(r"\.time_(down|up)sample\.")  # layers without a counterpart in a model of pictures
STAGE = "first_stage_model."  # of the autoencoder in a file of latent diffusion
DIFFUSERS = tuple(  # its names of layers, and those of latent diffusion, which are CausalVAE's
    (re.compile(rf"\b{pattern}\."), f"{name}.")
    for pattern, name in (
        (r"(down|up)_blocks\.(\d+)\.resnets", r"\1.\2.block"),
        (r"(down|up)_blocks\.(\d+)\.(downsample|upsample)rs\.0", r"\1.\2.\3"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        ("group_norm", "norm"),
        ("(to_q|query)", "q"),
        ("(to_k|key)", "k"),
        ("(to_v|value)", "v"),
        (r"(to_out\.0|proj_attn)", "proj_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    )
)


def merge(vae: VideoVAE, donor: VideoVAE, half: Half) -> VideoVAE:
    """Return a copy with one half of a model of the same architecture.

    The latents are the encoder's: their statistics come with it.
    """
    if vae.official_name != donor.official_name:
        raise ConfigError(
            f"{half}: a {donor.official_name} does not fit a {vae.official_name}: give a model of the same architecture"
        )
    ours, theirs = (
        {key: v for key, v in model.official_config().items() if key not in FREE and key[:1] != "_"}
        for model in (vae, donor)
    )
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key) and key not in vae.unused_keys:
            raise ConfigError(
                f"{half}: {key} is {theirs.get(key)} there and {ours.get(key)} in vae: "
                "give a model of the same architecture"
            )
    merged = copy.deepcopy(vae)
    merged.load_state_dict({**vae.state_dict(), **parts(donor.state_dict(), vae.prefixes(half))}, assign=True)
    if half == "encoder":
        merged.statistics = copy.deepcopy(donor.statistics)
        merged.config |= {key: donor.config[key] for key in ("scale", "shift") if key in donor.config}
    return merged


def parts(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return copies of the tensors under these prefixes."""
    return {key: tensor.clone() for key, tensor in state.items() if key.startswith(prefixes)}


def seeded(cls: Callable[..., VideoVAE], config: Mapping[str, Any], seed: int) -> VideoVAE:
    """Build a model whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(**config).eval()


@torch.no_grad()
def expand(vae: VideoVAE, changes: Mapping[str, Any], seed: int = 0) -> tuple[VideoVAE, list[str]]:
    """Return a model with a changed config, mostly a wider one, that begins with these weights.

    Of a tensor that grew the leading slice is the old one and the rest is drawn from N(mean, std) of the old one; mean
    and log-variance grow each on its own. `mix_factor` begins at 0 then. New layers are as torch makes them.
    """
    fresh = seeded(type(vae), {**vae.config, **changes}, seed).to(next(vae.parameters()).dtype)
    old, new = vae.state_dict(), fresh.state_dict()
    filters = fresh.fixed_filters()
    wider = [key for key in new if key in old and new[key].shape != old[key].shape]
    unfit = [key for key in old if key not in new]
    unfit += [key for key in wider if not fits(old[key], new[key])]
    if unfit:
        raise ConfigError(
            f"{', '.join(changes)}: {len(unfit)} tensors have no room ({', '.join(unfit[:3])}): a model can only grow"
        )
    moments = {id(tensor) for tensor in fresh.moments_layer.parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for key, tensor in fresh.state_dict(keep_vars=True).items():
            if key in wider:
                grow(tensor, old[key], 2 if id(tensor) in moments else 1)
            elif key in old and key not in filters:
                tensor.copy_(old[key])
            if wider and key.endswith("mix_factor"):
                tensor.zero_()
    fresh.extra = dict(vae.extra)
    if fresh.latent_channels == vae.latent_channels:
        fresh.statistics = copy.deepcopy(vae.statistics)
    return fresh, [key for key in new if key not in old and key not in filters]


def fits(old: Tensor, new: Tensor) -> bool:
    """Tell whether a tensor has a place in the corner of another."""
    return old.ndim == new.ndim and all(a <= b for a, b in zip(old.shape, new.shape, strict=True))


def grow(tensor: Tensor, old: Tensor, sections: int) -> None:
    """Draw a tensor like the old one, then put each section of that into the corner of its own section."""
    tensor.normal_(float(old.float().mean()), float(old.float().std(correction=0)))
    for section, values in zip(tensor.chunk(sections), old.chunk(sections), strict=True):
        section[tuple(slice(size) for size in values.shape)] = values


@torch.no_grad()
def inflate(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    layout: Mapping[str, Any],
    how: Inflation = "tail",
) -> tuple[VideoVAE, list[str]]:
    """Return a CausalVAE that begins as an autoencoder of pictures.

    A causal convolution repeats the first frame in front, so that a picture goes through it as through the 2D one,
    however the 2D kernel is spread over time. Layers in time that the 2D model lacks begin as the identity. With
    `SpatialUpsample2x` or `Upsample` alone the whole model is the 2D one on pictures; `Spatial2xTime2x3DUpsample`
    interpolates linearly where the 2D one repeats pixels, so the decoder of OD-VAE is near, not equal.

    Args:
        state: of an AutoencoderKL of diffusers, or of latent diffusion (`encoder.down.0.block.0...`).
        config: the config.json of diffusers; empty if there is none.
        layout: constructor arguments of CausalVAE; the sizes among them are taken from the weights.
        how: the 2D kernel at the last tap of time, with zeros before it, or a fraction of it at every tap.
    """
    if config.get("norm_num_groups", 32) != 32:
        raise CheckpointError(f"norm_num_groups {config['norm_num_groups']}: CausalVAE has 32, give such a model")
    pictures = ldm_names(state)
    try:
        sizes = sizes_of(pictures, config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"no 2D autoencoder of diffusers or latent diffusion: no sizes in {error}") from error
    vae = seeded(CausalVAE, {**layout, **sizes}, seed=0)
    origins = {key: origin(key, pictures) for key in vae.state_dict()}
    unknown = [key for key, source in origins.items() if source is None and not IN_TIME.search(key)]
    unused = sorted(pictures.keys() - set(origins.values()))
    if unknown or unused:
        raise CheckpointError(
            f"the 2D autoencoder has another structure than CausalVAE: {len(unknown)} tensors without an origin "
            f"({', '.join(unknown[:3])}), {len(unused)} without a place ({', '.join(unused[:3])})"
        )
    for key, tensor in vae.state_dict().items():
        source = origins[key]
        if source is not None:
            tensor.copy_(in_time(pictures[source], tensor, how, key))
        elif tensor.ndim == 5:
            tensor.copy_(in_time(nn.init.dirac_(torch.empty_like(tensor[:, :, 0])), tensor, how, key))
        elif key.endswith("bias"):
            tensor.zero_()
    return vae, [key for key, source in origins.items() if source is None]


def ldm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names of latent diffusion, where decoder levels count from the finest."""
    inner = {key.removeprefix(STAGE): tensor for key, tensor in state.items() if key.startswith(STAGE)}
    state = inner or dict(state)
    if not any("_blocks." in key for key in state):
        return state
    last = max((int(m[1]) for key in state if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", key))), default=0)
    named = {}
    for key, tensor in state.items():
        for pattern, name in DIFFUSERS:
            key = pattern.sub(name, key)
        named[re.sub(r"(?<=^decoder\.up\.)\d+", lambda m: str(last - int(m[0])), key)] = tensor
    return named


def sizes_of(pictures: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of a 2D autoencoder as CausalVAE names them, and its statistics."""

    def number(pattern: str) -> int:
        return len(list(takewhile(lambda i: pattern.format(i) in pictures, count())))

    levels = max(number("encoder.down.{}.block.0.conv1.weight"), 1)
    widths = [len(pictures[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)]
    latents = len(pictures["encoder.conv_out.weight"]) // 2
    quant = pictures.get("quant_conv.weight")
    embedded = latents if quant is None else len(quant) // 2
    return {
        "hidden_size": gcd(*widths),
        "hidden_size_mult": [width // gcd(*widths) for width in widths],
        "num_res_blocks": number("encoder.down.0.block.{}.conv1.weight"),
        "z_channels": latents,
        "embed_dim": embedded,
        "use_quant_layer": quant is not None,
        "scale": [config.get("scaling_factor") or 0.18215] * embedded,
        "shift": [config.get("shift_factor") or 0.0] * embedded,
    }


def origin(key: str, pictures: Mapping[str, Tensor]) -> str | None:
    """Return the name in the 2D model: causal convolutions and layer norms hold theirs one level deeper."""
    outer = re.sub(r"\.(conv|norm)\.(?=(weight|bias)$)", ".", key)
    return key if key in pictures else outer if outer in pictures else None


def in_time(kernel: Tensor, like: Tensor, how: Inflation, key: str) -> Tensor:
    """Return a 2D kernel, or a linear layer's matrix, in the shape of a 3D kernel; leave other tensors as they are."""
    if kernel.ndim == 2 and like.ndim > 2:
        kernel = kernel[:, :, None, None]
    if like.ndim == 5:
        taps = like.shape[2]
        if how == "average":
            kernel = kernel.unsqueeze(2).expand(-1, -1, taps, -1, -1) / taps
        else:
            kernel = torch.cat((*[torch.zeros_like(kernel).unsqueeze(2)] * (taps - 1), kernel.unsqueeze(2)), dim=2)
    if kernel.shape != like.shape:
        raise CheckpointError(
            f"{key} of shape {tuple(like.shape)} cannot be made of {tuple(kernel.shape)}: give another layout"
        )
    return kernel
