"""What a fault can lead to, and the table that counts it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum


class Outcome(StrEnum):
    """What became of one fault."""

    SAME = "same"
    """The result is that without the fault."""
    REFUSED = "refused"
    """One message, and nothing else happened."""
    OTHER = "other"
    """Another result, where nothing can tell: a file without checksums holds other values."""
    WRONG = "wrong"
    """Another result without an error, although the format has checksums."""
    LOST = "lost"
    """A command could not be completed after the fault, or its result differs."""
    TRACEBACK = "traceback"
    """An unexpected exception."""
    CRASH = "crash"
    """The process was ended by the system (a segmentation fault, a bus error), or had no end."""
    HUNG = "hung"
    """HDF5 runs in circles in a damaged file, which no caller can prevent. (Seen with HDF5 2.0, where the
    text of an attribute was overwritten with zeros.)"""
    OUTSIDE = "outside"
    """A file was written outside the folder of the results."""


BAD = (Outcome.WRONG, Outcome.LOST, Outcome.TRACEBACK, Outcome.CRASH, Outcome.OUTSIDE)
"""Outcomes that must not happen."""


def table(rows: Mapping[str, Counter[Outcome]]) -> str:
    """Return a text table: a row per kind of fault, a column per outcome, with sums."""
    total: Counter[Outcome] = sum(rows.values(), Counter())
    lines = [["", "faults", *(outcome.value for outcome in Outcome)]]
    for name, row in [*rows.items(), ("all", total)]:
        lines.append([name, str(row.total()), *(str(row[outcome]) for outcome in Outcome)])
    width = max(len(line[0]) for line in lines)
    return "\n".join(
        line[0].ljust(width) + "".join(cell.rjust(11) for cell in line[1:]) for line in lines
    )
