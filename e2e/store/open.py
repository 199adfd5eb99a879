"""Open a patch store of whichever kind the file is."""

from __future__ import annotations

import os

from e2e.store.abmilx import AbmilxStore, _data_file, _is_seed
from e2e.store.lmdb import PatchStore, snapshot


def open_store(
    path: str | os.PathLike[str], coords: str | os.PathLike[str] | None = None
) -> PatchStore | AbmilxStore:
    """The store of whichever kind the file is, told by what is in it.

    Args:
        coords: for :class:`AbmilxStore`; our own stores know their coords.

    Raises:
        UserError: no such file, or neither kind.
    """
    file = _data_file(path)
    if file.is_file() and snapshot(file, _is_seed):
        return AbmilxStore(path, coords)
    return PatchStore(path)
