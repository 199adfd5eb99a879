"""Results centre by centre: by the table's column, else by TCGA barcodes; from settings to files."""

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


def test_the_tables_centres_come_before_those_of_barcodes():
    assert centres_of(predictions("abab")) == list("abab")
    assert centres_of(predictions("abab", case="TCGA-A{}-0000")) == list("abab")
    assert centres_of(predictions([""] * 3, case="TCGA-A{}-0000")) == ["A0", "A1", "A2"]


def test_slides_whose_centre_the_table_does_not_name_are_by_themselves():
    assert centres_of(predictions(["a", "", "b"])) == ["a", "unknown", "b"]
    assert centres_of(predictions(["a", "", ""], case="TCGA-A{}-0000"))[1:] == ["unknown"] * 2


@pytest.mark.parametrize("centres", [["a", "a"], ["", ""], []])
def test_one_centre_or_none_is_no_result_by_centre(centres):
    assert centres_of(predictions(centres)) == []


def test_centres_are_judged_under_the_resamples_of_the_whole_which_are_drawn_once(monkeypatch):
    found, drawn = predictions(list("aabb") * 5), []

    def count(*given):
        drawn.append(given)
        return original(*given)

    original = evaluate.case_weights
    monkeypatch.setattr(evaluate, "case_weights", count)
    whole, by_centre = score_centres(found, TASK, centres_of(found), draws=20)
    assert len(drawn) == 1
    assert whole == score(found, TASK, draws=20)
    assert {name: (c["slides"], c["cases"]) for name, c in by_centre.items()} == {
        "a": (10, 10),
        "b": (10, 10),
    }
    of_one = original([p.case for p in found], 20, 0)[:, [k for k in range(20) if k % 4 < 2]]
    own = [p for p in found if p.centre == "a"]
    values = TASK.metrics(
        np.array([p.values for p in own]), np.array([p.target for p in own]), of_one
    )
    assert by_centre["a"]["accuracy"] == confidence_interval(values["accuracy"])
    assert score_centres(found, TASK, [], draws=20) == (whole, {})


def test_the_table_of_predictions_has_a_column_of_centres_where_one_is_known(tmp_path):
    for centres, there in ((["a", ""], True), (["", ""], False)):
        write_predictions(predictions(centres), TASK, tmp_path / "p.csv")
        table = pd.read_csv(tmp_path / "p.csv", dtype=str, keep_default_na=False)
        assert list(table)[:4] == ["case", "slide", "split", "centre" if there else "label"]
        assert not there or list(table["centre"]) == centres


def test_a_run_tells_its_results_for_each_centre_of_the_table(cohort, monkeypatch, capsys):
    table = pd.read_csv(cohort / "labels.csv")
    table["hospital"] = [f"h{k // 2 % 2}" for k in range(len(table))]
    table.to_csv(cohort / "labels.csv", index=False)
    line = arguments(cohort, "data.columns.centre=hospital", "optim.epochs=1")
    code, said = call(train.main, monkeypatch, capsys, *line)
    assert code == 0, said
    report = json.loads((cohort / "run" / "metrics.json").read_text())
    for split in ("val", "test"):
        assert {c: v["slides"] for c, v in report[split]["centres"].items()} == {"h0": 2, "h1": 2}
    found = pd.read_csv(cohort / "run" / "predictions.csv").set_index("slide")["centre"]
    assert found.to_dict() == table.set_index("slide")["hospital"][found.index].to_dict()
