"""Several metrics of pairs of videos at once, frames given as they come: the result does not depend on the pieces."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from praxino.metrics.image import LEAST, Window, check_pair, ms_ssim_frames, mse_frames, ssim_frames, to_decibel
from praxino.metrics.temporal import difference_error, flicker

Distance = Callable[[Tensor, Tensor], Tensor]
METRICS = ("psnr", "ssim", "ms_ssim", "difference", "flicker")
TEMPORAL: dict[str, Callable[[Tensor, Tensor, bool], Tensor]] = {"difference": difference_error, "flicker": flicker}


class PairSuite:
    """Metrics of videos `y` against the truth `x`, both `(B, C, T, H, W)` in [-1, 1].

    Args:
        metrics: names in `METRICS` and of `distances`.
        window: of SSIM and MS-SSIM, see `ssim_frames`.
        distances: further metrics by name, such as LPIPS: functions of two videos that return `(B, T)`, each value of
            its frame alone. Where one has `smallest`, frames with a shorter side get no value.

    Raises:
        ValueError: an unknown metric.
    """

    def __init__(
        self, metrics: Sequence[str], window: Window = "valid", distances: Mapping[str, Distance] | None = None
    ) -> None:
        self.metrics, self.window, self.distances = tuple(metrics), window, dict(distances or {})
        if unknown := [name for name in self.metrics if name not in (*METRICS, *self.distances)]:
            known = ", ".join((*METRICS, *self.distances))
            raise ValueError(f"metric {unknown[0]!r} is unknown: use some of {known}.")

    def begin(self) -> "PairMeter":
        """Begin with new videos."""
        return PairMeter(self)

    def score(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return the scores of whole videos at once, see `PairMeter.scores`."""
        meter = self.begin()
        meter.add(x, y)
        return meter.scores()


class PairMeter:
    """What a suite has measured of the videos of a batch so far."""

    def __init__(self, suite: PairSuite) -> None:
        self.suite = suite
        self.last: tuple[Tensor, Tensor] | None = None  # the last frame of both
        self.pieces: dict[str, list[Tensor]] = {name: [] for name in ("mse", *suite.metrics)}

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Measure the next frames.

        Raises:
            ValueError: values outside [-1, 1], or videos that do not fit each other or the frames before.
        """
        check_pair(x, y)
        if self.last is not None and x[:, :, :1].shape != self.last[0].shape:
            raise ValueError(f"frames of {tuple(x.shape)} do not continue those of {tuple(self.last[0].shape)}.")
        values = {"mse": mse_frames(x, y, check=False)}
        for name in self.suite.metrics:
            values[name] = self._measure(name, x, y, values["mse"])
        for name, piece in values.items():
            self.pieces[name].append(piece.double())
        self.last = x[:, :, -1:].clone(), y[:, :, -1:].clone()

    def _measure(self, name: str, x: Tensor, y: Tensor, mse: Tensor) -> Tensor:
        """Return a metric of every frame, `(B, t)`."""
        distance = self.suite.distances.get(name)
        least = LEAST.get(name, 1) if distance is None else getattr(distance, "smallest", 1)
        if min(x.shape[-2:]) < least:
            return torch.full_like(mse, torch.nan)
        if distance is not None:
            return distance(x, y)
        if name == "psnr":
            return to_decibel(mse)
        if name in TEMPORAL:
            held = 0 if self.last is None else 1
            a, b = (
                (x, y)
                if self.last is None
                else (torch.cat(pair, dim=2) for pair in zip(self.last, (x, y), strict=True))
            )
            return TEMPORAL[name](a, b, False)[:, held:]
        return (ssim_frames if name == "ssim" else ms_ssim_frames)(x, y, self.suite.window, check=False)

    def curves(self) -> dict[str, Tensor]:
        """Return every metric of every frame, `(B, T)` on the CPU, float64; NaN where there is none."""
        return {name: self._joined(name) for name in self.suite.metrics}

    def scores(self) -> dict[str, Tensor]:
        """Return every metric of every video, `(B,)` on the CPU, float64: the mean over the frames that have a value.

        `psnr` comes with `psnr_clip`, that of the mean squared error of the whole clip.
        """
        found = {name: curve.nanmean(dim=1) for name, curve in self.curves().items()}
        if "psnr" in found:
            found["psnr_clip"] = to_decibel(self.mse())
        return found

    def mse(self) -> Tensor:
        """Return the mean squared error of every video, of values mapped to [0, 1], `(B,)`: to pool it over videos."""
        return self._joined("mse").mean(dim=1)

    def _joined(self, name: str) -> Tensor:
        if not self.pieces[name]:
            raise ValueError("nothing has been measured yet: add frames first.")
        return torch.cat([piece.cpu() for piece in self.pieces[name]], dim=1)
