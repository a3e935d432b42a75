"""The latent cache: its manifest, windows of its clips, and the data set of normalised latents.

A cache is a folder with shards and `manifest.jsonl`: a line of what all clips share, a line a clip, and a digest of
these lines. It is written last, so a cache that has it is complete.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from praxino.data.clips import ClipSampler
from praxino.data.latent_file import Shards, sha256, write_durably
from praxino.data.plan import Key
from praxino.data.videos import Sample
from praxino.errors import ConfigError, DataError

FORMAT = 1
MANIFEST = "manifest.jsonl"
WORK = ".work"  # of an encoding that is not finished
LOGVAR = (-30.0, 20.0)  # as `models.vae.Posterior` limits it

Draw = Literal["sample", "mean"]


@dataclass(frozen=True, slots=True)
class LatentClip:
    """A clip of the cache: `path` relative to the root of the videos, `stamp` the size and time of change of its file.

    Args:
        start, frames: first frame of the video, and number of frames at the stride of the protocol.
        fps: frames per second of the clip.
        shape: of the latent, `(C, T, H, W)`; the file holds `(T, 2C, H, W)`, mean then log-variance.
        shard, offset: number of the shard in the manifest, and of the first value in it.
        first: latent 0 is the VAE's causal first one.
        label: number of the class.
    """

    path: str
    stamp: str
    start: int
    frames: int
    fps: float
    shape: tuple[int, int, int, int]
    shard: int
    offset: int
    first: bool = True
    label: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What a cache holds.

    Args:
        head: the first line of the file, as plain data.
    """

    root: str
    head: dict[str, Any]
    clips: list[LatentClip]

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the VAE, as `tasks.encoding.store.fingerprint` takes it."""
        return self.head["fingerprint"]

    @property
    def statistics(self) -> dict[str, Any]:
        """Mean and deviation per channel, `mean` and `std`, and further figures."""
        return self.head["statistics"]

    @property
    def protocol(self) -> dict[str, Any]:
        return self.head["protocol"]

    @property
    def stride(self) -> tuple[int, int, int]:
        time, height, width = self.head["stride"]
        return time, height, width

    @property
    def frame_rule(self) -> tuple[int, int]:
        first, step = self.head["frame_rule"]
        return first, step

    @property
    def channels(self) -> int:
        return self.head["channels"]

    @property
    def classes(self) -> list[str] | None:
        return self.head["classes"]

    @property
    def shards(self) -> list[dict[str, Any]]:
        """Name, bytes and SHA-256 of each shard."""
        return self.head["shards"]

    @cached_property
    def key(self) -> str:
        """A short digest of VAE and protocol: of what decides the latents beside the videos."""
        text = json.dumps([self.fingerprint, self.protocol], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def latents(self, frames: int) -> int:
        """Return how many latents stand for so many frames; raises ConfigError unless they fit."""
        first, step = self.frame_rule
        if frames < first or (frames - first) % step:
            low = first + max((frames - first) // step, 0) * step
            rule = f"use {first} + {step}k, e.g. {low} or {low + step}"
            raise ConfigError(f"frames={frames} do not fit the latents in {self.root}: {rule}")
        return -(-frames // self.stride[0])

    def check_vae(self, fingerprint: str) -> None:
        """Raise ConfigError unless the cache is of the VAE with this fingerprint."""
        if fingerprint != self.fingerprint:
            raise ConfigError(
                f"the latents in {self.root} are of another VAE ({self.fingerprint[:12]}, not {fingerprint[:12]}): "
                "give the VAE that encoded them, or encode the videos with this one"
            )


def write_manifest(path: Path, head: dict[str, Any], clips: Sequence[LatentClip]) -> None:
    """Write a manifest whole or not at all."""
    lines = [{"kind": "praxino latents", "format": FORMAT, **head}, *map(asdict, clips)]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    end = {"clips": len(clips), "sha256": hashlib.sha256(content).hexdigest()}
    write_durably(path, content + (json.dumps(end) + "\n").encode())


def read_manifest(root: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of a cache; raises ConfigError where there is none, DataError where it is damaged."""
    folder = os.path.abspath(os.path.expanduser(root))
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        unfinished = os.path.isdir(os.path.join(folder, WORK))
        why = "its encoding is not finished: run praxino-encode again" if unfinished else "praxino-encode makes one"
        raise ConfigError(f"{folder} holds no latents ({MANIFEST}: {error.strerror}); {why}") from error
    cut = content.rfind(b"\n", 0, len(content) - 1) + 1
    try:
        end = json.loads(content[cut:])
        if end["sha256"] != hashlib.sha256(content[:cut]).hexdigest():
            raise ValueError("its digest is another one")
        head, *lines = [json.loads(line) for line in content[:cut].splitlines()]
        if head["format"] != FORMAT:
            raise ConfigError(f"{path} is of format {head['format']}, this version reads {FORMAT}: update praxino")
        clips = [LatentClip(**{**line, "shape": tuple(line["shape"])}) for line in lines]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path} is damaged ({error}): delete it and encode again") from error
    return Manifest(folder, head, clips)


def check_sizes(manifest: Manifest) -> None:
    """Raise DataError where a shard is gone or of another length."""
    _refuse(manifest, [shard for shard in manifest.shards if not has_size(manifest.root, shard)])


def verify(manifest: Manifest) -> None:
    """Read every shard; raises DataError that names those whose bytes are not the ones written."""
    _refuse(manifest, [shard for shard in manifest.shards if not is_sound(manifest.root, shard)])


def has_size(root: str | os.PathLike[str], shard: dict[str, Any]) -> bool:
    """Tell whether a shard is there and as long as its manifest says."""
    try:
        return os.path.getsize(os.path.join(root, shard["name"])) == shard["bytes"]
    except OSError:
        return False


def is_sound(root: str | os.PathLike[str], shard: dict[str, Any]) -> bool:
    """Tell whether every byte of a shard is as it was written."""
    return has_size(root, shard) and sha256(os.path.join(root, shard["name"])) == shard["sha256"]


def _refuse(manifest: Manifest, damaged: list[dict[str, Any]]) -> None:
    if damaged:
        names = ", ".join(shard["name"] for shard in damaged[:5]) + (" ..." if len(damaged) > 5 else "")
        raise DataError(
            f"{len(damaged)} of {len(manifest.shards)} shards in {manifest.root} are damaged or gone: {names}. "
            "praxino-encode with verify=true makes them anew"
        )


class LatentReader:
    """Read windows of clips at random; shards stay open."""

    def __init__(self, manifest: Manifest) -> None:
        self.names = [shard["name"] for shard in manifest.shards]
        self.shards = Shards(manifest.root)

    def read(self, clip: LatentClip, start: int = 0, length: int | None = None) -> Tensor:
        """Return moments `(2C, T, H, W)` in bf16, of the latents from `start` on; only they are read.

        Raises:
            ValueError: the window leaves the clip.
            DataError: the shard cannot be read.
        """
        channels, latents, height, width = clip.shape
        length = latents - start if length is None else length
        if start < 0 or length < 1 or start + length > latents:
            raise ValueError(f"latents {start} to {start + length} do not lie in a clip of {latents}: {clip.path!a}.")
        step = 2 * channels * height * width
        begin = clip.offset + start * step
        values = self.shards.read(self.names[clip.shard], begin, begin + length * step)
        return values.view(length, 2 * channels, height, width).transpose(0, 1)


class LatentClips(Dataset):
    """Windows of the clips of a cache as normalised latents, addressed by `(epoch, index)` or by a plain index.

    Window and noise are functions of (seed, epoch, index). Reading never raises: what is wrong is the sample's `error`.

    Args:
        clips: those to read.
        windows: chooses the latents of a window by their numbers; None for all latents of each clip.
        statistics: what normalises; None for those of the manifest.
        posterior: a fresh sample at each reading, or the mean.
        text: folder of the embeddings: that of `a/b.mp4` is the tensor `text` `(L, E)` in `a/b.mp4.safetensors`.
    """

    def __init__(
        self,
        manifest: Manifest,
        clips: Sequence[LatentClip],
        windows: ClipSampler | None = None,
        *,
        statistics: dict[str, Any] | None = None,
        seed: int = 0,
        posterior: Draw = "sample",
        text: str | None = None,
    ) -> None:
        self.reader, self.clips, self.windows = LatentReader(manifest), clips, windows
        self.seed, self.posterior, self.text = seed, posterior, text
        table = [(statistics or manifest.statistics)[name] for name in ("mean", "std")]
        self.mean, self.std = torch.tensor(table).view(2, -1, 1, 1, 1)  # (C, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int | Key) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        try:
            return self.read(epoch, index)
        except DataError as error:
            return {"error": str(error)}
        except Exception as error:  # must not leave a worker: it may not even be picklable
            return {"error": f"{self.clips[index % len(self)].path!a}: {type(error).__name__}: {str(error)!a}"}

    def read(self, epoch: int, index: int) -> Sample:
        """Read the window of a key; raises DataError."""
        clip = self.clips[index % len(self)]
        rng = np.random.default_rng([2, self.seed, epoch, index])
        moments, start = self.window(clip, rng)
        mean, logvar = moments.float().chunk(2)  # (C, T, H, W)
        if self.posterior == "sample":
            noise = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32))
            mean = torch.addcmul(mean, torch.exp(0.5 * logvar.clamp(*LOGVAR)), noise)
        sample: Sample = {
            "latent": (mean - self.mean) / self.std,
            "first": clip.first and start == 0,
            "path": clip.path,
            "index": index % len(self),
            "repeat": index // len(self),
            "epoch": epoch,
            "start": start,
            "fps": clip.fps,
        }
        if clip.label is not None:
            sample["label"] = clip.label
        if self.text is not None:
            sample["text"] = read_text(text_file(self.text, clip.path))
        return sample

    def window(self, clip: LatentClip, rng: np.random.Generator) -> tuple[Tensor, int]:
        """Return the moments of a window and its first latent."""
        if self.windows is None:
            return self.reader.read(clip), 0
        numbers = self.windows.indices(clip.shape[1], rng)
        if numbers is None:
            raise DataError(f"{clip.path!a} has {clip.shape[1]} latents, {self.windows.frames} are due")
        start, stop = int(numbers[0]), int(numbers[-1]) + 1
        moments = self.reader.read(clip, start, stop - start)
        return moments if len(numbers) == stop - start else moments[:, torch.from_numpy(numbers - start)], start


def text_file(folder: str, path: str) -> str:
    """Return where the embedding of a video's text lies."""
    return os.path.join(folder, f"{path}.safetensors")


def read_text(file: str) -> Tensor:
    """Return the embedding `(L, E)` of a text, in float32; raises DataError."""
    try:
        with safe_open(file, framework="pt") as tensors:
            text = tensors.get_tensor("text").float()
    except (OSError, SafetensorError) as error:
        why = str(error).splitlines()[0]
        raise DataError(
            f"{file} cannot be read as the embedding of a text ({why}): praxino-embed-text makes one"
        ) from error
    if text.ndim != 2 or not text.numel():
        raise DataError(f"{file}: text of shape {tuple(text.shape)}; (L, E) is due")
    return text


def collate_latents(samples: list[Sample]) -> Sample:
    """Stack windows to float32 `(B, C, T, H, W)`, pad texts to the longest; an error is returned as data."""
    batch: Sample = {"failures": [], "missing": 0}
    if errors := [sample["error"] for sample in samples if "error" in sample]:
        return batch | {"error": errors[0]}
    shapes = {tuple(sample["latent"].shape): sample["path"] for sample in samples}
    if len(shapes) > 1:
        sizes = ", ".join(f"{'x'.join(map(str, shape))} ({path!a})" for shape, path in list(shapes.items())[:2])
        return batch | {"error": f"latents of different shapes in a batch, {sizes}: use batch=1, or encode at one size"}
    batch |= {
        "latent": torch.stack([sample["latent"] for sample in samples]),
        "path": [sample["path"] for sample in samples],
        "fps": torch.tensor([sample["fps"] for sample in samples], dtype=torch.float32),
    }
    names = ("first", "index", "repeat", "epoch", "start", *(("label",) if "label" in samples[0] else ()))
    batch |= {name: torch.tensor([sample[name] for sample in samples]) for name in names}
    return batch | pad_texts([sample["text"] for sample in samples]) if "text" in samples[0] else batch


def pad_texts(texts: list[Tensor]) -> Sample:
    """Return `text` `(B, L, E)`, zero after each end, and `text_mask` `(B, L)`, true where there is text."""
    widths = {text.shape[1] for text in texts}
    if len(widths) > 1:
        return {"error": f"texts of different widths in a batch: {sorted(widths)}"}
    mask = torch.arange(max(map(len, texts))) < torch.tensor([[len(text)] for text in texts])
    return {"text": torch.nn.utils.rnn.pad_sequence(texts, batch_first=True), "text_mask": mask}
