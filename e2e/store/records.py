"""The record of a slide's patches, and the protocols of everything that reads slides or patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from e2e.errors import UserError

T = TypeVar("T")

Indices = Sequence[int] | NDArray[np.int64]
"""Patch indices of one slide, counted from 0."""


@dataclass(frozen=True)
class SlideRecord:
    """Everything a reader knows about the patches of a slide except the patches themselves.

    Raises
    ------
    ValueError
        If `coords` is not of shape (`num_patches`, 2).
    """

    slide: str
    """Id of the slide."""
    num_patches: int
    """Number of patches, N."""
    coords: NDArray[np.int32] | None = None
    """(N, 2) x, y of the upper left corner of each patch, in level-0 pixels. None if unknown."""
    level0_px: float = 0.0
    """Side of a patch in level-0 pixels. 0 if unknown."""
    mpp: float | None = None
    """Micrometres per pixel of the patches. None if unknown."""
    patch_px: int = 0
    """Side of the patches in pixels. 0 if unknown."""
    width: int = 0
    """Width of the slide at level 0, in pixels. 0 if unknown."""
    height: int = 0
    """Height of the slide at level 0, in pixels. 0 if unknown."""
    source: str = ""
    """Name of the file that the patches or features come from."""
    source_bytes: int = 0
    """Size of that file in bytes."""
    identity: str = ""
    """Fingerprint of what the patches were cut from, and of options of this slide alone; empty if unknown."""

    def __post_init__(self) -> None:
        if self.coords is not None and self.coords.shape != (self.num_patches, 2):
            raise ValueError(
                f"slide '{self.slide}' has {self.num_patches} patches, but coords of shape "
                f"{self.coords.shape}"
            )

    def require_coords(self) -> NDArray[np.int32]:
        """Return `coords`, which must be known.

        Returns
        -------
        ndarray of int32, shape (num_patches, 2)
            Upper left corners in level-0 pixels.

        Raises
        ------
        UserError
            If the slide has no coordinates.
        """
        if self.coords is None:
            raise UserError(
                f"slide '{self.slide}' has no patch coordinates\n"
                "  Set data.coords to the folder of the .h5 files it was cut by. "
                "Extract features again if they were saved without coordinates."
            )
        return self.coords

    def slice(self, start: int, stop: int) -> SlideRecord:
        """Return the record of patches `start` to `stop` alone.

        Parameters
        ----------
        start, stop : int
            Patch indices, 0 <= start <= stop <= num_patches.
        """
        coords = None if self.coords is None else self.coords[start:stop]
        return replace(self, num_patches=stop - start, coords=coords)


class SlideReader(Protocol):
    """A file or folder that holds the patches or the features of slides.

    A reader can be copied into other processes and used from several threads.
    """

    @property
    def path(self) -> Path:
        """The file or folder."""
        ...

    @property
    def recipe(self) -> dict[str, Any]:
        """How the patches or features were made, as far as the file says; JSON values only."""
        ...

    @property
    def slides(self) -> list[str]:
        """Ids of the slides."""
        ...

    def __contains__(self, slide: str) -> bool: ...

    def num_patches(self, slide: str) -> int:
        """Return the number of patches of a slide."""
        ...

    def record(self, slide: str) -> SlideRecord:
        """Return the record of a slide.

        Raises
        ------
        DamagedDataError
            If the record cannot be read.
        """
        ...

    def joined_slides(self, slide: str) -> list[str]:
        """Return the ids of the slides that a bag joins: that of the slide itself, or all of a case."""
        ...

    def slide_records(self, slide: str) -> list[SlideRecord]:
        """Return the records of :meth:`joined_slides`."""
        ...


class PatchReader(SlideReader, Protocol):
    """A reader of JPEG patches, such as :class:`e2e.store.lmdb.PatchStore`."""

    def read(self, slide: str, indices: Indices) -> list[bytes]:
        """Return the JPEG bytes of patches, in the order of `indices`.

        Raises
        ------
        DamagedDataError
            If a patch is missing, empty or unreadable; the message names slide and patch.
        """
        ...

    def borrow(
        self, slide: str, indices: Indices, work: Callable[[Sequence[bytes | memoryview]], T]
    ) -> T:
        """Call `work` with the JPEG bytes of patches, without copying them where possible.

        Parameters
        ----------
        slide : str
            Id of the slide.
        indices : sequence of int
            Patches, in any order.
        work : callable
            Takes the buffers, which are valid until it returns. It may be called again.

        Returns
        -------
        object
            What `work` returned.

        Raises
        ------
        DamagedDataError
            As :meth:`read`, and whatever `work` raises.
        """
        ...

    def checksums(self, slide: str) -> NDArray[np.uint32] | None:
        """Return the stored CRC-32 of every JPEG, shape (N,); None if none are stored."""
        ...

    def find_damage(self, slide: str) -> Iterator[str]:
        """Check everything stored of a slide and yield one line per fault."""
        ...
