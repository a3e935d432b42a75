"""Captions become files of embeddings, equal to what the encoder gives for each caption alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from praxino.data.latents import read_text, text_file
from praxino.errors import CheckpointError, ConfigError, DataError
from praxino.tasks.embed_text import embed_text

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "ball", "rolls"]
CAPTIONS = {"a/one.mp4": "a red ball", "two.mp4": "ball", "three.mp4": "a red ball rolls a red ball rolls"}


def make_encoder(folder: Path, kind: str) -> Path:
    """Save a tiny random encoder with a tokenizer of seven words."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # type: ignore[assignment]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    model: Any
    if kind == "t5":
        model = transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=7, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
        )
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        special = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "max_position_embeddings": 8}
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=7, **sizes, **special))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["t5", "clip"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"), request.param)


def table(folder: Path, captions: dict[str, str]) -> str:
    file = folder / "captions.csv"
    file.write_text("path,text\n" + "".join(f'{path},"{text}"\n' for path, text in captions.items()))
    return str(file)


def alone(encoder: Path, ids: list[int]) -> torch.Tensor:
    """What the encoder gives for one caption by itself, without padding."""
    cls = transformers.T5EncoderModel if "T5" in (encoder / "config.json").read_text() else transformers.CLIPTextModel
    with torch.no_grad():
        return cls.from_pretrained(encoder)(input_ids=torch.tensor([ids])).last_hidden_state[0]


def test_each_caption_is_embedded_as_if_alone(encoder: Path, tmp_path: Path) -> None:
    result = embed_text(table(tmp_path, CAPTIONS), str(encoder), str(tmp_path / "out"), tokens=8, batch=3, device="cpu")
    assert (result["captions"], result["embedded"], result["cut"], result["width"]) == (3, 3, 1, 16)
    for path, text in CAPTIONS.items():
        stored = load_file(tmp_path / "out" / f"{path}.safetensors")["text"]
        assert stored.dtype == torch.bfloat16
        ids = [*[WORDS.index(word) for word in text.split()][:7], 1]
        expected = alone(encoder, ids)
        assert stored.shape == expected.shape
        torch.testing.assert_close(stored.float(), expected, rtol=8e-3, atol=1e-3)  # bf16 has 8 bits
        assert torch.equal(read_text(text_file(str(tmp_path / "out"), path)), stored.float())


def test_a_second_run_embeds_only_what_changed(tmp_path: Path) -> None:
    encoder, out = make_encoder(tmp_path / "t5", "t5"), str(tmp_path / "out")
    arguments: dict[str, Any] = {"encoder": str(encoder), "out": out, "device": "cpu"}
    assert embed_text(table(tmp_path, CAPTIONS), **arguments)["embedded"] == 3
    assert embed_text(table(tmp_path, CAPTIONS), **arguments)["embedded"] == 0
    assert embed_text(table(tmp_path, CAPTIONS | {"two.mp4": "red"}), **arguments)["embedded"] == 1
    with safe_open(f"{out}/two.mp4.safetensors", framework="pt") as file:
        assert file.metadata()["caption"] == "red"
    (tmp_path / "out" / "two.mp4.safetensors").write_bytes(b"cut off")
    assert embed_text(table(tmp_path, CAPTIONS | {"two.mp4": "red"}), **arguments)["embedded"] == 1
    assert embed_text(table(tmp_path, CAPTIONS), **arguments, tokens=3)["embedded"] == 3


def test_captions_in_files_beside_their_videos(tmp_path: Path) -> None:
    encoder, videos = make_encoder(tmp_path / "t5", "t5"), tmp_path / "videos"
    (videos / "b" / "frames").mkdir(parents=True)
    (videos / "a.mp4").touch()
    for name in ("a.txt", "b/frames.txt", "c.webm.txt"):
        (videos / name).write_text("a red ball\n")
    embed_text(str(videos), str(encoder), str(tmp_path / "out"), device="cpu")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.safetensors")}
    assert found == {"a.mp4.safetensors", "b/frames.safetensors", "c.webm.safetensors"}
    (videos / "nothing.txt").write_text("a ball")
    with pytest.raises(ConfigError, match="0 videos are called"):
        embed_text(str(videos), str(encoder), str(tmp_path / "out"), device="cpu")


def test_what_cannot_be_embedded(tmp_path: Path) -> None:
    encoder, out = make_encoder(tmp_path / "clip", "clip"), str(tmp_path / "out")
    good = table(tmp_path, CAPTIONS)
    with pytest.raises(ConfigError, match="takes 8 at most"):
        embed_text(good, str(encoder), out, tokens=9, device="cpu")
    (tmp_path / "bad.csv").write_text("path,caption\na.mp4,b\n")
    with pytest.raises(ConfigError, match="no column text"):
        embed_text(str(tmp_path / "bad.csv"), str(encoder), out)
    (tmp_path / "twice.csv").write_text("path,text\na.mp4,b\na.mp4,c\n")
    with pytest.raises(ConfigError, match=r"row 3: a second caption of a\.mp4"):
        embed_text(str(tmp_path / "twice.csv"), str(encoder), out)
    with pytest.raises(ConfigError, match="not a path relative"):
        embed_text(table(tmp_path, {"../a.mp4": "b"}), str(encoder), out)
    with pytest.raises(DataError, match="no captions"):
        embed_text(table(tmp_path, {}), str(encoder), out)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        embed_text(table(tmp_path, CAPTIONS), str(tmp_path), out)
    (encoder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="a gpt2 embeds no text"):
        embed_text(good, str(encoder), out)
