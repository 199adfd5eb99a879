"""Compare two runs by their predictions for the same slides, paired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from e2e.errors import UserError, format_list
from e2e.files import write_json
from e2e.log import Screen
from e2e.metrics.bootstrap import bootstrap_p, case_weights, confidence_interval, delong
from e2e.metrics.values import LOWER_IS_BETTER
from e2e.registry import did_you_mean
from e2e.runs.saved import SavedPredictions, read_predictions
from e2e.settings.cli import compare_parser

EVALUATE_BOTH = (
    "evaluate both on the same table: e2e evaluate RUN --out DIR data.labels=TABLE;"
    " compare these folders"
)


def check_same(a: SavedPredictions, b: SavedPredictions) -> None:
    """Raise UserError unless both runs have the same slides, cases, labels and outputs."""
    if a.task.output_names != b.task.output_names:
        kinds = [f"  {run.folder}: {', '.join(run.task.output_names)}" for run in (a, b)]
        raise UserError("\n".join(["the runs have different outputs:", *kinds]))
    slides_a, slides_b = set(a.slides), set(b.slides)
    only = [f"{slide}: only in {a.folder}" for slide in sorted(slides_a - slides_b)]
    only += [f"{slide}: only in {b.folder}" for slide in sorted(slides_b - slides_a)]
    if only:
        raise UserError(
            f"the runs have predictions for different slides, {len(only)} of them:\n{format_list(only)}\n"
            f"  {EVALUATE_BOTH}"
        )
    differ = [
        f"{slide}: {'/'.join(x)} in {a.folder}, {'/'.join(y)} in {b.folder}"
        for slide, x, y in zip(a.slides, a.cases_and_labels, b.cases_and_labels, strict=True)
        if x != y
    ]
    if differ:
        raise UserError(
            f"the runs differ in case or label of {len(differ)} slides:\n{format_list(differ)}\n"
            f"  {EVALUATE_BOTH}"
        )


def compare(
    a: SavedPredictions, b: SavedPredictions, metric: str, *, draws: int, seed: int = 0
) -> dict[str, Any]:
    """Return ``a``, ``b`` and ``difference`` with intervals, ``p`` (None: undefined) and its ``test``.

    Raises
    ------
    UserError
        The runs are not of the same slides, or have no such metric.
    """
    check_same(a, b)
    weights = case_weights(a.cases, draws, seed)
    metrics = [run.task.metrics(run.predicted, run.targets, weights) for run in (a, b)]
    metric = metric or a.task.monitor
    if any(metric not in values for values in metrics):
        raise UserError(f"no metric '{metric}'{did_you_mean(metric, list(metrics[0]))}")
    if a.task.fitted_reference(metric) != b.task.fitted_reference(metric):
        raise UserError(
            f"'{metric}' cannot be compared: its times, or its weights for censored cases, come from each "
            "run's training cases and task.bins, which differ\n"
            "  compare runs with the same training split and task.bins, or use --metric c_index"
        )
    first, second = (values[metric] for values in metrics)
    difference, p, test = (
        confidence_interval(first - second),
        bootstrap_p(first - second),
        "paired bootstrap",
    )
    if metric == "auc" and a.predicted.shape[1] == 2 and len(set(a.cases)) == len(a.cases):
        result = delong(a.predicted[:, 1], b.predicted[:, 1], a.targets == 1)
        p, test = result.p, "DeLong"
        difference |= {"low": none_if_nan(result.low), "high": none_if_nan(result.high)}
    return {
        "metric": metric,
        "slides": len(a.slides),
        "cases": len(set(a.cases)),
        "draws": draws,
        "undefined_draws": int(np.isnan(first - second)[1:].sum()),
        "a": confidence_interval(first),
        "b": confidence_interval(second),
        "difference": difference,
        "p": none_if_nan(p),
        "test": test,
    }


def none_if_nan(value: float) -> float | None:
    """Return None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def rows(result: dict[str, Any], names: Sequence[str]) -> list[list[str]]:
    """Return run, value and 95 % interval, as text."""

    def words(name: str, entry: dict[str, float | None]) -> list[str]:
        numbers = ["undefined" if x is None else f"{x:.4f}" for x in entry.values()]
        return [name, numbers[0], f"{numbers[1]} to {numbers[2]}"]

    entries = [result[key] for key in ("a", "b", "difference")]
    return [words(name, entry) for name, entry in zip([*names, "A - B"], entries, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e2e compare`` and return its exit code."""
    args = compare_parser().parse(argv)
    if args.draws < 1:
        raise UserError(f"--draws must be at least 1, found {args.draws}")
    a, b = (read_predictions(folder, args.split) for folder in args.runs)
    result = compare(a, b, args.metric, draws=args.draws)
    result |= {"split": args.split, "runs": [str(folder) for folder in args.runs]}
    better = "lower" if result["metric"] in LOWER_IS_BETTER else "higher"
    title = (
        f"{args.split}: {result['slides']} slides of {result['cases']} cases, {better} is better"
    )
    names = [f"{letter}: {folder}" for letter, folder in zip("AB", args.runs, strict=True)]
    screen = Screen(is_leader=True)
    screen.table(title, ["run", result["metric"], "95 % interval"], rows(result, names))
    p = "undefined" if result["p"] is None else f"{result['p']:.4g}"
    screen.say(f"p = {p} ({result['test']}), {args.draws:,} resamples of the cases")
    if result["undefined_draws"]:
        screen.say(
            f"{result['undefined_draws']:,} resamples leave it undefined and are not counted"
        )
    if args.json:
        write_json(args.json, result)
    return 0
