"""The latent cache as it is written: exact, restartable at any moment, the same for any number of processes."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import praxino
from praxino import checkpoint, video
from praxino.data.latent_file import HEADER
from praxino.data.latents import LatentReader, Manifest, read_manifest, verify
from praxino.data.synthetic import draw
from praxino.errors import BusyError, ConfigError, DataError
from praxino.models.wfvae import WFVAE
from praxino.tasks.encode import encode, read_labels
from praxino.tasks.encoding.cache import Workplace
from praxino.tasks.encoding.parts import BYTES, cut
from praxino.tasks.encoding.store import fingerprint

TINY: dict[str, Any] = {
    "latent_dim": 3,
    "base_channels": 8,
    "encoder_num_resblocks": 1,
    "decoder_num_resblocks": 1,
    "encoder_energy_flow_hidden_size": 4,
    "decoder_energy_flow_hidden_size": 4,
    "norm_type": "layernorm",
    "scale": [1.0] * 3,
    "shift": [0.0] * 3,
}
FRAMES = [9, 12, 5, 14, 13, 9, 17, 10]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = WFVAE(**TINY)
    model.initialize("fan_in")
    checkpoint.save_official(model.eval(), path := tmp_path_factory.mktemp("vae"))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for seed, frames in enumerate(FRAMES):
        path = root / f"{'ba'[seed % 2]}/{seed}.mp4"
        video.write(path, draw(0, frames=frames, size=[20, 26], seed=seed)[1], 10 + seed, "lossless")
    return root


def encoded(vae: Path, videos: Path, out: Path, **settings: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"frames": 5, "size": 16, "workers": 0, "device": "cpu", "shard": 3}
    return encode(vae=str(vae), data={"root": str(videos)}, out=str(out), **{**given, **settings})


def content(out: Path) -> dict[str, bytes]:
    """The bytes of manifest and shards."""
    return {path.name: path.read_bytes() for path in (*out.glob("shard-*"), out / "manifest.jsonl")}


@pytest.fixture(scope="module")
def whole(vae: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that was encoded in one go."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    encoded(vae, videos, out)
    return out


def directly(vae: Path, videos: Path, path: str, frames: int, height: int, width: int) -> torch.Tensor:
    """The moments of the first frames of a video, cut to a size, encoded in one piece."""
    clip = video.to_float(video.read(videos / path)[None])[:, :, :frames, :height, :width]
    with torch.inference_mode():
        posterior = praxino.load(vae).encode(clip)
    return torch.cat((posterior.mean, posterior.logvar), dim=1)[0]


@pytest.mark.parametrize(("frames", "chunk"), [(5, None), (None, 3)])
def test_windows_equal_the_direct_encoding(
    vae: Path, videos: Path, tmp_path: Path, frames: int | None, chunk: Any
) -> None:
    result = encoded(vae, videos, tmp_path, frames=frames, size=None, chunk=chunk)
    manifest = read_manifest(tmp_path)
    reader = LatentReader(manifest)
    assert [clip.path for clip in manifest.clips] == [f"{'ba'[k % 2]}/{k}.mp4" for k in (1, 3, 5, 7, 0, 2, 4, 6)]
    found = []
    for clip in manifest.clips:
        k = int(clip.path[2])
        length = frames or 1 + (FRAMES[k] - 1) // 4 * 4
        assert (clip.frames, clip.start, clip.fps, clip.first) == (length, 0, 10 + k, True)
        assert clip.shape == (3, 1 + length // 4, 2, 3)
        expected = directly(vae, videos, clip.path, length, 16, 24)
        found.append(expected.double().flatten(1))
        whole = reader.read(clip)
        torch.testing.assert_close(whole.float(), expected, rtol=2**-8, atol=1e-6)  # bf16
        for start in range(clip.shape[1]):
            assert torch.equal(reader.read(clip, start, 1), whole[:, start : start + 1])
    mean, logvar = torch.cat(found, dim=1).chunk(2)
    std = (mean.var(1, correction=0) + logvar.exp().mean(1)).sqrt()
    for statistics in (manifest.statistics, praxino.load(tmp_path).official_config() | {"mean": result["mean"]}):
        np.testing.assert_allclose(statistics["mean"], mean.mean(1), atol=1e-6)
        np.testing.assert_allclose(statistics["scale"], 1 / std, rtol=1e-5)
    assert manifest.statistics["std"] == result["std"]
    assert manifest.fingerprint == fingerprint(praxino.load(vae)) == result["fingerprint"]
    assert (manifest.stride, manifest.frame_rule, manifest.channels) == ((4, 8, 8), (1, 4), 3)
    assert sum(shard["clips"] for shard in manifest.shards) == len(FRAMES)
    verify(manifest)


def test_loader_processes_and_batches_give_the_same_clips(vae: Path, videos: Path, whole: Path, tmp_path: Path) -> None:
    encoded(vae, videos, tmp_path / "workers", workers=2)
    assert content(tmp_path / "workers") == content(whole)
    encoded(vae, videos, tmp_path / "batch", batch=2)  # a batch never spans two shards
    one, other = read_manifest(whole), read_manifest(tmp_path / "batch")
    assert other.clips == one.clips
    for clip in one.clips:
        pair = [LatentReader(manifest).read(clip).float() for manifest in (one, other)]
        torch.testing.assert_close(*pair, rtol=2**-7, atol=1e-6)


def test_a_second_run_encodes_nothing(
    vae: Path,
    videos: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before, result = content(whole), json.loads((whole / "statistics.json").read_text())
    stamps = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    monkeypatch.setattr("praxino.stream.Encoder.push", lambda *_: pytest.fail("encoded again"))
    with caplog.at_level("INFO"):
        assert encoded(vae, videos, whole) == result
    assert "8 clips are encoded" in caplog.text
    assert content(whole) == before
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == stamps
    (whole / ".work").mkdir()  # killed right after the manifest
    encoded(vae, videos, whole)
    assert not (whole / ".work").exists()


def test_what_another_encoding_left_is_refused(vae: Path, videos: Path, whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    checkpoint.save_official(WFVAE(**TINY), tmp_path / "other")
    mine, others = (fingerprint(praxino.load(path))[:12] for path in (vae, tmp_path / "other"))
    moved = tmp_path / "videos"
    shutil.copytree(videos, moved)  # keeps the times of change
    unfinished = tmp_path / "unfinished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("praxino.tasks.encode.merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            encoded(vae, moved, unfinished)
    with pytest.raises(ConfigError, match="run with stats_only=False: finish that, or delete it"):
        encoded(vae, moved, unfinished, stats_only=True)
    for out in (whole, unfinished):
        before = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(ConfigError, match=rf"out=.* of another VAE \({mine}, not {others}\): choose another out"):
            encoded(tmp_path / "other", moved, out)
        with pytest.raises(ConfigError, match=r"another protocol \(frames=5, not 9; size=16, not \[16, 24\]\)"):
            encoded(vae, moved, out, frames=9, size=[16, 24])
        with pytest.raises(ConfigError, match="with other classes"):
            encoded(vae, moved, out, labels="folders")
        with pytest.raises(ConfigError, match=r"of other videos \(0 new or changed, 1 gone, first 'b/6.mp4'\)"):
            encoded(vae, moved, out, limit=7)
        os.utime(moved / "a/3.mp4")
        with pytest.raises(ConfigError, match=r"of other videos \(1 new or changed, 0 gone, first 'a/3.mp4'\)"):
            encoded(vae, moved, out)
        shutil.copystat(videos / "a/3.mp4", moved / "a/3.mp4")
        assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    encoded(vae, moved, unfinished)
    assert {k: v for k, v in content(unfinished).items() if "shard" in k} == {
        k: v for k, v in content(whole).items() if "shard" in k
    }


def test_one_run_at_a_time_writes_a_cache(vae: Path, videos: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        work = Workplace(tmp_path, latents=True)
        work.claim()
        os.write(write, b".")
        time.sleep(600)
        os._exit(0)
    os.read(read, 1)
    try:
        with pytest.raises(BusyError, match="is being written by another run"):
            encoded(vae, videos, tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert encoded(vae, videos, tmp_path)["videos"] == 8


def test_damaged_shards_are_made_anew(vae: Path, videos: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    shutil.copytree(whole, out)
    (out / "shard-00000.safetensors").unlink()
    encoded(vae, videos, out)
    assert content(out) == content(whole)
    data = bytearray((out / "shard-00002.safetensors").read_bytes())
    data[-3] ^= 1
    (out / "shard-00002.safetensors").write_bytes(data)
    encoded(vae, videos, out)  # does not look
    with pytest.raises(DataError, match=r"1 of 3 shards .*shard-00002"):
        verify(read_manifest(out))
    encoded(vae, videos, out, verify=True)
    assert content(out) == content(whole)
    assert not (out / ".work").exists()


def test_labels(vae: Path, videos: Path, tmp_path: Path) -> None:
    def labels(manifest: Manifest) -> dict[str, str]:
        assert manifest.classes is not None
        return {clip.path: manifest.classes[clip.label] for clip in manifest.clips if clip.label is not None}

    encoded(vae, videos, tmp_path / "folders", labels="folders", limit=6)
    manifest = read_manifest(tmp_path / "folders")
    assert manifest.classes == ["a", "b"]
    assert labels(manifest) == {clip.path: clip.path[0] for clip in manifest.clips}
    table = tmp_path / "labels.csv"
    rows = [f"{clip.path},{'odd' if clip.path[2] in '13' else 'even'},x\n" for clip in manifest.clips]
    table.write_text("path,label,note\n" + "".join(rows))
    encoded(vae, videos, tmp_path / "csv", labels=str(table), limit=6)
    assert labels(read_manifest(tmp_path / "csv"))["a/3.mp4"] == "odd"
    with pytest.raises(ConfigError, match=r"no row for 2 of 8 videos, first 'a/7.mp4'"):
        encoded(vae, videos, tmp_path / "more", labels=str(table))
    with pytest.raises(ConfigError, match=r"no folder below data.root for 4 of 4 videos, first '1.mp4'"):
        encoded(vae, videos / "a", tmp_path / "flat", labels="folders")
    table.write_text("file,class\n")
    for wrong in (table, tmp_path / "none.csv"):
        with pytest.raises(ConfigError, match=r"no CSV file with the columns path and label|no row for"):
            encoded(vae, videos, tmp_path / "wrong", labels=str(wrong))


def test_classes_that_are_numbers_are_in_their_order() -> None:
    def classes(*names: str) -> tuple[list[int | None], list[str] | None]:
        entries: Any = [SimpleNamespace(path=f"{name}/x.mp4") for name in names]
        return read_labels("folders", entries)

    assert classes("10", "2", "0") == ([2, 1, 0], ["0", "2", "10"])
    assert classes("10", "2", "a")[1] == ["10", "2", "a"]


def test_a_table_of_classes_may_come_from_excel(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path,label\nx.mp4,cat\n", encoding="utf-8-sig")
    entries: Any = [SimpleNamespace(path="x.mp4")]
    assert read_labels(str(tmp_path / "labels.csv"), entries) == ([0], ["cat"])


def test_a_video_that_breaks_off_leaves_no_latents(vae: Path, videos: Path, tmp_path: Path) -> None:
    """Its first pieces are in the shard already when it fails; once it is mended, the cache is of other videos."""
    healthy = video.Video.chunks

    def breaking(self: Any, *args: Any) -> Any:
        for number, piece in enumerate(healthy(self, *args)):
            if "5.mp4" in str(self.path) and number == 3:
                return
            yield piece

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video.Video, "chunks", breaking)
        result = encoded(vae, videos, tmp_path / "broken", frames=None, chunk=1)
    (rejected,) = [json.loads(line) for line in (tmp_path / "broken" / "rejected.jsonl").read_text().splitlines()]
    assert (rejected["path"], rejected["detail"]) == ("a/5.mp4", "3 of 9 frames could be read")
    manifest = read_manifest(tmp_path / "broken")
    assert result["videos"] == len(manifest.clips) == 7
    encoded(vae, videos, tmp_path / "healthy", frames=None, chunk=1)
    sound = read_manifest(tmp_path / "healthy")
    others = [clip for clip in sound.clips if clip.path != "a/5.mp4"]
    for clip, other in zip(manifest.clips, others, strict=True):
        assert torch.equal(LatentReader(manifest).read(clip), LatentReader(sound).read(other))
    mended = Path(shutil.copytree(videos, tmp_path / "mended"))
    assert encoded(vae, mended, tmp_path / "broken", frames=None, chunk=1) == result
    os.utime(mended / "a/5.mp4")
    with pytest.raises(ConfigError, match=r"of other videos \(1 new or changed, 0 gone, first 'a/5.mp4'\)"):
        encoded(vae, mended, tmp_path / "broken", frames=None, chunk=1)
    sizes = [shard["bytes"] for shard in manifest.shards]
    assert sizes == [HEADER + 2 * sum(2 * math.prod(c.shape) for c in manifest.clips if c.shard == k) for k in range(3)]


def test_parts_depend_on_the_list_alone() -> None:
    assert cut([]) == []
    assert cut([1] * 5) == [range(5)]
    assert [len(part) for part in cut([1] * 1000)] == [16] * 62 + [8]
    assert {len(part) for part in cut([1] * 10**5)} == {512, 10**5 % 512}
    assert cut([1] * 5, clips=2) == [range(2), range(2, 4), range(4, 5)]
    half = BYTES // 2
    assert cut([half, half, 1, 3 * BYTES, 1]) == [range(2), range(2, 3), range(3, 4), range(4, 5)]


# ------------------------------------------------------------------------------------------ kills and ranks
def survives(vae: Path, videos: Path, out: Path, chance: random.Random, most: int, **settings: Any) -> int:
    """Encode in children, each of which kills itself at one of its writes, until one is done; count the kills."""
    for kills in range(1000):
        child = os.fork()
        if child == 0:
            left = chance.randint(1, most)

            def counted(original: Any) -> Any:
                def call(*args: Any, **options: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*args, **options)

                return call

            os.fsync, os.replace = counted(os.fsync), counted(os.replace)
            status = 1
            try:
                torch.set_num_threads(1)
                encoded(vae, videos, out, **settings)
                status = 0
            finally:
                os._exit(status)
        chance.random()  # another count for the next one
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return kills
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("never done")


def test_killed_while_writing_and_finished(vae: Path, videos: Path, whole: Path, tmp_path: Path) -> None:
    kills = survives(vae, videos, tmp_path / "cache", random.Random(0), most=12)
    assert kills >= 2
    assert content(tmp_path / "cache") == content(whole)
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {p.name for p in whole.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("frames", [5, None])
def test_killed_twenty_times(vae: Path, videos: Path, tmp_path: Path, frames: int | None) -> None:
    """At writes, and at moments of the clock."""
    settings = {"shard": 1, "frames": frames}
    encoded(vae, videos, tmp_path / "whole", **settings)
    chance, kills = random.Random(1), 0
    for number in range(20):
        out = tmp_path / f"cache{number}"
        kills += survives(vae, videos, out, chance, most=20, **settings)
        assert content(out) == content(tmp_path / "whole")
    assert kills >= 20
    begin = time.monotonic()
    encoded(vae, videos, tmp_path / "timed", **settings)
    taken, out, kills = time.monotonic() - begin, tmp_path / "clock", 0
    while kills < 20 and not (out / "manifest.jsonl").exists():
        child = os.fork()
        if child == 0:
            encoded(vae, videos, out, **settings)
            os._exit(0)
        time.sleep(chance.uniform(0.05, 0.5) * taken)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    encoded(vae, videos, out, **settings)
    assert content(out) == content(tmp_path / "whole")


SCRIPT = """
import sys
import torch
from praxino.tasks.encode import encode
if __name__ == "__main__":
    torch.set_num_threads(1)
    vae, videos, out, devices = sys.argv[1:5]
    settings = dict(frames=5, size=16, workers=0, device="cpu", shard=3, devices=int(devices))
    encode(vae=vae, data={"root": videos}, out=out, **settings)
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_processes_write_the_bytes_of_one(
    vae: Path, videos: Path, whole: Path, tmp_path: Path, launcher: str
) -> None:
    script, out = tmp_path / "run.py", tmp_path / "cache"
    script.write_text(textwrap.dedent(SCRIPT))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if launcher == "torchrun" else []
    command = [sys.executable, *torchrun, str(script), str(vae), str(videos), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["1" if torchrun else "2"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert content(out) == content(whole)
    figures = [json.loads((path / "statistics.json").read_text()) for path in (out, whole)]
    assert figures[0]["mean"] == figures[1]["mean"]
    assert figures[0]["std"] == figures[1]["std"]
