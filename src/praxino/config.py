"""The configuration: where it lies, its resolvers, and the checks that turn a typing error into one clear message."""

import difflib
import inspect
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from praxino.errors import ConfigError, PraxinoError

# What a `_target_` may name besides praxino's own classes and functions; Hydra only keeps a list of what it refuses.
ALLOWED_TARGETS = frozenset(
    [
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.DeviceStatsMonitor",
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning.pytorch.callbacks.Timer",
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.loggers.TensorBoardLogger",
        "lightning.pytorch.loggers.WandbLogger",
        "lightning.pytorch.profilers.AdvancedProfiler",
        "lightning.pytorch.profilers.PyTorchProfiler",
        "lightning.pytorch.profilers.SimpleProfiler",
        "lightning.pytorch.strategies.DDPStrategy",
        *(f"torch.optim.{name}" for name in ("Adafactor", "Adam", "AdamW", "Muon", "NAdam", "RAdam", "RMSprop", "SGD")),
    ]
)
RANK_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)


def conf_dir() -> str:
    """Return the folder of the YAML files: in the installed package, or the repository's own of an editable install."""
    package = Path(__file__).resolve().parent
    return str(package / "conf" if (package / "conf").is_dir() else package.parents[1] / "conf")


def run_id() -> str:
    """Return the name of this run: UTC time and six random digits, the same in every process that takes part in it."""
    if known := os.environ.get("PRAXINO_RUN_ID"):
        return known
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S', time.gmtime())}_{secrets.token_hex(3)}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        name = agreed("run_id", name)
    elif int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        name = f"slurm-{os.environ['SLURM_JOB_ID']}"
    os.environ["PRAXINO_RUN_ID"] = name
    return name


def agreed(what: str, value: str) -> str:
    """Return the value of the first of torchrun's processes that asked, through the store of its agent."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    key = f"praxino/{what}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    return store.compare_set(key, "", value).decode()


@contextmanager
def single_job(out: str) -> Iterator[None]:
    """Let the ranks that a job of a sweep launches run this job alone; leave nothing of it to the next job.

    Lightning starts a rank with this process's own command line, and describes the group of ranks in the environment.
    """
    command, ranks = sys.argv, {name: os.environ.get(name) for name in RANK_VARIABLES}
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        settings = [text for text in HydraConfig.get().overrides.task if text.partition("=")[0] != "out"]
        quoted = out.replace("\\", "\\\\").replace("'", "\\'")
        sys.argv = [command[0], *settings, f"out='{quoted}'"]
    try:
        yield
    finally:
        sys.argv = command
        for name, value in ranks.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def native_bf16(yes: str, no: str) -> str:
    """Choose by whether the CPU multiplies in bf16; where it does not, bf16 is emulated and slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="ignore")
    except OSError:
        return no
    return yes if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) else no


def register_resolvers() -> None:
    """Make `${run_id:}` and `${native_bf16:YES,NO}` known to OmegaConf."""
    OmegaConf.register_new_resolver("run_id", run_id, replace=True)
    OmegaConf.register_new_resolver("native_bf16", native_bf16, replace=True)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the closest valid names, or their list where none is close."""
    options = sorted(valid)
    close = difflib.get_close_matches(name, options, n=2, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; one of: {', '.join(options)}" if 0 < len(options) <= 24 else ""


# ---------------------------------------------------------------------------------------------------- checks
def check(cfg: DictConfig) -> None:
    """Compare everything under every `_target_` with the signature it configures, before anything is built.

    Raises:
        ConfigError: all problems, one a line (at most three lines), each with its YAML path and the nearest valid key.
    """
    report([*unresolved(cfg), *target_errors(cfg)])


def check_call(function: Callable[..., Any], cfg: DictConfig) -> dict[str, Any]:
    """Compare a configuration with the signature of the function that takes its keys; return them resolved."""
    report([*unresolved(cfg), *signature_errors(function, cfg, "", partial=False)])
    return plain(cfg)


def report(problems: list[str]) -> None:
    """Raise one ConfigError of at most three lines, if there are problems."""
    problems = list(dict.fromkeys(problems))
    if len(problems) > 3:
        problems = [
            *problems[:2],
            f"and {len(problems) - 2} more: {', '.join(p.split(':')[0] for p in problems[2:10])}",
        ]
    if problems:
        raise ConfigError("\n".join(problems))


def unresolved(cfg: DictConfig) -> Iterator[str]:
    """Find the mandatory values that are missing and the interpolations that lead nowhere."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        yield from (f"{key}: a value is required, e.g. {key}=PATH" for key in missing)
        if not missing:
            OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        yield f"{error.full_key}: {str(error).splitlines()[0]}"


def target_errors(node: Any, path: str = "") -> Iterator[str]:
    """Walk the tree; yield what is wrong with every `_target_` and its arguments."""
    if isinstance(node, DictConfig):
        if (target := node.get("_target_")) is not None:
            try:
                function = locate(str(target))
            except ConfigError as error:
                yield f"{dotted(path, '_target_')}: {error}"
                return
            yield from signature_errors(function, node, path, partial=bool(node.get("_partial_", False)))
        for key in node:
            if not OmegaConf.is_missing(node, key):
                yield from target_errors(node[key], dotted(path, str(key)))
    elif isinstance(node, ListConfig):
        for index, item in enumerate(node):
            yield from target_errors(item, f"{path}[{index}]")


def signature_errors(function: Callable[..., Any], node: DictConfig, path: str, partial: bool) -> Iterator[str]:
    """Yield unknown keys, missing arguments and values of the wrong type."""
    parameters = {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    keys = [str(key) for key in node if str(key) not in ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")]
    hints = type_hints(function)
    for key in keys:
        where = dotted(path, key)
        if key not in named:
            if not open_ended:
                yield f"{where}: unknown key{nearest(key, named)}"
        elif not OmegaConf.is_missing(node, key) and not contains_target(node[key]):
            problem = type_error(hints.get(key, Any), plain(node[key]))
            if problem:
                yield f"{source(node, key, where)}: {problem}"
    if not partial:
        for name, parameter in named.items():
            if parameter.default is parameter.empty and name not in keys:
                yield f"{dotted(path, name)}: a value is required"


def type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function, or of a class's constructor; none where they cannot be evaluated."""
    try:
        return get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def type_error(hint: Any, value: Any) -> str | None:
    """Return why a plain value does not fit an annotation, or None where it does."""
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
    from pydantic.errors import PydanticSchemaGenerationError

    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # the hint is a pydantic or dataclass type with a config of its own
        adapter = TypeAdapter(hint)
    except PydanticSchemaGenerationError:
        return None
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        reasons = dict.fromkeys(
            e["msg"][0].lower() + e["msg"][1:] for e in error.errors() if e["type"] != "is_instance_of"
        )
        return f"{value!r}: {' or '.join(list(reasons)[:3]) or 'wrong type'}"
    if isinstance(value, bool) and hint in (int, float, int | None, float | None):
        return f"{value!r}: input should be a number"
    return None


def contains_target(node: Any) -> bool:
    """Tell whether something under this node is an object still to be built."""
    if isinstance(node, DictConfig):
        return "_target_" in node or any(contains_target(node[key]) for key in node)
    return isinstance(node, ListConfig) and any(contains_target(item) for item in node)


def source(node: DictConfig, key: str, where: str) -> str:
    """Follow a plain interpolation such as `${frames}` to the key that the user typed."""
    raw = OmegaConf.to_container(node, resolve=False)[key]  # type: ignore[index,call-overload]
    match = re.fullmatch(r"\$\{([\w.]+)\}", raw) if isinstance(raw, str) else None
    return match[1] if match and not match[1].startswith(".") else where


def dotted(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


@cache
def locate(target: str) -> Callable[..., Any]:
    """Import what a `_target_` names.

    Only praxino's own classes and functions and `ALLOWED_TARGETS` are admitted, so that a configuration from a stranger
    runs no code of its choice. What was found is checked again: `praxino.video.os.system` is not praxino's.
    """
    if target not in ALLOWED_TARGETS and not target.startswith("praxino."):
        raise ConfigError(f"{target} is not allowed{nearest(target, ALLOWED_TARGETS)}")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{target} cannot be imported: {error}") from error
    except AttributeError as error:
        raise ConfigError(f"{target} does not exist{nearest(name, dir(import_module(module)))}") from error
    owner = getattr(found, "__module__", "")
    if not callable(found) or (target not in ALLOWED_TARGETS and not owner.startswith("praxino.")):
        raise ConfigError(f"{target} is not a class or function of praxino")
    return found


# ------------------------------------------------------------------------------------------------ building
def instantiate(cfg: DictConfig | None, **extra: Any) -> Any:
    """Build a checked configuration with Hydra; containers reach the constructors as plain Python.

    Raises:
        ConfigError: a constructor refused its arguments.
    """
    try:
        return hydra_instantiate(cfg, _convert_="all", **extra) if cfg is not None else None
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, PraxinoError):
            raise cause from None
        if isinstance(cause, ValueError) or type(cause).__name__ == "MisconfigurationException":  # Lightning's own
            raise ConfigError(f"{target_of(cfg)}: {str(cause).splitlines()[0]}") from cause
        raise


def target_of(cfg: Any) -> str:
    """Name what a configuration builds, for a message."""
    return str(cfg.get("_target_", "config")).rpartition(".")[2]


def plain(cfg: Any) -> Any:
    """Return a resolved tree of plain dicts, lists, strings and numbers."""
    return OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig | ListConfig) else cfg


def redacted(tree: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Return the tree without secrets: what stands under telling keys, and texts that hold a secret of the environment.

    A text `key=value`, an override of the command line, counts as a key and its value.
    """
    environment = os.environ if environment is None else environment
    hidden = {value for key, value in environment.items() if SECRET.search(key) and len(value) >= 8}
    if isinstance(tree, dict):
        return {
            key: "***" if isinstance(value, str) and SECRET.search(str(key)) else redacted(value, environment)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [redacted(value, environment) for value in tree]
    if not isinstance(tree, str):
        return tree
    key, equals, _ = tree.partition("=")
    if equals and SECRET.search(key.rpartition(".")[2]):
        return f"{key}=***"
    return "***" if any(secret in tree for secret in hidden) else tree
