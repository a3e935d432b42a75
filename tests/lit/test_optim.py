"""Schedules have the shapes that they are named for; seeds are functions."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from praxino.errors import ConfigError
from praxino.lit.optim import MuonAdamW, seed_of, warmup_constant, warmup_cosine, warmup_stable_decay


def rates(make, steps: int) -> list[float]:
    """Return the learning rate of each step of a run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant():
    assert rates(lambda o: warmup_constant(o), 3) == [2.0] * 3
    assert rates(lambda o: warmup_constant(o, warmup=4), 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_begins_above_zero_and_ends_at_the_floor():
    found = rates(lambda o: warmup_cosine(o, total=12, warmup=2, floor=0.1), 15)
    assert found[:3] == [1.0, 2.0, 2.0]
    assert found[7] == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert found[3] == pytest.approx(2 * (0.1 + 0.45 * (1 + math.cos(math.pi / 10))))
    assert found[12:] == pytest.approx([0.2] * 3)


def test_stable_decay():
    found = rates(lambda o: warmup_stable_decay(o, total=10, warmup=2, decay=4, floor=0.5), 12)
    assert found == pytest.approx([1, 2, 2, 2, 2, 2, 2, 1.75, 1.5, 1.25, 1, 1])
    assert rates(lambda o: warmup_stable_decay(o, total=10), 11) == [2.0] * 11


@pytest.mark.parametrize(("total", "warmup"), [(-1, 0), (0, 0), (10, 11)])
def test_impossible_phases(total, warmup):
    with pytest.raises(ConfigError, match=f"total={total}"):
        rates(lambda o: warmup_cosine(o, total=total, warmup=warmup), 1)


def test_seeds_differ_and_are_the_same_everywhere():
    assert seed_of(0, 1, 2, 3) == 3252311618909706447
    seeds = {seed_of(0, step, micro, rank) for step in range(50) for micro in range(4) for rank in range(4)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)


def muon_steps(weight: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return a weight after Muon's steps."""
    weight = torch.nn.Parameter(weight)
    optimizer = MuonAdamW([{"params": [weight], "hidden": True}], lr=0.1, weight_decay=0.1)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    return weight.detach()


def muon_in_shards(rank: int, folder: str) -> None:
    """Step a weight in shards over two processes, and keep what it became."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    weight, gradients = matrices()
    shards = [distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None) for x in (weight, *gradients)]
    torch.save(muon_steps(shards[0], shards[1:]).full_tensor(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def matrices() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a weight and three gradients, of little rank."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    return draw(7, 5), [draw(7, 2) @ draw(2, 5) for _ in range(3)]


def test_muon_makes_the_same_steps_in_shards(tmp_path):
    torch.multiprocessing.spawn(muon_in_shards, (str(tmp_path),), nprocs=2)
    expected = muon_steps(*matrices())
    assert not torch.equal(expected, matrices()[0])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # an update is added, or multiplied and added
