"""A cohort: a table of labelled slides, read by an explicit column map and checked row by row."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from e2e.errors import UserError, format_list
from e2e.files import read_text
from e2e.slides import Slide


@dataclass(frozen=True)
class Problem:
    """One row of the table, or one slide of a store, that cannot be used as it is."""

    slide: str
    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.slide or '(no slide id)'}: {self.problem} ({self.where})"


def read_table(
    path: str | os.PathLike[str],
    *,
    columns: Mapping[str, str | None],
    targets: Iterable[str],
    split_names: Mapping[str, str],
    slide_suffix: str = "",
    slide_separator: str | None = None,
) -> tuple[list[Slide], list[Problem]]:
    """Read a label table (.csv, .tsv); ids and values stay strings, matched exactly.

    A word of a target may be blank: what that means is the task's to say.

    Args:
        path: the table.
        columns: our word -> the table's column, for ``slide``, ``case``, ``split`` and ``centre``;
            without ``case`` every row is a case of its own.
        targets: the columns that the task reads.
        split_names: the table's word -> train, val or test.
        slide_suffix: taken off the end of each slide id, such as ``.pt`` or ``.svs``.
        slide_separator: between the ids of a row with several slides; each is a slide of the
            row's case, with its label and split.

    Returns:
        The slides, and the rows, or slides of a row, that are duplicate, contradictory or without
        an id or split. Of a slide whose rows contradict each other none counts.

    Raises:
        UserError: no such table, or a column is missing.
    """
    path = Path(path)
    wanted = {role: column for role, column in columns.items() if column is not None}
    table = _read_columns(path, [*wanted.values(), *targets])
    known_splits = split_names if "split" in wanted else {"": ""}
    slides: dict[str, Slide] = {}
    torn: set[str] = set()
    problems: list[Problem] = []
    for number, row in zip(table.index, table.to_dict("records"), strict=True):
        where = f"{path.name} line {number + 1}"
        own = {role: row[column] for role, column in wanted.items()}
        ids = slide_ids(own["slide"], slide_suffix, slide_separator)
        for place, slide_id in enumerate(ids):
            slide = Slide(
                id=slide_id,
                case=own.get("case", own["slide"].removesuffix(slide_suffix)),
                split=own.get("split", ""),
                target={name: row[name] for name in targets},
                centre=own.get("centre", ""),
            )
            fault = _row_fault(slide, known_splits)
            if fault or slide_id in ids[:place]:
                problems.append(Problem(slide_id, where, fault or "named twice in its row"))
                continue
            slide = replace(slide, split=known_splits[slide.split])
            known = slides.setdefault(slide_id, slide)
            if known is not slide:
                kind = "duplicate row" if known == slide else "contradicts an earlier row"
                problems.append(Problem(slide_id, where, kind))
            if known != slide:
                torn.add(slide_id)
    return [slide for slide in slides.values() if slide.id not in torn], problems


def join_words(words: Iterable[str]) -> str:
    """What the slides of a case say: each word once, without blanks, such as ``0+2``."""
    return "+".join(sorted({*words} - {""}))


def slide_ids(cell: str, suffix: str, separator: str | None) -> list[str]:
    """The ids that a table's cell names, one unless there is a ``separator``; each without ``suffix``."""
    parts = cell.split(separator) if separator else [cell]
    return [part.strip().removesuffix(suffix) for part in parts]


def _row_fault(slide: Slide, split_names: Mapping[str, str]) -> str | None:
    if not slide.id or not slide.case:
        return "empty slide or case id"
    if slide.split not in split_names:
        return f"split '{slide.split}' is none of {', '.join(split_names)}"
    return None


def _read_columns(path: Path, names: list[str]) -> pd.DataFrame:
    if not path.is_file():
        raise UserError(f"no label table at {path}\n  set data.labels=FILE.csv")
    text = read_text(path)
    separator = "\t" if path.suffix in {".tsv", ".tab"} else ","
    try:
        # The header is read as a row: pandas would call the second of two columns label.1, and take
        # the first for an index where a comma ends each line.
        table = pd.read_csv(
            io.StringIO(text.lstrip("\r\n")),
            sep=separator,
            dtype=str,
            keep_default_na=False,
            header=None,
            skip_blank_lines=False,  # so that a row's number is that of its line
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path} is no readable table: {str(error).strip()}") from error
    table = table.fillna("").apply(lambda column: column.str.strip())
    table = table.loc[(table != "").any(axis=1)]
    if table.empty:
        raise UserError(f"{path} is empty")
    columns = table.iloc[0].tolist()
    table = table.iloc[1:].set_axis(columns, axis=1)
    missing = sorted(set(names) - set(columns))
    if missing:
        remedy = (
            "name the table's own columns: data.columns.case=, .slide=, .split=, the task's column"
        )
        if ";" in columns[0]:  # as spreadsheets write where the comma is decimal
            remedy = "its cells are separated by ';': save it with commas"
        raise UserError(
            f"{path} lacks column(s) {', '.join(missing)}\n"
            f"  it has: {', '.join(columns)}\n  {remedy}"
        )
    if twice := sorted({name for name in names if columns.count(name) > 1}):
        raise UserError(
            f"{path} has the column(s) {', '.join(twice)} more than once\n"
            "  take out all but one, or give each a name of its own"
        )
    if table.empty:
        raise UserError(f"{path} has no rows\n{format_list(columns)}")
    return table.loc[:, list(dict.fromkeys(names))]
