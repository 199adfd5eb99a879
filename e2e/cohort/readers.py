"""Find and open the patch stores or features of a cohort, and report what is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from e2e.cohort.spec import CohortSpec
from e2e.errors import UserError, format_list
from e2e.features.check import common_width
from e2e.features.reader import FeatureFiles, open_features
from e2e.store.open import expand_store_paths, open_store
from e2e.store.records import PatchReader

T = TypeVar("T")


def open_patch_readers(
    scales: Sequence[Sequence[str]], coords: str | None = None, *, verify: bool = True
) -> list[list[PatchReader]]:
    """Open the patch stores of each magnification.

    Parameters
    ----------
    scales
        For each magnification its entries; see :func:`e2e.store.open.expand_store_paths`.
    coords
        Folder of .h5 coordinates, for stores that hold none.
    verify
        Compare each patch with its checksum when it is read for the first time.

    Returns
    -------
    list of list of PatchReader
        The opened stores of each magnification.

    Raises
    ------
    UserError
        A store does not exist or cannot be read.
    """
    open_one = partial(open_store, coords=coords, verify=verify)
    return [_open_all(entries, open_one, "stores") for entries in scales]


def _open_all(entries: Sequence[str], open_one: Callable[[Path], T], kind: str) -> list[T]:
    """Open every file or folder; a UserError names all that cannot be opened."""
    opened: list[T] = []
    errors: list[UserError] = []
    for path in (path for entry in entries for path in expand_store_paths(entry)):
        try:
            opened.append(open_one(path))
        except UserError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        reasons = format_list(str(error).splitlines()[0] for error in errors)
        raise UserError(
            f"{len(errors)} of {len(opened) + len(errors)} {kind} cannot be used\n{reasons}\n"
            f"  copy or make them again, or leave them out of data.{kind}"
        )
    return opened


def open_feature_readers(entries: Sequence[str]) -> list[FeatureFiles]:
    """Open frozen features, which must all have the same width and encoder.

    Parameters
    ----------
    entries
        Folders, files or globs.

    Returns
    -------
    list of FeatureFiles
        The opened features.

    Raises
    ------
    UserError
        There are no features, their format is unknown, or they come from different encoders.
    """
    readers = _open_all(entries, open_features, "features")
    common_width(readers)
    return readers


def require_files(spec: CohortSpec, targets: Sequence[str], *, features: bool = False) -> None:
    """Check that the label table and the data of a cohort exist.

    Parameters
    ----------
    spec
        The cohort.
    targets
        Columns of the label table that the task reads, for the message.
    features
        Whether frozen features are needed rather than patch stores.

    Raises
    ------
    UserError
        Something is missing; the message says what, where it is expected and how to make it.
    """
    kind = "features" if features else "patch store"
    entries = spec.features if features else [e for s in (spec.stores, *spec.scales) for e in s]
    if not spec.labels or not entries:
        data = "data.features=[FOLDER]" if features else "data.stores=[FILE.lmdb]"
        raise UserError(
            f"cohort '{spec.name}' needs data.labels=FILE.csv and {data}\n"
            f"  {_how_to_make(kind, 'FOLDER', spec)}"
        )
    needed = [("label table", spec.labels), *((kind, entry) for entry in entries)]
    missing = [
        (what, entry)
        for what, entry in needed
        if not any(file.exists() for file in expand_store_paths(entry))
    ]
    if not missing:
        return
    lines = [f"cohort '{spec.name}': {len(missing)} of {len(needed)} data files not found"]
    lines += [f"  {what} not found: {entry}" for what, entry in missing]
    if spec.source:
        lines.append(f"  source: {spec.source}")
    if any(what == "label table" for what, _ in missing):
        names = dict.fromkeys(name for name in (*spec.columns.values(), *targets) if name)
        lines.append(
            f"  put the label table at {spec.labels} (columns {', '.join(names)}),"
            " or set data.labels=FILE.csv"
        )
    for what, entry in missing:
        if what != "label table" and "*" not in entry:
            lines.append(f"  {_how_to_make(what, entry, spec)}")
    lines.append("  to try the system without slides of your own: e2e demo")
    raise UserError("\n".join(lines))


def _how_to_make(kind: str, path: str, spec: CohortSpec) -> str:
    """Return the command that makes missing features or a missing patch store."""
    if kind == "features":
        stores = " ".join(spec.stores) or "FILE.lmdb"
        command = f"e2e extract --stores {stores} --encoder NAME --out {path}"
        return f"make the features: {command}"
    command = f"e2e pack --slides SLIDES --out {path} {spec.pack_options}"
    return f"make the store: {command}".rstrip()
