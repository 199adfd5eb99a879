"""Packing over many machines: slide by slide on the workers of a Dask cluster. The only user of Dask.

The command hands each worker one slide at a time; Dask gives the slide of a worker that dies to
another. All machines share one folder, and its files settle who may do what:

- ``<stem>.<host>-<n>.lmdb``, the store files. Whoever packs a slide takes the first of its host's
  files that nobody has locked (flock, which ends with the process, however that ends) and gives it
  back with the slide. So a file has one writer, always of the same host, and a worker that comes
  back under another name goes on with the files that are there.
- ``.<name>.packing``, the run's token, there as long as the command runs. A worker that cannot read
  it does not share the folder; one that no longer finds it drops its slide.
- ``<stem>.stores.json``, the index, written last: which files, and which slides are in each.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import re
import secrets
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import monotonic, sleep
from types import ModuleType
from typing import Any

from e2e.errors import UserError, format_list
from e2e.files import lock_file, write_atomically
from e2e.store.lmdb import PatchStore, StoreWriter
from e2e.store.pack import CHUNK, Progress, Report, Row, interrupts_held, no_processes, pack_one
from e2e.store.sources import Job, Source

Client = Any
Future = Any
"""Dask's; not named in full, because its annotations fit the asynchronous use alone."""

FORMAT = "e2e patch store index"
VERSION = 1

PATIENCE = 20.0
"""Seconds to wait for a worker to turn up, or for a store file to be given back."""

SECONDS_TO_ANSWER = 5
"""For the scheduler."""

GLANCE = 1.0
"""Seconds after which the command looks for workers that came or went."""

MAKERS = ("pillow", "openslide-python", "openslide-bin", "numpy", "scikit-image", "lmdb")
"""Libraries that decide the bytes of a store: all workers must have the same."""


# --- the index ---


def index_path(out: Path) -> Path:
    """Where the index over the store files of ``out`` is."""
    return out.with_name(f"{out.stem}.stores.json")


def read_index(path: Path) -> list[Path]:
    """The store files that an index names; no slide is in two of them.

    Raises:
        UserError: no such index, another kind of file, a newer version, or a store file is missing.
    """
    try:
        index = json.loads(path.read_text())
        known = index["format"] == FORMAT
        files = [path.parent / store["file"] for store in index["stores"]] if known else []
    except OSError as error:
        raise UserError(f"cannot read the index {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no index of patch stores ({error})") from error
    if not known:
        raise UserError(f"{path} is no index of patch stores: it says '{index['format']}'")
    if index["version"] > VERSION:
        raise UserError(
            f"{path} has index version {index['version']}; this program reads up to {VERSION}\n"
            "  update the program"
        )
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{path} names {len(missing)} store file(s) that are not there; keep them beside it\n"
            + format_list(missing)
        )
    return files


def _index(recipe: dict[str, Any], stores: dict[Path, list[Row]]) -> bytes:
    files = [
        {
            "file": file.name,
            "patches": sum(row.patches for row in rows),
            "slides": sorted(row.slide for row in rows),
        }
        for file, rows in stores.items()
        if rows
    ]
    index = {"format": FORMAT, "version": VERSION, "recipe": recipe, "stores": files}
    return (json.dumps(index, indent=1) + "\n").encode()


# --- the command ---


@contextmanager
def connected(scheduler: str, workers: int) -> Iterator[Client]:
    """A client of the scheduler at an address; ``local`` starts one here, with ``workers`` processes.

    The client speaks to the scheduler alone. What is started here listens on 127.0.0.1 alone.

    Raises:
        UserError: Dask is not installed, or nobody answers at the address.
    """
    dask = _distributed()
    logger = logging.getLogger("distributed.client")
    with ExitStack() as stack:
        # It logs the traceback of a lost connection, for which there is a message here.
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
        address = scheduler
        if scheduler == "local":
            with interrupts_held():
                try:
                    cluster = dask.LocalCluster(
                        n_workers=workers,
                        threads_per_worker=1,
                        memory_limit=0,
                        host="127.0.0.1",
                        # A server there must be, but one without pages.
                        dashboard_address="127.0.0.1:0",
                        scheduler_kwargs={"dashboard": False},
                        silence_logs=logging.ERROR,
                    )
                except (OSError, RuntimeError) as error:
                    raise no_processes(error) from error
                address = stack.enter_context(cluster).scheduler_address
        try:
            client = dask.Client(address, timeout=SECONDS_TO_ANSWER, direct_to_workers=False)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"no Dask scheduler answers at {scheduler}: {error}\n"
                "  give --scheduler the address that `dask scheduler` prints, tcp://HOST:PORT, or local"
            ) from error
        yield stack.enter_context(client)


def pack_on_cluster(
    client: Client,
    source: Source,
    out: Path,
    *,
    progress: Progress | None = None,
    chunk: int = CHUNK,
    patience: float = PATIENCE,
) -> Report:
    """As :func:`e2e.store.pack.pack`, on the workers of a cluster, into one store file each.

    Args:
        client: of :func:`connected`.
        source: the slides; their paths are absolute and the same on all machines.
        out: names the store files; a store of this very name is one of them. Its folder is shared.
        progress: is told what happens.
        chunk: patches a worker encodes at a time.
        patience: seconds to wait for a worker when there is none, and for a locked file.

    Raises:
        UserError: as of ``pack``; no worker; a worker that has another version of the project, or
            does not see the folder or the slides; the scheduler was lost. What was packed stays.
    """
    progress = progress or Progress()
    recipe, jobs = source.recipe(), source.jobs()
    with _issued(out, recipe, chunk) as ticket:
        stores = _settle(store_files(out), recipe, progress, patience)
        rows = [row for found in stores.values() for row in found]
        done = {row.slide for row in rows}
        todo = [job for job in jobs if job.slide not in done]
        progress.started(len(todo), len(rows))
        files = set(stores)
        try:
            for file, row in _work(client, ticket, todo, progress, patience):
                files.add(file)
                rows.append(row)
                _tell(progress, row)
            stores = _settle(sorted(files | set(store_files(out))), recipe, progress, patience)
            rows = _joined(stores, rows)
            write_atomically(index_path(out), _index(recipe, stores))
        finally:
            report = Report(out, sorted(rows, key=lambda row: row.slide), index_path(out))
            report.write()
    return report


def _tell(progress: Progress, row: Row) -> None:
    progress.planned(row.slide, row.patches)
    if row.status == "packed":
        progress.written(row.patches)
    progress.finished(row)


def _joined(stores: dict[Path, list[Row]], told: list[Row]) -> list[Row]:
    """What the files hold, and the slides that workers told are in none."""
    held = [row for found in stores.values() for row in found]
    slides = {row.slide for row in held}
    lost = [row for row in told if row.status == "packed" and row.slide not in slides]
    if lost:
        raise UserError(
            f"{len(lost)} slides that workers have packed are not in the files this machine sees; "
            "is the folder shared?\n" + format_list(row.slide for row in lost)
        )
    return held + [row for row in told if row.slide not in slides]


def _work(
    client: Client, ticket: Ticket, jobs: Sequence[Job], progress: Progress, patience: float
) -> Iterator[tuple[Path, Row]]:
    """Have the slides packed; yields, as they come, the file and what became of the slide."""
    dask, address = _distributed(), client.scheduler.address
    waiting, running = deque(jobs), dict[Future, Job]()
    try:
        if waiting:
            _await_worker(client, len(waiting), patience)
            _check_workers(client, ticket, waiting[0], progress)
        while waiting or running:
            _await_worker(client, len(waiting) + len(running), patience)
            # As many as there are workers, not all: a worker with many threads would take as many
            # slides, and one that dies would cast suspicion on all it has.
            while waiting and len(running) < len(client.nthreads()):
                job = waiting.popleft()
                key = f"pack-{ticket.token}-{job.slide}"
                work, parcel = _parcel(pack_slide, job, ticket)
                running[client.submit(work, parcel, key=key, pure=False)] = job
            for future in _finished(dask, running):
                yield _outcome(dask, future, running.pop(future), ticket)
    except (OSError, CancelledError) as error:  # the connection's: see _complaint
        raise UserError(
            f"lost the Dask scheduler at {address}: it has ended, or cannot be reached any more\n"
            "  the slides packed so far are safe: run the same command again"
        ) from error
    finally:
        if running and client.status == "running":
            client.cancel([*running], force=True)


def _parcel(function: Callable[..., Any], *arguments: object) -> tuple[Callable[..., Any], bytes]:
    """A call as Dask can carry it where the project is not installed, as at the scheduler."""

    def work(parcel: bytes) -> Any:  # nested, so it travels whole, not as a name to import
        import pickle

        function, arguments = pickle.loads(parcel)
        return function(*arguments)

    return work, pickle.dumps((function, arguments))


def _finished(dask: ModuleType, running: Iterable[Future]) -> Iterable[Future]:
    """Those that have ended; at the latest after a glance, with none."""
    futures = [*running]
    if futures:
        try:
            return dask.wait(futures, timeout=GLANCE, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            pass
    return ()


def _outcome(dask: ModuleType, future: Future, job: Job, ticket: Ticket) -> tuple[Path, Row]:
    if future.status == "finished":
        return future.result()
    if future.status == "cancelled":
        raise ConnectionError("it has forgotten the work")
    error = future.exception()
    if isinstance(error, dask.KilledWorker):
        # As far as can be told the slide's own fault: others go on, and the next run tries again.
        reason = "each worker that packed it died, most likely because the memory was full"
        return ticket.out, Row(job.slide, "quarantined", path=str(job.path), reason=reason)
    assert error is not None
    raise _complaint(error) from error


def _complaint(error: BaseException) -> BaseException:
    """What to tell of a worker's error that is not a slide's fault."""
    if isinstance(error, (ImportError, AttributeError)):
        return UserError(
            f"a worker lacks this version of the project ({error})\n"
            "  install the project where the workers run, or start them with PYTHONPATH=its folder"
        )
    if isinstance(error, OSError):
        return UserError(f"a worker cannot go on: {error}\n  the slides packed so far are safe")
    return error


def _await_worker(client: Client, slides: int, patience: float) -> None:
    if client.nthreads():
        return
    try:
        client.wait_for_workers(1, timeout=patience)
    except TimeoutError as error:
        address = client.scheduler.address
        raise UserError(
            f"the Dask scheduler at {address} has no worker, and {slides} slides wait "
            f"(for {patience:g} s now)\n"
            f"  start some, one for each core: dask worker {address} --nworkers N --nthreads 1\n"
            "  then run the same command again"
        ) from error


def _check_workers(client: Client, ticket: Ticket, job: Job, progress: Progress) -> None:
    """UserError naming the workers that cannot pack, and why."""
    answers = client.run(*_parcel(_problem, ticket, job), on_error="return")
    problems = [
        f"{worker}: {_complaint(answer) if isinstance(answer, Exception) else answer}"
        for worker, answer in answers.items()
        if answer is not None
    ]
    if problems:
        raise UserError(
            f"{len(problems)} of {len(answers)} workers cannot pack\n{format_list(problems)}"
        )
    threads = client.nthreads()
    if any(count > 1 for count in threads.values()):
        progress.noted(
            f"{len(threads)} workers with {sum(threads.values())} threads: each packs one slide at "
            "a time, on one thread; for more at once start them with --nworkers N --nthreads 1"
        )


@contextmanager
def _issued(out: Path, recipe: dict[str, Any], chunk: int) -> Iterator[Ticket]:
    """The ticket of this run; UserError where another command is packing to ``out``."""
    ticket = Ticket(out, recipe, chunk, secrets.token_hex(8), _versions())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out.parent}: {error.strerror}") from error
    handle = _claim(ticket.file)
    try:
        if handle is None or os.fstat(handle).st_nlink == 0:
            raise UserError(f"another command is packing to {out}; wait for its end, or stop it")
        os.ftruncate(handle, 0)
        os.write(handle, ticket.token.encode())
        os.fsync(handle)
        try:
            yield ticket
        finally:
            ticket.file.unlink(missing_ok=True)
    finally:
        if handle is not None:
            os.close(handle)


def _distributed() -> ModuleType:
    try:
        import distributed
    except ImportError as error:
        raise UserError(
            f"--scheduler needs Dask, which is not installed ({error})\n"
            "  pip install -r requirements.txt, or leave --scheduler to pack on this machine"
        ) from error
    return distributed


# --- the store files ---


def store_files(out: Path) -> list[Path]:
    """The files that belong to ``out``: of that name itself, then those of workers, by name."""
    name = re.compile(rf"{re.escape(out.stem)}\.[A-Za-z0-9-]+-[0-9]+{re.escape(out.suffix)}")
    found = sorted(file for file in out.parent.glob("*") if name.fullmatch(file.name))
    return [out, *found] if out.is_file() else found


def _settle(
    files: Sequence[Path], recipe: dict[str, Any], progress: Progress, patience: float
) -> dict[Path, list[Row]]:
    """File -> its slides. One that two files hold is dropped from the second.

    That happens when a worker dies, or loses the scheduler, between storing a slide and saying so.
    """
    stores: dict[Path, list[Row]] = {}
    holder: dict[str, Path] = {}
    for file in files:
        with _held(file, patience):
            with StoreWriter(file, recipe) as writer:
                rows = [Row.of(writer.record(slide), "packed") for slide in sorted(writer.done)]
            twice = [row.slide for row in rows if row.slide in holder]
            if twice:
                found = (f"{slide}: kept in {holder[slide].name}" for slide in twice)
                progress.noted(
                    f"{file} is rewritten without {len(twice)} slides that other files hold too\n"
                    + format_list(found)
                )
                rows = [row for row in rows if row.slide not in holder]
                # In a process of its own, which leaves no store open in this one.
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, mp_context=context) as other:
                    other.submit(_rewrite, file, recipe, [row.slide for row in rows]).result()
        holder.update(dict.fromkeys((row.slide for row in rows), file))
        stores[file] = rows
    return stores


def _rewrite(file: Path, recipe: dict[str, Any], slides: Sequence[str]) -> None:
    """Replace a store, at once, by one with only these of its slides."""
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    old = PatchStore(file)
    with StoreWriter(part, recipe) as new:
        for slide in slides:
            record = old.record(slide)
            # One at a time: a slide may be larger than the memory.
            new.add(record, (old.read(slide, [index])[0] for index in range(record.count)))
    part.replace(file)
    Path(f"{part}-lock").unlink(missing_ok=True)


def _claim(path: Path) -> int | None:
    """See :func:`e2e.files.lock_file`."""
    try:
        return lock_file(path)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} cannot lock {path}: {error.strerror}\n"
            "  packing on several machines needs a place that all can write, with flock"
        ) from error


@contextmanager
def _held(file: Path, patience: float) -> Iterator[None]:
    """The store file is ours for the block; a worker of a stopped command needs a moment to go."""
    until = monotonic() + patience
    while (handle := _claim(file)) is None:
        if monotonic() > until:
            raise UserError(
                f"{file} is still being written, by a worker that this run knows nothing of\n"
                f"  stop that worker (it is named after its machine), then run the same command again"
            )
        sleep(0.1)
    try:
        yield
    finally:
        os.close(handle)


# --- on a worker ---


@dataclass(frozen=True)
class Ticket:
    """What a worker must know of the run."""

    out: Path
    recipe: dict[str, Any]
    chunk: int
    token: str
    versions: dict[str, str]

    @property
    def file(self) -> Path:
        """Holds the token while the command runs."""
        return self.out.with_name(f".{self.out.name}.packing")

    def valid(self) -> bool:
        """Whether this machine shares the folder with the command, and that is running."""
        try:
            return self.file.read_text() == self.token
        except OSError:
            return False


_ONE_SLIDE = threading.Lock()
"""A worker with many threads has one store file all the same."""


def pack_slide(job: Job, ticket: Ticket) -> tuple[Path, Row]:
    """Pack one slide into a store file of this machine. Runs on a worker.

    Raises:
        UserError: not the slide's fault: see :func:`pack_on_cluster`.
    """
    with _ONE_SLIDE:
        problem = _problem(ticket, job)
        if problem:
            raise UserError(f"worker on {socket.gethostname()}: {problem}")
        file, handle = _free_file(ticket.out)
        try:
            with StoreWriter(file, ticket.recipe) as writer:
                if job.slide in writer.done:  # by a worker that died before it could say so
                    return file, Row.of(writer.record(job.slide), "packed", str(job.path))
                watch = _WhileValid(ticket)
                return file, pack_one(writer, job, ticket.out, chunk=ticket.chunk, progress=watch)
        finally:
            os.close(handle)


class _WhileValid(Progress):
    """Gives a slide up when the command has ended: nobody waits for it, and the next needs the file."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket

    def written(self, patches: int) -> None:
        if not self._ticket.valid():
            raise UserError(f"the command that packs to {self._ticket.out} has ended")


def _free_file(out: Path) -> tuple[Path, int]:
    """The first of this machine's store files that nobody writes, and the lock on it."""
    host = re.sub("[^A-Za-z0-9-]", "-", socket.gethostname())
    for number in itertools.count():
        file = out.with_name(f"{out.stem}.{host}-{number}{out.suffix}")
        handle = _claim(file)
        if handle is not None:
            return file, handle
    raise AssertionError("unreachable")


def _problem(ticket: Ticket, job: Job) -> str | None:
    """Why this worker cannot pack; ``job`` stands for all of them."""
    mine = _versions()
    other = [key for key in ticket.versions if mine.get(key) != ticket.versions[key]]
    if other:
        differ = ", ".join(f"{key} {mine.get(key)} (not {ticket.versions[key]})" for key in other)
        return f"has other versions than the command: {differ}"
    if not ticket.valid():
        return f"does not share the folder {ticket.out.parent} with the command"
    try:
        with tempfile.TemporaryFile(dir=ticket.out.parent):
            pass
    except OSError as error:
        return f"cannot write to the folder {ticket.out.parent}: {error.strerror}"
    paths = [value for value in vars(job).values() if isinstance(value, Path)]
    unseen = [str(path) for path in paths if not path.exists()]
    if unseen:
        return f"does not see {', '.join(unseen)}, which must have that path on every machine"
    return None


@functools.cache
def _versions() -> dict[str, str]:
    """Of all that decides what is in a store: the project's own source, and libraries."""
    package = Path(__file__).resolve().parents[1]
    source = hashlib.blake2b(digest_size=6)
    for file in sorted(package.rglob("*.py")):
        source.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    found = {"e2e": source.hexdigest()}
    for library in MAKERS:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "missing"
    return found
