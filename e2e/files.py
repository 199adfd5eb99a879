"""Files that are written whole or not at all."""

from __future__ import annotations

import codecs
import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path

from e2e.errors import UserError


class OutputError(UserError):
    """A result cannot be written: the disk is full, or the place not writable."""

    on_every_rank = True


def write_atomically(path: Path, content: bytes) -> None:
    """The file has its old content or the new one, whatever happens in between.

    Raises:
        OutputError: nothing was written; the old file, if any, is as it was.
    """
    # One temporary name for each file: what a killed run leaves is overwritten by the next.
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        kept = "the one before it is kept" if path.exists() else "nothing was written"
        raise OutputError(
            f"cannot write {path}: {error.strerror}; {kept}\n"
            "  free disk space (or make the place writable) and run the same command again"
        ) from error


def create_folder(path: Path) -> None:
    """The folder, with those above it, if it is not there yet.

    Raises:
        OutputError: it cannot be made, or something else has its name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the folder {path}: {error.strerror}\n  choose another, or make the place writable"
        ) from error


def write_json(path: Path, content: object) -> None:
    """Indented JSON; as :func:`write_atomically`."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def lock_file(path: Path) -> int | None:
    """Lock a file, which is made if need be, until ``os.close`` or the end of the process, however it ends.

    Returns:
        The handle to close; None where another has it.

    Raises:
        OSError: it cannot be written, or its file system knows no locks.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return handle


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    No other encoding is guessed: a letter read wrongly in an id is a slide that nobody finds.

    Raises:
        UserError: no such file; or its encoding, the first line that shows it, and how to mend it.
    """
    if not path.is_file():
        raise UserError(f"no file at {path}")
    content = path.read_bytes()
    mend = f"-t utf8 '{path}' > NEW{path.suffix}"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is in UTF-16, not in UTF-8\n  iconv -f utf16 {mend}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n")
        line = content.split(b"\n")[number].decode("latin1").strip()
        raise UserError(
            f"{path} is not in UTF-8: byte 0x{content[error.start]:02x} in line {number + 1}\n"
            f"  as latin-1 that line is: {line[:100]}\n"
            f"  if that is right: iconv -f latin1 {mend}"
        ) from error
