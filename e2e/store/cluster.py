"""Packing over many machines, slide by slide on the workers of a Dask cluster. The only user of Dask.

The command gives each worker one slide at a time. If a worker dies, Dask gives its slide to another.
All machines share one folder, and the files in it decide who may do what:

- ``<stem>.<host>-<n>.lmdb``, the store files. A worker takes, for each slide, the first file of its host
  that nobody has locked (flock, which ends with the process, however that ends). So a file has one
  writer at a time, always of the same host, and a worker that comes back under another name appends to
  the existing files.
- ``.<name>.packing``, the token of the run, which exists as long as the command runs. A worker that
  cannot read it does not share the folder; a worker that no longer finds it drops its slide.
- ``<stem>.stores.json``, the index, written last: the store files, and the slides in each.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from e2e.errors import UserError, format_list, optional_import
from e2e.store.cluster_worker import (
    Ticket,
    installed_versions,
    list_store_files,
    lock_shared_file,
    locked_store_file,
    pack_slide,
    worker_problem,
)
from e2e.store.index import index_path, write_index
from e2e.store.lmdb import PatchStore, StoreWriter
from e2e.store.pack import (
    BATCH_SIZE,
    Progress,
    Report,
    Row,
    defer_interrupts,
    jobs_to_do,
    start_error,
)
from e2e.store.sources import Job, Source

Client = Any
Future = Any
"""Dask's types. Not imported, because their annotations fit asynchronous use only."""

PATIENCE = 20.0
"""Seconds to wait for a worker to appear, or for a store file to be released."""

CONNECT_TIMEOUT = 5
"""Seconds for the scheduler to answer."""

POLL_INTERVAL = 1.0
"""Seconds after which the command checks for workers that came or went."""


@contextmanager
def connect(scheduler: str, workers: int) -> Iterator[Client]:
    """Connect to a Dask scheduler for the block.

    The client talks to the scheduler only. What is started here listens on 127.0.0.1 only.

    Parameters
    ----------
    scheduler : str
        The address of the scheduler; ``local`` starts one on this machine.
    workers : int
        Worker processes to start for ``local``.

    Raises
    ------
    UserError
        If Dask is not installed, or no scheduler answers at the address.
    """
    dask = _import_dask()
    logger = logging.getLogger("distributed.client")
    with ExitStack() as stack:
        # Dask sets variables for its workers in this process too.
        stack.callback(_restore_environment, dict(os.environ))
        # It logs the traceback of a lost connection, which is reported as a message here.
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
        address = scheduler
        if scheduler == "local":
            with defer_interrupts():
                cluster = stack.enter_context(_start_local_cluster(dask, workers))
            address = cluster.scheduler_address
        try:
            client = dask.Client(address, timeout=CONNECT_TIMEOUT, direct_to_workers=False)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"no Dask scheduler answers at {scheduler}: {error}\n"
                "  give --scheduler the address that `dask scheduler` prints, tcp://HOST:PORT, or local"
            ) from error
        yield stack.enter_context(client)


def _restore_environment(variables: Mapping[str, str]) -> None:
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def _start_local_cluster(dask: ModuleType, workers: int) -> Any:
    try:
        return dask.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=0,
            host="127.0.0.1",
            # Dask needs a dashboard server, but it can do without pages.
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            silence_logs=logging.ERROR,
        )
    except (OSError, RuntimeError) as error:
        raise start_error(error) from error


def pack_on_cluster(
    client: Client,
    source: Source,
    out: Path,
    *,
    progress: Progress | None = None,
    batch_size: int = BATCH_SIZE,
    patience: float = PATIENCE,
) -> Report:
    """Pack slides on the workers of a cluster, see :func:`e2e.store.pack.pack`.

    Parameters
    ----------
    client : distributed.Client
        From :func:`connect`.
    source : Source
        The slides. Their paths are absolute and the same on all machines.
    out : Path
        Names the store files. A store of exactly this name becomes one of them. All machines share
        its folder.
    progress : Progress, optional
        Its methods are called as packing goes on.
    batch_size : int
        Patches that a worker encodes at a time.
    patience : float
        Seconds to wait for a worker if there is none, and for a locked file.

    Returns
    -------
    Report
        All slides in the store files, and those that could not be packed.

    Raises
    ------
    UserError
        As :func:`pack`; or there is no worker, a worker has another version of the project or does
        not see the folder or the slides, or the scheduler was lost. What was packed stays.
    """
    progress = progress or Progress()
    recipe, jobs = source.recipe(), source.jobs()
    with issue_ticket(out, recipe, batch_size) as ticket:
        stores = _read_store_files(list_store_files(out), recipe, progress, patience)
        rows = [row for file_rows in stores.values() for row in file_rows]
        jobs = jobs_to_do(jobs, rows, out)
        progress.started(len(jobs), len(rows))
        files = set(stores)
        try:
            for file, row in _pack_jobs(client, ticket, jobs, progress, patience):
                files.add(file)
                rows.append(row)
                _report_row(progress, row)
            files |= set(list_store_files(out))
            stores = _read_store_files(sorted(files), recipe, progress, patience)
            rows = _merge_rows(stores, rows)
            write_index(out, recipe, _count_patches(stores))
        finally:
            report = Report(out, sorted(rows, key=lambda row: row.slide), index_path(out))
            report.write()
    return report


def _count_patches(stores: dict[Path, list[Row]]) -> dict[Path, dict[str, int]]:
    """Return store file -> slide -> number of patches."""
    return {file: {row.slide: row.patches for row in rows} for file, rows in stores.items()}


def _report_row(progress: Progress, row: Row) -> None:
    progress.planned(row.slide, row.patches)
    if row.status == "packed":
        progress.written(row.patches)
    progress.finished(row)


def _merge_rows(stores: dict[Path, list[Row]], reported: list[Row]) -> list[Row]:
    """Return the rows of the files, and those that workers reported for slides in no file."""
    stored = [row for rows in stores.values() for row in rows]
    slides = {row.slide for row in stored}
    lost = [row for row in reported if row.status == "packed" and row.slide not in slides]
    if lost:
        raise UserError(
            f"{len(lost)} slides that workers have packed are not in the files that this machine "
            f"sees\n{format_list(row.slide for row in lost)}\n"
            f"  check that all machines share the folder of --out"
        )
    return stored + [row for row in reported if row.slide not in slides]


def _pack_jobs(
    client: Client, ticket: Ticket, jobs: Sequence[Job], progress: Progress, patience: float
) -> Iterator[tuple[Path, Row]]:
    """Have the slides packed; yield file and row of each as it ends."""
    dask, address = _import_dask(), client.scheduler.address
    waiting, running = deque(jobs), dict[Future, Job]()
    try:
        if waiting:
            _wait_for_worker(client, len(waiting), patience)
            _check_workers(client, ticket, waiting[0], progress)
        while waiting or running:
            _wait_for_worker(client, len(waiting) + len(running), patience)
            # As many as there are workers, not all: a worker with many threads would take as many
            # slides, and if it died, all of them would be under suspicion.
            while waiting and len(running) < len(client.nthreads()):
                job = waiting.popleft()
                key = f"pack-{ticket.token}-{job.slide}"
                work, parcel = _make_parcel(pack_slide, job, ticket)
                running[client.submit(work, parcel, key=key, pure=False)] = job
            for future in _wait_for_any(dask, running):
                yield _result(dask, future, running.pop(future), ticket)
    except (OSError, CancelledError) as error:  # the connection's: see _explain_worker_error
        raise UserError(
            f"lost the Dask scheduler at {address}: it has ended, or cannot be reached\n"
            "  the slides packed so far are safe: run the same command again"
        ) from error
    finally:
        if running and client.status == "running":
            client.cancel([*running], force=True)


def _make_parcel(
    function: Callable[..., Any], *arguments: object
) -> tuple[Callable[..., Any], bytes]:
    """Return a call in a form that Dask can carry where the project is not installed."""

    def work(parcel: bytes) -> Any:  # nested, so that Dask sends its code, not a name to import
        import pickle

        function, arguments = pickle.loads(parcel)
        return function(*arguments)

    return work, pickle.dumps((function, arguments))


def _wait_for_any(dask: ModuleType, running: Iterable[Future]) -> Iterable[Future]:
    """Return the futures that have ended, after `POLL_INTERVAL` at the latest."""
    futures = [*running]
    if futures:
        try:
            return dask.wait(futures, timeout=POLL_INTERVAL, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            pass
    return ()


def _result(dask: ModuleType, future: Future, job: Job, ticket: Ticket) -> tuple[Path, Row]:
    if future.status == "finished":
        return future.result()
    if future.status == "cancelled":
        raise ConnectionError("the scheduler has forgotten the work")
    error = future.exception()
    if isinstance(error, dask.KilledWorker):
        # Most likely the slide's own fault: the others go on, and the next run tries it again.
        reason = "each worker that packed it died, most likely because it ran out of memory"
        return ticket.out, Row(job.slide, "quarantined", path=str(job.path), reason=reason)
    assert error is not None
    raise _explain_worker_error(error) from error


def _explain_worker_error(error: BaseException) -> BaseException:
    """Return the error to raise for a worker's error that is not a slide's fault."""
    if isinstance(error, (ImportError, AttributeError)):
        return UserError(
            f"a worker lacks this version of the project ({error})\n"
            "  install the project where the workers run, or start them with PYTHONPATH=its folder"
        )
    if isinstance(error, OSError):
        return UserError(f"a worker cannot go on: {error}\n  the slides packed so far are safe")
    return error


def _wait_for_worker(client: Client, num_slides: int, patience: float) -> None:
    if client.nthreads():
        return
    try:
        client.wait_for_workers(1, timeout=patience)
    except TimeoutError as error:
        address = client.scheduler.address
        raise UserError(
            f"the Dask scheduler at {address} has no worker, and {num_slides} slides are waiting "
            f"(after {patience:g} s)\n"
            f"  start workers, one for each core: dask worker {address} --nworkers N --nthreads 1\n"
            "  then run the same command again"
        ) from error


def _check_workers(client: Client, ticket: Ticket, job: Job, progress: Progress) -> None:
    """Raise UserError that names the workers that cannot pack, and why."""
    answers = client.run(*_make_parcel(worker_problem, ticket, job), on_error="return")
    problems = [
        f"{worker}: {_explain_worker_error(answer) if isinstance(answer, Exception) else answer}"
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
            "a time, on one thread; for more at once, start them with --nworkers N --nthreads 1"
        )


@contextmanager
def issue_ticket(out: Path, recipe: dict[str, Any], batch_size: int) -> Iterator[Ticket]:
    """Create the ticket of a run and its token file, for the block.

    Parameters
    ----------
    out : Path
        The path that names the store files. Its folder is created.
    recipe : dict
        How the patches are cut.
    batch_size : int
        Patches that a worker encodes at a time.

    Raises
    ------
    UserError
        If another command is packing to `out`, or the folder cannot be created.
    """
    ticket = Ticket(out, recipe, batch_size, secrets.token_hex(8), installed_versions())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {out.parent}: {error.strerror}") from error
    handle = lock_shared_file(ticket.file)
    try:
        if handle is None or os.fstat(handle).st_nlink == 0:
            raise UserError(f"another command is packing to {out}\n  wait for its end, or stop it")
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


def _read_store_files(
    files: Sequence[Path], recipe: dict[str, Any], progress: Progress, patience: float
) -> dict[Path, list[Row]]:
    """Return the slides of each file, after dropping a slide that two files hold from the second.

    Two files hold a slide if a worker dies, or loses the scheduler, between storing and reporting it.
    """
    stores: dict[Path, list[Row]] = {}
    holder: dict[str, Path] = {}
    for file in files:
        with locked_store_file(file, patience):
            with StoreWriter(file, recipe) as writer:
                rows = [Row.of(writer.record(slide), "packed") for slide in sorted(writer.done)]
            duplicates = [row.slide for row in rows if row.slide in holder]
            if duplicates:
                lines = (f"{slide}: kept in {holder[slide].name}" for slide in duplicates)
                progress.noted(
                    f"{file} is rewritten without {len(duplicates)} slides that other files hold "
                    f"too\n{format_list(lines)}"
                )
                rows = [row for row in rows if row.slide not in holder]
                # In another process, so that no store stays open in this one.
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    pool.submit(_rewrite, file, recipe, [row.slide for row in rows]).result()
        holder.update(dict.fromkeys((row.slide for row in rows), file))
        stores[file] = rows
    return stores


def _rewrite(file: Path, recipe: dict[str, Any], slides: Sequence[str]) -> None:
    """Replace a store, in one step, by one that holds only these of its slides."""
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    old = PatchStore(file)
    with StoreWriter(part, recipe) as new:
        for slide in slides:
            record = old.record(slide)
            # One at a time: a slide may be larger than the memory.
            new.add(record, (old.read(slide, [index])[0] for index in range(record.num_patches)))
    part.replace(file)
    Path(f"{part}-lock").unlink(missing_ok=True)


def _import_dask() -> ModuleType:
    with optional_import("cluster", use="--scheduler"):
        import distributed
    return distributed
