"""Metrics of classification, with one label or several for each bag, for many resamples at once.

Every metric takes ``weights`` of shape (R, n), which are R weightings of the n bags, and returns an array
of shape (R,). Row 0 of a bootstrap is all ones and gives the point value. A metric is NaN where it is
undefined, such as the AUC of a resample with only one class; result files show null and tables
"undefined" there. :mod:`e2e.metrics.regression` and :mod:`e2e.metrics.survival` follow the same rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
"""An array of float64; docstrings give its shape."""
Values = dict[str, Array]
"""Metric -> (R,) values, one for each weighting."""

LOWER_IS_BETTER = frozenset(
    {"log_loss", "brier", "ece", "mae", "rmse", "integrated_brier", "survival_nll"}
)
"""Metrics for which a lower value is better; for all others a higher value is."""
ECE_BINS = 15
"""Default number of bins of the expected calibration error and of the calibration figure."""


# --- ranking of positives above negatives ---


def auc(score: Array, positive: NDArray[np.bool_], weights: Array) -> Array:
    """Return the area under the ROC curve (Mann-Whitney statistic, ties count half).

    Parameters
    ----------
    score : ndarray, shape (n,)
        Higher for positives.
    positive : ndarray of bool, shape (n,)
        Whether each bag is positive.
    weights : ndarray, shape (R, n)
        Weights of the bags.

    Returns
    -------
    ndarray, shape (R,)
        NaN if there is only one class.
    """
    won = pairs_won(score, positive.astype(np.float64), ~positive, weights)
    return ratio(won, (weights @ positive) * (weights @ ~positive))


def average_precision(score: Array, positive: NDArray[np.bool_], weights: Array) -> Array:
    """Return the average precision: the sum over thresholds of precision x increase of recall.

    There is no interpolation. With positives alone it would be 1 whatever the score, and is NaN here.

    Parameters
    ----------
    score : ndarray, shape (n,)
        Higher for positives.
    positive : ndarray of bool, shape (n,)
        Whether each bag is positive.
    weights : ndarray, shape (R, n)
        Weights of the bags.

    Returns
    -------
    ndarray, shape (R,)
        NaN if there is only one class.
    """
    if not np.isfinite(score).all():
        return np.full(len(weights), np.nan)
    order = np.argsort(-score, kind="stable")
    positives = order[positive[order]]
    # How many bags score at least as high as each positive: among the positives, and among all.
    num_positives, num_bags = (
        np.searchsorted(-score[rows], -score[positives], "right") for rows in (positives, order)
    )

    def area(block: Array) -> Array:
        true_positives = running_sums(block, positives).take(num_positives, axis=1)
        called_positive = running_sums(block, order).take(num_bags, axis=1)
        precision = true_positives / np.where(called_positive > 0, called_positive, 1)
        return np.einsum("rk,rk->r", block.take(positives, axis=1), precision)

    areas = np.concatenate([area(block) for block in row_blocks(weights)])
    return ratio(areas, np.where(weights @ ~positive > 0, weights @ positive, 0))


def pairs_won(score: Array, above: Array, below: NDArray[np.bool_], weights: Array) -> Array:
    """Return the weighted number of pairs (i, j) in which i scores higher than j; ties count half.

    Parameters
    ----------
    score : ndarray, shape (n,)
        The score of each bag.
    above : ndarray, shape (n,)
        Factors a_i >= 0 of the bags that should score higher; 0 for all others.
    below : ndarray of bool, shape (n,)
        Whether a bag is one of those that should score lower.
    weights : ndarray, shape (R, n)
        Weights w of the bags.

    Returns
    -------
    ndarray, shape (R,)
        The sum of a_i w_i w_j over the pairs; NaN if a score is not finite.
    """
    if not np.isfinite(score).all():
        return np.full(len(weights), np.nan)
    high, low = np.flatnonzero(above), np.flatnonzero(below)
    low = low[np.argsort(score[low])]
    num_lower, num_lower_or_tied = (
        np.searchsorted(score[low], score[high], side) for side in ("left", "right")
    )

    def won(block: Array) -> Array:
        sums = running_sums(block, low)
        beaten = sums.take(num_lower, axis=1) + sums.take(num_lower_or_tied, axis=1)
        beaten *= block.take(high, axis=1)
        return beaten @ (above[high] / 2)

    return np.concatenate([won(block) for block in row_blocks(weights)])


def running_sums(rows: Array, columns: NDArray[np.int64]) -> Array:
    """Return the sums over the first 0, 1, ..., k of the given columns of each row.

    Parameters
    ----------
    rows : ndarray, shape (R, n)
        The rows.
    columns : ndarray of int, shape (k,)
        Columns of ``rows``, in the order of summation.

    Returns
    -------
    ndarray, shape (R, 1 + k)
    """
    sums = np.zeros((len(rows), 1 + len(columns)))
    np.cumsum(rows.take(columns, axis=1), axis=1, out=sums[:, 1:])
    return sums


def row_blocks(weights: Array, numbers: int = 1 << 14) -> Iterator[Array]:
    """Yield a few rows at a time, so that intermediate results stay in the processor's cache.

    Parameters
    ----------
    weights : ndarray, shape (R, n)
        Split along its first axis.
    numbers : int
        Maximum number of elements of a block, which has at least one row.
    """
    step = max(1, numbers // max(1, weights.shape[1]))
    return (weights[start : start + step] for start in range(0, len(weights), step))


# --- classification ---


def auc_macro(probabilities: Array, labels: NDArray[np.int64], weights: Array) -> Array:
    """Return the mean over classes of the one-versus-rest AUC; NaN if a class is absent.

    Parameters
    ----------
    probabilities : ndarray, shape (n, C)
        Class probabilities.
    labels : ndarray of int, shape (n,)
        True classes, 0 to C - 1.
    weights : ndarray, shape (R, n)
        Weights of the bags.
    """
    return _one_versus_rest(auc, probabilities, labels, weights)


def _one_versus_rest(
    metric: Callable[[Array, NDArray[np.bool_], Array], Array],
    probabilities: Array,
    labels: NDArray[np.int64],
    weights: Array,
) -> Array:
    columns = enumerate(probabilities.T)
    return np.mean([metric(column, labels == c, weights) for c, column in columns], axis=0)


def confusion(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int, weights: Array
) -> Array:
    """Return the confusion matrix of each weighting.

    Parameters
    ----------
    predicted, labels : ndarray of int, shape (n,)
        Predicted and true classes, 0 to ``classes`` - 1.
    classes : int
        Number of classes C.
    weights : ndarray, shape (R, n)
        Weights of the bags.

    Returns
    -------
    ndarray, shape (R, C, C)
        Sums of weights, by true class (axis 1) and predicted class (axis 2).
    """
    cells = np.zeros((len(labels), classes * classes))
    cells[np.arange(len(labels)), labels * classes + predicted] = 1
    return (weights @ cells).reshape(-1, classes, classes)


def accuracy(table: Array) -> Array:
    """Return the fraction of bags classified correctly, from (R, C, C) confusion matrices."""
    return ratio(np.trace(table, axis1=1, axis2=2), table.sum((1, 2)))


def recall(table: Array) -> Array:
    """Return the (R, C) recall of each class from (R, C, C) confusion matrices.

    NaN where the class is absent.
    """
    return ratio(np.diagonal(table, axis1=1, axis2=2), table.sum(2))


def precision(table: Array) -> Array:
    """Return the (R, C) precision of each class from (R, C, C) confusion matrices.

    NaN where the class is never predicted.
    """
    return ratio(np.diagonal(table, axis1=1, axis2=2), table.sum(1))


def f1(table: Array) -> Array:
    """Return the (R, C) F1 of each class: the harmonic mean of its precision and recall.

    NaN where the class is neither present nor predicted.
    """
    return ratio(2 * np.diagonal(table, axis1=1, axis2=2), table.sum(1) + table.sum(2))


def balanced_accuracy(table: Array) -> Array:
    """Return the mean recall over the classes that are present, from (R, C, C) confusion matrices."""
    return _mean_of_defined(recall(table))


def precision_macro(table: Array) -> Array:
    """Return the mean precision over the classes that are present or predicted.

    As in scikit-learn, a class that is present and never predicted counts as 0.
    """
    never_predicted = (table.sum(2) > 0) & (table.sum(1) == 0)
    return _mean_of_defined(np.where(never_predicted, 0.0, precision(table)))


def f1_macro(table: Array) -> Array:
    """Return the mean F1 over the classes that are present or predicted."""
    return _mean_of_defined(f1(table))


def kappa(table: Array, power: int) -> Array:
    """Return Cohen's kappa from (R, C, C) confusion matrices.

    Parameters
    ----------
    table : ndarray, shape (R, C, C)
        Confusion matrices.
    power : int
        Disagreement weights: 0 unweighted, 1 linear, 2 quadratic.

    Returns
    -------
    ndarray, shape (R,)
        NaN if chance alone cannot disagree, as when there is one class and it is always predicted.
    """
    classes = table.shape[1]
    distance = np.abs(np.subtract.outer(np.arange(classes), np.arange(classes)))
    cost = (distance > 0).astype(float) if power == 0 else distance.astype(float) ** power
    chance = ratio(np.einsum("ri,rj,ij->r", table.sum(2), table.sum(1), cost), table.sum((1, 2)))
    return 1 - ratio(np.einsum("rij,ij->r", table, cost), chance)


def log_loss(probabilities: Array, labels: NDArray[np.int64], weights: Array) -> Array:
    """Return the mean negative log probability of the true class; lower is better.

    Parameters
    ----------
    probabilities : ndarray, shape (n, C)
        Class probabilities, clipped below at 1e-12.
    labels : ndarray of int, shape (n,)
        True classes.
    weights : ndarray, shape (R, n)
        Weights of the bags.
    """
    of_label = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1.0)
    return ratio(weights @ -np.log(of_label), weights.sum(1))


def brier(probabilities: Array, labels: NDArray[np.int64], weights: Array) -> Array:
    """Return the Brier score, the mean squared error of the probabilities; lower is better.

    For two classes it is the error of the second alone, in [0, 1]; for more it is the sum over the
    classes, in [0, 2].

    Source: Brier 1950.

    Parameters
    ----------
    probabilities : ndarray, shape (n, C)
        Class probabilities.
    labels : ndarray of int, shape (n,)
        True classes.
    weights : ndarray, shape (R, n)
        Weights of the bags.
    """
    error = ((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(1)
    return ratio(weights @ (error / 2 if probabilities.shape[1] == 2 else error), weights.sum(1))


def ece(
    probabilities: Array, labels: NDArray[np.int64], weights: Array, *, bins: int = ECE_BINS
) -> Array:
    """Return the expected calibration error; lower is better.

    It is the mean over bins of |accuracy - confidence|, weighted by the bags in each bin; the confidence
    of a prediction is its highest probability.

    Source: Guo et al. 2017, eq. 3, arXiv:1706.04599.

    Parameters
    ----------
    probabilities : ndarray, shape (n, C)
        Class probabilities.
    labels : ndarray of int, shape (n,)
        True classes.
    weights : ndarray, shape (R, n)
        Weights of the bags.
    bins : int
        Number of bins of equal width on [0, 1]; a bin includes its upper edge.
    """
    confidence = probabilities.max(1)
    gap = (probabilities.argmax(1) == labels) - confidence
    bin_index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    cells = np.zeros((len(labels), bins))
    cells[np.arange(len(labels)), bin_index] = gap
    return ratio(np.abs(weights @ cells).sum(1), weights.sum(1))


def classification_metrics(
    probabilities: Array,
    labels: NDArray[np.int64],
    weights: Array,
    *,
    predicted: NDArray[np.int64] | None = None,
) -> Values:
    """Return all metrics of classification.

    For two classes ``auc``, ``ap``, ``f1``, ``precision`` and ``recall`` are those of the second class;
    for more, ``auc_macro_ovr`` and ``ap_macro_ovr`` are means over the classes, each against the rest.

    Parameters
    ----------
    probabilities : ndarray, shape (n, C)
        Class probabilities.
    labels : ndarray of int, shape (n,)
        True classes, 0 to C - 1.
    weights : ndarray, shape (R, n)
        Weights of the bags.
    predicted : ndarray of int, shape (n,), optional
        Predicted classes; None: the most probable ones.
    """
    classes = probabilities.shape[1]
    decision = probabilities.argmax(1) if predicted is None else predicted
    table = confusion(decision, labels, classes, weights)
    if classes == 2:
        second, is_second = probabilities[:, 1], labels == 1
        values = {
            "auc": auc(second, is_second, weights),
            "ap": average_precision(second, is_second, weights),
            "f1": f1(table)[:, 1],
            "precision": precision(table)[:, 1],
            "recall": recall(table)[:, 1],
        }
    else:
        values = {
            "auc_macro_ovr": auc_macro(probabilities, labels, weights),
            "ap_macro_ovr": _one_versus_rest(average_precision, probabilities, labels, weights),
        }
    return values | {
        "accuracy": accuracy(table),
        "balanced_accuracy": balanced_accuracy(table),
        "f1_macro": f1_macro(table),
        "precision_macro": precision_macro(table),
        "recall_macro": balanced_accuracy(table),
        "kappa": kappa(table, 0),
        "kappa_linear": kappa(table, 1),
        "kappa_quadratic": kappa(table, 2),
        "log_loss": log_loss(probabilities, labels, weights),
        "brier": brier(probabilities, labels, weights),
        "ece": ece(probabilities, labels, weights),
    }


# --- multilabel classification ---


def multilabel_metrics(
    probabilities: Array, targets: Array, weights: Array, *, names: Sequence[str]
) -> Values:
    """Return AUC, AP and F1 (at probability 0.5) of each label, their means, and the log loss.

    Parameters
    ----------
    probabilities : ndarray, shape (n, L)
        Probability of each label.
    targets : ndarray, shape (n, L)
        0 or 1; NaN where the label is missing, and then it enters no metric.
    weights : ndarray, shape (R, n)
        Weights of the bags.
    names : sequence of str, length L
        Names of the labels.

    Returns
    -------
    dict
        ``auc_<name>``, ``ap_<name>`` and ``f1_<name>`` of each label; ``auc_macro`` and so on, NaN where
        the value of one label is; ``log_loss``, the mean over all labels that are not missing.

    Raises
    ------
    ValueError
        A target is neither 0, 1 nor NaN.
    """
    of_labels: dict[str, list[Array]] = {"auc": [], "ap": [], "f1": []}
    for score, target in zip(probabilities.T, targets.T, strict=True):
        is_labelled = np.isfinite(target)
        score, positive = score[is_labelled], flags(target[is_labelled])
        label_weights = weights.compress(is_labelled, axis=1)
        predicted = (score > 0.5).astype(np.int64)
        table = confusion(predicted, positive.astype(np.int64), 2, label_weights)
        of_labels["auc"].append(auc(score, positive, label_weights))
        of_labels["ap"].append(average_precision(score, positive, label_weights))
        of_labels["f1"].append(f1(table)[:, 1])
    values = {f"{metric}_macro": np.mean(each, axis=0) for metric, each in of_labels.items()}
    for metric, each in of_labels.items():
        values |= {f"{metric}_{name}": value for name, value in zip(names, each, strict=True)}
    is_labelled = np.isfinite(targets)
    of_target = np.clip(np.where(targets == 1, probabilities, 1 - probabilities), 1e-12, 1.0)
    losses = np.where(is_labelled, -np.log(of_target), 0).sum(1)
    return values | {"log_loss": ratio(weights @ losses, weights @ is_labelled.sum(1))}


# --- arithmetic ---


def ratio(above: Array, below: Array) -> Array:
    """Return ``above / below``, NaN where ``below`` is 0."""
    return above / np.where(below > 0, below, np.nan)


def _mean_of_defined(values: Array) -> Array:
    """(R, C) -> (R,) mean of the values that are not NaN; NaN if all are."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(1), defined.sum(1))


def flags(values: Array) -> NDArray[np.bool_]:
    """Return True where a value is 1 and False where it is 0.

    Raises
    ------
    ValueError
        A value is neither 0 nor 1; other codes are not interpreted.
    """
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"neither 0 nor 1: {values[~np.isin(values, (0, 1))][:5].tolist()}")
    return values == 1
