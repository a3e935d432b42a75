"""Six steps of the official training, the two networks in turns, reproduce every logged loss."""

import json
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from praxino import checkpoint
from praxino.callbacks.ema import EMA
from praxino.lit.vae import VAEModule
from praxino.losses.adversarial import Adversary
from praxino.losses.vae import VAELoss
from praxino.models.discriminator import NLayerDiscriminator3D
from praxino.models.vae import Posterior

NAMES = {"total_loss": "loss", "d_weight": "adversarial_weight", "g_loss": "adversarial"}
JUDGED = {"disc_loss": "disc_loss", "logits_real": "disc_real", "logits_fake": "disc_fake"}


class Stand(nn.Module):
    """What the golden data have in the place of LPIPS: the difference of frames at half the size."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = (F.avg_pool2d(video.transpose(1, 2).flatten(0, 1), 2) for video in (x, y))
        return (a - b).abs().mean(dim=(1, 2, 3)).view(x.shape[0], x.shape[2])


def test_six_steps_of_the_official_training(shared, tmp_path, monkeypatch):
    folder = shared("golden/train_trajectory")
    golden, batches = json.loads((folder / "trajectory.json").read_text()), load_file(folder / "batches.safetensors")
    discriminator = NLayerDiscriminator3D(width=8, layers=2, dropout=0.0)
    discriminator.load_state_dict(load_file(folder / "init_discriminator.safetensors"))
    net = checkpoint.load(folder / "init_hf").train()
    module = VAEModule(
        net,
        VAELoss(lpips=Stand(), reduction="official"),
        partial(torch.optim.AdamW, lr=1e-4, weight_decay=1e-4),
        adversary=Adversary(discriminator, start=2, alternate=True),
        clip=None,
    )
    noises, logged = iter(range(6)), []
    monkeypatch.setattr(Posterior, "sample", lambda self, _: self.mean + self.std * batches[f"eps{next(noises)}"])
    monkeypatch.setattr(module, "to_input", lambda video: video)
    monkeypatch.setattr(module, "_report", logged.append)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=1,
        logger=False,
        callbacks=[EMA(decay=0.9, ramp=False)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([{"video": batches[f"batch{k}"]} for k in range(6)], batch_size=None))

    assert (module.step, module.passes, trainer.global_step) == (4, 2, 4)
    assert len(logged) == len(golden["rows"]) == 6
    x, z = batches["batch0"], batches["eps0"]
    frame, coefficients = x[0, :, 0].numel(), 12 * 3 * 8 * 8 + 24 * 2 * 4 * 4
    for row, expected in zip(logged, golden["rows"], strict=True):
        found = {name.removeprefix("train/"): value for name, value in row.items()}
        if expected["kind"] == "disc":
            assert {name: found[ours] for name, ours in JUDGED.items()} == pytest.approx(
                {name: expected[name] for name in JUDGED}, rel=1e-4
            )
            continue
        assert frame * (found["l1"] + found["perceptual"]) == pytest.approx(expected["nll_loss"], rel=1e-5)
        assert found["kl"] * z.numel() == pytest.approx(expected["kl_loss"], rel=1e-5)
        assert found["wavelet"] * coefficients == pytest.approx(expected["wl_loss"], rel=1e-5)
        names = NAMES if expected["disc_factor"] else {"total_loss": "loss"}
        assert {name: found[ours] for name, ours in names.items()} == pytest.approx(
            {name: expected[name] for name in names}, rel=1e-4
        )
    weights = dict(net.named_parameters())
    for name, norm in golden["final_norms"].items():
        assert weights[name].norm().item() == pytest.approx(norm, rel=1e-6)

    layout = shared("golden/ckpt_layout")  # written after these steps
    ema = checkpoint.load(layout / "checkpoint-6.ckpt").state_dict()
    for name, value in module.ema_net.named_parameters():
        if not name.endswith(".k.conv.bias"):  # a gradient of zero, whose rounding AdamW turns into steps
            torch.testing.assert_close(value, ema[name], rtol=0, atol=1e-6)
