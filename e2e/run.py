"""A run from settings to a folder of results: train, evaluate, predict. Nothing else reads Settings
but build.py, which makes the parts."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from e2e import build
from e2e.build import REGISTRIES as REGISTRIES
from e2e.checkpoint import load_checkpoint, load_weights, part
from e2e.config import Settings, dump_settings
from e2e.data.cohort import Slide
from e2e.data.decode import Decoder, build_decoder
from e2e.data.loader import LabelledSlide, View
from e2e.data.pack import Progress, Row, pack
from e2e.data.sources import SlideFiles, read_mpp
from e2e.data.store import PatchStore
from e2e.errors import UserError
from e2e.evaluate import evaluate_run, heatmap_drawer, score, write_predictions
from e2e.evaluate import predict as predict_slides
from e2e.files import write_atomically
from e2e.log import MetricsLog, Screen, clock
from e2e.model import MILModel
from e2e.parallel import Strategy, build_strategy, pick_device
from e2e.tasks.base import Task
from e2e.trainer import Trainer
from e2e.wsi.slide import find_slides
from e2e.wsi.tiling import Tiling

PARTLY_DONE = 3
"""Exit code: the work is done but for some slides, which are named."""


def train(settings: Settings, folder: Path, *, resume: bool) -> None:
    """Train in ``folder`` (new, or with ``resume`` a stopped run's), then evaluate the best epoch.

    Raises:
        UserError: the folder is in use, or data, weights or settings are not as they must be.
    """
    leads = os.environ.get("RANK", "0") == "0"
    if leads and not resume and folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"the run folder {folder} exists\n"
            f"  go on with it: --resume {folder}; or choose another: run.out=FOLDER"
        )
    task = build.build_task(settings.task)
    items = _load_items(settings, task, folder if leads else None, new=not resume)
    decoder = build_decoder(settings.data.decoder)
    device = pick_device(settings.engine.device)
    model = build.build_model(settings, task, device, trained=resume)
    strategy = build_strategy(device)
    screen = Screen(strategy.leads)
    log = MetricsLog(
        folder / "metrics.jsonl" if strategy.leads else None,
        wandb={"settings": dump_settings(settings)} if settings.run.wandb else None,
    )
    try:
        _greet(screen, settings, task, items, model, strategy)
        trainer = _trainer(settings, folder, items, task, decoder, model, strategy, log, screen)
        if resume:
            trainer.resume()
        started = time.monotonic()
        trainer.fit()
        screen.say(f"trained in {clock(time.monotonic() - started)}")
        _evaluate(settings, folder, folder, items, task, decoder, model, strategy, screen)
        screen.say(f"results: {folder}/metrics.json, predictions.csv, heatmaps/")
    finally:
        screen.pause()
        log.close()
        strategy.close()


def evaluate(settings: Settings, folder: Path, out: Path) -> None:
    """Evaluate a run's best epoch again, into ``out``."""
    task = build.build_task(settings.task)
    items = _load_items(settings, task, None, new=False)
    decoder = build_decoder(settings.data.decoder)
    device = pick_device(settings.engine.device)
    model = build.build_model(settings, task, device, trained=True)
    strategy = build_strategy(device)
    screen = Screen(strategy.leads)
    out.mkdir(parents=True, exist_ok=True)
    try:
        _evaluate(settings, folder, out, items, task, decoder, model, strategy, screen)
        screen.say(f"results: {out}/metrics.json, predictions.csv, heatmaps/")
    finally:
        screen.pause()
        strategy.close()


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

    Returns:
        0, or 3 when some slides could not be read or hold no tissue.
    """
    best = folder / "best.safetensors"
    tensors, _ = load_checkpoint(best)
    screen = Screen(leads=True)
    out.mkdir(parents=True, exist_ok=True)
    store_path = out / "slides.lmdb"
    recipe = PatchStore(settings.data.stores[0]).recipe
    tiling = Tiling.from_recipe(recipe)
    overrides = read_mpp(mpp_override) if mpp_override else {}
    source = SlideFiles(find_slides(slides), tiling, recipe["quality"], overrides)
    packed = pack(source, store_path, workers=workers, progress=_Told(screen))
    task = build.build_task(settings.task)
    strategy = Strategy(pick_device(settings.engine.device))
    model = build.build_model(settings, task, strategy.device, trained=True)
    judged = build.build_schedule(settings.optim, settings.select, 0).judged
    load_weights(model, part(judged, tensors), best)
    store = PatchStore(store_path)
    unknown = torch.tensor(float("nan"))
    items = [
        LabelledSlide(Slide(id=slide, case=slide, split="", target={}), store, unknown)
        for slide in store.slides
    ]
    decoder = build_decoder(settings.data.decoder)
    found = predict_slides(
        model,
        items,
        task=task,
        view=View(decoder, settings.bag.size),
        strategy=strategy,
        screen=screen,
        draw=heatmap_drawer(task, decoder, out / "heatmaps", items),
    )
    write_predictions(found, task, out / "predictions.csv")
    screen.say(f"{len(found)} slides predicted: {out}/predictions.csv, {out}/heatmaps/")
    if packed.problems:
        screen.say(f"{len(packed.problems)} slides could not be predicted, see {packed.quarantine}")
    return PARTLY_DONE if packed.problems else 0


class _Told(Progress):
    """A line for each slide that is cut."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def finished(self, row: Row) -> None:
        """See the base class."""
        self._screen.say(f"{row.slide}: {row.status}, {row.patches} patches {row.reason}".rstrip())


def _load_items(
    settings: Settings, task: Task, folder: Path | None, *, new: bool
) -> list[LabelledSlide]:
    """The cohort; on the rank that has the ``folder``, a ``new`` run's first files are written."""
    items, problems = build.load_cohort(
        settings.data,
        task,
        name=settings.names.get("datasets", ""),
        seed=settings.run.seed,
        problems_file=folder.with_name(f"{folder.name}.problems.csv") if folder else None,
    )
    if folder is not None and new:
        folder.mkdir(parents=True, exist_ok=True)
        build.write_cohort(items, problems, folder / "cohort.csv")
        write_atomically(folder / "settings.yaml", dump_settings(settings).encode())
    return items


def _trainer(
    settings: Settings,
    folder: Path,
    items: list[LabelledSlide],
    task: Task,
    decoder: Decoder,
    model: MILModel,
    strategy: Strategy,
    log: MetricsLog,
    screen: Screen,
) -> Trainer:
    validation = [item for item in items if item.slide.split == "val"]

    def validate() -> dict[str, float | None]:
        found = predict_slides(
            model,
            validation,
            task=task,
            view=View(decoder, settings.bag.size),
            strategy=strategy,
            screen=screen,
        )
        return {name: m["value"] for name, m in score(found, task, draws=0).items()}

    training = [item for item in items if item.slide.split == "train"]
    loader = build.build_loader(settings, training, decoder, model.batch_norm)
    return Trainer(
        model,
        task=task,
        loader=loader,
        strategy=strategy,
        schedule=build.build_schedule(settings.optim, settings.select, settings.run.save_every),
        validate=validate,
        folder=folder,
        log=log,
        screen=screen,
    )


def _evaluate(
    settings: Settings,
    folder: Path,
    out: Path,
    items: list[LabelledSlide],
    task: Task,
    decoder: Decoder,
    model: MILModel,
    strategy: Strategy,
    screen: Screen,
) -> None:
    evaluate_run(
        model,
        folder / "best.safetensors",
        items,
        task=task,
        view=View(decoder, settings.bag.size),
        judged=build.build_schedule(settings.optim, settings.select, 0).judged,
        draws=settings.run.bootstrap,
        heatmaps=settings.run.heatmaps,
        out=out,
        strategy=strategy,
        screen=screen,
    )


def _greet(
    screen: Screen,
    settings: Settings,
    task: Task,
    items: list[LabelledSlide],
    model: MILModel,
    strategy: Strategy,
) -> None:
    """What is about to run, in a few lines."""
    for split in ("train", "val", "test"):
        chosen = [item for item in items if item.slide.split == split]
        patches = sum(item.store.count(item.slide.id) for item in chosen)
        screen.say(
            f"{split:5}  {len(chosen)} slides, {patches:,} patches: "
            f"{task.describe([item.target for item in chosen])}"
        )
    counts = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.encoder, model.head)]
    bag = settings.bag.patches or "all"
    screen.say(
        f"{settings.encoder.name} ({counts[0]:.2f} M) + {settings.head.name} ({counts[1]:.2f} M) on "
        f"{strategy.world_size} x {strategy.device}; {settings.optim.bags} bags an update of {bag} "
        f"patches; BatchNorm {model.batch_norm}, {model.autocast or torch.float32}"
    )
