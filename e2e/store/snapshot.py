"""Read transactions of LMDB files: consistent while a writer appends, safe over forks, read ahead.

LMDB maps a file into memory. A process must open a file only once and must not carry it over a fork,
so the open files are kept here, one per process and file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import numpy as np
from lmdb import _envid

from e2e.errors import DamagedDataError, OneRankError, UserError
from e2e.store.tree import check_tree

T = TypeVar("T")

GROWTH = 1 << 36
"""Bytes a file may grow by while it is open for reading. Address space, not memory."""

MAX_READERS = 1024
"""Read transactions that a lock file has room for at a time, over all processes of a machine."""

ATTEMPTS = 5
"""Attempts at a snapshot that a writer keeps overwriting."""

SPARSE = 8
"""Reading ahead pays if at least one of this many patches is needed (measured on a virtual disk)."""

READ_AHEAD_BYTES = 1 << 17
"""Bytes to ask for at a time; Linux cuts a larger request down to the readahead of the disk."""


def read_value(path: Path, key: bytes) -> bytes | None:
    """Return a copy of one value of an LMDB file, or None if the key does not exist.

    Raises
    ------
    UserError, DamagedDataError
        As :func:`read_snapshot`.
    """

    return read_snapshot(path, partial(copy_value, key=key))


def copy_value(txn: lmdb.Transaction, key: bytes) -> bytes | None:
    """Return a copy of one value, which outlives the transaction; None if the key does not exist."""
    value = txn.get(key)
    return None if value is None else bytes(value)


def file_key(path: Path) -> str:
    """Return what tells the file at a path from one that replaces it.

    Raises
    ------
    UserError
        There is no such file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}\n  was it moved?") from error
    return f"{status.st_dev}:{status.st_ino}"


def is_open(key: str) -> bool:
    """Return whether this process has the file with this key open."""
    return (os.getpid(), key) in _ENVIRONMENTS


def read_snapshot(path: Path, work: Callable[[lmdb.Transaction], T], key: str | None = None) -> T:
    """Call `work` with a read transaction of an LMDB file.

    Without a writable lock file (there is none on a read-only disk), a writer may overwrite pages of
    a snapshot from its second commit on. What was read from such a snapshot is dropped, and `work` is
    called again.

    Parameters
    ----------
    path : Path
        The LMDB file.
    work : callable
        Takes the transaction. Keys and values are buffers that end with it.
    key : str, optional
        The :func:`file_key` of a file that this process has open: that file is read, whatever lies at
        `path` by now.

    Returns
    -------
    object
        What `work` returned.

    Raises
    ------
    UserError
        If the file is not an LMDB file, was cut short, or is written faster than it can be read; and
        what `work` raises.
    DamagedDataError
        If the tree, checked at the first read in a process, LMDB, JSON or text in the file is damaged.
    """
    environment = _open_environment(path, key)
    for _ in range(ATTEMPTS):
        first_txn = environment.info()["last_txnid"]
        result: Any = None
        fault: Exception | None = None
        try:
            with environment.begin(buffers=True) as txn:
                first_txn = txn.id()
                if environment not in _CHECKED:
                    check_tree(path, first_txn)
                    _CHECKED.add(environment)
                result = work(txn)
        except lmdb.MapResizedError as error:
            raise OneRankError(
                f"{path} has grown by more than {GROWTH >> 30} GiB since it was opened\n"
                "  start the command again"
            ) from error
        except (lmdb.Error, ValueError, KeyError, UserError) as error:  # ValueError: json, unicode
            fault = error
        if environment.flags()["lock"] or environment.info()["last_txnid"] - first_txn < 2:
            if fault is None:
                return result
            if isinstance(fault, UserError):
                raise fault
            raise DamagedDataError(
                f"{path} is damaged: {fault}\n  copy it again, or pack it again"
            ) from fault
    raise OneRankError(
        f"{path} is being written faster than it can be read\n  wait until the writer has finished"
    )


_ENVIRONMENTS: dict[tuple[int, str], lmdb.Environment] = {}
_CHECKED: set[lmdb.Environment] = set()
"""Open files whose tree was checked, in the first transaction."""
_OPENING = threading.Lock()


def _forget_environments() -> None:
    # In a forked child the files must be opened again. The parent's environments are not closed here:
    # that would free the slots of the parent's readers in the lock file, and another thread of the
    # parent, which does not exist in the child, may be using one. The child may open the files
    # although lmdb counts them as open: locks are not inherited.
    global _OPENING
    for environment in _ENVIRONMENTS.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(environment))
    _ENVIRONMENTS.clear()
    _OPENING = threading.Lock()  # another thread may have held it
    keys, process = _envid.env_keys, os.getpid()
    _envid.env_keys = lambda path, subdir: tuple((process, key) for key in keys(path, subdir))


os.register_at_fork(after_in_child=_forget_environments)


def _open_environment(path: Path, file: str | None = None) -> lmdb.Environment:
    """Return the open file; it is opened at the first call in each process."""
    key = (os.getpid(), file or file_key(path))
    with _OPENING:
        if key not in _ENVIRONMENTS:
            try:
                check_length(path)
                _ENVIRONMENTS[key] = lmdb.open(
                    str(path),
                    map_size=path.stat().st_size + GROWTH,
                    subdir=False,
                    readonly=True,
                    lock=_is_lock_writable(path),
                    max_readers=MAX_READERS,
                    # If few of many patches are needed, the kernel's readahead is wasted work.
                    # If many of a slide are needed, read_ahead asks for all of them.
                    readahead=False,
                    meminit=False,
                )
            except lmdb.Error as error:
                raise open_error(path, error) from error
        return _ENVIRONMENTS[key]


def _is_lock_writable(path: Path) -> bool:
    """Whether readers can register, so that a writer does not overwrite what they read.

    A store that no writer has opened has no lock file, and none is created for reading it.
    """
    return os.access(f"{path}-lock", os.R_OK | os.W_OK)


def read_ahead(get_value: Callable[[int], Any], indices: Sequence[int]) -> None:
    """Ask the kernel to load the values of a slide if `indices` cover a good part of them.

    The values of a slide lie together and in order in the file. Read one by one from a cold disk,
    each page costs a wait; asked for at once, the disk works at full speed.

    Parameters
    ----------
    get_value : callable
        Patch index -> value, as a buffer of the memory map.
    indices : sequence of int
        The patches that will be read next.
    """
    if len(indices) < 8 or (max(indices) - min(indices)) > SPARSE * len(indices):
        return
    low, high = min(indices), max(indices)
    first, last = get_value(low), get_value(high)
    if not first or not last:
        return  # reported when that patch is read
    start, end = _address(first) & -mmap.PAGESIZE, _address(last) + len(last)
    if not 0 < end - start <= 4 * (high - low + 1) * max(len(first), len(last)):
        return  # the values do not lie in order
    for position in range(start, end, READ_AHEAD_BYTES):
        _LIBC.madvise(position, min(READ_AHEAD_BYTES, end - position), mmap.MADV_WILLNEED)


_LIBC = ctypes.CDLL(None)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _address(value: Any) -> int:
    return np.frombuffer(value, np.uint8).ctypes.data


def check_length(path: Path) -> None:
    """Raise UserError if an LMDB file ends before the last page that it uses.

    Reading past the end of a mapped file kills the process with SIGBUS, so this is checked before,
    from the two meta pages: magic 0xBEEFC0DE, version 1, ..., last used page.

    Raises
    ------
    UserError
        If the file was cut short, or is not an LMDB file.
    """
    with path.open("rb") as file:
        head = file.read(1 << 16)
    length = path.stat().st_size  # after the meta pages: a writer lets the file grow before them
    if len(head) < 152 or struct.unpack_from("<I", head, 16)[0] != 0xBEEFC0DE:
        raise UserError(f"{path} is not a patch store (not an LMDB file)")
    page = struct.unpack_from("<I", head, 16 + 24)[0]
    newest = (-1, 0)
    for start in (16, page + 16):
        if len(head) >= start + 136:
            last_page, transaction = struct.unpack_from("<QQ", head, start + 120)
            newest = max(newest, (transaction, last_page))
    if length < (newest[1] + 1) * page:
        raise UserError(
            f"{path} was cut short: {length:,} bytes of {(newest[1] + 1) * page:,}\n"
            "  copy it again, or pack it again"
        )


def open_error(path: Path, error: lmdb.Error) -> UserError:
    """Return the error to raise if LMDB cannot open a file."""
    if "already open" in str(error):
        return OneRankError(
            f"{path} was replaced while this process had it open\n  start the command again"
        )
    return UserError(f"cannot open {path} as a patch store: {error}")


def missing_patch_error(
    path: Path, slide: str, index: int, num_patches: int, *, is_empty: bool
) -> DamagedDataError:
    """Return the error to raise if a patch is missing or has no bytes."""
    fault = (
        f"patch {index} has zero bytes"
        if is_empty
        else f"patch {index} of {num_patches} is missing"
    )
    return DamagedDataError(
        f"{path}: slide '{slide}' {fault}\n"
        "  pack the slide again; e2e inspect --verify lists all faults"
    )
