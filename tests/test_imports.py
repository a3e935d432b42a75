"""The import rules: modules import lower layers only, and heavy libraries only where they belong."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "praxino"

# what each part may import of praxino; `errors` is open to all, and every part may import itself
ALLOWED = {
    "errors": set(),
    "_torchvision": set(),
    "__init__": set(),
    "ops": set(),
    "diffusion": set(),
    "models": {"ops"},
    "losses": {"ops"},
    "metrics": {"ops"},
    "video": set(),
    "tiling": {"ops", "models"},
    "stream": {"ops", "models", "tiling"},
    "data": {"video"},
    "lit": {"ops", "models", "diffusion", "losses", "metrics", "video", "stream"},
    "shards": set(),
    "callbacks": {"ops", "models", "losses", "metrics", "video", "data", "lit", "stream", "shards"},
    "config": set(),
    "archive": {"shards"},
    "official": {"ops", "models", "archive"},
    "checkpoint": {"ops", "models", "stream", "shards", "diffusion", "archive", "official"},
    "convert": {"ops", "models"},
    "tasks": {
        "ops",
        "models",
        "losses",
        "metrics",
        "video",
        "stream",
        "tiling",
        "data",
        "lit",
        "callbacks",
        "config",
        "checkpoint",
        "convert",
        "official",
        "diffusion",
        "shards",
    },
    "cli": {"tasks", "config"},
}
# where these libraries may be imported
LIBRARIES = {
    "av": {"video"},
    "lightning": {"data/base", "lit", "callbacks", "tasks"},
    "hydra": {"config", "tasks", "cli"},
    "omegaconf": {"config", "tasks", "cli"},
    "wandb": {"callbacks/media"},
    "lpips": {"losses/perceptual", "metrics"},
    "matplotlib": {"tasks/figure", "tasks/evaluation/pareto"},
    "transformers": {"tasks/embed_text"},
    "torchmetrics": {"losses/perceptual", "metrics", "lit"},
}
# parts that neither log nor touch files, and lit, which leaves files to the callbacks
PURE = {
    part: {"logging", "os", "io", "pathlib", "json", "tempfile"}
    for part in ("ops", "models", "diffusion", "losses", "metrics")
}
PURE["lit"] = {"os", "io", "pathlib", "json", "tempfile"}
MODULES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every dotted name that the file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import, line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_downward(path: Path) -> None:
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    part = name.split("/")[0]
    assert part in ALLOWED, f"{part} is not a part of the architecture: add it to ALLOWED and to docs/architecture.md"
    for imported in imports(path):
        top, *rest = imported.split(".")
        assert top not in PURE.get(part, ()), f"{name} may not import {top}"
        if top == "praxino" and rest:
            assert rest[0] in ALLOWED[part] | {part, "errors", "__version__"}, f"{name} may not import {imported}"
        if top in LIBRARIES:
            assert any(name == place or name.startswith(f"{place}/") for place in LIBRARIES[top]), (
                f"{name} may not import {top}"
            )


def test_cli_needs_no_torch() -> None:
    top_level = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.parse((ROOT / "cli.py").read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not {name for name in top_level if name and name.split(".")[0] in {"torch", "lightning"}}
