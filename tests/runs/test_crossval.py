"""Cross-validation: each fold a run that goes on after a stop, and one table of what they say together."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from e2e.errors import UserError, exit_code
from e2e.metrics.bootstrap import case_weights
from e2e.metrics.values import auc
from e2e.runs import crossval
from e2e.runs import many as child
from e2e.runs.crossval import Plan, Trial, make_plan, summarise, train_trials, write_tables
from e2e.runs.parts import REGISTRIES
from e2e.runs.saved import SavedPredictions
from e2e.settings.layers import load_settings
from e2e.tasks.base import TASKS
from launch import crossval as command
from launch import evaluate, train
from tests.helpers.commands import call
from tests.helpers.feature_cohort import COUNTS, arguments
from tests.helpers.feature_cohort import cohort as cohort

BINARY = TASKS.build("classification", classes=["no", "yes"])


def selected(seed: int, cases: list[str], task=BINARY) -> SavedPredictions:
    rng = np.random.default_rng(seed)
    score = rng.uniform(size=len(cases))
    targets = np.arange(len(cases)) % 2
    slides = [f"{case}_{k}" for k, case in enumerate(cases)]
    facts = [(case, str(target)) for case, target in zip(cases, targets, strict=True)]
    predicted = np.stack([1 - score, score], 1)
    return SavedPredictions(Path(), task, slides, facts, targets.astype(float), predicted)


def folds(seeds: int = 2) -> dict[Trial, SavedPredictions]:
    """Three folds of 8 slides of 4 cases."""
    return {
        Trial(str(fold), seed): selected(10 * seed + fold, [f"c{fold}{k // 2}" for k in range(8)])
        for seed in range(seeds)
        for fold in range(3)
    }


def row_of(found, metric: str, draws: int = 50):
    return next(row for row in summarise(found, draws=draws) if row.metric == metric)


def area(runs: list[SavedPredictions], weights: np.ndarray) -> np.ndarray:
    score = np.concatenate([run.predicted[:, 1] for run in runs])
    return auc(score, np.concatenate([run.targets for run in runs]) == 1, weights)


def test_mean_and_deviation_are_over_runs():
    found = folds()
    row = row_of(found, "auc")
    each = [area([run], np.ones((1, 8)))[0] for run in found.values()]
    assert row.runs == pytest.approx(each)
    assert row.mean == pytest.approx(np.mean(each))
    assert row.sd == pytest.approx(np.std(each, ddof=1))


def test_all_folds_are_judged_as_one_test_set_a_seed_under_the_same_resamples_of_cases():
    found = folds()
    weights = case_weights(
        [c for fold in range(3) for c in found[Trial(str(fold), 0)].cases], 50, 0
    )
    of_seed = [area([found[Trial(str(k), seed)] for k in range(3)], weights) for seed in (0, 1)]
    want = np.mean(of_seed, axis=0)
    row = row_of(found, "auc")
    assert row.all_folds["value"] == pytest.approx(want[0])
    assert [row.all_folds["low"], row.all_folds["high"]] == pytest.approx(
        np.percentile(want[1:], [2.5, 97.5]).tolist()
    )


def test_folds_whose_models_are_on_other_scales_are_judged_by_themselves(monkeypatch):
    found = folds(seeds=1)
    monkeypatch.setattr(type(BINARY), "can_pool_folds", False)
    each = [area([run], np.ones((1, 8)))[0] for run in found.values()]
    assert row_of(found, "auc").all_folds["value"] == pytest.approx(np.mean(each))


def test_a_metric_that_a_fold_does_not_have_is_said_to_be_undefined_there(tmp_path):
    found = folds(seeds=1)
    first = found[Trial("0", 0)]
    found[Trial("0", 0)] = replace(first, targets=np.zeros(8))
    row = row_of(found, "auc")
    assert np.isnan(row.runs[0])
    assert row.mean == pytest.approx(np.mean(row.runs[1:]))
    plan = Plan(tmp_path, (), ("0", "1", "2"), (0,), "")
    text = write_tables(plan, found, [row], 50)
    assert "(of 2 runs)" in text
    table = pd.read_csv(tmp_path / "results.csv")
    assert table["value"].isna().tolist() == [True, False, False]
    latex = (tmp_path / "results.tex").read_text()
    assert r"95 \% interval \\" in latex
    assert json.loads((tmp_path / "results.json").read_text())["metrics"][0]["metric"] == "auc"


def test_another_cross_validation_in_the_same_folder_is_refused_and_more_seeds_are_not(tmp_path):
    plan = Plan(tmp_path / "cv", ("--datasets", "a"), ("0", "1"), (0,), "digest")
    plan.write()
    Plan(tmp_path / "cv", ("--datasets", "a"), ("0", "1"), (0, 1), "digest").write()
    for other in (("--datasets", "b"), "digest"), (("--datasets", "a"), "changed"):
        with pytest.raises(UserError, match="holds another cross-validation"):
            Plan(tmp_path / "cv", other[0], ("0", "1"), (0,), other[1]).write()


def test_what_an_earlier_command_trained_in_the_folder_is_reported_too(tmp_path):
    plan = Plan(tmp_path, (), ("1",), (0,), "")
    for name in (
        "fold_1_seed_0",
        "fold_0_seed_0",
        "fold_0_seed_3",
        "fold_a_b_seed_2",
        "fold_seed_1",
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if name != "fold_0_seed_3":
            (tmp_path / "runs" / name / "metrics.json").write_text("{}")
    assert plan.finished_trials() == [Trial("1", 0), Trial("0", 0), Trial("a_b", 2)]
    text = write_tables(
        plan, {t: selected(k, ["a"]) for k, t in enumerate(plan.finished_trials())}, [], 50
    )
    assert text.startswith("3 of 3 runs: 3 folds, 2 seed(s)")


@pytest.mark.slow
def test_a_run_that_fails_ends_the_others_before_they_begin_and_names_its_log(tmp_path):
    plan = Plan(tmp_path / "cv", ("--datasets", "panda", "--model", "abmil"), ("0", "1"), (0,), "")
    said: list[str] = []
    with pytest.raises(
        UserError, match=r"1 run\(s\) failed\n  fold_0_seed_0: exit code 2, see .*log"
    ):
        train_trials(plan, [""], said.append)
    assert [line.split("  ")[1].split(" after")[0] for line in said] == [
        "fold_0_seed_0 started",
        "fold_0_seed_0 failed with exit code 2",
    ]
    assert not (tmp_path / "cv" / "runs" / "fold_1_seed_0.log").exists()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ([], "a cross-validation needs folds"),
        (["--folds", "3", "--only", "7"], "has no fold 7\n  it has: 0, 1, 2"),
        (
            ["--folds", "3", "data.split_file=s.csv"],
            "data.split_file=null data.fold=null to make new ones",
        ),
        (["--folds", "99"], "16 cases cannot be divided into 99 folds"),
        (["--folds", "3", "--seeds", "a"], "--seeds cannot be read"),
        (["--folds", "3", "--at-once", "0"], "--at-once must be at least 1"),
    ],
)
def test_a_mistake_is_told_before_any_training(cohort, monkeypatch, capsys, words, fault):
    asked = [*own_words(cohort), "--out", cohort / "cv", *words]
    code, said = call(command.main, monkeypatch, capsys, *asked)
    assert code == 2, said
    assert fault in said
    assert not (cohort / "cv" / "runs").exists()


def test_the_seed_of_the_settings_is_the_seed_of_the_runs(cohort, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(crossval, "train_trials", lambda plan, *_: asked.extend(plan.trials))
    monkeypatch.setattr(crossval, "write_results", lambda *_, **__: "")
    words = [*own_words(cohort), "--folds", "2", "--out", cohort / "cv", "run.seed=5"]
    assert call(command.main, monkeypatch, capsys, *words) == (0, "")
    assert call(command.main, monkeypatch, capsys, *words, "--seeds", "1,2") == (0, "")
    assert [trial.seed for trial in asked] == [5, 5, 1, 1, 2, 2]


def test_a_file_in_the_place_of_the_folder_is_one_message(cohort, monkeypatch, capsys):
    (cohort / "file").write_text("")
    for out in (cohort / "file", cohort / "file" / "cv"):
        words = [*own_words(cohort), "--folds", "2", "--out", out]
        code, said = call(command.main, monkeypatch, capsys, *words)
        assert (code, said.splitlines()[0]) == (
            2,
            f"error: cannot create the folder {out}: {WHY[out.name]}",
        )


WHY = {"file": "File exists", "cv": "Not a directory"}


def own_words(cohort: Path) -> list[str]:
    return [w for w in arguments(cohort, "optim.epochs=1") if not w.startswith("run.out")]


def test_a_fold_and_a_seed_are_one_run_however_often_they_are_asked_for(cohort):
    words = own_words(cohort)
    settings = load_settings(
        datasets=words[1], model=words[3], files=[], overrides=words[4:], registries=REGISTRIES
    )
    plan = make_plan(settings, words, out=cohort / "cv", num_folds=3, only=["1", "1"], seeds=[4, 4])
    assert plan.trials == [Trial("1", 4)]


@pytest.mark.parametrize(
    "where", ["e2e.reports.evaluate.write_predictions", "e2e.runs.folder.write_json"]
)
def test_a_run_that_is_killed_anywhere_is_not_done_and_goes_on(cohort, monkeypatch, capsys, where):
    words, folder = own_words(cohort), cohort / "cv" / "runs" / "fold_0_seed_0"

    def killed(*_):
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(where, killed)
        with pytest.raises(SystemExit):
            call(train.main, monkeypatch, capsys, *child.start_or_resume(words, folder))
    assert not child.is_done(folder)
    code, said = call(train.main, monkeypatch, capsys, *child.start_or_resume(words, folder))
    assert code == 0, said
    assert child.is_done(folder)


def test_pictures_that_fail_are_a_warning_and_evaluation_draws_them_later(
    cohort, monkeypatch, capsys, tmp_path
):
    folder = tmp_path / "run"

    def fail(*_):
        raise ValueError("no pictures today")

    with monkeypatch.context() as patch:
        patch.setattr("e2e.reports.evaluate.write_figures", fail)
        monkeypatch.setattr(sys, "argv", ["train", *own_words(cohort), f"run.out={folder}"])
        assert exit_code(train.main) == 0
    assert "warning: no figures in" in capsys.readouterr().out
    assert child.is_done(folder)
    assert (folder / "predictions.csv").is_file()
    assert not list(folder.glob("figures/*"))
    code, said = call(evaluate.main, monkeypatch, capsys, folder, "--out", folder)
    assert code == 0, said
    assert list(folder.glob("figures/*.png"))


@pytest.mark.slow
def test_every_case_is_tested_once_and_what_was_stopped_goes_on(cohort, monkeypatch, capsys):
    asked = [*own_words(cohort), "--out", cohort / "cv", "--folds", "3", "--at-once", "2"]
    code, said = call(command.main, monkeypatch, capsys, *asked)
    assert code == 0, said
    runs = cohort / "cv" / "runs"
    tested = [pd.read_csv(runs / f"fold_{k}_seed_0" / "predictions.csv") for k in range(3)]
    slides = [slide for table in tested for slide in table.loc[table["split"] == "test", "slide"]]
    assert sorted(slides) == sorted(COUNTS)
    table = pd.read_csv(cohort / "cv" / "results.csv")
    assert set(table["fold"]) == {0, 1, 2}
    report = json.loads((runs / "fold_1_seed_0" / "metrics.json").read_text())
    value = report["test"][report["selected_weights"]]["auc"]["value"]
    ours = table[(table["fold"] == 1) & (table["metric"] == "auc")]["value"]
    assert ours.to_list() == pytest.approx([value], nan_ok=True)

    before = (runs / "fold_0_seed_0" / "metrics.json").stat().st_mtime_ns
    weights = (runs / "fold_2_seed_0" / "best.safetensors").read_bytes()
    (runs / "fold_2_seed_0" / "metrics.json").unlink()
    code, again = call(command.main, monkeypatch, capsys, *asked)
    assert code == 0, again
    assert (runs / "fold_0_seed_0" / "metrics.json").stat().st_mtime_ns == before
    assert (runs / "fold_2_seed_0" / "best.safetensors").read_bytes() == weights
    assert again.splitlines()[-3:] == said.splitlines()[-3:]


def test_each_word_of_gpus_is_a_run_at_a_time_that_sees_those_alone(tmp_path, monkeypatch):
    seen = []

    class Ended:
        returncode = 0

        def __init__(self, command, *, env, **options):
            seen.append((env.get("CUDA_VISIBLE_DEVICES"), [w for w in command if "gpus" in w]))

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Ended)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for slot in ("", "3", "0,1"):
        child.run_command("train", [], tmp_path / "log", slot)
    assert seen == [(None, []), ("3", []), ("0,1", ["--gpus=2"])]
    assert sys.executable in (tmp_path / "log").read_text()
