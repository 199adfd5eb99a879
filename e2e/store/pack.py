"""Sources -> a patch store: parallel, resumable, a slide whole or not at all."""

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
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from e2e.errors import UserError
from e2e.files import OutputError, write_atomically
from e2e.store.lmdb import StoreWriter
from e2e.store.records import SlideRecord
from e2e.store.sources import Job, Source

T = TypeVar("T")

CHUNK = 128
"""Patches a worker encodes at a time: some megabytes of JPEG, some seconds of work."""


@dataclass(frozen=True)
class Row:
    """What became of a slide: a line of the report."""

    slide: str
    status: str
    """packed, no tissue, or quarantined."""
    patches: int = 0
    mpp: float | None = None
    level0_px: float = 0.0
    patch_px: int = 0
    width: int = 0
    height: int = 0
    source: str = ""
    source_bytes: int = 0
    path: str = ""
    """Where this run read it from; empty for slides of an earlier run."""
    reason: str = ""

    @classmethod
    def of(cls, record: SlideRecord, status: str, path: str = "", reason: str = "") -> Row:
        """The row of a slide that could be planned."""
        known = {f.name: getattr(record, f.name) for f in fields(record) if f.name != "coords"}
        return cls(status=status, patches=record.count, path=path, reason=reason, **known)


@dataclass(frozen=True)
class Report:
    """What a store holds after packing, and what could not be packed."""

    out: Path
    rows: list[Row]
    """One for each slide, sorted by id; slides of earlier runs included."""
    index: Path | None = None
    """What to read instead of ``out`` where the slides are in several files."""

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
        """CSV of all rows."""
        return Path(f"{self.out}.report.csv")

    @property
    def quarantine(self) -> Path:
        """CSV of the problems: slide,path,reason. Without a row when there is none."""
        return Path(f"{self.out}.quarantine.csv")

    def write(self) -> None:
        """Write both tables."""
        columns = [f.name for f in fields(Row) if f.name != "path"]
        write_atomically(self.path, _csv(columns, self.rows))
        write_atomically(self.quarantine, _csv(["slide", "path", "reason"], self.problems))


class Progress:
    """What a caller may want to hear while packing. This one keeps silent."""

    def started(self, slides: int, stored: int) -> None:
        """``slides`` are to be packed; ``stored`` more are in the store already."""

    def planned(self, slide: str, patches: int) -> None:
        """The slide whose patches are written next."""

    def written(self, patches: int) -> None:
        """So many more patches of that slide are written."""

    def finished(self, row: Row) -> None:
        """A slide is done with, one way or the other."""

    def noted(self, text: str) -> None:
        """Something worth a line that is no slide's."""


def pack(
    source: Source, out: Path, *, workers: int, progress: Progress | None = None, chunk: int = CHUNK
) -> Report:
    """Pack every slide of ``source`` that is not in the store ``out`` yet.

    A slide is stored whole or not at all; one that cannot be used is named in the report and the
    others go on. Killed at any moment and started again, it ends with the same store. Beside
    ``out`` it writes ``<out>.report.csv``, ``<out>.quarantine.csv`` and, for what is cut from
    slides, ``<out stem>_overview/<slide>.png``.

    Args:
        source: the slides.
        out: the store, made or gone on with.
        workers: processes that read and encode; 0 does all in this one.
        progress: is told what happens.
        chunk: patches a worker encodes at a time.

    Raises:
        UserError: the source is empty, the store was packed in another way, the disk is full, or
            a worker process died. What was packed stays.
    """
    progress = progress or Progress()
    recipe, jobs = source.recipe(), source.jobs()
    with StoreWriter(out, recipe) as writer, _pool(workers) as pool:
        rows = [Row.of(writer.record(slide), "packed") for slide in writer.done]
        todo = [job for job in jobs if job.slide not in writer.done]
        progress.started(len(todo), len(rows))
        conveyor = _Conveyor(pool, todo, pictures(out), workers, chunk, progress)
        try:
            for lane in conveyor.lanes():
                rows.append(_finish(writer, conveyor, lane))
                progress.finished(rows[-1])
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died while packing, most likely because the memory was full "
                "(see dmesg)\n  the slides packed so far are safe: run the same command again "
                f"with fewer --workers than {workers}"
            ) from error
        finally:
            report = Report(out, sorted(rows, key=lambda row: row.slide))
            report.write()
    return report


def pack_one(
    writer: StoreWriter,
    job: Job,
    out: Path,
    *,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Row:
    """Pack one slide in this process; its picture goes beside ``out``.

    Raises:
        UserError: not the slide's fault, as in :func:`pack`.
    """
    pool, progress = _InThisProcess(), progress or Progress()
    conveyor = _Conveyor(pool, [job], pictures(out), 0, chunk, progress)
    return _finish(writer, conveyor, next(conveyor.lanes()))


def pictures(out: Path) -> Path:
    """The folder of the pictures that show where slides were cut."""
    return out.with_name(f"{out.stem}_overview")


def _finish(writer: StoreWriter, conveyor: _Conveyor, lane: _Lane) -> Row:
    """Wait for one slide and store it, or say why not."""
    slide, path = lane.job.slide, str(lane.job.path)
    try:
        record = lane.plan.result()
        if record.count == 0:
            return Row.of(record, "no tissue", path, "no patch with enough tissue")
        writer.add(record, conveyor.jpegs(lane))
    except _BadSlideError as bad:
        return Row(slide, "quarantined", path=path, reason=str(bad))
    return Row.of(record, "packed", path)


class _BadSlideError(Exception):
    """A slide's own fault; set apart from the store's UserErrors, which end the run."""


@dataclass
class _Lane:
    """A slide under way: its plan, and its chunks in order."""

    job: Job
    plan: Future[SlideRecord]
    chunks: deque[Future[list[bytes]]] = field(default_factory=deque)
    sent: int = 0
    """Patches that have been given to workers."""


class _Conveyor:
    """Keeps the workers busy over the borders of slides, with a bounded number of chunks in memory.

    Plans run some slides ahead. Chunks are handed out strictly in order, so that the slide that is
    being written never waits for room that later slides have taken.
    """

    def __init__(
        self,
        pool: Executor,
        jobs: Sequence[Job],
        pictures: Path,
        workers: int,
        chunk: int,
        progress: Progress,
    ) -> None:
        self._pool, self._waiting, self._pictures = pool, deque(jobs), pictures
        self._chunk, self._progress = chunk, progress
        self._ahead, self._room = max(1, 2 * workers), max(1, 2 * workers)
        self._lanes: deque[_Lane] = deque()

    def lanes(self) -> Iterator[_Lane]:
        """The slides in order; asking for the next drops the last, with what is left of it."""
        self._advance()
        while self._lanes:
            yield self._lanes[0]
            lane = self._lanes.popleft()
            for future in lane.chunks:
                future.cancel()
                self._room += 1
            self._advance()

    def jpegs(self, lane: _Lane) -> Iterator[bytes]:
        """The patches of the first lane, in order; _BadSlideError where one cannot be made."""
        self._progress.planned(lane.job.slide, lane.plan.result().count)
        self._advance()
        while lane.chunks:
            future = lane.chunks.popleft()
            self._room += 1
            chunk = future.result()
            self._advance()
            yield from chunk
            self._progress.written(len(chunk))

    def _advance(self) -> None:
        while self._waiting and len(self._lanes) < self._ahead:
            job = self._waiting.popleft()
            picture = self._pictures / f"{job.slide}.png"
            self._lanes.append(_Lane(job, self._pool.submit(_guarded, job.plan, picture)))
        for lane in self._lanes:
            if not lane.plan.done():
                return
            if lane.plan.exception() is None and not self._fill(lane):
                return

    def _fill(self, lane: _Lane) -> bool:
        """Hand out the lane's chunks while there is room; whether all of them are out."""
        record = lane.plan.result()
        while lane.sent < record.count:
            if self._room == 0:
                return False
            start, lane.sent = lane.sent, min(lane.sent + self._chunk, record.count)
            part = replace(record, coords=record.places[start : lane.sent])
            lane.chunks.append(self._pool.submit(_guarded, lane.job.encode, part, start))
            self._room -= 1
        return True


def _guarded(work: Callable[..., T], *arguments: object) -> T:
    try:
        return work(*arguments)
    except OutputError:
        raise
    except (UserError, OSError) as error:
        raise _BadSlideError(str(error)) from error


class _InThisProcess(Executor):
    """An executor that works at once, in the caller's process."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except _BadSlideError as error:
            future.set_exception(error)
        return future


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    if workers == 0:
        yield _InThisProcess()
        return
    # Spawned, not forked: LMDB and OpenSlide must not be carried over a fork.
    context = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    except OSError as error:
        raise no_processes(error) from error
    try:
        with interrupts_held():
            # Ctrl-C is the parent's business. A task for each worker makes all of them start here.
            for _ in range(workers):
                pool.submit(os.getpid)
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def no_processes(error: Exception) -> UserError:
    """What to do where processes that work together cannot be started."""
    return UserError(
        f"no worker processes can be started here: {error}\n"
        "  they need a little of /dev/shm: free some (docker run --shm-size=1g), or pack with --workers 0"
    )


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end of the block; processes started inside never get it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_parent() -> None:
    """End when the parent is killed: waiting for work, a worker would never hear of it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _csv(columns: list[str], rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**asdict(row), "reason": " ".join(row.reason.split())})
    return text.getvalue().encode()
