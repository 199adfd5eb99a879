"""The LMDBs of the ABMILX project, read in place. Their values are pickles; none of them is executed.

Content of such a file (Tang et al. 2025, arXiv:2506.02408, as its published program writes it):
``<slide>-<index>`` (not zero-padded) -> pickle of a patch's JPEG; and pickles of the slide ids
(``__slide__``), of their numbers of patches (``__pn__``), of all keys and of their number. Neither the
coordinates nor the magnification of the patches are in it.

The project decoded these JPEGs to BGR and normalised that with the statistics of RGB. The bytes in the
file are ordinary JPEGs; to reproduce its channel order, swap the channels after decoding.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from e2e.errors import DamagedDataError, UserError
from e2e.slides import check_ids
from e2e.store.coords import find_coords_files, read_coords
from e2e.store.pickles import read_pickle, read_pickled_bytes
from e2e.store.records import Indices, SlideRecord
from e2e.store.snapshot import missing_patch_error, read_ahead, read_snapshot, read_value

T = TypeVar("T")


class AbmilxStore:
    """Read an LMDB of the ABMILX project, see :class:`e2e.store.records.PatchReader`.

    Parameters
    ----------
    path : str or path-like
        The file, or a folder with ``data.mdb``.
    coords : str or path-like, optional
        Folder of the .h5 files that CLAM or TRIDENT made for these patches. Without it records have
        no coords.

    Raises
    ------
    UserError
        If there is no such file, it is not an LMDB of this kind, it was cut short, or `coords` has no
        .h5 file.
    DamagedDataError
        If its lists of slides cannot be read.
    """

    def __init__(
        self, path: str | os.PathLike[str], coords: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = find_data_file(path)
        if not self.path.is_file():
            raise UserError(f"no LMDB at {path}")
        self.recipe: dict[str, Any] = {"source": "abmilx lmdb"}
        self._coords_files: dict[str, Path] | None = None
        if coords is not None:
            self._coords_files = {file.stem: file for file in find_coords_files(Path(coords))}
        if not is_abmilx_file(self.path):
            raise UserError(
                f"{self.path} is not an LMDB of the ABMILX project: it has no keys <slide>-<index>"
            )
        self._counts = self._read_counts()
        slides = self._read_list(b"__slide__", list) or []
        if not all(isinstance(slide, str) for slide in slides):
            raise DamagedDataError(f"{self.path}: __slide__ is not a list of names")
        check_ids([*self._counts, *slides], self.path)
        self._uncounted = [slide for slide in slides if slide not in self._counts]

    def __contains__(self, slide: str) -> bool:
        return slide in self._counts or slide in self._uncounted

    @property
    def slides(self) -> list[str]:
        """Ids of the slides, including those that `num_patches` has no number for."""
        return [*self._counts, *self._uncounted]

    @property
    def has_coords(self) -> bool:
        """Whether records have coords."""
        return self._coords_files is not None

    def num_patches(self, slide: str) -> int:
        """Return the number of patches of a slide.

        Raises
        ------
        DamagedDataError
            If the file lists the slide without a number of patches.
        """
        if slide in self._uncounted:
            raise DamagedDataError(
                f"{self.path}: slide '{slide}' is in __slide__, but its number of patches is not in "
                "__pn__\n  the file is incomplete: create it again, or leave the slide out"
            )
        return self._counts[slide]

    def joined_slides(self, slide: str) -> list[str]:
        """See :class:`e2e.store.records.SlideReader`."""
        return [slide]

    def slide_records(self, slide: str) -> list[SlideRecord]:
        """See :class:`e2e.store.records.SlideReader`."""
        return [self.record(slide)]

    def checksums(self, slide: str) -> None:
        """Return None: such a file holds none."""

    def record(self, slide: str) -> SlideRecord:
        """Return the record of a slide: `patch_px` of its first JPEG, and what `coords` holds.

        Raises
        ------
        DamagedDataError
            If the number of its keys or coords is not its number of patches, or the first patch is
            not a JPEG.
        """
        num_patches = self.num_patches(slide)
        has_more = read_value(self.path, _pickle_key(slide, num_patches)) is not None
        last_key = _pickle_key(slide, num_patches - 1)
        if has_more or (num_patches and read_value(self.path, last_key) is None):
            raise DamagedDataError(
                f"{self.path}: slide '{slide}' has {'more' if has_more else 'fewer'} patches than "
                f"the {num_patches} of __pn__\n  the file is incomplete: create it again"
            )
        record = SlideRecord(
            slide=slide,
            num_patches=num_patches,
            patch_px=self._patch_size(slide, 0)[0] if num_patches else 0,
            source=self.path.name,
            source_bytes=self.path.stat().st_size,
        )
        if self._coords_files is None:
            return record
        return self._add_coords(record, self._coords_files)

    def read(self, slide: str, indices: Indices) -> list[bytes]:
        """Return the JPEG bytes of patches, in the order of `indices`.

        Raises
        ------
        DamagedDataError
            If a patch is missing, empty, or not a pickle of bytes, a bytearray or a one-dimensional
            uint8 array; the message names slide and patch.
        """
        num_patches = self.num_patches(slide)
        index_list: list[int] = np.asarray(indices, np.int64).tolist()

        def read_patches(txn: Any) -> list[bytes]:
            read_ahead(lambda index: txn.get(_pickle_key(slide, index)), index_list)
            return [
                self._unpack_patch(slide, index, num_patches, txn.get(_pickle_key(slide, index)))
                for index in index_list
            ]

        return read_snapshot(self.path, read_patches)

    def borrow(
        self, slide: str, indices: Indices, work: Callable[[Sequence[bytes | memoryview]], T]
    ) -> T:
        """Call `work` with the JPEGs, see :class:`PatchReader`; they are copies here."""
        return work(self.read(slide, indices))

    def find_damage(self, slide: str) -> Iterator[str]:
        """Yield one line per patch that cannot be read or is not a JPEG; there are no checksums."""
        try:
            record = self.record(slide)
        except DamagedDataError as error:
            yield str(error)
            return
        for index in range(record.num_patches):
            try:
                self._patch_size(slide, index)
            except DamagedDataError as error:
                yield str(error).splitlines()[0]

    def _patch_size(self, slide: str, index: int) -> tuple[int, int]:
        [jpeg] = self.read(slide, [index])
        return jpeg_size(jpeg, self.path, slide, index)

    def _unpack_patch(self, slide: str, index: int, num_patches: int, value: Any) -> bytes:
        try:
            jpeg = read_pickled_bytes(value) if value else value
        except ValueError as error:
            raise DamagedDataError(
                f"{self.path}: slide '{slide}' patch {index} is rejected: {error}\n"
                "  a patch is a pickle of bytes, a bytearray or a one-dimensional uint8 array"
            ) from error
        if not jpeg:
            is_empty = jpeg is not None
            raise missing_patch_error(self.path, slide, index, num_patches, is_empty=is_empty)
        return jpeg

    def _read_counts(self) -> dict[str, int]:
        """Return slide -> number of patches; counted from the keys if the file has no such list."""
        counts = self._read_list(b"__pn__", dict)
        if counts is None:
            return read_snapshot(self.path, _count_keys)
        entries = read_snapshot(self.path, lambda txn: txn.stat()["entries"])
        for slide, count in counts.items():
            if not isinstance(slide, str) or type(count) is not int or not 0 <= count <= entries:
                raise DamagedDataError(
                    f"{self.path}: the numbers of patches in __pn__ are wrong: '{slide!s:.100}' has "
                    f"{count!r:.100} in a file of {entries} keys"
                )
        return counts

    def _read_list(self, key: bytes, kind: type[T]) -> T | None:
        """Return one of the file's lists, which must be of type `kind`; None if it has no such key."""
        value = read_value(self.path, key)
        if value is None:
            return None
        try:
            content = read_pickle(value)
        except ValueError as error:
            raise DamagedDataError(f"{self.path}: {key.decode()} is rejected: {error}") from error
        if not isinstance(content, kind):
            raise DamagedDataError(f"{self.path}: {key.decode()} is not a {kind.__name__}")
        return content

    def _add_coords(self, record: SlideRecord, files: dict[str, Path]) -> SlideRecord:
        """Return the record with the coords of its .h5 file."""
        slide, num_patches = record.slide, record.num_patches
        file = files.get(slide) or files.get(f"{slide}_patches")
        if file is None:
            raise DamagedDataError(
                f"the folder of coords has no .h5 file of slide '{slide}' of {self.path}"
            )
        patch_coords = read_coords(file)
        if len(patch_coords.coords) != num_patches:
            raise DamagedDataError(
                f"{file} has {len(patch_coords.coords)} coords, but {self.path} has {num_patches} "
                f"patches of slide '{slide}'\n  give the coords of the run that cut these patches"
            )
        width, height = patch_coords.slide_size or (0, 0)
        coords = patch_coords.coords.astype(np.int32)
        level0_px = patch_coords.level0_px
        return replace(record, coords=coords, level0_px=level0_px, width=width, height=height)


def jpeg_size(jpeg: bytes, path: Path, slide: str, index: int) -> tuple[int, int]:
    """Return width and height of a JPEG in pixels, from its header.

    Parameters
    ----------
    jpeg : bytes
        The JPEG.
    path, slide, index
        Its store, slide and index, for the message.

    Raises
    ------
    DamagedDataError
        If it is not a JPEG.
    """
    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DamagedDataError(
            f"{path}: slide '{slide}' patch {index} is not a JPEG, but {len(jpeg)} other bytes"
        ) from error


def find_data_file(path: str | os.PathLike[str]) -> Path:
    """Return the LMDB file of a path, which may be a folder with ``data.mdb``."""
    path = Path(path)
    return path / "data.mdb" if path.is_dir() else path


def is_abmilx_file(file: Path) -> bool:
    """Return whether an LMDB file has the keys of the ABMILX project.

    Raises
    ------
    UserError, DamagedDataError
        As :func:`e2e.store.snapshot.read_snapshot`.
    """
    return read_snapshot(file, _has_abmilx_keys)


def _has_abmilx_keys(txn: Any) -> bool:
    with txn.cursor() as cursor:
        if txn.get(b"header") is not None or not cursor.first():
            return False
        return re.fullmatch(rb"__\w+__|.+-\d+", bytes(cursor.key()), re.DOTALL) is not None


def _pickle_key(slide: str, index: int) -> bytes:
    return f"{slide}-{index}".encode()


def _count_keys(txn: Any) -> dict[str, int]:
    """Count the patches of each slide by walking over all keys.

    That reads a page of each value, so it takes minutes for millions of patches on a cold disk.
    """
    counts: dict[str, int] = {}
    with txn.cursor() as cursor:
        for key in cursor.iternext(keys=True, values=False):
            slide, dash, index = bytes(key).rpartition(b"-")
            if dash and index.isdigit():
                counts[slide.decode()] = counts.get(slide.decode(), 0) + 1
    return counts
