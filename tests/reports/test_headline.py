"""The line and the table that end a run."""

from __future__ import annotations

from e2e.reports.evaluate import describe_epoch, headline, main_metrics, metric_table
from e2e.tasks.base import TASKS

INTERVAL = {"value": 0.9, "low": 0.8, "high": 0.95}


def report(**changes: object) -> dict[str, object]:
    metrics = dict.fromkeys(("auc", "accuracy", "balanced_accuracy", "f1_macro"), INTERVAL)
    of_split = {"slides": 12, "cases": 7, "model": metrics, "ema": metrics}
    facts = {"epoch": 3, "selected_weights": "ema", "chosen_on": "val", "is_selected": True}
    return {**facts, "val": of_split, "test": of_split, **changes}


def binary():
    return TASKS.build("classification", classes=["no", "yes"])


def test_the_headline_is_the_selected_metric_on_test_with_interval_and_numbers():
    assert headline(report(), binary()) == (
        "test: auc 0.900 [0.800, 0.950] (12 slides of 7 cases; epoch 3, selected on val by the ema weights)"
    )


def test_without_test_slides_it_is_that_of_validation():
    without = report()
    del without["test"]
    assert headline(without, binary()).startswith("val: auc 0.900")
    del without["val"]
    assert headline(without, binary()) == "there are no validation or test slides to evaluate"


def test_an_epoch_that_no_metric_selected_is_called_the_last_one():
    said = describe_epoch(report(is_selected=False))
    assert said == "epoch 3, the last one: the validation metric was never defined"


def test_the_table_has_the_main_metrics_of_the_selected_weights_alone():
    header, rows = metric_table(report(), main_metrics(binary()))
    assert header == ["metric", "val", "test"]
    names = [name for name, *_ in rows]
    assert names == ["auc", "balanced_accuracy", "accuracy", "f1_macro"]
    assert rows[0] == ["auc", "0.900 [0.800, 0.950]", "0.900 [0.800, 0.950]"]
