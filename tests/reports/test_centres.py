"""Results by centre: from the column of the label table or from TCGA barcodes, down to the files."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest

from e2e.metrics.bootstrap import confidence_interval
from e2e.reports import evaluate
from e2e.reports.evaluate import centres_of, score, score_centres
from e2e.reports.predictions import Prediction, write_predictions
from e2e.tasks.base import TASKS
from launch import train
from tests.helpers.commands import call
from tests.helpers.feature_cohort import arguments
from tests.helpers.feature_cohort import cohort as cohort

TASK = TASKS.build("classification", classes=["no", "yes"])


def predictions(centres: Sequence[str], case: str = "c{}") -> list[Prediction]:
    chances = np.random.default_rng(0).uniform(size=len(centres))
    return [
        Prediction(case.format(k), f"s{k}", "test", [1 - p, p], float(k % 2), centre=centre)
        for k, (centre, p) in enumerate(zip(centres, chances, strict=True))
    ]


def test_centres_of_the_table_take_precedence_over_barcodes():
    assert centres_of(predictions("abab")) == list("abab")
    assert centres_of(predictions("abab", case="TCGA-A{}-0000")) == list("abab")
    assert centres_of(predictions([""] * 3, case="TCGA-A{}-0000")) == ["A0", "A1", "A2"]


def test_slides_without_a_centre_in_the_table_form_their_own_centre():
    assert centres_of(predictions(["a", "", "b"])) == ["a", "unknown", "b"]
    assert centres_of(predictions(["a", "", ""], case="TCGA-A{}-0000"))[1:] == ["unknown"] * 2


@pytest.mark.parametrize("centres", [["a", "a"], ["", ""], []])
def test_fewer_than_two_centres_give_no_results_by_centre(centres):
    assert centres_of(predictions(centres)) == []


def test_centres_share_the_resamples_of_all_slides_which_are_drawn_once(monkeypatch):
    all_predictions, calls = predictions(list("aabb") * 5), []

    def count(*arguments_of_call):
        calls.append(arguments_of_call)
        return original(*arguments_of_call)

    original = evaluate.case_weights
    monkeypatch.setattr(evaluate, "case_weights", count)
    overall, by_centre = score_centres(all_predictions, TASK, centres_of(all_predictions), draws=20)
    assert len(calls) == 1
    assert overall == score(all_predictions, TASK, draws=20)
    assert {name: (c["slides"], c["cases"]) for name, c in by_centre.items()} == {
        "a": (10, 10),
        "b": (10, 10),
    }
    of_one = original([p.case for p in all_predictions], 20, 0)[
        :, [k for k in range(20) if k % 4 < 2]
    ]
    of_centre = [p for p in all_predictions if p.centre == "a"]
    values = TASK.metrics(
        np.array([p.values for p in of_centre]), np.array([p.target for p in of_centre]), of_one
    )
    assert by_centre["a"]["accuracy"] == confidence_interval(values["accuracy"])
    assert score_centres(all_predictions, TASK, [], draws=20) == (overall, {})


def test_predictions_table_has_a_centre_column_if_a_centre_is_known(tmp_path):
    for centres, has_column in ((["a", ""], True), (["", ""], False)):
        write_predictions(predictions(centres), TASK, tmp_path / "p.csv")
        table = pd.read_csv(tmp_path / "p.csv", dtype=str, keep_default_na=False)
        assert list(table)[:4] == ["case", "slide", "split", "centre" if has_column else "label"]
        assert not has_column or list(table["centre"]) == centres


def test_a_run_reports_results_for_each_centre_of_the_table(cohort, monkeypatch, capsys):
    table = pd.read_csv(cohort / "labels.csv")
    table["hospital"] = [f"h{k // 2 % 2}" for k in range(len(table))]
    table.to_csv(cohort / "labels.csv", index=False)
    line = arguments(cohort, "data.columns.centre=hospital", "optim.epochs=1")
    code, output = call(train.main, monkeypatch, capsys, *line)
    assert code == 0, output
    report = json.loads((cohort / "run" / "metrics.json").read_text())
    for split in ("val", "test"):
        assert {c: v["slides"] for c, v in report[split]["centres"].items()} == {"h0": 2, "h1": 2}
    centres = pd.read_csv(cohort / "run" / "predictions.csv").set_index("slide")["centre"]
    assert centres.to_dict() == table.set_index("slide")["hospital"][centres.index].to_dict()
