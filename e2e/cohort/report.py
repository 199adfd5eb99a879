"""Tables of what a cohort holds and of what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from e2e.bags.spec import LabelledSlide
from e2e.cohort.table import Problem
from e2e.files import write_atomically


def write_problems(problems: Sequence[Problem], path: Path) -> None:
    """All of them as a table: slide, problem, where."""
    rows = [(p.slide, p.problem, p.where) for p in problems]
    table = pd.DataFrame(rows, columns=["slide", "problem", "where"])
    write_atomically(path, table.to_csv(index=False).encode())


def write_cohort(items: Sequence[LabelledSlide], problems: Sequence[Problem], path: Path) -> None:
    """cohort.csv of a run: each slide that takes part, and each that was left out, with the reason."""
    rows = [
        {
            "slide": item.slide.id,
            "case": item.slide.case,
            "split": item.slide.split,
            **item.slide.target,
            "patches": item.store.num_patches(item.slide.id),
            "store": str(item.store.path),
            "left_out": "",
        }
        for item in items
    ]
    rows += [{"slide": p.slide, "left_out": f"{p.problem} ({p.where})"} for p in problems]
    write_atomically(path, pd.DataFrame(rows).to_csv(index=False).encode())
