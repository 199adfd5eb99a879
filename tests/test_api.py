"""The public API, by the examples of its docstrings and from a trained run."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import e2e
from e2e.errors import UserError
from e2e.runs.train import main as train
from e2e.runs.trained import TrainedRun
from tests.helpers.patch_cohort import arguments
from tests.helpers.patch_cohort import cohort as cohort
from tests.helpers.paths import ROOT

WITH_EXAMPLES = ("e2e", "e2e.api", "e2e.errors", "e2e.sizes", "e2e.runs.options_help")


@pytest.fixture(scope="module")
def project(cohort, tmp_path_factory):
    """A folder as the examples have it: data/mine.lmdb, mine.yaml, runs/mine."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data").mkdir()
    subprocess.run(["cp", "-r", cohort / "s.lmdb", folder / "data" / "mine.lmdb"], check=True)
    subprocess.run(["cp", cohort / "labels.csv", folder / "data"], check=True)
    (folder / "mine.yaml").write_text(
        "data: {labels: data/labels.csv, stores: [data/mine.lmdb]}\n"
        "task: {name: classification, classes: [bright, dark]}\n"
    )
    words = arguments(cohort, folder / "runs" / "mine", "optim.epochs=1", "run.heatmaps=0")
    assert (
        train([w.replace(str(cohort / "s.lmdb"), str(folder / "data/mine.lmdb")) for w in words])
        == 0
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_run(project, monkeypatch, name):
    monkeypatch.chdir(project)
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.IGNORE_EXCEPTION_DETAIL
    )
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.slow
def test_a_run_predicts_what_its_evaluation_predicts(project, monkeypatch):
    run = e2e.load_run(project / "runs" / "mine")
    assert isinstance(run, TrainedRun)
    store = e2e.open_store(project / "data" / "mine.lmdb")
    table = run.predict(store)
    assert table["slide"].tolist() == store.slides
    saved = pd.read_csv(project / "runs" / "mine" / "predictions.csv", dtype={"slide": str})
    both = table.merge(saved, on="slide", suffixes=("", "_saved"))
    assert len(both) == len(saved)
    np.testing.assert_allclose(both["prob_dark"], both["prob_dark_saved"], atol=1e-6)
    by_path = run.predict([str(project / "data" / "mine.lmdb")], device="cpu")
    pd.testing.assert_frame_equal(by_path, table)


def test_a_folder_that_is_no_run_is_one_message(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        e2e.load_run(tmp_path)


def test_the_public_names_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "e2e" / "__init__.py").read_text())
    imported = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "e2e.api"
        for alias in node.names
    }
    assert imported | {"__version__"} == set(e2e.__all__)
    for name in e2e.__all__:
        assert getattr(e2e, name).__doc__
        assert name in dir(e2e)
    with pytest.raises(AttributeError, match="has no attribute 'creat_head'"):
        _ = e2e.creat_head  # pyright: ignore


def test_the_import_is_lazy():
    code = "import sys, e2e; assert 'torch' not in sys.modules; e2e.list_heads; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_model_has_the_options_it_is_given():
    model = e2e.create_model(
        "e2e_r18_abmilx", 3, pretrained=False, head={"embed_dim": 64, "heads": 2}, chunk=16
    )
    assert (model.encoder.dim, model.chunk, model.batch_norm.name) == (256, 16, "chunk")
    head = e2e.create_head("abmil", in_dim=32, num_outputs=3)
    output = head(torch.zeros(2, 5, 32), torch.ones(2, 5, dtype=torch.bool))
    assert output.logits.shape == (2, 3)
    features = e2e.create_model("abmil", 3, encoder={"dim": 24})
    assert features.encoder.dim == 24


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: e2e.create_model("e2e_r18_abmilx", 2, head={"embd": 8}),
            "head.embd'; did you mean",
        ),
        (lambda: e2e.create_model("e2e_r18", 2), "unknown model 'e2e_r18'"),
        (lambda: e2e.create_head("abmly", 8, 2), "did you mean 'abmil"),
        (lambda: e2e.create_head("abmil", 8, 2, width=3), "has no option 'width'"),
        (
            lambda: e2e.create_task("clasification", classes=["a", "b"]),
            "did you mean 'classification'",
        ),
        (lambda: e2e.load_cohort("panta"), "did you mean 'panda'"),
    ],
)
def test_a_mistake_is_a_user_error_with_the_nearest_name(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_names_are_listed_by_pattern():
    assert e2e.list_heads("clam*") == ["clam_mb", "clam_sb"]
    assert "vit_base_patch16_224" in e2e.list_encoders("vit_base*")
    assert all(name.startswith("vit") for name in e2e.list_encoders("vit*"))
    assert "r18" in e2e.list_encoders()
