"""What files do to scores: reconstructions measured in memory, and after originals and reconstructions were written.

The evaluation of several published VAEs compares files: both sides are written by OpenCV as mp4v (MPEG-4 part 2) and
decoded again. Here the same clips of one VAE are measured in memory, without any file, and from lossless files, from
H.264 at constant rate factor 18, and from mp4v, by the protocols wfvae (33 frames of 256x256) and native (whole).

    python benchmarks/reencoding.py VAE FOLDER [--native N] [--out FILE.md]
"""

import argparse
import platform
import shutil
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

import praxino
from praxino.data.clips import ClipSampler
from praxino.data.transforms import Resize
from praxino.data.usable import find_usable
from praxino.tasks.evaluate import evaluate
from praxino.tasks.reconstruct import Clip, pairs
from praxino.tasks.score import WHOLE
from praxino.video import Video, Writer, to_float, to_uint8

FILES = {"lossless H.264 (RGB)": "lossless", "H.264, crf 18": "h264", "mp4v (OpenCV)": "mp4v"}
SETTINGS: dict[str, Any] = {"metrics": ["psnr", "ssim"], "report": False, "workers": 0}
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


def write_trees(vae: Path, source: Path, target: Path, frames: int | None, size: int | None) -> None:
    """Write originals and reconstructions of all videos as files of each kind."""
    model = praxino.load(vae)
    for entry in find_usable(source, ClipSampler(frames or 1)).entries:
        with Video(source / entry.path) as video:
            clip = Clip(video, frames, 1, None if size is None else Resize(size), None, WHOLE)
            name = Path(entry.path).with_suffix(".mp4")
            writers = []
            for side in ("real", "fake"):
                for codec in FILES.values():
                    path = target / codec / side / name
                    writers.append((side, Mp4v(path, clip.fps) if codec == "mp4v" else Ours(path, clip.fps, codec)))
            for x, y in pairs(model, clip, torch.device("cpu"), frames or clip.chunk, WHOLE):
                videos = {"real": to_float(x), "fake": y}
                for side, writer in writers:
                    writer.add(videos[side])
            for _, writer in writers:
                writer.close()


def measure(vae: Path, source: Path, work: Path, protocol: str, frames: int | None, size: int | None) -> list[str]:
    """Return the lines of a table: in memory, then the kinds of files."""
    data = {"root": str(source)}
    result = evaluate(str(work / "memory"), vae=str(vae), data=data, frames=frames, size=size, **SETTINGS)
    lines = [row(protocol, "in memory", result, result)]
    write_trees(vae, source, work / "files", frames, size)
    for words, codec in FILES.items():
        trees = {side: str(work / "files" / codec / side) for side in ("real", "fake")}
        lines.append(row(protocol, words, evaluate(str(work / codec), **trees, **SETTINGS), result))
    shutil.rmtree(work)
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
    parser.add_argument("--native", type=int, default=12, help="so many of the smallest videos, whole")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        work = Path(folder)
        lines = measure(args.vae, args.videos, work / "a", "wfvae", args.frames, args.size)
        few = smallest(args.videos, work / "few", args.native)
        lines += measure(args.vae, few, work / "b", "native", None, None)
    head = f"| protocol | compared | videos | PSNR dB | of the clip | SSIM | pooled |\n{'| --- ' * 7}|"
    where = f"torch {torch.__version__}, OpenCV {cv2.__version__}, {platform.machine()}"
    text = f"{head}\n" + "\n".join(lines) + f"\n\n{where}\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
