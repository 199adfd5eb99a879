"""Cross-validation: a run for each fold and seed, and their results together."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from e2e.cohort.folds import case_strata, make_folds, stratified_test_sets
from e2e.cohort.load import read_cohort_folds
from e2e.cohort.split_files import fold_table, read_text_table
from e2e.cohort.splits import group_numbers
from e2e.cohort.table import read_table, summarise_problems
from e2e.errors import UserError, describe_interrupt, format_list
from e2e.files import create_folder, write_atomically, write_json
from e2e.metrics.bootstrap import case_weights, confidence_interval
from e2e.metrics.values import Array
from e2e.reports.escape import escape_latex, escape_markdown
from e2e.runs.cohort import cohort_spec, id_rules
from e2e.runs.many import is_done, train_all, write_plan
from e2e.runs.parts import REGISTRIES, build_task
from e2e.runs.saved import SavedPredictions, read_predictions
from e2e.settings.arguments import common_settings
from e2e.settings.cli import crossval_parser
from e2e.settings.schema import Settings

DEFAULT_VAL = 0.15
"""Fraction of the cases that are not tested to validate on, where data.cut.val is 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e2e crossval`` and return its exit code."""
    args = crossval_parser().parse(argv)
    try:
        seeds = [int(word) for word in args.seeds.split(",")] if args.seeds else []
    except ValueError as error:
        raise UserError(f"--seeds cannot be read: {error}") from error
    if args.at_once < 1:
        raise UserError(f"--at-once must be at least 1, found {args.at_once}")
    settings, command = common_settings(args, REGISTRIES)
    plan = make_plan(
        settings,
        command,
        out=args.out,
        num_folds=args.folds,
        only=[word for word in args.only.split(",") if word],
        seeds=seeds or [settings.run.seed],
    )
    plan.write()
    slots = [word.replace("+", ",") for word in args.gpus.split(",") if word]
    with describe_interrupt(
        lambda: f"interrupted; finished runs are in {args.out}; the same command continues"
    ):
        train_trials(plan, slots or [""] * args.at_once, print)
    print(write_results(plan, draws=settings.run.bootstrap))
    return 0


class Trial(NamedTuple):
    """One run of a cross-validation."""

    fold: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"fold_{self.fold}_seed_{self.seed}"

    @classmethod
    def from_name(cls, name: str) -> Trial | None:
        """Return the trial of a run folder; None if the name is not that of a trial."""
        match = re.fullmatch(r"fold_(.+)_seed_(-?\d+)", name)
        return cls(match[1], int(match[2])) if match else None


@dataclass(frozen=True)
class Plan:
    """The runs of a cross-validation and their folders."""

    out: Path
    command: tuple[str, ...]
    """Arguments of the training, without fold, seed and folder."""
    folds: tuple[str, ...]
    seeds: tuple[int, ...]
    splits: str
    """Digest of the folds' content: with a changed file it is another cross-validation."""

    @property
    def trials(self) -> list[Trial]:
        """All folds of the first seed, then of the next: so the first full cross-validation ends first."""
        return [Trial(fold, seed) for seed in self.seeds for fold in self.folds]

    def folder(self, trial: Trial) -> Path:
        """Run folder of a trial."""
        return self.out / "runs" / trial.name

    def finished_trials(self) -> list[Trial]:
        """Trials that are done, also those of earlier commands for other folds or seeds."""
        folders = (self.out / "runs").glob("fold_*_seed_*")
        trials = [trial for folder in folders if (trial := Trial.from_name(folder.name))]
        order = {trial: position for position, trial in enumerate(self.trials)}
        return sorted(
            (trial for trial in trials if is_done(self.folder(trial))),
            key=lambda trial: (order.get(trial, len(order)), trial.seed, trial.fold),
        )

    def write(self) -> None:
        """Write the plan into its folder; more folds or seeds of the same plan may follow.

        Raises
        ------
        UserError
            The folder holds another cross-validation.
        """
        plan = {"command": list(self.command), "splits": self.splits}
        write_plan(self.out / "crossval.json", plan, "cross-validation")


def make_plan(
    settings: Settings,
    command: Sequence[str],
    *,
    out: Path,
    num_folds: int | None,
    only: Sequence[str],
    seeds: Sequence[int],
) -> Plan:
    """Plan a run for each fold of ``data.split_file``, or of new folds, and each seed.

    Parameters
    ----------
    command
        Arguments of the training from which ``settings`` were made.
    num_folds
        Number of new folds to make and write to ``out``; None for those of ``data.split_file``.
    only
        Names of the folds to run; empty for all.

    Raises
    ------
    UserError
        There are no folds, or none of that name, or rows of the label table are unusable.
    """
    path = _fold_file(settings, out, num_folds)
    folds = read_cohort_folds(cohort_spec(settings.data), path)
    unknown = [name for name in only if name not in folds]
    if unknown:
        raise UserError(f"{path} has no fold {', '.join(unknown)}\n  it has: {', '.join(folds)}")
    digest = hashlib.blake2b(json.dumps(folds, sort_keys=True).encode(), digest_size=8).hexdigest()
    # Without duplicates: two trainings in one folder would overwrite each other.
    return Plan(
        out=out,
        command=(*command, f"data.split_file={path.resolve()}"),
        folds=tuple(dict.fromkeys(only or folds)),
        seeds=tuple(dict.fromkeys(seeds)),
        splits=digest,
    )


def _fold_file(settings: Settings, out: Path, num_folds: int | None) -> Path:
    """The file of the folds, which is written first if ``num_folds`` new ones are wanted."""
    split_file = settings.data.split_file
    if num_folds and split_file:
        raise UserError(
            f"--folds {num_folds} makes new folds, but data.split_file={split_file} already has folds\n"
            "  leave out --folds to use those, or add data.split_file=null data.fold=null to make new ones"
        )
    if split_file:
        return Path(split_file)
    if not num_folds:
        raise UserError(
            "a cross-validation needs folds\n  give --folds 5 to make them by case, or use those of a file:"
            " data.split_file=FILE (e2e splits makes one)"
        )
    path, table = out / "splits.csv", make_fold_table(settings, num_folds)
    if path.is_file() and path.read_bytes() != table:
        raise UserError(f"{path} holds other folds than this command makes\n  choose another --out")
    create_folder(out)
    write_atomically(path, table)
    return path


def make_fold_table(settings: Settings, num_folds: int) -> bytes:
    """Return the label table, as CSV, with a column ``fold_<k>`` for each of ``num_folds`` new folds.

    Folds are drawn by case, stratified by the task's first column. Of the cases that are not tested,
    ``data.cut.val`` (or 15 %) are validation.
    """
    data, targets = settings.data, build_task(settings.task).columns
    columns = {"slide": data.columns.slide, "case": data.columns.case, "split": None}
    slides, problems = read_table(
        data.labels,
        columns=columns,
        targets=targets,
        split_names={},
        rules=id_rules(data)._replace(suffix=""),
    )
    if problems and data.unmatched == "error":
        raise UserError(
            f"{data.labels} has {len(problems)} unusable row(s)\n"
            f"{format_list(summarise_problems(problems))}\n"
            "  correct or remove them, or set data.unmatched=drop to leave them out"
        )
    strata = case_strata(group_numbers(slides, targets[0]), targets[0])
    seed = settings.run.seed
    tests = stratified_test_sets(strata, num_folds, seed=seed)
    folds = make_folds(strata, tests, val=data.cut.val or DEFAULT_VAL, seed=seed)
    case_column = data.columns.case or data.columns.slide
    table = read_text_table(Path(data.labels))
    return fold_table(table, case_column, {str(k): fold for k, fold in enumerate(folds)})


def train_trials(plan: Plan, slots: Sequence[str], report: Callable[[str], None]) -> None:
    """Train every trial that is not done; see :func:`e2e.runs.many.train_all`."""
    runs = {
        plan.folder(trial): [
            *plan.command,
            f"data.fold={trial.fold}",
            f"run.seed={trial.seed}",
        ]
        for trial in plan.trials
    }
    train_all(runs, slots, report)


def write_results(plan: Plan, *, draws: int) -> str:
    """Write the tables of all finished trials and return the Markdown one.

    Parameters
    ----------
    draws
        Bootstrap resamples of the cases.

    Raises
    ------
    UserError
        No trial is finished, or predictions cannot be read.
    """
    predictions = {
        trial: read_predictions(plan.folder(trial), "test") for trial in plan.finished_trials()
    }
    if not predictions:
        raise UserError(f"{plan.out} has no finished run")
    return write_tables(plan, predictions, summarise(predictions, draws=draws), draws)


class Row(NamedTuple):
    """One metric over all runs."""

    metric: str
    runs: list[float]
    """Value on each run's test slides, in the order of the trials; NaN where it is undefined."""
    all_folds: Mapping[str, float | None]
    """``value``, ``low``, ``high`` on the test slides of all folds; see :func:`summarise`."""

    @property
    def defined(self) -> list[float]:
        """The values that are not NaN."""
        return [value for value in self.runs if not math.isnan(value)]

    @property
    def mean(self) -> float:
        """Mean over the runs in which the metric is defined."""
        return float(np.mean(self.defined)) if self.defined else math.nan

    @property
    def sd(self) -> float:
        """Sample standard deviation over the runs in which the metric is defined."""
        return float(np.std(self.defined, ddof=1)) if len(self.defined) > 1 else math.nan


def summarise(predictions: Mapping[Trial, SavedPredictions], *, draws: int) -> list[Row]:
    """Return one row for each metric.

    ``all_folds`` is the mean over seeds of the metric on the pooled test slides of all folds, where the
    models' outputs are on one scale (:attr:`e2e.tasks.base.Task.can_pool_folds`); otherwise of the mean
    over folds. Its interval is over cases, with the same resamples for all seeds.
    """
    by_run = [_evaluate([run], np.ones((1, len(run.slides)))) for run in predictions.values()]
    runs_of_seed: dict[int, list[SavedPredictions]] = {}
    for trial, run in predictions.items():
        runs_of_seed.setdefault(trial.seed, []).append(run)
    by_seed = [_evaluate_all_folds(runs, draws) for runs in runs_of_seed.values()]
    undefined = np.full(1 + draws, np.nan)
    rows = []
    for name in dict.fromkeys(name for metrics in by_run for name in metrics):
        values = [float(metrics.get(name, undefined)[0]) for metrics in by_run]
        mean = np.mean([metrics.get(name, undefined) for metrics in by_seed], axis=0)
        rows.append(Row(name, values, confidence_interval(mean)))
    return rows


def _evaluate_all_folds(runs: Sequence[SavedPredictions], draws: int) -> Mapping[str, Array]:
    weights = case_weights([case for run in runs for case in run.cases], draws, seed=0)
    if runs[0].task.can_pool_folds:
        return _evaluate(runs, weights)
    ends = np.cumsum([len(run.slides) for run in runs])[:-1]
    weights_of_run = zip(runs, np.split(weights, ends, axis=1), strict=True)
    by_run = [_evaluate([run], run_weights) for run, run_weights in weights_of_run]
    return {name: np.mean([metrics[name] for metrics in by_run], axis=0) for name in by_run[0]}


def _evaluate(runs: Sequence[SavedPredictions], weights: Array) -> Mapping[str, Array]:
    predicted = np.concatenate([run.predicted for run in runs])
    targets = np.concatenate([run.targets for run in runs])
    return runs[0].task.metrics(predicted, targets, weights)


def write_tables(
    plan: Plan, predictions: Mapping[Trial, SavedPredictions], rows: Sequence[Row], draws: int
) -> str:
    """Write results.csv (one line for each run and metric), .json, .md and .tex; return the Markdown."""
    caption = _caption(plan, predictions, draws)
    lines = [
        {"fold": trial.fold, "seed": trial.seed, "metric": row.metric, "value": value}
        for row in rows
        for trial, value in zip(predictions, row.runs, strict=True)
    ]
    write_atomically(plan.out / "results.csv", pd.DataFrame(lines).to_csv(index=False).encode())
    columns = ("metric", "mean", "SD", "all folds", "95 % interval")
    cells = [_cells(row) for row in rows]
    header = [caption, "", _markdown_line(columns), _markdown_line(["---"] * len(columns))]
    markdown = "\n".join([*header, *map(_markdown_line, cells), ""])
    write_atomically(plan.out / "results.md", markdown.encode())
    write_atomically(plan.out / "results.tex", _latex(caption, columns, cells).encode())
    metrics = [
        {
            "metric": row.metric,
            "mean": _none_if_nan(row.mean),
            "sd": _none_if_nan(row.sd),
            "all_folds": row.all_folds,
        }
        for row in rows
    ]
    write_json(plan.out / "results.json", {"caption": caption, "metrics": metrics})
    return markdown


def _caption(plan: Plan, predictions: Mapping[Trial, SavedPredictions], draws: int) -> str:
    trials = {*predictions, *plan.trials}
    slides = {slide for run in predictions.values() for slide in run.slides}
    cases = {case for run in predictions.values() for case in run.cases}
    return (
        f"{len(predictions)} of {len(trials)} runs: {len({t.fold for t in trials})} folds, "
        f"{len({t.seed for t in trials})} seed(s); {len(slides)} test slides of {len(cases)} cases; "
        f"intervals: 95 %, {draws:,} resamples of the cases"
    )


def _cells(row: Row) -> list[str]:
    low, high = row.all_folds["low"], row.all_folds["high"]
    interval = "undefined" if low is None or high is None else f"{low:.3f} to {high:.3f}"
    only = "" if len(row.defined) == len(row.runs) else f" (of {len(row.defined)} runs)"
    mean, sd, value = map(_format_value, (row.mean, row.sd, row.all_folds["value"]))
    return [row.metric, mean + only, sd, value, interval]


def _format_value(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.3f}"


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(escape_markdown, cells))} |"


def _latex(caption: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a booktabs table."""
    body = [_latex_line(columns), r"\midrule", *map(_latex_line, cells)]
    rows = [r"\begin{tabular}{lrrrr}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join([f"% {' '.join(caption.split())}", *rows])


def _latex_line(words: Iterable[str]) -> str:
    return " & ".join(map(escape_latex, words)) + r" \\"
