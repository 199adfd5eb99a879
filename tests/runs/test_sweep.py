"""A search of settings: ranges are checked, trials go on after a stop, validation alone decides."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import optuna
import pandas as pd
import pytest

from e2e.errors import UserError
from e2e.runs import sweep
from e2e.runs.sweep import evaluate_trial, read_space, search
from launch import sweep as command
from tests.helpers.commands import call
from tests.helpers.feature_cohort import arguments
from tests.helpers.feature_cohort import cohort as cohort

SPACE = "optim.lr: {low: 1.0e-4, high: 1.0e-2, log: true}\nhead.embed_dim: [4, 8]\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "it holds no settings"),
        ("[1, 2]", "it holds no settings"),
        ("optim.lr: 3", "optim.lr: 3"),
        ("optim.lr: {low: 1}", "optim.lr: "),
        ("optim.lr: {low: 2, high: 1}", "optim.lr: "),
        ("optim.lr: {low: 1, high: 2, steps: 3}", "optim.lr: "),
        ("optim.lr: {low: 1e-4, high: 1}", "optim.lr: "),  # to YAML 1e-4 is a word
        ("head.act: []", "head.act: "),
        ("a: [b", "cannot be read"),
        ("optim.lr: {low: 0, high: 1, log: true}", "optim.lr: "),
        ("optim.lr: {low: 0.1, high: 0.2, step: 0}", "optim.lr: "),
        ("optim.lr: {low: 0.1, high: 0.2, log: true, step: 0.1}", "optim.lr: "),
        ("optim.lr: {low: 0.1, high: 0.2, log: maybe}", "optim.lr: "),
        ("optim.lr: {low: 0.1, high: .inf}", "optim.lr: "),
        ("optim.lr: {low: 0.1, high: .nan}", "optim.lr: "),
        ("run.out: [2024-01-01]", "run.out: "),  # to YAML a date, and no word
    ],
)
def test_a_space_that_says_no_range_is_refused(tmp_path, text, fault):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(UserError, match=fault):
        read_space(tmp_path / "space.yaml")


def test_a_space_in_latin_1_is_told_as_such(tmp_path):
    (tmp_path / "space.yaml").write_bytes("# \xe9\noptim.lr: [1]".encode("latin1"))
    with pytest.raises(UserError, match="is not in UTF-8"):
        read_space(tmp_path / "space.yaml")


def test_steps_of_a_half_between_whole_numbers_are_taken(tmp_path):
    (tmp_path / "space.yaml").write_text("optim.warmup_epochs: {low: 0, high: 2, step: 0.5}")
    (name, entry), *_ = read_space(tmp_path / "space.yaml").items()
    value = sweep._suggest(optuna.trial.FixedTrial({name: 1.5}), name, entry)
    assert value == 1.5


def test_a_search_that_would_choose_on_the_test_is_refused(cohort, monkeypatch, capsys):
    (cohort / "space.yaml").write_text(SPACE)
    words = [w for w in arguments(cohort, "run.protocol=as_published") if "run.out" not in w]
    asked = [*words, "--space", cohort / "space.yaml", "--out", cohort / "sweep"]
    code, said = call(command.main, monkeypatch, capsys, *asked)
    assert code == 2
    assert "run.protocol=as_published chooses on the test" in said
    assert not (cohort / "sweep").exists()


def report(folder: Path, value: float | None) -> None:
    """A run that was evaluated."""
    folder.mkdir(parents=True)
    content = {
        "selected_weights": "ema",
        "chosen_on": "val",
        "val": {"ema": {"auc": {"value": value}}},
        "test": {"ema": {"auc": {"value": 1.0}}},
    }
    (folder / "metrics.json").write_text(json.dumps(content))


def test_a_trial_is_worth_what_it_has_on_validation(tmp_path):
    report(tmp_path / "a", 0.25)
    assert evaluate_trial([], {}, tmp_path / "a", "auc") == 0.25
    report(tmp_path / "b", None)
    assert evaluate_trial([], {}, tmp_path / "b", "auc") is None
    with pytest.raises(UserError, match="no 'kappa' on validation; it has: auc"):
        evaluate_trial([], {}, tmp_path / "a", "kappa")


@pytest.mark.parametrize(("metric", "best"), [("auc", 0.75), ("rmse", 0.5)])
def test_a_trial_whose_metric_is_not_defined_is_the_worst_and_the_search_goes_on(
    tmp_path, monkeypatch, metric, best
):
    values = iter([None, 0.5, 0.75, None, None])
    monkeypatch.setattr(sweep, "evaluate_trial", lambda *_: next(values))
    said: list[str] = []
    given = {"metric": metric, "seed": 0, "report": said.append}
    space = {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    assert search([], space, out=tmp_path / "a", trials=4, **given)["value"] == best
    assert f"  {metric} on validation undefined; best so far {best:.4f}" in said
    with pytest.raises(UserError, match=f"{metric} is undefined on validation in all of the 1"):
        search([], space, out=tmp_path / "b", trials=1, **given)


@pytest.mark.parametrize(("metric", "best"), [("auc", 0.75), ("rmse", 0.25), ("log_loss", 0.25)])
def test_the_best_trial_is_the_one_of_the_least_error_or_of_the_most_merit(
    tmp_path, monkeypatch, metric, best
):
    values = iter([0.5, 0.25, 0.75, 0.6])
    monkeypatch.setattr(sweep, "evaluate_trial", lambda *_: next(values))
    given = {"out": tmp_path, "trials": 4, "metric": metric, "seed": 0, "report": lambda _: None}
    space = {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    found = search([], space, **given)
    assert found["value"] == best
    table = pd.read_csv(tmp_path / "trials.csv")
    assert table.loc[table["value"] == best, "run"].tolist() == [found["run"]]


def test_a_space_is_bounded(tmp_path):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 9)]
    (tmp_path / "space.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"cannot be read: its aliases stand for more than"):
        sweep.read_space(tmp_path / "space.yaml")


@pytest.mark.slow
def test_a_search_goes_on_after_a_stop_and_keeps_the_best_on_validation(
    cohort, tmp_path, monkeypatch, capsys
):
    (tmp_path / "space.yaml").write_text(SPACE)
    words = [
        w
        for w in arguments(cohort, "optim.epochs=1")
        if not w.startswith(("run.out", "head.embed"))
    ]
    asked = [*words, "--space", tmp_path / "space.yaml", "--out", tmp_path / "sweep"]
    code, said = call(command.main, monkeypatch, capsys, *asked, "--trials", 2)
    assert code == 0, said
    table = pd.read_csv(tmp_path / "sweep" / "trials.csv")
    assert len(table) == 2
    best = json.loads((tmp_path / "sweep" / "best.json").read_text())
    row = table.loc[table["value"].idxmax()]
    assert best["value"] == row["value"]
    assert best["settings"]["optim.lr"] == row["params_optim.lr"]
    selected = json.loads((Path(best["run"]) / "metrics.json").read_text())
    assert selected["val"]["ema"][best["metric"]]["value"] == best["value"]
    assert (
        f"lr: {best['settings']['optim.lr']}" in (Path(best["run"]) / "settings.yaml").read_text()
    )

    storage = f"sqlite:///{tmp_path}/sweep/optuna.db"
    stopped = optuna.load_study(study_name="sweep", storage=storage).ask()
    lost = {"optim.lr": stopped.suggest_float("optim.lr", 1e-4, 1e-2, log=True)}
    lost["head.embed_dim"] = stopped.suggest_categorical("head.embed_dim", [4, 8])
    code, said = call(command.main, monkeypatch, capsys, *asked, "--trials", 3)
    assert code == 0, said
    table = pd.read_csv(tmp_path / "sweep" / "trials.csv")
    assert (table["state"] == "COMPLETE").sum() == 3
    assert lost["optim.lr"] in table.loc[table["state"] == "COMPLETE", "params_optim.lr"].to_list()

    code, said = call(command.main, monkeypatch, capsys, *asked, "optim.bags=2")
    assert code == 2
    assert "holds another search" in said


@pytest.mark.slow
def test_a_run_that_fails_ends_the_search_with_its_log(tmp_path):
    wrong = ["--datasets", "panda", "--model", "abmil"]  # without features
    with pytest.raises(UserError, match=r"exit code 2; see .*\.log"):
        search(
            wrong,
            {"optim.lr": [1e-3]},
            out=tmp_path / "sweep",
            trials=1,
            metric="auc",
            seed=0,
            report=lambda text: print(text, file=sys.stderr),
        )
    [log] = (tmp_path / "sweep" / "runs").glob("*.log")
    assert "data.features" in log.read_text()
