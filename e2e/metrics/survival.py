"""Metrics of survival: how well risks order the cases, and how well survival curves fit them.

As in :mod:`e2e.metrics.values`, ``weights`` (R, n) are R weightings of the n cases, results are (R, ...),
and NaN is not defined. **A higher risk is an earlier event**, everywhere: a model that predicts
times must turn their sign before. ``event`` is True where the event was seen, False where the case
was lost from sight (censored). Values with weights of ones are those of scikit-survival; ties of
risk are exact here, so that no metric but the Brier score changes with the scale of the risks.

The chance to be still in sight, G, is that of :class:`Censoring`: fitted once, on the training
cases, and the same for every resample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from e2e.metrics.values import Array, Values, flags, pairs_won, ratio, row_blocks, running_sums

Flags = NDArray[np.bool_]

EVENTS_AT_ONCE = 512
"""Bounds the table of pairs that is held: so many events x all cases."""


def kaplan_meier(
    time: Array, event: Flags, weights: Array, at: Array, *, of_censoring: bool = False
) -> Array:
    """(R, T) chance to be without an event after each time of ``at`` (T,).

    Kaplan & Meier 1958. ``of_censoring``: the chance to be still in sight; of a censoring and an
    event at one time the event came first.
    """
    leaving = ~event if of_censoring else event
    order = np.lexsort((~leaving, -time))  # the latest first; of one time those who leave
    points, counts = np.unique(time[leaving], return_counts=True)
    later, in_all = (np.searchsorted(-time[order], -points, side) for side in ("left", "right"))
    gone, asked = later + counts, np.searchsorted(points, at, side="right")

    def curve(rows: Array) -> Array:
        sums = running_sums(rows, order)
        at_risk = sums.take(gone if of_censoring else in_all, axis=1)
        left = sums.take(gone, axis=1) - sums.take(later, axis=1)
        alive = np.ones((len(rows), 1 + len(points)))
        np.cumprod(1 - left / np.where(at_risk > 0, at_risk, 1), axis=1, out=alive[:, 1:])
        return alive.take(asked, axis=1)

    return np.concatenate([curve(rows) for rows in row_blocks(weights)])


@dataclass(frozen=True)
class Censoring:
    """G(t), the chance to be still in sight after t, by the Kaplan-Meier estimate."""

    times: Array
    chance: Array

    @classmethod
    def fit(cls, time: Array, event: Flags) -> Censoring:
        """From (n,) times and events, of the training cases."""
        times, once = np.unique(time), np.ones((1, len(time)))
        return cls(times, kaplan_meier(time, event, once, times, of_censoring=True)[0])

    def __call__(self, at: Array) -> Array:
        """G at each time; NaN where it is not known: after the last time of the fit, and once 0."""
        found = np.r_[1.0, self.chance][np.searchsorted(self.times, at, side="right")]
        return np.where((at <= self.times[-1]) & (found > 0), found, np.nan)

    def weight(self, time: Array, event: Flags) -> Array:
        """(n,) 1/G of events, 0 for the censored and for events where G is not known."""
        return np.where(event, np.nan_to_num(1 / self(time), nan=0.0), 0.0)


@dataclass(frozen=True)
class Baseline:
    """H0(t), the cumulative hazard up to t of a case of risk 0, by Breslow's estimate::

        H0(t) = sum_{events i, t_i <= t} w_i / sum_{t_j >= t_i} w_j exp(r_j)

    where a risk r is the log of a relative hazard, so that S(t | r) = exp(-H0(t) exp(r)).

    Source: Breslow 1972, in the discussion of Cox 1972 (JRSS B 34:216), and 1974 (Biometrics 30:89).
    """

    times: Array
    """Of the events, ascending."""
    log_hazard: Array
    """log H0 at each: the logarithm, because risks know no scale."""

    @classmethod
    def fit(cls, risk: Array, time: Array, event: Flags, weights: Array) -> Baseline:
        """From (n,) risks, times, events and weights (over 0) of the training cases."""
        times, which = np.unique(time[event], return_inverse=True)
        died = np.bincount(which, weights[event])
        order = np.argsort(-time)
        at_risk = np.logaddexp.accumulate((risk + np.log(weights))[order])
        count = np.searchsorted(-time[order], -times, side="right")
        return cls(times, np.logaddexp.accumulate(np.log(died) - at_risk[count - 1]))

    def __call__(self, at: Array) -> Array:
        """log H0 at each time; -inf before the first event."""
        return np.r_[-np.inf, self.log_hazard][np.searchsorted(self.times, at, side="right")]


def c_index(risk: Array, time: Array, event: Flags, weights: Array) -> Array:
    """Harrell's C: the share of comparable pairs whose earlier event has the higher risk.

    Harrell et al. 1982 (JAMA 247:2543). A pair is comparable when the earlier time is an event, or
    both are at one time and one is. Ties of risk count half. NaN without such a pair.
    """
    return _concordance(risk, time, event, event.astype(np.float64), weights)


def c_index_uno(
    risk: Array,
    time: Array,
    event: Flags,
    weights: Array,
    *,
    censoring: Censoring,
    tau: float = np.inf,
) -> Array:
    """Uno's C: Harrell's, each pair weighted by 1/G^2 of its event; events at tau or later left out.

    Uno et al. 2011 (Stat Med 30:1105), eq. 6. Events where G is not known are left out too.
    """
    inverse = np.where(time < tau, censoring.weight(time, event), 0)
    return _concordance(risk, time, event, inverse**2, weights)


def _concordance(risk: Array, time: Array, event: Flags, counts: Array, weights: Array) -> Array:
    """Share of right pairs, each counted as its earlier event is; ``counts`` (n,) is 0 elsewhere.

    A quadratic form in the weights, as blocked matrix products: 2 R E n operations at most for E
    events.
    """
    if not np.isfinite(risk).all():
        return np.full(len(weights), np.nan)
    order = np.lexsort((~event, time))  # of one time the events come first
    risk, time, event, counts = risk[order], time[order], event[order], counts[order]
    # Comparable with an event is whatever comes after the events of its time.
    _, starts, which = np.unique(time, return_index=True, return_inverse=True)
    after = (starts + np.add.reduceat(event.astype(np.int64), starts))[which]
    events = np.flatnonzero(counts > 0)

    def share(block: Array) -> Array:
        tail = np.zeros((len(block), len(time) + 1))
        tail[:, :-1] = np.cumsum(block[:, ::-1], axis=1)[:, ::-1]
        right, pairs = np.zeros(len(block)), np.zeros(len(block))
        for start in range(0, len(events), EVENTS_AT_ONCE):
            some = events[start : start + EVENTS_AT_ONCE]
            first = int(after[some[0]])  # nothing before is comparable with any of them
            wins = (risk[some, None] > risk[first:]) + 0.5 * (risk[some, None] == risk[first:])
            wins *= np.arange(first, len(time)) >= after[some, None]
            ours = block[:, some] * counts[some]
            right += np.einsum("rj,rj->r", ours @ wins, block[:, first:])
            pairs += np.einsum("re,re->r", ours, tail[:, after[some]])
        return ratio(right, pairs)

    # Many rows at a time: the table of pairs is made anew for each block of them.
    blocks = row_blocks(weights, numbers=1 << 22)
    return np.concatenate([share(block.take(order, axis=1)) for block in blocks])


def dynamic_auc(
    risk: Array, time: Array, event: Flags, weights: Array, *, times: Array, censoring: Censoring
) -> Array:
    """(R, T) AUC between the cases with an event up to each of ``times`` and those without one yet.

    Cumulative cases, dynamic controls, weighted by 1/G (Uno et al. 2007, JASA 102:527). NaN where
    there are none of either.
    """
    ill = (time <= times[:, None]) * censoring.weight(time, event)
    well = time > times[:, None]
    won = [pairs_won(risk, *pair, weights) for pair in zip(ill, well, strict=True)]
    return ratio(np.stack(won, axis=1), (weights @ ill.T) * (weights @ well.T))


def dynamic_auc_mean(
    risk: Array, time: Array, event: Flags, weights: Array, *, times: Array, censoring: Censoring
) -> Array:
    """Mean over ``times`` (ascending) of the AUC, by how much survival falls up to each of them.

    Lambert & Chevret 2016 (Stat Methods Med Res 25:2088). Not defined without an event up to the
    last time, nor where the AUC is not defined at a time survival fell up to.
    """
    each = dynamic_auc(risk, time, event, weights, times=times, censoring=censoring)
    alive = kaplan_meier(time, event, weights, times)
    fall = -np.diff(alive, axis=1, prepend=1.0)
    return ratio(np.where(fall > 0, each * fall, 0).sum(1), 1 - alive[:, -1])


def integrated_brier(
    survival: Array,
    time: Array,
    event: Flags,
    weights: Array,
    *,
    times: Array,
    censoring: Censoring,
) -> Array:
    """Mean squared error of ``survival`` (n, T), the chances predicted for ``times`` (T,).

    The mean over the cases is weighted by 1/G, that over the times (ascending, two or more) is by
    trapezia (Graf et al. 1999, Stat Med 18:2529). NaN where G is not known at one of the times, and
    where no case is followed beyond the last.
    """
    ill = (time[:, None] <= times) * censoring.weight(time, event)[:, None]
    well = (time[:, None] > times).astype(np.float64)
    error = survival**2 * ill + (1 - survival) ** 2 * well / censoring(times)
    each = np.where(weights @ well > 0, ratio(weights @ error, weights.sum(1)[:, None]), np.nan)
    return np.trapezoid(each, times, axis=1) / (times[-1] - times[0])


def survival_metrics(
    risk: Array,
    targets: Array,
    weights: Array,
    *,
    censoring: Censoring | None = None,
    survival: Array | None = None,
    times: Array | None = None,
) -> Values:
    """Name -> (R,) of ``c_index`` and of what the rest that is given allows.

    Args:
        risk: (n,), higher for an earlier event.
        targets: (n, 2) time and event (1: seen, 0: censored); NaN where not known: not counted.
        censoring: of the training cases; adds ``c_index_uno``.
        times: (T,) ascending, two or more; with ``censoring``, adds ``auc_dynamic_mean``.
        survival: (n, T) predicted chances to be without an event after ``times``; adds
            ``integrated_brier``.

    Raises:
        ValueError: an event is neither 0 nor 1.
    """
    known = np.isfinite(targets).all(axis=1)
    time, event = targets[known, 0], flags(targets[known, 1])
    risk, weights = risk[known], weights.compress(known, axis=1)
    values = {"c_index": c_index(risk, time, event, weights)}
    if censoring is None:
        return values
    given = risk, time, event, weights
    values["c_index_uno"] = c_index_uno(*given, censoring=censoring)
    if times is None:
        return values
    mean = dynamic_auc_mean(*given, times=times, censoring=censoring)
    values["auc_dynamic_mean"] = mean
    if survival is not None:
        values["integrated_brier"] = integrated_brier(
            survival[known], time, event, weights, times=times, censoring=censoring
        )
    return values
