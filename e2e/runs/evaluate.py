"""Evaluate a trained run again: on its own cohort, or on one that it has never seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from e2e.bags.spec import LabelledSlide
from e2e.cohort.report import count_problems
from e2e.cohort.splits import EXTERNAL
from e2e.errors import UserError, describe_interrupt, format_list
from e2e.files import create_folder
from e2e.log import Screen
from e2e.parallel import Strategy
from e2e.reports.evaluate import evaluate_run
from e2e.runs.folder import BEST, COHORT, open_run, results_folder, write_inputs
from e2e.runs.parts import (
    PROTOCOLS,
    REGISTRIES,
    Parts,
    build_task,
    prepare,
    selected_weights,
)
from e2e.runs.processes import needs_ranks, run_ranks
from e2e.runs.recipes import find_other_patches
from e2e.runs.session import session
from e2e.settings.cli import evaluate_parser
from e2e.settings.layers import saved_settings
from e2e.settings.schema import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e2e evaluate`` and return its exit code."""
    args = evaluate_parser().parse(argv)
    out = args.out or results_folder(args.run, "external" if args.external else "evaluation")
    with open_run(args.run) as folder:
        settings = saved_settings(folder, args.overrides, REGISTRIES)
        if needs_ranks(args.gpus, on_cpu=settings.engine.device == "cpu"):
            return run_ranks("evaluate", argv, args.gpus)
        with describe_interrupt(lambda: "interrupted; the evaluation is not saved; run it again"):
            evaluate(settings, folder, out, external=args.external)
    return 0


def evaluate(settings: Settings, folder: Path, out: Path, *, external: bool = False) -> None:
    """Evaluate the selected epoch of the run in ``folder`` and write the results to ``out``.

    ``out`` also receives the settings, cohort and task, so that tools can read it like a run folder.

    Parameters
    ----------
    external
        The slides belong to a cohort that the run has never seen. All of them are the test
        set, whatever splits the table has.

    Raises
    ------
    UserError
        The head, or the order of the classes, is not the run's; or see
        :func:`e2e.runs.train.train`.
    """
    _check_same_model(settings, folder)
    if external:
        settings = _without_splits(settings)
    with session(settings) as (strategy, screen):
        with strategy.fail_together():
            parts = prepare(
                settings,
                strategy.device,
                run=folder,
                problems_file=problems_file(out) if strategy.is_leader else None,
                protocol=EXTERNAL if external else None,
            )
        strategy.setup(parts.model, None, clip=None)
        create_folder(out)
        with strategy.fail_together():
            if strategy.is_leader and out.resolve() != folder.resolve():
                write_inputs(
                    out,
                    settings,
                    slides=parts.items,
                    problems=parts.problems,
                    task=parts.task,
                    features=parts.features,
                )
        if strategy.is_leader and (difference := find_other_patches(parts.patch_kinds, folder)):
            screen.say(
                f"warning: {difference}\n"
                "  the results hold for these patches; to compare them with the run's own, pack the slides as"
                " the run's slides were"
            )
        if external:
            _warn_of_known_cases(parts.items, folder, screen)
        write_evaluation(settings, folder, out, parts, strategy, screen)


def write_evaluation(
    settings: Settings, folder: Path, out: Path, parts: Parts, strategy: Strategy, screen: Screen
) -> None:
    """Evaluate the selected epoch of ``folder`` with these parts, and write the results to ``out``."""
    evaluate_run(
        parts.model,
        folder / BEST,
        parts.items,
        task=parts.task,
        view=parts.view,
        selected=selected_weights(settings.optim, settings.select),
        chosen_on=PROTOCOLS[settings.run.protocol].selection_split,
        left_out=count_problems(parts.problems),
        draws=settings.run.bootstrap,
        heatmaps=settings.run.heatmaps,
        out=out,
        strategy=strategy,
        screen=screen,
    )
    screen.say(f"results: {out}/metrics.json, predictions.csv, figures/, heatmaps/")


def problems_file(out: Path) -> Path:
    """Where the unusable rows of a cohort are listed: beside the folder of the results."""
    return out.with_name(f"{out.name}.problems.csv")


def _check_same_model(settings: Settings, folder: Path) -> None:
    """Raise UserError if head or outputs differ from the run's, even where its weights would fit."""
    saved = saved_settings(folder, [], REGISTRIES)
    if settings.head.name != saved.head.name:
        raise UserError(
            f"{folder / BEST} holds weights of the head '{saved.head.name}', not of "
            f"'{settings.head.name}'\n  leave head.name as the run has it"
        )
    trained, requested = (build_task(s.task).output_names for s in (saved, settings))
    if trained != requested and sorted(trained) == sorted(requested):
        raise UserError(
            f"the outputs of {folder} are, in this order, {', '.join(trained)}; "
            f"found {', '.join(requested)}\n"
            "  leave task.classes, or task.labels, as the run has them"
        )


def _without_splits(settings: Settings) -> Settings:
    """The settings without splits, and without further magnifications, which only training uses."""
    columns = replace(settings.data.columns, split=None)
    data = replace(settings.data, columns=columns, split_file=None, fold=None, scales=[])
    return replace(settings, data=data, bag=replace(settings.bag, shares=[]))


def _warn_of_known_cases(items: Sequence[LabelledSlide], folder: Path, screen: Screen) -> None:
    """Warn of cases with names that occur in the training or validation split of the run."""
    if not (folder / COHORT).is_file():
        screen.say(
            "warning: an exported model does not name its training cases; if some of these are the same "
            "patients, the results are no estimate for new ones"
        )
        return
    cohort = pd.read_csv(folder / COHORT, dtype=str, keep_default_na=False)
    used = set(cohort.loc[cohort["split"].isin(("train", "val")), "case"])
    if known_cases := sorted({item.slide.case for item in items} & used):
        screen.say(
            f"warning: {len(known_cases)} case(s) have names that also occur in the run's training or "
            "validation cases; if they are the same patients, the results are no estimate for new "
            f"ones\n{format_list(known_cases)}"
        )
