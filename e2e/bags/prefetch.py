"""Prefetching: the next chunks are read in the background while the engine encodes one.

Two threads read chunks (read, decode, augment), and the decoder spreads each chunk over threads of its
own. JPEG decoding releases the interpreter lock, so no process has to be started, nothing is pickled and
nothing goes through shared memory. On a GPU one thread reads chunks, on a stream of its own.

Memory of a process: the pixels of :data:`AHEAD` chunks besides the one that is encoded, and what a pixel
source keeps for a second pass.
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
from e2e.images.threads import CONCURRENT_CALLS, num_threads

AHEAD = 2
"""Chunks that are read before they are requested: one is ready while another is being read."""

T = TypeVar("T")
Span = tuple[int, int]


class WaitTime:
    """Counts the seconds that the engine waits for pixels.

    Attributes
    ----------
    seconds : float
    """

    def __init__(self) -> None:
        self.seconds = 0.0


class PrefetchedPixels(PixelSource):
    """A pixel source that reads the chunks of another one ahead of time.

    The engine requests the chunks of a bag first to last, then those of the second pass last to first;
    after that comes the next bag. Rows requested in another order are read when they are requested.

    Parameters
    ----------
    source : PixelSource
        Reads the rows.
    chunks : sequence of Chunk
        The chunks of the bag.
    device : torch.device
        Where pixels will be requested.
    wait_time : WaitTime
        Adds up the seconds that requests waited.

    Attributes
    ----------
    start_next : callable, optional
        Called with a number of chunks when the next bag can begin to read them.
    """

    def __init__(
        self,
        source: PixelSource,
        chunks: Sequence[Chunk],
        device: torch.device,
        wait_time: WaitTime,
    ) -> None:
        self._source, self._device, self._wait_time = source, device, wait_time
        self._first_pass: list[Span] = [(chunk.start, chunk.stop) for chunk in chunks]
        self._second_pass: list[Span] = []
        self._futures: dict[Span, Future[_ReadyPixels]] = {}
        self._lock = threading.Lock()  # a backward on a GPU requests from a thread of its own
        self.start_next: Callable[[int], None] | None = None

    def start(self, max_chunks: int = AHEAD) -> None:
        """Begin to read the first chunks."""
        with self._lock:
            self._submit(self._first_pass[:max_chunks])

    def __call__(
        self, start: int, stop: int, device: torch.device, *, will_be_reread: bool = False
    ) -> Tensor:
        """Return rows ``start`` to ``stop``, waiting for them if need be; see :class:`PixelSource`."""
        span = (start, stop)
        if device != self._device or span not in (*self._first_pass, *self._second_pass):
            return self._source(start, stop, device, will_be_reread=will_be_reread)
        began = time.perf_counter()
        with self._lock:
            self._submit([span])
            future = self._futures.pop(span)
            following = self._spans_after(span, will_be_reread=will_be_reread)
            self._submit([other for other in following[:AHEAD] if other in self._first_pass])
        if len(following) < AHEAD and self.start_next is not None:
            self.start_next(AHEAD - len(following))
        pixels = future.result().on_current_stream()
        with self._lock:
            # Not before: a second pass must find what the source keeps of this chunk.
            self._submit(following[:AHEAD])
        if not will_be_reread:
            self._source.forget(start, stop)
        self._wait_time.seconds += time.perf_counter() - began
        return pixels

    def forget(self, start: int, stop: int) -> None:
        """Free what the source keeps of rows ``start`` to ``stop``."""
        self._source.forget(start, stop)

    def _spans_after(self, span: Span, *, will_be_reread: bool) -> list[Span]:
        """The spans that follow ``span``, which is removed from its pass."""
        if span in self._first_pass:
            position = self._first_pass.index(span)
            self._first_pass = self._first_pass[position + 1 :]
            following = self._first_pass
            if will_be_reread:
                self._second_pass.append(span)
        else:
            self._second_pass.remove(span)
            following = []
        return [*following, *reversed(self._second_pass)]

    def _submit(self, spans: Iterable[Span]) -> None:
        for span in spans:
            if span not in self._futures:
                pool = _prefetch_pool(self._device.type)
                self._futures[span] = pool.submit(_read_span, self._source, span, self._device)


def prefetch(
    bags: Iterable[tuple[Bag, T]], device: torch.device, wait_time: WaitTime | None = None
) -> Iterator[tuple[Bag, T]]:
    """Yield bags whose pixels are read in the background, the first ones before the bag is used.

    Parameters
    ----------
    bags : iterable of (Bag, value)
        The values are passed on.
    device : torch.device
        Where pixels will be requested.
    wait_time : WaitTime, optional
        Adds up the seconds that requests waited.

    Yields
    ------
    (Bag, value)
    """
    wait_time = wait_time or WaitTime()
    previous: tuple[tuple[Bag, T], PrefetchedPixels] | None = None
    for bag, value in bags:
        source = PrefetchedPixels(bag.pixels, bag.chunks, device, wait_time)
        if previous is None:
            source.start()
        else:
            previous[1].start_next = source.start
            yield previous[0]
        previous = (replace(bag, pixels=source), value), source
    if previous is not None:
        yield previous[0]


class _ReadyPixels(NamedTuple):
    """Pixels from the background, and on a GPU the event after which they can be used."""

    pixels: Tensor
    event: torch.cuda.Event | None

    def on_current_stream(self) -> Tensor:
        """The pixels, for use on the current stream of the caller."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.pixels.device)
            stream.wait_event(self.event)
            # Else their memory would be reused while this stream still reads it.
            self.pixels.record_stream(stream)
        return self.pixels


def _read_span(source: PixelSource, span: Span, device: torch.device) -> _ReadyPixels:
    # Whether the span will be reread is not known yet; if it will not, ``forget`` follows.
    if device.type != "cuda":
        return _ReadyPixels(source(*span, device, will_be_reread=True), None)
    with torch.cuda.device(device), torch.cuda.stream(_prefetch_stream(device)):
        pixels = source(*span, device, will_be_reread=True)
        event = torch.cuda.Event()
        event.record()
    return _ReadyPixels(pixels, event)


@cache
def _prefetch_pool(device_type: str) -> ThreadPoolExecutor:
    # One thread on a GPU: two would share a stream, and memory that one has freed while its kernels wait in
    # the queue would be decoded into by the other, because nvJPEG does not wait for the stream.
    count = 1 if device_type == "cuda" else min(CONCURRENT_CALLS, num_threads())
    return ThreadPoolExecutor(count, thread_name_prefix="pixels")


# A forked process has the pool but none of its threads, and would wait for them forever.
os.register_at_fork(after_in_child=_prefetch_pool.cache_clear)


@cache
def _prefetch_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all bags: what is kept for a second pass is used on the stream it was made on."""
    return torch.cuda.Stream(device)
