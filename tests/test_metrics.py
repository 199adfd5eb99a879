"""Metrics against scikit-learn, intervals against a plain loop over cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from e2e.metrics import (
    accuracy,
    auc,
    auc_macro,
    balanced_accuracy,
    case_weights,
    classification_metrics,
    confusion,
    f1_macro,
    interval,
    kappa,
    log_loss,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def bags(seed: int, classes: int, count: int = 60, *, ties: bool = False):
    """Probabilities, labels with every class, and 5 rows of weights (some of them zero)."""
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(classes), rng.integers(0, classes, count - classes)]
    raw = rng.random((count, classes)) + 0.5 * np.eye(classes)[labels]
    raw = np.round(raw, 1) + 0.05 if ties else raw
    weights = np.vstack([np.ones(count), rng.random((2, count)), rng.integers(0, 4, (2, count))])
    weights[1:, :classes] += 0.5  # every class keeps some weight
    return raw / raw.sum(axis=1, keepdims=True), labels, weights.astype(np.float64)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_auc_is_scikit_learns(seed, ties):
    probabilities, labels, weights = bags(seed, 2, ties=ties)
    score = np.round(probabilities[:, 1], 1) if ties else probabilities[:, 1]
    expected = [sk.roc_auc_score(labels, score, sample_weight=row) for row in weights]
    np.testing.assert_allclose(auc(score, labels == 1, weights), expected, **EXACT)


def test_auc_by_hand():
    # Positives 0.8 and 0.5, negatives 0.5 and 0.1: of four pairs three are right, one is a tie.
    score, positive = np.array([0.8, 0.5, 0.5, 0.1]), np.array([True, True, False, False])
    # With weight 3 on the tied negative: 8 pairs; 0.8 wins 4, 0.5 ties 3 and wins 1.
    weights = np.array([[1, 1, 1, 1], [1, 1, 3, 1]], np.float64)
    assert auc(score, positive, weights).tolist() == [3.5 / 4, (4 + 1.5 + 1) / 8]


@pytest.mark.parametrize("classes", [3, 6])
def test_macro_auc_is_scikit_learns(classes):
    probabilities, labels, weights = bags(1, classes)
    expected = [
        sk.roc_auc_score(
            labels, probabilities, sample_weight=row, multi_class="ovr", average="macro"
        )
        for row in weights
    ]
    np.testing.assert_allclose(auc_macro(probabilities, labels, weights), expected, **EXACT)


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_the_confusion_table_are_scikit_learns(classes, seed):
    probabilities, labels, weights = bags(seed, classes)
    predicted = probabilities.argmax(axis=1)
    table = confusion(predicted, labels, classes, weights)
    for row, weight in enumerate(weights):
        options = {"sample_weight": weight}
        expected = sk.confusion_matrix(labels, predicted, **options)
        np.testing.assert_allclose(table[row], expected, **EXACT)
    pairs = [
        (accuracy, sk.accuracy_score, {}),
        (balanced_accuracy, sk.balanced_accuracy_score, {}),
        (f1_macro, sk.f1_score, {"average": "macro"}),
        (lambda t: kappa(t, 0), sk.cohen_kappa_score, {}),
        (lambda t: kappa(t, 1), sk.cohen_kappa_score, {"weights": "linear"}),
        (lambda t: kappa(t, 2), sk.cohen_kappa_score, {"weights": "quadratic"}),
    ]
    for ours, theirs, options in pairs:
        expected = [theirs(labels, predicted, sample_weight=w, **options) for w in weights]
        np.testing.assert_allclose(ours(table), expected, err_msg=str(theirs), **EXACT)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_a_class_that_is_only_predicted_counts_as_scikit_learn_counts_it():
    labels, predicted = np.array([0, 0, 1, 1, 3]), np.array([0, 2, 1, 1, 3])
    table = confusion(predicted, labels, 5, np.ones((1, 5)))
    assert f1_macro(table).tolist() == [
        pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    ]
    expected = sk.balanced_accuracy_score(labels, predicted)
    assert balanced_accuracy(table).tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize("classes", [2, 5])
def test_log_loss_is_scikit_learns(classes):
    probabilities, labels, weights = bags(2, classes)
    expected = [sk.log_loss(labels, probabilities, sample_weight=row) for row in weights]
    np.testing.assert_allclose(log_loss(probabilities, labels, weights), expected, **EXACT)


def test_a_certain_mistake_costs_much_and_not_infinitely_much():
    loss = log_loss(np.array([[1.0, 0.0]]), np.array([1]), np.ones((1, 1)))
    assert loss.tolist() == [pytest.approx(-math.log(1e-12))]


def test_a_kappa_by_hand():
    # Grades 0 0 1 2, predicted 0 1 1 0. Quadratic cost of the table: 1 + 4 = 5 (of 4 bags).
    # By chance, rows 2 1 1 and columns 2 2 0 over 4: (0*1*2 + ...) = 2*2*1 + 1*2*1 + 1*2*4 + 1*2*1.
    table = confusion(np.array([0, 1, 1, 0]), np.array([0, 0, 1, 2]), 3, np.ones((1, 4)))
    assert kappa(table, 2).tolist() == [pytest.approx(1 - 5 / ((4 + 2 + 8 + 2) / 4))]


def test_perfect_predictions_have_perfect_metrics():
    labels = np.arange(12) % 3
    values = classification_metrics(0.97 * np.eye(3)[labels] + 0.01, labels, np.ones((1, 12)))
    assert values.pop("log_loss").tolist() == [pytest.approx(-math.log(0.98))]
    assert {name: float(value[0]) for name, value in values.items()} == dict.fromkeys(values, 1.0)
    assert set(values) == {
        "auc_macro_ovr",
        "accuracy",
        "balanced_accuracy",
        "f1_macro",
        "kappa",
        "kappa_quadratic",
    }


def test_two_classes_have_the_auc_of_the_second():
    probabilities, labels, weights = bags(0, 2)
    values = classification_metrics(probabilities, labels, weights)
    assert next(iter(values)) == "auc"
    assert "auc_macro_ovr" not in values
    expected = sk.roc_auc_score(labels, probabilities[:, 1])
    assert values["auc"][0] == pytest.approx(expected)
    assert all(value.shape == (5,) for value in values.values())


def test_what_is_not_defined_is_nan_and_nothing_else_is():
    probabilities, labels = np.array([[0.2, 0.5, 0.3], [0.5, 0.3, 0.2]]), np.array([0, 0])
    values = classification_metrics(probabilities, labels, np.ones((1, 2)))
    undefined = {name for name, value in values.items() if np.isnan(value).any()}
    assert undefined == {"auc_macro_ovr"}  # no positives at all of two classes
    assert values["balanced_accuracy"].tolist() == [0.5]  # over the one class that is present
    # Only one class, always predicted: nothing that chance could get wrong.
    table = confusion(np.array([1, 1]), np.array([1, 1]), 3, np.ones((1, 2)))
    assert np.isnan(kappa(table, 0)).all()
    assert np.isnan(kappa(table, 2)).all()
    assert f1_macro(table).tolist() == [1.0]


# --- intervals ---


def test_a_resample_draws_cases_and_not_slides():
    cases = ["a", "b", "a", "c", "b", "a"]
    weights = case_weights(cases, 200, seed=0)
    assert weights.shape == (201, 6)
    assert weights[0].tolist() == [1] * 6
    for row in weights[1:]:
        assert row[0] == row[2] == row[5]  # a
        assert row[1] == row[4]  # b
        assert row[0] + row[1] + row[3] == 3  # three cases drawn out of three
    assert len({tuple(row) for row in weights[1:]}) == 10  # all multisets of 3 out of 3
    np.testing.assert_array_equal(weights, case_weights(cases, 200, seed=0))
    assert not np.array_equal(weights, case_weights(cases, 200, seed=1))


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30), st.integers(0, 99))
def test_every_resample_has_as_many_cases_as_there_are(cases, seed):
    weights = case_weights(cases, 20, seed)
    first = [cases.index(name) for name in sorted(set(cases))]
    assert (weights[:, first].sum(axis=1) == len(first)).all()


def test_cases_are_drawn_as_often_as_chance_has_it():
    counts = case_weights(["a", "b", "c", "d"], 20_000, seed=3)[1:]
    # Binomial(4, 1/4): mean 1, variance 3/4.
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=5 * np.sqrt(0.75 / 20_000))
    np.testing.assert_allclose(counts.var(axis=0), 0.75, atol=0.05)


def test_the_interval_is_that_of_a_plain_loop():
    rng = np.random.default_rng(5)
    probabilities, labels, _ = bags(3, 2, count=80)
    cases = [f"case{number // 2}" for number in range(80)]
    fast = interval(
        classification_metrics(probabilities, labels, case_weights(cases, 4000, seed=0))["auc"]
    )
    by_case = {name: np.flatnonzero(np.array(cases) == name) for name in set(cases)}
    names, slow = sorted(by_case), []
    for _ in range(4000):
        rows = np.concatenate([by_case[name] for name in rng.choice(names, len(names))])
        ill, well = (probabilities[rows, 1][labels[rows] == label] for label in (1, 0))
        won = (ill[:, None] > well[None]) + 0.5 * (ill[:, None] == well[None])
        slow.append(won.mean() if won.size else np.nan)
    assert fast["value"] == pytest.approx(sk.roc_auc_score(labels, probabilities[:, 1]))
    low, high = np.nanpercentile(slow, [2.5, 97.5])
    width = high - low
    assert fast["low"] == pytest.approx(low, abs=0.08 * width)
    assert fast["high"] == pytest.approx(high, abs=0.08 * width)


def test_an_interval_leaves_out_what_is_not_defined():
    values = np.r_[0.7, np.arange(101) / 100, np.full(50, np.nan)]
    assert interval(values) == {
        "value": 0.7,
        "low": pytest.approx(0.025),
        "high": pytest.approx(0.975),
    }
    assert interval(np.full(4, np.nan)) == {"value": None, "low": None, "high": None}
    assert interval(np.array([0.5])) == {"value": 0.5, "low": None, "high": None}
