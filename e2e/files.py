"""Reading and writing of files: atomic writes, folders, locks and text encodings."""

from __future__ import annotations

import codecs
import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from e2e.errors import UserError


class OutputError(UserError):
    """A result cannot be written: the disk is full, or the folder is not writable."""

    on_every_rank = True


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it has either its previous or its new content, even after a crash.

    Missing folders are created.

    Parameters
    ----------
    path : Path
        The file.
    content : bytes
        Its new content.

    Raises
    ------
    OutputError
        The file cannot be written; a previous file is unchanged.
    """
    # The temporary name is fixed, so that the next run overwrites what a killed run leaves.
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
        outcome = "the previous file is unchanged" if path.exists() else "nothing was written"
        raise OutputError(
            f"cannot write {path}: {error.strerror}; {outcome}\n"
            "  free disk space (or make the folder writable) and run the same command again"
        ) from error


def create_folder(path: Path) -> None:
    """Create a folder and its parents if they do not exist.

    Raises
    ------
    OutputError
        The folder cannot be created, or a file has its name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create the folder {path}: {error.strerror}\n"
            "  choose another folder, or make its parent writable"
        ) from error


def write_json(path: Path, content: object) -> None:
    """Write a value as indented JSON, as :func:`write_atomically` does."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises
    ------
    UserError
        The file cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise damaged_json(path, error) from error


def damaged_json(path: Path, reason: object) -> UserError:
    """Return the error about a JSON file that this program wrote, and that now holds something else."""
    return UserError(
        f"{path} is damaged: {reason}\n  restore the file from a copy, or make it again"
    )


def lock_file(path: Path) -> int | None:
    """Lock a file, creating it if needed, until ``os.close`` or the end of the process.

    Returns
    -------
    int or None
        The file descriptor to close; None if another process holds the lock.

    Raises
    ------
    OSError
        The file cannot be written, or its file system does not support locks.
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
    """Return the text of a UTF-8 file, with or without a byte order mark.

    No other encoding is guessed, because a wrongly decoded letter in an id would match no slide.

    Raises
    ------
    UserError
        The file cannot be read, or is not in UTF-8; the message shows the first invalid line and the
        command that converts the file.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"no file at {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    conversion = f"-t utf8 '{path}' > NEW{path.suffix}"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is in UTF-16, not in UTF-8\n  iconv -f utf16 {conversion}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n")
        line = content.split(b"\n")[number].decode("latin1").strip()
        raise UserError(
            f"{path} is not in UTF-8: byte 0x{content[error.start]:02x} in line {number + 1}\n"
            f"  as latin-1 that line is: {line[:100]}\n"
            f"  if that is right: iconv -f latin1 {conversion}"
        ) from error
