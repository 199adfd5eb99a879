"""The pages: generated parts are up to date, links lead somewhere, examples run, the site builds."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.helpers.fences import NOT_RUN, PAGES, README, ROOT, fences
from tools.make_docs import generated_pages, outdated_pages

DOCS = ROOT / "docs"
MKDOCS = ROOT / "mkdocs.yml"
WIDTH = 110
PRIVATE_DIALECT = (
    "is not to be had", "nobody knows", "are told", "is told", "judged", " mend", "of ours",
)  # fmt: skip


def test_generated_pages_are_up_to_date():
    """`python tools/make_docs.py` writes them."""
    assert [path.name for path in outdated_pages(generated_pages())] == []


def test_every_setting_has_a_meaning():
    rows = [
        line for line in (DOCS / "settings.md").read_text().splitlines() if line.startswith("| `")
    ]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short_except_in_tables_and_code(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    long_lines = [
        line
        for line in text.splitlines()
        if len(line) > WIDTH and not line.startswith(("|", "<!--"))
    ]
    assert long_lines == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_words_are_those_of_the_glossary(page):
    text = " ".join(page.read_text().split()).lower()
    assert [phrase for phrase in PRIVATE_DIALECT if phrase in text] == []


def pages_of(nav: list) -> list[str]:
    entries = [value for entry in nav for value in entry.values()]
    return [
        page
        for value in entries
        for page in (pages_of(value) if isinstance(value, list) else [value])
    ]


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load(MKDOCS.read_text())["nav"]
    assert sorted(pages_of(nav)) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\s-]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name}: {target}"


def test_the_packages_of_the_architecture_page_are_those_that_the_tests_hold():
    """`LAYERS` of the architecture tests, from the ground up, against the page, from the top down."""
    [path] = ROOT.glob("tests/**/test_architecture.py")
    constants = {
        target.id: node.value
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    ground = ast.literal_eval(constants["GROUND"])
    assert isinstance(constants["LAYERS"], ast.Tuple)
    layers = [
        set(ground if isinstance(layer, ast.Name) else ast.literal_eval(layer))
        for layer in constants["LAYERS"].elts
    ]
    page = (DOCS / "architecture.md").read_text()
    listed = page.partition("launch/  tools/")[2].partition("```")[0].splitlines()[1:]
    names = [re.split(r" {3,}", line.strip())[0].split() for line in listed]
    nouns = [{name.rstrip("/") for name in line} for line in names]
    assert nouns == layers[::-1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_titles_of_commands_that_are_not_run_give_the_reason(page):
    for fence in fences(page, "bash"):
        if not fence.is_run:
            assert len(fence.title.removeprefix(NOT_RUN).strip(": ")) > 5, fence


def test_examples_of_extending_run(tmp_path):
    """All of them, in order, in a process of their own: they register what the examples define."""
    code = "\n".join(fence.text for fence in fences(DOCS / "extending.md", "python"))
    assert code.count(".register(") == 4
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "site/settings/index.html").is_file()
