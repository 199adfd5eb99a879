"""The worker's side of packing on a cluster, and the files that all machines share.

See :mod:`e2e.store.cluster`. Nothing here needs Dask.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from e2e.errors import UserError
from e2e.files import lock_file
from e2e.store.lmdb import StoreWriter
from e2e.store.pack import Progress, Row, pack_one
from e2e.store.sources import Job

LIBRARIES = ("pillow", "openslide-python", "openslide-bin", "numpy", "scikit-image", "lmdb")
"""Libraries that decide the bytes of a store: all workers must have the same versions."""


@dataclass(frozen=True)
class Ticket:
    """What a worker needs to know about the run."""

    out: Path
    """The path that names the store files."""
    recipe: dict[str, Any]
    """How the patches are cut."""
    batch_size: int
    """Patches to encode at a time."""
    token: str
    """Identifies the run."""
    versions: dict[str, str]
    """The command's versions, see :func:`installed_versions`."""

    @property
    def file(self) -> Path:
        """The file that holds the token as long as the command runs."""
        return self.out.with_name(f".{self.out.name}.packing")

    def is_valid(self) -> bool:
        """Return whether this machine shares the folder with the command, and the command runs."""
        try:
            return self.file.read_text() == self.token
        except OSError:
            return False


_ONE_SLIDE = threading.Lock()
"""A worker with many threads still writes one store file."""


def pack_slide(job: Job, ticket: Ticket) -> tuple[Path, Row]:
    """Pack one slide into a store file of this machine. Runs on a worker.

    Parameters
    ----------
    job : Job
        The slide.
    ticket : Ticket
        The run.

    Returns
    -------
    file : Path
        The store file.
    row : Row
        What became of the slide.

    Raises
    ------
    UserError
        If the fault is not the slide's, see :func:`e2e.store.cluster.pack_on_cluster`.
    """
    with _ONE_SLIDE:
        problem = worker_problem(ticket, job)
        if problem:
            raise UserError(f"worker on {socket.gethostname()}: {problem}")
        file, handle = _lock_free_file(ticket.out)
        try:
            with StoreWriter(file, ticket.recipe) as writer:
                if job.slide in writer.done:  # by a worker that died before it could report it
                    return file, Row.of(writer.record(job.slide), "packed", str(job.path))
                guard = _StopWithCommand(ticket)
                return file, pack_one(
                    writer, job, ticket.out, batch_size=ticket.batch_size, progress=guard
                )
        finally:
            os.close(handle)


class _StopWithCommand(Progress):
    """Gives a slide up when the command has ended: the next command needs the store file."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket

    def written(self, patches: int) -> None:
        if not self._ticket.is_valid():
            raise UserError(f"the command that packs to {self._ticket.out} has ended")


def _lock_free_file(out: Path) -> tuple[Path, int]:
    """Return the first of this machine's store files that nobody writes, and the handle of its lock."""
    host = re.sub("[^A-Za-z0-9-]", "-", socket.gethostname())
    for number in itertools.count():
        file = out.with_name(f"{out.stem}.{host}-{number}{out.suffix}")
        handle = lock_shared_file(file)
        if handle is not None:
            return file, handle
    raise AssertionError("unreachable")


def worker_problem(ticket: Ticket, job: Job) -> str | None:
    """Return why this worker cannot pack, or None.

    Parameters
    ----------
    ticket : Ticket
        The run.
    job : Job
        One slide, as an example of all.
    """
    versions = installed_versions()
    differing = [key for key in ticket.versions if versions.get(key) != ticket.versions[key]]
    if differing:
        pairs = (f"{key} {versions.get(key)} (not {ticket.versions[key]})" for key in differing)
        return f"has other versions than the command: {', '.join(pairs)}"
    if not ticket.is_valid():
        return f"does not share the folder {ticket.out.parent} with the command"
    try:
        with tempfile.TemporaryFile(dir=ticket.out.parent):
            pass
    except OSError as error:
        return f"cannot write to the folder {ticket.out.parent}: {error.strerror}"
    paths = [value for value in vars(job).values() if isinstance(value, Path)]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        return f"does not see {', '.join(missing)}, which must have that path on every machine"
    return None


@functools.cache
def installed_versions() -> dict[str, str]:
    """Return the versions of all that decides what is in a store: this project's source, libraries."""
    package = Path(__file__).resolve().parents[1]
    source = hashlib.blake2b(digest_size=6)
    for file in sorted(package.rglob("*.py")):
        source.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    versions = {"e2e": source.hexdigest()}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = "missing"
    return versions


# --- the files that all machines share ---


def list_store_files(out: Path) -> list[Path]:
    """Return the existing store files of `out`: the file of that name, then the workers', by name."""
    name = re.compile(rf"{re.escape(out.stem)}\.[A-Za-z0-9-]+-[0-9]+{re.escape(out.suffix)}")
    files = sorted(file for file in out.parent.glob("*") if name.fullmatch(file.name))
    return [out, *files] if out.is_file() else files


def lock_shared_file(path: Path) -> int | None:
    """Lock a file on the shared disk, see :func:`e2e.files.lock_file`.

    Returns
    -------
    int or None
        The handle to close; None if another process holds the lock.

    Raises
    ------
    UserError
        If the file cannot be created or its file system has no locks.
    """
    try:
        return lock_file(path)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} cannot lock {path}: {error.strerror}\n"
            "  packing on several machines needs a folder that all can write to, with flock"
        ) from error


@contextmanager
def locked_store_file(file: Path, patience: float) -> Iterator[None]:
    """Hold the lock of a store file for the block.

    Parameters
    ----------
    file : Path
        The store file.
    patience : float
        Seconds to wait: a worker of a stopped command needs a moment to end.

    Raises
    ------
    UserError
        If a worker still writes the file.
    """
    deadline = monotonic() + patience
    while (handle := lock_shared_file(file)) is None:
        if monotonic() > deadline:
            raise UserError(
                f"{file} is still being written by a worker of another run\n"
                "  stop that worker (the file is named after its machine), then run the same command "
                "again"
            )
        sleep(0.1)
    try:
        yield
    finally:
        os.close(handle)
