"""Match the slides of a label table with the slides of patch stores or features."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from e2e.cohort.table import Problem
from e2e.errors import UserError, format_list
from e2e.slides import Slide
from e2e.store.records import SlideReader

R = TypeVar("R", bound=SlideReader)

LABEL_TABLE = "label table"
NOT_IN_STORE = "not in any store"
NOT_IN_TABLE = "not in the label table"


def match_slides(
    slides: Sequence[Slide], readers: Sequence[R]
) -> tuple[dict[str, R], list[Problem]]:
    """Find the reader of each slide, by exact id.

    Parameters
    ----------
    slides
        Slides of the label table.
    readers
        Patch stores or features.

    Returns
    -------
    matches : dict
        Slide id -> its reader, for slides that have patches.
    problems : list of Problem
        Slides of the table without data, slides of a reader without a row, slides in two readers,
        and slides without patches.
    """
    reader_of: dict[str, R] = {}
    problems: list[Problem] = []
    for reader in readers:
        for slide in reader.slides:
            first = reader_of.setdefault(slide, reader)
            if first is not reader:
                problems.append(Problem(slide, reader.path.name, f"also in {first.path.name}"))
    ids = {slide.id for slide in slides}
    for slide in slides:
        if slide.id not in reader_of:
            hint = "; for several slides in a cell set data.slide_separator=';'"
            text = NOT_IN_STORE + (hint if ";" in slide.id else "")
            problems.append(Problem(slide.id, LABEL_TABLE, text))
    problems += [
        Problem(slide, reader.path.name, NOT_IN_TABLE)
        for slide, reader in reader_of.items()
        if slide not in ids
    ]
    empty = {
        slide
        for slide, reader in reader_of.items()
        if slide in ids and not reader.num_patches(slide)
    }
    problems += [
        Problem(slide, reader_of[slide].path.name, "has no patches") for slide in sorted(empty)
    ]
    matches = {slide: reader for slide, reader in reader_of.items() if slide in ids - empty}
    return matches, problems


def match_scales(
    slides: Sequence[Slide], scales: Sequence[Sequence[R]]
) -> tuple[dict[str, list[R]], list[Problem]]:
    """Find the readers of each slide at further magnifications.

    Parameters
    ----------
    slides
        The slides that need all magnifications; others in the readers are ignored.
    scales
        The readers of each magnification.

    Returns
    -------
    matches : dict
        Slide id -> one reader for each magnification, for slides that have them all.
    problems : list of Problem
        Slides without patches at a magnification.
    """
    matches: dict[str, list[R]] = {slide.id: [] for slide in slides}
    ids = set(matches)
    problems: list[Problem] = []
    for number, readers in enumerate(scales):
        reader_of, scale_problems = match_slides(slides, readers)
        problems += [
            Problem(p.slide, p.source, f"{p.problem} (data.scales[{number}])")
            for p in scale_problems
            if p.slide in ids
        ]
        matches = {k: [*rest, reader_of[k]] for k, rest in matches.items() if k in reader_of}
    return matches, problems


def check_patch_sizes(readers: Mapping[str, Sequence[SlideReader]], size: int | None) -> None:
    """Check that patches have one size at each magnification, and at all of them unless resized.

    The first slide of each store is checked.

    Parameters
    ----------
    readers
        Slide id -> its reader at each magnification.
    size
        Side in pixels that all patches are resized to; None if they are not resized.

    Raises
    ------
    UserError
        Patches of different sizes would be in one bag.
    """
    sizes: dict[int, dict[int, Path]] = {}
    checked: set[tuple[int, Path]] = set()
    for slide, scale_readers in readers.items():
        for scale, reader in enumerate(scale_readers):
            if (scale, reader.path) not in checked:
                checked.add((scale, reader.path))
                side = reader.record(slide).patch_px
                sizes.setdefault(0 if size is None else scale, {})[side] = reader.path
    for path_of in sizes.values():
        if len(path_of) > 1:
            raise UserError(
                "the stores have patches of different sizes\n"
                + format_list(f"{path}: {side} px" for side, path in path_of.items())
                + "\n  pack the stores of one magnification alike; set bag.size=PX if magnifications"
                " differ"
            )


def explain_unmatched_ids(
    ids: Collection[str],
    data_ids: Collection[str],
    *,
    slide_suffix: str = "",
    first: str = "label table",
    second: str = "stores",
) -> list[str]:
    """Explain why ids do not match, if one systematic difference explains all of them.

    Parameters
    ----------
    ids
        Ids of a table that are not in the data.
    data_ids
        Ids of the data that are not in the table.
    slide_suffix
        Suffix that has been removed from the ids of the table.
    first
        What ``ids`` come from, for the message.
    second
        What ``data_ids`` come from, for the message.

    Returns
    -------
    list of str
        One line that says after which change every id matches, and one with the remedy. Empty if no
        such change is known.
    """
    if not ids or not data_ids:
        return []
    if suffix := _find_suffix(ids, data_ids):
        return [
            f"every id in the {first} matches after removing '{suffix}'",
            f"set data.slide_suffix={suffix}{slide_suffix}",
        ]
    if suffix := _find_extra_suffix(ids, data_ids):
        return [
            f"every id in the {first} matches after removing '{suffix}' from the ids in the {second}",
            f"write the same ids in both: with '{suffix}' in the {first}, or without it in the {second}",
        ]
    if pair := _find_equal_pair(str.casefold, ids, data_ids):
        return [
            f"every id in the {first} matches if upper and lower case are ignored: "
            f"'{pair[0]}' is '{pair[1]}' in the {second}",
            f"write the ids in the {first} as they are in the {second}",
        ]
    if pair := _find_equal_pair(_to_nfc, ids, data_ids):
        form = "NFC" if unicodedata.is_normalized("NFC", pair[1]) else "NFD"
        return [
            f"every id in the {first} matches after Unicode normalisation: '{pair[0]}' looks the same in"
            f" the {second} but is stored as other characters",
            f"convert the ids in the {first} to the Unicode form {form} that the {second} use",
        ]
    return []


def _find_suffix(ids: Collection[str], data_ids: Collection[str]) -> str | None:
    """Return the suffix of all ``ids`` without which all of them are in ``data_ids``."""
    data_ids, example = set(data_ids), min(ids)
    ends = {example.removeprefix(name) for name in data_ids if example.startswith(name)}
    for suffix in sorted(filter(_is_suffix, ends)):
        if all(name.endswith(suffix) and name.removesuffix(suffix) in data_ids for name in ids):
            return suffix
    return None


def _find_extra_suffix(ids: Collection[str], data_ids: Collection[str]) -> str | None:
    """Return the suffix with which all ``ids`` are in ``data_ids``."""
    data_ids, example = set(data_ids), min(ids)
    ends = {name.removeprefix(example) for name in data_ids if name.startswith(example)}
    for suffix in sorted(filter(_is_suffix, ends)):
        if all(f"{name}{suffix}" in data_ids for name in ids):
            return suffix
    return None


def _is_suffix(end: str) -> bool:
    """Whether the end of an id looks like a suffix, such as .svs or _HE, and not like a part of it."""
    return len(end) > 1 and not end[0].isalnum()


def _find_equal_pair(
    change: Callable[[str], str], ids: Collection[str], data_ids: Collection[str]
) -> tuple[str, str] | None:
    """Return an example if each id equals one data id after ``change``; None if not, or if ambiguous."""
    changed = {change(name): name for name in data_ids}
    if len(changed) < len(data_ids) or len({change(name) for name in ids}) < len(ids):
        return None
    if not all(change(name) in changed for name in ids):
        return None
    example = min(ids)
    return example, changed[change(example)]


def _to_nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)
