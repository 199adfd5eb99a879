"""Prefetching: the same pixels, read before they are requested, never more chunks than stated."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2e.bags.bag import Bag, Chunk
from e2e.bags.prefetch import AHEAD, PrefetchedPixels, WaitTime, prefetch
from e2e.errors import DamagedDataError
from e2e.images.augment import Augment
from e2e.images.threads import decoder_threads
from tests.helpers.bags import bag_of, items  # noqa: F401  (a fixture)

CPU = torch.device("cpu")


class Source:
    """A pixel source that records its requests; row n is a patch of value n."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken
        self.requests: list[tuple[int, int]] = []
        self.to_reread: set[tuple[int, int]] = set()
        self.changed = threading.Condition()

    def __call__(self, start, stop, device, *, will_be_reread=False):
        with self.changed:
            self.requests.append((start, stop))
            if will_be_reread:
                self.to_reread.add((start, stop))
            self.changed.notify_all()
        if start == self.broken:
            raise DamagedDataError(f"patch {start} is broken")
        return torch.arange(start, stop).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)

    def forget(self, start, stop):
        self.to_reread.discard((start, stop))

    def wait_for(self, span):
        with self.changed:
            assert self.changed.wait_for(lambda: span in self.requests, timeout=60)


def bag(source, chunks: int, name: str = "s") -> Bag:
    spans = tuple(Chunk(2 * k, 2 * k + 2, k, True) for k in range(chunks))
    return Bag(
        offsets=(0, 2 * chunks),
        chunks=spans,
        coords=(torch.zeros(2 * chunks, 2, dtype=torch.int32),),
        pixels=source,
        target=torch.zeros(1),
        slides=(name,),
        seeds=(0,),
        weight=torch.ones(1),
        shards=((),),
    )


def step(bag: Bag, num_once: int) -> list[torch.Tensor]:
    """Request as the engine does: the last ``num_once`` chunks once, the others a second time backwards."""
    twice = bag.chunks[: len(bag.chunks) - num_once]
    chunk_pixels = [bag.pixels(c.start, c.stop, CPU, will_be_reread=c in twice) for c in bag.chunks]
    return chunk_pixels + [bag.pixels(c.start, c.stop, CPU) for c in reversed(twice)]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4))
def test_every_chunk_is_read_as_often_as_requested_with_the_pixels_of_the_source(plans):
    sources = [Source() for _ in plans]
    bags = [(bag(s, n), num_once) for s, (n, num_once) in zip(sources, plans, strict=True)]
    for one, num_once in prefetch(bags, CPU):
        num_once = min(num_once, len(one.chunks))
        answers = step(one, num_once)
        twice = one.chunks[: len(one.chunks) - num_once]
        requested = [*one.chunks, *reversed(twice)]
        for chunk, pixels in zip(requested, answers, strict=True):
            assert pixels[:, 0, 0, 0].tolist() == [*range(chunk.start, chunk.stop)]
    for source, (n, num_once) in zip(sources, plans, strict=True):
        assert len(source.requests) == n + n - min(num_once, n)
        assert source.to_reread == set()  # nothing is kept longer than needed


@given(st.integers(1, 12), st.integers(0, 12))
def test_no_more_than_the_stated_chunks_are_read_ahead(chunks, num_once):
    first, second = Source(), Source()
    requested = 0
    for one, _ in prefetch([(bag(first, chunks), 0), (bag(second, 3), 0)], CPU):
        twice = one.chunks[: max(0, len(one.chunks) - num_once)]
        passes = [(c, c in twice) for c in one.chunks] + [(c, False) for c in reversed(twice)]
        for chunk, will_be_reread in passes:
            one.pixels(chunk.start, chunk.stop, CPU, will_be_reread=will_be_reread)
            requested += 1
            assert len(first.requests) + len(second.requests) <= requested + AHEAD


def test_the_second_pass_and_the_next_bag_are_read_ahead():
    first, second = Source(), Source()
    (one, _), (_, _) = prefetch([(bag(first, 4), 0), (bag(second, 1), 0)], CPU)
    for chunk in one.chunks:
        one.pixels(chunk.start, chunk.stop, CPU, will_be_reread=True)
    first.requests.remove((6, 8))
    first.wait_for((6, 8))  # the last chunk again: the backward will want it
    for chunk in reversed(one.chunks[1:]):
        one.pixels(chunk.start, chunk.stop, CPU)
    assert one.chunks[0][:2] == (0, 2)
    second.wait_for((0, 2))  # though a chunk of the first bag is yet to be asked for


def test_an_error_in_the_background_is_raised_by_the_request_for_that_chunk():
    (one, _), (two, _) = prefetch([(bag(Source(broken=2), 3), 0), (bag(Source(), 1), 0)], CPU)
    one.pixels(0, 2, CPU)
    with pytest.raises(DamagedDataError, match="patch 2 is broken"):
        one.pixels(2, 4, CPU)
    assert one.pixels(4, 6, CPU).shape == (2, 3, 1, 1)
    assert two.pixels(0, 2, CPU).shape == (2, 3, 1, 1)


def test_rows_that_are_not_a_chunk_are_read_when_requested():
    source = Source()
    pixels = PrefetchedPixels(source, bag(source, 3).chunks, CPU, WaitTime())
    assert pixels(1, 5, CPU)[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert source.requests == [(1, 5)]


def test_time_spent_waiting_is_counted():
    gate, waiting = threading.Event(), WaitTime()

    class Slow(Source):
        def __call__(self, start, stop, device, *, will_be_reread=False):
            assert gate.wait(60)
            return super().__call__(start, stop, device, will_be_reread=will_be_reread)

    ((one, _),) = prefetch([(bag(Slow(), 1), 0)], CPU, waiting)
    opener = threading.Timer(0.05, gate.set)
    opener.start()
    one.pixels(0, 2, CPU)
    assert waiting.seconds >= 0.04


@pytest.mark.parametrize("keep", ["jpeg", "uint8", "float", None])
def test_stored_pixels_are_the_same_ahead_of_time(items, keep):  # noqa: F811
    plain = bag_of(items[:3], augment=Augment(crop=0.3), keep=keep)
    expected = [plain.pixels(c.start, c.stop, CPU) for c in plain.chunks]
    ((streamed, _),) = prefetch([(replace(plain), 0)], CPU)
    answers = step(streamed, num_once=1)
    for pixels, chunk in zip(answers, [*expected, *reversed(expected[:-1])], strict=True):
        assert torch.equal(pixels, chunk)
    assert plain.pixels._cache == {}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_number_of_threads_changes_no_pixel_and_no_process_is_started(items, count):  # noqa: F811
    expected = bag_of(items, augment=Augment(crop=0.3))
    before, others = shared_memory(), children()
    with decoder_threads(count):
        ((streamed, _),) = prefetch([(bag_of(items, augment=Augment(crop=0.3)), 0)], CPU)
        for chunk in streamed.chunks:
            pixels = streamed.pixels(chunk.start, chunk.stop, CPU)
            assert torch.equal(pixels, expected.pixels(chunk.start, chunk.stop, CPU))
        assert children() <= others  # another test may have left one
        assert shared_memory() <= before


def shared_memory() -> set[str]:
    """Files of /dev/shm that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if "/dev/shm/" in line}


def children() -> set[str]:
    """Process ids of this process's children."""
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return {number for text in lists for number in text.split()}


def test_a_forked_process_prefetches_too(items):  # noqa: F811
    ((one, _),) = prefetch([(bag_of(items), 0)], CPU)
    one.pixels(one.chunks[0].start, one.chunks[0].stop, CPU)  # the threads are there now
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)  # threads that are not there would be waited for for ever
            ((two, _),) = prefetch([(bag_of(items), 0)], CPU)
            two.pixels(two.chunks[0].start, two.chunks[0].stop, CPU)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
