"""Who may import whom. A rule that is not a test is a wish."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from e2e.runs.parts import REGISTRIES
from tests.helpers.paths import ROOT

FILES = sorted([*ROOT.glob("e2e/**/*.py"), *ROOT.glob("launch/*.py"), *ROOT.glob("tools/**/*.py")])

PACKAGE = [path for path in FILES if path.is_relative_to(ROOT / "e2e")]
VAGUE_NAMES = frozenset(
    [
        "found",
        "told",
        "said",
        "there",
        "ours",
        "own",
        "whole",
        "known",
        "made",
        "kept",
        "given",
        "worth",
        "places",
        "wanted",
        "chosen",
        "seen",
        "took",
        "asked",
        "judged",
        "look",
        "sight",
        "theirs",
        "everyone",
        "strange",
        "torn",
        "lacking",
    ]
)
"""Names of local variables that say nothing about what they hold."""

PARALLEL = {f"e2e/parallel/{name}.py" for name in ("ddp", "fsdp", "deepspeed")}
OWNERS = {
    "lmdb": {
        "e2e/store/lmdb.py",
        "e2e/store/snapshot.py",
        "tools/bench/patches.py",
        "tools/bench/pixels.py",
        "tools/bench/stream.py",
    },
    "openslide": {"e2e/wsi/slide.py"},
    "timm": {"e2e/encoders/timm.py", "e2e/encoders/foundation.py"},
    "torch.distributed": {*PARALLEL, "e2e/parallel/launcher.py"},
    "torch.nn.parallel": {"e2e/parallel/ddp.py"},
    "deepspeed": {"e2e/parallel/deepspeed.py"},
    "wandb": {"e2e/log.py"},
    "torch.utils.tensorboard": {"e2e/log.py"},
    "optuna": {"e2e/runs/sweep.py"},
    "omegaconf": {"e2e/settings/layers.py"},
    "simplejpeg": {"e2e/images/decode.py", "tools/bench/pixels.py"},
    "turbojpeg": {"e2e/images/decode.py", "tools/bench/pixels.py"},
    "jpeg4py": {"e2e/images/decode.py"},
    "nvidia.dali": {"e2e/images/decode.py", "tools/bench/pixels.py"},
    "distributed": {"e2e/store/cluster.py"},
}
"""Library -> the only files that may import it."""

GROUND = ("errors", "signals", "registry", "files", "seeds", "memory", "sizes", "slides", "log")
LAYERS = (
    GROUND,
    ("wsi", "parallel", "toy"),
    ("metrics", "images", "encoders", "heads", "settings"),
    ("losses",),
    ("tasks", "store"),
    ("features",),
    ("bags",),
    ("cohort", "engine"),
    ("training",),
    ("reports",),
    ("runs",),
    ("api", "cli"),
    ("__main__",),
)
"""Packages and modules of ``e2e`` from the ground up: each imports only from layers below its own."""


@cache
def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Every node of the file's syntax tree; each file is parsed once for all tests."""
    return tuple(ast.walk(syntax_tree(path)))


@cache
def imports(path: Path) -> frozenset[str]:
    modules = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(modules)


def within(module: str, package: str) -> bool:
    return module == package.rstrip(".") or module.startswith(package.rstrip(".") + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_outside_libraries_have_one_owner(path):
    name = str(path.relative_to(ROOT))
    for library, owners in OWNERS.items():
        users = [module for module in imports(path) if within(module, library)]
        assert not users or name in owners, f"{name} imports {users}; only {owners} may"


def level(module: str) -> int | None:
    """The layer of a module of ``e2e``; what stands above all of them has none."""
    noun = module.split(".")[1] if module.startswith("e2e.") else ""
    return next((number for number, layer in enumerate(LAYERS) if noun in layer), None)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    module = module_of(path)
    own = level(module)
    for used in sorted(imports(path)):
        assert not within(used, "tests"), f"{module} imports {used}"
        if module.startswith("e2e."):
            assert used.split(".")[0] not in ("launch", "tools"), f"{module} imports {used}"
        if own is None or not used.startswith("e2e."):
            continue
        same_package = own > 0 and used.split(".")[1] == module.split(".")[1]
        assert same_package or own == 0 == level(used) or (level(used) or 0) < own, (
            f"{module} imports {used}, which is not below it"
        )


def test_every_package_has_a_layer():
    nouns = {
        path.relative_to(ROOT / "e2e").parts[0].removesuffix(".py")
        for path in FILES
        if path.parts[len(ROOT.parts)] == "e2e"
    }
    assert nouns - {"__init__"} == {noun for layer in LAYERS for noun in layer}


def test_no_imports_go_in_circles():
    """Over all modules, tools included."""
    modules = {module_of(path): path for path in FILES}
    edges = {
        name: {u for u in imports(path) if u in modules and u != name}
        for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for used in sorted(edges[name]):
                visit(used, (*trail, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_no_test_file_imports_another():
    """What test files share lies in tests/helpers (and fixtures of many in tests/conftest.py)."""
    for path in sorted(ROOT.glob("tests/**/*.py")):
        modules = {module for module in imports(path) if within(module, "tests")}
        shared = ("tests.helpers", "tests.golden.recipes")
        others = [m for m in modules if not any(within(m, package) for package in shared)]
        assert not others, f"{path.relative_to(ROOT)} imports {others}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(syntax_tree(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_fit_on_a_screen_and_catch_what_they_name(path):
    for node in nodes(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 60, f"{path.name}: {node.name} has {lines} lines"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno} catches everything"


def test_plugin_names_are_compared_nowhere_but_in_their_own_files():
    """No ``if name == "abmilx"`` outside the file that registers it."""

    names = {name for registry in REGISTRIES.values() for name in registry.names()}
    for path in FILES:
        registered = {
            argument.value
            for node in nodes(path)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "register"
            for argument in node.args
            if isinstance(argument, ast.Constant)
        }
        for node in nodes(path):
            if isinstance(node, ast.Compare):
                words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                strange = {w for w in words if isinstance(w, str)} & (names - registered)
                strange -= {"mean", "max", "none", "features"}  # also plain words
                assert not strange, f"{path.name}:{node.lineno} compares with {strange}"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_of_the_package_is_over_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_say_what_they_hold(path):
    """No variable, parameter or attribute has a name that could be anything."""
    names = [
        (node.lineno, name)
        for node in nodes(path)
        for name in [
            node.id
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            else node.arg
            if isinstance(node, ast.arg)
            else node.attr
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            else ""
        ]
        if isinstance(node, (ast.Name, ast.arg, ast.Attribute))
    ]
    assert not [f"line {line}: {name}" for line, name in names if name in VAGUE_NAMES]


def test_a_private_name_has_one_job():
    """No private function or class of the package is defined in several files."""
    files: dict[str, list[str]] = {}
    for path in PACKAGE:
        for node in syntax_tree(path).body:
            is_definition = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            if is_definition and node.name.startswith("_") and not node.name.startswith("__"):
                files.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in files.items() if len(paths) > 1} == {}


def test_settings_are_read_by_runs_alone():
    """Everything below the runs takes the values that it uses."""
    for path in PACKAGE:
        module = module_of(path)
        top = module.split(".")[1] if "." in module else ""
        if top not in ("runs", "settings", "api", "cli", "__main__"):
            users = [used for used in imports(path) if within(used, "e2e.settings")]
            assert not users, f"{module} imports {users}"
