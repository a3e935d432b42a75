"""FSDP2 on two processes of the CPU: the same training as DDP, each rank with half of everything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from praxino import checkpoint, shards
from praxino.callbacks.durable import DurableIO
from praxino.errors import CheckpointError

SCRIPT = Path(__file__).with_name("fsdp_run.py")


def launch(out: Path, scenario: str, ranks: int, resume: Path | None = None) -> list[dict]:
    """Run a scenario of the script; return what each rank found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(out), scenario, str(ranks), *([str(resume)] if resume else [])]
    result = subprocess.run(command, env=environment, timeout=600, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def close(a: dict, b: dict, tolerance: float) -> None:
    for key in ("weights", "ema"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=tolerance)
    assert a["step"] == b["step"]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["", "-adamw-recompute", "-accumulate"])
def test_twenty_steps_equal_ddp(tmp_path, words):
    """Weights, average and clipping, which is always on: with SGD a wrong norm would show."""
    ddp = launch(tmp_path / "ddp", f"ddp{words}-20", 2)[0]
    fsdp = launch(tmp_path / "fsdp", f"fsdp{words}-20", 2)
    close(fsdp[0], ddp, 1e-6)
    close(fsdp[0], fsdp[1], 0)
    for size in ("local", "ema_local"):
        assert fsdp[0][size] + fsdp[1][size] == ddp[size]
        assert max(rank[size] for rank in fsdp) < 0.6 * ddp[size]


@pytest.mark.slow
def test_two_ranks_equal_one_with_the_double_batch(tmp_path):
    one, two = launch(tmp_path / "one", "ddp-double-4", 1)[0], launch(tmp_path / "two", "ddp-double-4", 2)
    close(two[0], one, 1e-10)
    close(two[0], two[1], 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "-sharded"])
def test_saved_on_two_resumed_on_one_and_back(tmp_path, kind):
    """The result is that of 12 steps without a stop; each part has half of the batch, or all of it."""

    def best() -> int:
        """Return the step of the best checkpoint, a directory or a file as the last run that found one writes it."""
        step = json.loads((tmp_path / "best" / "best.json").read_text())["step"]
        assert checkpoint.load_denoiser(tmp_path / "best" / "best.ckpt")[1].step == step
        return step

    whole = launch(tmp_path / "whole", "ddp-momentum-12", 1)[0]
    launch(tmp_path / "a", f"fsdp{kind}-momentum-best-4", 2)
    assert best() == 4
    launch(tmp_path / "b", f"fsdp{kind}-momentum-best-8", 1, tmp_path / "a" / "checkpoints" / "step-00000004.ckpt")
    assert best() == 8
    parts = tmp_path / "b" / "checkpoints" / "step-00000008.ckpt"
    last = launch(tmp_path / "c", f"fsdp{kind}-momentum-best-12", 2, parts)
    assert best() == 12
    close(last[0], whole, 1e-6)
    plain = launch(tmp_path / "d", "ddp-momentum-best-12", 1, parts)
    assert best() == 12
    assert (tmp_path / "best" / "best.ckpt").is_file()
    close(plain[0], whole, 1e-6)
    for weights in ("ema", "raw"):
        net, trained = checkpoint.load_denoiser(tmp_path / "c", weights=weights)
        found = torch.cat([value.flatten() for value in net.state_dict().values()])
        assert torch.equal(found, last[0]["ema" if weights == "ema" else "weights"])
    assert trained.step == 12
    assert trained.shape == (3, 4, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"), [("ddp", "compile"), ("ddp", "compile-recompute"), ("fsdp", "compile-recompute")]
)
def test_compiled_blocks_learn_the_same(tmp_path, kind, words):
    """Two ranks, then one that goes on, against 8 steps of one rank without; all blocks share one graph a run."""
    whole = launch(tmp_path / "whole", "ddp-momentum-8", 1)[0]
    first = launch(tmp_path / "a", f"{kind}-{words}-momentum-4", 2)
    last = launch(
        tmp_path / "b", f"{kind}-{words}-momentum-8", 1, tmp_path / "a" / "checkpoints" / "step-00000004.ckpt"
    )
    close(first[0], first[1], 0)
    close(last[0], whole, 1e-6)
    assert [rank["graphs"] for rank in (whole, *first, *last)] == [0, 1, 1, 1]


@pytest.mark.slow
def test_bf16_trains_in_shards(tmp_path):
    fsdp = launch(tmp_path, "fsdp-adamw-bf16-4", 2)
    assert bool(fsdp[0]["weights"].isfinite().all())
    assert fsdp[0]["weights"].dtype == torch.float32


def write(directory: Path, tensors: dict[str, torch.Tensor], world: int) -> None:
    """Write what `world` ranks would, of tensors cut by `torch.chunk`."""
    directory.mkdir()
    for rank in range(world):
        rows = {}
        for name, tensor in tensors.items():
            parts = tensor.chunk(world)
            rows[name] = (parts[rank] if rank < len(parts) else tensor[:0]).contiguous()
        shards.write_rows(rows, directory, rank, world)
    tree = {name: {shards.MARK: name, "shape": list(tensor.shape)} for name, tensor in tensors.items()}
    torch.save({"tensors": tree, "step": 3, "list": [1, {"a": None}]}, directory / shards.META)
    shards.finish(directory, world)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shards_come_back_whole_and_in_any_part(tmp_path, world):
    tensors = {"a": torch.randn(7, 3), "b": torch.arange(4.0), "c": torch.randn(1, 2)}
    write(tmp_path / "x.ckpt", tensors, world)
    content = shards.read(tmp_path / "x.ckpt")
    assert (content["step"], content["list"]) == (3, [1, {"a": None}])
    assert all(torch.equal(content["tensors"][name], tensor) for name, tensor in tensors.items())
    halves = shards.read(tmp_path / "x.ckpt", lambda shape, rows: rows(shape[0] // 2, shape[0]))
    assert all(torch.equal(halves["tensors"][name], tensor[len(tensor) // 2 :]) for name, tensor in tensors.items())


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "unfinished"])
def test_a_damaged_directory_is_no_checkpoint(tmp_path, harm):
    path = tmp_path / "checkpoints" / "step-00000002.ckpt"
    path.parent.mkdir()
    write(path, {"a": torch.randn(7, 3)}, 2)
    older = path.with_name("step-00000001.ckpt")
    write(older, {"a": torch.randn(7, 3)}, 2)
    checkpoint.verify(path)
    victim = path / "shard-00001-of-00002.safetensors"
    content = bytearray(victim.read_bytes())
    if harm == "flip":
        content[-5] ^= 1
        victim.write_bytes(content)
    elif harm == "cut":
        victim.write_bytes(content[:-4])
    else:
        (victim if harm == "remove" else path / shards.COMPLETE).unlink()
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        checkpoint.verify(path)
    assert checkpoint.find_last(tmp_path) == older


def test_any_strategy_reads_a_directory(tmp_path):
    write(tmp_path / "x.ckpt", {"a": torch.ones(3, 2)}, 2)
    assert torch.equal(DurableIO().load_checkpoint(tmp_path / "x.ckpt")["tensors"]["a"], torch.ones(3, 2))
