"""--overwrite replaces an earlier run, and nothing else."""

from __future__ import annotations

import json

import pytest

from e2e.files import lock_file
from launch import train
from tests.helpers.commands import call
from tests.helpers.feature_cohort import arguments, cohort  # noqa: F401  (a fixture)


@pytest.fixture
def run(cohort, monkeypatch, capsys):  # noqa: F811
    """Trains on the cohort in cohort/run, and returns exit code and message."""

    def train_there(*more: str) -> tuple[int, str]:
        words = [*arguments(cohort, "optim.epochs=1", "run.heatmaps=0"), *more]
        return call(train.main, monkeypatch, capsys, *words)

    return train_there


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_run_is_replaced_and_nothing_of_it_is_left(cohort, run):  # noqa: F811
    assert run("run.track=[tensorboard]", "optim.epochs=3")[0] == 0
    code, message = run()
    assert code == 2
    assert "to replace it: --overwrite" in message
    assert run("--overwrite")[0] == 0
    report = json.loads((cohort / "run" / "metrics.json").read_text())
    assert report["epoch"] == 1
    steps = (cohort / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum('"lr"' in line for line in steps) == 3  # of one epoch
    assert not (cohort / "run" / "tensorboard").exists()


@pytest.mark.parametrize("name", ["notes.txt", "evaluation/metrics.json", "mine.lmdb/data.mdb"])
def test_a_folder_that_holds_something_else_is_refused_and_stays(cohort, run, name):  # noqa: F811
    assert run()[0] == 0
    path = cohort / "run" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    before = files(cohort / "run")
    code, message = run("--overwrite")
    assert code == 2
    assert f"it holds {name.split('/')[0]}" in message
    assert files(cohort / "run") == before


def test_a_folder_that_is_no_run_is_refused(cohort, run):  # noqa: F811
    (cohort / "run" / "figures").mkdir(parents=True)
    code, message = run("--overwrite")
    assert code == 2
    assert "it has no settings.yaml" in message
    assert (cohort / "run" / "figures").is_dir()


def test_a_mistake_in_the_new_command_leaves_the_earlier_run(cohort, run):  # noqa: F811
    assert run()[0] == 0
    before = (cohort / "run" / "best.safetensors").read_bytes()
    code, message = run("--overwrite", "task.classes=[plain,other]")
    assert code == 2, message
    assert (cohort / "run" / "best.safetensors").read_bytes() == before


def test_a_run_that_is_training_is_not_replaced(cohort, run):  # noqa: F811
    assert run()[0] == 0
    before = files(cohort / "run")
    lock = lock_file(cohort / "run" / ".lock")
    assert lock is not None
    code, message = run("--overwrite")
    assert code == 2
    assert "is in use" in message
    assert files(cohort / "run") == before


def test_what_a_link_points_to_is_kept(cohort, run):  # noqa: F811
    assert run()[0] == 0
    (cohort / "elsewhere").mkdir()
    (cohort / "elsewhere" / "map.png").write_text("mine")
    (cohort / "run" / "heatmaps").symlink_to(cohort / "elsewhere")
    assert run("--overwrite")[0] == 0
    assert (cohort / "elsewhere" / "map.png").read_text() == "mine"
    assert not (cohort / "run" / "heatmaps").is_symlink()


def test_resuming_takes_no_overwrite(cohort, run, monkeypatch, capsys):  # noqa: F811
    assert run()[0] == 0
    words = ["--resume", str(cohort / "run"), "--overwrite"]
    code, message = call(train.main, monkeypatch, capsys, *words)
    assert code == 2
    assert "give nothing else with it" in message
