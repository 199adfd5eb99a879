"""Metrics of a run's predictions with confidence intervals, and the files that hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.cohort.folds import tcga_sites
from e2e.engine.model import MILModel
from e2e.errors import UserError
from e2e.files import write_json
from e2e.log import Screen, warn_of_failure
from e2e.metrics.bootstrap import by_group, case_weights, confidence_interval
from e2e.metrics.figures import write_figures
from e2e.parallel import Strategy
from e2e.reports.heatmap import heatmap_writer
from e2e.reports.predictions import (
    OnSlide,
    Prediction,
    predict,
    to_arrays,
    write_predictions,
)
from e2e.tasks.base import Task
from e2e.training.checkpoint import check_weights, load_checkpoint, select_prefix

Metrics = dict[str, dict[str, float | None]]
"""Metric -> ``value``, ``low`` and ``high``."""
UNKNOWN_CENTRE = "unknown"
"""Centre of slides without one in the label table, if other slides have one."""


def score(predictions: Sequence[Prediction], task: Task, *, draws: int, seed: int = 0) -> Metrics:
    """Return each metric with its 95 % percentile interval over bootstrap resamples of the cases.

    Parameters
    ----------
    predictions
        Predictions with targets, one for each slide.
    task
        Computes the metrics.
    draws
        Number of resamples.
    seed
        Random seed of the resamples.
    """
    return score_centres(predictions, task, [], draws=draws, seed=seed)[0]


def score_centres(
    predictions: Sequence[Prediction],
    task: Task,
    centres: Sequence[str],
    *,
    draws: int,
    seed: int = 0,
) -> tuple[Metrics, dict[str, dict[str, Any]]]:
    """Return the metrics of all slides, and of each centre under the same resamples.

    Parameters
    ----------
    predictions
        Predictions with targets, one for each slide.
    task
        Computes the metrics.
    centres
        The centre of each prediction; empty: there are no results by centre.
    draws
        Number of resamples.
    seed
        Random seed of the resamples.

    Returns
    -------
    metrics
        See :func:`score`.
    by_centre
        Centre -> ``slides`` and ``cases`` (counts) and its metrics.
    """
    cases, arrays = [prediction.case for prediction in predictions], to_arrays(predictions)
    weights = case_weights(cases, draws, seed)
    values_of = task.metrics(*arrays, weights)
    metrics = {name: confidence_interval(values) for name, values in values_of.items()}
    if not centres:
        return metrics, {}
    groups = by_group(task.metrics, *arrays, weights, groups=centres, cases=cases)
    by_centre = {
        centre: {
            "slides": group.bags,
            "cases": group.cases,
            **{name: confidence_interval(values) for name, values in group.values.items()},
        }
        for centre, group in groups.items()
    }
    return metrics, by_centre


def centres_of(predictions: Sequence[Prediction]) -> list[str]:
    """Return the centre of each prediction; empty if there are fewer than two centres.

    Centres come from the label table, ``unknown`` where it has none for a slide. If it has none at all and
    all cases are TCGA barcodes, the tissue source site of the barcode is used.
    """
    if any(prediction.centre for prediction in predictions):
        centres = [prediction.centre or UNKNOWN_CENTRE for prediction in predictions]
    else:
        try:
            sites = tcga_sites(prediction.case for prediction in predictions)
        except UserError:
            return []
        centres = [sites[prediction.case] for prediction in predictions]
    return centres if len(set(centres)) > 1 else []


def metric_table(
    report: Mapping[str, Any], names: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of a table of the selected weights: a row per metric, a column per split.

    Parameters
    ----------
    report
        The content of metrics.json, as :func:`evaluate_run` returns it.
    names
        The metrics.
    """
    columns = {
        split: report[split][report["selected_weights"]]
        for split in ("val", "test")
        if split in report
    }
    rows = [[name, *(_as_text(metrics[name]) for metrics in columns.values())] for name in names]
    return ["metric", *columns], rows


def main_metrics(task: Task) -> list[str]:
    """Return the metrics that a summary shows, without repetition: first the one that selects the epoch."""
    return [*dict.fromkeys((task.monitor, *task.main_metrics))]


def headline(report: Mapping[str, Any], task: Task) -> str:
    """Return one line: the metric that selects the epoch, on the test slides, with interval and numbers."""
    split = next((split for split in ("test", "val") if split in report), None)
    if split is None:
        return "there are no validation or test slides to evaluate"
    results = report[split]
    value = _as_text(results[report["selected_weights"]][task.monitor])
    return (
        f"{split}: {task.monitor} {value} ({results['slides']} slides of {results['cases']} cases; "
        f"{describe_epoch(report)})"
    )


def describe_epoch(report: Mapping[str, Any]) -> str:
    """Return which epoch was evaluated, and why, from the content of metrics.json."""
    if not report.get("is_selected", True):  # earlier versions did not write it
        return f"epoch {report['epoch']}, the last one: the validation metric was never defined"
    weights = f"the {report['selected_weights']} weights"
    return f"epoch {report['epoch']}, selected on {report['chosen_on']} by {weights}"


def _as_text(metric: Mapping[str, float | None]) -> str:
    if metric["value"] is None:
        return "undefined"
    if metric["low"] is None:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


def evaluate_run(
    model: MILModel,
    best: Path,
    items: Sequence[LabelledSlide],
    *,
    task: Task,
    view: BagSpec,
    selected: str,
    chosen_on: str,
    draws: int,
    heatmaps: int | None,
    out: Path,
    strategy: Strategy,
    screen: Screen,
    left_out: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Evaluate the selected epoch of a run on validation and test, and write the results to ``out``.

    metrics.json holds the metrics of both kinds of weights, ``model`` and ``ema``; predictions.csv, and
    for the test split heatmaps/, figures/ and metrics by centre, are those of the ``selected`` weights.

    Parameters
    ----------
    best
        Checkpoint of the selected epoch.
    selected
        Weights that selected the epoch: ``model`` or ``ema``.
    chosen_on
        Split on which the epoch was selected.
    draws
        Bootstrap resamples of the cases.
    heatmaps
        Maximum number of test slides to draw; None: all.
    left_out
        Problem -> number of rows and slides of the cohort that were left out for it.

    Returns
    -------
    dict
        The content of metrics.json.
    """
    strategy.barrier()  # until the leader has written the checkpoint
    tensors, state = load_checkpoint(best)
    report = _epoch_facts(state, selected, chosen_on) | (
        {"left_out": dict(left_out)} if left_out else {}
    )
    evaluation = _Evaluation(model, items, view, strategy, screen, draws, heatmaps, out)
    predictions: list[Prediction] = []
    for name in ("model", "ema"):
        weights = select_prefix(name, tensors)
        if weights:
            check_weights(strategy.shapes, weights, best)
            predictions += evaluation.run(
                weights, task.for_weights(name), name, report, is_selected=name == selected
            )
    if strategy.is_leader:
        _write_results(predictions, task.for_weights(selected), report, out, screen)
    _show_results(report, task, screen)
    return report


def _epoch_facts(state: Mapping[str, Any], selected: str, chosen_on: str) -> dict[str, Any]:
    return {
        "epoch": state["best_epoch"] + 1,
        "selected_weights": selected,
        "chosen_on": chosen_on,
        "is_selected": math.isfinite(state["best"][0]),
    }


def _show_results(report: Mapping[str, Any], task: Task, screen: Screen) -> None:
    title = (
        f"{report['selected_weights']} weights, with 95 % intervals; metrics.json has all metrics"
    )
    screen.say(headline(report, task))
    screen.table(title, *metric_table(report, main_metrics(task)))


@dataclass(frozen=True)
class _Evaluation:
    """Evaluates one kind of weights after the other."""

    model: MILModel
    items: Sequence[LabelledSlide]
    view: BagSpec
    strategy: Strategy
    screen: Screen
    draws: int
    heatmaps: int | None
    out: Path

    def run(
        self,
        weights: Mapping[str, Tensor],
        task: Task,
        name: str,
        report: dict[str, Any],
        *,
        is_selected: bool,
    ) -> list[Prediction]:
        """Add the metrics of these weights to the report; return the predictions of selected weights."""
        predictions: list[Prediction] = []
        for split in ("val", "test"):
            slides = [item for item in self.items if item.slide.split == split]
            if not slides:
                continue
            draw = self._heatmaps(task, slides) if is_selected and split == "test" else None
            with self.strategy.full_parameters(self.strategy.shard(weights)):
                of_split = predict(
                    self.model,
                    slides,
                    task=task,
                    view=self.view,
                    strategy=self.strategy,
                    screen=self.screen,
                    on_slide=draw,
                    weights_name=name,
                )
            num_cases = len({item.slide.case for item in slides})
            results = report.setdefault(split, {"slides": len(slides), "cases": num_cases})
            centres = centres_of(of_split) if is_selected else []
            results[name], by_centre = score_centres(of_split, task, centres, draws=self.draws)
            if by_centre:
                results["centres"] = by_centre
            predictions += of_split if is_selected else []
        return predictions

    def _heatmaps(self, task: Task, slides: Sequence[LabelledSlide]) -> OnSlide:
        drawn = slides[: self.heatmaps]
        with_coords = [item for item in drawn if item.record.coords is not None]
        if len(with_coords) < len(drawn):
            self.screen.say(
                "no heatmaps of slides without coordinates; see the setting data.coords"
            )
        return heatmap_writer(
            task, self.view.reader, self.out / "heatmaps", with_coords, self.screen
        )


def _write_results(
    predictions: Sequence[Prediction],
    task: Task,
    report: Mapping[str, Any],
    out: Path,
    screen: Screen,
) -> None:
    """Write predictions and metrics, and only then pictures, which may fail."""
    write_predictions(predictions, task, out / "predictions.csv")
    write_json(out / "metrics.json", report)  # its presence marks the run as finished
    test = [prediction for prediction in predictions if prediction.split == "test"]
    if test:
        with warn_of_failure(screen, f"no figures in {out / 'figures'}"):
            write_figures(task.figures(*to_arrays(test)), out / "figures")
