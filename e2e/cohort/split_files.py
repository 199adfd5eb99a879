"""Splits as people publish them: read into folds, written in CLAM's form and in ours.

Read, a fold is ``{slide or case id: split}``, the split empty where the file says that the id is not
used. A format is one small function in :data:`SPLIT_FORMATS`. It looks at what a file holds and
says which id is in which split of which fold, or None where the file is none of its own.

Ours is the label table itself with a column ``fold_<k>`` for each fold, train, val, test or empty:
one file to train on (``data.split_file=splits.csv data.fold=3``), labels once, folds side by side.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from e2e.cohort.splits import SPLITS
from e2e.cohort.table import slide_ids
from e2e.errors import UserError, format_list
from e2e.files import read_text
from e2e.registry import Registry

Folds = dict[str, dict[str, str]]

WORDS = {
    **{"train": "train", "val": "val", "test": "test", "": ""},
    **{"training": "train", "validation": "val", "testing": "test"},
}
"""A file's words, in small letters, for our splits."""

SLIDE_IDS = ("slide_id", "slide")
CASE_IDS = ("case_id", "case", "ID", "patient", "PATIENT")
FOLD_COLUMN = re.compile(r"fold_\d+")
FOLD_FILE = re.compile(r"(?:splits?|folds?)_(\d+)(?:_bool)?\.(?:csv|tsv|json)")


@dataclass(frozen=True)
class Cells:
    """A table, every cell a string without blanks at its ends; short rows are filled up."""

    columns: list[str]
    rows: list[dict[str, str]]


def read_cells(path: Path) -> Cells:
    """A .csv, or a .tsv or .tab, in UTF-8 with or without a byte order mark.

    Raises:
        UserError: no such file, another encoding, a row longer than the header, a column twice.
    """
    delimiter = "\t" if path.suffix in {".tsv", ".tab"} else ","
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    columns = [name.strip() for name in next(reader, [])]
    twice = [name for name, times in Counter(columns).items() if times > 1]
    if twice:
        raise UserError(f"{path} has the column(s) {', '.join(twice)} more than once")
    rows = []
    for cells in reader:
        if any(cells[len(columns) :]):
            raise UserError(
                f"{path} line {reader.line_num}: {len(cells)} cells under {len(columns)} columns\n"
                "  put quotes around a value that holds the separator"
            )
        cells += [""] * (len(columns) - len(cells))
        if any(cells):
            rows.append({c: cell.strip() for c, cell in zip(columns, cells, strict=False)})
    return Cells(columns, rows)


@dataclass(frozen=True)
class SplitFile:
    """A file to be recognised; what it holds is read once."""

    path: Path
    slide_column: str | None = None
    case_column: str | None = None
    """Names that come before the usual ones, where a format leaves the column of the ids open."""

    @property
    def fold(self) -> str:
        """The number in the file's name, else 0."""
        number = FOLD_FILE.fullmatch(self.path.name)
        return number[1] if number else "0"

    @cached_property
    def cells(self) -> Cells:
        """Of a table; nothing of a JSON file."""
        return Cells([], []) if self.path.suffix == ".json" else read_cells(self.path)

    @cached_property
    def json(self) -> dict[str, Any]:
        """Of a JSON file; nothing of a table."""
        if self.path.suffix != ".json":
            return {}
        try:
            found = json.loads(read_text(self.path))
        except ValueError as error:
            raise UserError(f"{self.path} is no JSON: {error}") from error
        return found if isinstance(found, dict) else {}

    def ids(self) -> str:
        """The column of the slide ids, or where there is none, of the case ids."""
        own = (self.slide_column, *SLIDE_IDS, self.case_column, *CASE_IDS)
        known = list(dict.fromkeys(name for name in own if name))
        for name in known:
            if name in self.cells.columns:
                return name
        raise UserError(
            f"{self.path} has no column {' or '.join(known)}\n"
            f"  it has: {', '.join(self.cells.columns)}\n  name the one that holds the ids"
        )


Entries = Iterable[tuple[str, str, str]]
"""Fold, id (or several in a cell), and the word for its split."""

SPLIT_FORMATS: Registry[Entries | None] = Registry("split format")
"""Name -> function: :class:`SplitFile` -> :data:`Entries`, or None where it is another format's."""


@SPLIT_FORMATS.register("clam")
def clam(file: SplitFile) -> Entries | None:
    """CLAM's splits_0.csv: train,val,test, each column a list of slide ids."""
    columns = _split_columns(file.cells)
    if not columns or _is_bool(file.cells):
        return None
    return [(file.fold, row[s], s) for row in file.cells.rows for s in columns if row[s]]


@SPLIT_FORMATS.register("clam_bool")
def clam_bool(file: SplitFile) -> Entries | None:
    """CLAM's splits_0_bool.csv: ids in the first column; train,val,test True or False."""
    columns = _split_columns(file.cells)
    if not columns or not _is_bool(file.cells):
        return None
    ids = file.cells.columns[0]
    entries = []
    for row in file.cells.rows:
        true = [split for split in columns if row[split] == "True"]
        entries += [(file.fold, row[ids], split) for split in true or [""]]
    return entries


@SPLIT_FORMATS.register("fold_columns")
def fold_columns(file: SplitFile) -> Entries | None:
    """Patho-Bench's table, and ours: slide_id or case_id, fold_0,fold_1,... of train or test."""
    folds = [name for name in file.cells.columns if FOLD_COLUMN.fullmatch(name)]
    if not folds:
        return None
    ids = file.ids()
    return [(f.removeprefix("fold_"), row[ids], row[f]) for f in folds for row in file.cells.rows]


@SPLIT_FORMATS.register("split_column")
def split_column(file: SplitFile) -> Entries | None:
    """ABMILX's tables: case,slide,label,fold, and of survival fold_0.csv: ID,...,Split."""
    columns = [name for name in file.cells.columns if name.lower() in ("fold", "split")]
    if len(columns) != 1 or any(FOLD_COLUMN.fullmatch(name) for name in file.cells.columns):
        return None
    ids = file.ids()
    return [(file.fold, row[ids], row[columns[0]]) for row in file.cells.rows]


@SPLIT_FORMATS.register("name_lists")
def name_lists(file: SplitFile) -> Entries | None:
    """AEM's split_0.json: train_names, val_names, test_names."""
    return _lists(file, file.json, "_names", file.fold)


@SPLIT_FORMATS.register("stamp")
def stamp(file: SplitFile) -> Entries | None:
    """STAMP's splits.json: splits, each of train_patients and test_patients."""
    splits = file.json.get("splits")
    if not isinstance(splits, list):
        return None
    folds = [_lists(file, fold, "_patients", str(k)) or [] for k, fold in enumerate(splits)]
    return [entry for fold in folds for entry in fold]


def _split_columns(cells: Cells) -> list[str]:
    """train, val, test, as far as the table has them and besides its first column nothing else."""
    found = [name for name in cells.columns if name in SPLITS]
    rest = set(cells.columns[1:]) - set(SPLITS)
    return found if len(found) > 1 and "train" in found and not rest else []


def _is_bool(cells: Cells) -> bool:
    values = {row[split] for row in cells.rows for split in _split_columns(cells)}
    return bool(values) and values <= {"True", "False"}


def _lists(file: SplitFile, found: Any, ending: str, fold: str) -> Entries | None:
    if not isinstance(found, dict) or f"train{ending}" not in found:
        return None
    entries = []
    for split in SPLITS:
        names = found.get(f"{split}{ending}", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{file.path}: {split}{ending} is no list of strings")
        entries += [(fold, name, split) for name in names]
    return entries


def read_splits(
    path: Path,
    slide_column: str | None = None,
    case_column: str | None = None,
    *,
    slide_suffix: str = "",
    slide_separator: str | None = None,
) -> Folds:
    """The folds of a file, or of a folder of ``splits_<k>.csv``, ``fold_<k>.csv``, ``split_<k>.json``.

    Args:
        slide_column, case_column: of the ids in a table with a column of splits, if they have no usual
            name; a column of slides comes before one of cases.
        slide_suffix, slide_separator: of what the file names, as :func:`read_table` has them.

    Returns:
        Fold -> id -> train, val, test, or empty; folds in the order of their numbers.

    Raises:
        UserError: nothing there, no known format, an id in two splits of a fold, an unknown word.
    """
    found: Folds = {}
    for file in _files(path):
        entries = _entries(SplitFile(file, slide_column, case_column))
        for fold, splits in _checked(file, entries, slide_suffix, slide_separator).items():
            known = found.setdefault(fold, splits)
            strange = known.items() ^ splits.items()
            apart = sorted({name for name, split in strange if split})
            if apart:
                raise UserError(
                    f"{file} says other than another file of fold {fold}\n{format_list(apart)}"
                )
            known |= splits
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def names_cases(
    path: Path, slide_column: str | None = None, case_column: str | None = None
) -> bool:
    """Whether what :func:`read_splits` reads is a table whose ids are in a column of cases."""
    columns = SplitFile(_files(path)[0]).cells.columns
    return not {slide_column, *SLIDE_IDS} & {*columns} and bool(
        {case_column, *CASE_IDS} & {*columns}
    )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if FOLD_FILE.fullmatch(file.name))
    if not files:
        raise UserError(f"{path} has no splits_0.csv, fold_0.csv or split_0.json\n  name a file")
    return files


def pick_fold(folds: Folds, fold: str | None, path: Path) -> str:
    """The number of a fold asked for as ``3`` or ``fold_3``, or not at all where there is one alone.

    Raises:
        UserError: no such fold, or none asked for and several there; names those that are.
    """
    if fold is None and len(folds) == 1:
        return next(iter(folds))
    number = (fold or "").removeprefix("fold_")
    if number not in folds:
        what = f"{len(folds)} folds" if fold is None else f"no fold '{fold}'"
        raise UserError(
            f"{path} has {what}\n  it has: {', '.join(folds)}\n  set data.fold to one of them"
        )
    return number


def _entries(file: SplitFile) -> Entries:
    looks = (SPLIT_FORMATS.build(name, file) for name in SPLIT_FORMATS.names())
    entries = next((found for found in looks if found is not None), None)
    if entries is None:
        shapes = [str(SPLIT_FORMATS.factory(name).__doc__) for name in SPLIT_FORMATS.names()]
        has = file.cells.columns or list(file.json)
        raise UserError(
            f"{file.path} holds splits in no known format\n  it has: {', '.join(has) or 'nothing'}"
            f"\n  known:\n{format_list(shapes)}"
        )
    return entries


def _checked(path: Path, entries: Entries, suffix: str, separator: str | None) -> Folds:
    found: Folds = {}
    torn: set[str] = set()
    strange: set[str] = set()
    for fold, cell, word in entries:
        split = WORDS.get(word.lower())
        names = [name for name in slide_ids(cell, suffix, separator) if name]
        if split is None or not names:
            strange.add(f"'{word}' of '{cell}'")
            continue
        for name in names:
            known = found.setdefault(fold, {}).setdefault(name, split)
            if known != split:
                torn.add(f"fold {fold}: '{name}' is in {known or 'none'} and {split or 'none'}")
    if torn:
        raise UserError(
            f"{path} has {len(torn)} id(s) in two splits of a fold: the test would not be honest\n"
            + format_list(sorted(torn))
        )
    if strange:
        raise UserError(
            f"{path} has {len(strange)} id(s) or split(s) that cannot be read; splits are train, "
            f"val, test or empty\n{format_list(sorted(strange))}"
        )
    if not any(split for fold in found.values() for split in fold.values()):
        raise UserError(f"{path} has no id in train, val or test")
    return found


def clam_files(fold: str, splits: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, bytes]:
    """CLAM's three files of a fold: name -> content.

    Args:
        splits: slide -> train, val, test, or empty where it is not used.
        labels: slide -> its class, for the descriptor's counts; empty where it is not known.
    """
    lists = [[name for name, split in splits.items() if split == own] for own in SPLITS]
    ragged = [
        [str(i), *(own[i] if i < len(own) else "" for own in lists)]
        for i in range(max(map(len, lists)))
    ]
    flags = [[name, *(str(split == own) for own in SPLITS)] for name, split in splits.items()]
    counts = Counter((labels[name], split) for name, split in splits.items())
    classes = sorted({labels[name] for name in splits} - {""})
    table = [[label, *(str(counts[label, own]) for own in SPLITS)] for label in classes]
    header = ["", *SPLITS]
    return {
        f"splits_{fold}.csv": to_csv(header, ragged),
        f"splits_{fold}_bool.csv": to_csv(header, flags),
        f"splits_{fold}_descriptor.csv": to_csv(header, table),
    }


def fold_table(table: Cells, id_column: str, folds: Mapping[str, Mapping[str, str]]) -> bytes:
    """Our form: ``table`` with a column ``fold_<k>`` for each fold.

    Args:
        id_column: the column of ``table`` whose words are the ids in ``folds``.

    Raises:
        UserError: the table has such columns already.
    """
    names = [f"fold_{fold}" for fold in folds]
    taken = [name for name in names if name in table.columns]
    if taken:
        raise UserError(
            f"the label table has the column(s) {', '.join(taken)} already\n"
            "  take them out, or use them as they are: data.split_file=THE_TABLE data.fold=0"
        )
    rows = [
        [*row.values(), *(splits[row[id_column]] for splits in folds.values())]
        for row in table.rows
    ]
    return to_csv([*table.columns, *names], rows)


def to_csv(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> bytes:
    """UTF-8, a comma between cells, a line feed at each line's end."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue().encode()
