"""Metrics of classification, named for what they are, with bootstrap intervals over cases.

Every function takes ``weights`` (R, n): R weightings of the n bags at once, and returns (R,).
Row 0 of a bootstrap is all ones: the point value. A metric is NaN where it is not defined, such as
an AUC of a resample with one class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def auc(score: Array, positive: NDArray[np.bool_], weights: Array) -> Array:
    """Area under the ROC curve (Mann-Whitney: ties count half)."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])
    pos = np.add.reduceat(weights[:, order] * positive[order], starts, axis=1)
    neg = np.add.reduceat(weights[:, order] * ~positive[order], starts, axis=1)
    below = np.cumsum(neg, axis=1) - neg
    pairs = pos.sum(1) * neg.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (pos * (below + neg / 2)).sum(1) / np.where(pairs > 0, pairs, np.nan)


def auc_macro(probabilities: Array, labels: NDArray[np.int64], weights: Array) -> Array:
    """Mean over classes of one-versus-rest AUC; NaN where a class is absent."""
    return np.mean(
        [auc(probabilities[:, c], labels == c, weights) for c in range(probabilities.shape[1])],
        axis=0,
    )


def confusion(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int, weights: Array
) -> Array:
    """(R, true class, predicted class) sums of weights."""
    cells = np.zeros((len(labels), classes * classes))
    cells[np.arange(len(labels)), labels * classes + predicted] = 1
    return (weights @ cells).reshape(-1, classes, classes)


def accuracy(table: Array) -> Array:
    """Share of bags classified right, from a confusion table (R,C,C)."""
    return np.trace(table, axis1=1, axis2=2) / table.sum((1, 2))


def balanced_accuracy(table: Array) -> Array:
    """Mean recall over the classes that are present."""
    return _mean_over_present(_recall(table), table.sum(2) > 0)


def f1_macro(table: Array) -> Array:
    """Mean F1 over the classes that are present or predicted."""
    hits = np.diagonal(table, axis1=1, axis2=2)
    both = table.sum(1) + table.sum(2)
    return _mean_over_present(2 * hits / np.where(both > 0, both, 1), both > 0)


def kappa(table: Array, power: int) -> Array:
    """Cohen's kappa: ``power`` 0 unweighted, 2 quadratic weights."""
    classes = table.shape[1]
    distance = np.abs(np.subtract.outer(np.arange(classes), np.arange(classes)))
    cost = (distance > 0).astype(float) if power == 0 else distance.astype(float) ** power
    total = table.sum((1, 2))
    chance = np.einsum("ri,rj,ij->r", table.sum(2), table.sum(1), cost) / total
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - np.einsum("rij,ij->r", table, cost) / np.where(chance > 0, chance, np.nan)


def classification_metrics(
    probabilities: Array, labels: NDArray[np.int64], weights: Array
) -> dict[str, Array]:
    """All of the above for (n, C) probabilities; the AUC is binary for two classes."""
    classes = probabilities.shape[1]
    table = confusion(probabilities.argmax(1), labels, classes, weights)
    values = {
        "auc_macro_ovr": auc_macro(probabilities, labels, weights),
        "accuracy": accuracy(table),
        "balanced_accuracy": balanced_accuracy(table),
        "f1_macro": f1_macro(table),
        "kappa": kappa(table, 0),
        "kappa_quadratic": kappa(table, 2),
        "log_loss": log_loss(probabilities, labels, weights),
    }
    if classes == 2:
        del values["auc_macro_ovr"]
        values = {"auc": auc(probabilities[:, 1], labels == 1, weights), **values}
    return values


def log_loss(probabilities: Array, labels: NDArray[np.int64], weights: Array) -> Array:
    """Mean -log probability of the true class; lower is better."""
    true = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1.0)
    return weights @ -np.log(true) / weights.sum(1)


def case_weights(cases: Sequence[str], draws: int, seed: int) -> Array:
    """(1 + draws, n): ones, then how often each bag's case was drawn in a resample of the cases."""
    names, which = np.unique(np.asarray(cases), return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return np.vstack([np.ones((1, len(cases))), counts[:, which]]).astype(np.float64)


def interval(values: Array) -> dict[str, float | None]:
    """Point value and 95 % percentile interval of ``[point, resample, resample, ...]``."""

    def number(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    resamples = values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(resamples, [2.5, 97.5]) if len(resamples) else (np.nan, np.nan)
    return {"value": number(values[0]), "low": number(low), "high": number(high)}


def _recall(table: Array) -> Array:
    true = table.sum(2)
    return np.diagonal(table, axis1=1, axis2=2) / np.where(true > 0, true, 1)


def _mean_over_present(values: Array, present: NDArray[np.bool_]) -> Array:
    return (values * present).sum(1) / present.sum(1)
