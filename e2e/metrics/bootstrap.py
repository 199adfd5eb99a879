"""Bootstrap confidence intervals over cases, and tests of the difference between two models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from e2e.metrics.values import Array, Values


def case_weights(cases: Sequence[str], draws: int, seed: int) -> Array:
    """Return the bootstrap weight of each bag: how often its case is drawn in each resample.

    Cases are drawn with replacement, so that all bags of a case have the same weight.

    Parameters
    ----------
    cases : sequence of str, length n
        The case of each bag.
    draws : int
        Number of resamples.
    seed : int
        Random seed.

    Returns
    -------
    ndarray, shape (1 + draws, n)
        Row 0 is all ones and gives the point value; each further row is one resample.
    """
    names, case_index = np.unique(np.asarray(cases), return_inverse=True)
    rng, num_cases = np.random.default_rng(seed), len(names)
    weights = np.ones((1 + draws, len(case_index)))
    for row in weights[1:]:
        drawn = rng.integers(0, num_cases, num_cases)
        row[:] = np.bincount(drawn, minlength=num_cases)[case_index]
    return weights


def confidence_interval(values: Array) -> dict[str, float | None]:
    """Return the point value of a metric and its 95 % percentile interval.

    Parameters
    ----------
    values : ndarray, shape (1 + draws,)
        The point value, then the value of each resample; NaN where the metric is undefined.

    Returns
    -------
    dict
        ``value``, ``low`` and ``high``; None where undefined. Undefined resamples are left out.
    """
    resamples = values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(resamples, [2.5, 97.5]) if len(resamples) else (np.nan, np.nan)
    return {
        "value": _float_or_none(values[0]),
        "low": _float_or_none(low),
        "high": _float_or_none(high),
    }


def _float_or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def bootstrap_p(differences: Array) -> float:
    """Return the two-sided bootstrap p-value of the hypothesis that two models do not differ.

    It is twice the smaller fraction of resamples on one side of 0, where those equal to 0 count on both
    sides. One is added to numerator and denominator (Davison & Hinkley 1997, eq. 4.11), so that the
    p-value is never 0.

    Parameters
    ----------
    differences : ndarray, shape (1 + draws,)
        The difference of the point values, then that of each resample; NaN where undefined.

    Returns
    -------
    float
        NaN if the point difference or every resample is undefined.
    """
    resamples = differences[1:][~np.isnan(differences[1:])]
    if np.isnan(differences[0]) or not len(resamples):
        return float("nan")
    smaller_side = min((resamples <= 0).sum(), (resamples >= 0).sum())
    return min(1.0, 2 * (1 + smaller_side) / (1 + len(resamples)))


class DeLong(NamedTuple):
    """Two AUCs on the same bags and the test of their difference."""

    first: float
    """AUC of the first score."""
    second: float
    """AUC of the second score."""
    low: float
    """Lower end of the 95 % confidence interval of first - second."""
    high: float
    """Upper end of the 95 % confidence interval of first - second."""
    p: float
    """Two-sided p-value of the hypothesis that the AUCs are equal."""


def delong(first: Array, second: Array, positive: NDArray[np.bool_]) -> DeLong:
    """Compare two correlated AUCs by DeLong's test.

    The test treats the bags as independent, so there should be one bag per case.

    Sources: DeLong et al. 1988 (Biometrics 44:837), computed from the midranks of Sun & Xu 2014
    (IEEE SPL 21:1389, algorithm 2).

    Parameters
    ----------
    first, second : ndarray, shape (n,)
        Scores of the two models for the same bags.
    positive : ndarray of bool, shape (n,)
        Whether each bag is positive.

    Returns
    -------
    DeLong
        All NaN if a class has fewer than two bags or a score is not finite. Only p-value and interval
        are NaN if the variance is 0, as between two models that rank the bags alike.
    """
    from scipy.stats import norm, rankdata  # slow to import

    m, n = int(positive.sum()), int((~positive).sum())
    if m < 2 or n < 2 or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return DeLong(*[float("nan")] * 5)
    scores = np.stack([first, second])
    ranks = rankdata(scores, axis=1)
    # Fraction of negatives below each positive, and of positives above each negative.
    of_positives = (ranks[:, positive] - rankdata(scores[:, positive], axis=1)) / n
    of_negatives = 1 - (ranks[:, ~positive] - rankdata(scores[:, ~positive], axis=1)) / m
    a, b = of_positives.mean(1)
    variance = (
        np.subtract(*of_positives).var(ddof=1) / m + np.subtract(*of_negatives).var(ddof=1) / n
    )
    error = np.sqrt(variance) if variance > 1e-20 else np.nan
    half_width = norm.ppf(0.975) * error
    p = 2 * norm.sf(abs(a - b) / error)
    return DeLong(
        float(a), float(b), float(a - b - half_width), float(a - b + half_width), float(p)
    )


class Group(NamedTuple):
    """The metrics of one group of bags, such as those of one centre."""

    bags: int
    """Number of bags."""
    cases: int
    """Number of cases."""
    values: Values
    """Metric -> (R,) values."""


def by_group(
    metrics: Callable[[Array, Array, Array], Values],
    predicted: Array,
    targets: Array,
    weights: Array,
    *,
    groups: Sequence[str],
    cases: Sequence[str],
) -> dict[str, Group]:
    """Return the metrics of each group of bags, by the name of the group.

    A value is NaN in resamples that have no case of the group, and wherever the metric is undefined,
    such as the AUC of a centre with only one class.

    Parameters
    ----------
    metrics : callable
        Called as ``metrics(predicted, targets, weights)`` with the bags of one group.
    predicted : ndarray, shape (n, ...)
        Predictions.
    targets : ndarray, shape (n, ...)
        Targets.
    weights : ndarray, shape (R, n)
        Weights of the bags; see :func:`case_weights`.
    groups, cases : sequence of str, length n
        Group and case of each bag.
    """
    group_names, case_names = np.asarray(groups), np.asarray(cases)
    results = {}
    for group in np.unique(group_names):
        in_group = group_names == group
        values = metrics(predicted[in_group], targets[in_group], weights[:, in_group])
        num_cases = len(np.unique(case_names[in_group]))
        results[str(group)] = Group(int(in_group.sum()), num_cases, values)
    return results
