"""Metrics of survival: how well risks order the cases, and how well survival curves fit the outcomes.

As in :mod:`e2e.metrics.values`, ``weights`` (R, n) are R weightings of the n cases, results have shape
(R, ...), and NaN means undefined. ``risk`` (n,), ``time`` (n,) and ``event`` (n,) describe the cases:
**a higher risk means an earlier event** everywhere, so a model that predicts times must negate them;
``event`` is True where the event was observed and False where the case was censored.

With weights of one the values equal those of scikit-survival. Ties of risk are compared exactly, so that
only the Brier score depends on the scale of the risks. The distribution of censoring is estimated once,
on the training cases (:class:`Censoring`), and is the same for every resample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from e2e.metrics.values import Array, Values, flags, pairs_won, ratio, row_blocks, running_sums

Flags = NDArray[np.bool_]
"""An array of bool; docstrings give its shape."""

EVENTS_AT_ONCE = 512
"""Number of events compared with all cases at once; bounds the memory of the concordance indices."""


def kaplan_meier(
    time: Array, event: Flags, weights: Array, at: Array, *, of_censoring: bool = False
) -> Array:
    """Return the Kaplan-Meier estimate of the probability to be free of the event after given times.

    Source: Kaplan & Meier 1958.

    Parameters
    ----------
    time : ndarray, shape (n,)
        Time of the event or of censoring.
    event : ndarray of bool, shape (n,)
        True where the event was observed.
    weights : ndarray, shape (R, n)
        Weights of the cases.
    at : ndarray, shape (T,)
        Times at which the curve is evaluated.
    of_censoring : bool
        Estimate the probability to be uncensored instead. Where an event and a censoring have the same
        time, the event comes first.

    Returns
    -------
    ndarray, shape (R, T)
    """
    leaves = ~event if of_censoring else event
    order = np.lexsort((~leaves, -time))  # latest first; at equal times those who leave come first
    points, counts = np.unique(time[leaves], return_counts=True)
    num_later, num_not_earlier = (
        np.searchsorted(-time[order], -points, side) for side in ("left", "right")
    )
    num_up_to_leaving = num_later + counts
    point_index = np.searchsorted(points, at, side="right")

    def curve(block: Array) -> Array:
        sums = running_sums(block, order)
        at_risk = sums.take(num_up_to_leaving if of_censoring else num_not_earlier, axis=1)
        leaving = sums.take(num_up_to_leaving, axis=1) - sums.take(num_later, axis=1)
        alive = np.ones((len(block), 1 + len(points)))
        np.cumprod(1 - leaving / np.where(at_risk > 0, at_risk, 1), axis=1, out=alive[:, 1:])
        return alive.take(point_index, axis=1)

    return np.concatenate([curve(block) for block in row_blocks(weights)])


@dataclass(frozen=True)
class Censoring:
    """The probability G(t) to be uncensored after time t, by the Kaplan-Meier estimate."""

    times: Array
    """Times of the training cases, ascending."""
    chance: Array
    """G after each of ``times``."""

    @classmethod
    def fit(cls, time: Array, event: Flags) -> Censoring:
        """Estimate G from the (n,) times and events of the training cases."""
        times, once = np.unique(time), np.ones((1, len(time)))
        return cls(times, kaplan_meier(time, event, once, times, of_censoring=True)[0])

    def __call__(self, at: Array) -> Array:
        """Return G at each time; NaN after the last training time and where G is 0."""
        chance = np.r_[1.0, self.chance][np.searchsorted(self.times, at, side="right")]
        return np.where((at <= self.times[-1]) & (chance > 0), chance, np.nan)

    def weight(self, time: Array, event: Flags) -> Array:
        """Return (n,) weights 1/G of the cases; 0 for censored cases and where G is undefined."""
        return np.where(event, np.nan_to_num(1 / self(time), nan=0.0), 0.0)


@dataclass(frozen=True)
class Baseline:
    """The cumulative hazard H0(t) of a case of risk 0, by Breslow's estimate::

        H0(t) = sum_{events i, t_i <= t} w_i / sum_{t_j >= t_i} w_j exp(r_j)

    A risk r is the logarithm of a relative hazard, so that S(t | r) = exp(-H0(t) exp(r)).

    Source: Breslow 1972, in the discussion of Cox 1972 (JRSS B 34:216), and 1974 (Biometrics 30:89).
    """

    times: Array
    """Times of the events, ascending."""
    log_hazard: Array
    """log H0 at each of ``times``; the logarithm, because risks may have any scale."""

    @classmethod
    def fit(cls, risk: Array, time: Array, event: Flags, weights: Array) -> Baseline:
        """Estimate H0 from the (n,) risks, times, events and positive weights of the training cases."""
        times, time_index = np.unique(time[event], return_inverse=True)
        died = np.bincount(time_index, weights[event])
        order = np.argsort(-time)
        at_risk = np.logaddexp.accumulate((risk + np.log(weights))[order])
        count = np.searchsorted(-time[order], -times, side="right")
        return cls(times, np.logaddexp.accumulate(np.log(died) - at_risk[count - 1]))

    def __call__(self, at: Array) -> Array:
        """Return log H0 at each time; -inf before the first event."""
        return np.r_[-np.inf, self.log_hazard][np.searchsorted(self.times, at, side="right")]


def c_index(risk: Array, time: Array, event: Flags, weights: Array) -> Array:
    """Return Harrell's concordance index.

    It is the fraction of comparable pairs whose earlier event has the higher risk; ties of risk count
    half. A pair is comparable if the earlier time is an event, or if the times are equal and one of them
    is an event.

    Source: Harrell et al. 1982 (JAMA 247:2543).

    Parameters
    ----------
    risk, time, event : ndarray, shape (n,)
        See the module's docstring.
    weights : ndarray, shape (R, n)
        Weights of the cases.

    Returns
    -------
    ndarray, shape (R,)
        NaN if no pair is comparable.
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
    """Return Uno's concordance index: Harrell's, with each pair weighted by 1/G^2 of its event.

    Events where G is undefined are left out.

    Source: Uno et al. 2011 (Stat Med 30:1105), eq. 6.

    Parameters
    ----------
    risk, time, event : ndarray, shape (n,)
        See the module's docstring.
    weights : ndarray, shape (R, n)
        Weights of the cases.
    censoring : Censoring
        G, estimated on the training cases.
    tau : float
        Events at this time or later are left out.

    Returns
    -------
    ndarray, shape (R,)
        NaN if no pair is comparable.
    """
    inverse = np.where(time < tau, censoring.weight(time, event), 0)
    return _concordance(risk, time, event, inverse**2, weights)


def _concordance(risk: Array, time: Array, event: Flags, counts: Array, weights: Array) -> Array:
    """(R,) fraction of concordant pairs, each weighted by the ``counts`` (n,) of its earlier event.

    ``counts`` is 0 for cases without an event. A quadratic form in the weights, computed by blocked
    matrix products: at most 2 R E n operations for E events.
    """
    if not np.isfinite(risk).all():
        return np.full(len(weights), np.nan)
    order = np.lexsort((~event, time))  # at equal times the events come first
    risk, time, event, counts = risk[order], time[order], event[order], counts[order]
    # An event is comparable with every case after the events of its time.
    _, starts, time_index = np.unique(time, return_index=True, return_inverse=True)
    first_comparable = (starts + np.add.reduceat(event.astype(np.int64), starts))[time_index]
    events = np.flatnonzero(counts > 0)

    def fraction(block: Array) -> Array:
        tail = np.zeros((len(block), len(time) + 1))
        tail[:, :-1] = np.cumsum(block[:, ::-1], axis=1)[:, ::-1]
        concordant, pairs = np.zeros(len(block)), np.zeros(len(block))
        for start in range(0, len(events), EVENTS_AT_ONCE):
            some = events[start : start + EVENTS_AT_ONCE]
            first = int(first_comparable[some[0]])  # no case before is comparable with any of them
            wins = (risk[some, None] > risk[first:]) + 0.5 * (risk[some, None] == risk[first:])
            wins *= np.arange(first, len(time)) >= first_comparable[some, None]
            event_weights = block[:, some] * counts[some]
            concordant += np.einsum("rj,rj->r", event_weights @ wins, block[:, first:])
            pairs += np.einsum("re,re->r", event_weights, tail[:, first_comparable[some]])
        return ratio(concordant, pairs)

    # Large blocks of rows, because the table of pairs is computed again for each of them.
    blocks = row_blocks(weights, numbers=1 << 22)
    return np.concatenate([fraction(block.take(order, axis=1)) for block in blocks])


def dynamic_auc(
    risk: Array, time: Array, event: Flags, weights: Array, *, times: Array, censoring: Censoring
) -> Array:
    """Return the AUC at each time, between cases with an event up to it and cases still free of it.

    These are the cumulative cases and dynamic controls of Uno et al. 2007 (JASA 102:527), weighted by 1/G.

    Parameters
    ----------
    risk, time, event : ndarray, shape (n,)
        See the module's docstring.
    weights : ndarray, shape (R, n)
        Weights of the cases.
    times : ndarray, shape (T,)
        Times of evaluation.
    censoring : Censoring
        G, estimated on the training cases.

    Returns
    -------
    ndarray, shape (R, T)
        NaN where there are no cases or no controls.
    """
    had_event = (time <= times[:, None]) * censoring.weight(time, event)
    is_free = time > times[:, None]
    won = [pairs_won(risk, *pair, weights) for pair in zip(had_event, is_free, strict=True)]
    return ratio(np.stack(won, axis=1), (weights @ had_event.T) * (weights @ is_free.T))


def dynamic_auc_mean(
    risk: Array, time: Array, event: Flags, weights: Array, *, times: Array, censoring: Censoring
) -> Array:
    """Return the mean over times of the dynamic AUC, weighted by the fall of survival up to each time.

    Source: Lambert & Chevret 2016 (Stat Methods Med Res 25:2088). Parameters as for
    :func:`dynamic_auc`, with ``times`` ascending.

    Returns
    -------
    ndarray, shape (R,)
        NaN if there is no event up to the last time, or if the AUC is undefined at a time up to which
        survival fell.
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
    """Return the integrated Brier score: the mean squared error of predicted survival; lower is better.

    The mean over the cases is weighted by 1/G; the mean over the times uses the trapezoidal rule.

    Source: Graf et al. 1999 (Stat Med 18:2529).

    Parameters
    ----------
    survival : ndarray, shape (n, T)
        Predicted probability to be free of the event after each of ``times``.
    time, event : ndarray, shape (n,)
        See the module's docstring.
    weights : ndarray, shape (R, n)
        Weights of the cases.
    times : ndarray, shape (T,)
        Two or more times, ascending.
    censoring : Censoring
        G, estimated on the training cases.

    Returns
    -------
    ndarray, shape (R,)
        NaN if G is undefined at one of the times, or no case is followed beyond the last.
    """
    had_event = (time[:, None] <= times) * censoring.weight(time, event)[:, None]
    is_free = (time[:, None] > times).astype(np.float64)
    error = survival**2 * had_event + (1 - survival) ** 2 * is_free / censoring(times)
    mean_error = ratio(weights @ error, weights.sum(1)[:, None])
    each = np.where(weights @ is_free > 0, mean_error, np.nan)
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
    """Return ``c_index`` and the further metrics that the optional arguments allow.

    Parameters
    ----------
    risk : ndarray, shape (n,)
        Higher for an earlier event.
    targets : ndarray, shape (n, 2)
        Time and event (1 observed, 0 censored); cases with a NaN are left out.
    weights : ndarray, shape (R, n)
        Weights of the cases.
    censoring : Censoring, optional
        G, estimated on the training cases; adds ``c_index_uno``.
    survival : ndarray, shape (n, T), optional
        Predicted probabilities to be free of the event after ``times``; adds ``integrated_brier``.
    times : ndarray, shape (T,), optional
        Two or more times, ascending; with ``censoring``, adds ``auc_dynamic_mean``.

    Raises
    ------
    ValueError
        An event is neither 0 nor 1.
    """
    is_labelled = np.isfinite(targets).all(axis=1)
    time, event = targets[is_labelled, 0], flags(targets[is_labelled, 1])
    risk, weights = risk[is_labelled], weights.compress(is_labelled, axis=1)
    values = {"c_index": c_index(risk, time, event, weights)}
    if censoring is None:
        return values
    values["c_index_uno"] = c_index_uno(risk, time, event, weights, censoring=censoring)
    if times is None:
        return values
    values["auc_dynamic_mean"] = dynamic_auc_mean(
        risk, time, event, weights, times=times, censoring=censoring
    )
    if survival is not None:
        values["integrated_brier"] = integrated_brier(
            survival[is_labelled], time, event, weights, times=times, censoring=censoring
        )
    return values
