"""The text of a table, whatever program saved it: CSV, tabs, comment lines above it, or a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from e2e.errors import UserError
from e2e.files import read_text

SPREADSHEETS = (".xlsx", ".xlsm")
MAX_BYTES = 2**30
"""Largest table that is read."""
MAX_COLUMNS = 10_000
"""Most columns of a table: pandas takes minutes, and gigabytes, for a million."""
MAX_CELL = 2**20
"""Longest cell, in characters."""


@contextmanager
def limited_cells() -> Iterator[None]:
    """Let the csv module, whose limit holds for the process, read cells of up to :data:`MAX_CELL` inside."""
    before = csv.field_size_limit(MAX_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_table_text(path: Path) -> tuple[str, str]:
    """Return the text of a table and what separates its cells.

    Parameters
    ----------
    path
        A .csv, .tsv, .tab or .txt file in UTF-8, or the first sheet of an .xlsx file.

    Returns
    -------
    text : str
        The table. Comment lines (``# ...``) above the header are blank, so lines keep their numbers.
    separator : str
        A comma or a tab.

    Raises
    ------
    UserError
        The file cannot be read, is no table, or is too large.
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, more than any table of slides\n"
            "  name the table of the labels or splits"
        )
    if path.suffix.lower() in SPREADSHEETS:
        text, separator = _read_spreadsheet(path), ","
    else:
        text = _blank_comments(read_text(path))
        header = text.lstrip("\r\n").partition("\n")[0]
        has_tabs = "\t" in header and "," not in header
        separator = "\t" if has_tabs or path.suffix in {".tsv", ".tab"} else ","
    header = text.lstrip("\r\n").partition("\n")[0]
    if (num_columns := header.count(separator) + 1) > MAX_COLUMNS:
        raise UserError(
            f"{path} has {num_columns:,} columns, more than {MAX_COLUMNS:,}\n"
            "  save the columns of ids, splits and labels alone"
        )
    return text, separator


def _blank_comments(text: str) -> str:
    """Empty the lines above the header that begin with #, unless the last of them is the header."""
    lines = text.splitlines(keepends=True)
    comments = []
    for number, line in enumerate(lines):
        if line.startswith("#"):
            comments.append(number)
        elif line.strip():
            if comments and _is_header(lines[comments[-1]], line):
                comments.pop()
            break
    for number in comments:
        lines[number] = "\n"
    return "".join(lines)


def _is_header(line: str, row: str) -> bool:
    """Whether a line that begins with # is the header of a row, such as #slide,label."""
    num_cells = [1 + max(text.count(","), text.count("\t")) for text in (line, row)]
    return not line[1:2].isspace() and num_cells[0] == num_cells[1] > 1


def _read_spreadsheet(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"no file at {path}")
    try:
        sheet = pd.read_excel(
            path, header=None, dtype=str, keep_default_na=False, engine="openpyxl"
        )
    except ImportError as error:
        raise UserError(
            f"{path} is a spreadsheet, which needs the package openpyxl\n"
            "  pip install openpyxl; or save the sheet as .csv in UTF-8"
        ) from error
    except Exception as error:  # a damaged archive may raise anything
        raise UserError(
            f"{path} is not a readable spreadsheet: {type(error).__name__}\n"
            "  save the sheet as .csv in UTF-8"
        ) from error
    text = io.StringIO()
    sheet.fillna("").to_csv(text, index=False, header=False)
    return text.getvalue()
