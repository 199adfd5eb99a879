"""Search of settings by Optuna: each trial is a run, selected on validation alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from e2e.errors import UserError, describe_interrupt, format_list, optional_import
from e2e.files import read_text, write_json
from e2e.metrics.values import LOWER_IS_BETTER
from e2e.runs.many import is_done, run_command, start_or_resume, write_plan
from e2e.runs.parts import REGISTRIES, build_task
from e2e.settings.arguments import common_settings
from e2e.settings.cli import sweep_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e2e sweep`` and return its exit code."""
    args = sweep_parser().parse(argv)
    if args.trials < 1:
        raise UserError(f"--trials must be at least 1, found {args.trials}")
    settings, command = common_settings(args, REGISTRIES)
    if settings.run.protocol != "honest":
        raise UserError(
            f"run.protocol={settings.run.protocol} chooses on the test, a search on validation alone\n"
            "  leave it out"
        )
    with describe_interrupt(
        lambda: f"interrupted; finished trials are in {args.out}; the same command continues"
    ):
        best = search(
            command,
            read_space(args.space),
            out=args.out,
            trials=args.trials,
            metric=args.metric or build_task(settings.task).monitor,
            seed=args.seed,
            say=print,
        )
    print(f"best: {best['metric']} {best['value']:.4f} on validation, {best['run']}")
    return 0


def read_space(path: Path) -> dict[str, Any]:
    """Setting -> list of choices, or ``low`` and ``high`` of a number, with ``log`` or ``step``.

    Raises:
        UserError: no such file, or an entry that says no range; names it.
    """
    try:
        found = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"the space {path} cannot be read: {str(error).splitlines()[0]}") from error
    wrong = ["it holds no settings"] if not isinstance(found, dict) or not found else []
    wrong = wrong or [f"{k}: {v}" for k, v in found.items() if not _is_range(v)]
    if wrong:
        raise UserError(
            f"{path} says no range\n{format_list(wrong)}\n"
            "  write optim.lr: {low: 1.0e-5, high: 1.0e-3, log: true}, or head.attn_dim: [64, 128]"
        )
    return found


def _is_range(value: object) -> bool:
    with optional_import("search", use="e2e sweep"):
        from optuna.distributions import FloatDistribution, IntDistribution

    if isinstance(value, list):
        return len(value) > 0 and all(
            type(v) in (str, int, float, bool, list, NoneType) for v in value
        )
    if not isinstance(value, dict) or type(value.get("log", False)) is not bool:
        return False
    numbers = [value.get("low"), value.get("high"), value.get("step", 1)]
    if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        return False
    whole = all(type(n) is int for n in numbers)
    try:
        (IntDistribution if whole else FloatDistribution)(**value)
    except (TypeError, ValueError):  # a key that is no such; no number over 0 where log asks for it
        return False
    return value["low"] < value["high"]


def search(
    command: Sequence[str],
    space: Mapping[str, Any],
    *,
    out: Path,
    trials: int,
    metric: str,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Trials until ``trials`` are done in ``out``, those of earlier calls among them; the best one.

    Tree-structured Parzen estimator, seeded. A trial that was stopped is trained on to its end.

    Args:
        command: of launch/train.py.
        space: of :func:`read_space`.
        metric: of validation, by the selected weights; more is better, or less, as the metric has it.

    Raises:
        UserError: another search lies in ``out``; a run failed (its log is named); the metric is defined in
            no trial, whereas one in which it is not counts as the worst.
    """
    with optional_import("search", use="e2e sweep"):
        import optuna

    ours = {"command": list(command), "space": dict(space), "metric": metric}
    write_plan(out / "sweep.json", ours, "search")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{out.resolve()}/optuna.db",
        study_name="sweep",
        sampler=optuna.samplers.TPESampler(seed=seed),
        direction="minimize" if metric in LOWER_IS_BETTER else "maximize",
        load_if_exists=True,
    )
    worst = math.inf if metric in LOWER_IS_BETTER else -math.inf
    running, done = optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.COMPLETE
    for stopped in study.get_trials(deepcopy=False, states=(running,)):
        study.tell(stopped.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(stopped.params)
    while len(study.get_trials(deepcopy=False, states=(done,))) < trials:
        trial = study.ask()
        chosen = {name: _suggest(trial, name, entry) for name, entry in space.items()}
        folder = out / "runs" / _name(chosen)
        said = ", ".join(f"{name}={value}" for name, value in chosen.items())
        say(f"trial {trial.number}: {said}")
        value = judge(command, chosen, folder, metric)
        study.tell(trial, worst if value is None else value)
        shown = "undefined" if value is None else f"{value:.4f}"
        say(f"  {metric} on validation {shown}; best so far {study.best_value:.4f}")
    if study.best_value == worst:
        raise UserError(f"{metric} is not defined on validation in any of the {trials} trials")
    table = study.trials_dataframe(attrs=("number", "value", "params", "state"))
    table.to_csv(out / "trials.csv", index=False)
    best = {"metric": metric, "value": study.best_value, "settings": study.best_params}
    best["run"] = str(out / "runs" / _name(study.best_params))
    write_json(out / "best.json", best)
    return best


def judge(
    command: Sequence[str], chosen: Mapping[str, Any], folder: Path, metric: str
) -> float | None:
    """Train the run, or go on with it; its ``metric`` on validation, None where that is not defined."""
    if not is_done(folder):
        words = [f"{name}={json.dumps(value)}" for name, value in chosen.items()]
        log = folder.with_name(f"{folder.name}.log")
        arguments = start_or_resume([*command, *words], folder)
        if code := run_command("train", arguments, log):
            raise UserError(
                f"the run {folder.name} ended with exit code {code}; {log} says why\n"
                "  mend it, then give the same command again: it goes on from here"
            )
    report = folder / "metrics.json"
    found = json.loads(report.read_bytes())
    values = found[found["chosen_on"]][found["selected"]]
    if metric not in values:
        raise UserError(f"{report} has no '{metric}' on validation; it has: {', '.join(values)}")
    return values[metric]["value"]


def _suggest(trial: Any, name: str, entry: Any) -> Any:
    if isinstance(entry, list):
        return trial.suggest_categorical(name, entry)
    whole = all(isinstance(entry[key], int) for key in entry if key != "log")
    suggest = trial.suggest_int if whole else trial.suggest_float
    return suggest(name, **entry)


def _name(chosen: Mapping[str, Any]) -> str:
    text = json.dumps(chosen, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
