"""Match the slides of a label table with the slides of patch stores or features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    slides: Sequence[Slide],
    readers: Sequence[R],
    *,
    check_content: Callable[[str, R], None] | None = None,
) -> tuple[dict[str, R], list[Problem]]:
    """Find the reader of each slide, by exact id.

    Parameters
    ----------
    slides
        Slides of the label table.
    readers
        Patch stores or features.
    check_content
        Called with the id and the reader of each slide that has patches; raises UserError if the slide
        cannot be used. None: whether it can is seen when it is read.

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
    used = {slide: reader for slide, reader in reader_of.items() if slide in ids}
    counts, faults = _count_or_fault(used, check_content)
    problems += faults
    empty = {slide for slide, count in counts.items() if not count}
    problems += [
        Problem(slide, reader_of[slide].path.name, "has no patches") for slide in sorted(empty)
    ]
    matches = {slide: reader_of[slide] for slide in counts if slide not in empty}
    return matches, problems


def _count_or_fault(
    reader_of: Mapping[str, R], check_content: Callable[[str, R], None] | None
) -> tuple[dict[str, int], list[Problem]]:
    """Return the patches of each slide, and a problem for each whose file cannot be used."""
    counts: dict[str, int] = {}
    faults: dict[str, list[tuple[str, str]]] = {}
    for slide, reader in reader_of.items():
        try:
            count = reader.num_patches(slide)
            if count and check_content is not None:
                check_content(slide, reader)
            counts[slide] = count
        except UserError as error:
            faults.setdefault(reader.path.name, []).append((slide, str(error).splitlines()[0]))
    return counts, [
        Problem(slide, source, text, group=f"cannot be used; the first: {texts[0][1]}")
        for source, texts in faults.items()
        for slide, text in texts
    ]


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
