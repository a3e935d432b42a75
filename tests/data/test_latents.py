"""The latent cache as it is read: windows, noise, normalisation, digests, and a loader that resumes exactly."""

import json
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from praxino.data.latent_file import HEADER, Shards, ShardWriter, sha256
from praxino.data.latent_module import LatentData
from praxino.data.latents import LatentClip, LatentReader, read_manifest, verify, write_manifest
from praxino.errors import ConfigError, DataError

LENGTHS = [5, 3, 4, 6, 5, 5, 4, 5, 7, 5, 3]  # latents of the clips
MEAN, STD = [0.5, -1.0], [2.0, 0.25]


def moments(k: int, shape: tuple[int, int, int] = (2, 2, 3)) -> torch.Tensor:
    """The moments of clip k, `(T, 2C, H, W)`: the mean tells clip, latent and place, the log-variance is -2."""
    channels, height, width = shape
    latents = torch.arange(LENGTHS[k]).view(-1, 1, 1, 1)
    mean = (
        16 * k + latents + torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(k))
    ).float()
    return torch.cat((mean, torch.full_like(mean, -2.0)), dim=1).bfloat16()


def make_cache(root: Path, classes: list[str] | None = None, fingerprint: str = "f" * 64) -> Path:
    """Write a cache of three shards."""
    root.mkdir(parents=True, exist_ok=True)
    clips, shards = [], []
    for number, places in enumerate([range(4), range(4, 8), range(8, 11)]):
        path = root / f"shard-{number:05d}.safetensors"
        with ShardWriter(path, root / "temporary") as writer:
            for k in places:
                fields: dict[str, Any] = {"path": f"{'ab'[k % 2]}/{k:02d}.mp4", "stamp": str(k), "shard": number}
                fields |= {"offset": writer.length, "shape": (2, LENGTHS[k], 2, 3), "frames": 4 * LENGTHS[k] - 3}
                clips.append(LatentClip(**fields, start=0, fps=25.0 + k, label=k % 2 if classes else None))
                writer.add(moments(k))
            digest = writer.close()
        shards.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest, "clips": len(places)})
    head = {"fingerprint": fingerprint, "statistics": {"mean": MEAN, "std": STD}, "stride": (4, 8, 8), "channels": 2}
    head |= {"frame_rule": (1, 4), "classes": classes, "protocol": {"frames": None}, "shards": shards}
    write_manifest(root / "manifest.jsonl", head, clips)
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "cache")


def data_of(cache: Path, **options: Any) -> LatentData:
    given = {"frames": 9, "batch": 2, "workers": 0, "val_fraction": 0.2}
    return LatentData(str(cache), **{**given, **options})


def test_the_frame_rate_is_the_median_of_training(cache):
    data = data_of(cache, val_fraction=0.0, val_root=str(cache))
    assert data.rate() == 30  # of 25, 26, ..., 35


# -------------------------------------------------------------------------------------------------- the files
def test_a_shard_is_plain_safetensors_written_whole_or_not_at_all(tmp_path: Path) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    path = tmp_path / "a.safetensors"
    with ShardWriter(path, tmp_path / "t") as writer:
        writer.add(values[:300])
        writer.add(torch.full((77,), 9.0).bfloat16())
        writer.cut(300)  # what a video that broke off had added
        writer.add(values[300:].view(7, 100).T.contiguous().T)  # of any strides
        assert not path.exists()
        digest = writer.close()
    assert digest == sha256(path)
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["moments"]
        assert torch.equal(file.get_tensor("moments"), values)
    assert path.stat().st_size == HEADER + 2000
    with ShardWriter(path, tmp_path / "t") as writer:
        writer.add(values)  # and no close, as where an exception ends it
    assert sha256(path) == digest
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors"}


def test_every_window_is_that_of_the_clip_and_nothing_else_is_read(cache: Path) -> None:
    manifest = read_manifest(cache)
    reader = pickle.loads(pickle.dumps(LatentReader(manifest)))
    for k, clip in enumerate(manifest.clips):
        whole = moments(k).transpose(0, 1)
        for start in range(LENGTHS[k]):
            for length in range(1, LENGTHS[k] - start + 1):
                window = reader.read(clip, start, length)
                assert torch.equal(window, whole[:, start : start + length])
                mapped = reader.shards._open[f"shard-{clip.shard:05d}.safetensors"]
                assert window.untyped_storage().data_ptr() == mapped.untyped_storage().data_ptr()  # a view of the file
        assert torch.equal(reader.read(clip), whole)
        for start, length in ((-1, 2), (0, LENGTHS[k] + 1), (1, 0)):
            with pytest.raises(ValueError, match="do not lie in a clip"):
                reader.read(clip, start, length)


def test_the_oldest_mapping_goes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("praxino.data.latent_file.OPEN", 2)
    shards = Shards(cache)
    for number in (0, 1, 0, 2, 1):
        assert len(shards.read(f"shard-{number:05d}.safetensors", 24, 48)) == 24
    assert list(shards._open) == ["shard-00001.safetensors", "shard-00002.safetensors"]


def test_a_manifest_returns_what_was_written(cache: Path) -> None:
    manifest = read_manifest(cache)
    assert manifest.clips[3] == LatentClip("b/03.mp4", "3", 0, 21, 28.0, (2, 6, 2, 3), 0, 288, True, None)
    assert (manifest.stride, manifest.frame_rule, manifest.channels) == ((4, 8, 8), (1, 4), 2)
    assert [manifest.latents(frames) for frames in (1, 5, 9, 17)] == [1, 2, 3, 5]
    with pytest.raises(ConfigError, match=r"frames=16 do not fit .* use 1 \+ 4k, e.g. 13 or 17"):
        manifest.latents(16)
    manifest.check_vae("f" * 64)
    with pytest.raises(ConfigError, match=r"of another VAE \(ffffffffffff, not aaaaaaaaaaaa\)"):
        manifest.check_vae("a" * 64)


def test_damage_is_found_and_named(cache: Path) -> None:
    verify(read_manifest(cache))
    shard, whole = cache / "shard-00001.safetensors", (cache / "shard-00001.safetensors").read_bytes()
    for place in (0, 20, HEADER, len(whole) // 2, len(whole) - 1):  # one flipped bit, anywhere
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"1 of 3 shards .* damaged or gone: shard-00001.safetensors"):
            verify(read_manifest(cache))
        with pytest.raises(DataError, match="shard-00001"):
            data_of(cache, verify=True).setup()
    shard.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="shard-00001"):
        data_of(cache).setup()
    manifest = read_manifest(cache)
    with pytest.raises(DataError, match=r"shard-00001.safetensors cannot be read as a shard"):
        LatentReader(manifest).read(manifest.clips[4])
    shard.unlink()
    with pytest.raises(DataError, match="shard-00001"):
        data_of(cache).setup()


def test_a_damaged_manifest_is_refused(cache: Path, tmp_path: Path) -> None:
    path = cache / "manifest.jsonl"
    whole = path.read_bytes()
    for place in (10, whole.index(b'"offset"') + 10, len(whole) - 10):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"manifest.jsonl is damaged"):
            read_manifest(cache)
    for content in (b"", b"{}", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"manifest.jsonl is damaged"):
            read_manifest(cache)
    with pytest.raises(ConfigError, match=r"holds no latents .*; praxino-encode makes one"):
        read_manifest(tmp_path / "none")
    path.unlink()
    (cache / ".work").mkdir()
    with pytest.raises(ConfigError, match="not finished: run praxino-encode again"):
        read_manifest(cache)


# ----------------------------------------------------------------------------------------------- the batches
def test_latents_are_normalised_windows_and_know_whether_the_first_is_causal(cache: Path) -> None:
    data = data_of(cache, posterior="mean", val_fraction=0.0, batch=1)
    clips = data.find()[0].entries
    starts = set()
    loader = data.train_dataloader()
    for _ in range(40):  # epochs
        for batch in loader:
            (place,), (start,) = batch["index"].tolist(), batch["start"].tolist()
            k = int(clips[place].path[2:4])
            assert batch["path"] == [clips[place].path]
            assert batch["fps"].tolist() == [25 + k]
            mean = moments(k)[start : start + 3, :2].transpose(0, 1).float()
            expected = (mean - torch.tensor(MEAN).view(2, 1, 1, 1)) / torch.tensor(STD).view(2, 1, 1, 1)
            torch.testing.assert_close(batch["latent"], expected[None], rtol=0, atol=1e-6)
            assert batch["first"].tolist() == [start == 0]
            assert batch.keys().isdisjoint({"label", "text"})
            starts.add((LENGTHS[k], start))
    assert starts == {(n, start) for n in set(LENGTHS) for start in range(n - 2)}  # all windows of all lengths
    only = [b["start"].item() for b in data_of(cache, where="start", val_fraction=0.0, batch=1).train_dataloader()]
    assert only == [0] * len(LENGTHS)


def test_the_posterior_is_sampled_anew_by_seed_epoch_and_index(cache: Path) -> None:
    def epochs(**options: Any) -> list[dict[tuple[int, int], torch.Tensor]]:
        loader = data_of(cache, val_fraction=0.0, where="start", batch=1, **options).train_dataloader()
        return [{(b["index"].item(), b["repeat"].item()): b["latent"][0] for b in loader} for _ in range(2)]

    (one, two), (again, _), (other, _) = epochs(), epochs(), epochs(seed=1)
    (means, _) = epochs(posterior="mean")
    assert all(torch.equal(value, again[key]) for key, value in one.items())
    assert not any(torch.equal(value, two[key]) or torch.equal(value, other[key]) for key, value in one.items())
    scale = torch.tensor(STD).view(2, 1, 1, 1) / np.exp(-1.0)  # of log-variance -2
    noise = torch.stack([(value - means[key]) * scale for epoch in (one, two) for key, value in epoch.items()])
    count = noise.numel() ** 0.5
    assert abs(noise.mean()) < 4 / count
    assert abs(noise.var() - 1) < 4 * 2**0.5 / count


def test_validation_is_the_same_every_time_and_split_by_path(cache: Path) -> None:
    data = data_of(cache)
    train, val = (tree.entries for tree in data.find())
    assert val
    assert len(train) + len(val) == len(LENGTHS)
    (first, second) = [[batch["latent"] for batch in data.val_dataloader()] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(batch["first"].all() for batch in data.val_dataloader())
    assert len(data_of(cache, val_fraction=0.5, val_limit=2).find()[1].entries) == 2


def test_validation_takes_means_on_any_number_of_ranks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips that fill up a rank's last batch are those that stand in for: same index, same latents."""
    data = data_of(cache, val_fraction=0.0, val_root=str(cache), val_limit=5, val_batch=1, frames=None)
    seen: dict[int, list[torch.Tensor]] = {}
    for rank in range(2):
        monkeypatch.setattr(data, "_rank_and_world", lambda rank=rank: (rank, 2))
        for batch in data.val_dataloader():
            seen.setdefault(int(batch["index"]), []).append(batch["latent"][0])
            mean = moments(int(batch["path"][0][2:4]))[:, :2].transpose(0, 1).float()
            expected = (mean - torch.tensor(MEAN).view(2, 1, 1, 1)) / torch.tensor(STD).view(2, 1, 1, 1)
            torch.testing.assert_close(batch["latent"][0], expected)
    assert sorted(seen) == list(range(5))
    assert sum(map(len, seen.values())) == 6
    assert all(torch.equal(clip, clips[0]) for clips in seen.values() for clip in clips)


def test_another_cache_to_validate_on_is_of_the_same_vae(cache: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "val")
    train, val = data_of(cache, val_root=str(other)).find()
    assert (len(train.entries), len(val.entries), val.root) == (11, 11, str(other))
    make_cache(other, fingerprint="a" * 64)
    with pytest.raises(ConfigError, match=r"latents in .*val are of another VAE"):
        data_of(cache, val_root=str(other)).setup()
    make_cache(other, classes=["a", "b"])
    with pytest.raises(ConfigError, match=r"classes of .* are not those"):
        data_of(cache, val_root=str(other)).setup()


def test_clips_that_are_too_short(cache: Path) -> None:
    assert {c.shape[1] for c in data_of(cache, frames=17, val_fraction=0.0).find()[0].entries} == {5, 6, 7}
    data = data_of(cache, frames=17, val_fraction=0.0, short="pad", batch=1, posterior="mean", where="start")
    assert len(data.find()[0].entries) == 11
    for batch in data.train_dataloader():
        k = int(batch["path"][0][2:4])
        numbers = torch.arange(5).clamp(max=LENGTHS[k] - 1)
        expected = moments(k)[numbers, :2].transpose(0, 1).float()
        torch.testing.assert_close(
            batch["latent"][0] * torch.tensor(STD).view(2, 1, 1, 1) + torch.tensor(MEAN).view(2, 1, 1, 1), expected
        )
    with pytest.raises(DataError, match=r"none of 11 clips in .* has 26 latents"):
        data_of(cache, frames=101).setup()
    whole = data_of(cache, frames=None, val_fraction=0.0, batch=1).train_dataloader()
    assert sorted(batch["latent"].shape[2] for batch in whole) == sorted(LENGTHS)
    with pytest.raises(DataError, match=r"latents of different shapes in a batch.*use batch=1"):
        list(data_of(cache, frames=None, val_fraction=0.0, batch=11).train_dataloader())


def test_labels_and_texts(tmp_path: Path) -> None:
    cache, texts = make_cache(tmp_path / "cache", classes=["a", "b"]), tmp_path / "texts"
    with pytest.raises(DataError, match=r"11 of 11 clips have no text, first .*00.mp4.safetensors"):
        data_of(cache, text=str(texts)).setup()
    for k in range(11):
        file = texts / f"{'ab'[k % 2]}/{k:02d}.mp4.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"text": torch.full((1 + k % 4, 6), float(k)).bfloat16()}, file)
    data = data_of(cache, text=str(texts), batch=4, val_fraction=0.0)
    assert data.manifest.classes == ["a", "b"]
    for batch in data.train_dataloader():
        numbers = [int(path[2:4]) for path in batch["path"]]
        assert batch["label"].tolist() == [k % 2 for k in numbers]
        longest = max(1 + k % 4 for k in numbers)
        assert batch["text"].shape == (4, longest, 6)
        assert batch["text"].dtype == torch.float32
        for row, mask, k in zip(batch["text"], batch["text_mask"], numbers, strict=True):
            assert mask.tolist() == [place < 1 + k % 4 for place in range(longest)]
            assert row[:, 0].tolist() == [float(k) if here else 0.0 for here in mask]
    save_file({"text": torch.zeros(3)}, texts / "a/00.mp4.safetensors")
    with pytest.raises(DataError, match=r"text of shape \(3,\); \(L, E\) is due"):
        list(data.train_dataloader())


def test_workers_change_nothing(cache: Path) -> None:
    plain, parallel = (data_of(cache, workers=workers) for workers in (0, 2))
    for a, b in zip(plain.train_dataloader(), parallel.train_dataloader(), strict=True):
        assert a.keys() == b.keys()
        assert a["path"] == b["path"]
        assert all(torch.equal(value, b[name]) for name, value in a.items() if isinstance(value, torch.Tensor))
    parallel.teardown()


def test_what_fails_while_reading_ends_the_run_in_one_message(cache: Path) -> None:
    for workers in (0, 1):
        data = data_of(cache, workers=workers, val_fraction=0.0)
        data.setup()
        loader = data.train_dataloader()
        for path in cache.glob("shard-*"):
            path.rename(path.with_suffix(".gone"))
        with pytest.raises(DataError, match=r"shard-0000\d.safetensors cannot be read as a shard of latents"):
            list(loader)
        for path in cache.glob("shard-*"):
            path.rename(path.with_suffix(".safetensors"))


# --------------------------------------------------------------------------------------------- exact resume
class Recorder(pl.LightningModule):
    """Trains one number, and remembers the latents that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        names = ("epoch", "index", "repeat", "start")
        self.seen.append(
            [batch["path"], *(batch[name].tolist() for name in names), batch["latent"].double().sum().item()]
        )
        return (self.weight - batch["latent"].mean()) ** 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: LatentData, steps: int, out: Path, ckpt: Path | None = None) -> Recorder:
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    trainer.save_checkpoint(out / f"{steps}.ckpt")
    return module


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_goes_on_in_the_middle_of_an_epoch(cache: Path, tmp_path: Path, workers: int) -> None:
    whole = fit(data_of(cache, workers=workers), 12, tmp_path)  # epochs of 5 batches
    parts = fit(data_of(cache, workers=workers), 7, tmp_path).seen
    parts += fit(data_of(cache, workers=workers), 12, tmp_path, tmp_path / "7.ckpt").seen
    assert parts == whole.seen
    assert len({json.dumps(row) for row in whole.seen}) == 12


def test_other_latents_are_noticed_on_resume(cache: Path, tmp_path: Path) -> None:
    fit(data_of(cache), 3, tmp_path)
    make_cache(cache, fingerprint="a" * 64)
    with pytest.raises(DataError, match=r"training files changed \(\+0 / -0 / ~\d+ of \d+\).*data.on_change=warn"):
        fit(data_of(cache), 5, tmp_path, tmp_path / "3.ckpt")
