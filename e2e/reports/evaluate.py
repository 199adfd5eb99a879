"""Metrics of a run's predictions with confidence intervals, and the files that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.cohort.folds import tcga_sites
from e2e.engine.model import MILModel
from e2e.errors import UserError
from e2e.files import write_json
from e2e.log import Screen
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


def metric_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of a table: a row per metric, a column per split and kind of weights.

    Parameters
    ----------
    report
        The content of metrics.json, as :func:`evaluate_run` returns it.
    """
    columns = {
        f"{split} ({weights})": report[split][weights]
        for split in ("val", "test")
        for weights in ("model", "ema")
        if weights in report.get(split, {})
    }
    names = next(iter(columns.values()), {})
    rows = [[name, *(_as_text(metrics[name]) for metrics in columns.values())] for name in names]
    return ["metric", *columns], rows


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
) -> dict[str, Any]:
    """Evaluate the selected epoch of a run on validation and test, and write the results to ``out``.

    metrics.json holds the metrics of both kinds of weights, ``model`` and ``ema``; predictions.csv, and
    for the test split heatmaps/, figures/ and metrics by centre, are those of the ``selected`` weights.

    Parameters
    ----------
    model
        The model; its weights are restored afterwards.
    best
        Checkpoint of the selected epoch.
    items
        The slides of the cohort; those of the training split are ignored.
    task
        The fitted task.
    view
        How patches of a slide are read.
    selected
        Kind of weights selected on the validation split: ``model`` or ``ema``.
    chosen_on
        Split on which the epoch was selected.
    draws
        Bootstrap resamples of the cases.
    heatmaps
        Maximum number of test slides to draw; None: all.
    out
        Folder of the results.
    strategy
        Ranks and device; every rank calls this function.
    screen
        Shows progress, and the table of metrics.

    Returns
    -------
    dict
        The content of metrics.json.
    """
    strategy.barrier()  # until the leader has written the checkpoint
    tensors, state = load_checkpoint(best)
    report: dict[str, Any] = {"epoch": state["best_epoch"] + 1, "selected_weights": selected}
    report["chosen_on"] = chosen_on
    evaluation = _Evaluation(model, view, strategy, screen, draws)
    selected_predictions: list[Prediction] = []
    for name in ("model", "ema"):
        weights = select_prefix(name, tensors)
        if not weights:
            continue
        check_weights(strategy.shapes, weights, best)
        task_for_weights, is_selected = task.for_weights(name), name == selected
        for split in ("val", "test"):
            slides = [item for item in items if item.slide.split == split]
            if not slides:
                continue
            on_slide = None
            if is_selected and split == "test":
                folder = out / "heatmaps"
                on_slide = _draw_heatmaps(task_for_weights, view, slides[:heatmaps], folder, screen)
            with strategy.full_parameters(strategy.shard(weights)):
                predictions = evaluation.predict(slides, task_for_weights, on_slide)
            results = report.setdefault(split, {"slides": len(slides)})
            results |= evaluation.score(predictions, task_for_weights, name, centres=is_selected)
            if is_selected:
                selected_predictions += predictions
    if strategy.is_leader:
        _write_results(selected_predictions, task.for_weights(selected), report, out)
    title = f"epoch {report['epoch']}, selected on {chosen_on} by {selected}"
    screen.table(title, *metric_table(report))
    return report


@dataclass(frozen=True)
class _Evaluation:
    """What is the same for all splits and weights."""

    model: MILModel
    view: BagSpec
    strategy: Strategy
    screen: Screen
    draws: int

    def predict(
        self, slides: Sequence[LabelledSlide], task: Task, on_slide: OnSlide | None
    ) -> list[Prediction]:
        return predict(
            self.model,
            slides,
            task=task,
            view=self.view,
            strategy=self.strategy,
            screen=self.screen,
            on_slide=on_slide,
        )

    def score(
        self, predictions: Sequence[Prediction], task: Task, weights: str, *, centres: bool
    ) -> dict[str, Any]:
        """The metrics under the name of the weights, and if wanted those of each centre."""
        names = centres_of(predictions) if centres else []
        metrics, by_centre = score_centres(predictions, task, names, draws=self.draws)
        return {weights: metrics, **({"centres": by_centre} if by_centre else {})}


def _draw_heatmaps(
    task: Task, view: BagSpec, slides: Sequence[LabelledSlide], folder: Path, screen: Screen
) -> OnSlide:
    with_coords = [item for item in slides if item.record.coords is not None]
    if len(with_coords) < len(slides):
        screen.say("no heatmaps of slides without coordinates; see the setting data.coords")
    return heatmap_writer(task, view.reader, folder, with_coords)


def _write_results(
    predictions: Sequence[Prediction], task: Task, report: Mapping[str, Any], out: Path
) -> None:
    write_predictions(predictions, task, out / "predictions.csv")
    test = [prediction for prediction in predictions if prediction.split == "test"]
    if test:
        write_figures(task.figures(*to_arrays(test)), out / "figures")
    write_json(out / "metrics.json", report)  # last: its presence marks the run as finished
