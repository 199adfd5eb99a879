"""A labelled slide, as one row of the label table describes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_ID_BYTES = 200
"""Length of an id in UTF-8: files are named by ids, and a file name has at most 255 bytes."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""Halves of a character, which no encoding can write."""
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Control characters and line breaks."""
ABSOLUTE_PATH = "is an absolute path"
"""The fault of an id that names a file from the root of a disk."""


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


def find_id_fault(text: str) -> str | None:
    """Return why a text cannot be the id of a slide or case; None if it can.

    Files and folders are named by ids, and ids are written into tables and reports. So an id from a
    table, a store, a file name or a Python call is checked here before it is used. An id may contain
    ``/``, but must stay below the folder that it is joined to.

    Parameters
    ----------
    text
        The id.

    Returns
    -------
    str or None
        What is wrong, in a few words.

    Examples
    --------
    >>> find_id_fault("TCGA-02-0001"), find_id_fault("centre 1/slide")
    (None, None)
    >>> find_id_fault("../../x")
    "leads out of a folder ('..')"
    """
    if not text or text.isspace():
        return "empty slide or case id"
    if SURROGATE.search(text):
        return "has an unpaired surrogate, which is no character"
    if CONTROL.search(text):
        return "has a control character or line break"
    if len(text.encode()) > MAX_ID_BYTES:
        return f"is longer than {MAX_ID_BYTES} bytes in UTF-8"
    parts = re.split(r"[/\\]", text)
    if parts[0] == "" or re.fullmatch("[A-Za-z]:", parts[0]):
        return ABSOLUTE_PATH
    if {"", ".", ".."} & {*parts}:
        return (
            "leads out of a folder ('..')"
            if ".." in parts
            else "has an empty part or '.' in its path"
        )
    return None


def show_id(text: str) -> str:
    """Return an id on one line for messages and lists: letters that cannot be printed are escaped."""
    if text.isprintable() and len(text) <= MAX_ID_BYTES:
        return text
    letters = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    shown = "".join(letters)
    return shown if len(shown) <= MAX_ID_BYTES else f"{shown[:60]}... ({len(text)} characters)"
