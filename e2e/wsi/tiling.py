"""How a slide is cut into patches: pure arithmetic in which um per pixel is the truth."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from e2e.errors import UserError

FINER = 1.1
"""A slide may be this much coarser than wanted: scanners' 20x lies between 0.45 and 0.55 um/px."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How slides are cut. Raises UserError where a value makes no sense."""

    mpp: float = 0.5
    """um per pixel of the stored patches."""
    patch_px: int = 256
    """Side of a stored patch in its own pixels."""
    overlap: int = 0
    """Pixels of the stored patch that neighbours share."""
    tissue: float = 0.25
    """Least fraction of a patch that is tissue; 0 takes every place of the grid."""

    def __post_init__(self) -> None:
        if not 0 < self.mpp < math.inf:
            raise UserError(f"mpp is um per pixel, more than 0, not {self.mpp}")
        if not 16 <= self.patch_px <= 8192:
            raise UserError(f"patch size is 16 to 8192 pixels, not {self.patch_px}")
        if not 0 <= self.overlap <= 0.9 * self.patch_px:
            raise UserError(
                f"overlap is in pixels of the patch, 0 to {int(0.9 * self.patch_px)} "
                f"for a patch of {self.patch_px}, not {self.overlap}"
            )
        if not 0 <= self.tissue <= 1:
            raise UserError(f"tissue is a fraction of the patch from 0 to 1, not {self.tissue}")

    def recipe(self) -> dict[str, Any]:
        """The part of a store's recipe that says how slides were cut; JSON values."""
        return asdict(self)

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> Tiling:
        """The tiling of a store, to cut a new slide in the same way.

        Raises:
            UserError: the store's patches were not cut from slides by this program.
        """
        if recipe.get("source") != "slides":
            raise UserError(
                "the store was not cut by a grid of this program "
                f"(its source is '{recipe.get('source')}'), so new slides cannot be cut like it\n"
                "  pack the new slides yourself, in the way the training store was made"
            )
        return cls(
            mpp=float(recipe["mpp"]),
            patch_px=int(recipe["patch_px"]),
            overlap=int(recipe["overlap"]),
            tissue=float(recipe["tissue"]),
        )

    def level0_px(self, slide_mpp: float) -> float:
        """Side of a patch in level-0 pixels of a slide with ``slide_mpp`` um per pixel.

        Raises:
            UserError: the slide is coarser than wanted, so that patches would show made-up detail.
        """
        if slide_mpp > self.mpp * FINER:
            raise UserError(
                f"the slide has {slide_mpp:g} um per pixel, coarser than the {self.mpp:g} "
                "asked for: its patches would have to be magnified; ask for a coarser --mpp"
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
    """Upper left corners of the patches that stand on tissue.

    The grid starts at the slide's corner. A patch that would hang over the right or lower edge is
    left out, unless the slide is smaller than a patch: then there is one, at 0.

    Args:
        mask: (h, w) True on tissue; cut off at the slide's edge, or reaching a little over it.
        mask_scale: level-0 pixels per mask pixel.
        width: of the slide at level 0.
        height: of the slide at level 0.
        slide_mpp: um per level-0 pixel.
        tiling: how to cut.

    Returns:
        (N, 2) int32 x, y in level-0 pixels, row by row.
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
    """(len(ys), len(xs)) fraction of tissue in each patch, of its part inside the slide.

    Exact for patches that cut through mask pixels: the summed area table of a mask is linear
    between its points.
    """
    table = np.pad(mask.astype(np.float64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    right, low = np.minimum(xs + side, width), np.minimum(ys + side, height)
    bands = _between(table, low / mask_scale) - _between(table, ys / mask_scale)
    areas = _between(bands.T, right / mask_scale) - _between(bands.T, xs / mask_scale)
    return areas.T * mask_scale**2 / np.outer(low - ys, right - xs)


def _positions(length: int, side: float, stride: float) -> NDArray[np.int64]:
    """Whole-pixel positions along one axis; each rounded down on its own, so no error adds up."""
    count = 1 if length < side else math.floor((length - side) / stride + 1e-9) + 1
    return np.floor(np.arange(count) * stride + 1e-9).astype(np.int64)


def _between(table: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of ``table`` at fractional indices; beyond the last row, the last row."""
    at = np.minimum(at, len(table) - 1)
    row = np.minimum(at.astype(np.int64), max(len(table) - 2, 0))
    part = (at - row)[:, None]
    return table[row] * (1 - part) + table[row + 1] * part


def coords_from_names(
    stems: Sequence[str], slide: str, patch_px: int
) -> tuple[NDArray[np.int32], float]:
    """Places of a slide's patches as their file names tell them.

    Names count when each holds exactly two whole numbers beside the slide's id, x before y, and
    no two patches share a place. Numbers that fill a range without gaps are columns and rows of a
    grid. Otherwise the places are made up: a square of patches side by side, in the names' order.

    Returns:
        coords (N, 2) int32 in level-0 pixels and the side of a patch there: the distance between
        neighbours where that is more than ``patch_px``, else ``patch_px``.
    """
    numbers = [re.findall(r"\d+", stem.replace(slide, "", 1)) for stem in stems]
    if all(len(n) == 2 and max(map(len, n)) <= 7 for n in numbers):
        coords = np.array(numbers, np.int64).reshape(-1, 2)
        if len(np.unique(coords, axis=0)) == len(coords):
            axes = [np.unique(axis) for axis in coords.T]
            if len(coords) > 1 and all(len(a) > (a[-1] - a[0]) / 2 for a in axes):
                return (coords * patch_px).astype(np.int32), float(patch_px)
            gaps = np.concatenate([np.diff(axis) for axis in axes] + [[0]])
            side = max(patch_px, gaps[gaps > 0].min(initial=1 << 30) % (1 << 30))
            return coords.astype(np.int32), float(side)
    index = np.arange(len(stems))
    columns = max(1, math.isqrt(len(stems)))
    places = np.stack([index % columns, index // columns], axis=1) * patch_px
    return places.astype(np.int32), float(patch_px)
