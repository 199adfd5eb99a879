"""Patch stores: the JPEG patches of many slides in one LMDB file.

Layout of the file (``subdir=False``; nothing in it is a pickle):

- ``header``: JSON ``{"format", "version", "recipe"}``. The recipe says how the patches were cut.
- ``s:<slide id>``: one line of JSON, then coords (N, 2) int32 little-endian, then the CRC-32 of every
  JPEG, (N,) uint32 little-endian. It is written last, in the transaction of the slide's patches, so a
  slide is in the store completely or not at all. A slide without coordinates has ``"coords": false``
  and the CRCs alone. The first such slide makes the store version 2, which programs that know only
  version 1 refuse by its number.
- ``p<number><index>`` (both big-endian uint32): a patch as raw JPEG bytes. Keys of fixed width keep
  the patches of a slide together and in order, so reading a slide walks forward through the file.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lmdb
import numpy as np
from imagecodecs import deflate_crc32
from numpy.typing import NDArray

from e2e.errors import DamagedDataError, OneRankError, UserError, format_list
from e2e.slides import check_ids
from e2e.store.packed_records import check_complete, pack_record, read_metadata, unpack_record
from e2e.store.records import Indices, SlideRecord
from e2e.store.snapshot import (
    MAX_READERS,
    check_length,
    copy_value,
    file_key,
    is_open,
    missing_patch_error,
    open_error,
    read_ahead,
    read_snapshot,
)
from e2e.store.tree import check_tree

T = TypeVar("T")

FORMAT = "e2e patch store"
VERSION = 2

MAP_SIZE = 1 << 40
"""Bytes a store may grow to while it is written. Address space, not disk: the file grows as it fills."""

_HEADER = b"header"
_SLIDE = b"s:"


class PatchStore:
    """Read a patch store, see :class:`e2e.store.records.PatchReader`.

    It is cheap to copy into worker processes: each opens the file on first use.

    Parameters
    ----------
    path : str or path-like
        The store, as written by ``e2e pack``.
    verify : bool
        Compare each patch with its checksum when it is read for the first time.

    Raises
    ------
    UserError
        If there is no such file, it is not a store, it has a newer version, or it was cut short; later,
        if another process finds another file in its place.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"no patch store at {self.path}\n  make it with e2e pack")
        self.recipe: dict[str, Any]
        self._slides: dict[str, _Entry]
        self._verify = verify
        self._verified: dict[str, NDArray[np.bool_]] = {}
        self._file = file_key(self.path)
        self.recipe, self._slides = read_snapshot(self.path, self._read_contents, self._file)

    def __contains__(self, slide: str) -> bool:
        return slide in self._slides

    @property
    def slides(self) -> list[str]:
        """Ids of the slides, in the order of their keys."""
        return list(self._slides)

    def num_patches(self, slide: str) -> int:
        """Return the number of patches of a slide."""
        return self._slides[slide].num_patches

    def record(self, slide: str) -> SlideRecord:
        """Return the record of a slide.

        Raises
        ------
        DamagedDataError
            If its checksum does not match.
        """
        return self._read_record(slide)[0]

    def joined_slides(self, slide: str) -> list[str]:
        """See :class:`e2e.store.records.SlideReader`."""
        return [slide]

    def slide_records(self, slide: str) -> list[SlideRecord]:
        """See :class:`e2e.store.records.SlideReader`."""
        return [self.record(slide)]

    def read(self, slide: str, indices: Indices) -> list[bytes]:
        """Return the JPEG bytes of patches, in the order of `indices`.

        Raises
        ------
        DamagedDataError
            If a patch is missing, empty or not as it was packed; the message names slide and patch.
        """
        return self.borrow(slide, indices, lambda jpegs: [bytes(jpeg) for jpeg in jpegs])

    def borrow(
        self, slide: str, indices: Indices, work: Callable[[Sequence[bytes | memoryview]], T]
    ) -> T:
        """Call `work` with the JPEGs as they lie in the mapped file, see :class:`PatchReader`.

        Copying them would be fast, but it holds the interpreter lock, which decoding threads need.
        """
        number, num_patches, _ = self._slides[slide]

        def find_and_work(txn: lmdb.Transaction) -> T:
            jpegs = _find_patches(txn, self.path, slide, number, num_patches, indices)
            if self._verify:
                self._compare_checksums(txn, slide, indices, jpegs)
            return work(jpegs)

        return self._read_snapshot(find_and_work)

    def _compare_checksums(
        self, txn: lmdb.Transaction, slide: str, indices: Indices, jpegs: Sequence[memoryview]
    ) -> None:
        """Compare the patches that were not read before with the checksums of their slide."""
        entry, pending = self._slides[slide], np.asarray(indices, np.int64)
        is_verified = self._verified.get(slide)
        if is_verified is not None and is_verified[pending].all():
            return
        value = txn.get(_SLIDE + slide.encode(), b"")
        if is_verified is None:
            if not value or read_metadata(value)["checksum"] != entry.checksum:
                raise _changed_error(self.path, [slide])
            is_verified = self._verified[slide] = np.zeros(entry.num_patches, bool)
        checksums = np.frombuffer(value, "<u4", offset=len(value) - 4 * entry.num_patches)
        # Seven times faster than zlib's.
        for index, jpeg, expected in zip(
            pending.tolist(), jpegs, checksums[pending].tolist(), strict=True
        ):
            if deflate_crc32(jpeg) != expected:  # pyright: ignore[reportArgumentType]
                raise DamagedDataError(
                    f"{self.path}: slide '{slide}' patch {index} is not as it was packed: its checksum "
                    "differs\n  copy the store again, or pack the slide again; e2e inspect --verify lists "
                    "all faults"
                )
        is_verified[pending] = True

    def _read_snapshot(self, work: Callable[[lmdb.Transaction], T]) -> T:
        """Read the file that was opened first; in another process, one that holds the same."""
        if not is_open(self._file):
            self._open_again()
        return read_snapshot(self.path, work, self._file)

    def _open_again(self) -> None:
        file = file_key(self.path)
        _, slides = read_snapshot(self.path, self._read_contents, file)
        changed = [slide for slide, entry in self._slides.items() if slides.get(slide) != entry]
        if changed:
            raise _changed_error(self.path, changed)
        self._file = file

    def checksums(self, slide: str) -> NDArray[np.uint32]:
        """Return the CRC-32 of every JPEG as it was packed, shape (N,).

        Raises
        ------
        DamagedDataError
            As :meth:`record`.
        """
        return self._read_record(slide)[1]

    def find_damage(self, slide: str) -> Iterator[str]:
        """Compare every value of a slide with its checksum and yield one line per fault."""
        try:
            record, checksums = self._read_record(slide)
        except DamagedDataError as error:
            yield str(error)
            return
        number = self._slides[slide].number
        for index in range(record.num_patches):
            try:
                value = self._read_snapshot(partial(copy_value, key=_patch_key(number, index)))
            except DamagedDataError as error:
                yield f"slide '{slide}' patch {index}: {error}"
                continue
            if not value:
                fault = "missing" if value is None else "has zero bytes"
                yield f"slide '{slide}' patch {index}: {fault}"
            elif zlib.crc32(value) != checksums[index]:
                yield f"slide '{slide}' patch {index}: checksum differs"

    def _read_contents(self, txn: lmdb.Transaction) -> tuple[dict[str, Any], dict[str, _Entry]]:
        """Return the recipe, and what is kept of each slide."""
        recipe = _read_header(txn, self.path)["recipe"]
        metadata = {slide: read_metadata(value) for slide, value in _slide_values(txn)}
        check_ids(metadata, self.path)
        check_complete(metadata, txn.stat()["entries"])
        return recipe, {
            slide: _Entry(meta["number"], meta["count"], meta["checksum"])
            for slide, meta in metadata.items()
        }

    def _read_record(self, slide: str) -> tuple[SlideRecord, NDArray[np.uint32]]:
        return self._read_snapshot(lambda txn: _unpack_record(txn, self.path, slide))


class OtherPatchesError(UserError):
    """A store that is to be continued holds patches that were cut from other files, or in another way."""


class _Entry(NamedTuple):
    """What a reader keeps of a slide."""

    number: int
    """Part of the keys of its patches."""
    num_patches: int
    checksum: str
    """Of its record, which holds the checksums of its patches."""


def _changed_error(path: Path, slides: Sequence[str]) -> UserError:
    return OneRankError(
        f"{path} has changed since it was opened: {len(slides)} slide(s) are not what they were\n"
        f"{format_list(slides, most=3)}\n  start the command again"
    )


class StoreWriter:
    """Create a patch store or append to one; a context manager.

    Parameters
    ----------
    path : str or path-like
        The file.
    recipe : dict
        How the patches are cut; JSON values only. A store holds patches of one kind, so appending
        with another recipe is an error.

    Raises
    ------
    UserError
        If the file is not a store, has another recipe, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], recipe: dict[str, Any]) -> None:
        self.path = Path(path)
        self.recipe = recipe
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_old = self.path.exists() and self.path.stat().st_size > 0
        try:
            if is_old:
                check_length(self.path)
            self._env = lmdb.open(
                str(self.path), subdir=False, map_size=MAP_SIZE, max_readers=MAX_READERS
            )
            if is_old:
                check_tree(self.path, self._env.info()["last_txnid"])
            self._env.reader_check()  # readers that were killed keep their snapshots for ever
        except lmdb.Error as error:
            raise open_error(self.path, error) from error
        except ValueError as error:
            self._env.close()
            raise DamagedDataError(
                f"{self.path} is damaged: {error}\n  copy it again, or pack it again"
            ) from error
        try:
            self._write_header(is_old)
        except lmdb.Error as error:
            self._env.close()
            raise UserError(
                f"cannot write to {self.path}: {error}\n  check that the disk is not full"
            ) from error
        except UserError:
            self._env.close()
            raise

    def _write_header(self, is_old: bool) -> None:
        """Write the header of a new store, check that of an old one, and list the slides."""
        with self._env.begin(write=True) as txn:
            if txn.stat()["entries"] == 0:
                txn.put(_HEADER, _pack_header(self.recipe, version=1))
            recipe = _read_header(txn, self.path)["recipe"]
            if is_old and recipe != self.recipe:
                keys = sorted(recipe.keys() | self.recipe.keys())
                raise OtherPatchesError(
                    f"{self.path} was packed with other settings\n"
                    + format_list(
                        f"{key}: {recipe.get(key)} in the store, {self.recipe.get(key)} requested"
                        for key in keys
                        if recipe.get(key) != self.recipe.get(key)
                    )
                    + "\n  choose another --out, or use the settings of the store"
                )
            self._done = {slide for slide, _ in _slide_values(txn)}

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. What was added stays."""
        self._env.close()

    @property
    def done(self) -> frozenset[str]:
        """Ids of the slides in the store."""
        return frozenset(self._done)

    def record(self, slide: str) -> SlideRecord:
        """Return the record of a slide, as :meth:`PatchStore.record`.

        A process cannot open the file a second time while it writes it.
        """
        with self._env.begin(buffers=True) as txn:
            return _unpack_record(txn, self.path, slide)[0]

    def read(self, slide: str, indices: Indices) -> list[bytes]:
        """Return the JPEG bytes of patches, as :meth:`PatchStore.read`."""
        with self._env.begin(buffers=True) as txn:
            meta = read_metadata(txn.get(_SLIDE + slide.encode()))
            number, num_patches = meta["number"], meta["count"]
            jpegs = _find_patches(txn, self.path, slide, number, num_patches, indices)
            return [bytes(jpeg) for jpeg in jpegs]

    def add(self, record: SlideRecord, jpegs: Iterable[bytes]) -> None:
        """Add one slide, completely or not at all.

        Parameters
        ----------
        record : SlideRecord
            The slide.
        jpegs : iterable of bytes
            Its `num_patches` patches, in the order of the coords. They are written one by one.

        Raises
        ------
        UserError
            If the disk is full, another process writes too, or the id is empty or too long.
        ValueError
            If the number of JPEGs is not that of the record, or the slide is in the store already.
        """
        check_ids([record.slide], self.path)
        key = _SLIDE + record.slide.encode()
        try:
            with self._env.begin(write=True, buffers=True) as txn:
                if txn.get(key) is not None:
                    raise ValueError(f"slide '{record.slide}' is in {self.path} already")
                number = len(self._done)
                checksums = []
                for index, jpeg in enumerate(jpegs):
                    if not txn.put(_patch_key(number, index), jpeg, overwrite=False):
                        raise UserError(
                            f"another process is writing to {self.path}\n  stop one of the two"
                        )
                    checksums.append(zlib.crc32(jpeg))
                txn.put(key, pack_record(record, number, checksums))
                if record.coords is None:
                    txn.put(_HEADER, _pack_header(self.recipe, version=2))
        except lmdb.Error as error:  # a full disk is a DiskError, or an "Input/output error"
            raise UserError(
                f"cannot write slide '{record.slide}' to {self.path}: {error}\n"
                "  the slides before it are safe; free disk space and run the same command again"
            ) from error
        self._done.add(record.slide)


def _find_patches(
    txn: lmdb.Transaction,
    path: Path,
    slide: str,
    number: int,
    num_patches: int,
    indices: Indices,
) -> list[memoryview]:
    """Return the JPEGs of a slide as buffers of the map; `number` is that of the slide."""

    def get_value(index: int) -> Any:
        return txn.get(_patch_key(number, index))

    index_list: list[int] = np.asarray(indices, np.int64).tolist()
    read_ahead(get_value, index_list)
    jpegs = [get_value(index) for index in index_list]
    for index, jpeg in zip(index_list, jpegs, strict=True):
        if not jpeg:
            raise missing_patch_error(path, slide, index, num_patches, is_empty=jpeg is not None)
    return jpegs


def _read_header(txn: lmdb.Transaction, path: Path) -> dict[str, Any]:
    value = txn.get(_HEADER)
    if value is None:
        is_abmilx = txn.get(b"__pn__") is not None or txn.get(b"__keys__") is not None
        kind = "an LMDB of the ABMILX project" if is_abmilx else "an LMDB of another kind"
        kind = kind if txn.stat()["entries"] else "an empty LMDB"
        raise UserError(f"{path} is not a patch store: {kind}\n  make one with e2e pack")
    header = json.loads(bytes(value))
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a patch store: the format in its header is '{header.get('format')}'"
        )
    if header["version"] > VERSION:
        raise UserError(
            f"{path} has store version {header['version']}; this program reads up to {VERSION}\n"
            "  update the program, or pack the slides again"
        )
    return header


def _pack_header(recipe: dict[str, Any], version: int) -> bytes:
    return json.dumps({"format": FORMAT, "version": version, "recipe": recipe}).encode()


def _slide_values(txn: lmdb.Transaction) -> Iterator[tuple[str, Any]]:
    """Yield id and packed record of each slide."""
    with txn.cursor() as cursor:
        has_more = cursor.set_range(_SLIDE)
        while has_more and bytes(cursor.key()).startswith(_SLIDE):
            yield bytes(cursor.key())[len(_SLIDE) :].decode(), cursor.value()
            has_more = cursor.next()


def _patch_key(number: int, index: int) -> bytes:
    return b"p" + struct.pack(">II", number, index)


def _unpack_record(
    txn: lmdb.Transaction, path: Path, slide: str
) -> tuple[SlideRecord, NDArray[np.uint32]]:
    """Return the record of a slide and the checksums of its patches."""
    value = bytes(txn.get(_SLIDE + slide.encode(), b""))
    if not value:
        raise DamagedDataError(f"{path} has no slide '{slide}'")
    return unpack_record(value, path, slide)
