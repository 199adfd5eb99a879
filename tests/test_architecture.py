"""Who may import whom. A rule that is not a test is a wish."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*ROOT.glob("e2e/**/*.py"), *ROOT.glob("launch/*.py"), *ROOT.glob("tools/*.py")])

PARALLEL = {f"e2e/parallel/{name}.py" for name in ("ddp", "fsdp", "deepspeed")}
OWNERS = {
    "lmdb": {"e2e/data/store.py", "tools/bench_loader.py"},
    "openslide": {"e2e/wsi/slide.py"},
    "timm": {"e2e/encoders/timm.py", "e2e/encoders/foundation.py"},
    "torch.distributed": {*PARALLEL, "launch/torchrun.py"},
    "torch.nn.parallel": {"e2e/parallel/ddp.py"},
    "deepspeed": {"e2e/parallel/deepspeed.py"},
    "wandb": {"e2e/log.py"},
    "torch.utils.tensorboard": {"e2e/log.py"},
    "optuna": {"e2e/sweep.py"},
    "omegaconf": {"e2e/config.py"},
    "simplejpeg": {"e2e/data/decode.py", "tools/bench_loader.py"},
    "turbojpeg": {"e2e/data/decode.py", "tools/bench_loader.py"},
    "jpeg4py": {"e2e/data/decode.py"},
    "nvidia.dali": {"e2e/data/decode.py", "tools/bench_loader.py"},
    "distributed": {"e2e/data/cluster.py"},
}
"""Library -> the only files that may import it."""

PLUGINS = ("e2e.heads", "e2e.encoders", "e2e.tasks", "e2e.data")
LOOP = ("e2e.trainer", "e2e.evaluate", "e2e.heatmap", "e2e.build", "e2e.run")
FORBIDDEN = {
    "e2e/heads/": {*PLUGINS, *LOOP, "e2e.wsi", "e2e.model"} - {"e2e.heads"},
    "e2e/encoders/": {*PLUGINS, *LOOP, "e2e.wsi", "e2e.model"} - {"e2e.encoders"},
    "e2e/tasks/": {*PLUGINS, *LOOP, "e2e.wsi", "e2e.model"} - {"e2e.tasks"},
    "e2e/data/": {*PLUGINS, *LOOP, "e2e.model"} - {"e2e.data"},
    "e2e/wsi/": {*PLUGINS, *LOOP, "e2e.model"},
    "e2e/model.py": {"e2e.data", "e2e.tasks", "e2e.parallel", "e2e.wsi", *LOOP},
    "e2e/": {"launch", "tools", "tests"},
    "e2e/bag.py": {"e2e."},
    "e2e/registry.py": {"e2e.config", "e2e.bag", *PLUGINS, *LOOP},
    "e2e/config.py": {"e2e.bag", "e2e.model", *PLUGINS, *LOOP},
}
"""File or folder -> what it must never import."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def within(module: str, package: str) -> bool:
    return module == package.rstrip(".") or module.startswith(package.rstrip(".") + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_outside_libraries_have_one_owner(path):
    name = str(path.relative_to(ROOT))
    for library, owners in OWNERS.items():
        users = [module for module in imports(path) if within(module, library)]
        assert not users or name in owners, f"{name} imports {users}; only {owners} may"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_imports_what_lies_above_it(path):
    name = str(path.relative_to(ROOT))
    for place, forbidden in FORBIDDEN.items():
        if name == place or (place.endswith("/") and name.startswith(place)):
            wrong = [m for m in imports(path) for f in forbidden if within(m, f)]
            assert not wrong, f"{name} imports {wrong}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_fit_on_a_screen_and_catch_what_they_name(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 70, f"{path.name}: {node.name} has {lines} lines"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno} catches everything"


def test_plugin_names_are_compared_nowhere_but_in_their_own_files():
    """No ``if name == "abmilx"`` outside the file that registers it."""
    import e2e.build as build

    names = {name for registry in build.REGISTRIES.values() for name in registry.names()}
    for path in FILES:
        tree = ast.parse(path.read_text())
        registered = {
            argument.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "register"
            for argument in node.args
            if isinstance(argument, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                strange = {w for w in words if isinstance(w, str)} & (names - registered)
                strange -= {"mean", "max", "none", "features"}  # also plain words
                assert not strange, f"{path.name}:{node.lineno} compares with {strange}"


def test_every_package_is_installed():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in ROOT.glob("e2e/**/*.py")}
    assert {name for name in told if within(name, "e2e")} == {
        ".".join(folder.relative_to(ROOT).parts) for folder in folders
    }
