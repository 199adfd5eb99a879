"""The layouts in which other tools and this one keep features."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.errors import DamagedDataError, UserError, format_list
from e2e.registry import Registry

NAMES = ("features", "feats")
"""What features are called in an HDF5 file or a dict of tensors."""


ENCODER = ("encoder", "extractor")
"""The attributes that name their encoder."""


class Entry(NamedTuple):
    """What a file has of one slide, while the file is open. Only ``[...]`` reads values."""

    features: Any
    """(N, D): an HDF5 dataset, an array or a tensor."""
    coords: Any
    """(N, 2) the same; None where the file has none."""
    attrs: Mapping[str, Any]
    """What the file says of them."""


class Places(NamedTuple):
    """Where patches lie; see :class:`SlideRecord`."""

    coords: NDArray[np.float64]
    """(N, 2) level-0 pixels."""
    level0_px: float = 0.0
    patch_px: int = 0
    mpp: float | None = None
    width: int = 0
    height: int = 0


def level0_places(entry: Entry) -> Places | None:
    """Coords in level-0 pixels, with what TRIDENT's attributes say of the patches, if they are there."""
    attrs = entry.attrs
    if entry.coords is None:
        return None
    return Places(
        _array(entry.coords),
        level0_px=float(int(_number(attrs, "patch_size_level0"))),
        patch_px=int(_number(attrs, "patch_size")),
        mpp=_number(attrs, "mpp") or None,
        width=int(_number(attrs, "level0_width")),
        height=int(_number(attrs, "level0_height")),
    )


@dataclass(frozen=True)
class Layout:
    """How features lie in files."""

    files: dict[str, Path]
    """Slide -> its file."""
    names: tuple[str, ...] = NAMES
    """Of the features; the first that is there counts."""
    grouped: bool = False
    """Each slide is a group of its HDF5 file."""
    places: Callable[[Entry], Places | None] = level0_places
    """None where nobody can say."""
    recipe: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def open(self, slide: str) -> Iterator[Entry]:
        """The slide's entry; errors as the file's library has them."""
        file = self.files[slide]
        if file.suffix in _PLAIN:
            yield _PLAIN[file.suffix](file, self.names)
            return
        with _open_h5(file) as h5:
            yield _entry(h5[slide] if self.grouped else h5, self.names, h5.attrs)


Format = Callable[[Path], Layout | None]


FEATURE_FORMATS: Registry[Layout | None] = Registry("feature format")
"""Name -> function: path -> :class:`Layout`, or None where the path holds something else."""


@FEATURE_FORMATS.register("trident")
def trident(path: Path) -> Layout | None:
    """TRIDENT 0.3: ``features_<encoder>/<slide>.h5``, or a folder with one such folder in it or in a grid's.

    ``features`` with the attribute ``encoder``, ``coords`` (level-0 pixels) with those of the grid.
    """
    places = ("features_*", "*x_*px_*px_overlap/features_*")
    inner = sorted(p for place in places for p in path.glob(place) if p.is_dir())
    if len(inner) > 1:
        names = (str(folder.relative_to(path)) for folder in inner)
        raise UserError(
            f"{path} holds features of {len(inner)} encoders or grids\n{format_list(names)}\n"
            "  name one of these folders"
        )
    files = _files(inner[0] if inner else path, ".h5")
    if inner and not files:
        return _plain(inner[0], {"encoder": inner[0].name.removeprefix("features_")})
    names, attrs = _glance(files)
    if "features" not in names or not {"encoder", "patch_size_level0"} & attrs.keys():
        return None
    said = ("encoder", "target_magnification", "patch_size", "overlap", "mpp")
    recipe = _plain_values(attrs, said) | _weights_said(next(iter(files.values())).parent)
    return Layout(files, ("features",), recipe=recipe)


def _weights_said(folder: Path) -> dict[str, Any]:
    """What launch/extract.py wrote of the encoder's weights beside a folder of features."""
    beside = folder.with_name(f"_config_feats_{folder.name.removeprefix('features_')}.json")
    try:
        return {"weights": json.loads(beside.read_bytes())["weights"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}  # TRIDENT's own says nothing of them


@FEATURE_FORMATS.register("clam")
def clam(path: Path) -> Layout | None:
    """CLAM: ``h5_files/<slide>.h5`` without attributes, ``pt_files/<slide>.pt``; or one of the two.

    Coords are level-0 pixels. They are in the h5 files alone, so these come first.
    """
    h5 = _files(path / "h5_files", ".h5") or _files(path, ".h5")
    pt = _files(path / "pt_files", ".pt") if path.name != "pt_files" else {}
    names, attrs = _glance(h5)
    ours = "features" in names and not {"encoder", "patch_size_level0"} & attrs.keys()
    if (h5 and not ours) or not (h5 or pt):
        return None
    return Layout({**pt, **h5})


@FEATURE_FORMATS.register("stamp")
def stamp(path: Path) -> Layout | None:
    """STAMP 2: ``<slide>.h5`` with ``feats`` (or ``patch_embeddings``) and ``coords`` in um."""
    files = _files(path, ".h5")
    names, attrs = _glance(files)
    if not {"feats", "patch_embeddings"} & names:
        return None
    kind = attrs.get("feat_type", "tile")
    if kind != "tile":
        raise UserError(f"{path} holds STAMP's embeddings of whole {kind}s, no bags of patches")
    said = ("extractor", "stamp_version", "tile_size_um", "tile_size_px")
    recipe = _plain_values(attrs, said)
    return Layout(files, ("feats", "patch_embeddings"), places=_stamp_places, recipe=recipe)


def _stamp_places(entry: Entry) -> Places | None:
    um, px = (_number(entry.attrs, f"tile_size_{unit}") for unit in ("um", "px"))
    if entry.coords is None or entry.attrs.get("unit") != "um" or not um or not px:
        return None  # older files do not say what their numbers mean
    mpp = um / px
    return Places(_array(entry.coords) / mpp, level0_px=px, patch_px=int(px), mpp=mpp)


@FEATURE_FORMATS.register("aem")
def aem(path: Path) -> Layout | None:
    """AEM: one HDF5 file, a group a slide with ``feat``, ``coords`` (level-0 pixels) and ``label``.

    Its published name, ``patch_feats_pretrain_<encoder>.h5``, says who made the features.
    """
    if not path.is_file() or path.suffix not in (".h5", ".hdf5"):
        return None
    try:
        with _open_h5(path) as h5:
            slides = {slide: group for slide, group in h5.items() if isinstance(group, h5py.Group)}
            if not {"feat", *NAMES} & set(next(iter(slides.values()), ())):
                return None
            encoder = path.stem.partition("patch_feats_pretrain_")[2]
            recipe = {"encoder": encoder} if encoder else {}
            return Layout(
                dict.fromkeys(slides, path), ("feat", *NAMES), grouped=True, recipe=recipe
            )
    except OSError as error:
        raise _no_h5(path, error) from error


@FEATURE_FORMATS.register("plain")
def plain(path: Path) -> Layout | None:
    """A folder of ``<slide>.pt`` (a tensor, an array, or a dict with one of them) or ``<slide>.npy``."""
    return _plain(path, {}) if path.is_dir() else None


def _plain(folder: Path, recipe: dict[str, Any]) -> Layout | None:
    by_suffix = {suffix: _files(folder, suffix) for suffix in _PLAIN}
    files = {slide: file for found in by_suffix.values() for slide, file in found.items()}
    if sum(map(len, by_suffix.values())) > len(files):
        raise UserError(
            f"{folder} holds the same slides as {' and '.join(map(str, by_suffix))}\n"
            "  keep one of them there"
        )
    return Layout(files, recipe=recipe) if files else None


def _files(folder: Path, suffix: str) -> dict[str, Path]:
    """Slide -> file of a folder."""
    if not folder.is_dir():
        return {}
    # A name that begins with a dot is of a file that is not finished.
    found = (f for f in folder.iterdir() if f.suffix == suffix and f.name[0] != ".")
    return {file.name.removesuffix(suffix): file for file in sorted(found)}


def _glance(files: Mapping[str, Path]) -> tuple[set[str], dict[str, Any]]:
    """Names and attributes in the first HDF5 file that can be read; DamagedDataError if none can."""
    fault: DamagedDataError | None = None
    for file in files.values():
        try:
            with _open_h5(file) as h5:
                attrs = dict(h5.attrs)
                for dataset in h5.values():
                    attrs |= dict(dataset.attrs)
                return set(h5.keys()), attrs
        except OSError as error:
            fault = fault or _no_h5(file, error)
    if fault is not None:
        raise fault
    return set(), {}


def _open_h5(file: Path) -> h5py.File:
    # Without a lock: read-only and network disks have none, and a file is renamed when finished.
    return h5py.File(file, "r", locking=False)


def _no_h5(file: Path, error: OSError) -> DamagedDataError:
    return DamagedDataError(
        f"{file} is no HDF5 file, or was cut short: {_first_line(error)}\n  copy it again"
    )


def _entry(group: Any, names: Sequence[str], attrs: Mapping[str, Any]) -> Entry:
    features = group[_name_of(group, names)]
    coords = group.get("coords")
    said = dict(attrs) | dict(group.attrs) | dict(features.attrs)
    return Entry(features, coords, said if coords is None else said | dict(coords.attrs))


def _name_of(found: Any, names: Sequence[str]) -> str:
    for name in names:
        if name in found:
            return name
    raise ValueError(
        f"it has no {' or '.join(names)}, but {', '.join(map(str, found)) or 'nothing'}"
    )


def _open_pt(file: Path, names: Sequence[str]) -> Entry:
    _allow_arrays()
    try:
        # A map of the file: what is asked for its shape alone is not read.
        mapped = zipfile.is_zipfile(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # what is no pickle may raise anything when read as one
        raise ValueError(
            "it is refused, for it is cut short or holds more than tensors and arrays of numbers"
        ) from error
    if not isinstance(found, dict):
        return Entry(_checked(found), None, {})
    features = _checked(found[_name_of(found, names)])
    return Entry(features, _checked(found["coords"]) if "coords" in found else None, {})


def _checked(found: object) -> Any:
    if not isinstance(found, (Tensor, np.ndarray)):
        raise ValueError(f"it holds a {type(found).__name__}, no tensor")
    return found


def _open_npy(file: Path, names: Sequence[str]) -> Entry:
    return Entry(np.load(file, mmap_mode="r", allow_pickle=False), None, {})


_PLAIN = {".pt": _open_pt, ".npy": _open_npy}
"""Suffix -> what opens a file that is no HDF5."""


@cache
def _allow_arrays() -> None:
    """Let ``weights_only`` make NumPy arrays of numbers: TRIDENT saves these as .pt."""
    make = np._core.multiarray._reconstruct  # pyright: ignore[reportAttributeAccessIssue]
    kinds = [type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64)]
    torch.serialization.add_safe_globals(
        [
            *((make, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
            np.ndarray,
            np.dtype,
            *kinds,
        ]
    )


def _numbers(found: Any) -> NDArray[Any]:
    """Float16 or float32 in memory of its own: a map of the file would change with the file.

    By NumPy, because PyTorch's threads do not outlive a fork.
    """
    if isinstance(found, Tensor):
        found = (found.float() if found.dtype == torch.bfloat16 else found).detach().numpy()
    kept = found.dtype in (np.float16, np.float32)
    return np.asarray(found).astype(
        found.dtype if kept else np.float32, order="C", casting="same_kind"
    )


def _array(found: Any) -> NDArray[np.float64]:
    return np.asarray(found[...], dtype=np.float64)


def _number(attrs: Mapping[str, Any], name: str) -> float:
    """0 where an attribute is not there, or says the text "None" as TRIDENT does."""
    try:
        return float(attrs.get(name, 0))
    except (TypeError, ValueError):
        return 0.0


def _plain_values(attrs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those of ``names`` that are there, as JSON has them."""
    found = {name: attrs[name] for name in names if name in attrs}
    return {
        name: value.item() if hasattr(value, "item") else value for name, value in found.items()
    }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
