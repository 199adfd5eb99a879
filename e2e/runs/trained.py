"""A trained run, loaded from its folder."""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pandas as pd

from e2e.errors import UserError
from e2e.features.reader import open_features
from e2e.log import Screen
from e2e.reports.predictions import predicted_cells
from e2e.runs.folder import BEST, load_task, unpack_run
from e2e.runs.parts import REGISTRIES, on_features, selected_weights
from e2e.runs.predict import pack_like_training, predict_items, unlabelled_slides
from e2e.runs.recipes import packing_recipe
from e2e.runs.session import process_settings
from e2e.settings.layers import saved_settings
from e2e.store.lmdb import PatchStore
from e2e.store.open import expand_store_paths, open_store
from e2e.store.records import SlideReader
from e2e.training.checkpoint import load_checkpoint
from e2e.wsi.slide import find_slides

Source = SlideReader | str | Path
"""A store or features, open or as a path; or a slide, or a folder of slides."""


class TrainedRun:
    """A trained run: its settings, its task, and predictions for further slides.

    Parameters
    ----------
    folder : Path
        The run folder, or a model that ``e2e export`` wrote.

    Attributes
    ----------
    folder : Path
        The run folder.
    settings : Settings
        The settings of the run.
    task : Task
        The task as it was fitted to the training slides.

    Raises
    ------
    UserError
        The folder is no run folder, or the run has no selected weights yet.
    """

    def __init__(self, folder: Path) -> None:
        if folder.is_file():
            folder = self._unpacked(folder)
        self.folder = folder
        self.settings = saved_settings(folder, [], REGISTRIES)
        if not (folder / BEST).is_file():
            raise UserError(
                f"{folder} has no {BEST}: the run has not selected an epoch yet\n"
                f"  to continue it: e2e train --resume {folder}"
            )
        selected = selected_weights(self.settings.optim, self.settings.select)
        plugin = self.settings.task
        self.task = load_task(plugin.name, plugin.options, folder).for_weights(selected)

    def predict(
        self, source: Source | list[Source], *, device: str = "auto", workers: int = 1
    ) -> pd.DataFrame:
        """Predict slides with the selected weights of the run.

        Parameters
        ----------
        source : store, features, path, or a list of them
            Open stores (:func:`e2e.open_store`) or features (:func:`e2e.open_features`), or paths of them;
            or slides, or folders of slides, which are cut into patches as the training slides were.
        device : str
            ``cpu``, ``cuda``, or ``auto``: the GPU if there is one.
        workers : int
            Processes that cut slides.

        Returns
        -------
        pandas.DataFrame
            A row for each slide, sorted by ``slide``, with the columns of predictions.csv that a slide
            without a label has: ``predicted`` and its numbers, such as ``prob_tumor``, and
            ``attention_entropy``.

        Raises
        ------
        UserError
            A slide, store or feature cannot be read, or the features are those of another encoder.
        """
        settings = saved_settings(self.folder, [f"engine.device={device}"], REGISTRIES)
        sources = source if isinstance(source, list) else [source]
        weights, _ = load_checkpoint(self.folder / BEST)
        with process_settings(settings), self._opened(sources, workers) as readers:
            items = unlabelled_slides(readers, self.task)
            predictions = predict_items(
                settings, self.folder, weights, items, self.task, Screen(is_leader=False)
            )
        return pd.DataFrame(
            [{"slide": p.slide, **predicted_cells(p, self.task)} for p in predictions]
        )

    def _unpacked(self, file: Path) -> Path:
        """Return a folder with the files of an exported .zip; it is removed with this object."""
        folder = Path(tempfile.mkdtemp(prefix="e2e-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        unpack_run(file, folder)
        return folder

    @contextmanager
    def _opened(self, sources: Sequence[Source], workers: int) -> Iterator[list[SlideReader]]:
        """Open each source; slides are cut into a temporary store."""
        readers: list[SlideReader] = []
        with ExitStack() as stack:
            for source in sources:
                if not isinstance(source, (str, Path)):
                    readers.append(source)
                elif on_features(self.settings):
                    readers += [open_features(path) for path in expand_store_paths(str(source))]
                elif Path(source).suffix in (".lmdb", ".json") or "*" in str(source):
                    readers += [open_store(path) for path in expand_store_paths(str(source))]
                else:
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                    silent = Screen(is_leader=False)
                    recipe = packing_recipe(self.folder, self.settings.data)
                    report = pack_like_training(
                        recipe, find_slides(Path(source)), folder, None, workers, silent
                    )
                    for row in report.problems:
                        warnings.warn(
                            f"slide '{row.slide}' is left out: {row.reason}", stacklevel=2
                        )
                    readers.append(PatchStore(folder / "slides.lmdb"))
            yield readers
