"""Metrics against scikit-learn, intervals against a plain loop over cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from e2e.cohort.folds import tcga_sites
from e2e.errors import UserError
from e2e.metrics.bootstrap import bootstrap_p, by_group, case_weights, confidence_interval, delong
from e2e.metrics.regression import regression_metrics
from e2e.metrics.values import (
    accuracy,
    auc,
    auc_macro,
    average_precision,
    balanced_accuracy,
    brier,
    classification_metrics,
    confusion,
    ece,
    f1_macro,
    kappa,
    log_loss,
    multilabel_metrics,
    precision_macro,
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
def test_auc_equals_scikit_learn(seed, ties):
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
def test_macro_auc_equals_scikit_learn(classes):
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
def test_metrics_of_the_confusion_matrix_equal_scikit_learn(classes, seed):
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
        (precision_macro, sk.precision_score, {"average": "macro", "zero_division": 0}),
        (lambda t: kappa(t, 0), sk.cohen_kappa_score, {}),
        (lambda t: kappa(t, 1), sk.cohen_kappa_score, {"weights": "linear"}),
        (lambda t: kappa(t, 2), sk.cohen_kappa_score, {"weights": "quadratic"}),
    ]
    for metric, reference, options in pairs:
        expected = [reference(labels, predicted, sample_weight=w, **options) for w in weights]
        np.testing.assert_allclose(metric(table), expected, err_msg=str(reference), **EXACT)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_a_class_that_is_only_predicted_counts_as_in_scikit_learn():
    labels, predicted = np.array([0, 0, 1, 1, 3]), np.array([0, 2, 1, 1, 3])
    table = confusion(predicted, labels, 5, np.ones((1, 5)))
    assert f1_macro(table).tolist() == [
        pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    ]
    expected = sk.balanced_accuracy_score(labels, predicted)
    assert balanced_accuracy(table).tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize("classes", [2, 5])
def test_log_loss_equals_scikit_learn(classes):
    probabilities, labels, weights = bags(2, classes)
    expected = [sk.log_loss(labels, probabilities, sample_weight=row) for row in weights]
    np.testing.assert_allclose(log_loss(probabilities, labels, weights), expected, **EXACT)


def test_log_loss_of_a_confident_error_is_finite():
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
    assert values.pop("brier").tolist() == [pytest.approx(0.02**2 + 2 * 0.01**2)]
    assert values.pop("ece").tolist() == [pytest.approx(0.02)]
    assert {name: float(value[0]) for name, value in values.items()} == dict.fromkeys(values, 1.0)
    assert set(values) == {
        "auc_macro_ovr",
        "ap_macro_ovr",
        "accuracy",
        "balanced_accuracy",
        "f1_macro",
        "precision_macro",
        "recall_macro",
        "kappa",
        "kappa_linear",
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


def test_exactly_the_undefined_metrics_are_nan():
    probabilities, labels = np.array([[0.2, 0.5, 0.3], [0.5, 0.3, 0.2]]), np.array([0, 0])
    values = classification_metrics(probabilities, labels, np.ones((1, 2)))
    undefined = {name for name, value in values.items() if np.isnan(value).any()}
    assert undefined == {"auc_macro_ovr", "ap_macro_ovr"}  # no positives at all of two classes
    assert values["balanced_accuracy"].tolist() == [0.5]  # over the one class that is present
    # Only one class, always predicted: chance cannot disagree.
    table = confusion(np.array([1, 1]), np.array([1, 1]), 3, np.ones((1, 2)))
    assert np.isnan(kappa(table, 0)).all()
    assert np.isnan(kappa(table, 2)).all()
    assert f1_macro(table).tolist() == [1.0]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_average_precision_equals_scikit_learn(seed, ties):
    probabilities, labels, weights = bags(seed, 2, ties=ties)
    score = np.round(probabilities[:, 1], 1) if ties else probabilities[:, 1]
    expected = [sk.average_precision_score(labels, score, sample_weight=row) for row in weights]
    np.testing.assert_allclose(average_precision(score, labels == 1, weights), expected, **EXACT)


def test_average_precision_by_hand():
    # Positives first and third of four: precision 1 at recall 1/2, 2/3 at recall 1.
    score, positive = np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False])
    assert average_precision(score, positive, np.ones((1, 4))).tolist() == [
        pytest.approx((1 + 2 / 3) / 2)
    ]


def test_metrics_of_the_positive_class_equal_scikit_learn():
    probabilities, labels, weights = bags(4, 2)
    values = classification_metrics(probabilities, labels, weights)
    predicted = probabilities.argmax(axis=1)
    for name, reference in [
        ("f1", sk.f1_score),
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
    ]:
        expected = [reference(labels, predicted, sample_weight=row) for row in weights]
        np.testing.assert_allclose(values[name], expected, err_msg=name, **EXACT)


@pytest.mark.parametrize("classes", [2, 4])
def test_brier_score_equals_scikit_learn(classes):
    probabilities, labels, weights = bags(3, classes)
    expected = [sk.brier_score_loss(labels, probabilities, sample_weight=row) for row in weights]
    np.testing.assert_allclose(brier(probabilities, labels, weights), expected, **EXACT)


def test_calibration_error_by_hand():
    # Four bins. 0.6 and 0.7 share (0.5, 0.75]: one of two correct, so |1/2 - 0.65|. 0.75 is its upper
    # edge: with 0.75 right, three bags: accuracy 2/3, confidence 2.05 / 3. 0.9 wrong: 0.9.
    sure = np.array([0.6, 0.7, 0.75, 0.9])
    probabilities, labels = np.c_[1 - sure, sure], np.array([1, 0, 1, 0])
    errors = ece(probabilities, labels, np.array([[1.0, 1, 1, 1], [1, 0, 0, 1]]), bins=4)
    np.testing.assert_allclose(errors, [(abs(2 - 2.05) + 0.9) / 4, (0.4 + 0.9) / 2])


def test_a_resample_without_any_bag_has_no_metrics():
    probabilities, labels, _ = bags(0, 2)
    values = classification_metrics(probabilities, labels, np.zeros((1, 60)))
    assert all(np.isnan(value).all() for value in values.values())


def test_one_class_has_no_auc_and_no_average_precision():
    score, once = np.array([0.1, 0.9]), np.ones((1, 2))
    for positive in (np.array([True, True]), np.array([False, False])):
        assert np.isnan(auc(score, positive, once)).all()
        assert np.isnan(average_precision(score, positive, once)).all()
    mixed = np.array([True, False])
    assert np.isnan(auc(np.array([np.nan, 0.5]), mixed, once)).all()  # a score that is NaN
    never = classification_metrics(np.array([[0.9, 0.1]] * 2), np.array([0, 1]), once)
    assert np.isnan(never["precision"]).all()  # nothing is predicted positive
    assert never["recall"].tolist() == [0.0]


binary = st.lists(
    st.tuples(st.integers(0, 6), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30
)


@settings(deadline=None)
@given(binary, st.randoms(use_true_random=False))
def test_values_depend_on_the_order_of_scores_not_of_bags_and_weight_two_is_two_bags(rows, random):
    score, positive, weight = (np.array(column) for column in zip(*rows, strict=True))
    weights = weight[None].astype(np.float64)
    order = np.array(random.sample(range(len(rows)), len(rows)))
    for metric in (auc, average_precision):
        expected = metric(score / 7, positive, weights)
        for actual in (
            metric(np.exp(score) - 50, positive, weights),
            metric(score[order] / 7, positive[order], weights[:, order]),
            metric(
                np.repeat(score, weight) / 7,
                np.repeat(positive, weight),
                np.ones((1, weight.sum())),
            ),
        ):
            np.testing.assert_allclose(actual, expected, **EXACT)
    backwards = auc(-score / 7, positive, weights)
    np.testing.assert_allclose(backwards, 1 - auc(score / 7, positive, weights), **EXACT)


# --- multilabel classification and regression ---


def test_each_label_is_evaluated_on_the_bags_that_have_it():
    rng = np.random.default_rng(0)
    probabilities, targets = rng.random((50, 3)), (rng.random((50, 3)) < 0.4).astype(float)
    targets[:20, 1] = np.nan
    targets[:, 2] = 1.0
    weights = np.vstack([np.ones(50), rng.integers(1, 4, 50)]).astype(np.float64)
    names = ["er", "pr", "her2"]
    values = multilabel_metrics(probabilities, targets, weights, names=names)
    for name, rows, column in (("er", slice(0, 50), 0), ("pr", slice(20, 50), 1)):
        truth, score = targets[rows, column], probabilities[rows, column]
        for row, weight in enumerate(weights[:, rows]):
            options = {"sample_weight": weight}
            expected = sk.roc_auc_score(truth, score, **options)
            assert values[f"auc_{name}"][row] == pytest.approx(expected)
            expected = sk.average_precision_score(truth, score, **options)
            assert values[f"ap_{name}"][row] == pytest.approx(expected)
            expected = sk.f1_score(truth, score > 0.5, **options)
            assert values[f"f1_{name}"][row] == pytest.approx(expected)
    assert np.isnan(values["auc_her2"]).all()  # one class
    assert np.isnan(values["auc_macro"]).all()
    both = multilabel_metrics(probabilities[:, :2], targets[:, :2], weights, names=names[:2])
    np.testing.assert_allclose(both["auc_macro"], (values["auc_er"] + values["auc_pr"]) / 2)
    unknown = multilabel_metrics(
        probabilities[:, :1], np.full((50, 1), np.nan), weights, names=["er"]
    )
    assert all(np.isnan(value).all() for value in unknown.values())
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        multilabel_metrics(probabilities, 2 * targets, weights, names=names)


@pytest.mark.parametrize("ties", [False, True])
def test_regression_metrics_equal_scipy_and_scikit_learn(ties):
    rng = np.random.default_rng(1)
    x, y = rng.normal(5, 2, (2, 40))
    y += x
    x, y = (np.round(x), np.round(y)) if ties else (x, y)
    weights = np.vstack([np.ones(40), rng.integers(0, 4, (3, 40))]).astype(np.float64)
    values = regression_metrics(np.r_[x, 9], np.r_[y, np.nan], np.c_[weights, np.ones(4)])
    for row, weight in enumerate(weights):
        a, b = (np.repeat(each, weight.astype(int)) for each in (x, y))
        expected = {
            "mae": sk.mean_absolute_error(b, a),
            "rmse": sk.root_mean_squared_error(b, a),
            "r2": sk.r2_score(b, a),
            "pearson": stats.pearsonr(a, b).statistic,
            "spearman": stats.spearmanr(a, b).statistic,
        }
        assert {k: v[row] for k, v in values.items()} == pytest.approx(expected, rel=1e-10)


def test_constant_numbers_have_no_correlation_and_constant_targets_no_r2():
    x, y = np.array([0.1, 0.1, 0.3]), np.array([0.2, 0.7, 0.7])
    # The first resample has equal predictions, the second equal targets, the third no bag.
    weights = np.array([[1.0, 2, 0], [0, 1, 3], [0, 0, 0]])
    values = regression_metrics(x, y, weights)
    undefined = {name: np.isnan(value).tolist() for name, value in values.items()}
    assert undefined == {
        "mae": [False, False, True],
        "rmse": [False, False, True],
        "r2": [False, True, True],
        "pearson": [True, True, True],
        "spearman": [True, True, True],
    }
    nothing = regression_metrics(np.ones(2), np.full(2, np.nan), np.ones((1, 2)))
    assert all(np.isnan(value).all() for value in nothing.values())


# --- comparison of two runs ---


def brute_force(first, second, positive):
    """AUCs and the variance of their difference, from all pairs (DeLong's eq. 4-6)."""
    kernels = []
    for score in (first, second):
        ill, well = score[positive][:, None], score[~positive][None]
        kernels.append((ill > well) + 0.5 * (ill == well))
    apart = kernels[0] - kernels[1]
    m, n = apart.shape
    of_ill = ((apart.mean(1) - apart.mean()) ** 2).sum() / (m - 1)
    of_well = ((apart.mean(0) - apart.mean()) ** 2).sum() / (n - 1)
    return kernels[0].mean(), kernels[1].mean(), of_ill / m + of_well / n


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_delongs_test_equals_the_computation_over_all_pairs(seed, ties):
    rng = np.random.default_rng(seed)
    positive = np.arange(41) % 3 == 0
    first, second = rng.normal(size=(2, 41)) + positive * [[1.0], [0.4]]
    first = np.round(first) if ties else first
    a, b, variance = brute_force(first, second, positive)
    result = delong(first, second, positive)
    assert result[:2] == pytest.approx((a, b), rel=1e-12)
    error = math.sqrt(variance)
    assert result.p == pytest.approx(math.erfc(abs(a - b) / error / math.sqrt(2)), rel=1e-9)
    span = a - b - 1.959963984540054 * error, a - b + 1.959963984540054 * error
    assert (result.low, result.high) == pytest.approx(span, rel=1e-9)
    transformed = delong(np.exp(first), second, positive)
    assert transformed == pytest.approx(result, rel=1e-12)


def test_delongs_test_by_hand():
    # Positives 3 and 2, negatives 2.5 and 1: pairs 1 1 / 0 1, AUC 3/4; the other ranks all correctly.
    # Differences of the pairs 0 0 / -1 0: rows 0, -1/2 and columns -1/2, 0, each of variance 1/8;
    # so 1/8 / 2 + 1/8 / 2 = 1/8.
    positive = np.array([True, True, False, False])
    result = delong(np.array([3.0, 2, 2.5, 1]), np.array([4.0, 3, 2, 1]), positive)
    assert result[:2] == (0.75, 1.0)
    assert result.p == pytest.approx(math.erfc(0.25 / math.sqrt(1 / 8) / math.sqrt(2)))


def test_delongs_test_is_undefined_without_variance_or_with_one_bag_of_a_class():
    positive, score = np.array([True, True, False, False]), np.array([3.0, 2, 2.5, 1])
    same = delong(score, 2 * score, positive)
    assert same[:2] == (0.75, 0.75)
    assert np.isnan(same[2:]).all()
    assert np.isnan(delong(score[1:], score[1:], positive[1:])).all()


def test_p_values_of_delong_and_bootstrap_agree_on_many_cases():
    rng = np.random.default_rng(7)
    positive = rng.random(300) < 0.5
    shared = rng.normal(size=300) + positive
    first, second = (shared + rng.normal(0, s, 300) for s in (0.5, 1.0))
    weights = case_weights([str(k) for k in range(300)], 4000, seed=0)
    apart = auc(first, positive, weights) - auc(second, positive, weights)
    result = delong(first, second, positive)
    assert 0.001 < result.p < 0.2
    assert bootstrap_p(apart) == pytest.approx(result.p, rel=0.5)
    low, high = np.percentile(apart[1:], [2.5, 97.5])
    assert (low, high) == pytest.approx((result.low, result.high), abs=0.1 * (high - low))


def test_bootstrap_p_by_hand():
    assert bootstrap_p(np.r_[0.1, np.ones(97), -1, -1]) == pytest.approx(2 * 3 / 100)
    assert bootstrap_p(np.r_[0.1, np.ones(99)]) == pytest.approx(2 / 100)  # never 0
    assert bootstrap_p(np.zeros(50)) == 1
    assert bootstrap_p(np.r_[0.1, np.nan, np.ones(9)]) == pytest.approx(2 / 10)
    assert np.isnan(bootstrap_p(np.r_[np.nan, np.ones(9)]))
    assert np.isnan(bootstrap_p(np.r_[0.1, np.nan]))


# --- centre by centre ---


def test_each_centre_has_its_own_metrics_and_one_class_has_no_auc():
    probabilities, labels, _ = bags(6, 2)
    cases = [f"TCGA-{'A2' if k < 40 else 'E9'}-{k // 2:04}" for k in range(60)]
    labels[40:] = 1
    weights = case_weights(cases, 5, seed=0)
    sites = tcga_sites(cases)
    centres = [sites[case] for case in cases]
    options = {"groups": centres, "cases": cases}
    groups = by_group(classification_metrics, probabilities, labels, weights, **options)
    assert {name: group[:2] for name, group in groups.items()} == {"A2": (40, 20), "E9": (20, 10)}
    expected = classification_metrics(probabilities[:40], labels[:40], weights[:, :40])
    for name, value in groups["A2"].values.items():
        np.testing.assert_allclose(value, expected[name], err_msg=name, **EXACT)
    assert confidence_interval(groups["E9"].values["auc"]) == {
        "value": None,
        "low": None,
        "high": None,
    }
    assert confidence_interval(groups["E9"].values["accuracy"])["value"] is not None


@pytest.mark.parametrize("case", ["A2-A0T2", "TCGA-A2", "TCGA-A2X-A0T2", ""])
def test_a_case_that_is_no_tcga_barcode_has_no_centre(case):
    with pytest.raises(
        UserError, match=r"1 case id.s. are not TCGA barcodes, so their centre is unknown"
    ):
        tcga_sites([case])


# --- intervals ---


def test_a_resample_draws_cases_not_slides():
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


def test_draws_of_a_case_are_binomial():
    counts = case_weights(["a", "b", "c", "d"], 20_000, seed=3)[1:]
    # Binomial(4, 1/4): mean 1, variance 3/4.
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=5 * np.sqrt(0.75 / 20_000))
    np.testing.assert_allclose(counts.var(axis=0), 0.75, atol=0.05)


def test_interval_equals_that_of_a_plain_loop():
    rng = np.random.default_rng(5)
    probabilities, labels, _ = bags(3, 2, count=80)
    cases = [f"case{number // 2}" for number in range(80)]
    fast = confidence_interval(
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


def test_an_interval_leaves_out_undefined_resamples():
    values = np.r_[0.7, np.arange(101) / 100, np.full(50, np.nan)]
    assert confidence_interval(values) == {
        "value": 0.7,
        "low": pytest.approx(0.025),
        "high": pytest.approx(0.975),
    }
    assert confidence_interval(np.full(4, np.nan)) == {"value": None, "low": None, "high": None}
    assert confidence_interval(np.array([0.5])) == {"value": 0.5, "low": None, "high": None}
