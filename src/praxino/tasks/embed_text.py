"""Embed text: captions through a text encoder of transformers, once, into the files that `data.text` reads."""

import csv
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from praxino.config import check_call, nearest
from praxino.data.latents import text_file
from praxino.errors import CheckpointError, ConfigError, DataError, NonFiniteError, StorageError
from praxino.tasks.common import at_least
from praxino.tasks.device import Precision, pick_device, precision_context
from praxino.tasks.rows import write_atomic
from praxino.tasks.rundir import make_directory
from praxino.video import VIDEO_SUFFIXES

log = logging.getLogger(__name__)

# of each kind of model: the class that embeds text alone, and the most tokens of a caption
ENCODERS = {
    "t5": ("T5EncoderModel", 128),
    "mt5": ("MT5EncoderModel", 128),
    "umt5": ("UMT5EncoderModel", 128),
    "clip": ("CLIPTextModel", 77),
    "clip_text_model": ("CLIPTextModel", 77),
}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `embed_text` and call it."""
    return embed_text(**check_call(embed_text, cfg))


def embed_text(
    captions: str,
    encoder: str,
    out: str,
    videos: str | None = None,
    tokens: int | None = None,
    batch: int = 16,
    device: str = "auto",
    precision: Precision = "32",
) -> dict[str, Any]:
    """Write the embedding of each caption, `text` `(L, E)` in bf16: to `out/a/b.mp4.safetensors` for `a/b.mp4`.

    L counts the caption's own tokens, without padding. A file that holds this caption by this model is kept.

    Args:
        captions: a CSV with columns path and text, or a tree of .txt files: `a/b.mp4.txt`, or `a/b.txt` where the video
            `a/b.mp4` lies beside it or under `videos`.
        encoder: a directory of T5, mT5, UMT5 or CLIP with its tokenizer, as save_pretrained writes it.
        videos: the videos, where the captions lie apart from them.
        tokens: the most tokens of a caption; None: 77 for CLIP, 128 for T5. The rest is cut, and counted.
        batch: captions at a time.
        precision: of the arithmetic.
    """
    at_least(1, tokens=tokens, batch=batch)
    texts = read_captions(Path(captions).expanduser(), Path(videos).expanduser() if videos else None)
    chosen = pick_device(device)
    tokenizer, network, most = load_encoder(Path(encoder).expanduser())
    positions = getattr(network.config, "max_position_embeddings", None)  # T5 has no limit
    if tokens is not None and positions is not None and tokens > positions:
        raise ConfigError(f"tokens={tokens}: this encoder takes {positions} at most")
    most = tokens or min(most, positions or most)
    target, identity = make_directory(out), f"{fingerprint(network)} {most}"
    network = network.to(chosen)
    wanted = [(path, text) for path, text in texts.items() if not holds(target, path, text, identity)]
    wanted.sort(key=lambda item: len(item[1]))  # little padding
    cut = 0
    for start in range(0, len(wanted), batch):
        group = wanted[start : start + batch]
        with precision_context(chosen, precision):
            embedded, over = embed(tokenizer, network, [text for _, text in group], most)
        cut += over
        for (path, text), value in zip(group, embedded, strict=True):
            store(target, path, value, {"caption": text, "model": identity})
        log.info("%d of %d captions", start + len(group), len(wanted))
    result = {"captions": len(texts), "embedded": len(wanted), "cut": cut, "width": network.config.hidden_size}
    write_atomic(target / "text.json", json.dumps({**result, "encoder": encoder, "tokens": most}, indent=2) + "\n")
    if cut:
        log.warning("%d captions are longer than %d tokens and were cut", cut, most)
    log.info("%(captions)d captions of width %(width)d, %(embedded)d of them embedded now", result)
    return {"out": str(target), **result}


# ------------------------------------------------------------------------------------------------------- captions
def read_captions(source: Path, videos: Path | None) -> dict[str, str]:
    """Return the caption of each video by its path."""
    found = read_folder(source, videos or source) if source.is_dir() else read_table(source)
    if not found:
        raise DataError(f"captions={source}: no captions in it")
    outside = [path for path in found if os.path.isabs(path) or ".." in Path(path).parts]
    if outside:
        raise ConfigError(f"captions: {outside[0]!a} is not a path relative to the videos' root")
    return found


def read_table(source: Path) -> dict[str, str]:
    """Read a CSV; raises ConfigError where a column is missing or a video has two captions."""
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            for column in ("path", "text"):
                if column not in columns:
                    raise ConfigError(f"captions={source}: no column {column}{nearest(column, columns)}")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"captions={source} cannot be read as CSV in UTF-8: {error}") from error
    found: dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        if not row["path"] or row["text"] is None:
            raise ConfigError(f"captions={source}, row {number}: path or text is empty")
        if found.setdefault(os.path.normpath(row["path"]), row["text"]) != row["text"]:
            raise ConfigError(f"captions={source}, row {number}: a second caption of {row['path']}")
    return found


def read_folder(source: Path, videos: Path) -> dict[str, str]:
    """Read a tree of .txt files."""
    found: dict[str, str] = {}
    for file in sorted(source.rglob("*.txt")):
        name = file.relative_to(source).with_suffix("")
        if name.suffix.lower() not in VIDEO_SUFFIXES and not (videos / name).is_dir():
            beside = [p for p in (videos / name).parent.glob("*") if p.stem == name.name]
            matches = [p for p in beside if p.suffix.lower() in VIDEO_SUFFIXES]
            if len(matches) != 1:
                raise ConfigError(f"{file}: {len(matches)} videos are called {videos / name}.*: name it VIDEO.mp4.txt")
            name = matches[0].relative_to(videos)
        found[str(name)] = file.read_text(encoding="utf-8", errors="replace").strip()
    return found


# -------------------------------------------------------------------------------------------------------- encoder
def load_encoder(path: Path) -> tuple[Any, Any, int]:
    """Return tokenizer, encoder and the most tokens, from local safetensors alone: nothing in them is executed."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("text needs transformers: pip install 'praxino[text]'") from error
    if not (path / "config.json").is_file():
        raise CheckpointError(f"encoder={path}: no config.json: give a directory as save_pretrained writes it")
    transformers.utils.logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind not in ENCODERS:
            raise CheckpointError(f"encoder={path}: a {kind} embeds no text here: use {', '.join(ENCODERS)}")
        name, most = ENCODERS[kind]
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **local)
        encoder = getattr(transformers, name).from_pretrained(path, use_safetensors=True, **local)
    except (OSError, ValueError, SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(f"encoder={path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    return tokenizer, encoder.eval().requires_grad_(False), most


@torch.inference_mode()
def embed(tokenizer: Any, encoder: Any, texts: Sequence[str], most: int) -> tuple[list[Tensor], int]:
    """Return the embedding `(L, E)` of each text, and how many texts were cut."""
    lengths = [len(ids) for ids in tokenizer(list(texts)).input_ids]
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
    mask = batch.attention_mask.to(encoder.device)
    hidden = encoder(input_ids=batch.input_ids.to(encoder.device), attention_mask=mask).last_hidden_state
    if not hidden.isfinite().all():
        raise NonFiniteError(f"the embedding of {texts[0]!a} is not finite: use precision=32")
    rows = [row[keep.bool()].to("cpu", torch.bfloat16) for row, keep in zip(hidden, mask, strict=True)]
    return rows, sum(length > most for length in lengths)


def fingerprint(encoder: Any) -> str:
    """Return the SHA-256 of the weights."""
    digest = hashlib.sha256(type(encoder).__name__.encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------- files
def holds(target: Path, path: str, text: str, identity: str) -> bool:
    """Tell whether the embedding of this text by this model is stored already."""
    try:
        with safe_open(text_file(str(target), path), framework="pt") as file:
            return file.metadata() == {"caption": text, "model": identity} and "text" in file.keys()  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def store(target: Path, path: str, value: Tensor, metadata: dict[str, str]) -> None:
    """Write one embedding, whole or not at all."""
    file = Path(text_file(str(target), path))
    draft = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"text": value.contiguous()}, draft, metadata)
        os.replace(draft, file)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{file} cannot be written: {error}") from error
