"""Read published splits into folds, and write folds as CLAM does or as columns of the label table.

A fold read from a file is ``{slide or case id: split}``; the split is empty where the file says that
the id is not used. Each format is one small function in :data:`SPLIT_FORMATS`: it recognises a file
by its columns or keys and returns which id is in which split of which fold.

The project's own format is the label table itself with a column ``fold_<k>`` (train, val, test or
empty) for each fold: one file to train on (``data.split_file=splits.csv data.fold=3``).
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

from e2e.cohort.cells import limited_cells, read_table_text
from e2e.cohort.ids import NO_RULES, IdRules, normalise_id
from e2e.cohort.splits import SPLITS
from e2e.errors import UserError, format_list
from e2e.files import read_text
from e2e.registry import Registry
from e2e.slides import show_id

Folds = dict[str, dict[str, str]]

SPLIT_WORDS = {
    **{"train": "train", "val": "val", "test": "test", "": ""},
    **{"training": "train", "validation": "val", "testing": "test"},
}
"""Name of a split in a file, in lower case -> train, val, test or empty."""

SLIDE_COLUMNS = ("slide_id", "slide")
CASE_COLUMNS = ("case_id", "case", "ID", "patient", "PATIENT")
FOLD_COLUMN = re.compile(r"fold_\d+")
FOLD_FILE = re.compile(r"(?:splits?|folds?)_(\d+)(?:_bool)?\.(?:csv|tsv|json)")


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are text without surrounding blanks; short rows are filled up."""

    columns: list[str]
    """Names of the columns, from the header."""
    rows: list[dict[str, str]]
    """Column -> cell, for each row that is not empty."""


def read_text_table(path: Path) -> TextTable:
    """Read a .csv, .tsv or .tab file in UTF-8, with or without a byte order mark.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    TextTable
        Its cells as text.

    Raises
    ------
    UserError
        The file does not exist or is not UTF-8, a row is longer than the header, or two columns
        have the same name.
    """
    text, delimiter = read_table_text(path)
    reader = csv.reader(io.StringIO(text.lstrip("\r\n"), newline=""), delimiter=delimiter)
    try:
        with limited_cells():
            return _parse_cells(path, reader)
    except csv.Error as error:
        raise UserError(
            f"{path} line {reader.line_num} is not a readable row: {error}\n"
            "  save the table as .csv in UTF-8"
        ) from error


def _parse_cells(path: Path, reader: Any) -> TextTable:
    columns = [name.strip() for name in next(reader, [])]
    repeated = [name for name, count in Counter(columns).items() if count > 1]
    if repeated:
        raise UserError(
            f"{path} has the column(s) {', '.join(repeated)} more than once\n"
            "  remove or rename all but one"
        )
    rows = []
    for cells in reader:
        if any(cells[len(columns) :]):
            raise UserError(
                f"{path} line {reader.line_num}: {len(cells)} cells under {len(columns)} columns\n"
                "  put quotes around a value that contains the separator"
            )
        cells += [""] * (len(columns) - len(cells))
        if any(cells):
            rows.append({c: cell.strip() for c, cell in zip(columns, cells, strict=False)})
    return TextTable(columns, rows)


@dataclass(frozen=True)
class SplitFile:
    """A file of splits whose format is to be recognised; it is read once."""

    path: Path
    """The file."""
    slide_column: str | None = None
    """Name of the column of slide ids, tried before the usual names."""
    case_column: str | None = None
    """Name of the column of case ids, tried before the usual names."""

    @property
    def fold(self) -> str:
        """The number in the file's name, or 0."""
        number = FOLD_FILE.fullmatch(self.path.name)
        return number[1] if number else "0"

    @cached_property
    def table(self) -> TextTable:
        """The cells of a table; empty for a JSON file."""
        return TextTable([], []) if self.path.suffix == ".json" else read_text_table(self.path)

    @cached_property
    def json(self) -> dict[str, Any]:
        """The object in a JSON file; empty for a table."""
        if self.path.suffix != ".json":
            return {}
        try:
            content = json.loads(read_text(self.path))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.path} is not valid JSON: {error}\n  save or download the file again"
            ) from error
        return content if isinstance(content, dict) else {}

    def id_column(self) -> str:
        """Return the column of the slide ids or, if there is none, of the case ids.

        Raises
        ------
        UserError
            The table has neither.
        """
        candidates = (self.slide_column, *SLIDE_COLUMNS, self.case_column, *CASE_COLUMNS)
        names = list(dict.fromkeys(name for name in candidates if name))
        for name in names:
            if name in self.table.columns:
                return name
        raise UserError(
            f"{self.path} has no column {' or '.join(names)}\n"
            f"  it has: {', '.join(self.table.columns)}\n"
            "  set data.columns.slide or data.columns.case to the column of the ids"
        )


Entries = Iterable[tuple[str, str, str]]
"""Fold, cell with one or several ids, and the file's name of the split."""

SPLIT_FORMATS: Registry[Entries | None] = Registry("split format")
"""Name -> function: :class:`SplitFile` -> :data:`Entries`, or None if the file has another format."""


@SPLIT_FORMATS.register("clam")
def clam(file: SplitFile) -> Entries | None:
    """CLAM's splits_0.csv: train,val,test, each column a list of slide ids."""
    columns = _split_columns(file.table)
    if not columns or _has_bool_cells(file.table):
        return None
    return [(file.fold, row[s], s) for row in file.table.rows for s in columns if row[s]]


@SPLIT_FORMATS.register("clam_bool")
def clam_bool(file: SplitFile) -> Entries | None:
    """CLAM's splits_0_bool.csv: ids in the first column; train,val,test True or False."""
    columns = _split_columns(file.table)
    if not columns or not _has_bool_cells(file.table):
        return None
    ids = file.table.columns[0]
    entries = []
    for row in file.table.rows:
        true = [split for split in columns if row[split] == "True"]
        entries += [(file.fold, row[ids], split) for split in true or [""]]
    return entries


@SPLIT_FORMATS.register("fold_columns")
def fold_columns(file: SplitFile) -> Entries | None:
    """Patho-Bench's table, and this project's: slide_id or case_id, fold_0,fold_1,... of train or test."""
    folds = [name for name in file.table.columns if FOLD_COLUMN.fullmatch(name)]
    if not folds:
        return None
    ids = file.id_column()
    return [(f.removeprefix("fold_"), row[ids], row[f]) for f in folds for row in file.table.rows]


@SPLIT_FORMATS.register("split_column")
def split_column(file: SplitFile) -> Entries | None:
    """ABMILX's tables: case,slide,label,fold, and for survival fold_0.csv: ID,...,Split."""
    columns = [name for name in file.table.columns if name.lower() in ("fold", "split")]
    if len(columns) != 1 or any(FOLD_COLUMN.fullmatch(name) for name in file.table.columns):
        return None
    ids = file.id_column()
    return [(file.fold, row[ids], row[columns[0]]) for row in file.table.rows]


@SPLIT_FORMATS.register("name_lists")
def name_lists(file: SplitFile) -> Entries | None:
    """AEM's split_0.json: train_names, val_names, test_names."""
    return _read_lists(file, file.json, "_names", file.fold)


@SPLIT_FORMATS.register("stamp")
def stamp(file: SplitFile) -> Entries | None:
    """STAMP's splits.json: splits, each of train_patients and test_patients."""
    splits = file.json.get("splits")
    if not isinstance(splits, list):
        return None
    folds = [_read_lists(file, fold, "_patients", str(k)) or [] for k, fold in enumerate(splits)]
    return [entry for fold in folds for entry in fold]


def _split_columns(table: TextTable) -> list[str]:
    """Return the columns train, val, test, if the table has nothing else after its first column."""
    splits = [name for name in table.columns if name in SPLITS]
    rest = set(table.columns[1:]) - set(SPLITS)
    return splits if len(splits) > 1 and "train" in splits and not rest else []


def _has_bool_cells(table: TextTable) -> bool:
    values = {row[split] for row in table.rows for split in _split_columns(table)}
    return bool(values) and values <= {"True", "False"}


def _read_lists(file: SplitFile, content: Any, ending: str, fold: str) -> Entries | None:
    """Return the ids under train<ending>, val<ending>, test<ending>; None if there is no such key."""
    if not isinstance(content, dict) or f"train{ending}" not in content:
        return None
    entries = []
    for split in SPLITS:
        names = content.get(f"{split}{ending}", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"{file.path}: {split}{ending} is not a list of strings\n"
                "  write each id as text in quotes"
            )
        entries += [(fold, name, split) for name in names]
    return entries


def read_splits(
    path: Path,
    slide_column: str | None = None,
    case_column: str | None = None,
    *,
    rules: IdRules = NO_RULES,
) -> Folds:
    """Read the folds of a file, or of a folder.

    Parameters
    ----------
    path
        A file in one of :data:`SPLIT_FORMATS`, or a folder of ``splits_<k>.csv``,
        ``fold_<k>.csv`` or ``split_<k>.json``.
    slide_column, case_column
        Columns of the ids in a table, if they have no usual name. A column of slides is used rather
        than one of cases.
    rules
        How the file writes slide ids.

    Returns
    -------
    dict
        Fold -> id -> train, val, test, or empty; folds in the order of their numbers.

    Raises
    ------
    UserError
        Nothing is there, the format is unknown, an id is in two splits of a fold, or a split has an
        unknown name.
    """
    folds: Folds = {}
    for file in _list_split_files(path):
        entries = _parse_split_file(SplitFile(file, slide_column, case_column))
        for fold, splits in _collect_folds(file, entries, rules).items():
            earlier = folds.setdefault(fold, splits)
            conflicts = sorted({name for name, split in earlier.items() ^ splits.items() if split})
            if conflicts:
                raise UserError(
                    f"{file} contradicts another file of fold {fold} in {len(conflicts)} id(s)\n"
                    f"{format_list(conflicts)}\n  keep one of the files in the folder"
                )
            earlier |= splits
    return dict(sorted(folds.items(), key=lambda item: int(item[0])))


def ids_are_cases(
    path: Path, slide_column: str | None = None, case_column: str | None = None
) -> bool:
    """Return whether the ids that :func:`read_splits` reads come from a column of cases.

    Parameters
    ----------
    path, slide_column, case_column
        As for :func:`read_splits`.

    Returns
    -------
    bool
        True if the file is a table with a column of cases and none of slides.
    """
    columns = SplitFile(_list_split_files(path)[0]).table.columns
    return not {slide_column, *SLIDE_COLUMNS} & {*columns} and bool(
        {case_column, *CASE_COLUMNS} & {*columns}
    )


def _list_split_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if FOLD_FILE.fullmatch(file.name))
    if not files:
        raise UserError(
            f"the folder {path} has no splits_0.csv, fold_0.csv or split_0.json\n"
            "  name the file of the splits, or a folder of such files"
        )
    return files


def pick_fold(folds: Folds, fold: str | None, path: Path) -> str:
    """Return the number of the fold to use.

    Parameters
    ----------
    folds
        All folds of the file.
    fold
        ``3`` or ``fold_3``; None if there is only one.
    path
        The file, for messages.

    Returns
    -------
    str
        The key of the fold in ``folds``.

    Raises
    ------
    UserError
        There is no such fold, or there are several and none is named.
    """
    if fold is None and len(folds) == 1:
        return next(iter(folds))
    number = (fold or "").removeprefix("fold_")
    if number not in folds:
        problem = f"{len(folds)} folds" if fold is None else f"no fold '{fold}'"
        raise UserError(
            f"{path} has {problem}\n  it has: {', '.join(folds)}\n  set data.fold to one of them"
        )
    return number


def _parse_split_file(file: SplitFile) -> Entries:
    """Return the entries of the first format that recognises the file."""
    for name in SPLIT_FORMATS.names():
        entries = SPLIT_FORMATS.build(name, file)
        if entries is not None:
            return entries
    formats = [str(SPLIT_FORMATS.factory(name).__doc__) for name in SPLIT_FORMATS.names()]
    columns = file.table.columns or list(file.json)
    raise UserError(
        f"{file.path} has splits in an unknown format\n  it has: {', '.join(columns) or 'nothing'}"
        f"\n  known formats:\n{format_list(formats)}"
    )


def _collect_folds(path: Path, entries: Entries, rules: IdRules) -> Folds:
    """Return fold -> id -> split; UserError for an id in two splits or an unknown split."""
    folds: Folds = {}
    conflicts: set[str] = set()
    unreadable: set[str] = set()
    for fold, cell, word in entries:
        split = SPLIT_WORDS.get(word.lower())
        names = [name for name in rules.parse(cell) if name]
        if split is None or not names:
            unreadable.add(f"'{show_id(word)}' of '{show_id(cell)}'")
            continue
        for name in names:
            first = folds.setdefault(fold, {}).setdefault(name, split)
            if first != split:
                conflicts.add(
                    f"fold {fold}: '{name}' is in {first or 'none'} and {split or 'none'}"
                )
    if conflicts:
        raise UserError(
            f"{path} has {len(conflicts)} id(s) in two splits of a fold, so test results would be "
            f"biased\n{format_list(sorted(conflicts))}\n  give each id one split in each fold"
        )
    if unreadable:
        raise UserError(
            f"{path} has {len(unreadable)} row(s) without a valid id and split\n"
            f"{format_list(sorted(unreadable))}\n"
            "  each needs an id, and a split that is train, val, test or empty"
        )
    if not any(split for fold in folds.values() for split in fold.values()):
        raise UserError(
            f"{path} has no id in train, val or test\n  name a file that lists ids in splits"
        )
    return folds


def clam_files(fold: str, splits: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, bytes]:
    """Return the three files that CLAM writes for a fold.

    Parameters
    ----------
    fold
        Number of the fold.
    splits
        Slide -> train, val, test, or empty if it is not used.
    labels
        Slide -> its class, for the counts in the descriptor; empty if it is unknown.

    Returns
    -------
    dict
        File name -> content.
    """
    members = [[name for name, split in splits.items() if split == s] for s in SPLITS]
    lists = [
        [str(i), *(names[i] if i < len(names) else "" for names in members)]
        for i in range(max(map(len, members)))
    ]
    flags = [[name, *(str(split == s) for s in SPLITS)] for name, split in splits.items()]
    counts = Counter((labels[name], split) for name, split in splits.items())
    classes = sorted({labels[name] for name in splits} - {""})
    descriptor = [[label, *(str(counts[label, s]) for s in SPLITS)] for label in classes]
    header = ["", *SPLITS]
    return {
        f"splits_{fold}.csv": to_csv(header, lists),
        f"splits_{fold}_bool.csv": to_csv(header, flags),
        f"splits_{fold}_descriptor.csv": to_csv(header, descriptor),
    }


def fold_table(table: TextTable, id_column: str, folds: Mapping[str, Mapping[str, str]]) -> bytes:
    """Return the label table with a column ``fold_<k>`` for each fold, as CSV.

    Parameters
    ----------
    table
        The label table.
    id_column
        Its column that holds the ids in ``folds``.
    folds
        Number of the fold -> id -> split.

    Returns
    -------
    bytes
        The file's content.

    Raises
    ------
    UserError
        The table has such columns already.
    """
    names = [f"fold_{fold}" for fold in folds]
    present = [name for name in names if name in table.columns]
    if present:
        raise UserError(
            f"the label table has the column(s) {', '.join(present)} already\n"
            "  remove them, or train on them: data.split_file=THE_TABLE data.fold=0"
        )
    rows = []
    for row in table.rows:
        name, nfc = row[id_column], normalise_id(row[id_column])
        rows.append([*row.values(), *(s[name if name in s else nfc] for s in folds.values())])
    return to_csv([*table.columns, *names], rows)


def to_csv(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> bytes:
    """Return a table as CSV in UTF-8, with a line feed at the end of each line."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue().encode()
