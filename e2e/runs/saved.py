"""Predictions of a finished run, read back from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from e2e.errors import UserError, format_list
from e2e.metrics.values import Array
from e2e.runs.folder import load_task
from e2e.runs.parts import REGISTRIES, selected_weights
from e2e.settings.layers import saved_settings
from e2e.tasks.base import Task


@dataclass(frozen=True)
class SavedPredictions:
    """Predictions for the labelled slides of one split, sorted by slide id."""

    folder: Path
    task: Task
    slides: list[str]
    cases_and_labels: list[tuple[str, ...]]
    """Case and label values of each slide, as in the label table."""
    targets: Array
    """(n, ...) targets as the task encodes them."""
    predicted: Array
    """(n, columns) what the task predicts."""

    @property
    def cases(self) -> list[str]:
        """The case of each slide."""
        return [case for case, *_ in self.cases_and_labels]


def read_predictions(folder: Path, split: str) -> SavedPredictions:
    """Read the predictions of a run, or of an evaluation, for one split.

    Raises
    ------
    UserError
        The folder has no predictions.csv, or one that cannot be read or has no labelled slide of the split.
    """
    settings = saved_settings(folder, [], REGISTRIES)
    selected = selected_weights(settings.optim, settings.select)
    task = load_task(settings.task.name, settings.task.options, folder).for_weights(selected)
    path = folder / "predictions.csv"
    table = _read_table(path, folder)
    outputs, labels = [*task.prediction_columns], [*task.label_columns]
    missing = {"case", "slide", "split", *labels, *outputs} - set(table.columns)
    if missing:
        raise UserError(f"{path} has no column {', '.join(sorted(missing))}")
    labelled = table.loc[(table[labels] != "").any(axis=1)]
    rows = labelled.loc[labelled["split"] == split].sort_values("slide")
    if rows.empty:
        splits = ", ".join(sorted(set(labelled["split"]))) or "none"
        raise UserError(f"{path} has no labelled slide of split '{split}'; it has: {splits}")
    duplicates = sorted(set(rows["slide"][rows["slide"].duplicated()]))
    if duplicates:
        raise UserError(f"{path} has slides twice:\n{format_list(duplicates)}")
    try:
        predicted = rows[outputs].to_numpy(np.float64)
        targets = np.array([task.parse_labels(row) for row in rows[labels].to_numpy()], np.float64)
    except ValueError as error:
        raise UserError(
            f"{path} has a prediction or label that is not a number: {error}"
        ) from error
    return SavedPredictions(
        folder=folder,
        task=task,
        slides=rows["slide"].tolist(),
        cases_and_labels=[tuple(row) for row in rows[["case", *labels]].to_numpy()],
        targets=targets,
        predicted=predicted,
    )


def _read_table(path: Path, folder: Path) -> pd.DataFrame:
    if not path.is_file():
        raise UserError(f"no {path}: the run is not evaluated\n  finish the run, then compare")
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas: an empty file, not a table, another encoding
        raise UserError(
            f"{path} is not a readable table: {error}\n"
            f"  e2e evaluate {folder} --out {folder} writes it again"
        ) from error
