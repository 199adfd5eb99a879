"""The layouts in which several tools save features.

A format is one function in :data:`FEATURE_FORMATS`. It takes a path and returns a :class:`Layout`, which
maps slides to files, or None if the path holds something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from e2e.errors import UserError, format_list
from e2e.features.arrays import (
    ARRAY_FILES,
    SlideArrays,
    arrays_of_h5,
    h5_error,
    list_files,
    open_h5,
    open_item,
    peek_h5,
    plain_values,
    read_doubles,
    read_number,
)
from e2e.registry import Registry

FEATURE_NAMES = ("features", "feats")
"""Names of the features in an HDF5 file or a dict of tensors."""

ENCODER_ATTRIBUTES = ("encoder", "extractor")
"""Attributes that name the encoder of features."""


class PatchGeometry(NamedTuple):
    """Positions and sizes of the patches of a slide, as in :class:`e2e.store.records.SlideRecord`."""

    coords: NDArray[np.float64]
    """(N, 2) level-0 pixels."""
    level0_px: float = 0.0
    patch_px: int = 0
    mpp: float | None = None
    width: int = 0
    height: int = 0


def level0_geometry(arrays: SlideArrays) -> PatchGeometry | None:
    """Return coords in level-0 pixels, with what TRIDENT's attributes say; None without coords."""
    attrs = arrays.attrs
    if arrays.coords is None:
        return None
    return PatchGeometry(
        read_doubles(arrays.coords),
        level0_px=float(int(read_number(attrs, "patch_size_level0"))),
        patch_px=int(read_number(attrs, "patch_size")),
        mpp=read_number(attrs, "mpp") or None,
        width=int(read_number(attrs, "level0_width")),
        height=int(read_number(attrs, "level0_height")),
    )


@dataclass(frozen=True)
class Layout:
    """How the features of slides lie in files."""

    files: dict[str, Path]
    """Slide -> its file."""
    names: tuple[str, ...] = FEATURE_NAMES
    """Names of the features in a file; the first that exists is used."""
    is_grouped: bool = False
    """Whether each slide is a group of its HDF5 file."""
    geometry: Callable[[SlideArrays], PatchGeometry | None] = level0_geometry
    """Returns the positions of a slide's patches; None if they are unknown."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """How the features were made, as far as the files say; JSON values only."""

    @contextmanager
    def open(self, slide: str) -> Iterator[SlideArrays]:
        """Open the arrays of a slide for the block; errors are those of the file's library."""
        file = self.files[slide]
        if file.suffix.lower() in ARRAY_FILES:
            yield ARRAY_FILES[file.suffix.lower()](file, self.names)
            return
        with open_h5(file) as h5:
            yield arrays_of_h5(
                open_item(h5, slide) if self.is_grouped else h5, self.names, h5.attrs
            )


FEATURE_FORMATS: Registry[Layout | None] = Registry("feature format")
"""Name -> function: path -> :class:`Layout`, or None if the path holds something else."""


@FEATURE_FORMATS.register("trident")
def trident(path: Path) -> Layout | None:
    """TRIDENT 0.3: ``features_<encoder>/<slide>.h5``, or a folder that holds one such folder.

    It may also hold one grid's folder with one such folder. A file has ``features`` with the attribute
    ``encoder``, and ``coords`` (level-0 pixels) with the attributes of the grid.
    """
    patterns = ("features_*", "*x_*px_*px_overlap/features_*")
    folders = sorted(p for pattern in patterns for p in path.glob(pattern) if p.is_dir())
    if len(folders) > 1:
        names = (str(folder.relative_to(path)) for folder in folders)
        raise UserError(
            f"{path} holds features of {len(folders)} encoders or grids\n{format_list(names)}\n"
            "  give one of these folders"
        )
    files = list_files(folders[0] if folders else path, ".h5")
    if folders and not files:
        return _array_files(folders[0], {"encoder": folders[0].name.removeprefix("features_")})
    names, attrs = peek_h5(files.values())
    if "features" not in names or not {"encoder", "patch_size_level0"} & attrs.keys():
        return None
    recipe = plain_values(
        attrs, ("encoder", "target_magnification", "patch_size", "overlap", "mpp")
    )
    recipe |= _read_weights_digest(next(iter(files.values())).parent)
    return Layout(files, ("features",), recipe=recipe)


def _read_weights_digest(folder: Path) -> dict[str, Any]:
    """Return what e2e extract wrote about the encoder's weights beside a folder of features."""
    config = folder.with_name(f"_config_feats_{folder.name.removeprefix('features_')}.json")
    try:
        return {"weights": json.loads(config.read_bytes())["weights"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}  # TRIDENT's own file does not name them


@FEATURE_FORMATS.register("clam")
def clam(path: Path) -> Layout | None:
    """CLAM: ``h5_files/<slide>.h5`` without attributes, ``pt_files/<slide>.pt``; or one of the two.

    Coords are in level-0 pixels. Only the h5 files have them, so an h5 file is preferred.
    """
    h5_files = _first_files(path / "h5_files", path / "h5_coords_files", path)
    pt_files = list_files(path / "pt_files", ".pt") if path.name != "pt_files" else {}
    names, attrs = peek_h5(h5_files.values())
    is_clam = "features" in names and not {"encoder", "patch_size_level0"} & attrs.keys()
    if (h5_files and not is_clam) or not (h5_files or pt_files):
        return None
    return Layout({**pt_files, **h5_files})


def _first_files(*folders: Path) -> dict[str, Path]:
    """Return the .h5 files of the first folder that has any; AttriMIL names one h5_coords_files."""
    return next(filter(None, (list_files(folder, ".h5") for folder in folders)), {})


@FEATURE_FORMATS.register("stamp")
def stamp(path: Path) -> Layout | None:
    """STAMP 2: ``<slide>.h5`` with ``feats`` (or ``patch_embeddings``) and ``coords`` in micrometres."""
    files = list_files(path, ".h5")
    names, attrs = peek_h5(files.values())
    if not {"feats", "patch_embeddings"} & names:
        return None
    kind = attrs.get("feat_type", "tile")
    if kind != "tile":
        raise UserError(
            f"{path} holds STAMP's embeddings of whole {kind}s\n  give features of patches instead"
        )
    recipe = plain_values(attrs, ("extractor", "stamp_version", "tile_size_um", "tile_size_px"))
    return Layout(files, ("feats", "patch_embeddings"), geometry=stamp_geometry, recipe=recipe)


def stamp_geometry(arrays: SlideArrays) -> PatchGeometry | None:
    """Return STAMP's coords in pixels of the patches themselves, as if that were level 0."""
    um, px = (read_number(arrays.attrs, f"tile_size_{unit}") for unit in ("um", "px"))
    if arrays.coords is None or arrays.attrs.get("unit") != "um" or not um or not px:
        return None  # older files do not name the unit of their coords
    mpp = um / px
    return PatchGeometry(read_doubles(arrays.coords) / mpp, level0_px=px, patch_px=int(px), mpp=mpp)


@FEATURE_FORMATS.register("aem")
def aem(path: Path) -> Layout | None:
    """AEM: one HDF5 file, with a group per slide of ``feat``, ``coords`` (level-0 pixels) and ``label``.

    Its published name, ``patch_feats_pretrain_<encoder>.h5``, names the encoder.
    """
    if not path.is_file() or path.suffix not in (".h5", ".hdf5"):
        return None
    names = ("feat", *FEATURE_NAMES)
    try:
        with open_h5(path) as h5:
            slides = {str(s): g for s in h5 if isinstance(g := open_item(h5, str(s)), h5py.Group)}
            if not set(names) & set(next(iter(slides.values()), ())):
                return None
            encoder = path.stem.partition("patch_feats_pretrain_")[2]
            recipe = {"encoder": encoder} if encoder else {}
            return Layout(dict.fromkeys(slides, path), names, is_grouped=True, recipe=recipe)
    except (OSError, ValueError, LookupError) as error:
        raise h5_error(path, error) from error


@FEATURE_FORMATS.register("plain")
def plain(path: Path) -> Layout | None:
    """A folder of ``<slide>.pt`` (a tensor, an array, or a dict with one of them) or ``<slide>.npy``."""
    return _array_files(path, {}) if path.is_dir() else None


def _array_files(folder: Path, recipe: dict[str, Any]) -> Layout | None:
    by_suffix = {suffix: list_files(folder, suffix) for suffix in ARRAY_FILES}
    files = {slide: file for group in by_suffix.values() for slide, file in group.items()}
    if sum(map(len, by_suffix.values())) > len(files):
        raise UserError(
            f"{folder} holds the same slides as {' and '.join(map(str, by_suffix))}\n"
            "  keep only one of the two"
        )
    return Layout(files, recipe=recipe) if files else None
