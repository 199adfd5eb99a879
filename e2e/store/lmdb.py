"""The patch store: JPEG bytes of many slides in one LMDB file. The only user of LMDB for our format.

Layout of the file (``subdir=False``; no pickle anywhere):

- ``header``: JSON ``{"format", "version", "recipe"}``; the recipe says how the patches were cut.
- ``s:<slide id>``: one line of JSON, then coords (N,2) int32 little-endian, then CRC-32 of every
  JPEG (N,) uint32 little-endian. It is written last, in the transaction of the slide's patches:
  a slide is in the store whole or not at all. A slide whose places nobody knows says
  ``"coords": false`` and has the CRCs alone; the first of these makes the store's version 2, which
  programs that know version 1 refuse by that number.
- ``p<number><index>`` (both big-endian uint32): a patch as raw JPEG bytes. Fixed-width keys keep a
  slide's patches together and in order, so reading a slide walks the file forwards.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import numpy as np
from lmdb import _envid
from numpy.typing import NDArray

from e2e.errors import DamagedDataError, OneRankError, UserError, format_list
from e2e.store.records import PlacelessRecord, SlideRecord

T = TypeVar("T")

FORMAT = "e2e patch store"
VERSION = 2
MAP_SIZE = 1 << 40  # address space, not disk: the file grows as it fills
GROWTH = 1 << 36  # how far a file may grow while it is open for reading; address space again
LONGEST_ID = 500  # bytes; LMDB's keys end at 511
ATTEMPTS = 5  # at a snapshot that a writer keeps overwriting
SPARSE = 8  # reading ahead pays where one patch of so many is wanted, measured on a virtual disk
PIECE = 1 << 17  # bytes; what is asked for at once, Linux cuts to the disk's readahead

_HEADER = b"header"
_SLIDE = b"s:"


READERS = 1024
"""Reading transactions at a time that a lock file has room for, over all processes of a machine."""


class PatchStore:
    """Read a store. Cheap to copy into worker processes: the file is opened in each on first use.

    Raises:
        UserError: no such file, not a store, a newer version, or a file that was cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"no patch store at {self.path}\n  make it with tools/pack_lmdb.py")

        def contents(txn: lmdb.Transaction) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
            recipe = _read_header(txn, self.path)["recipe"]
            metas = {slide: _metadata(value) for slide, value in _slide_values(txn)}
            return recipe, {slide: (m["number"], m["count"]) for slide, m in metas.items()}

        self.recipe: dict[str, Any]
        self._numbers: dict[str, tuple[int, int]]
        self.recipe, self._numbers = snapshot(self.path, contents)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __contains__(self, slide: str) -> bool:
        return slide in self._numbers

    @property
    def slides(self) -> list[str]:
        """Ids of the slides, in the order of their keys."""
        return list(self._numbers)

    def count(self, slide: str) -> int:
        """Number of patches of a slide."""
        return self._numbers[slide][1]

    def record(self, slide: str) -> SlideRecord:
        """What is known of ``slide``; DamagedDataError when its checksum does not hold."""
        return self._read_record(slide)[0]

    def read(self, slide: str, indices: Sequence[int] | NDArray[np.int64]) -> list[bytes]:
        """JPEG bytes of the given patches, in the order asked for.

        Raises:
            DamagedDataError: names the slide and the patch that is missing or empty.
        """
        return self.lend(slide, indices, lambda jpegs: [bytes(jpeg) for jpeg in jpegs])

    def lend(
        self,
        slide: str,
        indices: Sequence[int] | NDArray[np.int64],
        work: Callable[[Sequence[bytes | memoryview]], T],
    ) -> T:
        """What ``work`` makes of the JPEGs as they lie in the file, see :class:`Store`: no copy.

        A copy would cost little, but it holds the interpreter's lock, for which decoding threads wait.
        """
        number, count = self._numbers[slide]
        return snapshot(
            self.path,
            lambda txn: work(_find_patches(txn, self.path, slide, number, count, indices)),
        )

    def checksums(self, slide: str) -> NDArray[np.uint32]:
        """(N,) CRC-32 of every JPEG as it was packed; errors as of :meth:`record`."""
        return self._read_record(slide)[1]

    def damage(self, slide: str) -> Iterator[str]:
        """Compare every value of ``slide`` with its checksum; yields a line per fault."""
        try:
            record, checksums = self._read_record(slide)
        except DamagedDataError as error:
            yield str(error)
            return
        number, _ = self._numbers[slide]
        for index in range(record.count):
            try:
                value = get(self.path, _patch_key(number, index))
            except DamagedDataError as error:
                yield f"slide '{slide}' patch {index}: {error}"
                continue
            if not value:
                fault = "missing" if value is None else "is of zero bytes"
                yield f"slide '{slide}' patch {index}: {fault}"
            elif zlib.crc32(value) != checksums[index]:
                yield f"slide '{slide}' patch {index}: checksum differs"

    def _read_record(self, slide: str) -> tuple[SlideRecord, NDArray[np.uint32]]:
        return snapshot(self.path, lambda txn: _unpack_record(txn, self.path, slide))


class StoreWriter:
    """Make a store, or go on with one; a context manager.

    Args:
        path: the file.
        recipe: how the patches are cut, JSON values only. Going on with another recipe is an error,
            because one store holds patches of one kind.

    Raises:
        UserError: the file is no store, or was made by another recipe, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], recipe: dict[str, Any]) -> None:
        self.path = Path(path)
        self.recipe = recipe
        self.path.parent.mkdir(parents=True, exist_ok=True)
        existed = self.path.exists() and self.path.stat().st_size > 0
        try:
            if existed:
                _check_length(self.path)
            self._env = lmdb.open(
                str(self.path), subdir=False, map_size=MAP_SIZE, max_readers=READERS
            )
            self._env.reader_check()  # readers that were killed hold their snapshots for ever
        except lmdb.Error as error:
            raise _open_error(self.path, error) from error
        try:
            self._begin(existed)
        except lmdb.Error as error:
            self._env.close()
            raise UserError(f"cannot write to {self.path}: {error}; is the disk full?") from error
        except UserError:
            self._env.close()
            raise

    def _begin(self, existed: bool) -> None:
        with self._env.begin(write=True) as txn:
            if txn.stat()["entries"] == 0:
                txn.put(_HEADER, _pack_header(self.recipe, version=1))
            found = _read_header(txn, self.path)["recipe"]
            if existed and found != self.recipe:
                keys = sorted(found.keys() | self.recipe.keys())
                raise UserError(
                    f"{self.path} was packed in another way\n"
                    + format_list(
                        f"{key}: {found.get(key)} in the store, {self.recipe.get(key)} asked for"
                        for key in keys
                        if found.get(key) != self.recipe.get(key)
                    )
                    + "\n  choose another --out, or the store's own settings"
                )
            self._done = {slide for slide, _ in _slide_values(txn)}

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was added stays."""
        self._env.close()

    @property
    def done(self) -> frozenset[str]:
        """Ids of the slides that are in the store."""
        return frozenset(self._done)

    def record(self, slide: str) -> SlideRecord:
        """As :meth:`PatchStore.record`; a file cannot be opened a second time while it is written."""
        with self._env.begin(buffers=True) as txn:
            return _unpack_record(txn, self.path, slide)[0]

    def read(self, slide: str, indices: Sequence[int] | NDArray[np.int64]) -> list[bytes]:
        """As :meth:`PatchStore.read`."""
        with self._env.begin(buffers=True) as txn:
            meta = _metadata(txn.get(_SLIDE + slide.encode()))
            where = self.path, slide, meta["number"], meta["count"]
            return [bytes(jpeg) for jpeg in _find_patches(txn, *where, indices)]

    def add(self, record: SlideRecord, jpegs: Iterable[bytes]) -> None:
        """Put one slide in, whole or not at all. ``jpegs`` is consumed as it is written.

        Raises:
            UserError: the disk is full, another process writes too, or the id cannot be a key.
            ValueError: the number of JPEGs is not that of the record, or the slide is there.
        """
        key = _SLIDE + record.slide.encode()
        if not record.slide or len(record.slide.encode()) > LONGEST_ID:
            raise UserError(f"slide id '{record.slide}' must have 1 to {LONGEST_ID} bytes")
        try:
            with self._env.begin(write=True, buffers=True) as txn:
                if txn.get(key) is not None:
                    raise ValueError(f"slide '{record.slide}' is in {self.path} already")
                number = len(self._done)
                checksums = []
                for index, jpeg in enumerate(jpegs):
                    if not txn.put(_patch_key(number, index), jpeg, overwrite=False):
                        raise UserError(f"another process is writing to {self.path}; stop one")
                    checksums.append(zlib.crc32(jpeg))
                txn.put(key, _pack_record(record, number, checksums))
                if record.coords is None:
                    txn.put(_HEADER, _pack_header(self.recipe, version=2))
        except lmdb.Error as error:  # a full disk is a DiskError, or an "Input/output error"
            raise UserError(
                f"cannot write slide '{record.slide}' to {self.path}: {error}\n"
                "  the slides before it are safe; free disk space and run the same command again"
            ) from error
        self._done.add(record.slide)


def get(path: Path, key: bytes) -> bytes | None:
    """A copy of one value of an LMDB file; errors as of :func:`snapshot`."""

    def value(txn: lmdb.Transaction) -> bytes | None:
        found = txn.get(key)
        return None if found is None else bytes(found)

    return snapshot(path, value)


def snapshot(path: Path, work: Callable[[lmdb.Transaction], T]) -> T:
    """What ``work`` makes of a read transaction of the LMDB file ``path``.

    Keys and values come as buffers that end with the transaction. ``work`` may be called again:
    without a lock file that can be written (on a read-only disk there is none) a writer may overwrite
    pages of a snapshot from the second commit after it on. What was read then is dropped.

    Raises:
        UserError: what ``work`` raises; not an LMDB file; cut short; written too fast to be read.
        DamagedDataError: what lmdb, json and text decoding make of damaged bytes.
    """
    environment = _environment(path)
    for _ in range(ATTEMPTS):
        began = environment.info()["last_txnid"]
        result: Any = None
        fault: Exception | None = None
        try:
            with environment.begin(buffers=True) as txn:
                began = txn.id()
                result = work(txn)
        except lmdb.MapResizedError as error:
            raise OneRankError(
                f"{path} has grown by more than {GROWTH >> 30} GiB since it was opened\n"
                "  start again"
            ) from error
        except (lmdb.Error, ValueError, KeyError, UserError) as error:  # ValueError: json, unicode
            fault = error
        if environment.flags()["lock"] or environment.info()["last_txnid"] - began < 2:
            if fault is None:
                return result
            if isinstance(fault, UserError):
                raise fault
            raise DamagedDataError(
                f"{path} is damaged: {fault}\n  copy it again, or pack it anew"
            ) from fault
    raise OneRankError(
        f"{path} is being written faster than it can be read\n  wait until the writer is done"
    )


_ENVIRONMENTS: dict[tuple[int, str], lmdb.Environment] = {}
_OPENING = threading.Lock()


def _after_fork() -> None:
    # The files must be opened anew: the parent's are not closed here, since that would free the slots
    # of the parent's readers in the lock file, and some may be in the hands of a thread that is not
    # here. That lmdb calls them open already is no fault then: a file's locks are not inherited.
    global _OPENING
    for environment in _ENVIRONMENTS.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(environment))
    _ENVIRONMENTS.clear()
    _OPENING = threading.Lock()  # it may have been held
    keys, process = _envid.env_keys, os.getpid()
    _envid.env_keys = lambda path, subdir: tuple((process, key) for key in keys(path, subdir))


os.register_at_fork(after_in_child=_after_fork)


def _environment(path: Path) -> lmdb.Environment:
    """The open file, one per process: LMDB must not be opened twice nor carried over a fork."""
    status = path.stat()
    key = (os.getpid(), f"{status.st_dev}:{status.st_ino}")
    with _OPENING:
        if key not in _ENVIRONMENTS:
            try:
                _check_length(path)
                _ENVIRONMENTS[key] = lmdb.open(
                    str(path),
                    map_size=path.stat().st_size + GROWTH,
                    subdir=False,
                    readonly=True,
                    lock=_may_lock(path),
                    max_readers=READERS,
                    # For a few patches of many, the kernel's readahead reads what nobody wants.
                    # For many of a slide, read_ahead asks for them all.
                    readahead=False,
                    meminit=False,
                )
            except lmdb.Error as error:
                raise _open_error(path, error) from error
        return _ENVIRONMENTS[key]


def _may_lock(path: Path) -> bool:
    """Whether readers can be known to a writer: without that it would overwrite what they read.

    A store that no writer has been at has no lock file, and none is made for reading it.
    """
    return os.access(f"{path}-lock", os.R_OK | os.W_OK)


def read_ahead(get: Callable[[int], Any], indices: Sequence[int]) -> None:
    """Ask the kernel for a slide's values where ``indices`` want a good share of them.

    A slide's values lie together and in order in the file. Read one by one, a cold one costs a
    wait for each of its pages; asked for at once, the disk works at its full speed.

    Args:
        get: index -> value as a buffer of the map.
        indices: the patches that will be read next.
    """
    if len(indices) < 8 or (max(indices) - min(indices)) > SPARSE * len(indices):
        return
    low, high = min(indices), max(indices)
    first, last = get(low), get(high)
    if not first or not last:
        return  # told where that patch is read
    start, end = _address(first) & -mmap.PAGESIZE, _address(last) + len(last)
    if not 0 < end - start <= 4 * (high - low + 1) * max(len(first), len(last)):
        return  # not in order after all
    for at in range(start, end, PIECE):
        _LIBC.madvise(at, min(PIECE, end - at), mmap.MADV_WILLNEED)


_LIBC = ctypes.CDLL(None)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _address(value: Any) -> int:
    return np.frombuffer(value, np.uint8).ctypes.data


def _find_patches(
    txn: lmdb.Transaction,
    path: Path,
    slide: str,
    number: int,
    count: int,
    indices: Sequence[int] | NDArray[np.int64],
) -> list[memoryview]:
    def value(index: int) -> Any:
        return txn.get(_patch_key(number, index))

    wanted = np.asarray(indices, np.int64).tolist()
    read_ahead(value, wanted)
    jpegs = [value(index) for index in wanted]
    for index, jpeg in zip(wanted, jpegs, strict=True):
        if not jpeg:
            raise missing_patch_error(path, slide, index, count, empty=jpeg is not None)
    return jpegs


def missing_patch_error(
    path: Path, slide: str, index: int, count: int, *, empty: bool
) -> DamagedDataError:
    """The error of a patch that is not there, or has no bytes."""
    fault = f"patch {index} is of zero bytes" if empty else f"lacks patch {index} of {count}"
    return DamagedDataError(
        f"{path}: slide '{slide}' {fault}\n  pack it again, or see tools/inspect_lmdb.py --verify"
    )


def _check_length(path: Path) -> None:
    """UserError when the file ends before the last page it says it has.

    Reading past the end of a mapped file kills the process with SIGBUS, so this is found here, from
    the two meta pages: magic 0xBEEFC0DE, version 1, ..., last used page.
    """
    with path.open("rb") as file:
        head = file.read(1 << 16)
    length = path.stat().st_size  # after the meta pages: a writer lets the file grow before them
    if len(head) < 152 or struct.unpack_from("<I", head, 16)[0] != 0xBEEFC0DE:
        raise UserError(f"{path} is no patch store (not an LMDB file)")
    page = struct.unpack_from("<I", head, 16 + 24)[0]
    newest = (-1, 0)
    for start in (16, page + 16):
        if len(head) >= start + 136:
            last_page, transaction = struct.unpack_from("<QQ", head, start + 120)
            newest = max(newest, (transaction, last_page))
    if length < (newest[1] + 1) * page:
        raise UserError(
            f"{path} was cut short: {length:,} bytes of {(newest[1] + 1) * page:,}\n"
            "  copy it again, or pack it anew"
        )


def _open_error(path: Path, error: lmdb.Error) -> UserError:
    return UserError(f"cannot open {path} as a patch store: {error}")


def _read_header(txn: lmdb.Transaction, path: Path) -> dict[str, Any]:
    value = txn.get(_HEADER)
    if value is None:
        foreign = txn.get(b"__pn__") is not None or txn.get(b"__keys__") is not None
        kind = "an LMDB of the ABMILX project" if foreign else "an LMDB of another kind"
        kind = kind if txn.stat()["entries"] else "an LMDB with nothing in it"
        raise UserError(f"{path} is no patch store: {kind}\n  make one with tools/pack_lmdb.py")
    header = json.loads(bytes(value))
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is no patch store: its header says '{header.get('format')}'")
    if header["version"] > VERSION:
        raise UserError(
            f"{path} has store version {header['version']}; this program reads up to {VERSION}\n"
            "  update the program, or pack the slides again"
        )
    return header


def _pack_header(recipe: dict[str, Any], version: int) -> bytes:
    return json.dumps({"format": FORMAT, "version": version, "recipe": recipe}).encode()


def _slide_values(txn: lmdb.Transaction) -> Iterator[tuple[str, Any]]:
    with txn.cursor() as cursor:
        found = cursor.set_range(_SLIDE)
        while found and bytes(cursor.key()).startswith(_SLIDE):
            yield bytes(cursor.key())[len(_SLIDE) :].decode(), cursor.value()
            found = cursor.next()


def _patch_key(number: int, index: int) -> bytes:
    return b"p" + struct.pack(">II", number, index)


def _checksum(meta: dict[str, Any], arrays: bytes) -> str:
    return hashlib.blake2b(json.dumps(meta).encode() + arrays, digest_size=16).hexdigest()


def _metadata(value: Any) -> dict[str, Any]:
    head = bytes(value[:4096])
    return json.loads(head[: head.index(b"\n")])


def _unpack_record(
    txn: lmdb.Transaction, path: Path, slide: str
) -> tuple[SlideRecord, NDArray[np.uint32]]:
    value = bytes(txn.get(_SLIDE + slide.encode(), b""))
    if not value:
        raise DamagedDataError(f"{path} has no slide '{slide}'")
    meta = _metadata(value)
    arrays = value[value.index(b"\n") + 1 :]
    count, placed = meta["count"], meta.get("coords", True)
    checksum = meta.pop("checksum")
    if len(arrays) != (12 if placed else 4) * count or _checksum(meta, arrays) != checksum:
        raise DamagedDataError(f"{path}: the record of slide '{slide}' is damaged")
    checksums = np.frombuffer(arrays, "<u4", count, offset=len(arrays) - 4 * count)
    known = {name: meta[name] for name in _KNOWN}
    if not placed:
        return PlacelessRecord(slide=slide, coords=None, patches=count, **known), checksums
    coords = np.frombuffer(arrays, "<i4", 2 * count).reshape(count, 2).astype(np.int32)
    return SlideRecord(slide=slide, coords=coords, **known), checksums


_KNOWN = ("level0_px", "mpp", "patch_px", "width", "height", "source", "source_bytes")


def _pack_record(record: SlideRecord, number: int, checksums: list[int]) -> bytes:
    count, coords = len(checksums), record.coords
    shape = (record.count, 2) if coords is None else coords.shape
    if shape != (count, 2):
        raise ValueError(f"slide '{record.slide}': {count} JPEGs for coords of shape {shape}")
    arrays = b"" if coords is None else np.asarray(coords, "<i4").tobytes()
    arrays += np.asarray(checksums, "<u4").tobytes()
    meta: dict[str, Any] = {"coords": False} if coords is None else {}
    meta |= {"number": number, "count": count} | {name: getattr(record, name) for name in _KNOWN}
    meta["source"] = record.source[-300:]  # the line must stay below 4,096 bytes, however escaped
    meta["checksum"] = _checksum(meta, arrays)
    return json.dumps(meta).encode() + b"\n" + arrays
