"""A store that is replaced, rewritten or removed while it is read."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from e2e.errors import UserError
from e2e.store.lmdb import PatchStore, StoreWriter
from tools.faults.children import run
from tools.faults.outcomes import Outcome
from tools.faults.project import Project


def replace_stores(
    project: Project, folder: Path, _: None, count: int, seed: int
) -> Counter[Outcome]:
    """Open a store, change the file under it, and read on: the same patches, or an error.

    A store that is cut short in place is left out: the system ends a process that reads mapped memory past
    the end of its file (SIGBUS), which the documentation says.
    """
    draw = random.Random(f"{seed} {folder.name}")
    other = _other_store(project, folder / "other.lmdb")
    outcomes: Counter[Outcome] = Counter()
    for number in range(count):
        path = Path(shutil.copy(project.store, folder / f"{number}.lmdb"))
        change, read_before = draw.choice((_rename, _remove, _write_again)), draw.random() < 0.5
        log = folder / "log"
        ended = run(partial(_read_changed, path, other, change, read_before), log)
        if ended.value is None:
            print(ended.text[-2500:])
            outcomes[Outcome.CRASH if ended.code < 0 else Outcome.TRACEBACK] += 1
        else:
            outcomes[Outcome(ended.value)] += 1
        path.unlink(missing_ok=True)
    return outcomes


def _read_changed(
    path: Path, other: Path, change: Callable[[Path, Path], None], read_before: bool
) -> str:
    expected = _content(PatchStore(shutil.copy(path, path.with_suffix(".copy"))))
    store = PatchStore(path)
    if read_before:
        store.read(store.slides[0], [0])
    change(path, other)
    try:
        return Outcome.SAME if _content(store) == expected else Outcome.WRONG
    except UserError:
        return Outcome.REFUSED


def _content(store: PatchStore) -> list[bytes]:
    return [b"".join(store.read(s, range(store.num_patches(s)))) for s in store.slides]


def _rename(path: Path, other: Path) -> None:
    """Another store is moved to the path, as packing anew does."""
    os.replace(shutil.copy(other, path.with_suffix(".new")), path)


def _remove(path: Path, other: Path) -> None:
    """The file is removed."""
    path.unlink()


def _write_again(path: Path, other: Path) -> None:
    """The path is removed and another store is copied there, as a shell does."""
    path.unlink()
    shutil.copy(other, path)


def _other_store(project: Project, out: Path) -> Path:
    """Write a store of the same slides and numbers of patches, with the patches of other slides."""
    store = PatchStore(project.store)
    slides = store.slides
    with StoreWriter(out, store.recipe) as writer:
        for slide, donor in zip(slides, [*slides[1:], slides[0]], strict=True):
            record = store.record(slide)
            count = record.num_patches
            jpegs = store.read(donor, [k % store.num_patches(donor) for k in range(count)])
            writer.add(record, jpegs)
    return out
