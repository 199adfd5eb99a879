"""Bootstrap confidence intervals over cases, and tests of differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from e2e.metrics.values import Array, Values


def case_weights(cases: Sequence[str], draws: int, seed: int) -> Array:
    """(1 + draws, n): ones, then how often each bag's case was drawn in a resample of the cases."""
    names, which = np.unique(np.asarray(cases), return_inverse=True)
    rng, count = np.random.default_rng(seed), len(names)
    weights = np.ones((1 + draws, len(which)))
    for row in weights[1:]:
        row[:] = np.bincount(rng.integers(0, count, count), minlength=count)[which]
    return weights


def confidence_interval(values: Array) -> dict[str, float | None]:
    """Point value and 95 % percentile interval of ``[point, resample, resample, ...]``."""

    def number(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    resamples = values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(resamples, [2.5, 97.5]) if len(resamples) else (np.nan, np.nan)
    return {"value": number(values[0]), "low": number(low), "high": number(high)}


def bootstrap_p(differences: Array) -> float:
    """Two-sided p of no difference, from ``[point, resample, resample, ...]``.

    Twice the smaller share of resamples on one side of 0, those at 0 on both; 1 is added above and
    below (Davison & Hinkley 1997, eq. 4.11), so it is never 0. NaN where no resample is defined.
    """
    resamples = differences[1:][~np.isnan(differences[1:])]
    if np.isnan(differences[0]) or not len(resamples):
        return float("nan")
    least = min((resamples <= 0).sum(), (resamples >= 0).sum())
    return min(1.0, 2 * (1 + least) / (1 + len(resamples)))


class DeLong(NamedTuple):
    """Two AUCs on the same bags."""

    first: float
    second: float
    low: float
    """Of the 95 % interval of first - second."""
    high: float
    p: float
    """Two-sided, of no difference."""


def delong(first: Array, second: Array, positive: NDArray[np.bool_]) -> DeLong:
    """DeLong's test of two correlated AUCs; bags are taken as independent: one a case.

    DeLong et al. 1988 (Biometrics 44:837), by the midranks of Sun & Xu 2014 (IEEE SPL 21:1389,
    algorithm 2). NaN with fewer than two bags of a class; p and interval also where the variance is
    0, as between runs that rank alike.
    """
    from scipy.stats import norm, rankdata  # slow to import

    m, n = int(positive.sum()), int((~positive).sum())
    if m < 2 or n < 2 or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return DeLong(*[float("nan")] * 5)
    scores = np.stack([first, second])
    whole = rankdata(scores, axis=1)
    # Share of negatives below each positive, and of positives above each negative.
    of_positives = (whole[:, positive] - rankdata(scores[:, positive], axis=1)) / n
    of_negatives = 1 - (whole[:, ~positive] - rankdata(scores[:, ~positive], axis=1)) / m
    a, b = of_positives.mean(1)
    apart = np.subtract(*of_positives).var(ddof=1) / m + np.subtract(*of_negatives).var(ddof=1) / n
    error = np.sqrt(apart) if apart > 1e-20 else np.nan
    half = norm.ppf(0.975) * error
    p = 2 * norm.sf(abs(a - b) / error)
    return DeLong(float(a), float(b), float(a - b - half), float(a - b + half), float(p))


class Group(NamedTuple):
    """The metrics of some of the bags."""

    bags: int
    cases: int
    values: Values


def by_group(
    metrics: Callable[[Array, Array, Array], Values],
    predicted: Array,
    targets: Array,
    weights: Array,
    *,
    groups: Sequence[str],
    cases: Sequence[str],
) -> dict[str, Group]:
    """``metrics(predicted, targets, weights)`` of each group of bags, by name.

    A resample that has none of a group's cases has no value for it, nor one with what is not
    defined, such as the AUC of a centre with one class.
    """
    which, names = np.asarray(groups), np.asarray(cases)
    found = {}
    for group in np.unique(which):
        own = which == group
        values = metrics(predicted[own], targets[own], weights[:, own])
        found[str(group)] = Group(int(own.sum()), len(np.unique(names[own])), values)
    return found
