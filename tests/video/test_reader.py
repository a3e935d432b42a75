"""Frame k is the k-th frame of plain decoding, whatever the file; the index is cached, and corrected when it lied."""

import logging
import os
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from praxino.video import DecodeFailure, Geometry, Video, VideoInfo, probe, read
from praxino.video import index as indexing

from .conftest import encode, moving, plain

Make = Callable[..., Path]
CLIP = moving(60, 64, 96)
FILES = {
    "bframes.mp4": ("libx264", {"g": "250"}, True),
    "short_gop.mp4": ("libx264", {"g": "12", "bf": "3"}, True),
    "no_bframes.mov": ("libx264", {"g": "12", "bf": "0"}, True),
    "open_gop.mp4": ("libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3"}, True),
    "intra_refresh.mkv": ("libx264", {"x264-params": "intra-refresh=1:keyint=12"}, True),
    "interlaced.mp4": ("libx264", {"x264-params": "interlaced=1:keyint=12"}, False),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=20:log-level=none"}, True),
    "hevc_open.mkv": ("libx265", {"x265-params": "keyint=20:open-gop=1:bframes=4:log-level=none"}, True),
    "vp8.webm": ("libvpx", {"g": "15", "auto-alt-ref": "1", "lag-in-frames": "10"}, True),
    "vp9.webm": ("libvpx-vp9", {"g": "15", "cpu-used": "8", "lag-in-frames": "10"}, True),
    "intra.mkv": ("ffv1", {"g": "6"}, True),
    "h264.avi": ("libx264", {"g": "12", "bf": "2"}, False),
    "bframes.avi": ("mpeg4", {"g": "12", "bf": "2"}, False),
    "mpeg4.mp4": ("mpeg4", {"g": "12", "bf": "2"}, False),
    "h264.ts": ("libx264", {"g": "12", "bf": "2"}, False),
    "mpeg2.mpg": ("mpeg2video", {"g": "12", "bf": "2"}, False),
    "elementary.h264": ("libx264", {"g": "12", "bf": "2"}, False),
}


def clips(count: int, number: int, seed: int = 0) -> list[list[int]]:
    """Return random clips: 1 to 9 frames, strides 1 to 5, now and then shuffled or with repeats."""
    rng = random.Random(seed)
    found = []
    for _ in range(number):
        stride, length = rng.choice([1, 1, 2, 3, 5]), rng.choice([1, 4, 9])
        length = min(length, (count - 1) // stride + 1)
        start = rng.randrange(count - (length - 1) * stride)
        clip = [start + stride * j for j in range(length)]
        if rng.random() < 0.3:
            clip = rng.sample(clip, len(clip)) + clip[:1]
        found.append(clip)
    return found


@pytest.mark.parametrize("name", FILES)
def test_random_clips_equal_decoding_from_the_start(name: str, make: Make) -> None:
    codec, options, seekable = FILES[name]
    path = make(name, codec, CLIP, options)
    truth = plain(path)
    with Video(path, index_dir=None) as video:
        assert video.info.frames == len(truth) > 50
        assert video.index.seekable == seekable
        for clip in clips(len(truth), 12):
            assert torch.equal(video.read(clip), truth[clip])
        assert video.index.seekable == seekable, "the fast way failed and was given up"
        assert torch.equal(torch.cat(list(video.chunks(7))), truth)
        assert torch.equal(torch.cat(list(video.chunks(4, start=5, stop=50, stride=3))), truth[5:50:3])


def test_444_after_a_seek(make: Make) -> None:
    """FFmpeg decodes 4:4:4 by the version of x264, which only the first packet states."""
    path = make("444.mp4", "libx264", CLIP, {"g": "12", "crf": "30"}, pix_fmt="yuv444p")
    truth = plain(path)
    for k in (20, 40, 59):
        assert torch.equal(read(path, [k], index_dir=None)[0], truth[k])


def test_stream_that_starts_within_a_group(make: Make) -> None:
    path = make("cut.mkv", "libx264", CLIP, {"g": "15", "bf": "2"}, skip_packets=4)
    truth = plain(path)
    with Video(path, index_dir=None) as video:
        assert video.info.frames == len(truth)
        for clip in clips(len(truth), 8):
            assert torch.equal(video.read(clip), truth[clip])


def test_variable_rate(make: Make) -> None:
    times = [k * 4 + (k * k) // 7 for k in range(30)]
    path = make("vfr.mkv", "libx264", CLIP[:30], {"g": "8", "bf": "2"}, times=times)
    truth = plain(path)
    with Video(path, index_dir=None) as video:
        assert video.index.seekable
        assert float(video.info.fps) == pytest.approx(100 * 29 / times[-1], rel=1e-3)  # the header says 25
        np.testing.assert_allclose(video.timestamps, np.array(times) / 100, atol=1e-9)
        assert torch.equal(video.read([29, 3, 3, 17]), truth[[29, 3, 3, 17]])


@pytest.mark.parametrize(
    ("codec", "options"),
    [("libx264", {"bf": "2", "g": "5"}), ("libx265", {"x265-params": "log-level=none:pools=1:keyint=5:bframes=0"})],
)
def test_parameters_that_change_within_a_file(codec: str, options: dict[str, str], tmp_path: Path) -> None:
    """The second half has another size; a decoder that has seen it decodes the first half wrongly."""
    path = tmp_path / "halves.mkv"
    halves = [moving(15, 64, 80), moving(15, 96, 112, seed=1)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        for number, half in enumerate(halves):
            context = stream.codec_context if number == 0 else av.CodecContext.create(codec, "w")
            context.height, context.width, context.pix_fmt = *half.shape[1:3], "yuv420p"
            context.time_base, context.framerate, context.options = Fraction(1, 25), 25, options
            frames = [av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24") for picture in half]
            for k, frame in enumerate(frames):
                frame.pts, frame.time_base = 15 * number + k, Fraction(1, 25)
            for packet in [packet for frame in [*frames, None] for packet in context.encode(frame)]:
                packet.stream, packet.time_base = stream, Fraction(1, 25)
                container.mux(packet)
    truth = plain(path)
    with Video(path, index_dir=None) as video:
        assert video.index.seekable
        for k in (29, 1, 16, 16, 14, 2, 28, 0):
            assert torch.equal(video.read([k])[0], truth[k])


def test_one_frame_without_a_time(make: Make) -> None:
    path = make("one.h264", "libx264", CLIP[:1])
    assert torch.equal(read(path, index_dir=None), plain(path))


def test_colours_that_cannot_be_converted(make: Make) -> None:
    path = make("ycgco.mp4", "libx264", CLIP[:9], {"x264-params": "colormatrix=YCgCo"})
    with pytest.raises(DecodeFailure) as failure:
        probe(path, index_dir=None)
    assert failure.value.reason == "codec"


def test_hidden_frames_of_vp8_are_not_counted(make: Make) -> None:
    """Alternate reference frames come in packets of their own and are never shown: one bit of the header."""
    path = make("hidden.webm", "libvpx", CLIP, {"g": "15"})
    with indexing.Source(str(path), 10**6) as source:
        packets = [bytes(packet) for packet in source.packets() if packet.size]
    data = bytearray(path.read_bytes())
    for k in (7, 33):
        data[data.index(packets[k])] &= ~16
    path.write_bytes(bytes(data))
    truth = plain(path)
    with Video(path, index_dir=None) as video:
        assert video.info.frames == len(truth) == 58
        assert torch.equal(video.read([0, 7, 31, 57]), truth[[0, 7, 31, 57]])
        assert video.index.seekable


def test_plain_way_gives_the_same(make: Make, tmp_path: Path) -> None:
    path = make("a.mp4", "libx264", CLIP, {"g": "12"})
    fast, slow = Video(path, index_dir=tmp_path / "index"), Video(path, index_dir=tmp_path / "index", fast=False)
    assert not fast.index.counted
    assert slow.index.counted
    assert not slow.index.seekable
    assert fast.info == slow.info
    assert torch.equal(fast.read([44, 5, 20]), slow.read([44, 5, 20]))


def test_reading_goes_on_without_starting_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make("a.avi", "mpeg4", CLIP, {"bf": "2"})
    truth, opened = plain(path), []
    video = Video(path, index_dir=None)
    assert video.info.frames == 60
    monkeypatch.setattr("praxino.video.reader.Source", lambda *a, make=indexing.Source: opened.append(1) or make(*a))
    for start in (0, 20, 40):
        assert torch.equal(video.read(range(start, start + 10)), truth[start : start + 10])
    assert len(opened) == 1
    assert torch.equal(video.read([7]), truth[[7]])
    assert len(opened) == 2


def test_describes_as_shown(make: Make) -> None:
    info = probe(make("a.mp4", "libx264", CLIP[:50]), index_dir=None)
    assert (info.kind, info.frames, info.height, info.width) == ("file", 50, 64, 96)
    assert (info.fps, info.codec, info.pix_fmt, info.damage) == (Fraction(25), "h264", "yuv420p", "")
    assert info.duration == pytest.approx(2.0)
    assert VideoInfo.from_json(info.to_json()) == info


def test_wrong_requests(make: Make) -> None:
    path = make("a.mp4", "libx264", CLIP[:10])
    with Video(path, index_dir=None) as video:
        with pytest.raises(IndexError, match=r"frame 10 .* use 0 to 9"):
            video.read([3, 10])
        with pytest.raises(IndexError, match="frame -1"):
            video.read([-1])
        with pytest.raises(ValueError, match="not inside 64x96"):
            video.read([0], Geometry(8, 8, (0, 0, 65, 8)))
        with pytest.raises(ValueError, match="at least 1"):
            next(video.chunks(0))
        assert video.read([]).shape == (0, 64, 96, 3)
        assert video.read([], Geometry(8, 16, (0, 0, 64, 96))).shape == (0, 8, 16, 3)


class TestCache:
    """Indexes live outside the data and follow the file."""

    def test_used_again(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, cache = make("a.mp4", "libx264", CLIP, {"g": "12"}), tmp_path / "index"
        with Video(path, index_dir=cache) as video:
            first, frames, times = video.info, video.read([50]), video.timestamps
        monkeypatch.setattr(indexing, "build", lambda *a, **k: pytest.fail("indexed twice"))
        with Video(path, index_dir=cache) as video:
            assert video.info == first
            assert torch.equal(video.read([50]), frames)
            np.testing.assert_array_equal(video.timestamps, times)
        assert [p.name for p in path.parent.iterdir() if p.name != "index"] == ["a.mp4"]

    def test_follows_changes(self, make: Make, tmp_path: Path) -> None:
        path, cache = make("a.mp4", "libx264", CLIP), tmp_path / "index"
        assert probe(path, index_dir=cache).frames == 60
        encode(path, "libx264", CLIP[:20])
        assert probe(path, index_dir=cache).frames == 20

    def test_damaged_or_read_only(self, make: Make, tmp_path: Path) -> None:
        path, cache = make("a.mp4", "libx264", CLIP), tmp_path / "index"
        probe(path, index_dir=cache)
        (stored,) = cache.rglob("*.npz")
        stored.write_bytes(b"not an archive")
        assert probe(path, index_dir=cache).frames == 60
        assert stored.stat().st_size > 100
        occupied = tmp_path / "occupied"
        occupied.write_text("a file where the folder should be")
        assert probe(path, index_dir=occupied).frames == 60

    def test_none_writes_nothing(self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
        path = make("a.mp4", "libx264", CLIP[:5])
        probe(path, index_dir=None)
        assert not (tmp_path / "user").exists()
        probe(path)
        assert len(list((tmp_path / "user" / "praxino" / "index").rglob("*.npz"))) == 1


class TestDamage:
    """Frames up to the damage, and an index that tells so."""

    @pytest.fixture
    def spoiled(self, make: Make) -> Path:
        """A file whose damage the packets do not show: the payload of one frame is noise, its lengths are right."""
        path = make("a.mkv", "libvpx-vp9", CLIP, {"g": "250", "cpu-used": "8", "lag-in-frames": "0"})
        status, data = path.stat(), bytearray(path.read_bytes())
        packets: list[bytes] = []
        with indexing.Source(str(path), 10**6) as source:
            packets = [bytes(p) for p in source.packets() if p.size]
        at = data.index(packets[30])
        data[at + 1 : at + len(packets[30])] = bytes(len(packets[30]) - 1)
        path.write_bytes(bytes(data))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        return path

    def test_index_is_corrected(self, spoiled: Path, tmp_path: Path) -> None:
        truth = plain(spoiled)
        assert 0 < len(truth) < 60
        with Video(spoiled, index_dir=tmp_path / "index") as video:
            assert torch.equal(video.read([len(truth) - 1])[0], truth[-1])
            promised = video.info.frames
            if promised == 60:
                with pytest.raises(DecodeFailure, match=f"only {len(truth)} frames") as failure:
                    video.read([55])
                assert failure.value.reason == "corrupt"
            assert video.info.frames == len(truth)
            assert video.info.damage
        again = probe(spoiled, index_dir=tmp_path / "index")
        assert (again.frames, bool(again.damage)) == (len(truth), True)
        assert torch.equal(read(spoiled, index_dir=tmp_path / "index"), truth)

    def test_streaming_ends_with_a_warning(self, spoiled: Path, caplog: pytest.LogCaptureFixture) -> None:
        truth = plain(spoiled)
        with Video(spoiled, index_dir=None) as video, caplog.at_level(logging.WARNING):
            promised = video.info.frames
            assert torch.equal(torch.cat(list(video.chunks(8))), truth)
            assert ("could be read" in caplog.text) == (promised > len(truth))
            assert video.info.frames == len(truth)

    def test_truncated(self, make: Make) -> None:
        for name, codec in (("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.ts", "mpeg2video"), ("a.gif", "gif")):
            path = make(name, codec, CLIP, pix_fmt="rgb8" if codec == "gif" else "yuv420p")
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            truth = plain(path)
            with Video(path, index_dir=None) as video:
                assert len(truth) - 1 <= video.info.frames <= len(truth) < 60
                assert torch.equal(torch.cat(list(video.chunks(16))), truth[: video.info.frames])
