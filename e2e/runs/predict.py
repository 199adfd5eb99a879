"""Predict slides without labels with a trained run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from e2e.bags.spec import LabelledSlide
from e2e.cohort.features import check_values, describe_features
from e2e.cohort.readers import open_feature_readers
from e2e.errors import PARTLY_DONE, describe_interrupt
from e2e.files import create_folder
from e2e.log import Screen
from e2e.parallel import Strategy, pick_device
from e2e.reports.heatmap import heatmap_writer
from e2e.reports.predictions import Prediction, write_predictions
from e2e.reports.predictions import predict as predict_slides
from e2e.runs.folder import BEST, check_same_features, load_task, open_run, results_folder
from e2e.runs.parts import REGISTRIES, make_parts, on_features, selected_weights
from e2e.runs.recipes import packing_recipe
from e2e.runs.session import process_settings
from e2e.settings.cli import predict_parser, split_overrides
from e2e.settings.layers import saved_settings
from e2e.settings.schema import Settings
from e2e.slides import Slide
from e2e.store.lmdb import OtherPatchesError, PatchStore
from e2e.store.mpp_table import check_overrides, read_mpp
from e2e.store.pack import Progress, Report, Row, pack
from e2e.store.records import SlideReader
from e2e.store.sources import SlideFiles
from e2e.tasks.base import Task
from e2e.training.checkpoint import check_weights, load_checkpoint, select_prefix
from e2e.wsi.slide import describe_unread, find_slides
from e2e.wsi.tiling import Tiling
from e2e.wsi.tissue import METHOD


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e2e predict`` and return its exit code."""
    args = predict_parser().parse(argv)
    slides, overrides = split_overrides(args.slides)
    out = args.out or results_folder(args.run, "predict")
    with (
        describe_interrupt(
            lambda: f"interrupted; patches that were cut stay in {out}; the same command continues"
        ),
        open_run(args.run) as folder,
    ):
        return predict(
            saved_settings(folder, overrides, REGISTRIES),
            folder,
            [Path(word) for word in slides],
            out,
            mpp_override=args.mpp_override,
            workers=args.workers,
        )


def predict(
    settings: Settings,
    folder: Path,
    slides: Sequence[Path],
    out: Path,
    *,
    mpp_override: Path | None,
    workers: int,
) -> int:
    """Predict slides and draw a heatmap of each.

    Slides are cut with the tiling of the run's training slides.

    Parameters
    ----------
    slides
        Slide files, folders of them, or patterns; for a two-stage run, files or folders of features.

    Returns
    -------
        0, or 3 when some slides could not be read or hold no tissue.

    Raises
    ------
    UserError
        The features come from another encoder, or cannot be used.
    """
    with process_settings(settings):
        return _predict(settings, folder, slides, out, mpp_override=mpp_override, workers=workers)


def _predict(
    settings: Settings,
    folder: Path,
    slides: Sequence[Path],
    out: Path,
    *,
    mpp_override: Path | None,
    workers: int,
) -> int:
    weights, _ = load_checkpoint(folder / BEST)
    screen = Screen(is_leader=True, timestamps=True)
    create_folder(out)
    selected = selected_weights(settings.optim, settings.select)
    task = load_task(settings.task.name, settings.task.options, folder).for_weights(selected)
    packed = None
    if on_features(settings):
        items = unlabelled_slides(open_feature_readers([str(path) for path in slides]), task)
    else:
        for line in describe_unread(*slides):
            screen.say(line)
        paths = find_slides(*slides)
        recipe = packing_recipe(folder, settings.data)
        packed = pack_like_training(recipe, paths, out, mpp_override, workers, screen)
        items = unlabelled_slides([PatchStore(out / "slides.lmdb")], task)
        requested = {path.stem for path in paths}
        items = [item for item in items if item.slide.id in requested]
    predictions = predict_items(
        settings, folder, weights, items, task, screen, heatmaps=out / "heatmaps"
    )
    write_predictions(predictions, task, out / "predictions.csv")
    screen.say(f"{len(predictions)} slides predicted: {out}/predictions.csv, {out}/heatmaps/")
    if packed and packed.problems:
        screen.say(f"{len(packed.problems)} slides could not be predicted, see {packed.quarantine}")
        return PARTLY_DONE
    return 0


def predict_items(
    settings: Settings,
    folder: Path,
    weights: Mapping[str, Tensor],
    items: Sequence[LabelledSlide],
    task: Task,
    screen: Screen,
    *,
    heatmaps: Path | None = None,
) -> list[Prediction]:
    """Predict slides with the selected weights of a run.

    Parameters
    ----------
    settings : Settings
        Those of the run.
    folder : Path
        The run folder.
    weights : mapping
        The tensors of the selected epoch's checkpoint, as :func:`load_checkpoint` returns them.
    items : sequence of LabelledSlide
        The slides, with their patches or features.
    task : Task
        The task as fitted to the run's training slides.
    screen : Screen
        Where progress is shown.
    heatmaps : Path, optional
        Folder in which to draw a heatmap of each slide with coordinates.

    Raises
    ------
    UserError
        The features come from another encoder than the run's, or cannot be used.
    """
    features = check_features_of_run(settings, folder, items, screen)
    strategy = Strategy(pick_device(settings.engine.device))
    parts = make_parts(
        settings, task, list(items), strategy.device, trained=True, problems=[], features=features
    )
    selected = select_prefix(selected_weights(settings.optim, settings.select), weights)
    strategy.setup(parts.model, None, clip=None)
    check_weights(strategy.shapes, selected, folder / BEST)
    strategy.load(selected)
    on_slide = None
    if heatmaps is not None:
        with_coords = [item for item in items if item.record.coords is not None]
        on_slide = heatmap_writer(task, parts.view.reader, heatmaps, with_coords, screen)
    return predict_slides(
        parts.model,
        items,
        task=task,
        view=parts.view,
        strategy=strategy,
        screen=screen,
        on_slide=on_slide,
    )


def check_features_of_run(
    settings: Settings, folder: Path, items: Sequence[LabelledSlide], screen: Screen
) -> dict[str, Any] | None:
    """Return what the features of the slides are; None for a run on patches.

    Raises
    ------
    UserError
        They come from another encoder than the run's, or cannot be used.
    """
    if not on_features(settings):
        return None
    features = describe_features(items)
    check_same_features(features, folder)
    check_values(items, screen)
    return features


def pack_like_training(
    recipe: Mapping[str, Any],
    paths: Sequence[Path],
    out: Path,
    mpp_override: Path | None,
    workers: int,
    screen: Screen,
) -> Report:
    """Pack slides into ``out/slides.lmdb`` by the recipe of a run's training slides."""
    mpp_by_slide = read_mpp(mpp_override) if mpp_override else {}
    tiling = Tiling.from_recipe(recipe)
    method = recipe.get("tissue_method", METHOD)
    if method != METHOD:
        screen.say(
            f"warning: the training slides were cut by {method}, an earlier way of finding tissue; new ones"
            f" are cut by {METHOD}, which differs on tinted glass"
        )
    check_overrides(mpp_by_slide, paths)
    source = SlideFiles(paths, tiling, recipe["quality"], mpp_by_slide)
    store = out / "slides.lmdb"
    progress = _PackProgress(screen)
    try:
        return pack(source, store, workers=workers, progress=progress)
    except OtherPatchesError as error:  # of an earlier prediction; the store only saves time
        screen.say(f"cutting all slides again: {str(error).splitlines()[0]}")
        for file in (store, Path(f"{store}-lock")):
            file.unlink(missing_ok=True)
        return pack(source, store, workers=workers, progress=progress)


def unlabelled_slides(readers: Sequence[SlideReader], task: Task) -> list[LabelledSlide]:
    """Return every slide of stores or features, each its own case, without a label."""
    unknown = task.encode(dict.fromkeys(task.columns, ""))
    return [
        LabelledSlide(Slide(id=slide, case=slide, split="", target={}), reader, unknown)
        for reader in readers
        for slide in reader.slides
    ]


class _PackProgress(Progress):
    """Prints one line for each packed slide."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def finished(self, row: Row) -> None:
        """See the base class."""
        self._screen.say(f"{row.slide}: {row.status}, {row.patches} patches {row.reason}".rstrip())
