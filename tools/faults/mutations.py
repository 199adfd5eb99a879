"""Damage to a file: what disks, networks, editors and hostile people do."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

WORDS = (
    *(
        "",
        " ",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "-1",
        "0",
        "1.5",
        "999999999999999999999",
        "null",
        "true",
    ),
    *(
        "../../escaped",
        "/escaped",
        "a/b",
        "C:\\escaped",
        ".",
        "..",
        "=1+1",
        "\\input{x}",
        "é",
        "é",
    ),
    *(
        "\x00",
        "\x07",
        "\u202e",
        "\ud800",
        "\ufeff",
        '"',
        "'",
        ",",
        "\n",
        "\t",
        "[",
        "{",
        "}",
        "&a",
        "*a",
    ),
    *(
        "!!python/object:os.system",
        "<<: *a",
        "x" * 5000,
        "[" * 200,
        "{a: " * 200,
        "0x1F",
        "1_000",
        "~",
    ),
)
"""What takes the place of a value in a text file."""


def mutate(file: Path, draw: random.Random, *, is_text: bool) -> str:
    """Damage a file and return in which way."""
    content = file.read_bytes()
    kinds: list[Callable[[bytes, random.Random], bytes]] = [*BYTES]
    if is_text:
        kinds += 2 * [*TEXT]
    kind = draw.choice(kinds)
    file.write_bytes(kind(content, draw))
    return kind.__name__


def flip_bit(content: bytes, draw: random.Random) -> bytes:
    """One bit, as a disk does."""
    changed = bytearray(content)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """Up to 16 bytes in a row, to random ones."""
    start = draw.randrange(len(content))
    changed = draw.randbytes(min(draw.randint(1, 16), len(content) - start))
    return content[:start] + changed + content[start + len(changed) :]


def zero_block(content: bytes, draw: random.Random) -> bytes:
    """A block of zeros, as after a crash of a file system."""
    size = min(len(content), draw.choice((16, 512, 4096)))
    start = draw.randrange(len(content) - size + 1)
    return content[:start] + bytes(size) + content[start + size :]


def cut(content: bytes, draw: random.Random) -> bytes:
    """The end is missing, as after a copy that was stopped."""
    return content[: draw.randrange(len(content))]


def extend(content: bytes, draw: random.Random) -> bytes:
    """Something follows."""
    return content + draw.randbytes(draw.randint(1, 5000))


def swap_blocks(content: bytes, draw: random.Random) -> bytes:
    """Two blocks in each other's place."""
    size = draw.choice((16, 512, 4096))
    size = max(1, min(size, len(content) // 4))
    first, second = sorted(draw.sample(range(0, len(content) - size + 1, size), 2))
    a, b = content[first : first + size], content[second : second + size]
    return content[:first] + b + content[first + size : second] + a + content[second + size :]


def remove_bytes(content: bytes, draw: random.Random) -> bytes:
    """Some bytes are missing in the middle."""
    start = draw.randrange(len(content))
    return content[:start] + content[start + draw.randint(1, 64) :]


def other_kind(content: bytes, draw: random.Random) -> bytes:
    """Another kind of file under this name."""
    kinds = (
        b"",
        b"PK\x03\x04",
        b"\x89HDF\r\n\x1a\n",
        b"\x80\x04.",
        b"%PDF-1.7",
        b"II*\x00",
        b"<html>",
    )
    return draw.choice(kinds) + draw.randbytes(draw.choice((0, 10, 3000)))


def replace_value(content: bytes, draw: random.Random) -> bytes:
    """Another word in the place of a value or name."""
    text = content.decode(errors="surrogateescape")
    values = [match.span() for match in re.finditer(r"[\w./-]+", text)]
    if not values:
        return content
    start, stop = draw.choice(values)
    return _encode(text[:start] + draw.choice(WORDS) + text[stop:])


def insert_word(content: bytes, draw: random.Random) -> bytes:
    """A word somewhere."""
    text = content.decode(errors="surrogateescape")
    place = draw.randint(0, len(text))
    return _encode(text[:place] + draw.choice(WORDS) + text[place:])


def remove_line(content: bytes, draw: random.Random) -> bytes:
    """A line less."""
    lines = content.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    return b"".join([*lines[:place], *lines[place + 1 :]])


def repeat_line(content: bytes, draw: random.Random) -> bytes:
    """A line twice."""
    lines = content.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    return b"".join([*lines[: place + 1], *lines[place:]])


def change_encoding(content: bytes, draw: random.Random) -> bytes:
    """What another editor saves."""
    text = content.decode(errors="replace")
    changes = (
        lambda: text.encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + content,
        lambda: text.replace("\n", "\r\n").encode(),
        lambda: text.replace(",", ";").encode(),
        lambda: text.replace(",", "\t").encode(),
        lambda: text.upper().encode(),
    )
    return draw.choice(changes)()


def _encode(text: str) -> bytes:
    return (
        text.encode(errors="surrogatepass")
        if "\ud800" in text
        else text.encode(errors="surrogateescape")
    )


BYTES = (
    flip_bit,
    flip_bit,
    change_bytes,
    zero_block,
    cut,
    extend,
    swap_blocks,
    remove_bytes,
    other_kind,
)
TEXT = (replace_value, replace_value, insert_word, remove_line, repeat_line, change_encoding)
