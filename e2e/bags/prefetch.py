"""Pixels ahead of the engine: the next chunks are made in the background while one is computed.

Two threads make chunks (read, decode, augment), and the decoder spreads each over threads of its own:
JPEG decoding lets go of the interpreter, so no process has to be started, nothing is pickled, and
nothing passes through shared memory. On a GPU it is one thread, with a stream of its own.

Memory of a process: the pixels of :data:`AHEAD` chunks besides the one that is computed, and what a
pixel source keeps for a second pass.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from e2e.bags.bag import Bag, Chunk, PixelSource
from e2e.images.decode import CALLS, threads

AHEAD = 2
"""Chunks that are made before they are asked for: one is ready while another is in work."""

T = TypeVar("T")
Span = tuple[int, int]


class WaitTime:
    """Seconds that the computation stood still for pixels."""

    def __init__(self) -> None:
        self.seconds = 0.0


class PrefetchedPixels:
    """A pixel source over another one that knows which chunk comes next.

    The engine asks for the chunks of a bag first to last, then for those that it encodes twice last
    to first; after that comes the next bag (``then``). Whatever is asked for out of this order is
    made on the spot.
    """

    def __init__(
        self, source: PixelSource, chunks: Sequence[Chunk], device: torch.device, waiting: WaitTime
    ) -> None:
        self._source, self._device, self._waiting = source, device, waiting
        self._first: list[Span] = [(chunk.start, chunk.stop) for chunk in chunks]
        self._second: list[Span] = []
        self._made: dict[Span, Future[_Made]] = {}
        self._lock = threading.Lock()  # a backward on a GPU asks from a thread of its own
        self.then: Callable[[int], None] | None = None

    def start(self, most: int = AHEAD) -> None:
        """Begin with the first chunks."""
        with self._lock:
            self._begin(self._first[:most])

    def __call__(
        self, start: int, stop: int, device: torch.device, *, again: bool = False
    ) -> Tensor:
        """See :class:`PixelSource`; waits for what is not ready yet."""
        span = (start, stop)
        if device != self._device or span not in (*self._first, *self._second):
            return self._source(start, stop, device, again=again)
        began = time.perf_counter()
        with self._lock:
            self._begin([span])
            future = self._made.pop(span)
            coming = self._after(span, again=again)
            self._begin([other for other in coming[:AHEAD] if other in self._first])
        if len(coming) < AHEAD and self.then is not None:
            self.then(AHEAD - len(coming))
        pixels = future.result().here()
        with self._lock:
            # Not before: a second pass that begins with the first unfinished finds nothing kept.
            self._begin(coming[:AHEAD])
        if not again and hasattr(self._source, "forget"):
            self._source.forget(start, stop)  # pyright: ignore[reportAttributeAccessIssue]
        self._waiting.seconds += time.perf_counter() - began
        return pixels

    def _after(self, span: Span, *, again: bool) -> list[Span]:
        """What follows ``span``; notes whether it will come a second time."""
        if span in self._first:
            position = self._first.index(span)
            following = self._first[position + 1 :]
            self._first = following
            if again:
                self._second.append(span)
        else:
            self._second.remove(span)
            following = []
        return [*following, *reversed(self._second)]

    def _begin(self, spans: Iterable[Span]) -> None:
        for span in spans:
            if span not in self._made:
                makers = _makers(self._device.type)
                self._made[span] = makers.submit(_make, self._source, span, self._device)


def prefetch(
    bags: Iterable[tuple[Bag, T]], device: torch.device, waiting: WaitTime | None = None
) -> Iterator[tuple[Bag, T]]:
    """The same bags, whose pixels come from the background; each begins before the last is done."""
    waiting = waiting or WaitTime()
    before: tuple[tuple[Bag, T], PrefetchedPixels] | None = None
    for bag, more in bags:
        source = PrefetchedPixels(bag.pixels, bag.chunks, device, waiting)
        if before is None:
            source.start()
        else:
            before[1].then = source.start
            yield before[0]
        before = (replace(bag, pixels=source), more), source
    if before is not None:
        yield before[0]


class _Made(NamedTuple):
    pixels: Tensor
    ready: torch.cuda.Event | None

    def here(self) -> Tensor:
        """The pixels, for the stream of the one who asks."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.pixels.device)
            stream.wait_event(self.ready)
            self.pixels.record_stream(stream)  # else their memory is given away while it is read
        return self.pixels


def _make(source: PixelSource, span: Span, device: torch.device) -> _Made:
    if device.type != "cuda":
        return _Made(source(*span, device, again=True), None)
    with torch.cuda.device(device), torch.cuda.stream(_side_stream(device)):
        pixels = source(*span, device, again=True)
        ready = torch.cuda.Event()
        ready.record()
    return _Made(pixels, ready)


@cache
def _makers(device: str) -> ThreadPoolExecutor:
    # One on a GPU: they share a stream, and memory that one has given back while its kernels wait in the
    # queue would be decoded into by the other, for whom nvJPEG does not wait.
    count = 1 if device == "cuda" else min(CALLS, threads())
    return ThreadPoolExecutor(count, thread_name_prefix="pixels")


# A forked process has the pool but none of its threads, and would wait for them for ever.
os.register_at_fork(after_in_child=_makers.cache_clear)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all makers: what one keeps for a second pass, the other may take up."""
    return torch.cuda.Stream(device)
