"""Two trees: what pairs, and one clear message for each kind of entry that does not."""

import json
import os
from pathlib import Path

import pytest

from praxino import video
from praxino.data.synthetic import draw
from praxino.errors import DataError
from praxino.tasks.common import stem
from praxino.tasks.evaluate import evaluate
from praxino.tasks.evaluation.pairs import find_pairs, read_tree
from praxino.tasks.evaluation.score import Reading


def write(path: Path, frames: int = 3, size: int = 16, codec: str | None = "lossless", seed: int = 0) -> None:
    video.write(path, draw(0, frames=frames, size=size, seed=seed)[1], 25, codec)


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    """Two pairs, and an entry of each kind that does not pair."""
    real, fake = tmp_path / "real", tmp_path / "fake"
    for root in (real, fake):
        write(root / "deep" / "same.mp4")
        write(root / "shot", codec="png")
    (fake / "deep" / "same.mp4").rename(fake / "deep" / "same.mkv")
    write(real / "missing.mp4")
    write(fake / "extra.mp4")
    write(real / "shorter.mp4", 5)
    write(fake / "shorter.mp4", 4)
    write(real / "sized.mp4", size=16)
    write(fake / "sized.mp4", size=32)
    write(real / "twice.mp4")
    write(fake / "twice.mp4")
    write(fake / "twice.avi")
    write(real / "broken.mp4")
    (fake / "broken.mp4").write_bytes(b"no video")
    return real, fake


KINDS = ["missing", "extra", "length", "size", "duplicate", "unreadable"]


def test_every_kind_of_problem_is_told_once(trees: tuple[Path, Path], tmp_path: Path) -> None:
    given = {"real": str(trees[0]), "fake": str(trees[1]), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(DataError) as caught:
        evaluate(str(tmp_path / "out"), **given)
    message = str(caught.value)
    assert len(message.splitlines()) == 2
    for text in (
        "1 missing under fake (first 'missing.mp4'",
        "1 under fake alone (first 'extra.mp4'",
        "1 of another length (first 'shorter.mp4': 5 frames of 16x16 under real, 4 frames of 16x16 under fake)",
        "1 of another size (first 'sized.mp4': 3 frames of 16x16 under real, 3 frames of 32x32 under fake)",
        "1 of a name that several videos have (first 'twice': 'twice.mp4' under real, 'twice.avi', 'twice.mp4' under",
        "1 unreadable (first 'broken.mp4': under fake: ",
        "unpaired=skip compares the other 2 pairs",
    ):
        assert message.count(text) == 1, text
    assert not (tmp_path / "out" / "metrics.csv").exists()
    assert kinds(tmp_path) == sorted(KINDS)


def test_what_is_skipped_is_listed(trees: tuple[Path, Path], tmp_path: Path) -> None:
    given = {"real": str(trees[0]), "fake": str(trees[1]), "cache_dir": str(tmp_path / "cache")}
    result = evaluate(str(tmp_path / "out"), unpaired="skip", **given)
    assert (result["n"], result["rejected"], result["protocol"]["unpaired"]) == (2, 6, "skip")
    assert result["psnr"]["mean"] == 100
    assert kinds(tmp_path) == sorted(KINDS)
    rows = (tmp_path / "out" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["deep/same.mkv", "shot"]


def kinds(tmp_path: Path) -> list[str]:
    return sorted(json.loads(line)["reason"] for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())


def test_names_with_their_suffix_tell_duplicates_apart(tmp_path: Path) -> None:
    for name in ("real/x.mp4", "real/x.mkv", "fake/x.mp4.mp4", "fake/x.mkv.mp4"):  # as `reconstruct` writes them
        write(tmp_path / name)
    pairs, problems = find_pairs(*(read_tree(str(tmp_path / side), str(tmp_path / "c")) for side in ("real", "fake")))
    assert [(pair.real.name, pair.fake.name) for pair in pairs] == [
        ("x.mkv", "x.mkv.mp4"),
        ("x.mp4", "x.mp4.mp4"),
    ]
    assert not problems


def test_two_files_are_a_pair(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", seed=1)
    write(tmp_path / "b.mp4", seed=2)
    result = evaluate(str(tmp_path / "out"), real=str(tmp_path / "a.mp4"), fake=str(tmp_path / "b.mp4"))
    assert result["n"] == 1
    assert result["psnr"]["mean"] < 100


def test_folders_of_frames_have_no_suffix(tmp_path: Path) -> None:
    for name, codec in (("shot.01", "png"), ("take.1", "png"), ("take.2", "png"), ("film.mov", "lossless")):
        write(tmp_path / "real" / name, codec=codec)
        write(tmp_path / "fake" / f"{stem(name)}.mp4")
    (tmp_path / "fake" / "take.2.mp4").unlink()
    pairs, problems = find_pairs(*(read_tree(str(tmp_path / side), str(tmp_path / "c")) for side in ("real", "fake")))
    assert [pair.name for pair in pairs] == ["film.mp4", "shot.01.mp4", "take.1.mp4"]
    assert [(problem.kind, problem.path) for problem in problems] == [("missing", "take.2")]


def test_a_file_with_two_names_counts_twice(tmp_path: Path) -> None:
    for side in ("real", "fake"):
        write(tmp_path / side / "a.mp4")
    os.link(tmp_path / "real" / "a.mp4", tmp_path / "real" / "b.mp4")
    (tmp_path / "fake" / "b.mp4").symlink_to("a.mp4")
    trees = [read_tree(str(tmp_path / side), str(tmp_path / "c")) for side in ("real", "fake")]
    assert [pair.name for pair in find_pairs(*trees)[0]] == ["a.mp4", "b.mp4"]
    assert len(Reading(frames=2).find(tmp_path / "real").entries) == 2


@pytest.mark.parametrize("text", ["no JSON\n", "[1]\n", '{"path": "a.mp4"}\n'])
def test_a_foreign_list_of_reconstructions_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path / "a.mp4")
    (tmp_path / "reconstructions.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"reconstructions\.jsonl lists no files of praxino"):
        read_tree(str(tmp_path), str(tmp_path / "c"))
