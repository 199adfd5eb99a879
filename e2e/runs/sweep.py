"""Search of settings with Optuna: each trial is a training, compared on the validation split alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from e2e.errors import UserError, describe_interrupt, format_list, optional_import
from e2e.files import read_json, read_text, write_json
from e2e.metrics.values import LOWER_IS_BETTER
from e2e.runs.many import is_done, run_command, start_or_resume, write_plan
from e2e.runs.parts import REGISTRIES, build_task
from e2e.settings.arguments import common_settings
from e2e.settings.cli import sweep_parser
from e2e.settings.yaml_text import parse_yaml


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
            report=print,
        )
    print(f"best: {best['metric']} {best['value']:.4f} on validation, {best['run']}")
    return 0


def read_space(path: Path) -> dict[str, Any]:
    """Read the search space: setting -> list of choices, or ``low`` and ``high`` of a number.

    A number may also have ``log`` or ``step``.

    Raises
    ------
    UserError
        There is no such file, or an entry is neither a list nor a range; the message names it.
    """
    try:
        space = parse_yaml(read_text(path), typed=True)
    except yaml.YAMLError as error:
        raise UserError(f"the space {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(space, dict) or not space:
        invalid = ["it holds no settings"]
    else:
        invalid = [f"{name}: {entry}" for name, entry in space.items() if not _is_range(entry)]
    if invalid:
        raise UserError(
            f"{path} holds no range\n{format_list(invalid)}\n"
            "  write optim.lr: {low: 1.0e-5, high: 1.0e-3, log: true}, or head.attn_dim: [64, 128]"
        )
    return space


def _is_range(entry: object) -> bool:
    with optional_import("search", use="e2e sweep"):
        from optuna.distributions import FloatDistribution, IntDistribution

    if isinstance(entry, list):
        choices = (str, int, float, bool, list, NoneType)
        return len(entry) > 0 and all(type(choice) in choices for choice in entry)
    if not isinstance(entry, dict) or type(entry.get("log", False)) is not bool:
        return False
    numbers = [entry.get("low"), entry.get("high"), entry.get("step", 1)]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        return False
    is_integer = all(type(number) is int for number in numbers)
    try:
        (IntDistribution if is_integer else FloatDistribution)(**entry)
    except (TypeError, ValueError):  # an unknown key; a bound of 0 with log: true
        return False
    return entry["low"] < entry["high"]


def search(
    command: Sequence[str],
    space: Mapping[str, Any],
    *,
    out: Path,
    trials: int,
    metric: str,
    seed: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Run trials until ``trials`` are done in ``out``, and return the best one.

    The sampler is a seeded tree-structured Parzen estimator. Trials of earlier commands count, and a
    stopped trial is resumed.

    Parameters
    ----------
    command
        Arguments of the training.
    space
        See :func:`read_space`.
    metric
        Validation metric of the selected weights; the metric itself says whether lower is better.
    report
        Called with lines of progress.

    Returns
    -------
    dict
        ``metric``, ``value``, ``settings`` and ``run`` (the folder) of the best trial.

    Raises
    ------
    UserError
        ``out`` holds another search, a training failed (the message names its log), or the metric is
        undefined in every trial. Where it is undefined in some, these count as the worst.
    """
    with optional_import("search", use="e2e sweep"):
        import optuna  # noqa: F401

    plan = {"command": list(command), "space": dict(space), "metric": metric}
    write_plan(out / "sweep.json", plan, "search")
    with _quiet_optuna():
        return _run_trials(
            command, space, _open_study(out, metric, seed), out, trials, metric, report
        )


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Keep Optuna from printing a line for each trial inside the block."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _run_trials(
    command: Sequence[str],
    space: Mapping[str, Any],
    study: Any,
    out: Path,
    trials: int,
    metric: str,
    report: Callable[[str], None],
) -> dict[str, Any]:
    from optuna.trial import TrialState

    worst = math.inf if metric in LOWER_IS_BETTER else -math.inf
    complete = (TrialState.COMPLETE,)
    while len(study.get_trials(deepcopy=False, states=complete)) < trials:
        trial = study.ask()
        settings = {name: _suggest(trial, name, entry) for name, entry in space.items()}
        words = ", ".join(f"{name}={value}" for name, value in settings.items())
        run = out / "runs" / _digest(settings)
        report(f"trial {trial.number}: {words}; {run}")
        value = evaluate_trial(command, settings, run, metric)
        study.tell(trial, worst if value is None else value)
        text = "undefined" if value is None else f"{value:.4f}"
        report(f"  {metric} on validation {text}; best so far {study.best_value:.4f}")
    if study.best_value == worst:
        raise UserError(f"{metric} is undefined on validation in all of the {trials} trials")
    table = study.trials_dataframe(attrs=("number", "value", "params", "state"))
    table["run"] = [str(out / "runs" / _digest(trial.params)) for trial in study.trials]
    table.to_csv(out / "trials.csv", index=False)
    best = {"metric": metric, "value": study.best_value, "settings": study.best_params}
    best["run"] = str(out / "runs" / _digest(study.best_params))
    write_json(out / "best.json", best)
    return best


def _open_study(out: Path, metric: str, seed: int) -> Any:
    """Create the study in ``out``, or open it; settings of trials that were stopped are tried again."""
    import optuna

    study = optuna.create_study(
        storage=f"sqlite:///{out.resolve()}/optuna.db",
        study_name="sweep",
        sampler=optuna.samplers.TPESampler(seed=seed),
        direction="minimize" if metric in LOWER_IS_BETTER else "maximize",
        load_if_exists=True,
    )
    running = (optuna.trial.TrialState.RUNNING,)
    for trial in study.get_trials(deepcopy=False, states=running):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
    return study


def evaluate_trial(
    command: Sequence[str], settings: Mapping[str, Any], folder: Path, metric: str
) -> float | None:
    """Train a run, or resume it, and return its validation ``metric``; None where that is undefined."""
    if not is_done(folder):
        overrides = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
        log = folder.with_name(f"{folder.name}.log")
        arguments = start_or_resume([*command, *overrides], folder)
        code = run_command("train", arguments, log)
        if code:
            raise UserError(
                f"the run {folder.name} ended with exit code {code}; see {log}\n"
                "  fix the cause, then run the same command again: finished trials are kept"
            )
    path = folder / "metrics.json"
    results = read_json(path)
    values = results[results["chosen_on"]][results["selected_weights"]]
    if metric not in values:
        raise UserError(f"{path} has no '{metric}' on validation; it has: {', '.join(values)}")
    return values[metric]["value"]


def _suggest(trial: Any, name: str, entry: Any) -> Any:
    if isinstance(entry, list):
        return trial.suggest_categorical(name, entry)
    is_integer = all(isinstance(entry[key], int) for key in entry if key != "log")
    suggest = trial.suggest_int if is_integer else trial.suggest_float
    return suggest(name, **entry)


def _digest(settings: Mapping[str, Any]) -> str:
    """Folder name of the run with these settings."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
