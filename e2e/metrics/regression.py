"""Metrics of regression: errors, explained variance and correlations.

Arguments and results have the shapes described in :mod:`e2e.metrics.values`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from e2e.metrics.values import Array, Values, ratio, row_blocks


def regression_metrics(predicted: Array, targets: Array, weights: Array) -> Values:
    """Return MAE, RMSE, R2 and the correlations of Pearson and Spearman.

    R2 is NaN where all targets are equal; a correlation also where all predictions are.

    Parameters
    ----------
    predicted : ndarray, shape (n,)
        Predictions.
    targets : ndarray, shape (n,)
        True values; NaN where missing, and then the bag enters no metric.
    weights : ndarray, shape (R, n)
        Weights of the bags.
    """
    is_labelled = np.isfinite(targets)
    x, y = predicted[is_labelled], targets[is_labelled]
    weights = weights.compress(is_labelled, axis=1)
    total = weights.sum(1)
    squares = ratio(weights @ (x - y) ** 2, total)
    return {
        "mae": ratio(weights @ np.abs(x - y), total),
        "rmse": np.sqrt(squares),
        "r2": 1 - ratio(squares, _variance(y, weights)),
        "pearson": pearson(x, y, weights),
        "spearman": spearman(x, y, weights),
    }


def pearson(x: Array, y: Array, weights: Array) -> Array:
    """Return Pearson's correlation of (n,) numbers, for (R, n) weights; NaN where one is constant."""
    total = weights.sum(1)
    x, y = _centred(x), _centred(y)
    means = ratio(weights @ x, total) * ratio(weights @ y, total)
    spread = np.sqrt(_variance(x, weights) * _variance(y, weights))
    return ratio(ratio(weights @ (x * y), total) - means, spread)


def spearman(x: Array, y: Array, weights: Array) -> Array:
    """Return Spearman's correlation of (n,) numbers, for (R, n) weights; NaN where one is constant.

    Ties share their mean rank. A bag of weight 2 counts as two bags.
    """
    if not len(x):
        return np.full(len(weights), np.nan)
    x_order, y_order = np.argsort(x), np.argsort(y)

    def correlation(block: Array) -> Array:
        a, b = _centred_ranks(x, x_order, block), _centred_ranks(y, y_order, block)
        xx, yy, xy = (np.einsum("rn,rn->r", block * p, q) for p, q in ((a, a), (b, b), (a, b)))
        return ratio(xy, np.sqrt(xx * yy))

    return np.concatenate([correlation(block) for block in row_blocks(weights)])


def _centred_ranks(values: Array, order: NDArray[np.int64], weights: Array) -> Array:
    """(R, n) weighted ranks of (n,) values sorted by ``order``, minus their weighted mean."""
    _, starts, value_index = np.unique(values[order], return_index=True, return_inverse=True)
    sums = np.add.reduceat(weights.take(order, axis=1), starts, axis=1)
    cumulative = np.cumsum(sums, axis=1)
    ranks = np.empty_like(weights)
    ranks[:, order] = (cumulative - sums / 2 - cumulative[:, -1:] / 2).take(value_index, axis=1)
    return ranks


def _centred(values: Array) -> Array:
    return values - values.mean() if len(values) else values


def _variance(values: Array, weights: Array) -> Array:
    """(R,) variances of (n,) numbers; exactly 0 where all that have weight are equal."""
    values, total = _centred(values), weights.sum(1)
    variance = ratio(weights @ values**2, total) - ratio(weights @ values, total) ** 2
    # A tiny variance may be a rounding error: there the values themselves are compared.
    is_tiny = variance <= 1e-9 * (values**2).mean() if len(values) else variance > 0
    has_weight = weights[is_tiny] > 0
    low = np.where(has_weight, values, np.inf).min(1, initial=np.inf)
    high = np.where(has_weight, values, -np.inf).max(1, initial=-np.inf)
    variance[is_tiny] = np.where(low >= high, 0, variance[is_tiny])
    return variance
