"""What files do to scores: reconstructions measured in memory, and after originals and reconstructions were written.

The evaluation of several published VAEs compares files: both sides are written by OpenCV as mp4v (MPEG-4 part 2) and
decoded again. Here the same clips of one VAE are measured in memory, without any file, and from lossless files, from
H.264 at constant rate factor 18, and from mp4v, by the protocols wfvae (33 frames of 256x256) and native (whole); then
with the errors of the VAE divided, for what files do depends on how good it is.

    python benchmarks/reencoding.py VAE FOLDER [--clips N] [--native N] [--out FILE.md]
"""

import argparse
import platform
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

import praxino
from praxino.data.clips import ClipSampler
from praxino.data.usable import find_usable
from praxino.metrics.suite import PairSuite
from praxino.metrics.summary import describe
from praxino.models.vae import Posterior, VideoVAE
from praxino.tasks.evaluate import evaluate
from praxino.tasks.evaluation.score import Reading, Row, score_vae, score_whole
from praxino.tasks.evaluation.verdict import pooled
from praxino.video import Writer, to_uint8

FILES = {"lossless H.264 (RGB)": "lossless", "H.264, crf 18": "h264", "mp4v (OpenCV)": "mp4v"}
KEYS = ("psnr", "psnr_clip", "ssim")


class Mp4v:
    """OpenCV's own writer, as the published scripts use it: frames are cut to 8 bits, not rounded."""

    def __init__(self, path: Path, fps: Fraction) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.fps, self.writer = path, fps, None

    def add(self, video: Tensor) -> None:
        """Write frames `(3, t, H, W)` in [-1, 1]."""
        for frame in ((video.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 3, 0).cpu().numpy():
            if self.writer is None:
                size = frame.shape[1::-1]
                self.writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter_fourcc(*"mp4v"), float(self.fps), size)
            self.writer.write(np.ascontiguousarray(frame[..., ::-1]))

    def close(self) -> None:
        assert self.writer is not None
        self.writer.release()


class Ours:
    """praxino's writer, which rounds."""

    def __init__(self, path: Path, fps: Fraction, codec: Any) -> None:
        self.writer = Writer(path, fps, codec, 18).__enter__()

    def add(self, video: Tensor) -> None:
        self.writer.add(to_uint8(video))

    def close(self) -> None:
        self.writer.__exit__(None, None, None)


class Trees:
    """Writes originals and reconstructions while they are measured in memory, as files of each kind; a `Watcher`."""

    def __init__(self, target: Path, paths: list[str]) -> None:
        self.target, self.paths = target, paths

    def begin(self, places: Sequence[int], fps: Sequence[float]) -> None:
        name, rate = Path(self.paths[places[0]]).with_suffix(".mp4"), Fraction(fps[0]).limit_denominator(1001)
        self.writers: list[tuple[int, Mp4v | Ours]] = []
        for place, side in enumerate(("real", "fake")):
            for codec in FILES.values():
                path = self.target / codec / side / name
                self.writers.append((place, Mp4v(path, rate) if codec == "mp4v" else Ours(path, rate, codec)))

    def add(self, x: Tensor, y: Tensor) -> None:
        for place, writer in self.writers:
            writer.add((x, y)[place][0])

    def end(self, rows: Sequence[Row]) -> None:
        for _, writer in self.writers:
            writer.close()


class Better(nn.Module):
    """A VAE whose errors are divided by a number, which stands for a good one where none is at hand."""

    def __init__(self, vae: VideoVAE, divisor: float) -> None:
        super().__init__()
        self.vae, self.divisor, self.check_video = vae, divisor, vae.check_video

    def encode(self, x: Tensor) -> Posterior:
        self.x = x
        return self.vae.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.x + (self.vae.decode(z).clamp(-1, 1) - self.x) / self.divisor


def measure(model: Any, source: Path, work: Path, protocol: str, reading: Reading) -> list[str]:
    """Return the lines of a table: in memory, then the kinds of files."""
    suite, entries = PairSuite(["psnr", "ssim"]), reading.find(source).entries
    paths = [entry.path for entry in entries]
    trees = Trees(work, paths)
    if reading.frames is None:
        scores = score_whole(model, source, dict(enumerate(entries)), 1, None, suite, [trees])
    else:
        scores = score_vae(model, reading.load(source, entries), suite, [trees])
    memory: dict[str, Any] = {key: describe(row[key] for row in scores.table) for key in KEYS}
    memory |= {"psnr_pooled": pooled(scores.table), "n": len(scores.table)}
    lines = [row(protocol, "in memory", memory, memory)]
    for words, codec in FILES.items():
        sides = {side: str(work / codec / side) for side in ("real", "fake")}
        result = evaluate(str(work / f"{codec}-out"), **sides, metrics=["psnr", "ssim"], report=False)
        lines.append(row(protocol, words, result, memory))
    return lines


def row(protocol: str, words: str, result: dict[str, Any], memory: dict[str, Any]) -> str:
    """Return a line: each mean, and how far it is from the one in memory."""
    cells = []
    for key in (*KEYS, "psnr_pooled"):
        value, true = (r[key] if key == "psnr_pooled" else r[key]["mean"] for r in (result, memory))
        digits = 4 if key == "ssim" else 2
        cells.append(f"{value:.{digits}f}" + ("" if result is memory else f" ({value - true:+.{digits}f})"))
    return f"| {protocol} | {words} | {result['n']} | {' | '.join(cells)} |"


def smallest(source: Path, target: Path, count: int) -> Path:
    """Link the videos with the fewest pixels, all frames counted, into a folder of their own."""
    entries = sorted(
        find_usable(source, ClipSampler(1)).entries, key=lambda e: e.info.frames * e.info.height * e.info.width
    )
    for entry in [e for e in entries if e.info.kind == "file" and e.info.frames > 1][:count]:
        link = target / entry.path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((source / entry.path).resolve())
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vae", type=Path)
    parser.add_argument("videos", type=Path)
    parser.add_argument("--clips", type=int, help="of the first so many videos")
    parser.add_argument("--native", type=int, default=12, help="so many of the smallest videos, whole")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--divide", type=float, nargs="*", default=[8.0], help="the VAE's errors, too, by these")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        work = Path(folder)
        clips = Reading(args.frames, size=args.size, limit=args.clips)
        shape, vae = f"{args.frames}x{args.size}x{args.size}", praxino.load(args.vae)
        lines = measure(vae, args.videos, work / "a", shape, clips)
        for divisor in args.divide:
            model = Better(vae, divisor)
            lines += measure(model, args.videos, work / str(divisor), f"{shape}, errors / {divisor:g}", clips)
        few = smallest(args.videos, work / "few", args.native)
        lines += measure(vae, few, work / "b", "native", Reading(None, size=None))
    head = f"| protocol | compared | videos | PSNR dB | of the clip | SSIM | pooled |\n{'| --- ' * 7}|"
    where = f"torch {torch.__version__}, OpenCV {cv2.__version__}, {platform.machine()}"
    text = f"{head}\n" + "\n".join(lines) + f"\n\n{where}\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
