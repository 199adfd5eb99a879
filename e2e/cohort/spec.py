"""What is needed to load a cohort: its files, columns, splits and rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from e2e.cohort.ids import NO_RULES, IdRules


@dataclass(frozen=True, kw_only=True)
class CohortSpec:
    """Where a cohort's label table, splits and data are, and how they are read.

    Settings of a run are turned into one by :func:`e2e.runs.cohort.cohort_spec`.
    """

    name: str = ""
    """Name of the cohort, for messages."""
    labels: str = ""
    """Label table, .csv or .tsv."""
    slide_column: str = "slide"
    """Column of the slide ids."""
    case_column: str | None = "case"
    """Column of the case (patient) ids; None if each row is a case."""
    split_column: str | None = None
    """Column of the splits; None if the table has none. Ignored if there is a split file."""
    centre_column: str | None = None
    """Column of the centres; None if the table has none."""
    split_names: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train", "val": "val", "test": "test"}
    )
    """The table's name of a split -> train, val or test."""
    rules: IdRules = NO_RULES
    """How the ids in tables are read and compared with those of the data."""
    split_file: str | None = None
    """File or folder of published splits; see :mod:`e2e.cohort.split_files`."""
    fold: str | None = None
    """Fold of the split file; None if it has only one."""
    val_share: float = 0.0
    """Share of the training cases cut off for validation, if there is no validation split."""
    test_share: float = 0.0
    """Share of the training cases cut off for the test, if there is no test split."""
    stores: tuple[str, ...] = ()
    """Patch stores: files, globs or the index of a packing run."""
    scales: tuple[tuple[str, ...], ...] = ()
    """Patch stores of each further magnification."""
    features: tuple[str, ...] = ()
    """Frozen features: folders, files or globs."""
    coords: str | None = None
    """Folder of .h5 coordinates, for patch stores that hold none."""
    verify: bool = True
    """Compare each patch with its checksum when it is read for the first time."""
    unit: Literal["slide", "case"] = "slide"
    """What a bag holds: a slide, or all slides of a case."""
    unmatched: Literal["error", "drop"] = "error"
    """What happens to unusable rows and slides: raise an error, or leave them out and list them."""
    source: str = ""
    """Where slides and labels can be obtained, for messages."""
    pack_options: str = ""
    """Options of the packing command for this cohort, for messages."""

    @property
    def columns(self) -> dict[str, str | None]:
        """Role -> column of the label table, for :func:`e2e.cohort.table.read_table`."""
        return {
            "slide": self.slide_column,
            "case": self.case_column,
            "split": None if self.split_file else self.split_column,
            "centre": self.centre_column,
        }

    @property
    def tables(self) -> str:
        """The label table, and the split file if there is one, for messages."""
        return f"{self.labels}, {self.split_file}" if self.split_file else self.labels
