"""Pack slides into a patch store: in parallel, resumable, each slide completely or not at all."""

from __future__ import annotations

import csv
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from e2e.errors import UserError, format_list
from e2e.files import OutputError, write_atomically
from e2e.slides import file_name
from e2e.store.lmdb import OtherPatchesError, StoreWriter
from e2e.store.records import SlideRecord
from e2e.store.sources import Job, Source

T = TypeVar("T")

BATCH_SIZE = 128
"""Patches that a worker encodes at a time: some megabytes of JPEG, some seconds of work."""


@dataclass(frozen=True)
class Row:
    """What became of a slide; a row of the report."""

    slide: str
    """Id of the slide."""
    status: str
    """packed, no tissue, or quarantined."""
    patches: int = 0
    """Number of patches."""
    mpp: float | None = None
    """This and the next seven as in :class:`SlideRecord`."""
    level0_px: float = 0.0
    patch_px: int = 0
    width: int = 0
    height: int = 0
    source: str = ""
    source_bytes: int = 0
    identity: str = ""
    path: str = ""
    """The file or folder that this run read; empty for slides of an earlier run."""
    reason: str = ""
    """Why the slide is not in the store, or what is unusual about its patches."""

    @classmethod
    def of(cls, record: SlideRecord, status: str, path: str = "", reason: str = "") -> Row:
        """Return the row of a slide that has a record."""
        return cls(
            slide=record.slide,
            status=status,
            patches=record.num_patches,
            mpp=record.mpp,
            level0_px=record.level0_px,
            patch_px=record.patch_px,
            width=record.width,
            height=record.height,
            source=record.source,
            source_bytes=record.source_bytes,
            identity=record.identity,
            path=path,
            reason=reason,
        )


@dataclass(frozen=True)
class Report:
    """The slides in a store after packing, and those that could not be packed."""

    out: Path
    """The store."""
    rows: list[Row]
    """One per slide, sorted by id, including slides of earlier runs."""
    index: Path | None = None
    """The index to open instead of `out` if the slides are in several files."""

    @property
    def packed(self) -> list[Row]:
        """The slides in the store."""
        return [row for row in self.rows if row.status == "packed"]

    @property
    def problems(self) -> list[Row]:
        """The slides that are not in the store: quarantined, or without tissue."""
        return [row for row in self.rows if row.status != "packed"]

    @property
    def path(self) -> Path:
        """The CSV file with all rows."""
        return Path(f"{self.out}.report.csv")

    @property
    def quarantine(self) -> Path:
        """The CSV file with the problems: slide,path,reason. It has no rows if there are none."""
        return Path(f"{self.out}.quarantine.csv")

    def write(self) -> None:
        """Write both CSV files."""
        columns = [f.name for f in fields(Row) if f.name not in ("identity", "path")]
        write_atomically(self.path, _to_csv(columns, self.rows))
        write_atomically(self.quarantine, _to_csv(["slide", "path", "reason"], self.problems))


class Progress:
    """Methods that are called while packing; override those of interest. These do nothing."""

    def started(self, slides: int, stored: int) -> None:
        """Packing starts: `slides` slides to pack, and `stored` more in the store already."""

    def planned(self, slide: str, patches: int) -> None:
        """The patches of `slide` are written next."""

    def written(self, patches: int) -> None:
        """So many more patches of that slide were written."""

    def finished(self, row: Row) -> None:
        """A slide is packed, or will not be."""

    def noted(self, text: str) -> None:
        """A message that does not belong to a slide."""


def pack(
    source: Source,
    out: Path,
    *,
    workers: int,
    progress: Progress | None = None,
    batch_size: int = BATCH_SIZE,
) -> Report:
    """Pack every slide of a source that is not in the store yet.

    A slide is stored completely or not at all. One that cannot be used is listed in the report and the
    others go on. If packing is killed at any moment and started again, it ends with the same store.
    Beside `out` it writes ``<out>.report.csv``, ``<out>.quarantine.csv`` and, for what is cut from
    slides, ``<out stem>_overview/<slide>.png``.

    Parameters
    ----------
    source : Source
        The slides.
    out : Path
        The store, which is created or appended to.
    workers : int
        Processes that read and encode; 0 does everything in this one.
    progress : Progress, optional
        Its methods are called as packing goes on.
    batch_size : int
        Patches that a worker encodes at a time.

    Returns
    -------
    Report
        All slides in the store, and those that could not be packed.

    Raises
    ------
    UserError
        If the source is empty, the store was packed with other settings or holds slides that were cut
        from other files, the disk is full, or a worker process died. What was packed stays.
    """
    progress = progress or Progress()
    recipe, jobs = source.recipe(), source.jobs()
    with StoreWriter(out, recipe) as writer, worker_pool(workers) as pool:
        rows = [Row.of(writer.record(slide), "packed") for slide in writer.done]
        jobs = jobs_to_do(jobs, rows, out)
        progress.started(len(jobs), len(rows))
        conveyor = _Conveyor(pool, jobs, overview_folder(out), workers, batch_size, progress)
        try:
            for lane in conveyor.lanes():
                rows.append(_store_slide(writer, conveyor, lane))
                progress.finished(rows[-1])
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died while packing, most likely because it ran out of memory "
                "(see dmesg)\n  the slides packed so far are safe: run the same command again "
                f"with fewer --workers than {workers}"
            ) from error
        finally:
            report = Report(out, sorted(rows, key=lambda row: row.slide))
            report.write()
    return report


def jobs_to_do(jobs: Sequence[Job], rows: Sequence[Row], out: Path) -> list[Job]:
    """Return the jobs whose slides are not in the store yet.

    Parameters
    ----------
    jobs : sequence of Job
        The slides to pack.
    rows : sequence of Row
        The slides in the store.
    out : Path
        The store, for the message.

    Raises
    ------
    UserError
        A slide in the store was cut from another file, or with another resolution given for it.
    """
    stored = {row.slide: row for row in rows}
    stale = [job for job in jobs if job.slide in stored and not _is_current(job, stored[job.slide])]
    if stale:
        lines = [f"{job.slide}: {job.path}" for job in stale]
        raise OtherPatchesError(
            f"{out}: {len(stale)} slide(s) in the store were cut from other files than those given now, or "
            f"with another --mpp-override\n{format_list(lines, most=3)}\n"
            "  they would keep their old patches: choose another --out, or remove the store first"
        )
    return [job for job in jobs if job.slide not in stored]


def _is_current(job: Job, row: Row) -> bool:
    """Whether a slide in the store is what the job would pack, as far as the store says."""
    if row.identity:
        return job.identity() in (
            "",
            row.identity,
        )  # a file that cannot be read is reported elsewhere
    is_file = row.source_bytes > 0 and job.path.is_file()  # packed by an earlier version
    return not is_file or job.path.stat().st_size == row.source_bytes


def pack_one(
    writer: StoreWriter,
    job: Job,
    out: Path,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Row:
    """Pack one slide in this process.

    Parameters
    ----------
    writer : StoreWriter
        The store.
    job : Job
        The slide.
    out : Path
        The overview of the slide is written beside this path.
    batch_size : int
        Patches to encode at a time.
    progress : Progress, optional
        Its methods are called as packing goes on.

    Raises
    ------
    UserError
        If the fault is not the slide's, as in :func:`pack`.
    """
    pool, progress = _InThisProcess(), progress or Progress()
    conveyor = _Conveyor(pool, [job], overview_folder(out), 0, batch_size, progress)
    return _store_slide(writer, conveyor, next(conveyor.lanes()))


def overview_folder(out: Path) -> Path:
    """Return the folder of the overviews that show where slides were cut."""
    return out.with_name(f"{out.stem}_overview")


def _store_slide(writer: StoreWriter, conveyor: _Conveyor, lane: _Lane) -> Row:
    """Wait for one slide and store it; its row says why if that fails."""
    slide, path = lane.job.slide, str(lane.job.path)
    try:
        record = lane.plan.result()
        if record.num_patches == 0:
            return Row.of(record, "no tissue", path, lane.job.remark(record))
        writer.add(record, conveyor.jpegs(lane))
    except _BadSlideError as error:
        return Row(slide, "quarantined", path=path, reason=str(error))
    return Row.of(record, "packed", path, lane.job.remark(record))


class _BadSlideError(Exception):
    """A fault of the slide; other UserErrors, such as the store's, end the run."""


@dataclass
class _Lane:
    """A slide in progress: its plan, and its batches of JPEGs in order."""

    job: Job
    plan: Future[SlideRecord]
    batches: deque[Future[list[bytes]]] = field(default_factory=deque)
    submitted: int = 0
    """Patches that have been submitted to workers."""


class _Conveyor:
    """Keeps the workers busy across slides, with a bounded number of batches in memory.

    Plans run some slides ahead. Batches are submitted strictly in order, so the slide that is being
    written never waits for room that later slides have taken.
    """

    def __init__(
        self,
        pool: Executor,
        jobs: Sequence[Job],
        overviews: Path,
        workers: int,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self._pool, self._waiting, self._overviews = pool, deque(jobs), overviews
        self._batch_size, self._progress = batch_size, progress
        self._max_lanes, self._room = max(1, 2 * workers), max(1, 2 * workers)
        self._lanes: deque[_Lane] = deque()

    def lanes(self) -> Iterator[_Lane]:
        """Yield the slides in order; taking the next drops the rest of the one before."""
        self._submit()
        while self._lanes:
            yield self._lanes[0]
            lane = self._lanes.popleft()
            for future in lane.batches:
                future.cancel()
                self._room += 1
            self._submit()

    def jpegs(self, lane: _Lane) -> Iterator[bytes]:
        """Yield the patches of the first lane in order; _BadSlideError if one cannot be encoded."""
        self._progress.planned(lane.job.slide, lane.plan.result().num_patches)
        self._submit()
        while lane.batches:
            future = lane.batches.popleft()
            self._room += 1
            jpegs = future.result()
            self._submit()
            yield from jpegs
            self._progress.written(len(jpegs))

    def _submit(self) -> None:
        """Submit plans and batches as far as there is room."""
        while self._waiting and len(self._lanes) < self._max_lanes:
            job = self._waiting.popleft()
            overview = self._overviews / f"{file_name(job.slide)}.png"
            self._lanes.append(_Lane(job, self._pool.submit(_run_job, job.plan, overview)))
        for lane in self._lanes:
            if not lane.plan.done():
                return
            if lane.plan.exception() is None and not self._submit_batches(lane):
                return

    def _submit_batches(self, lane: _Lane) -> bool:
        """Submit batches of a slide while there is room; return whether all are submitted."""
        record = lane.plan.result()
        while lane.submitted < record.num_patches:
            if self._room == 0:
                return False
            start = lane.submitted
            lane.submitted = min(start + self._batch_size, record.num_patches)
            part = record.slice(start, lane.submitted)
            lane.batches.append(self._pool.submit(_run_job, lane.job.encode, part, start))
            self._room -= 1
        return True


def _run_job(work: Callable[..., T], *arguments: object) -> T:
    """Call a method of a job; its errors become the slide's."""
    try:
        return work(*arguments)
    except OutputError:
        raise
    except (UserError, OSError) as error:
        raise _BadSlideError(str(error)) from error


class _InThisProcess(Executor):
    """An executor that runs each call at once, in the calling process."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except _BadSlideError as error:
            future.set_exception(error)
        return future


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    """Start worker processes for the block; 0 runs everything in this process.

    Raises
    ------
    UserError
        If processes cannot be started.
    """
    if workers == 0:
        yield _InThisProcess()
        return
    # Spawned, not forked: LMDB and OpenSlide must not be carried over a fork.
    context = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    except OSError as error:
        raise start_error(error) from error
    try:
        with defer_interrupts():
            # Ctrl-C is handled by the parent. A task for each worker starts all of them now.
            for _ in range(workers):
                pool.submit(os.getpid)
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def start_error(error: Exception) -> UserError:
    """Return the error to raise if worker processes cannot be started."""
    return UserError(
        f"cannot start worker processes: {error}\n"
        "  they need some /dev/shm: free some (docker run --shm-size=1g), or pack with --workers 0"
    )


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block; processes started inside never receive it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_parent() -> None:
    """End this process when its parent is killed: a worker that waits for work would not notice."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _to_csv(columns: list[str], rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**asdict(row), "reason": " ".join(row.reason.split())})
    return text.getvalue().encode()
