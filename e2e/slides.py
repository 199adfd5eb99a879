"""A labelled slide, as one row of the label table describes it; which ids slides may have."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote

from e2e.errors import UserError, format_list

MAX_ID_BYTES = 500
"""Longest slide id in UTF-8; a patch store has no room for longer ones."""

MAX_NAME_BYTES = 200
"""Longest file name made of an id, without suffix; file systems end at 255."""


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


def find_id_fault(slide: str) -> str | None:
    """Return why a text cannot be a slide id; None if it can.

    Ids come from tables, stores and features of unknown origin, and become names of files: none may lead out
    of a folder, hold control characters, or be too long.
    """
    if not slide:
        return "it is empty"
    try:
        num_bytes = len(slide.encode())
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if num_bytes > MAX_ID_BYTES:
        return f"it has {num_bytes} bytes, more than {MAX_ID_BYTES}"
    if any(unicodedata.category(sign) == "Cc" for sign in slide):
        return "it holds a control character"
    if any(part in ("", ".", "..") for part in slide.replace("\\", "/").split("/")):
        return "as a path it would lead out of its folder"
    return None


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
        lines = [f"{slide[:80]!r}: {fault}" for slide, fault in faults.items()]
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
