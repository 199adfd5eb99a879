"""All slides of a case as one bag: readers of cases over the readers of their slides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.cohort.table import join_words
from e2e.errors import UserError, format_list
from e2e.features.reader import FeatureReader
from e2e.slides import Slide
from e2e.store.records import PatchReader, SlideReader, SlideRecord

T = TypeVar("T")
R = TypeVar("R", bound=SlideReader)


@dataclass(frozen=True)
class CaseReader(Generic[R]):
    """A reader with one "slide", the case, whose patches are those of its slides in turn.

    Parameters
    ----------
    case
        Id of the case.
    parts
        Reader and id of each slide, in the order of their ids.
    """

    case: str
    """Id of the case."""
    parts: tuple[tuple[R, str], ...]
    """Reader and id of each slide, in the order of their ids."""

    @property
    def path(self) -> Path:
        """Path of the first slide's reader."""
        return self.parts[0][0].path

    @property
    def recipe(self) -> dict[str, Any]:
        """Recipe of the first slide's reader."""
        return self.parts[0][0].recipe

    @property
    def slides(self) -> list[str]:
        """The id of the case alone."""
        return [self.case]

    def __contains__(self, slide: str) -> bool:
        return slide == self.case

    def num_patches(self, slide: str) -> int:
        """Return the number of patches of all slides."""
        return sum(reader.num_patches(part) for reader, part in self.parts)

    def record(self, slide: str) -> SlideRecord:
        """Return a record of the case, with its slides side by side.

        The coords of each slide are moved to the right of the slides before it. Source,
        magnification and side of the patches are those of the first slide.

        Raises
        ------
        UserError
            The slides have patches of different sizes.
        DamagedDataError
            A slide cannot be read.
        """
        return self._record

    @cached_property
    def _record(self) -> SlideRecord:
        records = self.slide_records(self.case)
        sides = {record.patch_px for record in records}
        if len(sides) > 1:
            raise UserError(
                f"the slides of case '{self.case}' have patches of {sorted(sides)} px\n"
                "  pack them alike"
            )
        first, widths = records[0], [record.width for record in records]
        common: dict[str, Any] = {
            "slide": self.case,
            "num_patches": self.num_patches(self.case),
            "height": max(record.height for record in records),
        }
        if any(record.coords is None for record in records):
            return replace(first, **common, coords=None, width=0)
        # Side by side, a slide's width or reach and two patches between two of them.
        reaches = [
            max(width, int(record.require_coords()[:, 0].max() + 3 * max(1, record.level0_px)))
            for width, record in zip(widths, records, strict=True)
        ]
        starts = np.cumsum([0, *reaches])
        coords = [
            record.require_coords() + np.array([start, 0], np.int32)
            for record, start in zip(records, starts, strict=False)
        ]
        joined = np.concatenate(coords).astype(np.int32)
        return replace(first, **common, coords=joined, width=int(starts[-1]))

    def joined_slides(self, slide: str) -> list[str]:
        """Return the ids of the slides of the case."""
        return [part for _, part in self.parts]

    def slide_records(self, slide: str) -> list[SlideRecord]:
        """Return the record of each slide of the case."""
        return [reader.record(slide) for reader, slide in self.parts]


class CasePatches(CaseReader[PatchReader]):
    """The patches of a case; a :class:`e2e.store.records.PatchReader`."""

    def read(self, slide: str, indices: Sequence[int] | NDArray[np.int64]) -> list[bytes]:
        """Return the JPEG bytes of patches.

        Parameters
        ----------
        slide
            Id of the case.
        indices
            (n,) patch numbers within the case.

        Returns
        -------
        list of bytes
            n JPEGs in the given order.

        Raises
        ------
        DamagedDataError
            A patch is missing or unreadable.
        """
        numbers = np.asarray(indices, np.int64)
        jpegs: list[bytes] = [b""] * len(numbers)
        start = 0
        for reader, part in self.parts:
            stop = start + reader.num_patches(part)
            rows = np.flatnonzero((start <= numbers) & (numbers < stop))
            if len(rows):
                values = reader.read(part, numbers[rows] - start)
                for row, value in zip(rows, values, strict=True):
                    jpegs[row] = value
            start = stop
        return jpegs

    def borrow(
        self,
        slide: str,
        indices: Sequence[int] | NDArray[np.int64],
        work: Callable[[Sequence[bytes | memoryview]], T],
    ) -> T:
        """Return ``work(jpegs)``, for copies of the JPEGs; see :meth:`read`."""
        return work(self.read(slide, indices))

    def checksums(self, slide: str) -> None:
        """Return None: checksums are compared before slides are joined."""

    def find_damage(self, slide: str) -> Iterator[str]:
        """Check every patch of every slide; yield a line for each fault."""
        for reader, part in self.parts:
            yield from reader.find_damage(part)


class CaseFeatures(CaseReader[FeatureReader]):
    """The features of a case; a :class:`e2e.features.reader.FeatureReader`."""

    @property
    def width(self) -> int:
        """Width D of the features."""
        return self.parts[0][0].width

    def features(self, slide: str) -> Tensor:
        """Return the features of all slides, (N, D); float32 if those of one slide are."""
        return torch.cat([reader.features(part) for reader, part in self.parts])

    def first_rows(self, slide: str, rows: int) -> NDArray[Any]:
        """Return at most the first ``rows`` features of the first slide, (n, D)."""
        reader, part = self.parts[0]
        return reader.first_rows(part, rows)


def group_by_case(
    slides: Sequence[Slide],
    readers: Mapping[str, Sequence[R]],
    join: Callable[[str, tuple[tuple[R, str], ...]], R],
) -> tuple[list[Slide], dict[str, list[R]]]:
    """Turn slides into cases: each is a "slide" with the id of the case and readers of its own.

    Parameters
    ----------
    slides
        Slides of the cohort, split by case.
    readers
        Slide id -> its reader at each magnification.
    join
        Makes the reader of a case: :class:`CasePatches` or :class:`CaseFeatures`.

    Returns
    -------
    cases : list of Slide
        The cases.
    readers : dict
        Case id -> its reader at each magnification.

    Raises
    ------
    UserError
        The slides of a case have different labels.
    """
    cases = _slides_by_case(slides)
    _check_labels(cases, "data.unit=case needs one label for each case", "or set data.unit=slide")
    joined: dict[str, list[R]] = {
        case: [
            join(case, tuple((readers[slide.id][scale], slide.id) for slide in members))
            for scale in range(len(readers[members[0].id]))
        ]
        for case, members in cases.items()
    }
    case_slides = [
        replace(members[0], id=case, centre=join_words(slide.centre for slide in members))
        for case, members in cases.items()
    ]
    return case_slides, joined


def check_one_label_per_case(slides: Sequence[Slide]) -> list[str]:
    """Check slides that are evaluated one by one although their label is the case's.

    Parameters
    ----------
    slides
        Slides of the cohort.

    Returns
    -------
    list of str
        A warning if a case has several slides.

    Raises
    ------
    UserError
        The slides of a case have different labels.
    """
    cases = _slides_by_case(slides)
    _check_labels(cases, "the label belongs to the case", "or leave the slides out")
    if len(cases) == len(slides):
        return []
    return [
        f"{len(slides):,} slides of {len(cases):,} cases: each slide is evaluated by itself, so a case"
        " with several slides counts several times. Set data.unit=case to make one bag of each case."
    ]


def _slides_by_case(slides: Sequence[Slide]) -> dict[str, list[Slide]]:
    cases: dict[str, list[Slide]] = {}
    for slide in sorted(slides, key=lambda slide: slide.id):
        cases.setdefault(slide.case, []).append(slide)
    return cases


def _check_labels(cases: Mapping[str, Sequence[Slide]], reason: str, alternative: str) -> None:
    """Raise UserError if the slides of a case have different labels."""
    different = [
        f"case '{case}': " + ", ".join(f"{s.id} {'/'.join(s.target.values())}" for s in members)
        for case, members in cases.items()
        if len({tuple(slide.target.items()) for slide in members}) > 1
    ]
    if different:
        raise UserError(
            f"{len(different)} case(s) have slides of different labels, but {reason}\n"
            f"{format_list(different)}\n  correct the label table, {alternative}"
        )
