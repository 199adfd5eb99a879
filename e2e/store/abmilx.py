"""The ABMILX project's LMDBs, read in place. Their values are pickles; nothing in them is executed.

What is in such a file (Tang et al. 2025, arXiv:2506.02408, as its published program writes it):
``<slide>-<index>`` (not zero-padded) -> pickle of a patch's JPEG, and pickles of the slides' names
(``__slide__``), their numbers of patches (``__pn__``), all keys and their number. Neither the places
nor the magnification of the patches are in it.

The project decoded these JPEGs to BGR and normalised that with the figures of RGB. The bytes here
are ordinary JPEGs: whoever wants its channel order again swaps channels after decoding.
"""

from __future__ import annotations

import io
import os
import pickletools
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from e2e.errors import DamagedDataError, UserError
from e2e.store.lmdb import get, missing_patch_error, read_ahead, snapshot
from e2e.store.records import PlacelessRecord, SlideRecord

T = TypeVar("T")

PATCH_OPCODES = 100
"""An array's pickle has about 60; what is longer is no patch."""


class AbmilxStore:
    """One of the ABMILX project's LMDBs, a file or a folder with ``data.mdb``; see :class:`Store`.

    Args:
        coords: folder of the h5 files that CLAM or TRIDENT made for these patches. Without it
            records have no coords.

    Raises:
        UserError: no such file, not an LMDB of this kind, cut short, or no h5 file in ``coords``.
        DamagedDataError: its lists of slides cannot be read.
    """

    def __init__(
        self, path: str | os.PathLike[str], coords: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = _data_file(path)
        if not self.path.is_file():
            raise UserError(f"no LMDB at {path}")
        self.recipe: dict[str, Any] = {"source": "seed lmdb"}
        self._places = None if coords is None else _places(Path(coords))
        if not snapshot(self.path, _is_seed):
            raise UserError(
                f"{self.path} is no LMDB of the ABMILX project: it has no keys <slide>-<index>"
            )
        self._counts = self._counted()
        slides = self._meta(b"__slide__", list) or []
        if not all(isinstance(slide, str) for slide in slides):
            raise DamagedDataError(f"{self.path}: __slide__ is no list of names")
        self._uncounted = [slide for slide in slides if slide not in self._counts]

    def __contains__(self, slide: str) -> bool:
        return slide in self._counts or slide in self._uncounted

    @property
    def slides(self) -> list[str]:
        """Ids of the slides; of those that have no count, ``count`` raises."""
        return [*self._counts, *self._uncounted]

    @property
    def has_coords(self) -> bool:
        """Whether records say where the patches lie."""
        return self._places is not None

    def count(self, slide: str) -> int:
        """Number of patches; DamagedDataError where the file names the slide but no number."""
        if slide in self._uncounted:
            raise DamagedDataError(
                f"{self.path}: slide '{slide}' is in __slide__, but __pn__ does not say how many "
                "patches it has\n  the file was not written to its end: make it again, or leave "
                "the slide out"
            )
        return self._counts[slide]

    def record(self, slide: str) -> SlideRecord:
        """What is known of ``slide``: ``patch_px`` of its first JPEG, and what ``coords`` says.

        Raises:
            DamagedDataError: its keys or coords are not as many as its count, or no JPEG is there.
        """
        count = self.count(slide)
        more = get(self.path, _key(slide, count)) is not None
        if more or (count and get(self.path, _key(slide, count - 1)) is None):
            raise DamagedDataError(
                f"{self.path}: slide '{slide}' has {'more' if more else 'fewer'} patches than the "
                f"{count} of __pn__\n  the file was not written to its end: make it again"
            )
        known: dict[str, Any] = {
            "slide": slide,
            "mpp": None,
            "patch_px": self._size(slide, 0)[0] if count else 0,
            "source": self.path.name,
            "source_bytes": self.path.stat().st_size,
        }
        if self._places is None:
            unknown = {"coords": None, "level0_px": 0.0, "width": 0, "height": 0}
            return PlacelessRecord(**known, **unknown, patches=count)
        return SlideRecord(**known, **self._placed(slide, count))

    def read(self, slide: str, indices: Sequence[int] | NDArray[np.int64]) -> list[bytes]:
        """JPEG bytes of the given patches, in the order asked for.

        Raises:
            DamagedDataError: names the slide and the patch that is missing, empty, or no pickle of
                bytes, a bytearray or a one-dimensional uint8 array.
        """
        count = self.count(slide)
        wanted = np.asarray(indices, np.int64).tolist()

        def work(txn: Any) -> list[bytes]:
            read_ahead(lambda index: txn.get(_key(slide, index)), wanted)
            return [self._jpeg(slide, i, count, txn.get(_key(slide, i))) for i in wanted]

        return snapshot(self.path, work)

    def lend(
        self,
        slide: str,
        indices: Sequence[int] | NDArray[np.int64],
        work: Callable[[Sequence[bytes]], T],
    ) -> T:
        """What ``work`` makes of the JPEGs; of copies, here."""
        return work(self.read(slide, indices))

    def damage(self, slide: str) -> Iterator[str]:
        """What ``read`` would refuse of ``slide``, and what is no JPEG; there are no checksums."""
        try:
            record = self.record(slide)
        except DamagedDataError as error:
            yield str(error)
            return
        for index in range(record.count):
            try:
                self._size(slide, index)
            except DamagedDataError as error:
                yield str(error).splitlines()[0]

    def _size(self, slide: str, index: int) -> tuple[int, int]:
        [jpeg] = self.read(slide, [index])
        return jpeg_size(jpeg, self.path, slide, index)

    def _jpeg(self, slide: str, index: int, count: int, value: Any) -> bytes:
        try:
            jpeg = _payload(value) if value else value
        except ValueError as error:
            raise DamagedDataError(
                f"{self.path}: slide '{slide}' patch {index} is refused: {error}\n"
                "  a patch is a pickle of bytes, a bytearray or a one-dimensional uint8 array"
            ) from error
        if not jpeg:
            raise missing_patch_error(self.path, slide, index, count, empty=jpeg is not None)
        return jpeg

    def _counted(self) -> dict[str, int]:
        """Slide -> number of patches; by the keys, where the file holds no such list."""
        counts = self._meta(b"__pn__", dict)
        if counts is None:
            return snapshot(self.path, _count_keys)
        entries = snapshot(self.path, lambda txn: txn.stat()["entries"])
        for slide, count in counts.items():
            if not isinstance(slide, str) or type(count) is not int or not 0 <= count <= entries:
                raise DamagedDataError(
                    f"{self.path}: __pn__ does not count the patches of slides; for one, "
                    f"'{slide!s:.100}' cannot be right in a file of {entries} keys"
                )
        return counts

    def _meta(self, key: bytes, kind: type[T]) -> T | None:
        value = get(self.path, key)
        if value is None:
            return None
        try:
            found = literal(value)
        except ValueError as error:
            raise DamagedDataError(f"{self.path}: {key.decode()} is refused: {error}") from error
        if not isinstance(found, kind):
            raise DamagedDataError(f"{self.path}: {key.decode()} is no {kind.__name__}")
        return found

    def _placed(self, slide: str, count: int) -> dict[str, Any]:
        from e2e.store.sources import read_coords

        assert self._places is not None
        file = self._places.get(slide) or self._places.get(f"{slide}_patches")
        if file is None:
            raise DamagedDataError(
                f"no .h5 of slide '{slide}' of {self.path} is in the folder of coords"
            )
        found = read_coords(file)
        if len(found.coords) != count:
            raise DamagedDataError(
                f"{file} has {len(found.coords)} coords, {self.path} has {count} patches of slide "
                f"'{slide}'\n  they are not of one run: which patch lies where is unknown"
            )
        width, height = found.size or (0, 0)
        coords = found.coords.astype(np.int32)
        return {"coords": coords, "level0_px": found.level0_px, "width": width, "height": height}


def jpeg_size(jpeg: bytes, path: Path, slide: str, index: int) -> tuple[int, int]:
    """Width and height by a JPEG's header; DamagedDataError, with the place given, if it has none."""
    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DamagedDataError(
            f"{path}: slide '{slide}' patch {index} is no JPEG: {len(jpeg)} other bytes"
        ) from error


def _data_file(path: str | os.PathLike[str]) -> Path:
    """LMDB's own file, where ``path`` is a folder of it."""
    path = Path(path)
    return path / "data.mdb" if path.is_dir() else path


def _places(folder: Path) -> dict[str, Path]:
    from e2e.store.sources import CoordsFiles  # here, for it loads OpenSlide: few need that

    return {file.stem: file for file in CoordsFiles(folder, ()).files}


def _key(slide: str, index: int) -> bytes:
    return f"{slide}-{index}".encode()


def _is_seed(txn: Any) -> bool:
    with txn.cursor() as cursor:
        if txn.get(b"header") is not None or not cursor.first():
            return False
        return re.fullmatch(rb"__\w+__|.+-\d+", bytes(cursor.key()), re.DOTALL) is not None


def _count_keys(txn: Any) -> dict[str, int]:
    """A walk over all keys: a page of each value is read, so minutes for millions on a cold disk."""
    counts: dict[str, int] = {}
    with txn.cursor() as cursor:
        for key in cursor.iternext(keys=True, values=False):
            slide, dash, index = bytes(key).rpartition(b"-")
            if dash and index.isdigit():
                counts[slide.decode()] = counts.get(slide.decode(), 0) + 1
    return counts


# --- pickles, without running them ---

_LENGTHS = {ord("C"): "<B", ord("B"): "<I", 0x8E: "<Q", 0x96: "<Q"}
"""Opcodes of bytes and bytearrays -> how their length follows."""

_ENDS = (b"\x94.", b"q\x00.", b".")


def _payload(value: memoryview) -> bytes:
    """The bytes in a pickle of a patch; ValueError where it holds anything else."""
    if len(value) > 24 and value[0] == 0x80:
        at = 11 if value[2] == 0x95 else 2  # protocols 4 and 5 may begin with a frame
        length = _LENGTHS.get(value[at])
        if length is not None:
            start = at + 1 + struct.calcsize(length)
            stop = start + struct.unpack_from(length, value, at + 1)[0]
            if len(value) - stop <= 3 and bytes(value[stop:]) in _ENDS:
                return bytes(value[start:stop])
    found = literal(bytes(value), PATCH_OPCODES)
    if not isinstance(found, bytes):
        raise ValueError("it holds something else")
    return found


def literal(pickled: bytes, most: int | None = None) -> Any:
    """The plain value in a pickle: text, bytes, numbers, None, tuples, lists, dicts by text.

    Bytearrays and one-dimensional uint8 arrays come as bytes. This knows the few opcodes of these
    and what they stand for; it imports, calls and builds nothing that a pickle names.

    Args:
        most: opcodes; None: any number. Memory and time are linear in the pickle's length anyhow.

    Raises:
        ValueError: says what else the pickle holds, or that it is damaged.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        if most is not None and number >= most:
            raise ValueError(f"its pickle has more than {most} steps")
        step = _STEPS.get(opcode.name)
        if step is None:
            raise ValueError(f"its pickle has the step {opcode.name}")
        try:
            step(stack, memo, argument)
        except (IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its pickle makes no sense at {opcode.name}") from error
    if len(stack) != 1:
        raise ValueError("its pickle makes no sense at its end")
    return stack[0]


class _Named(NamedTuple):
    """What a pickle calls by name; never looked up."""

    name: str


class _Dtype(NamedTuple):
    kind: str


class _Array(NamedTuple):
    """An array that has not got its state yet."""


_MARK = object()
_ARRAYS = {f"numpy.{core}.multiarray _reconstruct" for core in ("core", "_core")}
_BUFFERS = {f"numpy.{core}.numeric _frombuffer" for core in ("core", "_core")}
_BYTES = {
    f"{place} {kind}" for place in ("builtins", "__builtin__") for kind in ("bytes", "bytearray")
}


def _called(called: Any, arguments: Any) -> Any:
    """What a call in a pickle stands for."""
    if not isinstance(called, _Named) or not isinstance(arguments, tuple):
        raise TypeError
    match (called.name, *arguments):
        case ("_codecs encode", str(text), "latin1"):
            return text.encode("latin1")
        case (name,) if name in _BYTES:
            return b""
        case (name, bytes(data)) if name in _BYTES:
            return data
        case ("numpy dtype", str(kind), *_):
            return _Dtype(kind)
        case (name, _Named("numpy ndarray"), (0,), b"b") if name in _ARRAYS:
            return _Array()
        case (name, data, dtype, shape, "C") if name in _BUFFERS:
            return _array(shape, dtype, data)
    raise ValueError(f"its pickle would call {called.name!r:.100}")


def _with_state(made: Any, state: Any) -> Any:
    """What an object of a pickle is once it has its state."""
    match (made, state):
        case (_Dtype(), (3, str(), None, None, None, -1, -1, 0)):
            return made
        case (_Array(), (1, shape, dtype, False, data)):
            return _array(shape, dtype, data)
    raise ValueError("its pickle sets the state of an object")


def _array(shape: Any, dtype: Any, data: Any) -> bytes:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise TypeError
    if dtype.kind not in ("u1", "|u1") or shape != (len(data),):
        raise ValueError(f"it holds an array of {dtype.kind:.20} that is no row of bytes")
    return bytes(data)


def _to_mark(stack: list[Any]) -> list[Any]:
    """Take off the stack all that is above the last mark, and the mark."""
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _take(stack: list[Any], count: int) -> list[Any]:
    return [stack.pop() for _ in range(count)][::-1]


def _fill(stack: list[Any], items: list[Any]) -> None:
    """Add keys and values to the dict on the stack."""
    made = stack[-1]
    if not isinstance(made, dict) or not all(isinstance(key, str) for key in items[::2]):
        # Text only: the hash alone of nested tuples that share their parts may take forever.
        raise TypeError
    made.update(zip(items[::2], items[1::2], strict=True))


def _extend(stack: list[Any], items: list[Any]) -> None:
    """Add items to the list on the stack."""
    if not isinstance(stack[-1], list):
        raise TypeError
    stack[-1].extend(items)


def _global(module: Any, name: Any) -> _Named:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError
    return _Named(f"{module} {name}")


_Step = Callable[[list[Any], dict[int, Any], Any], object]

_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda s, m, a: None),
    **dict.fromkeys(
        (
            *("BININT", "BININT1", "BININT2", "LONG1"),
            *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
            *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        ),
        lambda s, m, a: s.append(a),
    ),
    "BYTEARRAY8": lambda s, m, a: s.append(bytes(a)),
    "NONE": lambda s, m, a: s.append(None),
    "NEWTRUE": lambda s, m, a: s.append(True),
    "NEWFALSE": lambda s, m, a: s.append(False),
    "MARK": lambda s, m, a: s.append(_MARK),
    "EMPTY_TUPLE": lambda s, m, a: s.append(()),
    "EMPTY_LIST": lambda s, m, a: s.append([]),
    "EMPTY_DICT": lambda s, m, a: s.append({}),
    "TUPLE": lambda s, m, a: s.append(tuple(_to_mark(s))),
    "TUPLE1": lambda s, m, a: s.append(tuple(_take(s, 1))),
    "TUPLE2": lambda s, m, a: s.append(tuple(_take(s, 2))),
    "TUPLE3": lambda s, m, a: s.append(tuple(_take(s, 3))),
    "APPEND": lambda s, m, a: _extend(s, _take(s, 1)),
    "APPENDS": lambda s, m, a: _extend(s, _to_mark(s)),
    "SETITEM": lambda s, m, a: _fill(s, _take(s, 2)),
    "SETITEMS": lambda s, m, a: _fill(s, _to_mark(s)),
    "MEMOIZE": lambda s, m, a: m.__setitem__(len(m), s[-1]),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda s, m, a: m.__setitem__(a, s[-1])),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda s, m, a: s.append(m[a])),
    "GLOBAL": lambda s, m, a: s.append(_Named(a)),
    "STACK_GLOBAL": lambda s, m, a: s.append(_global(*_take(s, 2))),
    "REDUCE": lambda s, m, a: s.append(_called(*_take(s, 2))),
    "BUILD": lambda s, m, a: s.append(_with_state(*_take(s, 2))),
}
"""Opcode -> what it does to the stack and the memo, given its argument."""
