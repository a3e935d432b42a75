"""A 3D U-Net that removes noise: convolutions over space and time, attention where the frames are small."""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from praxino.errors import ConfigError
from praxino.models.conditioning import Condition, LabelEmbedding, TimeEmbedding
from praxino.models.denoiser import Cache, Denoiser
from praxino.models.dit import Attention
from praxino.models.header import check_counts
from praxino.ops.position import rotary_table, share


def group_norm(channels: int) -> nn.GroupNorm:
    """Build a group norm of 32 groups, or as many as divide the channels."""
    return nn.GroupNorm(gcd(32, channels), channels, eps=1e-6)


class Mixer(nn.Module):
    """Attention over all positions `(B, C, T, H, W)`, with a residual connection; the identity at first."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        heads = max(channels // head_dim, 1)
        self.norm = group_norm(channels)
        self.attention = Attention(channels, heads, heads, head_dim, head_dim, "all", causal=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        h = self.norm(x).permute(0, 2, 3, 4, 1)  # (B, T, H, W, C)
        h = self.attention(h.flatten(2, 3), table)
        return x + h.unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)


class Block(nn.Module):
    """Two convolutions with norms, the second scaled and shifted by the condition, then attention if wanted."""

    def __init__(
        self, in_channels: int, out_channels: int, width: int, dropout: float, head_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.mixer = None if head_dim is None else Mixer(out_channels, head_dim)

    def forward(self, x: Tensor, c: Tensor, table: Tensor) -> Tensor:
        scale, shift = self.modulation(c).mT[..., None, None].chunk(2, dim=1)  # (B, C, 1 or T, 1, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        x = (x if self.skip is None else self.skip(x)) + self.conv2(self.dropout(h))
        return x if self.mixer is None else self.mixer(x, table)


class UNet3D(Denoiser):
    """A U-Net over latents, or over pixels with IdentityVAE, whose prediction is zero at first.

    Frames are halved from level to level, never their number; sizes that do not divide are padded, and cut from the
    prediction.

    Args:
        channels: of the latents.
        width: channels of the first level.
        multipliers: of that width, for every level.
        depth: blocks a level.
        attention: levels, from 0, whose blocks attend over all positions; the middle always does.
        head_dim: channels a head.
        classes: number of labels.
    """

    def __init__(
        self,
        channels: int,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        depth: int = 2,
        attention: Sequence[int] = (3,),
        head_dim: int = 64,
        rope_base: float = 100.0,
        dropout: float = 0.0,
        classes: int | None = None,
    ) -> None:
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__({**config, "multipliers": list(multipliers), "attention": list(attention)})
        check_config(self.config)
        self.channels, self.classes = channels, classes
        self.depth, self.head_dim, self.rope_base = depth, head_dim, rope_base
        embedded, widths = 4 * width, [width * m for m in multipliers]
        heads = [head_dim if level in attention else None for level in range(len(widths))]
        self.time = TimeEmbedding(embedded)
        self.label = None if classes is None else LabelEmbedding(classes, embedded)

        self.stem = nn.Conv3d(channels + 2, width, 3, padding=1)  # and the marks of given frames and of the first
        held, now = [width], width  # widths of what the way up will be given, and of what is under way
        self.down, self.up, self.shrink, self.grow = (nn.ModuleList() for _ in range(4))
        for level, size in enumerate(widths):
            for _ in range(depth):
                self.down.append(Block(now, size, embedded, dropout, heads[level]))
                held.append(now := size)
            if level < len(widths) - 1:
                self.shrink.append(nn.Conv3d(now, now, 3, stride=(1, 2, 2), padding=1))
                held.append(now)
        self.middle = nn.ModuleList(
            [Block(now, now, embedded, dropout, head_dim), Block(now, now, embedded, dropout)],
        )
        for level, size in reversed(list(enumerate(widths))):
            for _ in range(depth + 1):
                self.up.append(Block(now + held.pop(), size, embedded, dropout, heads[level]))
                now = size
            if level:
                self.grow.append(nn.Conv3d(now, now, 3, padding=1))
        self.norm = group_norm(now)
        self.head = nn.Conv3d(now, channels, 3, padding=1)
        self.initialize()

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.down, *self.middle, *self.up]

    @torch.no_grad()
    def initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d | nn.GroupNorm | nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, LabelEmbedding):
                nn.init.normal_(module.weight, std=0.02)
        zero: list[nn.Module] = [self.head]
        for block in (module for module in self.modules() if isinstance(module, Block)):
            zero += [block.conv2] if block.mixer is None else [block.conv2, block.mixer.attention.out]
        for parameter in (p for module in zero for p in module.parameters()):
            nn.init.zeros_(parameter)

    def forward(
        self, z: Tensor, t: Tensor, cond: Condition | None = None, cache: Cache | None = None, start: int = 0
    ) -> Tensor:
        cond = cond or Condition()
        self.check(z, t, cond, cache)
        c = F.silu(self.vector(t, cond.label))  # (B, 1 or T, E)
        times = 2 ** len(self.shrink)
        x = F.pad(self.mark(z, cond, start), (0, -z.shape[4] % times, 0, -z.shape[3] % times))
        sizes = [(z.shape[2], x.shape[3] >> level, x.shape[4] >> level) for level in range(len(self.shrink) + 1)]
        tables = [self.table(size, z) for size in sizes]

        h = self.stem(x.to(self.stem.weight.dtype).contiguous())  # group norm: see ops.norm.to_exact_layout
        held, down, up = [h], iter(self.down), iter(self.up)
        for level, table in enumerate(tables):
            for _ in range(self.depth):
                held.append(h := next(down)(h, c, table))
            if level < len(self.shrink):
                held.append(h := self.shrink[level](h))
        for block in self.middle:
            h = block(h, c, tables[-1])
        for level, table in reversed(list(enumerate(tables))):
            for _ in range(self.depth + 1):
                h = next(up)(torch.cat((h, held.pop()), dim=1), c, table)
            if level:
                h = self.grow[-level](F.interpolate(h, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))
        h = self.head(F.silu(self.norm(h)))
        return h[..., : z.shape[3], : z.shape[4]].to(z.dtype)

    def table(self, size: tuple[int, int, int], z: Tensor) -> Tensor:
        """Return the rotary table of a level."""
        dtype = torch.promote_types(z.dtype, torch.float32)
        return rotary_table(size, share(self.head_dim), self.rope_base, device=z.device, dtype=dtype)


def check_config(config: dict) -> None:
    """Raise ConfigError for values of which no network can be built."""
    check_counts(config, "channels", "width", "depth", "head_dim", "classes")
    levels = len(config["multipliers"])
    if not levels or min(config["multipliers"]) < 1:
        raise ConfigError(f"multipliers={config['multipliers']} do not fit: use one, of 1 or more, for every level.")
    if any(level not in range(levels) for level in config["attention"]):
        raise ConfigError(f"attention={config['attention']} does not fit: use levels from 0 to {levels - 1}.")
