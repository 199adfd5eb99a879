"""The plug-ins that docs/extending.md shows, each in the one file that its title names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.helpers.fences import fences
from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "extending.md"
EXAMPLES = {fence.title: fence.text for fence in fences(PAGE, "python") if fence.title}
CONTRACTS = ["tests/contracts", "tests/encoders/test_encoders.py", "tests/engine/test_model.py"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of this checkout with the examples in it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("e2e", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for title, text in EXAMPLES.items():
        assert not (folder / title).exists()
        (folder / title).write_text(text)
    return folder


def run(checkout: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=checkout, env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip


def test_the_page_has_a_head_an_encoder_a_task_and_a_format():
    assert sorted(title.split("/")[1] for title in EXAMPLES) == [
        "encoders", "features", "heads", "tasks",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_contract_tests_run_over_the_examples_and_pass(checkout):
    names = ("top_mean", "proportion", "tiny")
    options = ["-vv", "-p", "no:cacheprovider", "-m", "not slow", "-k", " or ".join(names)]
    done = run(checkout, "pytest", *options, *CONTRACTS)
    assert done.returncode == 0, done.stdout[-3000:]
    for name in names:
        assert re.search(rf"::\S+\[\S*{name}\S*\] PASSED", done.stdout), name


@pytest.mark.slow
def test_the_help_lists_the_option_of_the_new_head(checkout):
    text = run(checkout, "e2e", "train", "--help", "head.top_mean").stdout
    assert "head.k=8  (int)\n" in text
    assert "Number of patches that count." in text


@pytest.mark.slow
def test_a_run_takes_head_task_and_format_from_the_new_files(checkout, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "features").mkdir()
    rows = ["slide,case,split,label"]
    for k in range(24):
        with h5py.File(tmp_path / "features" / f"s{k}.h5", "w") as file:
            file["embeddings"] = rng.normal(k / 24, 0.1, (5, 8)).astype(np.float32)
        rows.append(f"s{k},c{k},{('train', 'val', 'test')[k % 3]},{k / 24}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "cohort.yaml").write_text(
        f"data: {{labels: {tmp_path}/labels.csv, features: [{tmp_path}/features]}}\n"
        "task: {name: proportion}\n"
    )
    out = tmp_path / "run"
    done = run(
        checkout, "e2e", "train", "--datasets", tmp_path / "cohort.yaml", "--model", "top_mean",
        "head.k=2", "optim.epochs=2", "run.bootstrap=20", "engine.device=cpu", f"run.out={out}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "metrics.json").is_file()
    assert "predicted" in (out / "predictions.csv").read_text().splitlines()[0]
