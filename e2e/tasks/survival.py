"""Survival: the time to an event, or to the last follow-up of a case without one (censored)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from e2e.errors import UserError
from e2e.losses.survival import cox_loss, discrete_nll
from e2e.metrics.figures import Figure, survival_figures
from e2e.metrics.survival import Baseline, Censoring, survival_metrics
from e2e.metrics.values import Array, Values, ratio
from e2e.tasks.base import (
    TASKS,
    Task,
    TaskExample,
    check_choice,
    choose_monitor,
    matches_code,
    opposite_code,
)

LOSSES = ("nll", "cox")
TIES = ("efron", "breslow")
BASELINES = ("breslow", "none")


@TASKS.register("survival")
class Survival(Task):
    """A risk for each case: the higher, the earlier the event.

    The target is (time, event), where event is 1, or 0 for a censored case.

    ``nll`` has one output for each of ``bins`` intervals of time, cut at quantiles of the event times of
    the training cases: [e_k, e_{k+1}), the last one unbounded. The risk is -sum_t S_t. ``cox`` has one
    output, the log of the relative hazard. Its risk set is the whole update over all ranks, so more bags
    per update (``optim.bags``) are better. See :mod:`e2e.losses.survival`.

    All metrics but Harrell's C use the censoring of the training cases, and the times at which ``bins``
    intervals meet (:attr:`times`). For these times ``cox`` predicts survival probabilities
    S(t) = exp(-H0(t) exp(risk)), with H0 estimated from the risks that the selected weights give the
    training cases (one pass over them after training); see :class:`e2e.metrics.survival.Baseline`.

    Parameters
    ----------
    event : str
        Code in ``event_column`` for an observed event. Required: in some tables 1 is an event, in others
        it is a censored case.
    censored : str
        Code of a censored case; empty: the other one of 0 and 1.
    time_column : str
        Column of the label table with times, above 0, in any unit.
    event_column : str
        Column of the label table with these codes.
    loss : str
        ``nll`` (discrete-time likelihood) or ``cox`` (partial likelihood).
    bins : int
        Number of intervals, at least 2. With ``cox`` they only set the times of the metrics.
    alpha : float
        With ``nll`` the weight of censored cases is 1 - alpha, in [0, 1].
    ties : str
        Tied event times of ``cox``: ``efron`` or ``breslow``.
    baseline : str
        Baseline hazard of ``cox``: ``breslow``, or ``none``: risks without survival probabilities.
    monitor : str
        Metric that selects the epoch.

    Raises
    ------
    UserError
        An option is missing or out of range.
    """

    label_columns = ("time", "event")
    output_names = ("risk",)
    main_metrics = ("c_index", "c_index_uno", "auc_dynamic_mean")
    is_case_level = True
    can_pool_folds = (
        False  # the risks of two models, or of other intervals, are on different scales
    )

    def __init__(
        self,
        *,
        event: str = "",
        censored: str = "",
        time_column: str = "time",
        event_column: str = "event",
        loss: str = "nll",
        bins: int = 4,
        alpha: float = 0.0,
        ties: str = "efron",
        baseline: str = "breslow",
        monitor: str = "c_index",
    ) -> None:
        if not event:
            raise UserError(
                f"task.event is missing: which code of column '{event_column}' is an observed event?\n"
                "  set task.event=1 where 1 is an event, task.event=0 where 1 is a censored case"
            )
        if bins < 2:
            raise UserError(f"task.bins={bins} must be 2 or more")
        if not 0 <= alpha <= 1:
            raise UserError(f"task.alpha={alpha:g} must be in [0, 1]")
        self.event = event
        self.censored = opposite_code("censored", event, censored, "censored")
        self.columns = (event_column, time_column)
        self.cox = self.loss_couples_bags = check_choice("loss", loss, LOSSES) == "cox"
        self.bins, self.alpha, self.ties = bins, alpha, check_choice("ties", ties, TIES)
        self.num_outputs = 1 if self.cox else bins
        self.prediction_columns = _prediction_columns(0 if self.cox else bins)
        curve_metrics = () if self.cox else ("integrated_brier", "survival_nll")
        self.metric_names = ("c_index", "c_index_uno", "auc_dynamic_mean", *curve_metrics)
        self.monitor = choose_monitor(monitor, "c_index", self.metric_names)
        self.tie_break_metric = "c_index_uno" if self.cox else "survival_nll"
        self.edges: list[float] = []
        """Where one interval ends and the next begins; set by :meth:`fit`."""
        self.censoring: Censoring | None = None
        """The censoring of the training cases; set by :meth:`fit`."""
        self.fits_predictions = (
            check_choice("baseline", baseline, BASELINES) == "breslow" and self.cox
        )
        self.baselines: dict[str, Baseline] = {}
        """Weights -> baseline hazard of their risks; set by :meth:`fit_to_predictions`."""
        self.baseline: Baseline | None = None
        """The baseline hazard of the weights named in :meth:`for_weights`."""

    @classmethod
    def examples(cls) -> list[TaskExample]:
        """See :class:`~e2e.tasks.base.Task`."""
        rows = [
            {"event": event, "time": time}
            for event, time in zip("1011011010", "5328771946", strict=True)
        ]
        variants = ({}, {"loss": "cox"}, {"loss": "cox", "ties": "breslow"}, {"alpha": 0.4})
        return [TaskExample({"event": "1", "bins": 3, **options}, rows) for options in variants]

    def encode(self, cells: Mapping[str, str]) -> Tensor:
        """Return (2,) float64: time, and 1 for an event or 0; both NaN if one of the cells is empty.

        Raises
        ------
        UserError
            The code is unknown, or the time is not a number above 0.
        """
        event_column, time_column = self.columns
        code, time = cells[event_column], cells[time_column]
        if not code or not time:
            return torch.full((2,), math.nan, dtype=torch.float64)
        is_event = matches_code(code, self.event)
        if not is_event and not matches_code(code, self.censored):
            raise UserError(
                f"'{code}' in column '{event_column}' is neither task.event ('{self.event}') nor "
                f"task.censored ('{self.censored}')\n  set both to the codes of the table"
            )
        return torch.tensor([_parse_time(time, time_column), float(is_event)], dtype=torch.float64)

    def fit(self, targets: Sequence[Tensor], cases: Sequence[str]) -> None:
        """Cut the intervals and estimate the censoring, counting each training case once.

        Raises
        ------
        UserError
            There is no event, or ``nll`` has too few for the intervals.
        """
        by_case = {case: t for case, t in zip(cases, targets, strict=True) if self.is_labelled(t)}
        table = np.array([t.tolist() for t in by_case.values()]).reshape(-1, 2)
        time, event = table[:, 0], table[:, 1] == 1
        if not event.any():
            raise UserError(
                f"none of the {len(table)} labelled training cases has an event ('{self.event}' in "
                f"column '{self.columns[0]}')\n  check task.event and the splits"
            )
        cuts = np.quantile(time[event], np.arange(1, self.bins) / self.bins)
        # Before the first event there is nothing to evaluate.
        self.edges = np.unique(cuts[cuts > time[event].min()]).tolist()
        occupied = np.unique(np.searchsorted(self.edges, time[event], side="right"))
        if not self.cox and len(occupied) < self.bins:
            raise UserError(
                f"the {event.sum()} events of the training cases cannot be cut into {self.bins} "
                "intervals of time\n  lower task.bins, or set task.loss=cox"
            )
        self.censoring = Censoring.fit(time, event)

    @property
    def times(self) -> Array:
        """(T,) the last moments before :attr:`edges`, at which survival probabilities are evaluated.

        A time on an edge belongs to the interval that begins there, so the probability to survive the
        interval before it is that of no event *before* the edge. The two differ where times are rounded,
        to months or years, and many events lie on an edge.
        """
        return np.nextafter(self.edges, 0)

    def state(self) -> dict[str, Any]:
        """Return the edges, the censoring (times and probabilities) and the baseline hazards."""
        if self.censoring is None:
            return {}
        censoring = {
            "times": self.censoring.times.tolist(),
            "chance": self.censoring.chance.tolist(),
        }
        baselines = {
            name: {"times": fitted.times.tolist(), "log_hazard": fitted.log_hazard.tolist()}
            for name, fitted in self.baselines.items()
        }
        return {"edges": self.edges, "censoring": censoring, "baselines": baselines}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`~e2e.tasks.base.Task`."""
        edges, censoring = [float(edge) for edge in state["edges"]], state["censoring"]
        if not self.cox and len(edges) != self.bins - 1:
            raise ValueError(f"{len(edges) + 1} intervals where task.bins={self.bins}")
        self.edges = edges
        self.censoring = Censoring(np.array(censoring["times"]), np.array(censoring["chance"]))
        self.baselines = {
            name: Baseline(np.array(fitted["times"]), np.array(fitted["log_hazard"]))
            for name, fitted in state.get("baselines", {}).items()
        }

    def fit_to_predictions(
        self, weights_name: str, predicted: Array, targets: Array, cases: Sequence[str]
    ) -> None:
        """Estimate the baseline hazard; a case counts once, whatever its number of slides."""
        is_labelled = np.isfinite(targets).all(axis=1)
        time, event = targets[is_labelled].T
        _, case, slides_per_case = np.unique(
            np.asarray(cases)[is_labelled], return_inverse=True, return_counts=True
        )
        risk = predicted[is_labelled, 0]
        self.baselines = {}
        if np.isfinite(risk).all():  # otherwise no metric is defined, and no hazard either
            weights = 1 / slides_per_case[case]
            self.baselines[weights_name] = Baseline.fit(risk, time, event == 1, weights)

    def for_weights(self, name: str) -> Task:
        """Return the task with survival probabilities, if there is a baseline hazard of these weights."""
        if not self.baselines:
            return self
        task = copy.copy(self)
        task.metric_names = (*self.metric_names, "integrated_brier")
        task.baseline = self.baselines.get(name)
        task.prediction_columns = _prediction_columns(len(self.edges) if task.baseline else 0)
        return task

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """See :class:`~e2e.tasks.base.Task`; with ``cox`` the terms of a likelihood over all B bags."""
        time, event = target.unbind(dim=1)
        if self.cox:
            return cox_loss(logits[:, 0], time, event, ties=self.ties)
        return discrete_nll(logits, self._interval(time), event, alpha=self.alpha)

    def _interval(self, time: Tensor) -> Tensor:
        """(B,) the number of the interval of each time."""
        assert len(self.edges) == self.bins - 1, "the task has to be fitted first"
        return torch.bucketize(time.nan_to_num(0), time.new_tensor(self.edges), right=True)

    def predict(self, logits: Tensor) -> Tensor:
        """Return (B, 1 + T): the risk, then the probabilities to survive each interval, if there are any.

        T is ``bins`` for ``nll``, all intervals but the last for ``cox`` with a baseline hazard, else 0.
        """
        logits = logits.float()
        if self.baseline is not None:
            log_hazard = logits.new_tensor(self.baseline(self.times).tolist())
            return torch.cat([logits, (-(logits + log_hazard).exp()).exp()], dim=1)
        if self.cox:
            return logits
        survival = F.logsigmoid(-logits).cumsum(dim=1).exp()
        return torch.cat([-survival.sum(dim=1, keepdim=True), survival], dim=1)

    def metrics(self, predicted: Array, targets: Array, weights: Array) -> Values:
        """See :mod:`e2e.metrics.survival`; also ``survival_nll``, the mean loss of ``nll`` at alpha 0."""
        has_times = len(self.edges) > 1
        curve = predicted[:, 1:]
        values = survival_metrics(
            predicted[:, 0],
            targets,
            weights,
            censoring=self.censoring,
            times=self.times if has_times else None,
            survival=curve[:, : len(self.edges)] if has_times and curve.size else None,
        )
        if not self.cox:
            values["survival_nll"] = self._nll(curve, targets, weights)
        undefined = np.full(len(weights), np.nan)
        return {name: values.get(name, undefined) for name in self.metric_names}

    def fitted_reference(self, metric: str) -> object:
        """Return the times that are evaluated and the censoring; nothing for Harrell's C."""
        if metric == "c_index" or self.censoring is None:
            return ()
        times = () if metric == "c_index_uno" else tuple(self.edges)
        censoring = (self.censoring.times.tolist(), self.censoring.chance.tolist())
        return times, () if metric == "survival_nll" else censoring

    def figures(self, predicted: Array, targets: Array) -> list[Figure]:
        """See :func:`e2e.metrics.figures.survival_figures`."""
        is_labelled = np.isfinite(targets).all(axis=1)
        time, event = targets[is_labelled].T
        curve = predicted[is_labelled, 1 : 1 + len(self.edges)]
        survival = curve if curve.size else None
        return survival_figures(
            predicted[is_labelled, 0],
            time,
            event == 1,
            survival=survival,
            edges=self.times.tolist(),
        )

    def _nll(self, curve: Array, targets: Array, weights: Array) -> Array:
        """(R,) the mean negative log-likelihood of survival curves (n, T)."""
        is_labelled = np.isfinite(targets).all(axis=1)
        (time, event), rows = targets[is_labelled].T, np.arange(is_labelled.sum())
        survival = np.hstack([np.ones((len(rows), 1)), curve[is_labelled]])
        interval = np.searchsorted(self.edges, time, side="right")
        after = survival[rows, interval + 1]
        likelihood = np.where(event == 1, survival[rows, interval] - after, after)
        losses = -np.log(np.clip(likelihood, 1e-12, 1.0))
        return ratio(weights[:, is_labelled] @ losses, weights[:, is_labelled].sum(1))

    def heatmap_output(self, predicted: Sequence[float]) -> tuple[int, str]:
        """Return the interval in which an event is most probable (``cox``: its one output) and the risk."""
        drops = [0.0] if self.cox else -np.diff([1.0, *predicted[1:]])
        return int(np.argmax(drops)), f"risk {predicted[0]:.3g}"

    def group(self, target: Tensor) -> int:
        """Return 1 with an event, 0 if censored, -1 without a label."""
        return int(target[1]) if self.is_labelled(target) else -1

    def categories(self, target: Tensor) -> list[str]:
        """Return ``event`` for a case with one: without any event no two cases can be compared."""
        return ["event"] if self.group(target) == 1 else []

    def describe(self, targets: Sequence[Tensor]) -> str:
        """Return the number of events, with their code, and the range of times."""
        pairs = [target.tolist() for target in targets if self.is_labelled(target)]
        if not pairs:
            return "no label"
        times, events = [time for time, _ in pairs], sum(event == 1 for _, event in pairs)
        return (
            f"{events} with an event ({events / len(pairs):.0%}; '{self.event}' in {self.columns[0]}), "
            f"times {min(times):g} to {max(times):g}"
        )


def _prediction_columns(num_probabilities: int) -> tuple[str, ...]:
    return ("risk", *(f"survival_{k + 1}" for k in range(num_probabilities)))


def _parse_time(cell: str, column: str) -> float:
    """Return a time; UserError unless it is a number above 0."""
    try:
        time = float(cell)
    except ValueError:
        time = math.nan
    if not 0 < time < math.inf:
        raise UserError(f"'{cell}' in column '{column}' is not a time: it must be a number above 0")
    return time
