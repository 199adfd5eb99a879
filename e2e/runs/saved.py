"""What a run that is done predicted, read back from its folder."""

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
    """What a run says of the labelled slides of one split, in the order of their ids."""

    folder: Path
    task: Task
    slides: list[str]
    facts: list[tuple[str, ...]]
    """Case and label of each slide, in the table's words."""
    targets: Array
    predicted: Array

    @property
    def cases(self) -> list[str]:
        """The case of each slide."""
        return [case for case, *_ in self.facts]


def read_predictions(folder: Path, split: str) -> SavedPredictions:
    """From a run folder; UserError where it has no such predictions."""
    settings = saved_settings(folder, [], REGISTRIES)
    selected = selected_weights(settings.optim, settings.select)
    task = load_task(settings.task.name, settings.task.options, folder).for_weights(selected)
    path = folder / "predictions.csv"
    if not path.is_file():
        raise UserError(f"no {path}: the run is not evaluated\n  let it end, then compare")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:  # of pandas too: empty, no table, another encoding
        raise UserError(
            f"{path} is no readable table: {error}\n"
            f"  launch/evaluate.py {folder} --out {folder} makes it anew"
        ) from error
    outputs, labels = [*task.prediction_columns], [*task.label_columns]
    if missing := {"case", "slide", "split", *labels, *outputs} - set(table.columns):
        raise UserError(f"{path} has no column {', '.join(sorted(missing))}")
    labelled = table.loc[(table[labels] != "").any(axis=1)]
    ours = labelled.loc[labelled["split"] == split].sort_values("slide")
    if ours.empty:
        there = ", ".join(sorted(set(labelled["split"]))) or "none"
        raise UserError(f"{path} has no labelled slide of split '{split}'; it has: {there}")
    if twice := sorted(set(ours["slide"][ours["slide"].duplicated()])):
        raise UserError(f"{path} has slides twice:\n{format_list(twice)}")
    try:
        predicted = ours[outputs].to_numpy(np.float64)
        targets = np.array([task.parse_labels(row) for row in ours[labels].to_numpy()], np.float64)
    except ValueError as error:
        raise UserError(f"{path} has a prediction or label that is no number: {error}") from error
    facts = [tuple(row) for row in ours[["case", *labels]].to_numpy()]
    return SavedPredictions(folder, task, ours["slide"].tolist(), facts, targets, predicted)
