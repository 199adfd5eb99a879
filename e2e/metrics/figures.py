"""Figures of a model's results, each written as a PNG and as a CSV with its numbers."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from e2e.files import write_atomically
from e2e.metrics.survival import kaplan_meier
from e2e.metrics.values import ECE_BINS, Array

Line = tuple[Array, Array]
"""The x and the y of a line."""
DIAGONAL: Line = (np.array([0.0, 1.0]), np.array([0.0, 1.0]))
"""ROC of chance, and perfect calibration."""


@dataclass(frozen=True)
class Curves:
    """A figure of one or more lines over common axes."""

    name: str
    """Name of the files, such as ``roc``."""
    title: str
    """Title of the figure."""
    x: str
    """Label of the x axis, and its column in the CSV."""
    y: str
    """Label of the y axis, and its column in the CSV."""
    lines: Mapping[str, Line]
    """Label of a line -> its x and y."""
    steps: bool = False
    """Draw steps: each y holds until the x of the next point."""
    line_format: str = "-"
    """matplotlib's format string: ``o-`` marks the points, ``o`` does not join them."""
    reference: Line | None = None
    """A dashed line to compare with."""
    is_fraction: bool = True
    """y lies in [0, 1], and the axis always shows this range."""
    extra_columns: Mapping[str, NDArray[Any] | float] = field(default_factory=dict)
    """Further columns of the CSV: a number for each point, or one for all."""

    def draw(self) -> Canvas:
        """Return the matplotlib figure."""
        canvas, axes = _axes(self.title, self.x, self.y)
        if self.reference:
            axes.plot(*self.reference, color="0.7", linestyle="--", linewidth=1)
        for label, (x, y) in self.lines.items():
            style = "steps-post" if self.steps else "default"
            # After a space: matplotlib omits labels that begin with _ from the legend.
            axes.plot(x, y, self.line_format, drawstyle=style, markersize=4, label=f" {label}")
        if self.is_fraction:
            axes.set_ylim(-0.05, 1.05)
        axes.legend(frameon=False, fontsize=8)
        return canvas

    def table(self) -> pd.DataFrame:
        """Return one row for each point: its line, x, y and the extra columns."""
        parts = [
            pd.DataFrame({"line": label, self.x: x, self.y: y})
            for label, (x, y) in self.lines.items()
        ]
        return pd.concat(parts).assign(**self.extra_columns)


@dataclass(frozen=True)
class Matrix:
    """A figure of counts by true class (rows) and predicted class (columns)."""

    name: str
    """Name of the files, such as ``confusion``."""
    title: str
    """Title of the figure."""
    classes: Sequence[str]
    """Names of the C classes."""
    counts: NDArray[np.int64]
    """(C, C) counts."""

    def draw(self) -> Canvas:
        """Return the matplotlib figure: fractions of each row as colours, with the counts as text."""
        canvas, axes = _axes(self.title, "predicted", "label")
        fractions = self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(self.counts):
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=8)
        ticks = range(len(self.classes))
        axes.set_xticks(ticks, self.classes, rotation=45, ha="right")
        axes.set_yticks(ticks, self.classes)
        return canvas

    def table(self) -> pd.DataFrame:
        """Return a row for each true class, with a column for each predicted class."""
        names = pd.Index(self.classes, name="label")
        return pd.DataFrame(self.counts, index=names, columns=list(self.classes)).reset_index()


Figure = Curves | Matrix
"""A figure that can be drawn and written as a table."""


def write_figures(figures: Iterable[Figure], folder: Path) -> None:
    """Write each figure as ``folder/<name>.png`` and ``folder/<name>.csv``.

    Raises
    ------
    OutputError
        A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        buffer = io.BytesIO()
        with rc_context({"text.parse_math": False}):  # a class name such as $5$ is no formula
            figure.draw().savefig(buffer, format="png", dpi=150, bbox_inches="tight")
        write_atomically(folder / f"{figure.name}.png", buffer.getvalue())
        table = figure.table().to_csv(index=False).encode()
        write_atomically(folder / f"{figure.name}.csv", table)


def classification_figures(
    probabilities: Array,
    labels: NDArray[np.int64],
    classes: Sequence[str],
    predicted: NDArray[np.int64],
) -> list[Figure]:
    """Return the ROC, precision-recall, calibration and confusion figures of a classifier.

    Parameters
    ----------
    probabilities : ndarray, shape (n, C)
        Class probabilities; each row sums to 1.
    labels : ndarray of int, shape (n,)
        True classes, 0 to C - 1.
    classes : sequence of str, length C
        Names of the classes. Of two, the last is the positive one; of more, each has a line against the
        rest. A class that no slide or every slide belongs to has no line.
    predicted : ndarray of int, shape (n,)
        Predicted classes.

    Returns
    -------
    list of Figure
        Without ROC and precision-recall if no class has a line.
    """
    from sklearn.metrics import confusion_matrix

    positive_classes = range(len(classes)) if len(classes) > 2 else [len(classes) - 1]
    counts = confusion_matrix(labels, predicted, labels=range(len(classes)))
    return [
        *score_figures({classes[k]: (probabilities[:, k], labels == k) for k in positive_classes}),
        calibration(probabilities.max(1), probabilities.argmax(1) == labels),
        Matrix("confusion", "confusion", classes, counts),
    ]


def score_figures(scores: Mapping[str, tuple[Array, NDArray[np.bool_]]]) -> list[Figure]:
    """Return the ROC and precision-recall figures of one or more scores.

    The areas under the lines are the AUC and the average precision of :mod:`e2e.metrics.values`.

    Parameters
    ----------
    scores : mapping
        Label of a line -> (n,) scores, and (n,) whether each bag is positive. A score whose bags are all
        positive or all negative has no line.

    Returns
    -------
    list of Figure
        Empty if there is no line.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    roc: dict[str, Line] = {}
    precision_recall: dict[str, Line] = {}
    for name, (score, positive) in scores.items():
        if 0 < positive.sum() < len(positive):
            roc[name] = roc_curve(positive, score)[:2]
            precision, recall, _ = precision_recall_curve(positive, score)
            precision_recall[name] = (recall, precision)
    if not roc:
        return []
    return [
        Curves("roc", "ROC", "false positive rate", "true positive rate", roc, reference=DIAGONAL),
        # Steps: precision is not linear between two thresholds (Davis & Goadrich 2006).
        Curves(
            "precision_recall",
            "precision and recall",
            "recall",
            "precision",
            precision_recall,
            steps=True,
        ),
    ]


def calibration(confidence: Array, correct: NDArray[np.bool_]) -> Curves:
    """Return the reliability diagram: accuracy of the most probable class against its probability.

    Bins have equal width, as in the expected calibration error (Guo et al. 2017, arXiv:1706.04599);
    empty bins have no point. Of ordered grades, the most probable class is not always the predicted one.

    Parameters
    ----------
    confidence : ndarray, shape (n,)
        Probability of the most probable class.
    correct : ndarray of bool, shape (n,)
        Whether the most probable class is the true one.
    """
    bin_index = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    counts = np.bincount(bin_index, minlength=ECE_BINS)
    occupied = counts > 0
    mean_confidence = np.bincount(bin_index, confidence, ECE_BINS)[occupied] / counts[occupied]
    accuracy = np.bincount(bin_index, correct, ECE_BINS)[occupied] / counts[occupied]
    return Curves(
        "calibration",
        "calibration",
        "probability of the likeliest class",
        "share of slides of that class",
        {f"{len(confidence):,} slides": (mean_confidence, accuracy)},
        line_format="o-",
        reference=DIAGONAL,
        extra_columns={"slides": counts[occupied]},
    )


def survival_figures(
    risk: Array,
    time: Array,
    event: NDArray[np.bool_],
    *,
    survival: Array | None = None,
    edges: Sequence[float] = (),
) -> list[Figure]:
    """Return Kaplan-Meier curves of low and high risk, and the calibration of predicted survival.

    The p-value in the title and in the CSV is that of :func:`log_rank`. Each point of the calibration is a
    quarter of the cases, by predicted survival at that time: its mean against the Kaplan-Meier estimate.

    Parameters
    ----------
    risk : ndarray, shape (n,)
        Higher for an earlier event. The groups are separated at the median of these cases.
    time : ndarray, shape (n,)
        Time of the event or of censoring.
    event : ndarray of bool, shape (n,)
        True where the event was observed.
    survival : ndarray, shape (n, T), optional
        Predicted probability to be free of the event after each of ``edges``; None: no calibration.
    edges : sequence of float, length T
        Times of the calibration.
    """
    high = risk > np.median(risk)
    lines: dict[str, Line] = {}
    for name, in_group in (("low risk", ~high), ("high risk", high)):
        if in_group.any():
            label = f"{name} ({in_group.sum():,}, {event[in_group].sum():,} events)"
            lines[label] = _survival_line(time[in_group], event[in_group])
    p = log_rank(time, event, high)
    if np.isfinite(p):
        title = f"log-rank p = {p:.3g}"
    elif len(lines) == 2:
        title = "log-rank p undefined: no event separates the groups"
    else:
        title = "log-rank p undefined: all risks are equal"
    figures: list[Figure] = [
        Curves(
            "kaplan_meier",
            title,
            "time",
            "without an event",
            lines,
            steps=True,
            extra_columns={"log_rank_p": p},
        ),
    ]
    if survival is not None and len(edges):
        figures.append(_survival_calibration(survival, edges, time, event))
    return figures


def log_rank(time: Array, event: NDArray[np.bool_], high: NDArray[np.bool_]) -> float:
    """Return the two-sided p-value of the log-rank test (Mantel 1966) between two groups.

    Parameters
    ----------
    time : ndarray, shape (n,)
        Time of the event or of censoring.
    event : ndarray of bool, shape (n,)
        True where the event was observed.
    high : ndarray of bool, shape (n,)
        Whether a case belongs to the second group.

    Returns
    -------
    float
        NaN unless there is an event while both groups are at risk and some case outlives it.
    """
    from sksurv.compare import compare_survival
    from sksurv.util import Surv

    event_times = np.unique(time[event])[:, None]
    at_risk, died = time >= event_times, (time == event_times) & event
    both_at_risk = (at_risk & high).any(axis=1) & (at_risk & ~high).any(axis=1)
    if not (both_at_risk & (died.sum(axis=1) < at_risk.sum(axis=1))).any():
        return np.nan
    return float(compare_survival(Surv.from_arrays(event, time), high)[1])


def _survival_line(time: Array, event: NDArray[np.bool_]) -> Line:
    at = np.unique(time)
    curve = kaplan_meier(time, event, np.ones((1, len(time))), at)[0]
    return np.r_[0.0, at], np.r_[1.0, curve]


def _survival_calibration(
    survival: Array, edges: Sequence[float], time: Array, event: NDArray[np.bool_]
) -> Curves:
    lines: dict[str, Line] = {}
    for k, edge in enumerate(edges):
        quarters = [rows for rows in np.array_split(np.argsort(survival[:, k]), 4) if len(rows)]
        predicted = np.array([survival[rows, k].mean() for rows in quarters])
        at = np.array([edge])
        observed = [
            kaplan_meier(time[rows], event[rows], np.ones((1, len(rows))), at)[0, 0]
            for rows in quarters
        ]
        lines[f"at {edge:.4g}"] = (predicted, np.array(observed))
    return Curves(
        "calibration",
        "calibration",
        "predicted survival",
        "Kaplan-Meier estimate",
        lines,
        line_format="o-",
        reference=DIAGONAL,
    )


def regression_figures(predicted: Array, targets: Array, name: str) -> list[Figure]:
    """Return the scatter plot of (n,) predictions against (n,) true values of the target ``name``."""
    both = np.concatenate([predicted, targets])
    ends = np.array([both.min(), both.max()])
    points = {f"{len(targets):,} slides": (targets, predicted)}
    return [
        Curves(
            "scatter",
            name,
            "label",
            "predicted",
            points,
            line_format="o",
            reference=(ends, ends),
            is_fraction=False,
        ),
    ]


def _axes(title: str, x: str, y: str):
    """An empty matplotlib figure and its axes."""
    canvas = Canvas(figsize=(4.5, 4.0))
    axes = canvas.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return canvas, axes
