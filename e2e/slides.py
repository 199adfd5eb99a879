"""A labelled slide, as one row of the label table describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Slide:
    """One slide of a cohort with its labels, not yet matched with patches or features.

    Where a bag is a whole case (``data.unit=case``), a case takes the place of a slide and has its
    own id in both ``id`` and ``case``.
    """

    id: str
    """Id of the slide, the same in the label table and in the store."""
    case: str
    """Id of the case (patient). All slides of a case are in one split."""
    split: str
    """``train``, ``val`` or ``test``; empty if the slide has no split yet."""
    target: Mapping[str, str]
    """Column name -> cell, as text, for each column of the label table that the task reads."""
    centre: str = ""
    """Centre (hospital) the slide comes from; empty if the label table does not name it."""
