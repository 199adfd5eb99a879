"""The patch store: JPEG bytes of many slides in one LMDB file. The only user of LMDB for our format.

Layout of the file (``subdir=False``; no pickle anywhere):

- ``header``: JSON ``{"format", "version", "recipe"}``; the recipe says how the patches were cut.
- ``s:<slide id>``: one line of JSON, then coords (N,2) int32 little-endian, then CRC-32 of every
  JPEG (N,) uint32 little-endian. It is written last, in the transaction of the slide's patches:
  a slide is in the store whole or not at all.
- ``p<number><index>`` (both big-endian uint32): a patch as raw JPEG bytes. Fixed-width keys keep a
  slide's patches together and in order, so reading a slide walks the file forwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from e2e.errors import DamagedDataError, UserError, listing

FORMAT = "e2e patch store"
VERSION = 1
MAP_SIZE = 1 << 40  # address space, not disk: the file grows as it fills
LONGEST_ID = 500  # bytes; LMDB's keys end at 511

_HEADER = b"header"
_SLIDE = b"s:"


@dataclass(frozen=True)
class SlideRecord:
    """All that a store knows of a slide but the pixels."""

    slide: str
    coords: NDArray[np.int32]
    """(N,2) x, y of each patch's upper left corner, level-0 pixels."""
    level0_px: float
    """Side of a patch in level-0 pixels."""
    mpp: float | None
    """um per pixel of the stored patches; None where a folder of patches did not say."""
    patch_px: int
    """Side of the stored JPEGs in pixels."""
    width: int
    """Of the slide at level 0; 0 when unknown."""
    height: int
    source: str
    """File name the patches were cut from."""
    source_bytes: int

    @property
    def count(self) -> int:
        """Number of patches."""
        return len(self.coords)


class PatchStore:
    """Read a store. Cheap to copy into worker processes: the file is opened in each on first use.

    Raises:
        UserError: no such file, not a store, a newer version, or a file that was cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"no patch store at {self.path}\n  make it with tools/pack_lmdb.py")
        self._numbers: dict[str, tuple[int, int]] = {}
        with _reading(self.path) as txn:
            self.recipe: dict[str, Any] = _read_header(txn, self.path)["recipe"]
            for slide, value in _slide_values(txn):
                meta = _metadata(value)
                self._numbers[slide] = (meta["number"], meta["count"])

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
        """JPEG bytes of the given patches, in the order asked for."""
        number, count = self._numbers[slide]
        jpegs = []
        with _reading(self.path) as txn:
            for index in indices:
                value = txn.get(_patch_key(number, int(index)))
                if value is None:
                    raise DamagedDataError(
                        f"{self.path}: slide '{slide}' lacks patch {index} of {count}\n"
                        "  pack it again, or see tools/inspect_lmdb.py --verify"
                    )
                jpegs.append(bytes(value))
        return jpegs

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
                with _reading(self.path) as txn:
                    value = txn.get(_patch_key(number, index))
                    found = None if value is None else zlib.crc32(value)
            except DamagedDataError as error:
                yield f"slide '{slide}' patch {index}: {error}"
                continue
            if found is None:
                yield f"slide '{slide}' patch {index}: missing"
            elif found != checksums[index]:
                yield f"slide '{slide}' patch {index}: checksum differs"

    def _read_record(self, slide: str) -> tuple[SlideRecord, NDArray[np.uint32]]:
        with _reading(self.path) as txn:
            return _unpack_record(txn, self.path, slide)


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
            self._env = lmdb.open(str(self.path), subdir=False, map_size=MAP_SIZE)
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
                header = {"format": FORMAT, "version": VERSION, "recipe": self.recipe}
                txn.put(_HEADER, json.dumps(header).encode())
            found = _read_header(txn, self.path)["recipe"]
            if existed and found != self.recipe:
                keys = sorted(found.keys() | self.recipe.keys())
                raise UserError(
                    f"{self.path} was packed in another way\n"
                    + listing(
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

    def add(self, record: SlideRecord, jpegs: Iterable[bytes]) -> None:
        """Put one slide in, whole or not at all. ``jpegs`` is consumed as it is written.

        Raises:
            UserError: the disk is full, another process writes too, or the id cannot be a key.
            ValueError: the number of JPEGs is not that of the coords, or the slide is there.
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
        except lmdb.Error as error:  # a full disk is a DiskError, or an "Input/output error"
            raise UserError(
                f"cannot write slide '{record.slide}' to {self.path}: {error}\n"
                "  the slides before it are safe; free disk space and run the same command again"
            ) from error
        self._done.add(record.slide)


@contextmanager
def _reading(path: Path) -> Iterator[lmdb.Transaction]:
    """A read transaction; what lmdb and json make of damaged bytes is a DamagedDataError."""
    try:
        with _environment(path).begin(buffers=True) as txn:
            yield txn
    except (lmdb.Error, ValueError, KeyError) as error:  # ValueError: also of json and of unicode
        raise DamagedDataError(
            f"{path} is damaged: {error}\n  copy it again, or pack it anew"
        ) from error


_ENVIRONMENTS: dict[tuple[int, str], lmdb.Environment] = {}
# A forked process must open the files anew, and lmdb refuses that while the parent's are at hand.
os.register_at_fork(after_in_child=_ENVIRONMENTS.clear)


def _environment(path: Path) -> lmdb.Environment:
    """The open file, one per process: LMDB must not be opened twice nor carried over a fork."""
    status = path.stat()
    key = (os.getpid(), f"{status.st_dev}:{status.st_ino}")
    if key not in _ENVIRONMENTS:
        try:
            _check_length(path)
            _ENVIRONMENTS[key] = lmdb.open(
                str(path), subdir=False, readonly=True, lock=False, readahead=False, meminit=False
            )
        except lmdb.Error as error:
            raise _open_error(path, error) from error
    return _ENVIRONMENTS[key]


def _check_length(path: Path) -> None:
    """UserError when the file ends before the last page it says it has.

    Reading past the end of a mapped file kills the process with SIGBUS, so this is found here, from
    the two meta pages: magic 0xBEEFC0DE, version 1, ..., last used page.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1 << 16)
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
    count = meta["count"]
    checksum = meta.pop("checksum")
    if len(arrays) != 12 * count or _checksum(meta, arrays) != checksum:
        raise DamagedDataError(f"{path}: the record of slide '{slide}' is damaged")
    coords = np.frombuffer(arrays, "<i4", 2 * count).reshape(count, 2).astype(np.int32)
    checksums = np.frombuffer(arrays, "<u4", count, offset=8 * count)
    meta.pop("number")
    meta.pop("count")
    return SlideRecord(slide=slide, coords=coords, **meta), checksums


def _pack_record(record: SlideRecord, number: int, checksums: list[int]) -> bytes:
    coords = np.asarray(record.coords, "<i4")
    if coords.shape != (len(checksums), 2):
        raise ValueError(
            f"slide '{record.slide}': {len(checksums)} JPEGs for coords of shape {coords.shape}"
        )
    arrays = coords.tobytes() + np.asarray(checksums, "<u4").tobytes()
    meta = {
        "number": number,
        "count": len(checksums),
        "level0_px": record.level0_px,
        "mpp": record.mpp,
        "patch_px": record.patch_px,
        "width": record.width,
        "height": record.height,
        "source": record.source[-300:],  # the line must stay below 4,096 bytes, however escaped
        "source_bytes": record.source_bytes,
    }
    meta["checksum"] = _checksum(meta, arrays)
    return json.dumps(meta).encode() + b"\n" + arrays
