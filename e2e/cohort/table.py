"""Read a label table into slides by an explicit column map, and check it row by row."""

from __future__ import annotations

import io
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from e2e.cohort.cells import read_table_text
from e2e.cohort.ids import NO_RULES, IdRules, normalise_id
from e2e.errors import UserError
from e2e.slides import Slide, find_id_fault, show_id

NUM_EXAMPLES = 3
"""Ids that are named of many slides with the same problem."""


@dataclass(frozen=True)
class Problem:
    """One row of a table, or one slide of a store, that cannot be used."""

    slide: str
    """Id of the slide; empty if the row has none."""
    source: str
    """The table, split file or store that has the problem."""
    problem: str
    """What is wrong, in a few words."""
    line: int | None = None
    """Line of the table, from 1; None if the problem is not in one line."""
    group: str = ""
    """What many slides with this kind of problem have in common; empty: ``problem`` itself."""

    @property
    def summary(self) -> str:
        """The text under which identical problems are counted."""
        return self.group or self.problem

    @property
    def where(self) -> str:
        """The source, with the line if there is one."""
        return self.source if self.line is None else f"{self.source} line {self.line}"

    def __str__(self) -> str:
        return f"{show_id(self.slide) or '(no slide id)'}: {self.problem} ({self.where})"


def read_table(
    path: str | os.PathLike[str],
    *,
    columns: Mapping[str, str | None],
    targets: Iterable[str],
    split_names: Mapping[str, str],
    rules: IdRules = NO_RULES,
) -> tuple[list[Slide], list[Problem]]:
    """Read the slides of a label table.

    Ids and cells stay text and are compared exactly. A target cell may be blank: the task decides
    what that means.

    Parameters
    ----------
    path
        The table, .csv or .tsv.
    columns
        ``slide``, ``case``, ``split`` or ``centre`` -> name of the table's column. Without ``case``
        every row is a case.
    targets
        Names of the columns that the task reads.
    split_names
        The table's name of a split -> train, val or test.
    rules
        How the table writes slide ids. Each of several ids in a cell becomes a slide with the case,
        labels and split of the row.

    Returns
    -------
    slides : list of Slide
        The slides that can be used, in the order of the table.
    problems : list of Problem
        Rows, or single slides of a row, that are duplicate, contradict another row, or have no id
        or no valid split. A slide with contradicting rows is not used at all.

    Raises
    ------
    UserError
        The table does not exist, cannot be read or lacks a column.
    """
    path = Path(path)
    used_columns, targets = {k: v for k, v in columns.items() if v is not None}, list(targets)
    table = _read_columns(path, [*used_columns.values(), *targets])
    valid_splits = split_names if "split" in used_columns else {"": ""}
    rows = [
        (
            int(number) + 1,
            _parse_row(row, used_columns, targets, rules),
        )
        for number, row in zip(table.index, table.to_dict("records"), strict=True)
    ]
    return _check_rows(rows, valid_splits, path.name)


def summarise_problems(problems: Sequence[Problem]) -> list[str]:
    """Return one line for all slides that have the same problem.

    Parameters
    ----------
    problems
        The problems, one for each row or slide.

    Returns
    -------
    list of str
        For example ``72 slides (s1, s2, s3, ...): not in any store (label table)``.
    """
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.summary, problem.source), []).append(problem)
    return [_summarise_group(group) for group in groups.values()]


def _summarise_group(group: Sequence[Problem]) -> str:
    first = group[0]
    if len(group) == 1:
        return f"{show_id(first.slide) or '(no slide id)'}: {first.summary} ({first.where})"
    where = first.source
    if first.line is not None:
        lines = dict.fromkeys(str(p.line) for p in group)
        where += f" line{'s' if len(lines) > 1 else ''} {_list_examples([*lines])}"
    slides = [show_id(p.slide) for p in group if p.slide]
    examples = f" ({_list_examples(slides)})" if slides else ""
    return f"{len(group)} slides{examples}: {first.summary} ({where})"


def _list_examples(words: Sequence[str]) -> str:
    return ", ".join([*words[:NUM_EXAMPLES], *(["..."] if len(words) > NUM_EXAMPLES else [])])


def join_words(words: Iterable[str]) -> str:
    """Return the different non-empty words, sorted and joined by ``+``: for example ``0+2``."""
    return "+".join(sorted({*words} - {""}))


def _parse_row(
    row: Mapping[Hashable, str],
    columns: Mapping[str, str],
    targets: Sequence[str],
    rules: IdRules,
) -> list[Slide]:
    """Return the slides that a row names, with the split as the table writes it."""
    cells = {role: row[column] for role, column in columns.items()}
    case = normalise_id(cells["case"] if "case" in cells else rules.parse_one(cells["slide"]))
    target = {name: row[name] for name in targets}
    return [
        Slide(slide_id, case, cells.get("split", ""), target, cells.get("centre", ""))
        for slide_id in map(normalise_id, rules.parse(cells["slide"]))
    ]


def _check_rows(
    rows: Sequence[tuple[int, Sequence[Slide]]], valid_splits: Mapping[str, str], source: str
) -> tuple[list[Slide], list[Problem]]:
    """Return the slides that can be used, and the problems of the rows: (line, slides of the row)."""
    slides: dict[str, Slide] = {}
    contradicting: set[str] = set()
    problems: list[Problem] = []
    for line, row_slides in rows:
        for position, slide in enumerate(row_slides):
            fault = _find_row_fault(slide, valid_splits, row_slides[:position])
            if fault is not None:
                problems.append(Problem(slide.id, source, fault, line))
                continue
            slide = replace(slide, split=valid_splits[slide.split])
            first = slides.setdefault(slide.id, slide)
            if first is not slide:
                kind = "duplicate row" if first == slide else "contradicts an earlier row"
                problems.append(Problem(slide.id, source, kind, line))
            if first != slide:
                contradicting.add(slide.id)
    return [slide for slide in slides.values() if slide.id not in contradicting], problems


def _find_row_fault(
    slide: Slide, split_names: Mapping[str, str], earlier_in_row: Sequence[Slide]
) -> str | None:
    if fault := find_id_fault(slide.id) or find_id_fault(slide.case.replace("/", "_")):
        return fault
    if slide.split not in split_names:
        return f"split '{show_id(slide.split)}' is not one of {', '.join(split_names)}"
    if any(slide.id == other.id for other in earlier_in_row):
        return "listed twice in its row"
    return None


def _read_columns(path: Path, names: list[str]) -> pd.DataFrame:
    """Return the named columns as text, indexed by line number minus one, without empty rows."""
    table = _parse_table(path)
    columns = table.iloc[0].tolist()
    table = table.iloc[1:].set_axis(columns, axis=1)
    missing = sorted(set(names) - set(columns))
    if missing:
        remedy = (
            "set data.columns.case=, data.columns.slide=, data.columns.split= or the task's column"
            " to the names that the table uses"
        )
        if ";" in columns[0]:  # as spreadsheets write where the comma is decimal
            remedy = "its cells are separated by ';': save it with commas"
        raise UserError(
            f"{path} lacks column(s) {', '.join(missing)}\n"
            f"  it has: {', '.join(columns)}\n  {remedy}"
        )
    if repeated := sorted({name for name in names if columns.count(name) > 1}):
        raise UserError(
            f"{path} has the column(s) {', '.join(repeated)} more than once\n"
            "  remove or rename all but one"
        )
    if table.empty:
        raise UserError(
            f"{path} has no rows below its header ({', '.join(columns)})\n"
            "  add a row for each slide"
        )
    return table.loc[:, list(dict.fromkeys(names))]


def _parse_table(path: Path) -> pd.DataFrame:
    """Return all cells as text without surrounding blanks; the first row is the header."""
    if not path.is_file():
        raise UserError(f"no label table at {path}\n  set data.labels=FILE.csv")
    text, separator = read_table_text(path)
    try:
        # The header is read as a row: pandas would rename the second of two equal columns to
        # label.1, and use the first column as an index where a comma ends each line.
        table = pd.read_csv(
            io.StringIO(text.lstrip("\r\n")),
            sep=separator,
            dtype=str,
            keep_default_na=False,
            header=None,
            skip_blank_lines=False,  # so that a row's number is that of its line
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path} is not a readable table: {str(error).strip()}") from error
    table = table.fillna("").apply(lambda column: column.str.strip())
    table = table.loc[(table != "").any(axis=1)]
    if table.empty:
        raise UserError(f"{path} is empty\n  add a header and a row for each slide")
    return table
