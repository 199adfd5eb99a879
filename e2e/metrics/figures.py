"""Pictures of how a model did, and the numbers behind them: each a PNG and a CSV of the same name."""

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
CHANCE: Line = (np.array([0.0, 1.0]), np.array([0.0, 1.0]))


@dataclass(frozen=True)
class Curves:
    """Lines over a common pair of axes."""

    name: str
    """Of the files, such as ``roc``."""
    title: str
    x: str
    y: str
    lines: Mapping[str, Line]
    """What a line is of -> its x and y."""
    steps: bool = False
    """A value holds until the x of the next point."""
    marks: str = "-"
    """matplotlib's format of a line: ``o-`` marks its points, ``o`` does not join them."""
    reference: Line | None = None
    """A dashed line to compare with."""
    shares: bool = True
    """y goes from 0 to 1, and is shown so, whatever part of it the lines take."""
    more: Mapping[str, NDArray[Any] | float] = field(default_factory=dict)
    """Further numbers of each point, or one for all, for the CSV."""

    def draw(self) -> Canvas:
        """The picture."""
        canvas, axes = _axes(self.title, self.x, self.y)
        if self.reference:
            axes.plot(*self.reference, color="0.7", linestyle="--", linewidth=1)
        for label, (x, y) in self.lines.items():
            style = "steps-post" if self.steps else "default"
            # After a space: matplotlib leaves a name that begins with _ out of the legend.
            axes.plot(x, y, self.marks, drawstyle=style, markersize=4, label=f" {label}")
        if self.shares:
            axes.set_ylim(-0.05, 1.05)
        axes.legend(frameon=False, fontsize=8)
        return canvas

    def table(self) -> pd.DataFrame:
        """A row for each point: its line, x and y."""
        parts = [
            pd.DataFrame({"line": k, self.x: x, self.y: y}) for k, (x, y) in self.lines.items()
        ]
        return pd.concat(parts).assign(**self.more)


@dataclass(frozen=True)
class Matrix:
    """Counts of true class (rows) against predicted class (columns)."""

    name: str
    title: str
    classes: Sequence[str]
    counts: NDArray[np.int64]

    def draw(self) -> Canvas:
        """The picture: shares of each row, with the counts written in."""
        canvas, axes = _axes(self.title, "predicted", "label")
        shares = self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(self.counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=8)
        places = range(len(self.classes))
        axes.set_xticks(places, self.classes, rotation=45, ha="right")
        axes.set_yticks(places, self.classes)
        return canvas

    def table(self) -> pd.DataFrame:
        """A row for each true class, a column for each predicted one."""
        names = pd.Index(self.classes, name="label")
        return pd.DataFrame(self.counts, index=names, columns=list(self.classes)).reset_index()


Figure = Curves | Matrix


def write_figures(pictures: Iterable[Figure], folder: Path) -> None:
    """``folder/<name>.png`` and ``.csv`` of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        at = io.BytesIO()
        with rc_context({"text.parse_math": False}):  # a class may be called $5$
            picture.draw().savefig(at, format="png", dpi=150, bbox_inches="tight")
        write_atomically(folder / f"{picture.name}.png", at.getvalue())
        table = picture.table().to_csv(index=False).encode()
        write_atomically(folder / f"{picture.name}.csv", table)


def classification_figures(
    probabilities: Array,
    labels: NDArray[np.int64],
    classes: Sequence[str],
    decided: NDArray[np.int64],
) -> list[Figure]:
    """ROC, precision against recall, calibration and confusion.

    Args:
        probabilities: (n, C) that sum to 1.
        labels: (n,) 0 to C - 1.
        classes: their C names. Of two, the last is the positive one; of more, each against the rest.
            A class that no slide has, or every slide, has no line.
        decided: (n,) the class that is called.

    Returns:
        The pictures; without ROC and precision where no class has a line.
    """
    from sklearn.metrics import confusion_matrix

    asked = range(len(classes)) if len(classes) > 2 else [len(classes) - 1]
    confused = confusion_matrix(labels, decided, labels=range(len(classes)))
    return [
        *score_figures({classes[k]: (probabilities[:, k], labels == k) for k in asked}),
        calibration(probabilities.max(1), probabilities.argmax(1) == labels),
        Matrix("confusion", "confusion", classes, confused),
    ]


def score_figures(scores: Mapping[str, tuple[Array, NDArray[np.bool_]]]) -> list[Figure]:
    """ROC, and precision against recall: name -> (n,) scores, and whether each is a positive.

    What is never positive, or always, has no line; without any line there is no picture. The area
    under a line is the AUC, and the average precision, of the metrics.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    roc: dict[str, Line] = {}
    precision: dict[str, Line] = {}
    for name, (score, positive) in scores.items():
        if 0 < positive.sum() < len(positive):
            roc[name] = roc_curve(positive, score)[:2]
            right, recall, _ = precision_recall_curve(positive, score)
            precision[name] = (recall, right)
    if not roc:
        return []
    rates = ("false positive rate", "true positive rate")
    return [
        Curves("roc", "ROC", *rates, roc, reference=CHANCE),
        # Steps: between two thresholds precision is not on the straight line (Davis & Goadrich 2006).
        Curves(
            "precision_recall",
            "precision and recall",
            "recall",
            "precision",
            precision,
            steps=True,
        ),
    ]


def calibration(confidence: Array, right: NDArray[np.bool_]) -> Curves:
    """How often the likeliest class is right, by how probable the model calls it; see ECE.

    Of ordered grades that is not always the one that is called (:func:`classification_figures`, ``decided``).

    Bins are equally wide (Guo et al. 2017, arXiv:1706.04599); those without a slide have no point.
    """
    place = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    counts = np.bincount(place, minlength=ECE_BINS)
    held = counts > 0
    said = np.bincount(place, confidence, ECE_BINS)[held] / counts[held]
    true = np.bincount(place, right, ECE_BINS)[held] / counts[held]
    return Curves(
        "calibration",
        "calibration",
        "probability of the likeliest class",
        "share of slides of that class",
        {f"{len(confidence):,} slides": (said, true)},
        marks="o-",
        reference=CHANCE,
        more={"slides": counts[held]},
    )


def survival_figures(
    risk: Array,
    time: Array,
    event: NDArray[np.bool_],
    *,
    survival: Array | None = None,
    edges: Sequence[float] = (),
) -> list[Figure]:
    """Kaplan-Meier curves of the cases of low and of high risk; calibration of predicted survival.

    Args:
        risk: (n,) higher is an earlier event. The groups are cut at its median among these cases.
        time: (n,) to the event, or to the last sight.
        event: (n,) whether it was seen.
        survival: (n, T) predicted chance to outlive each time of ``edges`` (T,); None: none.

    The p in the title, and in the CSV, is that of :func:`log_rank`. In the calibration each point is a
    quarter of the cases, by predicted survival at that time: its mean against the Kaplan-Meier estimate.
    """
    high = risk > np.median(risk)
    groups = {"low risk": ~high, "high risk": high}
    lines = {
        f"{name} ({own.sum():,}, {event[own].sum():,} events)": _survival_line(
            time[own], event[own]
        )
        for name, own in groups.items()
        if own.any()
    }
    p = log_rank(time, event, high)
    why = "no event tells them apart" if len(lines) == 2 else "one risk for all"
    title = f"log-rank p = {p:.3g}" if np.isfinite(p) else f"log-rank p undefined: {why}"
    axes, more = ("time", "without an event"), {"log_rank_p": p}
    found: list[Figure] = [
        Curves("kaplan_meier", title, *axes, lines, steps=True, more=more),
    ]
    if survival is not None and len(edges):
        found.append(_survival_calibration(survival, edges, time, event))
    return found


def log_rank(time: Array, event: NDArray[np.bool_], high: NDArray[np.bool_]) -> float:
    """Two-sided p of the log-rank test (Mantel 1966) of no difference between two groups, ``high`` or not.

    NaN where it is not defined: no event falls while both groups are at risk and some outlive it.
    """
    from sksurv.compare import compare_survival
    from sksurv.util import Surv

    at = np.unique(time[event])[:, None]
    at_risk, died = time >= at, (time == at) & event
    both = (at_risk & high).any(axis=1) & (at_risk & ~high).any(axis=1)
    if not (both & (died.sum(axis=1) < at_risk.sum(axis=1))).any():
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
        quarters = [own for own in np.array_split(np.argsort(survival[:, k]), 4) if len(own)]
        said = np.array([survival[own, k].mean() for own in quarters])
        at = np.array([edge])
        true = [
            kaplan_meier(time[own], event[own], np.ones((1, len(own))), at)[0, 0]
            for own in quarters
        ]
        lines[f"at {edge:.4g}"] = (said, np.array(true))
    axes = ("predicted survival", "Kaplan-Meier estimate")
    return Curves("calibration", "calibration", *axes, lines, marks="o-", reference=CHANCE)


def regression_figures(predicted: Array, targets: Array, name: str) -> list[Figure]:
    """Predicted against true values, (n,) each."""
    both = np.concatenate([predicted, targets])
    ends = np.array([both.min(), both.max()])
    line = {f"{len(targets):,} slides": (targets, predicted)}
    axes, diagonal = ("label", "predicted"), (ends, ends)
    return [
        Curves("scatter", name, *axes, line, marks="o", reference=diagonal, shares=False),
    ]


def _axes(title: str, x: str, y: str):
    canvas = Canvas(figsize=(4.5, 4.0))
    axes = canvas.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return canvas, axes
