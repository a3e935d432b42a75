"""Evaluate: of a VAE the reconstructions, of two trees or sets of videos the likeness, of a denoiser what it makes.

One row a video, the protocol beside every number, and a page to look at.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from praxino import checkpoint
from praxino.config import check_call
from praxino.data.clips import Short, Where
from praxino.data.transforms import Size
from praxino.data.usable import spread
from praxino.errors import ConfigError
from praxino.metrics.image import Window
from praxino.models.vae import check_clip
from praxino.tasks.common import at_least, make_resize
from praxino.tasks.device import FLOAT32, Precision, pick_device, precision_context
from praxino.tasks.evaluation import imagined
from praxino.tasks.evaluation.compare import RANDOM, compare_sets, known_statistics, settle
from praxino.tasks.evaluation.pairs import check_pairs, find_pairs, read_tree
from praxino.tasks.evaluation.protocol import Mode, changes, check_heeded, identify
from praxino.tasks.evaluation.report import Clip
from praxino.tasks.evaluation.score import Reading, Row, Scores, Watcher, score_pairs, score_vae, score_whole
from praxino.tasks.evaluation.shown import Pictures, thumbnails
from praxino.tasks.evaluation.verdict import Judge, Outcome, mean_curves
from praxino.tasks.ranks import Ranks, launch
from praxino.tasks.rundir import check_outside, make_directory


def run(cfg: DictConfig) -> dict[str, Any]:
    """Check a configuration against `evaluate` and call it."""
    return evaluate(**check_call(evaluate, cfg))


def evaluate(
    out: str,
    vae: str | None = None,
    data: dict[str, str | None] | None = None,
    real: str | None = None,
    fake: str | None = None,
    paired: bool = True,
    unpaired: Literal["error", "skip"] = "error",
    ckpt: str | None = None,
    input: str | None = None,
    context: int = 5,
    n: int = 64,
    generate: dict[str, Any] | None = None,
    protocol: str | None = None,
    metrics: list[str] | tuple[str, ...] = ("psnr", "ssim", "difference", "flicker"),
    window: Window = "valid",
    lpips: dict[str, Any] | None = None,
    fvd: dict[str, Any] | None = None,
    fid: dict[str, Any] | None = None,
    frames: int | None = 17,
    stride: int = 1,
    fps: float | None = None,
    size: Size = 64,
    short: Short = "drop",
    where: Where = "start",
    seed: int = 0,
    limit: int | None = None,
    batch: int = 1,
    workers: int = 2,
    weights: Literal["ema", "raw"] = "ema",
    report: bool = True,
    shown: int = 4,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    precision: Precision = "32",
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """Measure a VAE, two trees, two sets or a denoiser; write a row a video, a summary and a page.

    * `vae data.root`: reconstructions in memory, by the posterior's mode, clamped to [-1, 1] and not rounded.
    * `real fake`: the videos of two trees against their namesakes, all frames as they decode, at their own size.
    * `real fake paired=false`: two sets, by a clip of each video (`praxino.tasks.evaluation.compare.compare_sets`).
    * `ckpt real`: the same for `n` samples, which are written to `out/samples`.
    * `ckpt input`: predictions after `context` frames against what came, which are written to `out/predictions`.

    `generate` holds further settings of praxino-sample and praxino-predict. Samples have the frames and size of the
    training unless `generate.frames` and `generate.size` say otherwise, and real videos are read likewise; predictions
    go on until `generate.frames` (17). Settings that would not be heeded are refused.

    Args:
        unpaired: what becomes of videos without a partner of their length and size: error, or skip, which lists them.
        protocol: a file of conf/protocol, whose settings these are: it is named, with all that were changed of them and
            of the other defaults.
        metrics: of pairs: psnr, ssim, ms_ssim, difference, flicker, lpips.
        window: of SSIM: valid, as in the literature, or reflect, as torchmetrics has it.
        lpips: net, weights, sha256, spatial: see `praxino.losses.perceptual.LPIPS`.
        fvd, fid: see `praxino.tasks.evaluation.compare.Fvd` and `Fid`; they are measured where a detector is given.
        frames, stride, fps, size, short, where, seed, limit: the clips, see `praxino.tasks.evaluation.score.Reading`.
            A VAE is measured on whole videos with frames=null, at their own size with size=null, in memory that does
            not grow.
        report: write report.html, with `shown` of the worst, the best and other videos.
        devices, num_nodes: processes, which share the batches; the numbers do not depend on them.

    Returns:
        the content of metrics.json: mean, std, low, high (a 95 % bootstrap interval over videos) and n of each metric;
        figures of the whole set; n, rejected, protocol, versions.
    """
    given = locals()
    protocols = changes(protocol, given)
    at_least(1, frames=frames, stride=stride, limit=limit, batch=batch, context=context, n=n)
    at_least(1, devices=devices, num_nodes=num_nodes)
    at_least(0, workers=workers, shown=shown)
    root = data["root"] if data else None
    mode = mode_of(paired, vae=vae, root=root, real=real, fake=fake, ckpt=ckpt, input=input)
    check_heeded(mode, protocol, given)
    if size is None and batch > 1 and mode in ("reconstruction", "sets"):
        raise ConfigError("size=null keeps the size of every video: use batch=1")
    if fps is not None and (frames is None or stride > 1):
        raise ConfigError(f"fps={fps:g} chooses frames by time: use frames=N and stride=1 with it")
    if frames is None and mode == "sets":
        raise ConfigError("frames=null: sets are compared by clips of one length, e.g. frames=17")
    if size is None and mode == "sets" and not any(setting and setting.get("detector") for setting in (fvd, fid)):
        raise ConfigError("size=null: without a detector sets are compared by clips of one size, e.g. size=64")
    if mode in ("sets", "samples") and fvd and fvd.get("per_batch"):
        if not protocols or "fvd.per_batch" in protocols["changed"]:
            raise ConfigError("fvd.per_batch: sets without partners have no batches: leave it out")
        fvd, protocols = fvd | {"per_batch": False}, {**protocols, "left_out": ["fvd.per_batch"]}
    make_resize(size)
    reading = Reading(frames, stride, fps, size, short, where, seed, limit, batch, workers, cache_dir)
    judge, target = Judge.of(metrics, window, lpips, fvd, fid), make_directory(out)
    outcome = Outcome(target, report, shown if report else 0, protocols, pick_device(device))
    if mode in ("samples", "predictions"):  # which write videos
        check_outside(out, {"real": real, "input": input})
        common = {"ckpt": ckpt, "seed": seed, "weights": weights, "precision": precision, "device": device}
        common |= {"devices": devices, "num_nodes": num_nodes, **(generate or {})}
        if mode == "predictions":
            own = {"input": input, "context": context, "stride": stride, "limit": limit, "cache_dir": cache_dir}
            return imagined.predictions(target, {**own, **common}, judge, outcome)
        drawn = {"n": n, **common}
        assert real is not None
        made = imagined.samples(target, drawn, real, reading, judge)
        if made is None:  # another process than the first
            return {}
        reading, alone = replace(reading, frames=made["frames"], size=made["size"]), Ranks(0, 1, pick_device(device))
        with precision_context(alone.device, "32"):
            return evaluate_sets(real, made["out"], drawn, reading, judge, outcome, alone)
    with launch(device, devices, num_nodes) as ranks, precision_context(ranks.device, precision):
        if mode == "reconstruction":
            assert vae is not None
            assert root is not None
            return evaluate_vae(vae, root, weights, precision, reading, judge, outcome, ranks)
        assert real is not None
        assert fake is not None
        if mode == "trees":
            return evaluate_trees(real, fake, unpaired, reading, judge, outcome, ranks)
        return evaluate_sets(real, fake, {}, reading, judge, outcome, ranks)


def mode_of(paired: bool, **given: str | None) -> Mode:
    """Tell what is evaluated by what is given."""
    names = frozenset(name for name, value in given.items() if value)
    modes: dict[frozenset[str], Mode] = {
        frozenset({"vae", "root"}): "reconstruction",
        frozenset({"real", "fake"}): "trees" if paired else "sets",
        frozenset({"ckpt", "real"}): "samples",
        frozenset({"ckpt", "input"}): "predictions",
    }
    if not paired and names != {"real", "fake"}:
        raise ConfigError("paired=false compares two folders: give real=DIR fake=DIR, and nothing else to compare")
    if names not in modes:
        kinds = "give vae=PATH data.root=DIR, or real=DIR fake=DIR, or ckpt=PATH with real=DIR or with input=PATH"
        raise ConfigError(f"{'these do not go together' if names else 'nothing to compare'}: {kinds}")
    return modes[names]


def evaluate_vae(
    vae: str,
    root: str,
    weights: Literal["ema", "raw"],
    precision: Precision,
    reading: Reading,
    judge: Judge,
    outcome: Outcome,
    ranks: Ranks,
) -> Row:
    """Measure the reconstructions of a VAE, in memory."""
    model = checkpoint.load(vae, weights=weights, device=ranks.device)
    identity = ranks.on_first(lambda: identify(vae, model))
    whole = reading.frames is None
    if not whole:
        check_clip(model, reading.frames or 1, reading.size)
    usable = ranks.on_first(lambda: reading.find(root))
    entries, share = usable.entries, slice(ranks.rank, None, ranks.world)
    suite, distances = judge.suite(ranks.device), judge.distances(reading.frames, ranks.device)
    if whole or reading.size is not None:  # else this VAE may leave out sizes that another one takes
        known_statistics(distances, root, entries, reading, ranks)
    pictures = Pictures(outcome.shown, len(entries))
    watchers: list[Watcher] = [pictures, *distances]

    def work() -> Scores:
        if not whole:
            loader = reading.load(root, entries, share, pin=ranks.device.type == "cuda")
            return score_vae(model, loader, suite, watchers)
        mine = dict(list(enumerate(entries))[share])
        resize = None if reading.size is None else make_resize(reading.size)
        return score_whole(model, root, mine, reading.stride, resize, suite, watchers)

    scores = Scores(rejected=[r.to_json() for r in usable.rejected], short=[] if whole else reading.stretched(entries))
    for part in ranks.on_all(work):
        scores.merge(part)
    values: Row = {}
    for distance in distances if scores.rows else ():
        values |= settle(distance, reading.batches(len(entries)), ranks)
    clips = pictures.gather(scores, ranks)
    protocol = {"vae": vae, **identity, "root": root, **reading.protocol(), "batch": reading.batch}
    protocol |= {"weights": weights, "precision": precision}
    protocol |= {"float32": FLOAT32}
    protocol |= {"latent": "posterior mean", "reconstruction": "clamped, not rounded", **judge.protocol()}
    protocol |= {distance.name: distance.protocol() for distance in distances}
    return ranks.on_first(lambda: finish("Reconstruction", vae, scores, values, protocol, clips, outcome))


def evaluate_trees(
    real: str,
    fake: str,
    unpaired: Literal["error", "skip"],
    reading: Reading,
    judge: Judge,
    outcome: Outcome,
    ranks: Ranks,
) -> Row:
    """Measure the videos of one tree against those of another one."""
    first = ranks.on_first(lambda: read_tree(real, reading.cache_dir))
    second = ranks.on_first(lambda: read_tree(fake, reading.cache_dir))
    pairs, problems = find_pairs(first, second)
    rejected: list[Row] = [problem.to_json() for problem in problems]
    ranks.on_first(lambda: check_pairs(pairs, problems, first, second, outcome.target, unpaired))
    pairs = spread(pairs, reading.limit)
    suite, distances = judge.suite(ranks.device), judge.distances(None, ranks.device)
    pictures = Pictures(outcome.shown, len(pairs))
    mine = dict(list(enumerate(pairs))[ranks.rank :: ranks.world])
    scores = Scores(rejected=rejected)
    for part in ranks.on_all(lambda: score_pairs(mine, suite, ranks.device, [pictures, *distances])):
        scores.merge(part)
    values: Row = {}
    for distance in distances if scores.rows else ():
        values |= settle(distance, [[place] for place in range(len(pairs))], ranks)
    clips = pictures.gather(scores, ranks)
    protocol: Row = {"real": real, "fake": fake, "frames": "all", "size": "as stored", "limit": reading.limit}
    protocol |= {"unpaired": unpaired, "float32": FLOAT32, **judge.protocol()}
    protocol |= {distance.name: distance.protocol() for distance in distances}
    return ranks.on_first(lambda: finish("Comparison", fake, scores, values, protocol, clips, outcome))


def evaluate_sets(
    real: str, fake: str, drawn: Row, reading: Reading, judge: Judge, outcome: Outcome, ranks: Ranks
) -> Row:
    """Measure how like two sets of videos are; `drawn` says how the second one was made, if here: it is read whole."""
    distances = judge.distances(reading.frames, ranks.device)
    made = replace(reading, stride=1, fps=None, where="start", limit=None) if drawn else reading
    readings = {real: reading, fake: made}
    values, rejected, entries = compare_sets(real, fake, reading, made, distances, outcome.target, ranks)
    protocol: Row = {"real": real, "fake": fake, **reading.protocol(), "batch": reading.batch}
    protocol |= {"float32": FLOAT32}
    protocol |= {"drawn": drawn, "read": "every sample, whole; real videos as said here"} if drawn else {}
    protocol |= {"features": RANDOM} if not distances else {}
    protocol |= {distance.name: distance.protocol() for distance in distances}

    def write() -> Row:
        clips = [
            clip
            for label, root in (("sample", fake), ("real", real))
            for clip in thumbnails(root, entries[root], readings[root], 2 * outcome.shown, label)
        ]
        title = f"Samples: {Path(drawn.get('ckpt', fake)).name}"
        short = [{"root": r, **row} for r, how in readings.items() for row in how.stretched(entries[r])]
        scores = Scores(rejected=rejected, short=short)
        result = outcome.write("samples", title, scores, values, protocol, clips, {})
        outcome.tell(result)
        return result

    return ranks.on_first(write)


def finish(what: str, of: str, scores: Scores, values: Row, protocol: Row, clips: list[Clip], outcome: Outcome) -> Row:
    """Write and print what was measured of pairs."""
    curves = mean_curves([scores.curves[place] for place in sorted(scores.curves)])
    result = outcome.write("reconstruction", f"{what}: {Path(of).name}", scores, values, protocol, clips, curves)
    outcome.tell(result)
    return result
