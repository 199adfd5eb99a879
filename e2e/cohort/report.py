"""Reports on a cohort: tables of what it holds and what it leaves out, and the error about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd

from e2e.bags.spec import LabelledSlide
from e2e.cohort.table import Problem, summarise_problems
from e2e.errors import UserError, format_list
from e2e.files import write_atomically
from e2e.slides import show_id


def write_problems(problems: Sequence[Problem], path: Path) -> None:
    """Write all problems as a table: slide, problem, where.

    Parameters
    ----------
    problems
        The problems, one for each row of the table.
    path
        The .csv file.
    """
    rows = [(show_id(p.slide), p.problem, p.where) for p in problems]
    table = pd.DataFrame(rows, columns=["slide", "problem", "where"])
    write_atomically(path, table.to_csv(index=False).encode(errors="backslashreplace"))


def write_cohort(items: Sequence[LabelledSlide], problems: Sequence[Problem], path: Path) -> None:
    """Write cohort.csv of a run: each slide that is used, and each that was left out with the reason.

    Parameters
    ----------
    items
        The slides that are used.
    problems
        What was left out.
    path
        The .csv file.
    """
    rows = [
        {
            "slide": item.slide.id,
            "case": item.slide.case,
            "split": item.slide.split,
            **item.slide.target,
            "patches": item.reader.num_patches(item.slide.id),
            "store": str(item.reader.path),
            "left_out": "",
        }
        for item in items
    ]
    rows += [{"slide": show_id(p.slide), "left_out": f"{p.problem} ({p.where})"} for p in problems]
    write_atomically(path, pd.DataFrame(rows).to_csv(index=False).encode())


def count_problems(problems: Sequence[Problem]) -> dict[str, int]:
    """Return how many rows and slides have each kind of problem, for metrics.json."""
    return dict(Counter(f"{p.summary} ({p.source})" for p in problems))


def warn_of_dropped(problems: Sequence[Problem], path: Path | None) -> list[str]:
    """Return a warning with the number of rows and slides that were left out, by their problem."""
    if not problems:
        return []
    where = f", listed in {path}" if path else ""
    lines = format_list(summarise_problems(problems))
    return [
        f"{len(problems)} row(s) or slide(s) left out (data.unmatched=drop){where}\n{lines}",
    ]


def report_unusable_rows(
    problems: Sequence[Problem],
    *,
    policy: Literal["error", "drop"],
    tables: str,
    cohort: str,
    num_usable: int,
    explanations: Sequence[str] = (),
    report_path: Path | None,
) -> None:
    """Write the unusable rows to ``report_path``. Raise UserError unless ``policy`` is 'drop'.

    Parameters
    ----------
    problems
        The rows and slides that cannot be used; nothing is done if there are none.
    policy
        ``data.unmatched``: 'error', or 'drop' to go on without them.
    tables
        The label table, and the split file if there is one.
    cohort
        Name of the cohort.
    num_usable
        Slides that are left without the unusable ones. Dropping everything is an error too.
    explanations
        Lines that explain the problems and say what to change.
    report_path
        A .csv file for the whole list; None on ranks that do not lead.

    Raises
    ------
    UserError
        There are problems, unless they are to be dropped and slides are left.
    """
    if not problems:
        return
    if report_path is not None:
        write_problems(problems, report_path)
    if policy == "drop" and num_usable:
        return
    lines = [
        f"{tables} and the stores of cohort '{cohort}' do not match: "
        f"{len(problems)} row(s) or slide(s) cannot be used, {num_usable} can",
        format_list(summarise_problems(problems)),
    ]
    if report_path is not None:
        lines.append(f"  full list: {report_path}")
    lines += [f"  {line}" for line in explanations or ["correct the table or pack the slides"]]
    if num_usable:
        lines.append("  or set data.unmatched=drop to continue without them")
    raise UserError("\n".join(lines))
