"""What is known of a slide's patches, and the protocols of everything that reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from e2e.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class SlideRecord:
    """All that a store knows of a slide but the pixels."""

    slide: str
    coords: NDArray[np.int32] | None
    """(N,2) x, y of each patch's upper left corner, level-0 pixels. None in a
    :class:`PlacelessRecord` only."""
    level0_px: float
    """Side of a patch in level-0 pixels; 0 when unknown."""
    mpp: float | None
    """um per pixel of the stored patches; None where a folder of patches did not say."""
    patch_px: int
    """Side of the stored JPEGs in pixels."""
    width: int
    """Of the slide at level 0; 0 when unknown."""
    height: int
    source: str
    """File name the patches were cut from."""
    source_bytes: int

    @property
    def places(self) -> NDArray[np.int32]:
        """``coords``, for those who cannot do without; UserError where nobody knows them."""
        if self.coords is None:
            raise UserError(
                f"nobody knows the coords of slide '{self.slide}'\n"
                "  of patches, set data.coords to the folder of the h5 files that they were cut by; of"
                " features, extract them again with coords"
            )
        return self.coords

    @property
    def count(self) -> int:
        """Number of patches."""
        assert self.coords is not None, "a record without coords is a PlacelessRecord"
        return len(self.coords)


@dataclass(frozen=True)
class PlacelessRecord(SlideRecord):
    """Of a slide whose patches lie nobody knows where: ``coords`` is None."""

    patches: int
    """Number of patches; ``count`` elsewhere."""

    @property
    def count(self) -> int:
        """Number of patches."""
        return self.patches


class SlideReader(Protocol):
    """What is known of the slides in a file or folder, whether it holds patches or features.

    It can be copied into other processes, and read from several threads.
    """

    @property
    def path(self) -> Path:
        """Of the file or folder."""
        ...

    @property
    def recipe(self) -> dict[str, Any]:
        """How the patches or features were made, as far as known."""
        ...

    @property
    def slides(self) -> list[str]:
        """Ids of the slides."""
        ...

    def __contains__(self, slide: str) -> bool: ...

    def count(self, slide: str) -> int:
        """Number of patches of a slide."""
        ...

    def record(self, slide: str) -> SlideRecord:
        """What is known of a slide; DamagedDataError when it cannot be read."""
        ...


class PatchReader(SlideReader, Protocol):
    """What patches are read from: :class:`PatchStore`, and the files of others read in place."""

    def read(self, slide: str, indices: Sequence[int] | NDArray[np.int64]) -> list[bytes]:
        """JPEG bytes of the given patches, in the order asked for.

        Raises:
            DamagedDataError: names the slide and the patch that is missing, empty or unreadable.
        """
        ...

    def lend(
        self,
        slide: str,
        indices: Sequence[int] | NDArray[np.int64],
        work: Callable[[Sequence[bytes | memoryview]], T],
    ) -> T:
        """What ``work`` makes of the JPEGs, which end with it; it may be called again.

        Raises:
            DamagedDataError: as of :meth:`read`, and what ``work`` raises.
        """
        ...

    def damage(self, slide: str) -> Iterator[str]:
        """Check every value of a slide; yields a line per fault."""
        ...
