"""Patch coordinates in the HDF5 files of CLAM and TRIDENT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from e2e.errors import DamagedDataError, UserError


@dataclass(frozen=True)
class PatchCoords:
    """The content of a coordinate file."""

    coords: NDArray[np.int64]
    """(N, 2) x, y of the upper left corner of each patch, in level-0 pixels."""
    level0_px: float
    """Side of a patch in level-0 pixels."""
    patch_px: int
    """Side of a patch in pixels at the magnification that the tool was asked for."""
    slide_size: tuple[int, int] | None
    """Width and height of the slide at level 0; None if the tool did not save it."""


def find_coords_files(folder: Path) -> list[Path]:
    """Return the coordinate files of a folder, or of its subfolder ``patches``, sorted by name.

    Raises
    ------
    UserError
        If there is none.
    """
    for candidate in (folder, folder / "patches"):
        files = sorted(candidate.glob("*.h5"))
        if files:
            return files
    raise UserError(
        f"no .h5 file in {folder} or {folder / 'patches'}\n"
        "  give the folder 'patches' that CLAM or TRIDENT wrote"
    )


def read_coords(file: Path) -> PatchCoords:
    """Read the patch coordinates of a slide.

    CLAM's ``patch_size`` is in pixels of ``patch_level``, whose ``downsample`` is in the file.
    TRIDENT's is at the target magnification, with ``patch_size_level0`` beside it.

    Parameters
    ----------
    file : Path
        An .h5 file of CLAM or TRIDENT.

    Raises
    ------
    DamagedDataError
        If it is not HDF5, has no dataset ``coords``, or has the attributes of neither tool.
    """
    try:
        with h5py.File(file) as h5:
            dataset = h5["coords"]
            coords = np.asarray(dataset)
            attrs: dict[str, Any] = dict(dataset.attrs)
    except (OSError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise DamagedDataError(f"{file} has no readable dataset 'coords': {error}") from error
    try:
        patch_px = int(attrs["patch_size"])
        if "patch_size_level0" in attrs:
            level0_px = float(int(attrs["patch_size_level0"]))
        else:
            downsample = float(np.ravel(attrs["downsample"])[0])
            level0_px = patch_px * downsample * float(attrs.get("custom_downsample", 1))
    except (LookupError, ValueError, TypeError, OverflowError) as error:
        raise DamagedDataError(
            f"{file}: the attributes of 'coords' are neither CLAM's nor TRIDENT's ({error})\n"
            f"  it has: {', '.join(sorted(attrs)) or 'none'}"
        ) from error
    coords = coords.reshape(0, 2) if coords.size == 0 else coords
    if coords.ndim != 2 or coords.shape[1] != 2 or level0_px < 1 or patch_px < 1:
        raise DamagedDataError(
            f"{file}: coords of shape {coords.shape} with patches of {patch_px} px "
            f"({level0_px:g} px at level 0) are not valid"
        )
    # TRIDENT writes the text "None" for an unknown size.
    sides = [str(attrs.get(f"level0_{side}")) for side in ("width", "height")]
    slide_size = (int(sides[0]), int(sides[1])) if all(map(str.isdecimal, sides)) else None
    return PatchCoords(coords.astype(np.int64), level0_px, patch_px, slide_size)
