"""Cut a slide into patches of a given size in micrometres per pixel; pure arithmetic."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from e2e.errors import UserError

MAX_MAGNIFICATION = 1.1
"""A slide may be coarser than the patches by this factor: 20x of scanners is 0.45 to 0.55 um/px."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How slides are cut into patches.

    Raises
    ------
    UserError
        A value is out of range.
    """

    mpp: float = 0.5
    """Micrometres per pixel of the stored patches."""
    patch_px: int = 256
    """Side of a stored patch in pixels."""
    overlap: int = 0
    """Pixels of a stored patch that it shares with its neighbour."""
    tissue: float = 0.25
    """Minimum tissue fraction of a patch; 0 takes all patches of the grid."""

    def __post_init__(self) -> None:
        if not 0 < self.mpp < math.inf:
            raise UserError(f"mpp must be micrometres per pixel, more than 0, not {self.mpp}")
        if not 16 <= self.patch_px <= 8192:
            raise UserError(f"patch size must be 16 to 8192 pixels, not {self.patch_px}")
        if not 0 <= self.overlap <= 0.9 * self.patch_px:
            raise UserError(
                f"overlap must be in pixels of the patch, 0 to {int(0.9 * self.patch_px)} "
                f"for a patch of {self.patch_px}, not {self.overlap}"
            )
        if not 0 <= self.tissue <= 1:
            raise UserError(
                f"tissue must be a fraction of the patch from 0 to 1, not {self.tissue}"
            )

    def recipe(self) -> dict[str, Any]:
        """Return the part of a store's recipe that says how slides were cut; JSON values."""
        return asdict(self)

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> Tiling:
        """Return the tiling of a store, to cut a new slide in the same way.

        Parameters
        ----------
        recipe
            The recipe of the store.

        Raises
        ------
        UserError
            The patches of the store were not cut from slides by this program.
        """
        if recipe.get("source") != "slides":
            raise UserError(
                "the patches of the store were not cut from slides by this program "
                f"(its source is '{recipe.get('source')}'), so new slides cannot be cut like them\n"
                "  pack the new slides yourself, in the way the training store was made"
            )
        return cls(
            mpp=float(recipe["mpp"]),
            patch_px=int(recipe["patch_px"]),
            overlap=int(recipe["overlap"]),
            tissue=float(recipe["tissue"]),
        )

    def positions(self, width: int, height: int, level0_px: float) -> int:
        """Return the number of patches in a slide that is all tissue.

        Parameters
        ----------
        width, height
            Size of the slide in level-0 pixels.
        level0_px
            Side of a patch in level-0 pixels.
        """
        stride = level0_px * (1 - self.overlap / self.patch_px)
        columns, rows = (len(_positions(length, level0_px, stride)) for length in (width, height))
        return columns * rows

    def level0_px(self, slide_mpp: float) -> float:
        """Return the side of a patch in level-0 pixels of a slide.

        Parameters
        ----------
        slide_mpp
            Micrometres per level-0 pixel of the slide.

        Raises
        ------
        UserError
            The slide is coarser than the patches, which would have to be magnified.
        """
        if slide_mpp > self.mpp * MAX_MAGNIFICATION:
            raise UserError(
                f"the slide has {slide_mpp:g} um per pixel, coarser than --mpp {self.mpp:g}, so its patches"
                f" would have to be magnified\n  use --mpp {slide_mpp:g} or more, or leave the slide out"
            )
        return self.patch_px * self.mpp / slide_mpp


def grid(
    mask: NDArray[np.bool_],
    mask_scale: float,
    width: int,
    height: int,
    slide_mpp: float,
    tiling: Tiling,
) -> NDArray[np.int32]:
    """Return the upper left corners of the patches with enough tissue.

    The grid starts at the slide's corner. A patch that would reach over the right or lower edge is
    left out. A slide smaller than a patch has one patch, at 0.

    Parameters
    ----------
    mask
        (h, w), True on tissue; it ends at the slide's edge or a little beyond.
    mask_scale
        Level-0 pixels per mask pixel.
    width, height
        Size of the slide in level-0 pixels.
    slide_mpp
        Micrometres per level-0 pixel.
    tiling
        How to cut.

    Returns
    -------
    ndarray of int32
        (N, 2) x, y in level-0 pixels, row by row.

    Raises
    ------
    UserError
        The slide is coarser than the patches.
    """
    side = tiling.level0_px(slide_mpp)
    stride = side * (1 - tiling.overlap / tiling.patch_px)
    xs, ys = _positions(width, side, stride), _positions(height, side, stride)
    fraction = tissue_fraction(mask, mask_scale, xs, ys, side, width, height)
    rows, columns = np.nonzero(fraction >= tiling.tissue - 1e-9)
    return np.stack([xs[columns], ys[rows]], axis=1).astype(np.int32)


def tissue_fraction(
    mask: NDArray[np.bool_],
    mask_scale: float,
    xs: NDArray[np.int64],
    ys: NDArray[np.int64],
    side: float,
    width: int,
    height: int,
) -> NDArray[np.float64]:
    """Return the tissue fraction of each patch, of its part inside the slide.

    Exact also for patches that cut through mask pixels: the summed-area table of a mask is linear
    between its points.

    Parameters
    ----------
    mask
        (h, w), True on tissue.
    mask_scale
        Level-0 pixels per mask pixel.
    xs, ys
        Left edges of the columns of patches and upper edges of the rows, in level-0 pixels.
    side
        Side of a patch in level-0 pixels.
    width, height
        Size of the slide in level-0 pixels.

    Returns
    -------
    ndarray of float64
        (len(ys), len(xs)) fractions from 0 to 1.
    """
    table = np.pad(mask.astype(np.float64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    right, low = np.minimum(xs + side, width), np.minimum(ys + side, height)
    bands = _between(table, low / mask_scale) - _between(table, ys / mask_scale)
    areas = _between(bands.T, right / mask_scale) - _between(bands.T, xs / mask_scale)
    return areas.T * mask_scale**2 / np.outer(low - ys, right - xs)


def _positions(length: int, side: float, stride: float) -> NDArray[np.int64]:
    """Return whole-pixel positions along one axis; each is rounded down alone, so no error adds up."""
    count = 1 if length < side else math.floor((length - side) / stride + 1e-9) + 1
    return np.floor(np.arange(count) * stride + 1e-9).astype(np.int64)


def _between(table: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rows of ``table`` at fractional indices; the last row beyond it."""
    at = np.minimum(at, len(table) - 1)
    row = np.minimum(at.astype(np.int64), max(len(table) - 2, 0))
    part = (at - row)[:, None]
    return table[row] * (1 - part) + table[row + 1] * part


def coords_from_names(
    stems: Sequence[str], slide: str, patch_px: int
) -> tuple[NDArray[np.int32], float, bool]:
    """Return the coords of patches from their file names.

    Names are used if each has exactly two whole numbers besides the slide's id, x before y, and no two
    patches have the same. Numbers that fill a range without gaps are columns and rows of a grid.
    Otherwise the coords are invented: a square of patches side by side, in the order of the names.

    Parameters
    ----------
    stems
        File names of the patches without suffix.
    slide
        Id of the slide, which is removed from the names.
    patch_px
        Side of the patches in pixels.

    Returns
    -------
    coords : ndarray of int32
        (N, 2) x, y in level-0 pixels.
    side : float
        Side of a patch in level-0 pixels: the distance between neighbours if that is more than
        ``patch_px``, else ``patch_px``.
    are_true : bool
        False if the coords are invented.
    """
    numbers = [re.findall(r"\d+", stem.replace(slide, "", 1)) for stem in stems]
    if all(len(n) == 2 and max(map(len, n)) <= 7 for n in numbers):
        coords = np.array(numbers, np.int64).reshape(-1, 2)
        if len(np.unique(coords, axis=0)) == len(coords):
            axes = [np.unique(axis) for axis in coords.T]
            if len(coords) > 1 and all(len(a) > (a[-1] - a[0]) / 2 for a in axes):
                return (coords * patch_px).astype(np.int32), float(patch_px), True
            gaps = np.concatenate([np.diff(axis) for axis in axes] + [[0]])
            side = max(patch_px, gaps[gaps > 0].min(initial=1 << 30) % (1 << 30))
            return coords.astype(np.int32), float(side), True
    index = np.arange(len(stems))
    columns = max(1, math.isqrt(len(stems)))
    coords = np.stack([index % columns, index // columns], axis=1) * patch_px
    return coords.astype(np.int32), float(patch_px), len(stems) == 1


def sizes_in_names(stems: Sequence[str]) -> list[str]:
    """Return the sizes in file names such as ``12_size256``, if they differ; otherwise nothing."""
    sizes = {match[1] for stem in stems for match in re.finditer(r"_size(\d+)(?=_|$)", stem)}
    return sorted(sizes, key=int) if len(sizes) > 1 else []
