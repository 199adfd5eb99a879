"""Survival: the time to an event, or to the last sight of a case without one."""

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
from e2e.tasks.base import TASKS, Task, check_choice, choose_monitor, is_code, other_code

LOSSES = ("nll", "cox")
TIES = ("efron", "breslow")
BASELINES = ("breslow", "none")


@TASKS.register("survival")
class Survival(Task):
    """A risk for each case: higher is an earlier event. The target is (time, event), event 1 or 0.

    ``nll``: one output for each of ``bins`` intervals of time, cut at quantiles of the times of
    events of the training cases; [e_k, e_{k+1}), the last without end. The risk is -sum_t S_t.
    ``cox``: one output, the log of the relative hazard; its risk set is the whole update, over all
    ranks, so the more bags an update has (``optim.bags``), the better. See
    :mod:`e2e.losses.survival`.

    Metrics besides Harrell's C use the censoring of the training cases, and the times at which
    ``bins`` intervals meet (:attr:`times`). Up to these ``cox`` has chances S(t) = exp(-H0(t)
    exp(risk)) to be without an event, with H0 of the training cases' risks by the weights that are
    kept (one pass over them after the training); see :class:`e2e.metrics.survival.Baseline`.

    Args:
        event: the code in ``event_column`` that means the event was seen. Tables differ (1 is an
            event in some, censored in others), so there is no default.
        censored: the code of a case lost from sight; empty: the other one of 0 and 1.
        time_column: the column of times, over 0, of any unit.
        event_column: the column of those codes.
        loss: nll or cox.
        bins: of ``nll``, two or more; times of ``cox``'s metrics.
        alpha: of ``nll``, in [0, 1]: takes so much off the weight of censored cases.
        ties: of ``cox``: efron or breslow.
        baseline: of ``cox``: breslow, or none: risks alone.
        monitor: metric that selects the epoch.
    """

    label_columns = ("time", "event")
    output_names = ("risk",)
    of_cases = True
    pools = False  # risks of two models, or of other intervals, are on other scales

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
                f"task.event is missing: which code of column '{event_column}' means that the event was "
                "seen?\n  task.event=1 where 1 is an event, task.event=0 where 1 is censored"
            )
        if bins < 2 or not 0 <= alpha <= 1:
            raise UserError(
                f"task.bins must be 2 or more and task.alpha in [0, 1], found {bins} and {alpha:g}"
            )
        self.event, self.censored = event, other_code("censored", event, censored, "censored")
        self.columns = (event_column, time_column)
        self.cox = self.whole_update = check_choice("loss", loss, LOSSES) == "cox"
        self.bins, self.alpha, self.ties = bins, alpha, check_choice("ties", ties, TIES)
        self.num_outputs = 1 if self.cox else bins
        self.prediction_columns = _columns(0 if self.cox else bins)
        of_curves = () if self.cox else ("integrated_brier", "survival_nll")
        self.metric_names = ("c_index", "c_index_uno", "auc_dynamic_mean", *of_curves)
        self.monitor = choose_monitor(monitor, "c_index", self.metric_names)
        self.tie_break = "c_index_uno" if self.cox else "survival_nll"
        self.edges: list[float] = []
        """Where one interval ends and the next begins; cut by :meth:`fit`."""
        self.censoring: Censoring | None = None
        self.fits_predictions = (
            check_choice("baseline", baseline, BASELINES) == "breslow" and self.cox
        )
        self.baselines: dict[str, Baseline] = {}
        """Of each kept weights' risks; found by :meth:`settle`."""
        self.baseline: Baseline | None = None
        """Of the weights that :meth:`of` was told."""

    def encode(self, words: Mapping[str, str]) -> Tensor:
        """(2,) float64: time, and 1 for an event or 0; NaN twice where one of them is empty."""
        event_column, time_column = self.columns
        code, word = words[event_column], words[time_column]
        if not code or not word:
            return torch.full((2,), math.nan, dtype=torch.float64)
        codes = [is_code(code, known) for known in (self.event, self.censored)]
        if not any(codes):
            raise UserError(
                f"'{code}' in column '{event_column}' means neither an event ('{self.event}') nor "
                f"censored ('{self.censored}')\n  set task.event and task.censored to the table's codes"
            )
        return torch.tensor([_time(word, time_column), float(codes[0])], dtype=torch.float64)

    def fit(self, targets: Sequence[Tensor], cases: Sequence[str]) -> None:
        """The intervals and the censoring of the training cases; each counts once."""
        once = {case: t for case, t in zip(cases, targets, strict=True) if self.is_labelled(t)}
        table = np.array([t.tolist() for t in once.values()]).reshape(-1, 2)
        time, event = table[:, 0], table[:, 1] == 1
        if not event.any():
            raise UserError(
                f"none of the {len(table)} training cases with a label has an event ('{self.event}' in "
                f"column '{self.columns[0]}')\n  look at task.event and at the splits"
            )
        cuts = np.quantile(time[event], np.arange(1, self.bins) / self.bins)
        # Before the first event there is nothing to judge.
        self.edges = np.unique(cuts[cuts > time[event].min()]).tolist()
        filled = np.unique(np.searchsorted(self.edges, time[event], side="right"))
        if not self.cox and len(filled) < self.bins:
            raise UserError(
                f"the {event.sum()} events of the training cases do not make {self.bins} intervals of "
                "time\n  lower task.bins, or set task.loss=cox"
            )
        self.censoring = Censoring.fit(time, event)

    @property
    def times(self) -> Array:
        """(T,) the last moments before :attr:`edges`, at which probabilities are evaluated.

        A time on an edge is of the interval that begins there, so the chance to outlive the interval
        before is one to be without an event *before* the edge. That is another number where times are
        rounded, to months or years, and many events are on an edge.
        """
        return np.nextafter(self.edges, 0)

    def state(self) -> dict[str, Any]:
        """Edges, the censoring as times and chances, and what was settled of each weights."""
        if self.censoring is None:
            return {}
        known = {"times": self.censoring.times.tolist(), "chance": self.censoring.chance.tolist()}
        settled = {
            kept: {"times": found.times.tolist(), "log_hazard": found.log_hazard.tolist()}
            for kept, found in self.baselines.items()
        }
        return {"edges": self.edges, "censoring": known, "baselines": settled}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`Task`."""
        edges, known = [float(edge) for edge in state["edges"]], state["censoring"]
        if not self.cox and len(edges) != self.bins - 1:
            raise ValueError(f"{len(edges) + 1} intervals where task.bins={self.bins}")
        self.edges = edges
        self.censoring = Censoring(np.array(known["times"]), np.array(known["chance"]))
        self.baselines = {
            kept: Baseline(np.array(found["times"]), np.array(found["log_hazard"]))
            for kept, found in state.get("baselines", {}).items()
        }

    def fit_to_predictions(
        self, kept: str, predicted: Array, targets: Array, cases: Sequence[str]
    ) -> None:
        """The baseline hazard of these risks; a case counts once, however many its slides."""
        known = np.isfinite(targets).all(axis=1)
        time, event = targets[known].T
        _, which, slides = np.unique(
            np.asarray(cases)[known], return_inverse=True, return_counts=True
        )
        risk = predicted[known, 0]
        finite = np.isfinite(risk).all()  # else no metric is defined, and no hazard is
        found = Baseline.fit(risk, time, event == 1, 1 / slides[which]) if finite else None
        self.baselines = {kept: found} if found else {}

    def of(self, kept: str) -> Task:
        """With the chances and their metric, as far as :meth:`settle` was told of these weights."""
        if not self.baselines:
            return self
        ours = copy.copy(self)
        ours.metric_names = (*self.metric_names, "integrated_brier")
        ours.baseline = self.baselines.get(kept)
        ours.prediction_columns = _columns(len(self.edges) if ours.baseline else 0)
        return ours

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """See :class:`Task`; of ``cox`` the terms of a likelihood whose risk set is all of them."""
        time, event = target.unbind(dim=1)
        if self.cox:
            return cox_loss(logits[:, 0], time, event, ties=self.ties)
        return discrete_nll(logits, self._interval(time), event, alpha=self.alpha)

    def _interval(self, time: Tensor) -> Tensor:
        assert len(self.edges) == self.bins - 1, "the task has to be fitted first"
        return torch.bucketize(time.nan_to_num(0), time.new_tensor(self.edges), right=True)

    def predict(self, logits: Tensor) -> Tensor:
        """(B, 1) risk; behind it, if there are, the chances to outlive each interval: of ``nll`` all
        ``bins``, of a baseline all but the last."""
        logits = logits.float()
        if self.baseline is not None:
            log_hazard = logits.new_tensor(self.baseline(self.times).tolist())
            return torch.cat([logits, (-(logits + log_hazard).exp()).exp()], dim=1)
        if self.cox:
            return logits
        alive = F.logsigmoid(-logits).cumsum(dim=1).exp()
        return torch.cat([-alive.sum(dim=1, keepdim=True), alive], dim=1)

    def metrics(self, predicted: Array, targets: Array, weights: Array) -> Values:
        """See :mod:`e2e.metrics.survival`; and ``survival_nll``, the mean loss of ``nll`` at alpha 0."""
        several = len(self.edges) > 1
        curve = predicted[:, 1:]
        found = survival_metrics(
            predicted[:, 0],
            targets,
            weights,
            censoring=self.censoring,
            times=self.times if several else None,
            survival=curve[:, : len(self.edges)] if several and curve.size else None,
        )
        if not self.cox:
            found["survival_nll"] = self._nll(curve, targets, weights)
        undefined = np.full(len(weights), np.nan)
        return {name: found.get(name, undefined) for name in self.metric_names}

    def fitted_reference(self, metric: str) -> object:
        """The times that are evaluated, and the censoring; of Harrell's C nothing."""
        known = self.censoring
        if metric == "c_index" or known is None:
            return ()
        times = () if metric == "c_index_uno" else tuple(self.edges)
        censoring = (known.times.tolist(), known.chance.tolist())
        return times, () if metric == "survival_nll" else censoring

    def figures(self, predicted: Array, targets: Array) -> list[Figure]:
        """See :func:`e2e.metrics.figures.survival_figures`."""
        known = np.isfinite(targets).all(axis=1)
        time, event = targets[known].T
        curve = predicted[known, 1 : 1 + len(self.edges)]
        survival = curve if curve.size else None
        return survival_figures(
            predicted[known, 0], time, event == 1, survival=survival, edges=self.times.tolist()
        )

    def _nll(self, curve: Array, targets: Array, weights: Array) -> Array:
        known = np.isfinite(targets).all(axis=1)
        (time, event), rows = targets[known].T, np.arange(known.sum())
        alive = np.hstack([np.ones((len(rows), 1)), curve[known]])
        at = np.searchsorted(self.edges, time, side="right")
        after = alive[rows, at + 1]
        chance = np.where(event == 1, alive[rows, at] - after, after)
        lost = -np.log(np.clip(chance, 1e-12, 1.0))
        return ratio(weights[:, known] @ lost, weights[:, known].sum(1))

    def shown(self, predicted: Sequence[float]) -> tuple[int, str]:
        """The interval in which an event is likeliest, of ``cox`` its one output; the risk."""
        falls = [0.0] if self.cox else -np.diff([1.0, *predicted[1:]])
        return int(np.argmax(falls)), f"risk {predicted[0]:.3g}"

    def group(self, target: Tensor) -> int:
        """1 with an event, 0 when censored, -1 where that is not known."""
        return int(target[1]) if self.is_labelled(target) else -1

    def kinds(self, target: Tensor) -> list[str]:
        """An event, if it is one: without any no two cases can be compared."""
        return ["event"] if self.group(target) == 1 else []

    def describe(self, targets: Sequence[Tensor]) -> str:
        """How many events there are, and by which code."""
        known = [target.tolist() for target in targets if self.is_labelled(target)]
        if not known:
            return "no label"
        times, events = [time for time, _ in known], sum(event == 1 for _, event in known)
        return (
            f"{events} with an event ({events / len(known):.0%}; '{self.event}' in {self.columns[0]}), "
            f"times {min(times):g} to {max(times):g}"
        )


def _columns(chances: int) -> tuple[str, ...]:
    return ("risk", *(f"survival_{k + 1}" for k in range(chances)))


def _time(word: str, column: str) -> float:
    try:
        time = float(word)
    except ValueError:
        time = math.nan
    if not 0 < time < math.inf:
        raise UserError(f"'{word}' in column '{column}' is no time: it must be a number over 0")
    return time
