"""LMDBs as the ABMILX project writes them."""

from __future__ import annotations

import pickle
from pathlib import Path

import h5py
import lmdb
import numpy as np

from tests.helpers.stores import patches


def write_seed(path: Path, counts: dict[str, int], *, folder: bool = False, **meta: object) -> Path:
    """A file of the project's format; ``meta`` replaces lists, None leaves one out."""
    values = {
        f"{s}-{k}": pickle.dumps(j) for s, n in counts.items() for k, j in enumerate(patches(s, n))
    }
    lists: dict[str, object] = {
        "__keys__": [key.encode() for key in values],
        "__len__": len(values),
        "__slide__": list(counts),
        "__pn__": counts,
    }
    lists |= meta
    values |= {key: pickle.dumps(value) for key, value in lists.items() if value is not None}
    return put(path, values, folder=folder)


def put(path: Path, values: dict[str, bytes], *, folder: bool = False) -> Path:
    with lmdb.open(str(path), subdir=folder, map_size=1 << 26) as env, env.begin(write=True) as txn:
        for key, value in values.items():
            txn.put(key.encode(), value)
    return path


def write_coords(folder: Path, slide: str, count: int) -> None:
    """As CLAM writes them."""
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / f"{slide}.h5", "w") as h5:
        coords = h5.create_dataset("coords", data=np.arange(2 * count).reshape(count, 2))
        coords.attrs.update({"patch_size": 256, "patch_level": 1, "downsample": [4.0, 4.0]})
