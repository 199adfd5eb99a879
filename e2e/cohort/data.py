"""The two kinds of data that a cohort is matched with: patches and frozen features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from e2e.cohort.cases import CaseFeatures, CasePatches
from e2e.cohort.leaks import check_copied_features, check_copied_patches
from e2e.cohort.match import check_patch_sizes
from e2e.features.reader import FeatureReader
from e2e.slides import Slide
from e2e.store.records import PatchReader, SlideReader

R = TypeVar("R", bound=SlideReader)


class CohortData(Protocol[R]):
    """The readers of a cohort, and what is checked of them once they are matched with slides."""

    @property
    def scales(self) -> Sequence[Sequence[R]]:
        """The readers of each magnification, the main one first."""
        ...

    def check(self, slides: Sequence[Slide], readers: Mapping[str, Sequence[R]]) -> None:
        """Check the readers of the slides of all splits.

        Parameters
        ----------
        slides
            The slides with their splits.
        readers
            Slide id -> its reader at each magnification.

        Raises
        ------
        UserError
            Patches have different sizes, or a slide is in two splits under different names.
        """
        ...

    def check_content(self, slide: str, reader: R) -> None:
        """Read what a run would read of a slide; UserError if it cannot be used."""
        ...

    def join_case(self, case: str, parts: tuple[tuple[R, str], ...]) -> R:
        """Return the reader of a case from the reader and id of each of its slides."""
        ...


@dataclass(frozen=True)
class PatchData:
    """Patch stores, at one or several magnifications; see :class:`CohortData`."""

    scales: Sequence[Sequence[PatchReader]]
    """The stores of each magnification, the main one first."""
    size: int | None = None
    """Side in pixels that all patches are resized to; None if they stay as stored."""

    def check(self, slides: Sequence[Slide], readers: Mapping[str, Sequence[PatchReader]]) -> None:
        """Check that patches have one size and that no slide was copied to another split."""
        check_patch_sizes(readers, self.size)
        check_copied_patches(slides, {slide.id: readers[slide.id][0] for slide in slides})

    def check_content(self, slide: str, reader: PatchReader) -> None:
        """Read the record of a slide. Its patches are compared with their checksums when they are read."""
        reader.record(slide)

    def join_case(self, case: str, parts: tuple[tuple[PatchReader, str], ...]) -> PatchReader:
        """Return the reader of a case from the reader and id of each of its slides."""
        return CasePatches(case, parts)


@dataclass(frozen=True)
class FeatureData:
    """Frozen features; see :class:`CohortData`."""

    scales: Sequence[Sequence[FeatureReader]]
    """The readers of the features, as the only magnification."""

    def check(
        self, slides: Sequence[Slide], readers: Mapping[str, Sequence[FeatureReader]]
    ) -> None:
        """Check that no slide was copied to another split."""
        check_copied_features(slides, {slide.id: readers[slide.id][0] for slide in slides})

    def check_content(self, slide: str, reader: FeatureReader) -> None:
        """Read all features of a slide."""
        reader.features(slide)

    def join_case(self, case: str, parts: tuple[tuple[FeatureReader, str], ...]) -> FeatureReader:
        """Return the reader of a case from the reader and id of each of its slides."""
        return CaseFeatures(case, parts)
