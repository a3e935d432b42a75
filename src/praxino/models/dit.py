"""The video diffusion transformer: DiT (arXiv 2212.09748) over patches of space and time."""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from praxino.errors import ConfigError
from praxino.models.conditioning import Condition, LabelEmbedding, TextEmbedding, TimeEmbedding
from praxino.models.denoiser import Cache, Denoiser, LayerCache
from praxino.models.header import check_counts
from praxino.ops.position import rotary_table, rotate, share
from praxino.ops.sdpa import attend

EPS = 1e-6
Reach = Literal["all", "space", "time"]  # the tokens that an attention mixes: of the clip, of a frame, of a place
AXES: dict[Reach, tuple[int, ...]] = {"all": (0, 1, 2), "space": (1, 2), "time": (0,)}
REACHES: dict[str, tuple[Reach, ...]] = {"full": ("all",), "factorised": ("space", "time")}


class RMSNorm(nn.RMSNorm):
    """RMS norm of a head, its weight cast to the input: autocast leaves the two in different types."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Self-attention of tokens `(B, T, N, D)`, N a frame, with normed and rotated queries and keys."""

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, qk_dim: int, v_dim: int, reach: Reach, causal: bool
    ) -> None:
        super().__init__()
        self.reach, self.causal = reach, causal and reach != "space"
        self.qk_dim, self.v_dim = qk_dim, v_dim
        self.sizes = [num_heads * qk_dim, num_kv_heads * qk_dim, num_kv_heads * v_dim]
        self.qkv = nn.Linear(width, sum(self.sizes), bias=False)
        self.q_norm, self.k_norm = RMSNorm(qk_dim, eps=EPS), RMSNorm(qk_dim, eps=EPS)
        self.out = nn.Linear(num_heads * v_dim, width, bias=False)

    def forward(self, x: Tensor, table: Tensor, cache: LayerCache | None = None) -> Tensor:
        q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        q = rotate(self.q_norm(q.unflatten(-1, (-1, self.qk_dim))), table)  # (B, T, N, H, d)
        k = rotate(self.k_norm(k.unflatten(-1, (-1, self.qk_dim))), table)  # (B, T, N, K, d)
        q, k, v = self.gather(q), self.gather(k), self.gather(v.unflatten(-1, (-1, self.v_dim)))
        frame = None
        if self.causal:
            frame = 1 if self.reach == "time" else x.shape[2]
            if cache is not None:
                k, v = cache.extend(k, v)
        return self.out(self.scatter(attend(q, k, v, frame=frame), x))

    def gather(self, x: Tensor) -> Tensor:
        """Bring what is mixed together: `(B, T, N, H, d)` to `(.., H, tokens, d)`, contiguous (ops.attention)."""
        x = x.transpose(1, 2) if self.reach == "time" else x
        x = x.flatten(1, 2) if self.reach == "all" else x.flatten(0, 1)
        return x.transpose(1, 2).contiguous()

    def scatter(self, y: Tensor, x: Tensor) -> Tensor:
        """Undo `gather`, with the heads side by side: `(B, T, N, H*e)`."""
        batch, frames, tokens = x.shape[:3]
        y = y.transpose(1, 2).flatten(2)
        if self.reach == "time":
            return y.unflatten(0, (batch, tokens)).transpose(1, 2)
        return y.reshape(batch, frames, tokens, -1)


class CrossAttention(nn.Module):
    """Attention from every token to the words of a text; begins as zero."""

    def __init__(self, width: int, num_heads: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.q = nn.Linear(width, num_heads * dim, bias=False)
        self.kv = nn.Linear(width, 2 * num_heads * dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(dim, eps=EPS), RMSNorm(dim, eps=EPS)
        self.out = nn.Linear(num_heads * dim, width, bias=False)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:], eps=EPS).flatten(1, 2)  # (B, T*N, D)
        k, v = self.kv(text).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (-1, self.dim)) for y in (self.q(h), k, v))  # (B, .., H, d)
        q, k, v = (y.transpose(1, 2).contiguous() for y in (self.q_norm(q), self.k_norm(k), v))
        return self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2)).view_as(x)


class MLP(nn.Module):
    """Two layers with GELU between them, or SwiGLU (arXiv 2002.05202), which has a third for its gate."""

    def __init__(self, width: int, hidden: int, kind: Literal["gelu", "swiglu"]) -> None:
        super().__init__()
        self.gated = kind == "swiglu"
        self.fc1 = nn.Linear(width, 2 * hidden if self.gated else hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        if not self.gated:
            return self.fc2(F.gelu(h))  # exact: faster on a CPU than its approximation
        gate, h = h.chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * h)


class Shift(nn.Module):
    """What a block adds to a modulation that all blocks share (adaLN-single, arXiv 2310.00426)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, c: Tensor) -> Tensor:
        return c + self.bias


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Norm every token, then scale and shift it."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class Block(nn.Module):
    """Attention and MLP, each normed, modulated and gated by the condition: the identity as long as the gates are 0.

    `parallel` computes all branches from the same input and gates their sum.
    """

    def __init__(
        self,
        width: int,
        attentions: Sequence[Attention],
        cross: CrossAttention | None,
        mlp: MLP,
        dropout: float,
        parallel: bool,
        shared: bool,
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.attentions = nn.ModuleList(attentions)
        self.cross, self.mlp = cross, mlp
        self.dropout = nn.Dropout(dropout)
        self.parts = 3 if parallel else 3 * (len(attentions) + 1)
        self.modulation = Shift(self.parts * width) if shared else nn.Linear(width, self.parts * width)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        tables: list[Tensor],
        text: Tensor | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        parts = self.modulation(c).chunk(self.parts, dim=-1)  # each (B, 1 or T, 1, D)
        if self.parallel:
            shift, scale, gate = parts
            h = modulate(x, shift, scale)
            y = self.mlp(h)
            for attention, table in zip(self.attentions, tables, strict=True):
                y = y + attention(h, table, cache)
            y = gate * self.dropout(y)
            return x + y if self.cross is None else x + y + self.cross(x, text, mask)
        for i, (attention, table) in enumerate(zip(self.attentions, tables, strict=True)):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            x = x + gate * self.dropout(attention(modulate(x, shift, scale), table, cache))
        if self.cross is not None:
            x = x + self.cross(x, text, mask)
        shift, scale, gate = parts[-3:]
        return x + gate * self.dropout(self.mlp(modulate(x, shift, scale)))


class VideoDiT(Denoiser):
    """A transformer over latents of any number of frames and any size, whose prediction is zero at first.

    Args:
        channels: of the latents.
        patch: latent frames, rows and columns a token; what does not divide is padded, and cut from the prediction.
            A token of several frames takes the mean of their noise embeddings; the mask channel tells them apart.
        num_kv_heads: heads of keys and values, which groups of query heads share; 1 is multi-query attention.
        qk_dim, v_dim: channels a head.
        attention: `full` over the clip, `factorised` in a frame and then along time; `causal` and `factorised_causal`
            look at no later frame (token frames, that is).
        block: attention and MLP one after the other, or both from the same input.
        adaln: the modulation of each block from a layer of its own, or of one `shared` layer and a bias a block.
        rope_base: of the rotary embedding; small for small grids.
        classes: number of labels.
        text_width: channels of the embedded words.
    """

    def __init__(
        self,
        channels: int,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_kv_heads: int | None = None,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        mlp_width: int | None = None,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        patch: Sequence[int] = (1, 2, 2),
        attention: Literal["full", "factorised", "causal", "factorised_causal"] = "full",
        block: Literal["sequential", "parallel"] = "sequential",
        adaln: Literal["block", "shared"] = "block",
        rope_base: float = 10000.0,
        dropout: float = 0.0,
        classes: int | None = None,
        text_width: int | None = None,
    ) -> None:
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__({**config, "patch": list(patch)})
        check_config(self.config)
        self.channels, self.classes, self.text_width = channels, classes, text_width
        self.patch = (patch[0], patch[1], patch[2])
        self.causal = attention.endswith("causal")
        self.rope_base = rope_base
        kv_heads, qk = num_kv_heads or num_heads, qk_dim or width // num_heads
        value = v_dim or qk
        reaches = REACHES["factorised" if attention.startswith("factorised") else "full"]
        self.rotaries = [share(qk, AXES[reach]) for reach in reaches]

        volume = patch[0] * patch[1] * patch[2]
        self.embed = nn.Linear((channels + 2) * volume, width)  # and the marks of given frames and of the first
        self.time = TimeEmbedding(width)
        self.label = None if classes is None else LabelEmbedding(classes, width)
        self.text = None if text_width is None else TextEmbedding(text_width, width)
        self.layers = nn.ModuleList(
            Block(
                width,
                [Attention(width, num_heads, kv_heads, qk, value, reach, self.causal) for reach in reaches],
                None if text_width is None else CrossAttention(width, num_heads, qk),
                MLP(width, mlp_width or 4 * width, mlp),
                dropout,
                parallel=block == "parallel",
                shared=adaln == "shared",
            )
            for _ in range(depth)
        )
        parts = 3 if block == "parallel" else 3 * (len(reaches) + 1)
        self.shared = nn.Linear(width, parts * width) if adaln == "shared" else None
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, channels * volume)
        self.initialize()

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def new_cache(self) -> Cache:
        return Cache(len(self.layers), self.patch[0]) if self.causal else super().new_cache()

    @torch.no_grad()
    def initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm | nn.LayerNorm):
                module.reset_parameters()
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        if self.text is not None:
            nn.init.normal_(self.text.null, std=0.02)
        zero: list[nn.Module | None] = [self.head, self.modulation, self.shared]
        for block in (module for module in self.modules() if isinstance(module, Block)):
            zero += [block.modulation, None if block.cross is None else block.cross.out]
        for parameter in (p for module in zero if module is not None for p in module.parameters()):
            nn.init.zeros_(parameter)

    def forward(
        self, z: Tensor, t: Tensor, cond: Condition | None = None, cache: Cache | None = None, start: int = 0
    ) -> Tensor:
        cond = cond or Condition()
        self.check(z, t, cond, cache)
        x, grid = self.tokens(self.mark(z, cond, start))  # (B, T, N, D)
        c = F.silu(self.vector(t, cond.label, self.patch[0]))[:, :, None]  # (B, 1 or T, 1, D)
        text, mask = (None, None) if self.text is None else self.text(len(z), cond.text, cond.text_mask)
        tables = self.tables(grid, start, z)
        if cache is not None:
            cache.open(start, z.shape[2])
        modulation = c if self.shared is None else self.shared(c)
        for i, layer in enumerate(self.layers):
            x = layer(x, modulation, tables, text, mask, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.close(start, z.shape[2])
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        return self.latents(self.head(modulate(x, shift, scale)), grid, z)

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Return the embedded patches `(B, T, N, D)` of marked latents, and the grid that they come from."""
        p, q, r = self.patch
        x = F.pad(x, (0, -x.shape[4] % r, 0, -x.shape[3] % q, 0, -x.shape[2] % p))
        grid = (x.shape[2] // p, x.shape[3] // q, x.shape[4] // r)
        x = rearrange(x, "b c (t p) (h q) (w r) -> b t (h w) (c p q r)", p=p, q=q, r=r)
        return self.embed(x.to(self.embed.weight.dtype)), grid

    def latents(self, x: Tensor, grid: tuple[int, int, int], z: Tensor) -> Tensor:
        """Undo the patches, in shape and type of `z`."""
        p, q, r = self.patch
        y = rearrange(x, "b t (h w) (c p q r) -> b c (t p) (h q) (w r)", h=grid[1], w=grid[2], p=p, q=q, r=r)
        return y[:, :, : z.shape[2], : z.shape[3], : z.shape[4]].to(z.dtype)

    def tables(self, grid: tuple[int, int, int], start: int, z: Tensor) -> list[Tensor]:
        """Return the rotary table of each attention of a block, of the axes along which it mixes."""
        if start % self.patch[0]:
            raise ValueError(f"start={start} is inside a token of {self.patch[0]} frames: use a multiple of it.")
        place, wide = start // self.patch[0], torch.promote_types(z.dtype, torch.float32)
        return [rotary_table(grid, widths, self.rope_base, place, z.device, wide) for widths in self.rotaries]


def check_config(config: dict) -> None:
    """Raise ConfigError for values of which no network can be built."""
    counts = ("channels", "width", "depth", "num_heads", "num_kv_heads", "v_dim", "mlp_width", "classes", "text_width")
    check_counts(config, *counts)
    if len(config["patch"]) != 3 or min(config["patch"]) < 1:
        raise ConfigError(f"patch={config['patch']} does not fit: use three sizes, of frames, rows and columns.")
    heads, width = config["num_heads"], config["width"]
    if heads % (config["num_kv_heads"] or heads):
        raise ConfigError(f"num_kv_heads={config['num_kv_heads']} does not divide num_heads={heads}: use a divisor.")
    if config["qk_dim"] is None and width % heads:
        raise ConfigError(f"num_heads={heads} does not divide width={width}: use a divisor, or set qk_dim.")
    for key, values in (
        ("attention", ("full", "factorised", "causal", "factorised_causal")),
        ("block", ("sequential", "parallel")),
        ("adaln", ("block", "shared")),
        ("mlp", ("gelu", "swiglu")),
    ):
        if config[key] not in values:
            raise ConfigError(f"{key} {config[key]!r} is unknown: use {' or '.join(values)}.")
