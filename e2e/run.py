"""A run from settings to a folder of results: train, evaluate, predict. Nothing else reads Settings
but build.py, which makes the parts."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor

from e2e import build
from e2e.build import REGISTRIES as REGISTRIES
from e2e.checkpoint import check_weights, load_checkpoint, part
from e2e.config import Settings, dump_settings, flat_settings, saved_settings
from e2e.data.cohort import Problem, Slide
from e2e.data.decode import decoder_threads
from e2e.data.loader import LabelledSlide, View
from e2e.data.pack import Progress, Report, Row, pack
from e2e.data.pixels import Look
from e2e.data.sources import SlideFiles, read_mpp
from e2e.data.splits import AS_PUBLISHED, EXTERNAL, HONEST, Protocol
from e2e.data.store import PatchStore, Slides
from e2e.errors import UserError, listing
from e2e.evaluate import (
    arrays_of,
    evaluate_run,
    heatmap_drawer,
    patch_attention,
    score,
    write_predictions,
)
from e2e.evaluate import predict as predict_slides
from e2e.files import claim, make_folder, write_atomically, write_json
from e2e.log import TRACKERS, MetricsLog, Screen, clock
from e2e.model import MILModel
from e2e.parallel import Strategy, pick_device
from e2e.tasks.base import Task
from e2e.trainer import LAST, Trainer, check_losses
from e2e.wsi.slide import find_slides
from e2e.wsi.tiling import Tiling

T = TypeVar("T")

PARTLY_DONE = 3
"""Exit code: the work is done but for some slides, which are named."""


PROTOCOLS = {"honest": HONEST, "as_published": AS_PUBLISHED}
FEATURES = "features.json"
"""In a run's folder: which features it was trained on, in the two-stage mode."""
LOCK = ".lock"
"""In a run's folder: held by the process that trains there."""


@dataclass(frozen=True)
class Parts:
    """What a run is made of, before a strategy has its hands on the model."""

    task: Task
    items: list[LabelledSlide]
    view: View
    """Of evaluation."""
    model: MILModel
    problems: list[Problem]
    """What of the cohort was left out."""
    features: dict[str, Any] | None
    """Which features it is trained on, in the two-stage mode."""

    def of_split(self, split: str) -> list[LabelledSlide]:
        """The slides of one split."""
        return [item for item in self.items if item.slide.split == split]


def train(settings: Settings, folder: Path, *, resume: bool) -> None:
    """Train in ``folder`` (new, or with ``resume`` a stopped run's), then evaluate the best epoch.

    Raises:
        UserError: the folder is in use, or data, weights or settings are not as they must be, or not
            the same on all ranks.
        LostRankError: another process of the run died or hangs.
    """
    with build.process_settings(settings):
        _train(settings, folder, resume=resume)


def _train(settings: Settings, folder: Path, *, resume: bool) -> None:
    strategy = build.build_strategy(settings.engine, pick_device(settings.engine.device))
    screen = Screen(strategy.leads)
    log = MetricsLog(None)
    held = ExitStack()

    def hold() -> None:
        if strategy.leads:
            held.enter_context(_alone(folder))

    def ready(trained: bool) -> Parts:
        if strategy.leads and not resume:
            _check_free(folder)
        parts = _prepare(settings, strategy, folder, out=folder, trained=trained)
        check_training(settings, parts, strategy.device, strategy.world_size)
        return parts

    try:
        with strategy.watch():
            if resume:
                _on_every_rank(strategy, hold)
            # A run that was stopped before it first saved begins anew, pretrained weights and all.
            begun = resume and (folder / LAST).is_file()
            parts = _on_every_rank(strategy, lambda: ready(begun))
            if not begun:
                _on_every_rank(strategy, lambda: _look_over(parts, strategy, screen))
                if not resume:
                    _on_every_rank(strategy, hold)
                _on_every_rank(strategy, lambda: _begin(settings, folder, parts, strategy))
            strategy.agree(_facts(settings, parts.items))
            if strategy.leads:
                made = (TRACKERS[name] for name in settings.run.track)
                trackers = [make(folder, dump_settings(settings)) for make in made]
                log = MetricsLog(folder / "metrics.jsonl", trackers)
            _greet(screen, settings, parts, strategy)
            trainer = _trainer(settings, folder, parts, strategy, log, screen)
            if resume:
                trainer.resume()
            started = time.monotonic()
            trainer.fit()
            screen.say(f"trained in {clock(time.monotonic() - started)}")
            _settle(settings, folder, parts, strategy, screen)
            _evaluate(settings, folder, folder, parts, strategy, screen)
            screen.say(f"results: {folder}/metrics.json, predictions.csv, figures/, heatmaps/")
    finally:
        screen.pause()
        log.close()
        held.close()
        strategy.close()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process trains in ``folder`` meanwhile; UserError where one does."""
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = claim(path)
    except OSError:  # no locks here; or no place to write, which the first file will tell
        yield
        return
    if handle is None:
        raise UserError(
            f"the run folder {folder} is in use: {path.read_text() or 'a process'} trains there\n"
            "  let it go on, or stop it; then give the same command again"
        )
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(handle)


def evaluate(settings: Settings, folder: Path, out: Path, *, external: bool = False) -> None:
    """Evaluate a run's best epoch again, into ``out``, with what it went by; so that tools read it as a run.

    Args:
        external: the slides are of a cohort that the run has never seen: all of them are the test,
            whatever splits there are.

    Raises:
        UserError: another head than the run's, or its classes in another order; or see :func:`train`.
    """
    saved = saved_settings(folder, [], REGISTRIES)
    trained, asked = saved.head.name, settings.head.name
    if asked != trained:  # the weights of some would fit: those of mean and max are alike
        raise UserError(
            f"{folder}/best.safetensors holds weights of the head '{trained}', not of '{asked}'\n"
            "  leave head.name as the run has it"
        )
    ours, theirs = (build.build_task(s.task).output_names for s in (saved, settings))
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise UserError(
            f"the outputs of {folder} are, in this order, {', '.join(ours)}; found {', '.join(theirs)}\n"
            "  leave task.classes, or task.labels, as the run has them"
        )
    if external:
        settings = _without_splits(settings)
    with build.process_settings(settings):
        _evaluate_into(settings, folder, out, external=external)


def _evaluate_into(settings: Settings, folder: Path, out: Path, *, external: bool) -> None:
    strategy = build.build_strategy(settings.engine, pick_device(settings.engine.device))
    screen = Screen(strategy.leads)
    ways = EXTERNAL if external else None
    try:
        with strategy.watch():
            parts = _on_every_rank(
                strategy,
                lambda: _prepare(settings, strategy, folder, out=out, trained=True, protocol=ways),
            )
            strategy.setup(parts.model, None, clip=None)
            make_folder(out)
            if out.resolve() != folder.resolve():
                _on_every_rank(strategy, lambda: _begin(settings, out, parts, strategy))
            if external and (seen := _seen(parts.items, folder)):
                screen.say(
                    f"NOTE {len(seen)} case(s) are named as some that the run was trained or chosen on: if "
                    f"they are these, the figures are no estimate of new ones\n{listing(seen)}"
                )
            _evaluate(settings, folder, out, parts, strategy, screen)
            screen.say(f"results: {out}/metrics.json, predictions.csv, figures/, heatmaps/")
    finally:
        screen.pause()
        strategy.close()


def _without_splits(settings: Settings) -> Settings:
    """And without the further magnifications, which training alone sees."""
    columns = replace(settings.data.columns, split=None)
    data = replace(settings.data, columns=columns, split_file=None, fold=None, scales=[])
    return replace(settings, data=data, bag=replace(settings.bag, shares=[]))


def _seen(items: Sequence[LabelledSlide], folder: Path) -> list[str]:
    """Cases by whose names the run in ``folder`` was trained or its epoch chosen."""
    known = pd.read_csv(folder / "cohort.csv", dtype=str, keep_default_na=False)
    learned = set(known.loc[known["split"].isin(("train", "val")), "case"])
    return sorted({item.slide.case for item in items} & learned)


def _check_free(folder: Path) -> None:
    if not _is_free(folder):
        raise UserError(
            f"the run folder {folder} exists\n"
            f"  go on with it: --resume {folder}; or choose another: run.out=FOLDER"
        )


def _prepare(
    settings: Settings,
    strategy: Strategy,
    folder: Path,
    *,
    out: Path,
    trained: bool,
    protocol: Protocol | None = None,
) -> Parts:
    """Data and model. What a checkpoint holds is not made (``trained``): weights of the encoder, what the
    task fits.

    Args:
        out: where results go; what of the cohort cannot be used is listed beside it.
        protocol: None: the run's.
    """
    task = build.load_task(settings.task, folder) if trained else build.build_task(settings.task)
    features = build.on_features(settings)
    items, problems = take_in(
        settings,
        task,
        features=features,
        problems_file=out.with_name(f"{out.name}.problems.csv") if strategy.leads else None,
        protocol=protocol or PROTOCOLS[settings.run.protocol],
    )
    if not trained:
        fit_task(settings, task, items)
    known = build.describe_features(items) if features else None
    if known and trained:
        _check_features(known, folder)
    return make_parts(
        settings,
        task,
        items,
        strategy.device,
        trained=trained,
        problems=problems,
        features=known,
    )


def _check_features(known: dict[str, Any], folder: Path) -> None:
    """UserError where features are others than the run's, as far as that noted them."""
    if (folder / FEATURES).is_file():
        build.check_features(known, json.loads((folder / FEATURES).read_bytes()), folder)


def _is_free(folder: Path) -> bool:
    """Whether nothing is there, but for a lock."""
    there = os.listdir(folder) if folder.is_dir() else [folder.name] if folder.exists() else []
    return not {*there} - {LOCK}


def take_in(
    settings: Settings,
    task: Task,
    *,
    features: bool,
    problems_file: Path | None,
    protocol: Protocol,
) -> tuple[list[LabelledSlide], list[Problem]]:
    """The cohort as :func:`e2e.build.load_cohort` has it.

    Raises:
        UserError: see there; or an update has too few bags for the task.
    """
    if task.whole_update and settings.optim.bags < 2:
        raise UserError(
            "the task's loss compares the bags of an update: optim.bags must be 2 or more, found 1"
        )
    return build.load_cohort(
        settings.data,
        task,
        name=settings.names.get("datasets", ""),
        seed=settings.run.seed,
        size=settings.bag.size,
        problems_file=problems_file,
        features=features,
        protocol=protocol,
    )


def fit_task(settings: Settings, task: Task, items: Sequence[LabelledSlide]) -> None:
    """Fit the task to the slides that the run's protocol has; UserError where nothing can be learned."""
    splits = PROTOCOLS[settings.run.protocol].fitted_to
    learned = [item for item in items if item.slide.split in splits]
    task.fit([item.target for item in learned], [item.slide.case for item in learned])


def make_parts(
    settings: Settings,
    task: Task,
    items: list[LabelledSlide],
    device: torch.device,
    *,
    trained: bool,
    problems: list[Problem],
    features: dict[str, Any] | None,
) -> Parts:
    """The model and what it sees of the slides.

    Args:
        trained: weights will be loaded, so none are fetched.
        problems: what of the cohort was left out.
        features: of :func:`e2e.build.describe_features`; None for patches.

    Raises:
        UserError: the settings make no model, or the head needs places that a slide does not have.
    """
    view = build.build_view(settings.data, settings.bag, device, features=features is not None)
    width = features["width"] if features else None
    model = build.build_model(settings, task, device, trained=trained, width=width)
    for item in items if model.head.needs_coords else []:
        view.check_places(item)
    return Parts(task, items, view, model, problems, features)


def check_training(settings: Settings, parts: Parts, device: torch.device, world_size: int) -> None:
    """UserError where training would fail: all that can be told before the first step."""
    build.judged_weights(settings.optim, settings.select)
    train, model = parts.of_split("train"), parts.model
    loader = build.build_loader(settings, train, parts.view, model=model, task=parts.task)
    loader.check(world_size, settings.optim.epochs)
    if any(regulariser.needs_coords for regulariser in model.regularisers):
        for item in train:
            parts.view.check_places(item)
    check_losses(model, parts.task, train[0].target, device)


def _look_over(parts: Parts, strategy: Strategy, screen: Screen) -> None:
    """Read the features that are first wanted when training has cost its time: those of validation and test.

    Each rank has its share. Those of training are all wanted in the first epoch.
    """
    if parts.features is not None:
        later = [item for item in parts.items if item.slide.split != "train"]
        build.check_values(later[strategy.rank :: strategy.world_size], screen)


def _begin(settings: Settings, folder: Path, parts: Parts, strategy: Strategy) -> None:
    """Make the folder of a run, or of its evaluation, with what that goes by."""
    if not strategy.leads:
        return
    # The settings first: with them a run that is stopped here already goes on.
    write_atomically(folder / "settings.yaml", dump_settings(settings).encode())
    build.write_cohort(parts.items, parts.problems, folder / "cohort.csv")
    write_json(folder / build.TASK, parts.task.state())
    if parts.features:
        write_json(folder / FEATURES, parts.features)


def _on_every_rank(strategy: Strategy, prepare: Callable[[], T]) -> T:
    """What ``prepare`` makes; a UserError on one rank ends all of them with its message."""
    made: list[T] = []
    fault: str | None = None
    try:
        made.append(prepare())
    except UserError as error:
        fault = str(error)
    faults = strategy.gather(fault)
    ranks = [rank for rank, text in enumerate(faults) if text is not None]
    if ranks:
        where = "" if len(ranks) == len(faults) else f"\n  (on rank {ranks[0]} of {len(faults)})"
        raise UserError(f"{faults[ranks[0]]}{where}")
    return made[0]


def _facts(settings: Settings, items: list[LabelledSlide]) -> dict[str, str]:
    """What all ranks must have alike, as short texts."""
    cohort = [(item.slide, item.store.count(item.slide.id), item.target.tolist()) for item in items]
    digest = hashlib.sha256(repr(cohort).encode()).hexdigest()[:12]
    return {"torch": torch.__version__, "cohort": digest, **flat_settings(settings)}


def predict(
    settings: Settings,
    folder: Path,
    slides: Path,
    out: Path,
    *,
    mpp_override: Path | None,
    workers: int,
) -> int:
    """Cut raw slides as the run's were, predict them and draw a heatmap of each.

    Args:
        slides: a slide, or a folder of them; of a run on features, a folder or file of features.

    Returns:
        0, or 3 when some slides could not be read or hold no tissue.

    Raises:
        UserError: the features are of another encoder, or cannot be used.
    """
    # Products of float32 keep the precision of this process, whatever engine.precision says.
    with decoder_threads(settings.data.workers):
        return _predict(settings, folder, slides, out, mpp_override=mpp_override, workers=workers)


def _predict(
    settings: Settings,
    folder: Path,
    slides: Path,
    out: Path,
    *,
    mpp_override: Path | None,
    workers: int,
) -> int:
    best = folder / "best.safetensors"
    tensors, _ = load_checkpoint(best)
    screen = Screen(leads=True)
    make_folder(out)
    judged = build.judged_weights(settings.optim, settings.select)
    task = build.load_task(settings.task, folder).of(judged)
    features, packed = None, None
    if build.on_features(settings):
        items = _unlabelled(
            build.open_feature_stores(replace(settings.data, features=[str(slides)])), task
        )
        features = build.describe_features(items)
        _check_features(features, folder)
        build.check_values(items, screen)
    else:
        packed = _pack_alike(settings, slides, out / "slides.lmdb", mpp_override, workers, screen)
        items = _unlabelled([PatchStore(out / "slides.lmdb")], task)
    strategy = Strategy(pick_device(settings.engine.device))
    parts = make_parts(
        settings, task, items, strategy.device, trained=True, problems=[], features=features
    )
    weights = part(judged, tensors)
    strategy.setup(parts.model, None, clip=None)
    check_weights(strategy.shapes, weights, best)
    strategy.load(weights)
    placed = [item for item in items if item.record.coords is not None]
    found = predict_slides(
        parts.model,
        items,
        task=task,
        view=parts.view,
        strategy=strategy,
        screen=screen,
        draw=heatmap_drawer(task, parts.view.look, out / "heatmaps", placed),
    )
    write_predictions(found, task, out / "predictions.csv")
    screen.say(f"{len(found)} slides predicted: {out}/predictions.csv, {out}/heatmaps/")
    if packed and packed.problems:
        screen.say(f"{len(packed.problems)} slides could not be predicted, see {packed.quarantine}")
        return PARTLY_DONE
    return 0


def _pack_alike(
    settings: Settings,
    slides: Path,
    store: Path,
    mpp_override: Path | None,
    workers: int,
    screen: Screen,
) -> Report:
    """Pack raw slides as those were that the run was trained on."""
    recipe = build.first_recipe(settings.data)
    overrides = read_mpp(mpp_override) if mpp_override else {}
    tiling = Tiling.from_recipe(recipe)
    source = SlideFiles(find_slides(slides), tiling, recipe["quality"], overrides)
    return pack(source, store, workers=workers, progress=_Told(screen))


def _unlabelled(stores: Sequence[Slides], task: Task) -> list[LabelledSlide]:
    unknown = task.encode(dict.fromkeys(task.columns, ""))
    return [
        LabelledSlide(Slide(id=slide, case=slide, split="", target={}), store, unknown)
        for store in stores
        for slide in store.slides
    ]


class _Told(Progress):
    """A line for each slide that is cut."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def finished(self, row: Row) -> None:
        """See the base class."""
        self._screen.say(f"{row.slide}: {row.status}, {row.patches} patches {row.reason}".rstrip())


def _trainer(
    settings: Settings,
    folder: Path,
    parts: Parts,
    strategy: Strategy,
    log: MetricsLog,
    screen: Screen,
) -> Trainer:
    loader = build.build_loader(
        settings, parts.of_split("train"), parts.view, model=parts.model, task=parts.task
    )
    judges = parts.of_split(PROTOCOLS[settings.run.protocol].chosen_on)
    items, view = build.build_validation(settings, judges, parts.view, parts.task)

    def validate(model: MILModel) -> dict[str, float | None]:
        found = predict_slides(
            model,
            items,
            task=parts.task,
            view=view,
            strategy=strategy,
            screen=screen,
        )
        return {name: m["value"] for name, m in score(found, parts.task, draws=0).items()}

    def score_patches(model: MILModel) -> dict[str, Tensor]:
        chosen = parts.of_split("train")
        return patch_attention(model, chosen, parts.task, parts.view, strategy, screen)

    return Trainer(
        parts.model,
        task=parts.task,
        loader=loader,
        strategy=strategy,
        schedule=build.build_schedule(
            settings.optim,
            settings.select,
            save_every=settings.run.save_every,
            max_bad_steps=settings.engine.max_bad_steps,
            rescore=settings.bag.rescore,
        ),
        validate=validate,
        score_patches=score_patches if loader.view.sampler.uses_scores else None,
        folder=folder,
        log=log,
        screen=screen,
    )


def _settle(
    settings: Settings, folder: Path, parts: Parts, strategy: Strategy, screen: Screen
) -> None:
    """Let the task take what it wants of what the judged weights say of the training slides."""
    if not parts.task.settles:
        return
    strategy.wait()  # for the rank that writes the checkpoint
    best = folder / "best.safetensors"
    judged = build.judged_weights(settings.optim, settings.select)
    weights = part(judged, load_checkpoint(best)[0])
    check_weights(strategy.shapes, weights, best)
    with strategy.whole_parameters(strategy.scatter(weights)):
        found = predict_slides(
            parts.model,
            parts.of_split("train"),
            task=parts.task,
            view=parts.view,
            strategy=strategy,
            screen=screen,
        )
    parts.task.settle(judged, *arrays_of(found), [p.case for p in found])
    if strategy.leads:
        write_json(folder / build.TASK, parts.task.state())


def _evaluate(
    settings: Settings,
    folder: Path,
    out: Path,
    parts: Parts,
    strategy: Strategy,
    screen: Screen,
) -> None:
    evaluate_run(
        parts.model,
        folder / "best.safetensors",
        parts.items,
        task=parts.task,
        view=parts.view,
        judged=build.judged_weights(settings.optim, settings.select),
        chosen_on=PROTOCOLS[settings.run.protocol].chosen_on,
        draws=settings.run.bootstrap,
        heatmaps=settings.run.heatmaps,
        out=out,
        strategy=strategy,
        screen=screen,
    )


def _greet(screen: Screen, settings: Settings, parts: Parts, strategy: Strategy) -> None:
    """What is about to run, in a few lines."""
    if settings.run.protocol != "honest":
        screen.say(
            "NOTE run.protocol=as_published: validation is part of the test, the epoch is chosen on the test"
            " slides, and the task is fitted to all cases; the figures of test are no estimate of new slides"
        )
    for split in ("train", "val", "test"):
        chosen = parts.of_split(split)
        patches = sum(item.store.count(item.slide.id) for item in chosen)
        screen.say(
            f"{split:5}  {len(chosen)} {settings.data.unit}s, {patches:,} patches: "
            f"{parts.task.describe([item.target for item in chosen])}"
        )
    model = parts.model
    counts = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.encoder, model.head)]
    learning = sum(p.numel() for p in model.encoder.parameters() if p.requires_grad) / 1e6
    bag, look = settings.bag.patches or "all", parts.view.look
    where = f"{strategy.world_size} x {strategy.device} ({type(strategy).__name__})"
    bags = f"{settings.optim.bags} bags an update of {bag} patches"
    if isinstance(look, Look):
        screen.say(
            f"{settings.encoder.name} ({counts[0]:.2f} M, {learning:.2f} M learn) + {settings.head.name} "
            f"({counts[1]:.2f} M) on {where}; {bags}, chunks of {model.chunk}; BatchNorm "
            f"{model.batch_norm.name}, {model.autocast or torch.float32}; JPEG {look.decoder.name} "
            f"{look.decoder.note}".rstrip()
        )
    else:
        screen.say(
            f"features of width {model.encoder.dim} + {settings.head.name} ({counts[1]:.2f} M) on {where}; "
            f"{bags}; {model.autocast or torch.float32}"
        )
