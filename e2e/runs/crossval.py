"""Cross-validation: one run for each fold and seed, and what they say together."""

from __future__ import annotations

import hashlib
import json
import math
import queue
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
import pandas as pd

from e2e.cohort.folds import case_strata, held_out, make_folds
from e2e.cohort.load import read_folds
from e2e.cohort.split_files import fold_table, read_cells
from e2e.cohort.splits import group_numbers
from e2e.cohort.table import read_table
from e2e.errors import UserError, describe_interrupt, format_list
from e2e.files import create_folder, write_atomically, write_json
from e2e.metrics.bootstrap import case_weights, confidence_interval
from e2e.metrics.values import Array
from e2e.runs.many import is_done, run_command, start_or_resume, write_plan
from e2e.runs.parts import REGISTRIES, build_task
from e2e.runs.saved import SavedPredictions, read_predictions
from e2e.settings.arguments import common_settings
from e2e.settings.cli import crossval_parser
from e2e.settings.schema import Settings


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
        cut=args.folds,
        only=[word for word in args.only.split(",") if word],
        seeds=seeds or [settings.run.seed],
    )
    plan.keep()
    slots = [word.replace("+", ",") for word in args.gpus.split(",") if word]
    with describe_interrupt(
        lambda: f"interrupted; finished runs are in {args.out}; the same command continues"
    ):
        run_all(plan, slots or [""] * args.at_once, print)
    print(report(plan, draws=settings.run.bootstrap))
    return 0


class Trial(NamedTuple):
    """One run of a cross-validation."""

    fold: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"fold_{self.fold}_seed_{self.seed}"

    @classmethod
    def named(cls, name: str) -> Trial | None:
        """The one of that folder; None where it is no run's."""
        found = re.fullmatch(r"fold_(.+)_seed_(-?\d+)", name)
        return cls(found[1], int(found[2])) if found else None


@dataclass(frozen=True)
class Plan:
    """Which runs there are, and where they go."""

    out: Path
    command: tuple[str, ...]
    """What launch/train.py is told, besides fold, seed and folder."""
    folds: tuple[str, ...]
    seeds: tuple[int, ...]
    splits: str
    """Digest of the folds' content: a changed file is another cross-validation."""

    @property
    def trials(self) -> list[Trial]:
        """Seed after seed, so that the first whole cross-validation is done first."""
        return [Trial(fold, seed) for seed in self.seeds for fold in self.folds]

    def folder(self, trial: Trial) -> Path:
        """The run folder of a trial."""
        return self.out / "runs" / trial.name

    @property
    def done(self) -> list[Trial]:
        """What there is in the folder, by this command or an earlier one for other folds or seeds."""
        there = [Trial.named(path.name) for path in (self.out / "runs").glob("fold_*_seed_*")]
        known = [trial for trial in there if trial and is_done(self.folder(trial))]
        asked = {trial: place for place, trial in enumerate(self.trials)}
        return sorted(known, key=lambda t: (asked.get(t, len(asked)), t.seed, t.fold))

    def arguments(self, trial: Trial) -> list[str]:
        """Of launch/train.py."""
        own = [f"data.fold={trial.fold}", f"run.seed={trial.seed}"]
        return start_or_resume([*self.command, *own], self.folder(trial))

    def keep(self) -> None:
        """Write the plan down; UserError where the folder holds another's runs.

        More folds or seeds of the same plan may follow.
        """
        ours = {"command": list(self.command), "splits": self.splits}
        write_plan(self.out / "crossval.json", ours, "cross-validation")


def make_plan(
    settings: Settings,
    command: Sequence[str],
    *,
    out: Path,
    cut: int | None,
    only: Sequence[str],
    seeds: Sequence[int],
) -> Plan:
    """The folds of ``data.split_file``; or with ``cut`` so many folds, cut here and written to ``out``.

    Args:
        command: of launch/train.py, from which ``settings`` were made.
        only: folds to run; none: all.

    Raises:
        UserError: no folds, or none of that name; rows of the label table that cannot be used.
    """
    data = settings.data
    if cut and data.split_file:
        raise UserError(
            f"--folds {cut} cuts folds, and data.split_file={data.split_file} has some already\n"
            "  leave out --folds to take those, or add data.split_file=null data.fold=null to have new ones"
        )
    if not cut and not data.split_file:
        raise UserError(
            "a cross-validation needs folds\n  give --folds 5 to have them cut by case, or those of a file:"
            " data.split_file=FILE (tools/make_splits.py makes one)"
        )
    path = Path(data.split_file or out / "splits.csv")
    if cut:
        table = cut_folds(settings, cut)
        if path.is_file() and path.read_bytes() != table:
            raise UserError(
                f"{path} holds other folds than this command cuts\n  choose another --out"
            )
        create_folder(out)
        write_atomically(path, table)
    folds = read_folds(data, path)
    if missing := [name for name in only if name not in folds]:
        raise UserError(f"{path} has no fold {', '.join(missing)}\n  it has: {', '.join(folds)}")
    digest = hashlib.blake2b(json.dumps(folds, sort_keys=True).encode(), digest_size=8).hexdigest()
    # Each once: two runs at a time in one folder would spoil each other.
    return Plan(
        out=out,
        command=(*command, f"data.split_file={path.resolve()}"),
        folds=tuple(dict.fromkeys(only or folds)),
        seeds=tuple(dict.fromkeys(seeds)),
        splits=digest,
    )


def cut_folds(settings: Settings, folds: int) -> bytes:
    """The label table with a column ``fold_<k>`` for each fold: by case, stratified by the task's first
    column; of the cases that are not tested, 15 % are validation (or ``data.cut.val``)."""
    data, targets = settings.data, build_task(settings.task).columns
    columns = {"slide": data.columns.slide, "case": data.columns.case, "split": None}
    slides, problems = read_table(
        data.labels,
        columns=columns,
        targets=targets,
        split_names={},
        slide_separator=data.slide_separator,
    )
    if problems and data.unmatched == "error":
        raise UserError(
            f"{data.labels} has {len(problems)} row(s) that cannot be used\n{format_list(problems)}\n"
            "  mend them, or take them out, or set data.unmatched=drop to go on without them"
        )
    strata = case_strata(group_numbers(slides, targets[0]), targets[0])
    seed = settings.run.seed
    tests = held_out(strata, folds, seed=seed)
    made = make_folds(strata, tests, val=data.cut.val or 0.15, seed=seed)
    case = data.columns.case or data.columns.slide
    return fold_table(read_cells(Path(data.labels)), case, {str(k): f for k, f in enumerate(made)})


def run_all(plan: Plan, slots: Sequence[str], say: Callable[[str], None]) -> None:
    """Train every trial that is not done, ``len(slots)`` at a time.

    Args:
        slots: what each of the runs at a time may see: GPU numbers such as ``0`` or ``0,1`` (then
            with a process for each), or nothing: whatever the machine has, one process.

    Raises:
        UserError: a run failed: its log is named. No other is begun then; those under way end first.
    """
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)
    failed: list[str] = []
    halt = Event()

    def one(trial: Trial) -> None:
        if halt.is_set():
            return
        slot = free.get()
        try:
            log = plan.out / "runs" / f"{trial.name}.log"
            say(f"{time.strftime('%H:%M:%S')}  {trial.name}{f' on GPU {slot}' if slot else ''}")
            code = run_command("train", plan.arguments(trial), log, slot)
        finally:
            free.put(slot)
        if code:
            failed.append(f"{trial.name}: exit code {code}, see {log}")
            halt.set()

    waiting = [trial for trial in plan.trials if not is_done(plan.folder(trial))]
    with ThreadPoolExecutor(len(slots)) as pool:
        list(pool.map(one, waiting))
    if failed:
        raise UserError(
            f"{len(failed)} run(s) failed\n{format_list(failed)}\n"
            "  mend it, then give the same command again: it goes on from here"
        )


# --- what they say together ---


def report(plan: Plan, *, draws: int) -> str:
    """Write the tables of all runs that are done, by whichever of the commands; the Markdown one.

    Raises:
        UserError: none is done, or a run's predictions cannot be read.
    """
    found = {trial: read_predictions(plan.folder(trial), "test") for trial in plan.done}
    if not found:
        raise UserError(f"{plan.out} has no run that is done")
    return write_report(plan, found, summarise(found, draws=draws), draws)


class Row(NamedTuple):
    """A metric over all runs."""

    metric: str
    runs: list[float]
    """Of each run's test slides, in the order of the trials; NaN where it is not defined."""
    together: Mapping[str, float | None]
    """``value``, ``low``, ``high``: of all folds' test slides; see :func:`summarise`."""

    @property
    def mean(self) -> float:
        """Over the runs that have it."""
        return float(np.mean(self.defined)) if self.defined else math.nan

    @property
    def sd(self) -> float:
        """Standard deviation over runs, n - 1."""
        return float(np.std(self.defined, ddof=1)) if len(self.defined) > 1 else math.nan

    @property
    def defined(self) -> list[float]:
        """The runs' values but for NaN."""
        return [value for value in self.runs if not math.isnan(value)]


def summarise(found: Mapping[Trial, SavedPredictions], *, draws: int) -> list[Row]:
    """A row for each metric.

    ``together`` is the mean over seeds of the metric of all folds' test slides in one, where the
    models' outputs are on one scale (:attr:`e2e.tasks.base.Task.pools`); else of the folds' mean. Its
    interval is over cases, whose resamples are the same for all seeds.
    """
    once = [_measure([run], np.ones((1, len(run.slides)))) for run in found.values()]
    seeds: dict[int, list[SavedPredictions]] = {}
    for trial, run in found.items():
        seeds.setdefault(trial.seed, []).append(run)
    whole = [_of_seed(runs, draws) for runs in seeds.values()]
    nothing = np.full(1 + draws, np.nan)

    def row(name: str) -> Row:
        runs = [float(values.get(name, nothing)[0]) for values in once]
        return Row(
            name, runs, confidence_interval(np.mean([v.get(name, nothing) for v in whole], axis=0))
        )

    return [row(name) for name in dict.fromkeys(name for values in once for name in values)]


def _of_seed(runs: Sequence[SavedPredictions], draws: int) -> Mapping[str, Array]:
    weights = case_weights([case for run in runs for case in run.cases], draws, seed=0)
    if runs[0].task.pools:
        return _measure(runs, weights)
    ends = np.cumsum([len(run.slides) for run in runs])[:-1]
    parts = zip(runs, np.split(weights, ends, axis=1), strict=True)
    each = [_measure([run], own) for run, own in parts]
    return {name: np.mean([values[name] for values in each], axis=0) for name in each[0]}


def _measure(runs: Sequence[SavedPredictions], weights: Array) -> Mapping[str, Array]:
    predicted = np.concatenate([run.predicted for run in runs])
    return runs[0].task.metrics(predicted, np.concatenate([run.targets for run in runs]), weights)


def write_report(
    plan: Plan, found: Mapping[Trial, SavedPredictions], rows: Sequence[Row], draws: int
) -> str:
    """results.csv (a line a run and metric), results.json, results.md and results.tex; the Markdown."""
    known = {*found, *plan.trials}
    said = (
        f"{len(found)} of {len(known)} runs: {len({t.fold for t in known})} folds, "
        f"{len({t.seed for t in known})} seed(s); "
        f"{len({s for run in found.values() for s in run.slides})} test slides of "
        f"{len({c for run in found.values() for c in run.cases})} cases; "
        f"intervals: 95 %, {draws:,} resamples of the cases"
    )
    lines = [
        {"fold": trial.fold, "seed": trial.seed, "metric": row.metric, "value": value}
        for row in rows
        for trial, value in zip(found, row.runs, strict=True)
    ]
    table = pd.DataFrame(lines).to_csv(index=False).encode()
    write_atomically(plan.out / "results.csv", table)
    columns = ("metric", "mean", "SD", "all folds", "95 % interval")
    cells = [_cells(row) for row in rows]
    markdown = "\n".join(
        [said, "", _line(columns), _line(["---"] * len(columns)), *map(_line, cells), ""]
    )
    write_atomically(plan.out / "results.md", markdown.encode())
    write_atomically(plan.out / "results.tex", _latex(said, columns, cells).encode())
    content = [
        {
            "metric": r.metric,
            "mean": _or_none(r.mean),
            "sd": _or_none(r.sd),
            "all_folds": r.together,
        }
        for r in rows
    ]
    write_json(plan.out / "results.json", {"said": said, "metrics": content})
    return markdown


def _cells(row: Row) -> list[str]:
    low, high = (row.together[key] for key in ("low", "high"))
    span = "undefined" if low is None or high is None else f"{low:.3f} to {high:.3f}"
    short = "" if len(row.defined) == len(row.runs) else f" (of {len(row.defined)} runs)"
    numbers = [_number(value) for value in (row.mean, row.sd, row.together["value"])]
    return [row.metric, numbers[0] + short, numbers[1], numbers[2], span]


def _number(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.3f}"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _latex(caption: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A booktabs table."""

    def line(words: Iterable[str]) -> str:
        return " & ".join(re.sub(r"([%_&#$])", r"\\\1", word) for word in words) + r" \\"

    body = [line(columns), r"\midrule", *map(line, cells)]
    rows = [r"\begin{tabular}{lrrrr}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join([f"% {caption}", *rows])
