"""Figures: their numbers agree with the metrics, and each is written as an image and a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.cbook import STEP_LOOKUP_MAP
from PIL import Image

from e2e.metrics.figures import (
    Curves,
    Matrix,
    calibration,
    classification_figures,
    regression_figures,
    survival_figures,
    write_figures,
)
from e2e.metrics.values import auc, average_precision, ece


def drawn(classes: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += 1
    shares = np.exp(logits)
    return shares / shares.sum(1, keepdims=True), labels


def by_name(pictures) -> dict:
    return {picture.name: picture for picture in pictures}


@pytest.mark.parametrize("classes", [2, 4])
def test_the_area_under_each_roc_is_the_auc(classes):
    shares, labels = drawn(classes)
    names = [f"c{k}" for k in range(classes)]
    lines = by_name(classification_figures(shares, labels, names, shares.argmax(1)))["roc"].lines
    assert list(lines) == (names if classes > 2 else names[1:])
    for name, (x, y) in lines.items():
        k = names.index(name)
        want = auc(shares[:, k], labels == k, np.ones((1, len(labels))))[0]
        assert np.trapezoid(y, x) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_area_under_each_precision_line_as_drawn_is_the_average_precision(classes):
    shares, labels = drawn(classes)
    names = [f"c{k}" for k in range(classes)]
    picture = by_name(classification_figures(shares, labels, names, shares.argmax(1)))[
        "precision_recall"
    ]
    for line in picture.draw().axes[0].lines:
        k = names.index(str(line.get_label()).strip())
        path = STEP_LOOKUP_MAP[line.get_drawstyle()]
        x, y = path(*line.get_data())
        want = average_precision(shares[:, k], labels == k, np.ones((1, len(labels))))[0]
        assert abs(np.trapezoid(y, x)) == pytest.approx(want, abs=1e-12)


def test_calibration_gaps_weighted_by_slides_equal_the_expected_calibration_error():
    shares, labels = drawn(3)
    curve = calibration(shares.max(1), shares.argmax(1) == labels)
    [(confidence, accuracy)] = curve.lines.values()
    slides = curve.extra_columns["slides"]
    assert slides.sum() == len(labels)
    gap = (slides * abs(confidence - accuracy)).sum() / slides.sum()
    assert gap == pytest.approx(ece(shares, labels, np.ones((1, len(labels))))[0], abs=1e-12)


def test_confusion_has_labels_in_rows_and_predictions_in_columns():
    shares = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    counts = by_name(
        classification_figures(shares, np.array([0, 0, 1]), ["a", "b"], shares.argmax(1))
    )["confusion"].counts
    assert counts.tolist() == [[1, 1], [0, 1]]


def test_an_absent_class_has_no_line_and_a_single_class_no_roc():
    shares, labels = drawn(3)
    names, called = ["a", "b", "c"], shares.argmax(1)
    some, one = labels < 2, labels == 0
    pictures = by_name(classification_figures(shares[some], labels[some], names, called[some]))
    assert list(pictures["roc"].lines) == ["a", "b"]
    alone = by_name(classification_figures(shares[one], labels[one], names, called[one]))
    assert set(alone) == {"calibration", "confusion"}


def test_each_figure_is_a_png_with_a_csv_of_its_points(tmp_path: Path):
    line = (np.array([0.0, 0.5]), np.array([1.0, 0.25]))
    pictures = [
        Curves("steps", "t", "months", "alive", {"low": line, "high": line}, steps=True),
        Matrix("confusion", "t", ["a", "b"], np.array([[3, 1], [0, 2]])),
    ]
    write_figures(pictures, tmp_path / "figures")
    for name in ("steps", "confusion"):
        with Image.open(tmp_path / "figures" / f"{name}.png") as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 10
    table = pd.read_csv(tmp_path / "figures" / "steps.csv")
    assert table.to_dict("list") == {
        "line": ["low", "low", "high", "high"],
        "months": [0, 0.5, 0, 0.5],
        "alive": [1, 0.25, 1, 0.25],
    }
    table = pd.read_csv(tmp_path / "figures" / "confusion.csv")
    assert table.to_dict("list") == {"label": ["a", "b"], "a": [3, 0], "b": [1, 2]}


def test_a_class_may_have_any_name(tmp_path: Path):
    shares, labels = drawn(3)
    names = [
        "_other",
        "x$^$",
        "$5$",
    ]  # not of a legend, no formula, a formula: as matplotlib has it
    pictures = classification_figures(shares, labels, names, shares.argmax(1))
    write_figures(pictures, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {picture.name for picture in pictures}
    legend = by_name(pictures)["roc"].draw().axes[0].get_legend()
    assert [text.get_text().strip() for text in legend.get_texts()] == names


def test_survival_of_two_risk_groups_by_hand():
    time = np.array([1.0, 2.0, 3.0, 1.0, 4.0, 5.0])
    event = np.array([True, False, True, True, True, False])
    risk = np.array([9.0, 8.0, 7.0, 1.0, 2.0, 3.0])  # the first three are of high risk
    [curves] = survival_figures(risk, time, event)
    low, high = curves.lines.values()
    assert high[0].tolist() == [0, 1, 2, 3]
    assert high[1].tolist() == pytest.approx([1, 2 / 3, 2 / 3, 0])
    assert low[0].tolist() == [0, 1, 4, 5]
    assert low[1].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3])
    assert list(curves.lines) == ["low risk (3, 2 events)", "high risk (3, 2 events)"]


def test_log_rank_p_is_small_for_informative_risks_and_undefined_for_equal_risks():
    rng = np.random.default_rng(0)
    risk = rng.normal(size=200)
    time = rng.exponential(np.exp(-2 * risk)) + 1e-3
    event = rng.uniform(size=200) < 0.8
    informative = survival_figures(risk, time, event)[0].title
    uninformative = survival_figures(rng.normal(size=200), time, event)[0].title
    table = survival_figures(risk, time, event)[0].table()
    assert set(table["log_rank_p"].map("{:.3g}".format)) == {
        informative.removeprefix("log-rank p = ")
    }
    assert (
        float(informative.removeprefix("log-rank p = "))
        < 1e-6
        < float(uninformative.removeprefix("log-rank p = "))
    )
    assert "undefined" in survival_figures(np.zeros(200), time, event)[0].title


@pytest.mark.parametrize(
    ("time", "event"),
    [
        ([1, 2, 3, 4], [0, 0, 0, 0]),  # nobody died
        ([1, 2, 3, 4], [0, 0, 0, 1]),  # one did, after everybody else was censored
        ([3, 4, 1, 2], [0, 1, 0, 0]),  # or after everybody of the other group was
        ([5, 5, 5, 5], [1, 1, 1, 1]),  # or all at once
    ],
)
def test_a_test_set_without_informative_events_has_curves_and_no_p(tmp_path, time, event):
    curve = np.full((4, 1), 0.5)
    drawn = survival_figures(
        np.array([1.0, 2, 3, 4]),
        np.array(time, float),
        np.array(event) == 1,
        survival=curve,
        edges=(2.5,),
    )
    write_figures(drawn, tmp_path)
    assert drawn[0].title == "log-rank p undefined: no event separates the groups"
    assert {path.stem for path in tmp_path.glob("*.png")} == {"kaplan_meier", "calibration"}


def test_fractions_are_shown_from_0_to_1_whatever_the_range_of_the_lines():
    time, event = np.arange(1.0, 21), np.arange(20) < 2  # nine in ten are left at the end
    [curves] = survival_figures(np.arange(20.0), time, event)
    low, high = curves.draw().axes[0].get_ylim()
    assert low <= 0 < 1 <= high < 1.2
    [numbers] = regression_figures(np.array([40.0, 50.0]), np.array([41.0, 52.0]), "age")
    assert numbers.draw().axes[0].get_ylim()[0] > 30


def test_correctly_predicted_survival_lies_on_the_diagonal():
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.5, 4, 8000)
    time, edges = rng.exponential(scale), (0.5, 2.0)
    survival = np.exp(-np.array(edges) / scale[:, None])
    curves = by_name(survival_figures(-scale, time, time > 0, survival=survival, edges=edges))
    for predicted, observed in curves["calibration"].lines.values():
        np.testing.assert_allclose(predicted, observed, atol=0.03)
    assert np.ptp(predicted) > 0.2


def test_regression_figure_shows_predictions_against_labels():
    [picture] = regression_figures(np.array([1.0, 2.0]), np.array([0.0, 3.0]), "age")
    [(x, y)] = picture.lines.values()
    assert (x.tolist(), y.tolist()) == ([0, 3], [1, 2])
