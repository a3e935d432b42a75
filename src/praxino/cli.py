"""The command line: one Hydra entry point a task. Nothing heavy is imported before the configuration stands."""

import logging
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from praxino.config import conf_dir, nearest, register_resolvers, report, single_job, unresolved
from praxino.errors import ConfigError, PraxinoError

# keys that name something which must exist before a task begins
PATHS = {
    "train": ("data.root", "data.val_root", "weights", "data.text"),
    "evaluate": ("vae", "data.root", "real", "fake", "ckpt", "input"),
    "benchmark": ("vaes", "data.root"),
    "reconstruct": ("vae", "input"),
    "encode": ("vae", "data.root"),
    "sample": ("ckpt", "vae", "text"),
    "predict": ("ckpt", "input", "vae", "text"),
    "make_data": (),
    "convert": ("vae", "encoder", "decoder", "config"),
    "plot": ("run",),
    "make_video": ("input",),
    "import_config": ("input",),
    "params": (),
    "embed_text": ("captions", "encoder", "videos"),
    "doctor": ("vae", "data.root"),
    "pipeline": ("data.root", "data.val_root"),
}
FIRST = {"import_config": "input"}  # the key of a bare first word on the command line


def command(name: str) -> Callable[[], None]:
    """Make the entry point of `praxino.tasks.<name>`, configured by `conf/<name>.yaml`."""

    def main() -> None:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over, and this module words them
        # Threads of OpenMP that spin while they wait take the cores from the workers: many times slower on few cores
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        register_resolvers()
        errors.clear()
        running.clear()
        try:
            name_first(FIRST.get(name))
            check_flags()
            compose = hydra.main(version_base="1.3", config_path=conf_dir(), config_name=name)
            try:
                compose(job)()
            except (HydraException, OmegaConfBaseException, ValueError, RuntimeError) as error:
                known = not isinstance(error, RuntimeError) or "srun" in str(error)  # the latter is submitit's
                if running or not known:  # not about the composition: a defect, with its traceback
                    raise
                errors.append(ConfigError(explain(error, name)))
        except PraxinoError as error:
            errors.append(error)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        if errors:
            fail(str(errors[0]), errors[0].exit_code)

    errors: list[PraxinoError] = []
    running: list[bool] = []

    def job(cfg: DictConfig) -> Any:
        """Check and run. An expected error is kept for `main`, for Hydra would print its own lines around it."""
        try:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                with open_dict(cfg):
                    cfg.out = HydraConfig.get().runtime.output_dir
            if name == "train" and "gate" in cfg:
                raise ConfigError("this experiment is a chain of commands: run it with praxino-pipeline")
            report(list(unresolved(cfg)))
            report([problem for key in must_exist(name, cfg) if (problem := missing_path(key, cfg))])
            logging.captureWarnings(True)
            running.append(True)
            with single_job(cfg.out):
                return import_module(f"praxino.tasks.{name}").run(cfg)
        except PraxinoError as error:
            errors.append(error)
            return None

    main.__name__ = main.__qualname__ = job.__name__ = name
    main.__doc__ = f"Run the task `{name}`."
    return main


def fail(message: str, code: int) -> NoReturn:
    """Print an expected error, at most three lines, and leave with its exit code."""
    rank = os.environ.get("LOCAL_RANK", "0")
    lines = [line for line in message.strip().splitlines() if line.strip()][:3]
    lines[0] = f"error: {lines[0]}" if rank == "0" else f"error (rank {rank}): {lines[0]}"
    sys.stdout.flush()
    sys.stderr.write("\n".join(line.encode("ascii", "backslashreplace").decode() for line in lines) + "\n")
    sys.exit(code)


def check_flags() -> None:
    """Refuse unknown `--flags` in one line, where argparse prints a screenful; put settings before the known ones."""
    parser = get_args_parser()

    def error(message: str) -> NoReturn:
        hint = message.rpartition(": ")[2].split(" ")[0].lstrip("-").partition("=")[0] or "key"
        raise ConfigError(f"{message}; settings are written without dashes, {hint}=...; --help shows the most used")

    parser.error = error  # type: ignore[method-assign]
    settings = parser.parse_intermixed_args().overrides
    flags = [word for word in sys.argv[1:] if word not in settings]
    sys.argv[1:] = [*settings, *flags]


def name_first(key: str | None) -> None:
    """Let `FILE key=value` be written for `key=FILE key=value`, where a task has such a key."""
    if key and len(sys.argv) > 1 and not sys.argv[1].startswith("-") and "=" not in sys.argv[1]:
        quoted = sys.argv[1].replace("\\", "\\\\").replace("'", "\\'")
        sys.argv[1] = f"{key}='{quoted}'"


def must_exist(name: str, cfg: DictConfig) -> list[str]:
    """Return the keys of a task that name something to be read; synthetic data is made where it is missing."""
    made = str(OmegaConf.select(cfg, "data._target_")).endswith("SyntheticData")
    return [key for key in PATHS[name] if not (made and key == "data.root")]


def missing_path(key: str, cfg: DictConfig) -> str | None:
    """Return what is wrong with a path that has to exist."""
    value = OmegaConf.select(cfg, key)
    if value is None:
        return None
    if OmegaConf.is_list(value) and all(isinstance(item, str) for item in value):
        return next((problem for item in value if (problem := missing(key, item))), None)
    return missing(key, value)


def missing(key: str, value: Any) -> str | None:
    """Return what is wrong with one path."""
    if not isinstance(value, str):
        return f"{key}: {value!r} is not a path"
    path = Path(value).expanduser()
    if path.exists():
        return None
    try:
        siblings = [str(entry) for entry in path.parent.iterdir()]
    except OSError:
        siblings = []
    hint = nearest(str(path), siblings)
    return f"{key}: {value} does not exist{hint if 'did you mean' in hint else ''}"


# -------------------------------------------------------------------------------- what Hydra's errors mean
def explain(error: Exception, name: str) -> str:
    """Word an error of Hydra or OmegaConf: what is wrong, and the nearest valid key."""
    cause = error.__cause__ or error.__context__
    text = str(error).strip()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        if choice == "submitit_slurm":
            return "launcher=slurm needs a plugin of Hydra: pip install 'praxino[slurm]'"
        return f"{group or 'config'}={choice}: no such choice{nearest(choice, error.options or [])}"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: cannot be read as key=value\n"
            "values with , = : ( ) [ ] { } or blanks need quotes within quotes, e.g. 'input=\"a, b.mp4\"'"
        )
    if isinstance(error, ConfigCompositionException) and "Could not override" in text:
        key = text.split("'")[1]
        if "No match in the defaults list" in text:
            return f"{key}: no such group{nearest(key, groups())}"
        full = getattr(cause, "full_key", None) or key
        return f"{full}: unknown key{nearest_key(full, name)}"
    if "Config group override must be" in text:
        empty = [group for group in groups() if f"{group}=null" in sys.argv]
        return f"{empty[0] if empty else 'a group'}=null: a group takes the name of a choice; '~GROUP' leaves it out"
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    return "\n".join(text.splitlines()[:3])


def nearest_key(key: str, name: str) -> str:
    """Suggest the key of the task's own configuration that is closest to a mistyped one."""
    from hydra import compose, initialize_config_dir

    choices = [a for a in sys.argv[1:] if a.partition("=")[0] in groups()]
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        cfg = compose(name, overrides=choices)
    keys = list(flatten(cfg))
    parent, _, leaf = key.rpartition(".")
    siblings = [k for k in keys if k.rpartition(".")[0] == parent]
    by_leaf = nearest(leaf, {k.rpartition(".")[2] for k in siblings})
    if by_leaf.startswith("; did you mean") or not parent:
        found = by_leaf if by_leaf.startswith("; did you mean") else nearest(key, keys)
        return found.replace("mean ", f"mean {parent}.") if parent and found == by_leaf else found
    found = nearest(key, keys)
    return found if found.startswith("; did you mean") else by_leaf


def flatten(cfg: Any, path: str = "") -> list[str]:
    """List every dotted key of a configuration."""
    keys: list[str] = []
    for key in cfg:
        where = f"{path}.{key}" if path else str(key)
        keys.append(where)
        if not OmegaConf.is_missing(cfg, key) and OmegaConf.is_dict(cfg._get_node(key)):
            keys += flatten(cfg._get_node(key), where)
    return keys


def groups() -> list[str]:
    """List the config groups, such as `model` and `model/net`."""
    root = Path(conf_dir())
    return sorted({str(path.parent.relative_to(root)) for path in root.rglob("*.yaml") if path.parent != root})


train = command("train")
evaluate = command("evaluate")
benchmark = command("benchmark")
reconstruct = command("reconstruct")
encode = command("encode")
sample = command("sample")
predict = command("predict")
make_data = command("make_data")
convert = command("convert")
plot = command("plot")
make_video = command("make_video")
import_config = command("import_config")
params = command("params")
embed_text = command("embed_text")
doctor = command("doctor")
pipeline = command("pipeline")
