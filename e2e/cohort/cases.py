"""All slides of a case as one bag: a store of cases over the stores of their slides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.cohort.table import join_words
from e2e.errors import UserError, format_list
from e2e.features.reader import FeatureFiles
from e2e.slides import Slide
from e2e.store.records import PatchReader, SlideReader, SlideRecord

T = TypeVar("T")


@dataclass(frozen=True)
class CaseStore:
    """One case, whose patches are those of its slides one after the other; see :class:`PatchReader`.

    It offers ``read`` where its slides have patches, and ``features`` where they have features.
    """

    case: str
    parts: tuple[tuple[SlideReader, str], ...]
    """Reader and id of each slide, by id."""

    @property
    def path(self) -> Path:
        """Of the first slide's store."""
        return self.parts[0][0].path

    @property
    def recipe(self) -> dict[str, Any]:
        """Of the first slide's store."""
        return self.parts[0][0].recipe

    @property
    def slides(self) -> list[str]:
        """The case alone."""
        return [self.case]

    def __contains__(self, slide: str) -> bool:
        return slide == self.case

    def num_patches(self, slide: str) -> int:
        """Patches of all slides."""
        return sum(store.num_patches(own) for store, own in self.parts)

    @cached_property
    def _record(self) -> SlideRecord:
        records = [store.record(slide) for store, slide in self.parts]
        sides = {record.patch_px for record in records}
        if len(sides) > 1:
            raise UserError(
                f"the slides of case '{self.case}' have patches of {sorted(sides)} px\n"
                "  pack them alike"
            )
        first, widths = records[0], [record.width for record in records]
        known: dict[str, Any] = {
            "slide": self.case,
            "num_patches": self.num_patches(self.case),
            "height": max(record.height for record in records),
        }
        if any(record.coords is None for record in records):
            return replace(first, **known, coords=None, width=0)
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
        together = np.concatenate(coords).astype(np.int32)
        return replace(first, **known, coords=together, width=int(starts[-1]))

    def record(self, slide: str) -> SlideRecord:
        """The slides side by side: each one's coords lie to the right of those before it.

        Source, magnification and side of the patches are those of the first.

        Raises:
            UserError: their patches are of different sizes.
            DamagedDataError: one cannot be read.
        """
        return self._record

    def origins(self) -> tuple[list[str], NDArray[np.int32]]:
        """(N,) the slide of each patch, and (N, 2) its coords there, which all slides must have."""
        records = [store.record(slide) for store, slide in self.parts]
        slides = [record.slide for record in records for _ in range(record.num_patches)]
        return slides, np.concatenate([record.require_coords() for record in records])

    def read(self, slide: str, indices: Sequence[int] | NDArray[np.int64]) -> list[bytes]:
        """JPEG bytes of the given patches, in the order asked for."""
        wanted = np.asarray(indices, np.int64)
        found: list[bytes] = [b""] * len(wanted)
        for (store, own), start, stop in self._spans():
            rows = np.flatnonzero((start <= wanted) & (wanted < stop))
            values = cast(PatchReader, store).read(own, wanted[rows] - start) if len(rows) else []
            for row, value in zip(rows, values, strict=True):
                found[row] = value
        return found

    def borrow(
        self,
        slide: str,
        indices: Sequence[int] | NDArray[np.int64],
        work: Callable[[Sequence[bytes]], T],
    ) -> T:
        """What ``work`` makes of the JPEGs; of copies, here."""
        return work(self.read(slide, indices))

    def find_damage(self, slide: str) -> Iterator[str]:
        """Check every value of every slide."""
        for store, own in self.parts:
            yield from cast(PatchReader, store).find_damage(own)

    @property
    def width(self) -> int:
        """Of the features."""
        return cast(FeatureFiles, self.parts[0][0]).width

    def features(self, slide: str) -> Tensor:
        """(N, D) of all slides, single precision where one of them is."""
        return torch.cat([cast(FeatureFiles, store).features(own) for store, own in self.parts])

    def _spans(self) -> Iterator[tuple[tuple[SlideReader, str], int, int]]:
        start = 0
        for store, own in self.parts:
            stop = start + store.num_patches(own)
            yield (store, own), start, stop
            start = stop


def group_by_case(
    slides: Sequence[Slide], stores: Mapping[str, Sequence[SlideReader]]
) -> tuple[list[Slide], dict[str, list[SlideReader]]]:
    """Cases in place of slides: each is a "slide" by the case's id, over stores of its own.

    Args:
        slides: of the cohort, split by case.
        stores: of each slide, one a scale.

    Raises:
        UserError: the slides of a case have different labels.
    """
    cases = _cases(slides)
    _check_labels(cases, "data.unit=case needs one label a case", "or set data.unit=slide")
    joined: dict[str, list[SlideReader]] = {
        case: [
            CaseStore(case, tuple((stores[s.id][scale], s.id) for s in own))
            for scale in range(len(stores[own[0].id]))
        ]
        for case, own in cases.items()
    }
    made = [
        replace(own[0], id=case, centre=join_words(s.centre for s in own))
        for case, own in cases.items()
    ]
    return made, joined


def check_single(slides: Sequence[Slide]) -> list[str]:
    """For slides evaluated one by one whose label is the case's: a line where a case has several.

    Raises:
        UserError: the slides of a case have different labels.
    """
    cases = _cases(slides)
    _check_labels(cases, "the label is the case's", "or leave the slides out")
    if len(cases) == len(slides):
        return []
    return [
        f"{len(slides):,} slides of {len(cases):,} cases: each slide is evaluated by itself, so a case of "
        "several counts as often; data.unit=case takes them as one bag"
    ]


def _cases(slides: Sequence[Slide]) -> dict[str, list[Slide]]:
    cases: dict[str, list[Slide]] = {}
    for slide in sorted(slides, key=lambda slide: slide.id):
        cases.setdefault(slide.case, []).append(slide)
    return cases


def _check_labels(cases: Mapping[str, Sequence[Slide]], why: str, otherwise: str) -> None:
    apart = [
        f"case '{case}': " + ", ".join(f"{s.id} {'/'.join(s.target.values())}" for s in own)
        for case, own in cases.items()
        if len({tuple(s.target.items()) for s in own}) > 1
    ]
    if apart:
        raise UserError(
            f"{len(apart)} case(s) have slides of different labels: {why}\n{format_list(apart)}\n"
            f"  mend the table, {otherwise}"
        )
