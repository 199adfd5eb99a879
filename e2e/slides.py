"""A slide as the label table describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Slide:
    """One labelled slide. ``target`` holds the table's words for the task's columns."""

    id: str
    case: str
    split: str
    """train, val or test; empty when the table has no splits."""
    target: Mapping[str, str]
    centre: str = ""
    """Where it comes from; empty when the table does not say."""
