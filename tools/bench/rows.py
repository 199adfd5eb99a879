"""Rows of an acceptance check: what is measured, the bar, the measured value, and a control.

A control is the same measurement of something broken on purpose, or of the plain way of doing it: a
check that cannot fail shows nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from e2e.errors import UserError


@dataclass(frozen=True)
class Row:
    """One line of a check."""

    what: str
    bar: str
    measured: str
    control: str
    good: bool | None
    """Whether the bar is reached; None for a value that is only reported."""

    def __str__(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "    "}[self.good]
        return f"{mark} {self.what} | bar {self.bar} | measured {self.measured} | control {self.control}"


def report(
    rows: Mapping[str, Callable[[], Iterator[Row]]],
    names: Sequence[str] | None,
    tail: Callable[[], str] = str,
) -> int:
    """Print rows and return the exit code: 1 where one is short of its bar.

    Parameters
    ----------
    rows
        Name -> function that measures some rows.
    names
        Names to measure; None for all.
    tail
        Gives the end of the last line.

    Raises
    ------
    UserError
        A name is unknown.
    """
    unknown = [name for name in names or () if name not in rows]
    if unknown:
        raise UserError(f"no row {', '.join(unknown)}\n  choose from: {', '.join(rows)}")
    start, num_short = time.monotonic(), 0
    for name in names or rows:
        for row in rows[name]():
            print(row, flush=True)
            num_short += row.good is False
    minutes = (time.monotonic() - start) / 60
    print(f"{num_short} short of the bar; {minutes:.1f} minutes{tail()}")
    return 1 if num_short else 0
