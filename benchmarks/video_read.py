"""CPU seconds per random clip: praxino.video against the usual PyAV reader, on two H.264 files made here.

    python benchmarks/video_read.py [--rounds 7] [--clips 16] [--seconds 60] [--out benchmarks/results/video_read.md]

Each file has 640x360 pixels at 30 frames/s (x264 medium, CRF 31, 2 B-frames and pyramid), one with a key frame at most
every 250 frames, one every 12. A clip is 17 frames at stride 1, 2 or 4, delivered as uint8 256x256 (centre square). The
methods take turns in random order; CPU time is that of the whole process, threads included.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from av.filter import Graph
from torch import Tensor

from praxino.video import Geometry, Video

HEIGHT, WIDTH, FPS, SIZE, FRAMES = 360, 640, 30, 256, 17
SQUARE = Geometry(SIZE, SIZE, (0, (WIDTH - HEIGHT) // 2, HEIGHT, HEIGHT))
Clip = list[int]


def make(path: Path, seconds: int, gop: int) -> None:
    """Write the test film: a zoom into the Mandelbrot set beside FFmpeg's moving test card, with grain."""
    graph = Graph()
    left = graph.add("mandelbrot", f"size={WIDTH // 2}x{HEIGHT}:rate={FPS}")
    right = graph.add("testsrc2", f"size={WIDTH // 2}x{HEIGHT}:rate={FPS}")
    same, stack, grain = graph.add("format", "yuv420p"), graph.add("hstack"), graph.add("noise", "alls=6:allf=t")
    sink = graph.add("buffersink")
    left.link_to(same)
    same.link_to(stack, 0, 0)
    right.link_to(stack, 0, 1)
    stack.link_to(grain)
    grain.link_to(sink)
    graph.configure()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "31", "preset": "medium", "bf": "2", "g": str(gop)}
        for k in range(seconds * FPS):
            frame = graph.pull()
            frame.pts, frame.time_base = k, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def naive(path: Path, clip: Clip) -> Tensor:
    """Seek to the key frame, decode, convert whole frames, resize as float: what most research loaders do."""
    wanted, pictures = set(clip), []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        container.seek(round(Fraction(clip[0], FPS) / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            assert frame.pts is not None
            k = round(frame.pts * stream.time_base * FPS)
            if k in wanted:
                pictures.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if k >= clip[-1]:
                break
    video = torch.stack(pictures).permute(0, 3, 1, 2).float()
    video = F.interpolate(video, (SIZE, round(WIDTH * SIZE / HEIGHT)), mode="bilinear", antialias=True)
    left = (video.shape[-1] - SIZE) // 2
    return video[..., left : left + SIZE].round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def measure(path: Path, cache: Path, rounds: int, clips: int) -> dict[str, float]:
    """Return CPU milliseconds per clip of each method, the median over rounds."""
    rng = random.Random(0)
    total = Video(path, index_dir=cache).info.frames
    kept_open = Video(path, index_dir=cache)

    def ours(path: Path, clip: Clip) -> Tensor:
        with Video(path, index_dir=cache) as video:
            return video.read(clip, SQUARE)

    methods: dict[str, Callable[[Path, Clip], Tensor]] = {
        "PyAV naive (seek, rgb24, float resize)": naive,
        "praxino.video, opened for each clip": ours,
        "praxino.video, kept open": lambda path, clip: kept_open.read(clip, SQUARE),
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        batch = []
        for _ in range(clips):
            stride = rng.choice([1, 2, 4])
            start = rng.randrange(total - (FRAMES - 1) * stride)
            batch.append([start + j * stride for j in range(FRAMES)])
        for name in rng.sample(sorted(methods), len(methods)):
            begin = time.process_time()
            for clip in batch:
                methods[name](path, clip)
            times[name].append((time.process_time() - begin) / clips * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def wrong_frames(path: Path, cache: Path, clips: int) -> tuple[int, int]:
    """Return how many frames of random clips differ from decoding from the start, and how many were compared."""
    rng = random.Random(1)
    with Video(path, index_dir=None, fast=False) as plain:
        truth = torch.cat(list(plain.chunks(64, geometry=SQUARE)))
    wrong = 0
    for _ in range(clips):
        stride = rng.choice([1, 2, 4])
        start = rng.randrange(len(truth) - (FRAMES - 1) * stride)
        clip = [start + j * stride for j in range(FRAMES)]
        with Video(path, index_dir=cache) as video:
            got = video.read(clip, SQUARE)
        wrong += int((got != truth[clip]).flatten(1).any(1).sum())
    return wrong, clips * FRAMES


def main() -> None:
    """Make the films, measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--films", type=Path, help="folder that keeps the films between runs")
    parser.add_argument("--machine", default="2-core x86-64 CPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "video_read.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Random clips from H.264: CPU time against the usual PyAV reader",
        "",
        f"`python benchmarks/video_read.py --rounds {args.rounds} --clips {args.clips} --seconds {args.seconds}` on a "
        f"{args.machine}; PyAV {av.__version__}, FFmpeg {av.ffmpeg_version_info}, torch {torch.__version__}, 1 thread.",
        "17 frames at stride 1, 2 or 4 -> uint8 256x256, from 640x360 at 30 frames/s; interleaved, median of rounds.",
        "",
        "| key frame every | method | CPU ms per clip | times less CPU |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        films = args.films or Path(scratch)
        films.mkdir(parents=True, exist_ok=True)
        for gop in (250, 12):
            path = films / f"gop{gop}_{args.seconds}s.mp4"
            if not path.exists():
                make(path, args.seconds, gop)
            times = measure(path, Path(scratch) / "index", args.rounds, args.clips)
            reference = next(iter(times.values()))
            lines += [f"| {gop} | {name} | {ms:.1f} | {reference / ms:.2f} |" for name, ms in times.items()]
            wrong, compared = wrong_frames(path, Path(scratch) / "index", args.clips)
            lines.append(f"| {gop} | wrong frames against decoding from the start | {wrong} of {compared} | |")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
