"""Files of features: HDF5, ``.pt`` and ``.npy``. They are opened lazily and never executed."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.errors import DamagedDataError, UserError
from e2e.slides import slide_of_file


class SlideArrays(NamedTuple):
    """The arrays of one slide in an open file. Only indexing (``[...]``) reads values."""

    features: Any
    """(N, D) HDF5 dataset, array or tensor."""
    coords: Any
    """(N, 2) likewise; None if the file has none."""
    attrs: Mapping[str, Any]
    """The attributes of both, and of the file."""


LAYOUT_FOLDERS = re.compile(r"h5_|pt_|features_|patches|coords|heatmaps|\\.|.*px_overlap")
"""Names of folders that are part of a layout, and not of a patient."""


def list_files(folder: Path, suffix: str) -> dict[str, Path]:
    """Return slide -> file for the files of a folder with this suffix, sorted.

    If the folder itself has none, those of a folder per patient are listed. Files whose names begin
    with a dot are left out: they are not finished.
    """
    if not folder.is_dir():
        return {}
    files = _with_suffix(folder, suffix)
    if not files:
        folders = (f for f in folder.iterdir() if f.is_dir() and not LAYOUT_FOLDERS.match(f.name))
        files = [file for patient in folders for file in _with_suffix(patient, suffix)]
    by_slide = {slide_of_file(file.name[: -len(suffix)]): file for file in sorted(files)}
    if len(by_slide) < len(files):
        raise UserError(
            f"{folder} holds {len(files) - len(by_slide)} slide(s) twice, in several of its folders\n"
            "  keep one file of each slide"
        )
    return by_slide


def _with_suffix(folder: Path, suffix: str) -> list[Path]:
    return [f for f in folder.iterdir() if f.suffix.lower() == suffix and f.name[0] != "."]


def open_h5(file: Path) -> h5py.File:
    """Open an HDF5 file for reading, without a lock.

    Read-only and network disks have no locks, and a feature file is renamed when it is finished.
    """
    return h5py.File(file, "r", locking=False)


def peek_h5(files: Iterable[Path]) -> tuple[set[str], dict[str, Any]]:
    """Return the names and attributes in the first HDF5 file that can be read.

    Returns
    -------
    names : set of str
        Names at the top of the file; empty if there are no files.
    attrs : dict
        The attributes of the file and of what is at its top.

    Raises
    ------
    DamagedDataError
        If there are files and none can be read; the message names the first.
    """
    fault: DamagedDataError | None = None
    for file in files:
        try:
            with open_h5(file) as h5:
                attrs = dict(h5.attrs)
                for name in h5:
                    attrs |= dict(open_item(h5, str(name)).attrs)
                return set(h5.keys()), attrs
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            fault = fault or h5_error(file, error)
    if fault is not None:
        raise fault
    return set(), {}


def h5_error(file: Path, error: Exception) -> DamagedDataError:
    """Return the error to raise if a file cannot be opened as HDF5."""
    return DamagedDataError(
        f"{file} is not an HDF5 file, or was cut short: {first_line(error)}\n  copy it again"
    )


def open_item(group: Any, name: str) -> Any:
    """Return a group or dataset of an HDF5 file, unless its values lie in another file.

    Raises
    ------
    ValueError
        It is a link to another file, or names other files as its storage.
    """
    link = group.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        raise ValueError(f"'{name}' is a link to another file, which is not followed")
    item = group[name]
    # A soft link may lead to an external one; a hard link never leaves its file.
    is_soft = isinstance(link, h5py.SoftLink)
    is_elsewhere = is_soft and item.file.filename != group.file.filename
    if is_elsewhere or (isinstance(item, h5py.Dataset) and (item.external or item.is_virtual)):
        raise ValueError(f"'{name}' lies in another file, which is not read")
    return item


def arrays_of_h5(group: Any, names: Sequence[str], attrs: Mapping[str, Any]) -> SlideArrays:
    """Return the arrays of an open HDF5 file or group.

    Parameters
    ----------
    group : h5py.File or h5py.Group
        Holds the datasets of one slide.
    names : sequence of str
        Names of the features; the first that exists is used.
    attrs : mapping
        Attributes of the file.

    Raises
    ------
    ValueError
        If none of the names exists.
    """
    features = open_item(group, _first_name(group, names))
    coords = open_item(group, "coords") if "coords" in group else None
    all_attrs = dict(attrs) | dict(group.attrs) | dict(features.attrs)
    if coords is not None:
        all_attrs |= dict(coords.attrs)
    return SlideArrays(features, coords, all_attrs)


def _first_name(content: Any, names: Sequence[str]) -> str:
    for name in names:
        if name in content:
            return name
    raise ValueError(
        f"it has no {' or '.join(names)}, but {', '.join(map(str, content)) or 'nothing'}"
    )


def _open_pt(file: Path, names: Sequence[str]) -> SlideArrays:
    _allow_numpy_arrays()
    is_mappable = zipfile.is_zipfile(file)
    if is_mappable:
        _check_expansion(file)
    try:
        # Map the file: if only the shape is needed, the values are not read.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mappable)
    except Exception as error:  # a file that is not a pickle may raise anything when read as one
        raise ValueError(
            "it is rejected: it was cut short, or holds more than tensors and arrays of numbers"
        ) from error
    if not isinstance(content, dict):
        return SlideArrays(_require_array(content), None, {})
    features = _require_array(content[_first_name(content, names)])
    coords = _require_array(content["coords"]) if "coords" in content else None
    return SlideArrays(features, coords, {})


def _check_expansion(file: Path) -> None:
    """Refuse an archive whose compressed content expands: PyTorch compresses nothing."""
    try:
        with zipfile.ZipFile(file) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is a damaged archive: {error}") from error
    if expanded > 2 * file.stat().st_size:
        raise ValueError(f"it is compressed, and would expand to {expanded:,} bytes")


def _require_array(value: object) -> Any:
    if not isinstance(value, (Tensor, np.ndarray)):
        raise ValueError(f"it holds a {type(value).__name__}, not a tensor")
    return value


def _open_npy(file: Path, names: Sequence[str]) -> SlideArrays:
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python, which may raise anything
        raise ValueError(f"it is not a readable .npy file: {first_line(error)}") from error
    return SlideArrays(values, None, {})


ARRAY_FILES: dict[str, Callable[[Path, Sequence[str]], SlideArrays]] = {
    ".pt": _open_pt,
    ".npy": _open_npy,
}
"""Suffix -> function that opens a file of one slide: (file, names of the features) -> arrays."""


@cache
def _allow_numpy_arrays() -> None:
    """Let ``weights_only`` load NumPy arrays of numbers: TRIDENT saves these as .pt."""
    reconstruct = np._core.multiarray._reconstruct  # pyright: ignore[reportAttributeAccessIssue]
    dtypes = [type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64)]
    names = [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]
    torch.serialization.add_safe_globals(
        [*((reconstruct, name) for name in names), np.ndarray, np.dtype, *dtypes]
    )


def copy_floats(values: Any) -> NDArray[Any]:
    """Copy values into memory of their own: a map of the file would change with the file.

    This uses NumPy because PyTorch's threads do not survive a fork.

    Returns
    -------
    ndarray of float16 or float32
        As stored; other types become float32.
    """
    if isinstance(values, Tensor):
        values = (values.float() if values.dtype == torch.bfloat16 else values).detach().numpy()
    dtype = values.dtype if values.dtype in (np.float16, np.float32) else np.float32
    return np.asarray(values).astype(dtype, order="C", casting="same_kind")


def read_doubles(values: Any) -> NDArray[np.float64]:
    """Read all values of an array of a :class:`SlideArrays` in double precision."""
    return np.asarray(values[...], dtype=np.float64)


def read_number(attrs: Mapping[str, Any], name: str) -> float:
    """Return an attribute as a finite number; 0 if it is none, such as the text "None" of TRIDENT."""
    try:
        number = float(attrs.get(name, 0))
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if math.isfinite(number) else 0.0


def plain_values(attrs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return those of the named attributes that exist, as JSON values."""
    values = {name: attrs[name] for name in names if name in attrs}
    return {
        name: _plain_value(value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value)
        for name, value in values.items()
    }


def _plain_value(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1:
        return _plain_value(value[0])
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


class FirstOf:
    """The array (N, D) in an HDF5 dataset of shape (1, N, D), read where it is indexed."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.shape: tuple[int, ...] = tuple(dataset.shape[1:])

    def __getitem__(self, key: Any) -> Any:
        """Return values of the one slide."""
        return self._dataset[0][key]


def as_rows(values: Any) -> Any:
    """Return features or coords as a matrix: (1, N, D) without its batch, (D,) as one row."""
    shape = tuple(values.shape)
    if len(shape) == 3 and shape[0] == 1:
        return FirstOf(values)
    return values[...][None] if len(shape) == 1 and shape[0] > 0 else values


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
