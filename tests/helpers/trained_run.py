"""A run that was trained on slides, and slides that it has not seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e import cli
from e2e.errors import exit_code
from e2e.store.pack import pack
from tests.helpers.packing import source, write_slide
from tests.helpers.patch_cohort import arguments


def run(*words: object) -> int:
    """Run a command of ``e2e`` in this process and return its exit code."""
    return exit_code(lambda: cli.run([str(word) for word in words]))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """``run/``, trained on slides that were cut into ``data/s.lmdb``; and ``new/`` with two more slides."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data" / "slides").mkdir(parents=True)
    (folder / "new").mkdir()
    rows = ["slide,case,split,label"]
    for k in range(9):
        write_slide(folder / "data" / "slides" / f"s{k}.tif", seed=k)
        split = "train" if k < 4 else "val" if k < 6 else "test"
        rows.append(f"s{k},c{k},{split},{('bright', 'dark')[k % 2]}")
    pack(source(folder / "data" / "slides"), folder / "data" / "s.lmdb", workers=0)
    (folder / "data" / "labels.csv").write_text("\n".join(rows) + "\n")
    (folder / "cohort.yaml").write_text(
        f"data: {{labels: {folder}/data/labels.csv, stores: [{folder}/data/s.lmdb]}}\n"
        "task: {name: classification, classes: [bright, dark]}\n"
    )
    for k in (20, 21):
        write_slide(folder / "new" / f"n{k}.tif", seed=k)
    assert run("train", *arguments(folder, folder / "run", "run.heatmaps=0", "optim.bags=2")) == 0
    return folder
