"""Runs of every task, from a table to results; survival against scikit-survival on its data sets."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sksurv.datasets import load_gbsg2, load_whas500
    from sksurv.linear_model import CoxPHSurvivalAnalysis
    from sksurv.preprocessing import OneHotEncoder

from e2e.metrics.bootstrap import case_weights, confidence_interval
from e2e.metrics.survival import Baseline, Censoring, c_index, integrated_brier
from e2e.runs.saved import read_predictions
from launch import evaluate, train
from tests.helpers.commands import call
from tests.helpers.feature_cohort import arguments, cohort  # noqa: F401  (a fixture)

TASKS = {
    "multilabel": (
        ["task.labels=[er,pr]"],
        ["label_er", "label_pr", "predicted", "prob_er", "prob_pr"],
        ["auc_macro", "auc_er", "log_loss"],
    ),
    "regression": (["task.column=number"], ["label", "predicted"], ["rmse", "spearman"]),
    "survival": (
        ["task.event=1", "task.event_column=status", "task.bins=2", "task.time_column=months"],
        ["time", "event", "risk", "survival_1", "survival_2"],
        ["c_index", "survival_nll"],
    ),
    "survival cox": (
        [
            *("task.event=dead", "task.censored=alive", "task.event_column=vital"),
            *("task.loss=cox", "task.time_column=months"),
        ],
        ["time", "event", "risk", "survival_1", "survival_2", "survival_3"],
        ["c_index", "c_index_uno", "integrated_brier"],
    ),
    "grading": (
        ["task.classes=[I,II,III]", "task.column=grade", "task.loss=coral"],
        ["label", "predicted", "prob_I", "prob_II", "prob_III"],
        ["kappa_quadratic", "kappa"],
    ),
}
"""Name -> settings, columns of the label and the prediction, some metrics."""


@pytest.fixture
def labelled(cohort: Path) -> Path:  # noqa: F811
    """The cohort with a column for every task; slides of odd numbers have one patch that tells."""
    table = pd.read_csv(cohort / "labels.csv")
    k = np.arange(len(table))
    table["case"] = [f"TCGA-{('AA', 'BB')[n // 2 % 2]}-{n:04d}" for n in k]
    table["er"], table["pr"] = k % 2, 1 - k % 2
    table["number"] = 100 + 10.5 * (k % 2) + k / 100
    table["months"] = np.where(k % 2, 3, 30) + k / 2
    table["status"] = (k % 5 != 0).astype(int)
    table["vital"] = np.where(k % 5 != 0, "dead", "alive")
    table["grade"] = np.where(k % 2, "III", np.where(k % 4, "II", "I"))
    table.to_csv(cohort / "labels.csv", index=False)
    return cohort


def run(folder: Path, monkeypatch, capsys, name: str, *more: str) -> tuple[int, str]:
    line = arguments(folder, f"task.name={name.split()[0]}", *TASKS[name][0], *more)
    return call(train.main, monkeypatch, capsys, *line)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_runs_from_its_columns_to_its_metrics_and_again(labelled, monkeypatch, capsys, name):
    _, columns, metrics = TASKS[name]
    code, message = run(labelled, monkeypatch, capsys, name)
    assert code == 0, message
    folder = labelled / "run"
    table = pd.read_csv(folder / "predictions.csv")
    head = ["case", "slide", "split"]
    assert list(table) == [*head, *columns, "attention_entropy"]
    assert len(table) == 8
    assert table[columns].notna().all().all()
    report = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) <= report["test"]["ema"].keys()
    assert report["test"]["ema"][metrics[0]]["value"] is not None
    assert {c: (v["slides"], v["cases"]) for c, v in report["test"]["centres"].items()} == {
        "AA": (2, 2),
        "BB": (2, 2),
    }
    assert json.loads((folder / "task.json").read_text()) or name == "multilabel"
    assert call(evaluate.main, monkeypatch, capsys, folder)[0] == 0
    for file in ("metrics.json", "predictions.csv"):
        assert (folder / file).read_bytes() == (folder / "evaluation" / file).read_bytes()
    first, again = (read_predictions(at, "test") for at in (folder, folder / "evaluation"))
    np.testing.assert_array_equal(first.predicted, again.predicted)
    assert first.cases_and_labels == again.cases_and_labels


def test_coxs_baseline_hazard_is_that_of_the_training_cases_by_the_judged_weights(
    labelled, monkeypatch, capsys
):
    assert run(labelled, monkeypatch, capsys, "survival cox", "select.weights=model")[0] == 0
    folder = labelled / "run"
    saved = json.loads((folder / "task.json").read_text())
    [(retained, known)] = saved["baselines"].items()
    assert retained == "model"
    result = Baseline(np.array(known["times"]), np.array(known["log_hazard"]))
    table = read_predictions(folder, "test").predicted
    before = np.nextafter(saved["edges"], 0)
    expected = np.exp(-np.exp(result(before) + table[:, :1]))
    np.testing.assert_allclose(table[:, 1:], expected, rtol=1e-4)
    report = json.loads((folder / "metrics.json").read_text())["test"]
    assert report["ema"]["integrated_brier"]["value"] is None
    assert report["model"]["integrated_brier"]["value"] is not None
    # On a table where the training cases are those of the test, their risks are told: the hazard is of
    # these, and stays that of the run.
    cases = pd.read_csv(labelled / "labels.csv")
    cases["split"] = cases["split"].map({"train": "test", "test": "train", "val": "val"})
    cases.to_csv(labelled / "swapped.csv", index=False)
    again = f"data.labels={labelled}/swapped.csv"
    assert call(evaluate.main, monkeypatch, capsys, folder, again)[0] == 0
    output = pd.read_csv(folder / "evaluation" / "predictions.csv").query("split == 'test'")
    fitted = Baseline.fit(
        output["risk"].to_numpy(),
        output["time"].to_numpy(),
        output["event"] == 1,
        np.ones(len(output)),
    )
    np.testing.assert_allclose(fitted.log_hazard, result.log_hazard, rtol=1e-6)
    expected = np.exp(-np.exp(result(before) + output[["risk"]].to_numpy()))
    np.testing.assert_allclose(output.filter(like="survival"), expected, rtol=1e-4)


def test_evaluation_and_resuming_go_by_what_the_run_saved_of_its_training(
    labelled, monkeypatch, capsys
):
    assert run(labelled, monkeypatch, capsys, "regression")[0] == 0
    folder = labelled / "run"
    saved = json.loads((folder / "task.json").read_text())
    table = pd.read_csv(labelled / "labels.csv")
    assert saved["mean"] == pytest.approx(table["number"][:8].mean())  # of the training slides
    table.loc[:7, "number"] *= 3
    table.to_csv(labelled / "labels.csv", index=False)
    (folder / "task.json").write_text(json.dumps(saved | {"mean": saved["mean"] + 1000}))
    assert call(evaluate.main, monkeypatch, capsys, folder)[0] == 0
    before = pd.read_csv(folder / "predictions.csv")["predicted"]
    after = pd.read_csv(folder / "evaluation" / "predictions.csv")["predicted"]
    np.testing.assert_allclose(after, before + 1000, rtol=1e-6)
    (folder / "task.json").write_text("{}")
    for main, line in ((evaluate.main, (folder,)), (train.main, ("--resume", folder))):
        code, message = call(main, monkeypatch, capsys, *line)
        assert code == 2
        assert "task.json does not fit the task 'regression' of the settings" in message
    (folder / "task.json").unlink()
    code, message = call(evaluate.main, monkeypatch, capsys, folder)
    assert code == 2
    assert "has no task.json" in message


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "survival",
            ["task.event=''"],
            "task.event is missing: which code of column 'status' is an observed event",
        ),
        (
            "survival",
            ["task.event=2"],
            "task.censored is missing, and cannot be inferred from the code '2'",
        ),
        ("survival", ["task.event=2", "task.censored=0"], "is neither task.event ('2')"),
        ("survival", ["task.event_column=vital"], "'dead' in column 'vital' is neither"),
        ("survival", ["task.time_column=er"], "'0' in column 'er' is not a time"),
        ("survival cox", ["optim.bags=1"], "optim.bags must be 2 or more, found 1"),
        ("survival cox", ["head.name=dtfd"], "compares all bags of an update"),
        ("regression", ["task.column=grade"], "'I' in column 'grade' is not a number"),
        ("multilabel", ["task.labels=[er,split]"], "neither task.positive ('1') nor"),
        ("grading", ["task.classes=[I,II,III,IV]", "task.class_weights=balanced"], "of class IV"),
    ],
)
def test_what_cannot_be_learned_is_one_message(labelled, monkeypatch, capsys, name, more, message):
    code, result = run(labelled, monkeypatch, capsys, name, *more)
    assert code == 2, result
    assert message in result
    assert "Traceback" not in result


SETS = {"whas500": (load_whas500, "fstat", "lenfol"), "gbsg2": (load_gbsg2, "cens", "time")}


@pytest.fixture(scope="module", params=SETS)
def tabular(request, tmp_path_factory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A cohort of one row a bag; risks and curves of scikit-survival's Cox model for its test cases."""
    load, event, time = SETS[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw, outcome = load()
        numbers = OneHotEncoder().fit_transform(raw).astype(float)
        split = np.random.default_rng(0).permutation(len(raw)) % 5  # 0: test, 1: val
        train_rows = split > 1
        numbers = (numbers - numbers[train_rows].mean()) / numbers[train_rows].std()
        model = CoxPHSurvivalAnalysis().fit(numbers[train_rows], outcome[train_rows])
        risk = model.predict(numbers[split == 0])
        curves = model.predict_survival_function(numbers[split == 0])
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "rows").mkdir()
    names = [f"p{k:03d}" for k in range(len(raw))]
    for name, row in zip(names, numbers.to_numpy(np.float32), strict=True):
        np.save(folder / "rows" / f"{name}.npy", row[None])
    words = np.array(["test", "val", "train", "train", "train"])[split]
    columns = {"case": names, "slide": names, "split": words}
    columns |= {"months": outcome[time], "status": outcome[event].astype(int)}
    pd.DataFrame(columns).to_csv(folder / "labels.csv", index=False)
    (folder / "cohort.yaml").write_text(
        f"data: {{labels: {folder}/labels.csv, features: [{folder}/rows], stores: [none.lmdb]}}\n"
        "task: {name: survival, event: 1, event_column: status, time_column: months}\n"
    )
    return folder, risk, curves


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cox", "nll"])
def test_tabular_bags_reach_the_c_index_and_brier_score_of_scikit_survivals_cox_model(
    tabular, loss, monkeypatch, capsys, record_property
):
    folder, risk, curves = tabular
    out = folder / loss
    line = ["--datasets", f"{folder}/cohort.yaml", "--model", "mean", "head.embed_dim=null"]
    # Hazards begin at 1/2, far from the 1/10 there are: at a rate of 0.02 cases are ordered as well, but
    # the chances of nll are still too low after these updates (whas500: a Brier score of 0.19, not 0.14).
    line += ["optim.epochs=50", "optim.bags=100", "optim.lr=0.1", "optim.ema=0", "run.heatmaps=0"]
    line += ["select.every=50", "engine.device=cpu", "run.bootstrap=10", f"run.out={out}"]
    code, message = call(train.main, monkeypatch, capsys, *line, f"task.loss={loss}")
    assert code == 0, message
    table = pd.read_csv(folder / "labels.csv")
    table = table[table["split"] == "test"].reset_index(drop=True)
    selected = table["months"].to_numpy(float), table["status"].to_numpy() == 1
    reference = confidence_interval(c_index(risk, *selected, case_weights(table["case"], 2000, 0)))
    result = json.loads((out / "metrics.json").read_text())["test"]["model"]
    actual = result["c_index"]["value"]
    for name, value in (("actual", actual), ("reference", reference)):
        record_property(name, value)
    print(folder.name, loss, actual, reference)
    assert reference["low"] < actual < reference["high"]
    assert actual > reference["value"] - 0.03
    state = json.loads((out / "task.json").read_text())
    times, fitted = np.nextafter(state["edges"], 0), state["censoring"]
    expected = integrated_brier(
        np.stack([curve(times) for curve in curves]),
        *selected,
        np.ones((1, len(table))),
        times=times,
        censoring=Censoring(np.array(fitted["times"]), np.array(fitted["chance"])),
    )[0]
    print(folder.name, loss, "integrated Brier score", result["integrated_brier"], expected)
    assert abs(result["integrated_brier"]["value"] - expected) < 0.02
