"""Validation videos to look at: input, reconstruction and error side by side."""

import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from praxino.errors import ConfigError
from praxino.video import Video, to_uint8, write

log = logging.getLogger(__name__)

COLUMNS = 6  # frames of a video on the sheet


class Media(pl.Callback):
    """Write the first `videos` validation samples to `directory/step-XXXXXXXX`, and pass them on to the loggers.

    A video shows input | reconstruction | error, or the "panels" that the module's validation step returns for so many
    samples as its `previews` says; the sheet `sheet.png` a few frames of each. A failure is a warning.

    Args:
        directory: of the media.
        videos: samples of a validation, the same each time.
        gain: of the error.
        fps: frames a second where the data does not say.
    """

    def __init__(self, directory: str, videos: int = 4, gain: float = 4.0, fps: float = 8.0) -> None:
        if videos < 1 or gain <= 0 or fps <= 0:
            raise ConfigError(f"media videos={videos}, gain={gain} and fps={fps} must be positive")
        self.directory = Path(directory)
        self.videos, self.gain, self.fps = videos, gain, fps
        self._samples: list[tuple[Tensor, float]] = []  # uint8 (T, H, n W, 3) and its rate

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin anew."""
        self._samples = []
        pl_module.previews = self.videos

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first samples, as they will be shown."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        rates = batch["fps"].tolist() if "fps" in batch else [self.fps] * len(batch["index"])
        strips = outputs.get("panels")
        if strips is None:
            strips = [[x, y, error(x, y, self.gain)] for x, y in zip(outputs["input"], outputs["recon"], strict=True)]
        for panels, fps in zip(strips, rates, strict=False):  # a module may show less than a batch
            if len(self._samples) < self.videos:
                self._samples.append((side_by_side(*panels), float(fps) or self.fps))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the files."""
        if not self._samples:
            return
        folder = self.directory / f"step-{pl_module.step:08d}"
        try:
            paths = [
                write(folder / f"{number:02d}.mp4", video, fps) for number, (video, fps) in enumerate(self._samples)
            ]
            sheet = contact_sheet([video for video, _ in self._samples])
            write_png(folder / "sheet.png", sheet)
            for logger in trainer.loggers:
                pass_on(getattr(logger, "logger", logger), paths, sheet, pl_module.step)
        except Exception as error:  # pictures are not worth a training
            log.warning("validation videos of step %d not written: %s: %s", pl_module.step, type(error).__name__, error)
        self._samples = []


def error(x: Tensor, y: Tensor, gain: float) -> Tensor:
    """Return `gain` times the error of a reconstruction as a video, black where there is none."""
    return (gain * (y.float().clamp(-1, 1) - x.float()).abs() - 1).clamp(-1, 1)


def side_by_side(*panels: Tensor) -> Tensor:
    """Join videos `(C, T, H, W)` in [-1, 1] to uint8 `(T, H, n W, C)`."""
    return to_uint8(torch.cat([panel.float().clamp(-1, 1) for panel in panels], dim=-1)).cpu()


def contact_sheet(videos: list[Tensor]) -> Tensor:
    """Lay out a few frames of each video `(T, H, 3W, 3)`, one below the other, as one picture `(H', W', 3)`."""
    rows = []
    for video in videos:
        count = min(COLUMNS, len(video))
        frames = video[torch.linspace(0, len(video) - 1, count).round().long()]
        rows.append(frames.flatten(0, 1))
    height = max(row.shape[0] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (0, 0, 0, 0, 0, height - row.shape[0])) for row in rows], dim=1)


def write_png(path: Path, picture: Tensor) -> None:
    """Write one picture `(H, W, 3)` uint8."""
    folder = write(path.with_suffix(""), picture[None], 1, codec="png")
    os.replace(folder / "00000.png", path)
    folder.rmdir()


def pass_on(logger: Logger | None, paths: list[Path], sheet: Tensor, step: int) -> None:
    """Hand the media to a logger that takes them."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image("val/videos", sheet, step, dataformats="HWC")
        for number, path in enumerate(paths):
            add_gif(logger.experiment, f"val/video_{number}", path, step)
    elif isinstance(logger, WandbLogger):
        import wandb

        videos = {f"val/video_{number}": wandb.Video(str(path)) for number, path in enumerate(paths)}
        logger.experiment.log({**videos, "trainer/global_step": step})


def add_gif(writer: Any, tag: str, path: Path, step: int) -> None:
    """Give TensorBoard a video as the picture that moves there: a GIF."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Video(path) as video, TemporaryDirectory() as folder:
        info, frames = video.info, video.read(range(video.info.frames))  # (T, H, W, 3)
        gif = write(Path(folder) / "video.gif", frames, info.fps).read_bytes()
    picture = Summary.Image(height=info.height, width=info.width, colorspace=3, encoded_image_string=gif)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)
