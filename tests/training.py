"""A real, tiny training for the tests: WF-VAE of 8 channels on clips of 5 frames, made in memory."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from praxino.callbacks.checkpoint import Checkpoint
from praxino.callbacks.ema import EMA
from praxino.callbacks.record import RunLog
from praxino.lit.optim import warmup_cosine
from praxino.lit.vae import VAEModule
from praxino.losses.adversarial import Adversary
from praxino.losses.vae import VAELoss
from praxino.models.discriminator import NLayerDiscriminator3D
from praxino.models.wfvae import WFVAE


def make_net(seed: int = 0) -> WFVAE:
    torch.manual_seed(seed)
    return WFVAE(
        latent_dim=2,
        base_channels=8,
        encoder_num_resblocks=1,
        encoder_energy_flow_hidden_size=4,
        decoder_num_resblocks=1,
        decoder_energy_flow_hidden_size=4,
        norm_type="layernorm",
        t_interpolation="trilinear",
    )


def make_module(**overrides: Any) -> VAEModule:
    arguments: dict[str, Any] = {
        "net": make_net(),
        "loss": VAELoss(),
        "optimizer": partial(torch.optim.AdamW, lr=1e-3, fused=True),
        "scheduler": partial(warmup_cosine, total=100, warmup=3),
    }
    return VAEModule(**{**arguments, **overrides})


def make_adversary(start: int = 0, norm: Any = "group", dropout: float | None = None, **options: Any) -> Adversary:
    torch.manual_seed(1)
    return Adversary(NLayerDiscriminator3D(width=8, layers=2, norm=norm, dropout=dropout), start=start, **options)


class Clips(Dataset):
    """uint8 clips `(5, 16, 16, 3)` that are a function of (epoch, index)."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        video = torch.randint(256, (5, 4, 4, 3), generator=generator, dtype=torch.uint8)
        return {"video": video.repeat_interleave(4, 1).repeat_interleave(4, 2), "index": index, "path": f"{index}.mp4"}


class Order:
    """Batches of a permutation that depends on the epoch, shared out to ranks."""

    def __init__(self, count: int, batch: int, rank: int, world: int) -> None:
        self.count, self.batch, self.rank, self.world = count, batch, rank, world
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.count // (self.batch * self.world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        mine = order[self.rank :: self.world]
        for number in range(self.start, len(self)):
            yield [(self.epoch, index) for index in mine[number * self.batch : (number + 1) * self.batch]]


class Loader(DataLoader):
    """Goes on from any position."""

    def __init__(self, order: Order, dataset: Dataset, workers: int = 0) -> None:
        self.order, self.position = order, 0
        super().__init__(dataset, batch_sampler=order, num_workers=workers, generator=torch.Generator().manual_seed(0))

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        self.order.epoch, self.order.start = divmod(self.position, len(self.order))
        for batch in super().__iter__():
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Data(pl.LightningDataModule):
    clips: type[Clips] = Clips

    def __init__(self, count: int = 12, batch: int = 2, workers: int = 0, val_batch: int = 2) -> None:
        super().__init__()
        self.count, self.batch, self.workers, self.val_batch = count, batch, workers, val_batch

    def ranks(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.global_rank, self.trainer.world_size

    def train_dataloader(self) -> Loader:
        return Loader(Order(self.count, self.batch, *self.ranks()), self.clips(self.count), self.workers)

    def val_dataloader(self) -> DataLoader:
        rank, world = self.ranks()
        keys = [(999, index) for index in range(5)][rank::world]
        groups = [keys[i : i + self.val_batch] for i in range(0, len(keys), self.val_batch)]
        return DataLoader(self.clips(5), batch_sampler=groups)


class Tape(pl.Callback):
    """Keeps which samples were seen, in order."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        self.seen.append(batch["index"].tolist())


def train(
    out: Path,
    steps: int = 10,
    module: VAEModule | None = None,
    data: Data | None = None,
    resume: Path | None = None,
    callbacks: tuple[pl.Callback, ...] = (),
    every: int | None = None,
    ema: EMA | None = None,
    **trainer: Any,
) -> pl.Trainer:
    """Run `Trainer.fit`; the callbacks are those given, EMA and Checkpoint."""
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "logger": [RunLog(str(out))],
        "default_root_dir": out,
        **trainer,
    }
    tools = [*callbacks, ema or EMA(decay=0.9), Checkpoint(str(out / "checkpoints"), every=every, keep=None)]
    result = pl.Trainer(callbacks=tools, **arguments)
    result.fit(module or make_module(), datamodule=data or Data(), ckpt_path=resume, weights_only=True)
    return result


def rows(out: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl without the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in lines]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Return where two nested states differ by as much as one bit."""
    if isinstance(a, Tensor):
        return [] if isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [name]
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return [f"{name} keys"]
        return [d for key in a for d in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list | tuple):
        if not isinstance(b, list | tuple) or len(a) != len(b):
            return [f"{name} length"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{name}.{i}")]
    return [] if a == b else [f"{name}: {a} != {b}"]
