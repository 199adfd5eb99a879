"""A labelled slide, as one row of the label table describes it; which ids slides may have."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote

from e2e.errors import UserError, format_list

MAX_ID_BYTES = 500
"""Longest slide id in UTF-8; a patch store has no room for longer ones."""

MAX_NAME_BYTES = 200
"""Longest file name made of an id, without suffix; file systems end at 255."""

MAX_SHOWN = 200
"""Longest text that a message shows whole."""

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
    is_drive = len(parts) > 1 and re.fullmatch("[A-Za-z]:", parts[0])
    if parts[0] == "" or is_drive:
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
    if text.isprintable() and len(text) <= MAX_SHOWN:
        return text
    letters = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    shown = "".join(letters)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:60]}... ({len(text)} characters)"


def check_ids(slides: Iterable[str], source: object) -> None:
    """Raise UserError if a text cannot be a slide id.

    Parameters
    ----------
    slides : iterable of str
        The ids.
    source : object
        Where they come from, for the message.
    """
    faults = {slide: fault for slide in slides if (fault := find_id_fault(slide)) is not None}
    if faults:
        lines = [f"'{show_id(slide)}' {fault}" for slide, fault in faults.items()]
        raise UserError(
            f"{source}: {len(faults)} slide id(s) cannot be used\n{format_list(lines, most=3)}\n"
            "  rename these slides where the file was made"
        )


def file_name(slide: str) -> str:
    """Return a file name for a slide, without suffix: different for different ids.

    Examples
    --------
    >>> file_name("TCGA-3C-AALI"), file_name("site 1/slide_2"), file_name("site 1_slide_2")
    ('TCGA-3C-AALI', 'site 1%2Fslide_2', 'site 1_slide_2')
    """
    name = "".join(quote(sign, safe="") if sign in '%/\\:*?"<>|' else sign for sign in slide)
    name = f"%2E{name[1:]}" if name.startswith(".") else name
    if len(name.encode()) <= MAX_NAME_BYTES:
        return name
    digest = hashlib.blake2b(slide.encode(), digest_size=8).hexdigest()
    start = name.encode()[: MAX_NAME_BYTES - 17].decode(errors="ignore")
    return f"{start}-{digest}"


def slide_of_file(name: str) -> str:
    """Return the slide id of a file name that :func:`file_name` made; others are returned as they are."""
    slide = unquote(name)
    return slide if file_name(slide) == name else name
