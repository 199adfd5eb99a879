"""The tree of an LMDB file, checked before LMDB follows it.

LMDB trusts its file: in a damaged one it reads past the end of a page or of the file, which ends the
process, or silently finds fewer keys. The pages of the tree (not of the values) are therefore checked once,
when a file is opened; in a store of patches they are about one in 200 pages.

Layout, of a file written on a little-endian 64-bit machine (``mdb.c`` of LMDB 0.9): pages 0 and 1 are meta
pages, written in turns; a page of the tree has its number, flags and the offsets of its nodes; a node of a
branch has the number of a page below, one of a leaf has a key and a value, or the number of the first page of
a long value.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BRANCH, LEAF = 1, 2
"""Flags of a page."""
LONG_VALUE = 1
"""Flag of a node."""
HEADER = 16
"""Bytes of the header of a page, and of a node's numbers before its key: 8."""
EMPTY = 2**64 - 1
"""Number of the root of an empty tree."""
MAX_DEPTH = 32
BATCH = 1024
"""Pages that are checked together."""
U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]


class _Meta(NamedTuple):
    """What a meta page says of the main tree."""

    page_size: int
    depth: int
    entries: int
    root: int
    last_page: int
    transaction: int


def check_tree(path: Path, transaction: int) -> None:
    """Check that every key and value of a snapshot of an LMDB file lies within the file.

    Parameters
    ----------
    path
        The file.
    transaction
        Number of the transaction that wrote the snapshot.

    Raises
    ------
    ValueError
        The file is damaged.
    """
    content: U8 = np.memmap(path, np.uint8, "r")
    first = _read_meta(content, HEADER)
    metas = [first, _read_meta(content, first.page_size + HEADER)]
    # The transactions write the two pages in turns, so the numbers tell an old page from a damaged one.
    if any(meta.transaction % 2 != k for k, meta in enumerate(metas) if meta.transaction):
        raise ValueError("the numbers of its transactions contradict each other")
    if abs(metas[0].transaction - metas[1].transaction) > 1:
        raise ValueError("the numbers of its transactions contradict each other")
    meta = next((m for m in metas if m.transaction == transaction), None)
    if meta is None:
        raise ValueError("its newest transaction is missing")
    if meta.root != EMPTY:
        num_entries = _count_entries(content, meta)
        if num_entries != meta.entries:
            raise ValueError(f"it has {num_entries:,} of {meta.entries:,} entries")


def _read_meta(content: U8, start: int) -> _Meta:
    if len(content) < start + 136:
        raise ValueError("it ends within its first pages")
    head = content[start : start + 136].tobytes()
    page_size, depth = struct.unpack_from("<I", head, 24)[0], struct.unpack_from("<H", head, 78)[0]
    entries, root, last_page, transaction = struct.unpack_from("<QQQQ", head, 104)
    if page_size < 512 or page_size & (page_size - 1):
        raise ValueError(f"its pages have {page_size} bytes")
    return _Meta(page_size, depth, entries, root, last_page, transaction)


def _count_entries(content: U8, meta: _Meta) -> int:
    """Check all pages of the tree, level by level, and return the number of its entries."""
    num_pages = min(meta.last_page + 1, len(content) // meta.page_size)
    pages: U8 = content[: num_pages * meta.page_size].reshape(num_pages, meta.page_size)
    if not 0 < meta.depth <= MAX_DEPTH:
        raise ValueError(f"its tree has a depth of {meta.depth}")
    level: I64 = np.array([min(meta.root, 2**62)], np.int64)
    for _ in range(meta.depth - 1):
        below = [
            _branches(pages, level[k : k + BATCH], num_pages) for k in range(0, len(level), BATCH)
        ]
        level = np.concatenate(below)
        if len(level) > num_pages:
            raise ValueError("pages of its tree occur twice")
    return sum(_leaves(pages, level[k : k + BATCH], num_pages) for k in range(0, len(level), BATCH))


class _Nodes(NamedTuple):
    """The nodes of some pages: arrays of one number for each node, with the pages' bytes."""

    batch: U8
    """The bytes of the pages, one after the other."""
    start: I64
    """Where a node starts in ``batch``."""
    room: I64
    """Bytes from there to the end of its page."""
    numbers: I64
    """Shape (nodes,4): the four 16-bit numbers of a node."""


def _branches(pages: U8, level: I64, num_pages: int) -> I64:
    """Check branch pages and return the pages below."""
    nodes = _nodes(pages, level, num_pages, BRANCH)
    low, middle, high, key = nodes.numbers.T
    if (nodes.room < 8 + key).any():
        raise ValueError("a key of its tree goes past the end of its page")
    return low + (middle << 16) + (high << 32)


def _leaves(pages: U8, level: I64, num_pages: int) -> int:
    """Check leaf pages and return the number of their nodes."""
    nodes = _nodes(pages, level, num_pages, LEAF)
    low, middle, flags, key = nodes.numbers.T
    size = low + (middle << 16)
    is_long = flags == LONG_VALUE
    if ((flags != 0) & ~is_long).any():
        raise ValueError("a value of its tree has unknown flags")
    if (nodes.room < 8 + key + np.where(is_long, 8, size)).any():
        raise ValueError("a value goes past the end of its page")
    where = nodes.start[is_long] + 8 + key[is_long]
    first_page = _gather(nodes.batch, where, 8).view("<u8")[:, 0]
    page_size = pages.shape[1]
    needed = (size[is_long] + HEADER + page_size - 1) // page_size
    if (first_page > num_pages - needed).any() or (needed > num_pages).any():
        raise ValueError("a value goes past the end of the file")
    return len(size)


def _nodes(pages: U8, level: I64, num_pages: int, kind: int) -> _Nodes:
    """Check the headers of pages of one kind, and return their nodes."""
    if (level < 2).any() or (level >= num_pages).any():
        raise ValueError("its tree names a page that it does not have")
    batch = np.ascontiguousarray(pages[level])
    number = batch[:, :8].copy().view("<u8")[:, 0]
    _, flags, lower, upper = batch[:, 8:HEADER].copy().view("<u2").astype(np.int64).T
    page_size = batch.shape[1]
    is_valid = (number == level.astype(np.uint64)) & (flags & 0xFF == kind)
    is_valid &= (lower >= HEADER + 2) & (lower % 2 == 0) & (lower <= upper) & (upper <= page_size)
    if not is_valid.all():
        raise ValueError(f"page {level[~is_valid][0]} is not a page of its tree")
    counts = (lower - HEADER) // 2
    rows = np.repeat(np.arange(len(level)), counts)
    positions = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    flat = batch.reshape(-1)
    offset_at = rows * page_size + HEADER + 2 * positions
    offsets = _gather(flat, offset_at, 2).view("<u2")[:, 0].astype(np.int64)
    room = page_size - offsets
    if (offsets < lower[rows]).any() or (room < 8).any():
        raise ValueError("an entry of its tree lies outside its page")
    start = rows * page_size + offsets
    numbers = _gather(flat, start, 8).view("<u2").astype(np.int64)
    return _Nodes(flat, start, room, numbers)


def _gather(flat: U8, start: I64, count: int) -> U8:
    """Return ``count`` bytes from each start, shape (len(start),count)."""
    return np.ascontiguousarray(flat[start[:, None] + np.arange(count)])
