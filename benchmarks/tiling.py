"""What tiles cost: the difference to the whole on real clips, at the seams and elsewhere, and the memory they save.

Clips are cut to 320x320, 9 frames, and go through encoder and decoder in tiles. `step` is the mean change of the
difference (tiled - whole) from one pixel to the next across the border of a tile, in grey levels of 255, beside the
same away from borders: a seam that can be seen is a step. Memory is the peak above the loaded model, one process each,
of a small WF-VAE with random weights.

    python benchmarks/tiling.py VAE CLIP [CLIP ...] [--out FILE.md]
"""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import praxino
from praxino import stream, tiling
from praxino.data.transforms import Resize
from praxino.models.vae import VideoVAE
from praxino.video import Video, to_float

FRAMES, SIZE = 9, 320
SETTINGS = [(64, 0.0), (64, 0.125), (64, 0.25), (64, 0.5), (128, 0.25)]  # pixels of a tile, overlap
MEMORY = """
import resource, torch
from praxino import stream
from praxino.models.wfvae import WFVAE
torch.set_num_threads(1)
torch.set_grad_enabled(False)
torch.manual_seed(0)
vae = WFVAE(latent_dim=8, base_channels=16, encoder_energy_flow_hidden_size=16, decoder_energy_flow_hidden_size=16,
            encoder_num_resblocks=1, decoder_num_resblocks=1, norm_type="layernorm", t_interpolation="trilinear").eval()
resident = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
{call}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident)
"""
PUSHED = """
clips = (torch.rand(3, 8 if i else 1, 512, 512) for i in range(5))
assert sum(y.shape[1] for y in stream.reconstruct(vae, clips, {chunk}, {tile})) == 33
"""
IN_TURN = """
x = torch.rand(1, 3, 33, 512, 512)
z = stream.encode(vae, x, {chunk}, {tile}).mode()
assert stream.decode(vae, z, {latents}, {tile}).shape == x.shape
"""
WAYS = {
    "`reconstruct`, whole": PUSHED.format(chunk=None, tile=None),
    "`reconstruct`, chunks of 8": PUSHED.format(chunk=8, tile=None),
    "`reconstruct`, tiles of 256, chunks of 8": PUSHED.format(chunk=8, tile=256),
    "`reconstruct`, tiles of 256, chunks of 1": PUSHED.format(chunk=1, tile=256),
    "`encode` and `decode`, tile after tile of 256, chunks of 8 (x and y in memory: 198 MiB)": IN_TURN.format(
        chunk=8, tile=256, latents=2
    ),
}


def read(path: Path) -> Tensor:
    """Return the first frames of a video, centre-cropped, `(1, 3, T, H, W)`."""
    with Video(path) as video:
        geometry = Resize(SIZE)(video.info.height, video.info.width)
        return to_float(torch.cat(list(video.chunks(FRAMES, 0, FRAMES, 1, geometry))))[None]


def run(vae: VideoVAE, x: Tensor, tile: int | None = None, overlap: float = 0.25) -> Tensor:
    """Return the reconstruction of a clip."""
    return torch.cat(list(stream.reconstruct(vae, [x], 8, tile, overlap)), dim=2)


def decibels(difference: Tensor) -> float:
    """Return the PSNR of a difference of videos in [-1, 1]."""
    return (10 * torch.log10(4 / difference.square().mean())).item()


def seams(axis: tiling.Axis, cell: int) -> Tensor:
    """Return which steps from a pixel to the next cross the border of a tile."""
    inner = {end * cell for s in axis.starts for end in (s, s + axis.size)} - {0, axis.length * cell}
    crossed = torch.zeros(axis.length * cell - 1, dtype=torch.bool)
    crossed[[border - 1 for border in sorted(inner)]] = True
    return crossed


def compare(vae: VideoVAE, x: Tensor, whole: Tensor, tile: int, overlap: float) -> dict[str, float]:
    """Measure tiles against the whole; steps are taken down and across."""
    y = run(vae, x, tile, overlap)
    error = y - whole
    axis = tiling.pixel_grid(vae, x.shape, tile, overlap).rows
    crossed = seams(axis, vae.stride[1])
    steps = torch.stack([error.diff(dim=d).movedim(d, -1).abs().flatten(0, -2) for d in (-1, -2)]).mean((0, 1))
    near = torch.nn.functional.pad(crossed, (1, 0)) | torch.nn.functional.pad(crossed, (0, 1))
    mask = near | near[:, None]
    return {
        "tiles": len(axis.starts) ** 2,
        "PSNR to the whole": decibels(error),
        "PSNR to the clip": decibels(y - x),
        "max at seams": error[..., mask].abs().max().item() * 127.5,
        "max elsewhere": error[..., ~mask].abs().max().item() * 127.5,
        "step at seams": steps[crossed].mean().item() * 127.5,
        "step elsewhere": steps[~crossed].mean().item() * 127.5,
    }


def peak(call: str) -> tuple[float, float]:
    """Return the peak MiB above the loaded model, and seconds, of a reconstruction in a process of its own."""
    started = time.perf_counter()
    code = MEMORY.format(call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) / 2**20, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vae", help="whatever praxino.load reads")
    parser.add_argument("clips", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    vae = praxino.load(args.vae)
    lines = [
        f"{type(vae).__name__}, {sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M parameters, clips of "
        f"{FRAMES}x{SIZE}x{SIZE}: {', '.join(path.name for path in args.clips)}; 1 thread, {platform.machine()}, "
        f"torch {torch.__version__}. Means over the clips, of maxima the maximum; steps and maxima in 1/255.",
        "",
    ]
    rows: dict[str, list[dict[str, float]]] = {}
    exact = []
    for path in args.clips:
        x = read(path)
        whole = run(vae, x)
        exact.append(decibels(whole - x))
        for tile, overlap in SETTINGS:
            rows.setdefault(f"{tile} px, overlap {overlap}", []).append(compare(vae, x, whole, tile, overlap))
    names = list(next(iter(rows.values()))[0])
    lines += ["| tiles | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines.append(f"| the whole | 1 | | {sum(exact) / len(exact):.2f} |" + " |" * 4)
    for label, found in rows.items():
        columns = [[row[name] for row in found] for name in names]
        values = [max(c) if name.startswith("max") else sum(c) / len(c) for name, c in zip(names, columns, strict=True)]
        lines.append(f"| {label} | {values[0]:.0f} | " + " | ".join(f"{value:.2f}" for value in values[1:]) + " |")
    lines += ["", "| reconstruction of 33x512x512 | peak MiB | seconds |", "|---|---|---|"]
    for label, call in WAYS.items():
        memory, seconds = peak(call)
        lines.append(f"| {label} | {memory:.0f} | {seconds:.0f} |")
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
