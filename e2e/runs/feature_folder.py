"""The files of extracted features, in TRIDENT's layout."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from torch import Tensor

from e2e.errors import UserError, format_list
from e2e.files import read_json
from e2e.slides import file_name
from e2e.store.records import SlideRecord

IDENTITY = "source_identity"
"""Attribute of the coords: what the patches were cut from, see :class:`SlideRecord`."""


@dataclass(frozen=True)
class FeatureFolder:
    """Folder for the features of slides that were cut by one grid, in TRIDENT's layout."""

    out: Path
    magnification: float | None
    patch_px: int
    overlap: int
    encoder: str

    @property
    def grid(self) -> Path:
        """Folder of the grid, such as ``20x_256px_0px_overlap``."""
        scale = "unknown" if self.magnification is None else f"{self.magnification:g}x"
        return self.out / f"{scale}_{self.patch_px}px_{self.overlap}px_overlap"

    @property
    def folder(self) -> Path:
        """Folder of the features."""
        return self.grid / f"features_{self.encoder}"

    @property
    def recipe(self) -> Path:
        """File that says how the features were made."""
        return self.grid / f"_config_feats_{self.encoder}.json"

    def file(self, slide: str) -> Path:
        """File of one slide's features."""
        return self.folder / f"{file_name(slide)}.h5"


def magnification(mpp: float | None) -> float | None:
    """Return the magnification of patches with ``mpp`` micrometres per pixel: 20 at 0.5.

    Scanners that differ by up to 10 % count as the same. None if ``mpp`` is unknown.
    """
    if not mpp:
        return None
    exact = 10 / mpp
    nominal = 10 * 2.0 ** round(math.log2(exact / 10))
    return nominal if abs(exact / nominal - 1) <= 0.1 else round(exact, 2)


def slide_file(features: Tensor, record: SlideRecord, folder: FeatureFolder) -> bytes:
    """Return an HDF5 file as TRIDENT 0.3 writes it, with the text "None" for what is unknown."""
    scale = record.level0_px / record.patch_px if record.patch_px else 0.0
    level0_magnification = folder.magnification and round(folder.magnification * scale, 2)
    attributes: dict[str, Any] = {
        "patch_size": record.patch_px,
        "patch_size_level0": round(record.level0_px) or "None",
        "level0_magnification": level0_magnification or "None",
        "target_magnification": folder.magnification or "None",
        "overlap": folder.overlap,
        "name": record.slide,
        "savetodir": str(folder.grid),
        "level0_width": record.width or "None",
        "level0_height": record.height or "None",
        "mpp": record.mpp
        or "None",  # of the patches, in um per pixel; TRIDENT has no such attribute
    }
    if record.identity:
        attributes[IDENTITY] = record.identity
    content = io.BytesIO()
    # With HDF5's own checksums of data (Fletcher-32) and of metadata (since version 1.10 of the format).
    with h5py.File(content, "w", libver=("v110", "latest")) as h5:
        dataset = h5.create_dataset("features", data=features.numpy(), fletcher32=True)
        dataset.attrs.update(
            name=record.slide, savetodir=str(folder.folder), encoder=folder.encoder
        )
        if record.coords is not None:
            coords = h5.create_dataset(
                "coords", data=record.coords.astype(np.int64), fletcher32=True
            )
            coords.attrs.update(attributes)
    return content.getvalue()


def is_complete(file: Path, record: SlideRecord) -> bool:
    """Return whether a file has the features of the very patches of a record.

    A copy of it may have been cut short, and the slide may have been cut anew since.
    """
    try:
        with h5py.File(file, "r", locking=False) as h5:
            return _has_patches_of(h5, record)
    except (OSError, KeyError, ValueError):
        return False


def _has_patches_of(h5: Any, record: SlideRecord) -> bool:
    if len(h5["features"]) != record.num_patches:
        return False
    coords = h5.get("coords")
    if coords is None or record.coords is None:
        return coords is None and record.coords is None
    identity = coords.attrs.get(IDENTITY, record.identity)
    return identity == record.identity and np.array_equal(coords[()], record.coords)


def check_recipe(folder: FeatureFolder, recipe: Mapping[str, Any]) -> None:
    """Raise UserError if the folder holds features that were made in another way.

    Parameters
    ----------
    folder : FeatureFolder
        Where features are about to be written.
    recipe : mapping
        How they are made, as in the folder's own file.
    """
    if not folder.recipe.is_file():
        if any(folder.folder.glob("*.h5")):
            raise UserError(
                f"{folder.folder} holds features that another program made\n  choose another --out"
            )
        return
    earlier = read_json(folder.recipe)
    if earlier != recipe:
        differences = [
            f"{key}: {earlier.get(key)} in the folder, {value} now"
            for key, value in recipe.items()
            if earlier.get(key) != value
        ]
        raise UserError(
            f"{folder.folder} holds features that were made in another way\n{format_list(differences)}\n"
            "  choose another --out, or remove these"
        )
