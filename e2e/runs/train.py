"""Train a run from settings to a folder of results."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from e2e.bags.spec import LabelledSlide
from e2e.cohort.features import check_values
from e2e.engine.model import MILModel
from e2e.errors import describe_interrupt
from e2e.files import write_json
from e2e.log import TRACKERS, MetricsLog, Screen, clock
from e2e.parallel import Strategy
from e2e.reports.evaluate import score
from e2e.reports.predictions import predict as predict_slides
from e2e.reports.predictions import score_patches, to_arrays
from e2e.runs.evaluate import problems_file, write_evaluation
from e2e.runs.folder import BEST, TASK, check_is_new, locked, remove_run, write_inputs
from e2e.runs.options_help import describe_topic
from e2e.runs.parts import (
    PROTOCOLS,
    REGISTRIES,
    Parts,
    build_loader,
    build_schedule,
    build_validation,
    check_training,
    prepare,
    selected_weights,
)
from e2e.runs.processes import needs_ranks, run_ranks
from e2e.runs.recipes import check_same_patches, write_recipes
from e2e.runs.session import session
from e2e.runs.summary import describe_run
from e2e.settings.arguments import settings_from_args
from e2e.settings.cli import train_parser
from e2e.settings.layers import dump_settings, flatten_settings
from e2e.settings.schema import Settings
from e2e.training.checkpoint import check_weights, load_checkpoint, select_prefix
from e2e.training.trainer import LAST, Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e2e train`` and return its exit code."""
    args = train_parser().parse(argv)
    if args.help_topic:
        print(describe_topic(args.help_topic, REGISTRIES))
        return 0
    settings, folder = settings_from_args(args, REGISTRIES)
    if args.print_config:
        print(dump_settings(settings), end="")
        return 0
    if needs_ranks(args.gpus, on_cpu=settings.engine.device == "cpu"):
        return run_ranks("train", argv, args.gpus)
    with describe_interrupt(lambda: _how_to_continue(folder)):
        train(settings, folder, resume=bool(args.resume), overwrite=args.overwrite)
    return 0


def _how_to_continue(folder: Path) -> str:
    if not (folder / "settings.yaml").is_file():
        return "interrupted before training started; nothing was saved"
    saved = f"checkpoint {folder / LAST}" if (folder / LAST).is_file() else "no checkpoint yet"
    return f"interrupted; {saved}; to continue: e2e train --resume {folder}"


def train(settings: Settings, folder: Path, *, resume: bool, overwrite: bool = False) -> None:
    """Train in ``folder``, then evaluate the selected epoch.

    Parameters
    ----------
    settings
        Of the run.
    folder
        The run folder: new, or with ``resume`` that of a stopped run.
    overwrite
        Whether an earlier run in the folder is replaced, once everything has been checked.

    Raises
    ------
    UserError
        The folder is in use; data, weights or settings are wrong, or differ between ranks.
    LostRankError
        Another process of the run died or does not answer.
    """
    with session(settings) as (strategy, screen), ExitStack() as lock:
        if resume:
            _lock_together(lock, folder, strategy)
        # A run that was stopped before its first checkpoint starts again, pretrained weights and all.
        has_checkpoint = resume and (folder / LAST).is_file()
        with strategy.fail_together():
            if strategy.is_leader and not resume:
                check_is_new(folder, overwrite=overwrite)
            parts = prepare(
                settings,
                strategy.device,
                run=folder if has_checkpoint else None,
                problems_file=problems_file(folder) if strategy.is_leader else None,
            )
            check_training(settings, parts, strategy.device, strategy.world_size)
            if strategy.is_leader and has_checkpoint:
                check_same_patches(parts.patch_kinds, folder)
        if not has_checkpoint:
            if settings.data.unmatched != "drop":  # then all were read when the cohort was loaded
                _check_evaluation_features(parts, strategy, screen)
            if not resume:
                _lock_together(lock, folder, strategy)
            if overwrite:
                _remove_together(folder, strategy)
            _write_inputs_together(settings, folder, parts, strategy)
        strategy.check_agreement(_facts(settings, parts.items))
        _fit(settings, folder, parts, strategy, screen, resume=resume)
        _fit_task_to_predictions(settings, folder, parts, strategy, screen)
        write_evaluation(settings, folder, folder, parts, strategy, screen)


def _lock_together(lock: ExitStack, folder: Path, strategy: Strategy) -> None:
    with strategy.fail_together():
        if strategy.is_leader:
            lock.enter_context(locked(folder))


def _remove_together(folder: Path, strategy: Strategy) -> None:
    with strategy.fail_together():
        if strategy.is_leader:
            check_is_new(folder, overwrite=True)  # again, now that no other process writes there
            remove_run(folder)


def _write_inputs_together(
    settings: Settings, folder: Path, parts: Parts, strategy: Strategy
) -> None:
    with strategy.fail_together():
        if strategy.is_leader:
            write_inputs(
                folder,
                settings,
                slides=parts.items,
                problems=parts.problems,
                task=parts.task,
                features=parts.features,
            )
            if parts.features is None:
                write_recipes(parts.items, parts.patch_kinds, folder)


def _check_evaluation_features(parts: Parts, strategy: Strategy, screen: Screen) -> None:
    """Read the features of validation and test now, before hours of training; each rank its share.

    Those of the training slides are all read in the first epoch.
    """
    with strategy.fail_together():
        if parts.features is not None:
            later = [item for item in parts.items if item.slide.split != "train"]
            check_values(later[strategy.rank :: strategy.world_size], screen)


def _facts(settings: Settings, items: list[LabelledSlide]) -> dict[str, str]:
    """What must be the same on all ranks, as short texts."""
    cohort = [
        (item.slide, item.reader.num_patches(item.slide.id), item.target.tolist()) for item in items
    ]
    digest = hashlib.sha256(repr(cohort).encode()).hexdigest()[:12]
    return {"torch": torch.__version__, "cohort": digest, **flatten_settings(settings)}


def _fit(
    settings: Settings,
    folder: Path,
    parts: Parts,
    strategy: Strategy,
    screen: Screen,
    *,
    resume: bool,
) -> None:
    """Train to the end; the weights of the selected epoch are in the folder afterwards."""
    log = MetricsLog(None)
    try:
        if strategy.is_leader:
            trackers = [TRACKERS[k](folder, dump_settings(settings)) for k in settings.run.track]
            log = MetricsLog(folder / "metrics.jsonl", trackers, screen)
        if strategy.is_leader:  # it reads the record of every slide
            for line in describe_run(settings, parts, strategy):
                screen.say(line)
        trainer = _build_trainer(settings, folder, parts, strategy, log, screen)
        if resume:
            trainer.resume()
        started = time.monotonic()
        trainer.fit()
        screen.say(f"trained in {clock(time.monotonic() - started)}")
    finally:
        screen.pause()
        log.close()


def _build_trainer(
    settings: Settings,
    folder: Path,
    parts: Parts,
    strategy: Strategy,
    log: MetricsLog,
    screen: Screen,
) -> Trainer:
    task, train_slides = parts.task, parts.of_split("train")
    loader = build_loader(settings, train_slides, parts.view, model=parts.model, task=task)
    val_slides = parts.of_split(PROTOCOLS[settings.run.protocol].selection_split)
    val_slides, val_view = build_validation(settings, val_slides, parts.view, task)

    def validate(model: MILModel) -> dict[str, float | None] | None:
        predictions = predict_slides(
            model, val_slides, task=task, view=val_view, strategy=strategy, screen=screen
        )
        if not all(map(math.isfinite, chain.from_iterable(p.values for p in predictions))):
            return None
        return {name: m["value"] for name, m in score(predictions, task, draws=0).items()}

    def score_training_patches(model: MILModel) -> dict[str, Tensor]:
        return score_patches(model, train_slides, task, parts.view, strategy, screen)

    return Trainer(
        parts.model,
        task=task,
        loader=loader,
        strategy=strategy,
        schedule=build_schedule(
            settings.optim,
            settings.select,
            save_every=settings.run.save_every,
            max_bad_steps=settings.engine.max_bad_steps,
            rescore=settings.bag.rescore,
        ),
        validate=validate,
        score_patches=score_training_patches if loader.spec.sampler.uses_scores else None,
        folder=folder,
        log=log,
        screen=screen,
    )


def _fit_task_to_predictions(
    settings: Settings, folder: Path, parts: Parts, strategy: Strategy, screen: Screen
) -> None:
    """Fit what the task takes from predictions of the training slides by the selected weights."""
    if not parts.task.fits_predictions:
        return
    strategy.barrier()  # for the rank that writes the checkpoint
    selected = selected_weights(settings.optim, settings.select)
    weights = select_prefix(selected, load_checkpoint(folder / BEST)[0])
    check_weights(strategy.shapes, weights, folder / BEST)
    with strategy.full_parameters(strategy.shard(weights)):
        predictions = predict_slides(
            parts.model,
            parts.of_split("train"),
            task=parts.task,
            view=parts.view,
            strategy=strategy,
            screen=screen,
        )
    parts.task.fit_to_predictions(selected, *to_arrays(predictions), [p.case for p in predictions])
    if strategy.is_leader:
        write_json(folder / TASK, parts.task.state())
