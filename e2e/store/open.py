"""Open patch stores of any kind."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from e2e.store.abmilx import AbmilxStore, find_data_file, is_abmilx_file
from e2e.store.index import read_index
from e2e.store.lmdb import PatchStore


def open_store(
    path: str | os.PathLike[str],
    coords: str | os.PathLike[str] | None = None,
    *,
    verify: bool = True,
) -> PatchStore | AbmilxStore:
    """Open a file of JPEG patches; its content decides which kind of store it is.

    Parameters
    ----------
    path : str or path-like
        A patch store of ``e2e pack``; or an LMDB of the ABMILX project, either its file or a
        folder with ``data.mdb``.
    coords : str or path-like, optional
        Folder of the .h5 files of CLAM or TRIDENT that an LMDB of the ABMILX project was cut by. Patch
        stores have their coordinates inside.
    verify : bool
        Compare each patch with its checksum when it is read for the first time. The ABMILX project's
        stores have no checksums.

    Returns
    -------
    PatchStore or AbmilxStore
        A :class:`e2e.store.records.PatchReader`: `slides` lists the slides, ``record(slide)`` gives
        the coordinates and magnification of the patches, ``read(slide, indices)`` gives their JPEG
        bytes.

    Raises
    ------
    UserError
        If there is no such file, or it is neither kind of store.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from e2e.store.lmdb import StoreWriter
    >>> from e2e.store.records import SlideRecord
    >>> folder = TemporaryDirectory()
    >>> with StoreWriter(f"{folder.name}/mine.lmdb", {"mpp": 0.5}) as writer:
    ...     writer.add(SlideRecord("slide-1", num_patches=2, mpp=0.5), [b"JPEG 0", b"JPEG 1"])
    >>> store = open_store(f"{folder.name}/mine.lmdb")
    >>> store.slides, store.num_patches("slide-1"), store.record("slide-1").mpp
    (['slide-1'], 2, 0.5)
    >>> store.read("slide-1", [1])
    [b'JPEG 1']
    >>> folder.cleanup()
    """
    file = find_data_file(path)
    if file.is_file() and is_abmilx_file(file):
        return AbmilxStore(path, coords)
    return PatchStore(path, verify=verify)


def expand_store_paths(entry: str) -> list[Path]:
    """Return the files that an entry of ``data.stores`` or ``data.features`` stands for.

    Parameters
    ----------
    entry : str
        A file or folder, a glob, or the index (``.stores.json``) of a packing run on a cluster.

    Returns
    -------
    list of Path
        The one path, which need not exist; or the matches of the glob, sorted; or the store files that
        the index lists.

    Raises
    ------
    UserError
        If the index cannot be read.
    """
    if any(sign in entry for sign in "*?["):
        return sorted(Path(match) for match in glob.glob(entry, recursive=True))
    path = Path(entry)
    return read_index(path) if path.suffix == ".json" and path.is_file() else [path]
