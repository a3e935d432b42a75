"""Pipeline: videos, VAE, gate, latents, DiT, samples, predictions, evaluation and a gallery, by one command."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from praxino.config import check_call
from praxino.errors import ConfigError, DataError
from praxino.tasks.console import show_table
from praxino.tasks.gallery import gallery
from praxino.tasks.rundir import check_outside, make_directory
from praxino.tasks.stages import Stage, begin_anew, run_stages

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `pipeline` and call it."""
    return pipeline(**check_call(pipeline, cfg))


def pipeline(
    out: str,
    data: dict[str, str | None],
    videos: dict[str, Any],
    vae: dict[str, Any],
    gate: float | None,
    reconstruct: dict[str, Any],
    encode: dict[str, Any],
    dit: dict[str, Any],
    sample: dict[str, Any],
    predict: dict[str, Any],
    evaluate: dict[str, Any],
    frames: int,
    size: int | list[int],
    title: str,
) -> dict[str, Any]:
    """Run all stages that are not finished, each as the command that a user would type, and draw up the gallery.

    Args:
        data: `root`, a folder of videos, and `val_root`, others that no training sees; without them moving shapes are
            made, with held-out ones.
        videos, vae, reconstruct, encode, dit, sample, predict, evaluate: settings of praxino-make-data, train (the
            VAE), reconstruct, encode, train (the DiT), sample, predict and evaluate.
        gate: dB of PSNR that the VAE must reach on held-out videos, or no DiT is trained on its latents.
        frames, size: of a clip, in every stage.

    Returns:
        the figures of the gallery.
    """
    if data["root"] is None and data["val_root"] is not None:
        raise ConfigError("data.val_root is given without data.root: give both, or data.root alone")
    check_outside(out, {f"data.{key}": root for key, root in data.items()})
    target = make_directory(out)
    settings = {"videos": videos, "vae": vae, "reconstruct": reconstruct, "encode": encode}
    settings |= {"dit": dit, "sample": sample, "predict": predict, "evaluate": evaluate}
    stages = plan(target, data, settings, frames, size)
    stamps: list[dict[str, Any]] = []
    for stamp in run_stages(stages, target):
        stamps.append(stamp)
        if stamp["stage"] == "vae" and gate is not None:
            check_gate(target / "vae", gate)
    summary = gallery(run=str(target), out=str(target / "gallery"), title=title)
    report(stamps, summary, target)
    return summary


def plan(
    out: Path, data: dict[str, str | None], settings: dict[str, dict[str, Any]], frames: int, size: int | list[int]
) -> list[Stage]:
    """Return the stages; what one reads of another is a path under `out`."""
    made, clip = data["root"] is None, {"frames": frames, "size": size}
    train = f"{out}/videos/train" if made else absolute(data["root"])
    held_out = f"{out}/videos/val" if made else absolute(data["val_root"])
    if held_out is None:
        log.warning("data.val_root is not given: what is reconstructed and predicted below was seen in training")
    shown, first = held_out or train, ("videos",) if made else ()
    theirs = () if made else tuple(filter(None, (train, held_out)))

    def stage(name: str, command: str, inputs: Sequence[str], resume: Any = begin_anew, **wiring: Any) -> Stage:
        own = {**clip, **settings[name]} if name != "sample" else settings[name]
        read = {*wiring.get("data", {}).values(), wiring.get("input"), wiring.get("real")}
        return Stage(name, command, merge(own, wiring), tuple(inputs), tuple(r for r in theirs if r in read), resume)

    vae, dit = f"{out}/vae", f"{out}/dit"
    stages = [
        stage("vae", "train", first, resume_training, data={"root": train, "val_root": held_out}),
        stage("reconstruct", "reconstruct", (*first, "vae"), vae=vae, input=shown, save_original=True, lossless=True),
        stage("encode", "encode", (*first, "vae"), go_on, vae=vae, data={"root": train}),
        stage("dit", "train", ("encode",), resume_training, data={"root": f"{out}/encode"}),
        stage("sample", "sample", ("dit",), ckpt=dit, lossless=True),
        stage("predict", "predict", (*first, "dit"), ckpt=dit, input=shown, compare=True),
        stage("evaluate", "evaluate", (*first, "sample"), real=shown, fake=f"{out}/sample", paired=False),
    ]
    if made:
        stages.insert(0, stage("videos", "make-data", (), go_on))
    return stages


def merge(settings: dict[str, Any], wiring: dict[str, Any]) -> dict[str, Any]:
    """Return settings with those that tie the stages together, which win."""
    found = dict(settings)
    for key, value in wiring.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merge(found[key], value) if both else value
    return found


def absolute(path: str | None) -> str | None:
    """Return a path that does not depend on where the pipeline was started."""
    return None if path is None else str(Path(path).expanduser().absolute())


def go_on(folder: Path) -> list[str]:
    """Leave the folder to a command that finishes by itself what it has begun."""
    return []


def resume_training(folder: Path) -> list[str] | None:
    """Go on with a training that has saved a checkpoint."""
    return ["ckpt=last"] if any((folder / "checkpoints").glob("step-*.ckpt")) else None


def check_gate(run: Path, gate: float) -> None:
    """Stop where the VAE is too bad for a DiT to learn anything from its latents."""
    found = last_value(run / "metrics.jsonl", "val/psnr")
    if found is None:
        raise DataError(f"gate={gate}: {run} has no val/psnr: give more videos, or gate=null to go on regardless")
    if found < gate:
        raise DataError(
            f"gate: the VAE reconstructs held-out videos at {found:.2f} dB, below gate={gate}; no DiT follows. "
            "Train it anew for longer (vae.trainer.max_steps=N), or lower the gate"
        )
    log.info("gate: held-out PSNR %.2f dB, %g needed", found, gate)


def last_value(path: Path, name: str) -> float | None:
    """Return the last logged value of a metric."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    return next((row[name] for row in reversed(rows) if isinstance(row.get(name), int | float)), None)


def report(stamps: Sequence[dict[str, Any]], summary: dict[str, Any], out: Path) -> None:
    """Print what it took and what came out."""
    rows = [(s["stage"], s["seconds"], "finished before" if s["skipped"] else "") for s in stamps]
    total = sum(s["seconds"] for s in stamps)
    show_table(f"Stages in {out}", [*rows, ("all", total, "")], ("stage", "seconds", ""))
    figures = [(row["name"], row["value"], row["note"]) for row in summary["figures"]]
    show_table(f"Gallery: {out / 'gallery' / 'index.html'}", figures, ("figure", "value", ""))
