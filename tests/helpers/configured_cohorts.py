"""Small tables in the columns of the cohorts in configs/datasets."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from e2e.runs.parts import REGISTRIES
from e2e.settings.layers import load_settings
from e2e.settings.schema import Settings

SLIDES = 24


def load(datasets: str, *overrides: str, model: str = "e2e_r18_abmil") -> Settings:
    return load_settings(
        datasets=datasets, model=model, files=[], overrides=overrides, registries=REGISTRIES
    )


def words(settings: Settings, k: int) -> dict[str, str]:
    """Targets of the k-th slide, in the words of its cohort's table; every other time is a death."""
    options = settings.task.options
    if "classes" in options:
        return {options["column"]: options["classes"][k % len(options["classes"])]}
    event = options["event"] if k % 2 else str(1 - int(options["event"]))
    return {options["event_column"]: event, options["time_column"]: f"{1 + 7.3 * k % 24:.2f}"}


def small_table(settings: Settings, path: Path) -> list[str]:
    """Write a table of 24 slides in the cohort's own columns; the slides' ids in the stores."""
    data = settings.data
    word = {split: own for own, split in data.splits.items()}
    if data.cut.val:
        word["val"] = word["train"]
    parts = ["train", "train", "val", "test"]
    rows = []
    for k in range(SLIDES):
        row = {data.columns.slide: f"TCGA-{k:02d}{data.slide_suffix}", **words(settings, k)}
        if data.columns.case:
            row[data.columns.case] = f"case {k}"
        if data.columns.split:
            row[data.columns.split] = word[parts[k // 2 % 4]]
        rows.append(row)
    pd.DataFrame(rows).to_csv(path, index=False)
    return [f"TCGA-{k:02d}" for k in range(SLIDES)]


def small_cohort(settings: Settings, folder: Path) -> tuple[list[str], list[str]]:
    """A table as the cohort has it; overrides that name it, and the slides' ids."""
    slides = small_table(settings, folder / "fold_0.csv")
    overrides = [f"data.labels={folder}/fold_0.csv"]
    if settings.data.split_file:
        overrides.append(f"data.split_file={folder}")
    shares = {"val": settings.data.cut.val, "test": settings.data.cut.test}
    return [*overrides, *(f"data.cut.{k}=0.25" for k, share in shares.items() if share)], slides
