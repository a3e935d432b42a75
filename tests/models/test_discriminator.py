"""Discriminators: layouts, sizes, and batch norm over two processes."""

import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from praxino.errors import ConfigError
from praxino.models.discriminator import (
    JointBatchNorm2d,
    JointBatchNorm3d,
    NLayerDiscriminator2D,
    NLayerDiscriminator3D,
)

SPLITS = {1: [5], 2: [3, 2]}  # clips on every rank


def names(net: nn.Module, what: str) -> list[str]:
    return [key for key in net.state_dict() if key.endswith(what)]


@pytest.mark.parametrize(
    ("net", "convolutions", "norms"),
    [
        (NLayerDiscriminator3D(width=4), [0, 2, 6, 10, 14, 18], [3, 7, 11, 15]),
        (NLayerDiscriminator3D(width=4, dropout=None), [0, 2, 5, 8, 11, 14], [3, 6, 9, 12]),
        (NLayerDiscriminator2D(width=4), [0, 2, 5, 8, 11], [3, 6, 9]),
    ],
    ids=["wfvae", "opensora", "pix2pix"],
)
def test_the_official_names(net, convolutions, norms):
    assert names(net, "weight") == [f"main.{n}.weight" for n in sorted(convolutions + norms)]
    assert names(net, "bias") == [f"main.{n}.bias" for n in sorted([convolutions[0], convolutions[-1], *norms])]
    assert names(net, "running_var") == [f"main.{n}.running_var" for n in norms]
    assert any(isinstance(module, nn.Dropout) for module in net.modules()) == (convolutions[2] == 6)


def test_shapes():
    x = torch.randn(2, 3, 9, 32, 48)
    assert NLayerDiscriminator3D(width=4)(x).shape == (2, 1, 3, 2, 3)
    assert NLayerDiscriminator3D(width=4)(x[:, :, :1]).shape == (2, 1, 1, 2, 3)
    assert NLayerDiscriminator2D(width=4)(x).shape == (2, 1, 9, 2, 4)
    assert NLayerDiscriminator3D().main[-1].weight.shape == (1, 512, 3, 3, 3)


def test_the_2d_discriminator_judges_every_frame_by_itself():
    net = NLayerDiscriminator2D(width=4, layers=2).eval()
    x = torch.randn(2, 3, 3, 16, 16)
    logits = net(x)
    for b in range(2):
        for t in range(3):
            torch.testing.assert_close(logits[b, :, t], net(x[b : b + 1, :, t : t + 1])[0, :, 0])


def test_initialisation():
    torch.manual_seed(0)
    net = NLayerDiscriminator3D()
    convolution, norm = net.main[10], net.main[11]
    assert float(convolution.weight.detach().std()) == pytest.approx(0.02, rel=0.01)
    assert float(norm.weight.detach().mean()) == pytest.approx(1, abs=0.005)
    assert float(norm.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert not norm.bias.any()


def test_group_norm_leaves_clips_alone():
    net = NLayerDiscriminator3D(width=24, layers=2, norm="group", dropout=None)  # 48 channels: 16 groups
    assert names(net, "running_mean") == []
    assert net.main[3].num_groups == 16
    x = torch.randn(3, 3, 5, 16, 16)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("joint", "plain", "shape"),
    [(JointBatchNorm2d, nn.BatchNorm2d, (4, 6, 5, 5)), (JointBatchNorm3d, nn.BatchNorm3d, (4, 6, 3, 5, 5))],
)
def test_one_process_is_torchs_batch_norm(joint, plain, shape):
    ours, theirs = joint(6), plain(6)
    assert isinstance(ours, plain)
    for training in (True, True, False):
        x = torch.randn(shape) * 3 + 1
        assert torch.equal(ours.train(training)(x), theirs.train(training)(x))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NLayerDiscriminator3D(layers=0), "layers=0"),
        (lambda: NLayerDiscriminator3D(norm="layer"), "batch or group"),
        (lambda: NLayerDiscriminator2D(dropout=1.0), "dropout=1.0"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_wrong_videos():
    with pytest.raises(ValueError, match=r"use \(B, 3, T, H, W\)"):
        NLayerDiscriminator3D(width=4)(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="use 24 pixels or more"):
        NLayerDiscriminator2D(width=4)(torch.zeros(1, 3, 1, 32, 23))
    assert NLayerDiscriminator2D(width=4).eval()(torch.zeros(1, 3, 1, 24, 24)).shape == (1, 1, 1, 1, 1)


def judge(folder: Path, rank: int, ranks: int) -> None:
    """Train a step on this rank's clips; store logits, gradients and statistics."""
    if ranks > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    found = {}
    for name, cls in (("2d", NLayerDiscriminator2D), ("3d", NLayerDiscriminator3D)):
        torch.manual_seed(0)
        net = cls(width=4, layers=2, dropout=None).double()
        clips = (torch.randn(5, 3, 5, 16, 16, dtype=torch.float64) * 2 + 1).split(SPLITS[ranks])[rank]
        clips.requires_grad_()
        logits = net(clips)
        (slope,) = torch.autograd.grad(logits.sin().sum(), clips, create_graph=True)
        (logits.square().sum() + slope.square().sum()).backward()  # a penalty of the gradient, as R1: second order
        gradients = torch.cat([p.grad.flatten() for p in net.parameters()])
        if ranks > 1:
            dist.all_reduce(gradients)
        found |= {f"{name}.logits": logits.detach(), f"{name}.clips": clips.grad, f"{name}.weights": gradients}
        found |= {f"{name}.{key}": value for key, value in net.named_buffers()}
        with torch.no_grad():
            found[f"{name}.eval"] = net.eval()(clips)
    torch.save(found, folder / f"{ranks}-{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


def test_two_processes_normalise_as_one_with_the_joint_batch(tmp_path):
    judge(tmp_path, 0, 1)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=judge, args=(tmp_path, rank, 2), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=200)
    assert [worker.exitcode for worker in workers] == [0, 0]
    one, *two = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for key, value in one.items():
        parts = [rank[key] for rank in two]
        if key.endswith(("logits", "clips", "eval")):
            parts = [torch.cat(parts)]
        for part in parts:
            torch.testing.assert_close(part, value, rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
