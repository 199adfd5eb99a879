"""What is installed: packages, configuration files, dependencies, the command."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import e2e
from e2e.settings.configs import config_folder, config_names, find_config
from tests.helpers.paths import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = {
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "jpeg4py": "jpeg4py",
    "nvidia": "nvidia-dali-cuda130",
    "openslide": "openslide-python",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "sksurv": "scikit-survival",
    "turbojpeg": "PyTurboJPEG",
    "yaml": "PyYAML",
}
"""Module -> distribution, where the names differ."""


def requirements(group: str | None = None) -> dict[str, Requirement]:
    """The dependencies, or those of an extra, by name."""
    texts = PROJECT["project"]["dependencies"]
    if group is not None:
        texts = PROJECT["project"]["optional-dependencies"][group]
    return {requirement.name: requirement for requirement in map(Requirement, texts)}


def test_every_package_and_configuration_file_is_listed():
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("e2e/**/__init__.py")
    }
    files = [path for path in ROOT.glob("configs/**/*") if path.is_file()]
    folders = {".".join(("e2e", *path.parent.relative_to(ROOT).parts)) for path in files}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages | folders
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for path in files:
        package = ".".join(("e2e", *path.parent.relative_to(ROOT).parts))
        assert any(fnmatch(path.name, pattern) for pattern in patterns[package]), path


def module_imports(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Top-level names of the modules imported at import time, and of all."""
    everywhere, late = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            late |= {id(child) for child in ast.walk(node)}
    early = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            everywhere.add(name.split(".")[0])
            if id(node) not in late:
                early.add(name.split(".")[0])
    return early, everywhere


def test_what_is_imported_is_a_dependency_and_extras_are_imported_where_used():
    core = set(requirements())
    extras = {
        name
        for group in PROJECT["project"]["optional-dependencies"]
        for name in requirements(group)
    }
    for path in ROOT.glob("e2e/**/*.py"):
        early, everywhere = module_imports(ast.parse(path.read_text()))
        for name in everywhere - set(sys.stdlib_module_names) - {"e2e", "torchcodec"}:
            distribution = MODULES.get(name, name)
            assert distribution in core | extras, f"{path.name} imports {name}"
            assert name not in early or distribution in core, (
                f"{path.name} imports {name} at the top"
            )


def test_the_pinned_set_is_within_the_ranges_and_has_every_extra():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {
        requirement.name: str(requirement.specifier).removeprefix("==")
        for requirement in (Requirement(line) for line in lines if line and line[0] != "#")
    }
    groups = [None, *PROJECT["project"]["optional-dependencies"]]
    for requirement in (r for group in groups for r in requirements(group).values()):
        assert requirement.specifier or requirement.extras, f"{requirement} has no range"
        if requirement.name in ("e2e-mil", "huggingface-hub", "PyYAML"):
            continue  # itself; and what others of the pinned set bring along
        assert pinned[requirement.name] in requirement.specifier, requirement
    assert pinned.keys() <= {name for group in groups for name in requirements(group)}


def test_the_version_has_one_place():
    assert str(Version(e2e.__version__)) == e2e.__version__
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "e2e.__version__"}
    assert "version" not in PROJECT["project"]


def test_the_citation_file_has_what_it_needs():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["project"]["license"]
    assert "version" not in citation  # e2e/__init__.py has it


def test_the_configuration_files_are_those_of_the_checkout(tmp_path, monkeypatch):
    assert config_folder() == ROOT / "configs"
    assert "panda" in config_names("datasets")
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/demo.yaml") == ROOT / "configs" / "demo.yaml"
    assert find_config("mine.yaml") == Path("mine.yaml")
    own = tmp_path / "configs" / "demo.yaml"
    own.parent.mkdir()
    own.touch()
    assert find_config("configs/demo.yaml") == Path("configs/demo.yaml")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: setuptools leaves a folder build/ behind, and would reuse it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("e2e", "configs", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", ROOT / name, source / name], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, source], check=True)
    [path] = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_one_package_one_command_and_every_configuration_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [entry_points] = (name for name in names if name.endswith("entry_points.txt"))
        lines = archive.read(entry_points).decode().split("\n")
    assert [line for line in lines if line] == ["[console_scripts]", "e2e = e2e.cli:main"]
    assert {name.split("/")[0] for name in names} == {"e2e", entry_points.split("/")[0]}
    configs = {
        f"e2e/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/**/*") if path.is_file()
    }
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("e2e/**/*.py")}
    assert configs | modules | {"e2e/py.typed"} <= names


@pytest.mark.slow
def test_the_wheel_works_alone_from_another_folder(wheel, tmp_path):
    """The dependencies are those of this interpreter; e2e itself comes from the wheel."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    [site_packages] = environment.glob("lib/*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    # Without PYTHONPATH, where pip would find this very project and install nothing.
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([*pip, wheel], cwd=tmp_path, env=variables, check=True)
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site_packages / "dependencies.pth").write_text(f"{here}\n")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        return subprocess.run(
            [str(environment / "bin" / "e2e"), *words],
            cwd=tmp_path, env=variables, capture_output=True, text=True, check=False,
        )  # fmt: skip

    model = ["train", "--datasets", "panda", "--model", "e2e_r18_abmilx"]
    done = run(*model, "--print-config")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["names"] == {"datasets": "panda", "model": "e2e_r18_abmilx"}
    recipe = ["train", "--datasets", "panda", "--model", "configs/recipes/abmilx_r18_panda.yaml"]
    assert run(*recipe, "-c", "configs/demo.yaml", "--print-config").returncode == 0
    done = run(*model)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert run("--version").stdout == f"e2e {e2e.__version__}\n"
    assert not (environment / "bin" / "torchrun").exists()
