"""Metrics named for what they are, with bootstrap intervals over cases.

Every metric takes ``weights`` (R, n): R weightings of the n bags at once, and returns (R,).
Row 0 of a bootstrap is all ones: the point value. A metric is NaN where it is not defined, such as
an AUC of a resample with one class; files and tables say null and "undefined" there. Those of
survival are in :mod:`e2e.metrics.survival`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Values = dict[str, Array]

LOWER_IS_BETTER = frozenset(
    {"log_loss", "brier", "ece", "mae", "rmse", "integrated_brier", "survival_nll"}
)
"""Of all other metrics here more is better."""
ECE_BINS = 15


# --- of a score that ranks positives above negatives ---


def auc(score: Array, positive: NDArray[np.bool_], weights: Array) -> Array:
    """Area under the ROC curve (Mann-Whitney: ties count half); NaN with one class."""
    won = pairs_won(score, positive.astype(np.float64), ~positive, weights)
    return ratio(won, (weights @ positive) * (weights @ ~positive))


def average_precision(score: Array, positive: NDArray[np.bool_], weights: Array) -> Array:
    """Sum over thresholds of precision x gain in recall, without interpolation; NaN with one class.

    Positives alone would have 1 whatever the score: that is no merit, and not defined here.
    """
    if not np.isfinite(score).all():
        return np.full(len(weights), np.nan)
    order = np.argsort(-score, kind="stable")
    which = order[positive[order]]
    # How many score as high as each positive or higher: of the positives, and of all.
    right, called = (np.searchsorted(-score[o], -score[which], "right") for o in (which, order))

    def area(rows: Array) -> Array:
        found, taken = (running_sums(rows, o) for o in (which, order))
        found, taken = found.take(right, axis=1), taken.take(called, axis=1)
        precision = found / np.where(taken > 0, taken, 1)
        return np.einsum("rk,rk->r", rows.take(which, axis=1), precision)

    areas = np.concatenate([area(rows) for rows in row_blocks(weights)])
    return ratio(areas, np.where(weights @ ~positive > 0, weights @ positive, 0))


def pairs_won(score: Array, above: Array, below: NDArray[np.bool_], weights: Array) -> Array:
    """(R,) sum over i and j of a_i w_i w_j where i scores higher than j, half of it where they tie.

    Args:
        score: (n,); where one is not finite the result is NaN.
        above: (n,) a_i >= 0.
        below: (n,) which j are summed over.
        weights: (R, n).
    """
    if not np.isfinite(score).all():
        return np.full(len(weights), np.nan)
    high, low = np.flatnonzero(above), np.flatnonzero(below)
    low = low[np.argsort(score[low])]
    under, upto = (np.searchsorted(score[low], score[high], side) for side in ("left", "right"))

    def won(rows: Array) -> Array:
        sums = running_sums(rows, low)
        beaten = sums.take(under, axis=1) + sums.take(upto, axis=1)
        beaten *= rows.take(high, axis=1)
        return beaten @ (above[high] / 2)

    return np.concatenate([won(rows) for rows in row_blocks(weights)])


def running_sums(rows: Array, columns: NDArray[np.int64]) -> Array:
    """(R, 1 + k) sums of the first 0, 1, .. k of ``columns`` (k,)."""
    sums = np.zeros((len(rows), 1 + len(columns)))
    np.cumsum(rows.take(columns, axis=1), axis=1, out=sums[:, 1:])
    return sums


def row_blocks(weights: Array, numbers: int = 1 << 14) -> Iterator[Array]:
    """Some rows at a time: what is made of them stays in the processor's cache."""
    step = max(1, numbers // max(1, weights.shape[1]))
    return (weights[start : start + step] for start in range(0, len(weights), step))


# --- of classes ---


def auc_macro(probabilities: Array, labels: NDArray[np.int64], weights: Array) -> Array:
    """Mean over classes of one-versus-rest AUC; NaN where a class is absent."""
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
    """(R, true class, predicted class) sums of weights."""
    cells = np.zeros((len(labels), classes * classes))
    cells[np.arange(len(labels)), labels * classes + predicted] = 1
    return (weights @ cells).reshape(-1, classes, classes)


def accuracy(table: Array) -> Array:
    """Share of bags classified right, from a confusion table (R,C,C)."""
    return ratio(np.trace(table, axis1=1, axis2=2), table.sum((1, 2)))


def recall(table: Array) -> Array:
    """(R, C) share of each class's bags that is found; NaN where the class is absent."""
    return ratio(np.diagonal(table, axis1=1, axis2=2), table.sum(2))


def precision(table: Array) -> Array:
    """(R, C) share of what is predicted to be of a class that is; NaN where nothing is."""
    return ratio(np.diagonal(table, axis1=1, axis2=2), table.sum(1))


def f1(table: Array) -> Array:
    """(R, C) harmonic mean of precision and recall; NaN where a class is absent, unpredicted too."""
    return ratio(2 * np.diagonal(table, axis1=1, axis2=2), table.sum(1) + table.sum(2))


def balanced_accuracy(table: Array) -> Array:
    """Mean recall over the classes that are present."""
    return _mean_of_defined(recall(table))


def precision_macro(table: Array) -> Array:
    """Mean precision over the classes that are present or predicted.

    As scikit-learn has it, a class that is present and never predicted counts 0.
    """
    missed = (table.sum(2) > 0) & (table.sum(1) == 0)
    return _mean_of_defined(np.where(missed, 0.0, precision(table)))


def f1_macro(table: Array) -> Array:
    """Mean F1 over the classes that are present or predicted."""
    return _mean_of_defined(f1(table))


def kappa(table: Array, power: int) -> Array:
    """Cohen's kappa: ``power`` 0 unweighted, 1 linear, 2 quadratic weights."""
    classes = table.shape[1]
    distance = np.abs(np.subtract.outer(np.arange(classes), np.arange(classes)))
    cost = (distance > 0).astype(float) if power == 0 else distance.astype(float) ** power
    chance = ratio(np.einsum("ri,rj,ij->r", table.sum(2), table.sum(1), cost), table.sum((1, 2)))
    return 1 - ratio(np.einsum("rij,ij->r", table, cost), chance)


def log_loss(probabilities: Array, labels: NDArray[np.int64], weights: Array) -> Array:
    """Mean -log probability of the true class; lower is better."""
    true = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1.0)
    return ratio(weights @ -np.log(true), weights.sum(1))


def brier(probabilities: Array, labels: NDArray[np.int64], weights: Array) -> Array:
    """Mean squared error of the probabilities (Brier 1950), lower is better.

    Of two classes that of the second alone, in [0, 1]; of more the sum over the classes, in [0, 2].
    """
    error = ((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(1)
    return ratio(weights @ (error / 2 if probabilities.shape[1] == 2 else error), weights.sum(1))


def ece(
    probabilities: Array, labels: NDArray[np.int64], weights: Array, *, bins: int = ECE_BINS
) -> Array:
    """Expected calibration error (Guo et al. 2017, eq. 3, arXiv:1706.04599), lower is better.

    Confidence is the highest probability; ``bins`` of equal width on [0, 1], each with its upper
    edge. The bins' |accuracy - confidence|, weighted by what is in them.
    """
    sure = probabilities.max(1)
    gap = (probabilities.argmax(1) == labels) - sure
    which = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    cells = np.zeros((len(labels), bins))
    cells[np.arange(len(labels)), which] = gap
    return ratio(np.abs(weights @ cells).sum(1), weights.sum(1))


def classification_metrics(
    probabilities: Array,
    labels: NDArray[np.int64],
    weights: Array,
    *,
    decided: NDArray[np.int64] | None = None,
) -> Values:
    """All of the above for (n, C) probabilities.

    ``decided`` (n,) are the classes that are predicted; None: the most probable ones.

    For two classes AUC and AP are those of the second, and so are ``f1``, ``precision`` and
    ``recall``; for more they are means over one class versus the rest.
    """
    classes = probabilities.shape[1]
    chosen = probabilities.argmax(1) if decided is None else decided
    table = confusion(chosen, labels, classes, weights)
    if classes == 2:
        pair = probabilities[:, 1], labels == 1, weights
        values = {"auc": auc(*pair), "ap": average_precision(*pair)}
        values |= {f.__name__: f(table)[:, 1] for f in (f1, precision, recall)}
    else:
        several = probabilities, labels, weights
        values = {
            "auc_macro_ovr": auc_macro(*several),
            "ap_macro_ovr": _one_versus_rest(average_precision, *several),
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


# --- of several labels a bag ---


def multilabel_metrics(
    probabilities: Array, targets: Array, weights: Array, *, names: Sequence[str]
) -> Values:
    """AUC, AP and F1 (at probability 0.5) of each of L labels, their means, and ``log_loss``.

    Args:
        probabilities: (n, L), of each label by itself.
        targets: (n, L) of 0 and 1; NaN where it is not known, which counts for no label's metrics.
        names: L words; the metrics are ``auc_<name>`` and so on, and ``auc_macro``, which is not
            defined where that of one label is not. ``log_loss`` is a mean over all known labels.
    """
    found: dict[str, list[Array]] = {"auc": [], "ap": [], "f1": []}
    for score, target in zip(probabilities.T, targets.T, strict=True):
        known = np.isfinite(target)
        score, positive, some = score[known], flags(target[known]), weights.compress(known, axis=1)
        table = confusion((score > 0.5).astype(np.int64), positive.astype(np.int64), 2, some)
        found["auc"].append(auc(score, positive, some))
        found["ap"].append(average_precision(score, positive, some))
        found["f1"].append(f1(table)[:, 1])
    values = {f"{kind}_macro": np.mean(each, axis=0) for kind, each in found.items()}
    for kind, each in found.items():
        values |= {f"{kind}_{name}": one for name, one in zip(names, each, strict=True)}
    known = np.isfinite(targets)
    true = np.clip(np.where(targets == 1, probabilities, 1 - probabilities), 1e-12, 1.0)
    lost = np.where(known, -np.log(true), 0).sum(1)
    return values | {"log_loss": ratio(weights @ lost, weights @ known.sum(1))}


# --- of a number ---


def regression_metrics(predicted: Array, targets: Array, weights: Array) -> Values:
    """MAE, RMSE, R2, Pearson's and Spearman's correlation of (n,) predictions and targets.

    A target that is NaN is not known, and counts for nothing. R2 is not defined where all targets
    are alike, a correlation neither where all predictions are.
    """
    known = np.isfinite(targets)
    x, y, weights = predicted[known], targets[known], weights.compress(known, axis=1)
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
    """Correlation of (n,) numbers; NaN where one of them is constant."""
    total = weights.sum(1)
    x, y = _centred(x), _centred(y)
    means = ratio(weights @ x, total) * ratio(weights @ y, total)
    spread = np.sqrt(_variance(x, weights) * _variance(y, weights))
    return ratio(ratio(weights @ (x * y), total) - means, spread)


def spearman(x: Array, y: Array, weights: Array) -> Array:
    """Correlation of the ranks, ties having their mean rank: a bag of weight 2 is two bags."""

    def ranks(order: NDArray[np.int64], values: Array, block: Array) -> Array:
        _, starts, which = np.unique(values[order], return_index=True, return_inverse=True)
        sums = np.add.reduceat(block.take(order, axis=1), starts, axis=1)
        upto = np.cumsum(sums, axis=1)
        found = np.empty_like(block)
        found[:, order] = (upto - sums / 2 - upto[:, -1:] / 2).take(which, axis=1)
        return found  # their weighted mean is 0

    def correlation(block: Array) -> Array:
        a, b = ranks(np.argsort(x), x, block), ranks(np.argsort(y), y, block)
        xx, yy, xy = (np.einsum("rn,rn->r", block * p, q) for p, q in ((a, a), (b, b), (a, b)))
        return ratio(xy, np.sqrt(xx * yy))

    if not len(x):
        return np.full(len(weights), np.nan)
    return np.concatenate([correlation(block) for block in row_blocks(weights)])


def _centred(values: Array) -> Array:
    return values - values.mean() if len(values) else values


def _variance(values: Array, weights: Array) -> Array:
    """(R,) of (n,) numbers; exactly 0 where those that have weight are all alike."""
    values, total = _centred(values), weights.sum(1)
    found = ratio(weights @ values**2, total) - ratio(weights @ values, total) ** 2
    doubtful = found <= 1e-9 * (values**2).mean() if len(values) else found > 0
    drawn = weights[doubtful] > 0
    low = np.where(drawn, values, np.inf).min(1, initial=np.inf)
    alike = low >= np.where(drawn, values, -np.inf).max(1, initial=-np.inf)
    found[doubtful] = np.where(alike, 0, found[doubtful])
    return found


# --- resamples of the cases ---


# --- centre by centre ---


# --- arithmetic ---


def ratio(above: Array, below: Array) -> Array:
    """``above / below``, NaN where ``below`` is 0."""
    return above / np.where(below > 0, below, np.nan)


def _mean_of_defined(values: Array) -> Array:
    """(R, C) -> (R,) mean of what is not NaN; NaN of nothing."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(1), defined.sum(1))


def flags(values: Array) -> NDArray[np.bool_]:
    """True where 1, False where 0; ValueError where neither: no other code is guessed at."""
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"neither 0 nor 1: {values[~np.isin(values, (0, 1))][:5].tolist()}")
    return values == 1
