"""The commands of README and quickstart run; those of the other pages have options that exist."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import e2e
from e2e import cli
from e2e.runs.parts import REGISTRIES
from e2e.settings.layers import load_settings
from tests.helpers.fences import PAGES, README, ROOT, commands, fences, python_command

QUICKSTART = ROOT / "docs/quickstart.md"
WITH_SETTINGS = ("check", "train", "crossval")


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(
        python_command(words),
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"$ {shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


def quick_settings() -> list[str]:
    [text] = [fence.text for fence in fences(QUICKSTART, "text") if fence.title == "quick settings"]
    return text.split()


def with_quick_settings(words: list[str]) -> list[str]:
    """A command with the quick settings appended, as the quickstart page says."""
    verb = words[1]
    if verb == "extract":
        return [*words, *(word for word in quick_settings() if word.startswith("encoder."))]
    if verb not in WITH_SETTINGS:
        return words
    settings = quick_settings()
    if any(word.startswith("data.features=") for word in words):
        settings = [word for word in settings if not word.startswith(("encoder.", "bag.size="))]
    return [*words, *settings]


def mine_yaml(page: Path) -> str:
    [text] = [fence.text for fence in fences(page, "yaml") if fence.title == "mine.yaml"]
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with slides, a label table with the quickstart's columns, and mine.yaml."""
    folder = tmp_path_factory.mktemp("quickstart")
    make_toy = [str(ROOT / "tools/make_toy.py"), "--out", "drawn", "--slides", "16,2,2"]
    subprocess.run([sys.executable, *make_toy], cwd=folder, check=True, capture_output=True)
    table = pd.read_csv(folder / "drawn/labels.csv", dtype=str)
    is_new = table["split"] == "test"
    (folder / "slides").mkdir()
    (folder / "new_slides").mkdir()
    for slide, new in zip(table["slide"], is_new, strict=True):
        target = folder / ("new_slides" if new else "slides")
        shutil.move(folder / f"drawn/slides/{slide}.tif", target)
    (folder / "data").mkdir()
    mine = table[~is_new].rename(
        columns={"slide": "slide_id", "case": "patient", "label": "diagnosis"}
    )
    mine["diagnosis"] = mine["diagnosis"].map({"normal": "benign", "anomaly": "malignant"})
    mine[["slide_id", "patient", "diagnosis"]].to_csv(folder / "data/mine.csv", index=False)
    (folder / "mine.yaml").write_text(mine_yaml(QUICKSTART))
    return folder


def run_commands(page: Path) -> list[list[str]]:
    return [words for fence in fences(page, "bash") if fence.is_run for words in commands(fence)]


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """The folder, after all commands of the quickstart."""
    for words in run_commands(QUICKSTART):
        run(with_quick_settings(words), folder)
    return folder


@pytest.mark.slow
def test_the_commands_of_the_quickstart_leave_what_it_promises(finished):
    trained = finished / "runs/mine_e2e_r18_abmilx"
    table = QUICKSTART.read_text().partition("| file in `runs/")[2].partition("## 6.")[0]
    names = [name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) >= 9
    for name in names:
        assert (trained / name).exists(), name
    new = {path.stem for path in (finished / "new_slides").iterdir()}
    assert set(pd.read_csv(finished / "predictions/predictions.csv")["slide"]) == new
    assert (finished / "data/mine.png").is_file()
    assert (finished / "cv/results.md").is_file()
    assert len(list((finished / "data/mine_overview").iterdir())) == 18


@pytest.mark.slow
def test_the_commands_of_the_readme_are_those_of_the_quickstart(finished):
    """So they have run already, with the same mine.yaml."""
    readme, quickstart = run_commands(README), run_commands(QUICKSTART)
    assert len(readme) == 5
    assert [words for words in readme if words not in quickstart] == []
    assert mine_yaml(README) == mine_yaml(QUICKSTART)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(e2e, "load_run"), reason="the public API is not there")
@pytest.mark.parametrize("page", [README, ROOT / "docs/python_api.md"], ids=lambda page: page.name)
def test_the_python_of_the_page_runs_after_the_quickstart(page, finished):
    code = "\n".join(fence.text for fence in fences(page, "python") if fence.is_run)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=finished,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


ALL = [
    (page.name, words)
    for page in PAGES
    for fence in fences(page, "bash")
    for words in commands(fence)
    if words[0] == "e2e" and len(words) > 2
]
VERBS = sorted({words[1] for _, words in ALL})


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_options_of_commands_on_all_pages_exist(verb, tmp_path):
    """A word with two dashes is an option that the verb's help lists."""
    assert verb in cli.VERBS
    help_text = run(["e2e", verb, "--help"], tmp_path)
    listed = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_text))
    for page, words in ALL:
        if words[1] == verb:
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert used <= listed, f"{page}: {shlex.join(words)}"


SETTINGS = [
    (page, words) for page, words in ALL if words[1] in ("train", "check", "crossval", "sweep")
]


@pytest.mark.parametrize(
    ("page", "words"),
    SETTINGS,
    ids=lambda value: value if isinstance(value, str) else shlex.join(value)[:60],
)
def test_settings_of_commands_on_all_pages_exist(page, words, tmp_path, monkeypatch):
    """What `--datasets`, `--model`, `-c` and `section.key=value` resolve to has no unknown setting."""
    if "--resume" in words:
        pytest.skip("it has no settings")
    options = dict(itertools.pairwise(words))
    overrides = [word for word in words if re.match(r"[a-z]\w*(\.\w+)+=", word)]
    monkeypatch.chdir(ROOT)
    datasets = options["--datasets"]
    if datasets.endswith(".yaml") and not Path(datasets).is_file():
        datasets = str(tmp_path / datasets)
        Path(datasets).write_text(mine_yaml(QUICKSTART))
    files = [options["-c"]] if "-c" in options and Path(options["-c"]).is_file() else []
    settings = load_settings(
        datasets=datasets,
        model=options.get("--model", "e2e_r18_abmilx"),
        files=files,
        overrides=overrides,
        registries=REGISTRIES,
    )
    assert settings.names["datasets"] == datasets


YAML_FENCES = [fence for page in PAGES for fence in fences(page, "yaml")]


@pytest.mark.parametrize("fence", YAML_FENCES, ids=lambda fence: f"{fence.page}-{fence.title}")
def test_yaml_on_all_pages_is_a_layer_of_settings(fence, tmp_path):
    """Except for search spaces, whose title says so."""
    layer = yaml.safe_load(fence.text)
    if fence.title.startswith("space"):
        return
    if "task" not in layer:
        layer["task"] = {"name": "classification", "classes": ["benign", "malignant"]}
    (tmp_path / "layer.yaml").write_text(yaml.safe_dump(layer))
    load_settings(
        datasets=str(tmp_path / "layer.yaml"),
        model="e2e_r18_abmilx",
        files=[],
        overrides=[],
        registries=REGISTRIES,
    )
