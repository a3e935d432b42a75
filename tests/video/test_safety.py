"""Whatever lies in a folder of data: one typed, picklable failure, no other file opened, no hang."""

import csv
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from praxino.video import DecodeFailure, Video, VideoInfo, probe, read
from praxino.video.source import failures

from .conftest import encode, moving

CLIP = moving(8, 32, 48)


def reason(path: Path | str, **options: int) -> str:
    with pytest.raises(DecodeFailure) as failure:
        probe(path, index_dir=None, **options)  # type: ignore[arg-type]
    error = failure.value
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.path, copy.reason, copy.detail) == (error.path, error.reason, error.detail)
    assert str(copy) == str(error)
    assert str(error).isascii()
    assert "\n" not in str(error)
    assert error.path == str(path)
    return error.reason


def test_not_a_video(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("This is no film.\n" * 50)
    (tmp_path / "noise.webm").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "gone")
    (tmp_path / "self.mp4").symlink_to("self.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    os.mkfifo(tmp_path / "pipe.png")
    found = {path.name: reason(path) for path in sorted(tmp_path.iterdir())}
    assert found == {
        "dangling.mp4": "missing",
        "empty.mp4": "empty",
        "folder.mp4": "not_a_file",
        "noise.webm": "container",
        "pipe.mp4": "not_a_file",
        "pipe.png": "not_a_file",
        "self.mp4": "missing",
        "text.mp4": "container",
    }
    assert reason(tmp_path / "absent.mp4") == "missing"
    assert reason(tmp_path / "absent.png") == "missing"
    assert reason("/dev/zero") == "not_a_file"
    assert reason("nul\0byte.mp4") == "missing"


@pytest.mark.parametrize("suffix", [".mp4", ".m3u8", ".txt", ""])
@pytest.mark.parametrize("address", ["sibling.mp4", "../outside.mp4", "{absolute}", "http://127.0.0.1:9/a.mp4"])
def test_playlists_are_refused(suffix: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    sibling = encode(folder / "sibling.mp4", "libx264", CLIP)
    (tmp_path / "outside.mp4").write_bytes(sibling.read_bytes())
    address = address.format(absolute=sibling)
    texts = {
        "concat": f"ffconcat version 1.0\nfile '{address}'\n",
        "hls": f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{address}\n#EXT-X-ENDLIST\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    }
    for name, text in texts.items():
        path = folder / f"{name}{suffix}"
        path.write_text(text)
        assert reason(path) == "container"
    monkeypatch.chdir(folder)
    assert probe("sibling.mp4", index_dir=None).frames == 8


def test_names_are_no_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "a.mp4", "libx264", CLIP)
    for name in ("concat:a.mp4|a.mp4", "subfile,,start,0,end,0,,:a.mp4", "http://127.0.0.1:9/a.mp4", "pipe:0"):
        assert reason(name) == "missing"
    for name in ("file:b.mp4", "clip%03d.mp4", "-i.mp4", "two\nlines.mp4", "q'uo\"te.mp4", "é🎬.mp4", "trailing .mp4"):
        encode(tmp_path / "a.mp4", "libx264", CLIP).rename(tmp_path / name)
        assert probe(name, index_dir=tmp_path / "index").frames == 8


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    os.rename(encode(tmp_path / "a.mp4", "libx264", CLIP), name)
    for _ in range(2):
        info = probe(name, index_dir=tmp_path / "index")
        assert (info.frames, info.path) == (8, name)
    assert VideoInfo.from_json(info.to_json()) == info
    Path(name).write_bytes(b"broken")
    assert reason(name) == "container"


def test_streams_without_pictures(tmp_path: Path) -> None:
    def sound(path: Path, cover: bool) -> Path:
        with av.open(str(path), "w") as container:
            audio = container.add_stream("aac", rate=16000)
            picture = None
            if cover:
                picture = container.add_stream("mjpeg", rate=1)
                picture.width, picture.height, picture.pix_fmt = 48, 32, "yuvj420p"
                picture.disposition = av.stream.Disposition.attached_pic
                still = av.VideoFrame.from_ndarray(CLIP[0].numpy(), format="rgb24")
                container.mux([*picture.encode(still), *picture.encode(None)])
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 16000
            container.mux([*audio.encode(samples), *audio.encode(None)])
        return path

    assert reason(sound(tmp_path / "sound.mp4", False)) == "no_video"
    assert reason(sound(tmp_path / "cover.mp4", True)) == "no_video"


def test_limits_on_size(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", "libx264", CLIP)
    assert reason(path, max_pixels=48 * 32 - 1) == "too_large"
    assert probe(path, index_dir=None, max_pixels=48 * 32).frames == 8
    small, large = (
        encode(tmp_path / "s.ts", "mpeg2video", CLIP),
        encode(tmp_path / "l.ts", "mpeg2video", moving(8, 112, 112)),
    )
    grows = tmp_path / "grows.ts"
    grows.write_bytes(small.read_bytes() + large.read_bytes())
    info = probe(grows, index_dir=None, max_pixels=100 * 100)
    assert 0 < info.frames <= 8
    assert "112x112 is more than 10000 pixels" in info.damage


def test_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", "libx264", CLIP)
    monkeypatch.setattr(os, "access", lambda *a, **k: False)  # root may read everything
    assert reason(path) == "permission"


def test_every_exception_becomes_a_failure() -> None:
    class Local(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(f"{a}\n{b}")

    raised = [Local(1, 2), IndexError("x"), AttributeError("y"), UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "z")]
    for error in [*raised, MemoryError(), av.error.InvalidDataError(1, "data"), EOFError()]:
        with pytest.raises(DecodeFailure) as failure, failures("p", "corrupt"):
            raise error
        assert type(pickle.loads(pickle.dumps(failure.value))) is DecodeFailure
        assert failure.value.reason == ("too_large" if isinstance(error, MemoryError) else "corrupt")
    with pytest.raises(KeyboardInterrupt), failures("p", "corrupt"):
        raise KeyboardInterrupt


def test_nothing_stays_open(tmp_path: Path) -> None:
    good, bad = encode(tmp_path / "a.mp4", "libx264", CLIP), tmp_path / "b.mp4"
    bad.write_bytes(good.read_bytes()[:200])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read(good, [5, 1], index_dir=None)
        reason(bad)
        with Video(good, index_dir=None) as video:
            next(video.chunks(2))
    assert len(os.listdir("/proc/self/fd")) <= before


# Refused with a message, as the manifest allows: larger than the limit, no sequence, several sequences.
REFUSED = {
    "odd/huge_8000x8000.mkv": "too_large",
    "odd/huge_8000x8000.mp4": "too_large",
    "folders/mixed_sizes/": "mixed_sizes",
    "folders/two_cameras/": "not_a_file",
    "folders/two_prefixes/": "several_sequences",
    "folders/unnumbered/": "several_sequences",
}
# The manifest describes the first stream; the second is marked as the default and is the real clip.
OTHER = {"odd/two_video_streams.mkv": (50, 180, 320)}


class TestHostile:
    """The collection of hostile files: each ends as its manifest expects."""

    @staticmethod
    def rows(root: Path) -> list[dict[str, str]]:
        with open(root / "MANIFEST.csv", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def test_every_file(self, shared: Callable[[str], Path], tmp_path: Path) -> None:
        root = shared("data/hostile")
        with tarfile.open(root / "names.tar") as archive:
            archive.extractall(tmp_path, filter="data")
        seen = 0
        for row in self.rows(root):
            path = (tmp_path if row["path"].startswith("names/") else root) / row["path"].rstrip("/")
            expect = row["note"].split(";")[0].removeprefix("expect=")
            if row["path"] in REFUSED:
                assert reason(path) == REFUSED[row["path"]], row["path"]
            elif expect == "skip":
                assert reason(path) in ("container", "no_video", "codec", "empty", "no_frames", "too_large"), row[
                    "path"
                ]
            else:
                self.check(path, row, partial=expect == "partial")
            seen += 1
        assert seen > 100

    def check(self, path: Path, row: dict[str, str], partial: bool) -> None:
        frames, height, width = int(row["frames"]), int(row["height"]), int(row["width"])
        if row["path"] in OTHER:
            frames, height, width = OTHER[row["path"]]
        elif int(row["rotation"] or 0) % 180:
            height, width = width, height
        if row["path"] == "odd/sar_8_3.mp4":
            width = 480
        with Video(path, index_dir=None) as video:
            info = video.info
            assert (info.height, info.width) == (height, width), row["path"]
            assert 0 < info.frames <= frames if partial else info.frames == frames, row["path"]
            shapes = [chunk.shape for chunk in video.chunks(32)]
            assert sum(shape[0] for shape in shapes) == info.frames, row["path"]
            last = video.read([info.frames - 1])
            assert last.shape == (1, height, width, 3)

    def test_mirror_is_no_half_turn(self, shared: Callable[[str], Path]) -> None:
        root = shared("data/hostile/odd")
        plain, mirrored = read(root / "mp4_named.avi", index_dir=None), read(root / "mirrored.mp4", index_dir=None)
        assert torch.equal(mirrored, plain.flip(2))

    def test_folders(self, shared: Callable[[str], Path]) -> None:
        root = shared("data/hostile/folders")
        modes = read(root / "pixel_modes", index_dir=None).float()
        assert modes.shape == (8, 54, 96, 3)
        assert modes.flatten(1).std(1).min() > 20
        assert probe(root / "two_prefixes" / "left_*", index_dir=None).frames == 8
        right = probe(root / "two_prefixes" / "right_*", index_dir=None)
        assert (right.frames, right.height > right.width) == (8, True)
        assert probe(root / "two_cameras" / "cam_b", index_dir=None).frames == 9
