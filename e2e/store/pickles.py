"""Read the plain values in pickles without executing anything.

A pickle is a program for a small stack machine, and loading one may run any code. This module knows the
few instructions that plain values consist of, and what the few calls among them stand for. It imports,
calls and builds nothing that a pickle names.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_PATCH_OPCODES = 100
"""The pickle of an array has about 60 instructions; a longer one is not a patch."""

_LENGTH_FORMATS = {ord("C"): "<B", ord("B"): "<I", 0x8E: "<Q", 0x96: "<Q"}
"""Opcode of bytes or of a bytearray -> format of the length that follows."""

_ENDINGS = (b"\x94.", b"q\x00.", b".")
"""What may follow the only value of a pickle."""


def read_pickled_bytes(value: memoryview) -> bytes:
    """Return the bytes, bytearray or one-dimensional uint8 array in a pickle.

    Parameters
    ----------
    value : memoryview
        The pickle.

    Raises
    ------
    ValueError
        If it holds anything else; the message is a clause that says what.
    """
    if len(value) > 24 and value[0] == 0x80:
        position = 11 if value[2] == 0x95 else 2  # protocols 4 and 5 may begin with a frame
        length_format = _LENGTH_FORMATS.get(value[position])
        if length_format is not None:
            start = position + 1 + struct.calcsize(length_format)
            stop = start + struct.unpack_from(length_format, value, position + 1)[0]
            if len(value) - stop <= 3 and bytes(value[stop:]) in _ENDINGS:
                return bytes(value[start:stop])
    content = read_pickle(bytes(value), MAX_PATCH_OPCODES)
    if not isinstance(content, bytes):
        raise ValueError("it holds something else")
    return content


def read_pickle(pickled: bytes, max_opcodes: int | None = None) -> Any:
    """Return the plain value in a pickle.

    Plain values are text, bytes, numbers, None, tuples, lists, and dicts with text as keys. Bytearrays
    and one-dimensional uint8 arrays are returned as bytes.

    Parameters
    ----------
    pickled : bytes
        The pickle.
    max_opcodes : int, optional
        Largest number of instructions. Memory and time are linear in the length of the pickle anyway.

    Raises
    ------
    ValueError
        If the pickle holds anything else or is damaged; the message is a clause that says what.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        if max_opcodes is not None and number >= max_opcodes:
            raise ValueError(f"its pickle has more than {max_opcodes} instructions")
        operation = _OPERATIONS.get(opcode.name)
        if operation is None:
            raise ValueError(f"its pickle has the instruction {opcode.name}")
        try:
            operation(stack, memo, argument)
        except (IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its pickle is invalid at {opcode.name}") from error
    if len(stack) != 1:
        raise ValueError("its pickle is invalid at its end")
    return stack[0]


class _Name(NamedTuple):
    """An object that a pickle names; it is never looked up."""

    name: str


class _Dtype(NamedTuple):
    kind: str


class _EmptyArray(NamedTuple):
    """An array that has not received its state yet."""


_MARK = object()
_ARRAY_CALLS = {f"numpy.{core}.multiarray _reconstruct" for core in ("core", "_core")}
_BUFFER_CALLS = {f"numpy.{core}.numeric _frombuffer" for core in ("core", "_core")}
_BYTES_CALLS = {
    f"{module} {kind}" for module in ("builtins", "__builtin__") for kind in ("bytes", "bytearray")
}


def _call_result(function: Any, arguments: Any) -> Any:
    """Return what a call in a pickle stands for."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise TypeError
    match (function.name, *arguments):
        case ("_codecs encode", str(text), "latin1"):
            return text.encode("latin1")
        case (name,) if name in _BYTES_CALLS:
            return b""
        case (name, bytes(data)) if name in _BYTES_CALLS:
            return data
        case ("numpy dtype", str(kind), *_):
            return _Dtype(kind)
        case (name, _Name("numpy ndarray"), (0,), b"b") if name in _ARRAY_CALLS:
            return _EmptyArray()
        case (name, data, dtype, shape, "C") if name in _BUFFER_CALLS:
            return _array_bytes(shape, dtype, data)
    raise ValueError(f"its pickle would call {function.name!r:.100}")


def _set_state(value: Any, state: Any) -> Any:
    """Return an object of a pickle with its state set."""
    match (value, state):
        case (_Dtype(), (3, str(), None, None, None, -1, -1, 0)):
            return value
        case (_EmptyArray(), (1, shape, dtype, False, data)):
            return _array_bytes(shape, dtype, data)
    raise ValueError("its pickle sets the state of an object")


def _array_bytes(shape: Any, dtype: Any, data: Any) -> bytes:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise TypeError
    if dtype.kind not in ("u1", "|u1") or shape != (len(data),):
        raise ValueError(f"it holds an array of {dtype.kind:.20} that is not a row of bytes")
    return bytes(data)


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    """Remove everything above the last mark, and the mark, from the stack."""
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _pop(stack: list[Any], count: int) -> list[Any]:
    return [stack.pop() for _ in range(count)][::-1]


def _update_dict(stack: list[Any], items: list[Any]) -> None:
    """Add keys and values to the dict on top of the stack."""
    content = stack[-1]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in items[::2]):
        # Text only: just the hash of nested tuples that share their parts may take forever.
        raise TypeError
    content.update(zip(items[::2], items[1::2], strict=True))


def _extend_list(stack: list[Any], items: list[Any]) -> None:
    """Add items to the list on top of the stack."""
    if not isinstance(stack[-1], list):
        raise TypeError
    stack[-1].extend(items)


def _stack_name(module: Any, name: Any) -> _Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError
    return _Name(f"{module} {name}")


_Operation = Callable[[list[Any], dict[int, Any], Any], object]

_OPERATIONS: dict[str, _Operation] = {
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
    "TUPLE": lambda s, m, a: s.append(tuple(_pop_to_mark(s))),
    "TUPLE1": lambda s, m, a: s.append(tuple(_pop(s, 1))),
    "TUPLE2": lambda s, m, a: s.append(tuple(_pop(s, 2))),
    "TUPLE3": lambda s, m, a: s.append(tuple(_pop(s, 3))),
    "APPEND": lambda s, m, a: _extend_list(s, _pop(s, 1)),
    "APPENDS": lambda s, m, a: _extend_list(s, _pop_to_mark(s)),
    "SETITEM": lambda s, m, a: _update_dict(s, _pop(s, 2)),
    "SETITEMS": lambda s, m, a: _update_dict(s, _pop_to_mark(s)),
    "MEMOIZE": lambda s, m, a: m.__setitem__(len(m), s[-1]),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda s, m, a: m.__setitem__(a, s[-1])),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda s, m, a: s.append(m[a])),
    "GLOBAL": lambda s, m, a: s.append(_Name(a)),
    "STACK_GLOBAL": lambda s, m, a: s.append(_stack_name(*_pop(s, 2))),
    "REDUCE": lambda s, m, a: s.append(_call_result(*_pop(s, 2))),
    "BUILD": lambda s, m, a: s.append(_set_state(*_pop(s, 2))),
}
"""Opcode -> what it does to stack `s` and memo `m`, with its argument `a`."""
