"""A run folder is all that a prediction needs: anywhere, after it was moved, without its training data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import e2e
from e2e.runs.processes import child_environment
from e2e.store.pack import pack
from e2e.wsi.tiling import Tiling
from tests.helpers.packing import source
from tests.helpers.patch_cohort import arguments
from tests.helpers.trained_run import project as project
from tests.helpers.trained_run import run

pytestmark = pytest.mark.slow


def run_apart(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own: one that writes a store must not have it open for reading."""
    return subprocess.run(
        [sys.executable, "-m", "e2e", *map(str, words)],
        env=child_environment({"OMP_NUM_THREADS": "1"}),
        check=False,
        capture_output=True,
        text=True,
    )


def predict(project: Path, out: Path, *slides: object, folder: str = "run") -> pd.DataFrame:
    options = ["--run", project / folder, "--out", out, "--workers", 0]
    assert run("predict", *slides, *options) == 0
    return pd.read_csv(out / "predictions.csv", dtype={"slide": str})


def test_a_moved_run_without_its_training_store_predicts_the_same_to_the_bit(
    project, tmp_path, monkeypatch
):
    before = predict(project, tmp_path / "before", project / "new")
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(project / "run", moved)
    shutil.move(project / "data", project / "hidden")
    try:
        monkeypatch.chdir(tmp_path / "elsewhere")
        after = predict(tmp_path / "elsewhere", tmp_path / "after", project / "new", folder="model")
        frame = e2e.load_run(moved).predict(project / "new", device="cpu")
    finally:
        shutil.move(project / "hidden", project / "data")
    pd.testing.assert_frame_equal(after, before)
    assert frame["prob_dark"].astype("float32").tolist() == pytest.approx(
        before["prob_dark"].tolist(), abs=1e-6
    )


def test_the_recipe_of_the_training_slides_is_in_the_run_folder(project):
    content = json.loads((project / "run" / "recipes.json").read_text())
    (recipe,) = content["recipes"]
    assert (recipe["source"], recipe["mpp"], recipe["patch_px"]) == ("slides", 4, 32)
    assert content["patches"] == [{"patch_px": 32, "mpp": 4, "slides": 9}]
    data = yaml.safe_load((project / "run" / "settings.yaml").read_text())["data"]
    assert Path(data["labels"]).is_absolute()
    assert all(Path(path).is_absolute() for path in data["stores"])


def test_paths_given_relative_to_a_folder_are_stored_absolute(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    words = arguments(project, tmp_path / "run", "optim.epochs=1", "optim.bags=2", "run.heatmaps=0")
    assert run("train", *words, "data.labels=data/labels.csv", "data.stores=[data/*.lmdb]") == 0
    monkeypatch.chdir("/")
    assert run("evaluate", tmp_path / "run") == 0
    data = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())["data"]
    assert data["labels"] == str(project / "data" / "labels.csv")
    assert data["stores"] == [str(project / "data" / "*.lmdb")]


def test_files_folders_and_patterns_are_predicted_and_nothing_else(project, tmp_path):
    both = predict(project, tmp_path / "a", project / "new" / "n20.tif", project / "new" / "*1.tif")
    assert both["slide"].tolist() == ["n20", "n21"]
    options = ["--run", project / "run", "--out", tmp_path / "a", "--workers", 0]
    assert run_apart("predict", project / "new" / "n21.tif", *options).returncode == 0
    one = pd.read_csv(tmp_path / "a" / "predictions.csv", dtype={"slide": str})
    assert one["slide"].tolist() == ["n21"]
    assert one["prob_dark"].tolist() == pytest.approx(both["prob_dark"][1:].tolist(), abs=1e-6)


def test_settings_may_stand_among_the_slides(project, tmp_path):
    predict(project, tmp_path, project / "new", "engine.device=cpu", "engine.chunk=3")


def test_a_slide_that_changed_under_its_name_is_predicted_anew(project, tmp_path):
    (tmp_path / "slides").mkdir()
    slide = Path(shutil.copy(project / "new" / "n20.tif", tmp_path / "slides" / "x.tif"))
    first = predict(project, tmp_path / "out", slide)
    shutil.copy(project / "new" / "n21.tif", slide)
    options = ["--run", project / "run", "--out", tmp_path / "out", "--workers", 0]
    done = run_apart("predict", slide, *options)
    assert done.returncode == 0, done.stderr
    assert "cutting all slides again" in done.stdout
    second = pd.read_csv(tmp_path / "out" / "predictions.csv", dtype={"slide": str})
    fresh = predict(project, tmp_path / "fresh", slide)
    pd.testing.assert_frame_equal(second, fresh, atol=1e-6)
    assert first["prob_dark"].tolist() != second["prob_dark"].tolist()


def test_a_run_of_an_earlier_version_takes_the_recipe_of_its_store(project, tmp_path, capsys):
    shutil.copytree(project / "run", tmp_path / "old")
    (tmp_path / "old" / "recipes.json").unlink()
    new = predict(project, tmp_path / "a", project / "new")
    pd.testing.assert_frame_equal(
        predict(tmp_path, tmp_path / "b", project / "new", folder="old"), new
    )


def test_another_magnification_is_announced_by_evaluation_and_stops_a_resumed_run(
    project, tmp_path, capsys
):
    coarse = tmp_path / "coarse.lmdb"
    pack(source(project / "data" / "slides", Tiling(mpp=8, patch_px=32)), coarse, workers=0)
    assert run("evaluate", project / "run", "--out", tmp_path / "e", f"data.stores=[{coarse}]") == 0
    said = capsys.readouterr().out
    assert "warning: 9 slide(s) have patches of 32 px at 8 um/px" in said
    assert "the run was trained on patches of 32 px at 4 um/px" in said
    assert run("evaluate", project / "run", "--out", tmp_path / "f") == 0
    assert "warning" not in capsys.readouterr().out
    shutil.copytree(project / "run", tmp_path / "run")
    settings = tmp_path / "run" / "settings.yaml"
    settings.write_text(settings.read_text().replace(str(project / "data" / "s.lmdb"), str(coarse)))
    assert run("train", "--resume", tmp_path / "run") == 2
    assert "the stores have changed since" in capsys.readouterr().err


def test_the_start_says_what_the_encoder_sees_and_warns_if_patches_are_enlarged(
    project, tmp_path, capsys
):
    words = ["optim.epochs=1", "optim.bags=2", "run.heatmaps=0"]
    assert run("train", *arguments(project, tmp_path / "a", *words, "bag.size=64")) == 0
    said = capsys.readouterr().out
    assert "patches of 32 px at 4 um/px, resized to 64 px (2 um/px)" in said
    assert "warning: bag.size=64 enlarges the patches of 32 px 4.0-fold in pixels" in said
