"""The stream: the same pixels, made before they are asked for, never more of them than is said."""

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
from e2e.images.decode import decoder_threads
from tests.helpers.bags import bag_of, items  # noqa: F401  (a fixture)

CPU = torch.device("cpu")


class Source:
    """A pixel source that remembers what it was asked for; row n is a patch of value n."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken
        self.made: list[tuple[int, int]] = []
        self.kept: set[tuple[int, int]] = set()
        self.changed = threading.Condition()

    def __call__(self, start, stop, device, *, again=False):
        with self.changed:
            self.made.append((start, stop))
            if again:
                self.kept.add((start, stop))
            self.changed.notify_all()
        if start == self.broken:
            raise DamagedDataError(f"patch {start} is broken")
        return torch.arange(start, stop).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)

    def forget(self, start, stop):
        self.kept.discard((start, stop))

    def wait_for(self, span):
        with self.changed:
            assert self.changed.wait_for(lambda: span in self.made, timeout=60)


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


def step(bag: Bag, kept: int) -> list[torch.Tensor]:
    """Ask as the engine does: the last ``kept`` chunks once, the others a second time backwards."""
    twice = bag.chunks[: len(bag.chunks) - kept]
    seen = [bag.pixels(c.start, c.stop, CPU, again=c in twice) for c in bag.chunks]
    return seen + [bag.pixels(c.start, c.stop, CPU) for c in reversed(twice)]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4))
def test_every_chunk_is_made_as_often_as_it_is_asked_for_and_is_the_sources_own(plans):
    sources = [Source() for _ in plans]
    bags = [(bag(s, n), kept) for s, (n, kept) in zip(sources, plans, strict=True)]
    for one, kept in prefetch(bags, CPU):
        kept = min(kept, len(one.chunks))
        seen = step(one, kept)
        twice = one.chunks[: len(one.chunks) - kept]
        asked = [*one.chunks, *reversed(twice)]
        for chunk, pixels in zip(asked, seen, strict=True):
            assert pixels[:, 0, 0, 0].tolist() == [*range(chunk.start, chunk.stop)]
    for source, (n, kept) in zip(sources, plans, strict=True):
        assert len(source.made) == n + n - min(kept, n)
        assert source.kept == set()  # nothing is held longer than it is wanted


@given(st.integers(1, 12), st.integers(0, 12))
def test_no_more_than_the_stated_chunks_are_made_before_they_are_asked_for(chunks, kept):
    first, second = Source(), Source()
    asked = 0
    for one, _ in prefetch([(bag(first, chunks), 0), (bag(second, 3), 0)], CPU):
        twice = one.chunks[: max(0, len(one.chunks) - kept)]
        passes = [(c, c in twice) for c in one.chunks] + [(c, False) for c in reversed(twice)]
        for chunk, again in passes:
            one.pixels(chunk.start, chunk.stop, CPU, again=again)
            asked += 1
            assert len(first.made) + len(second.made) <= asked + AHEAD


def test_the_second_pass_and_the_next_bag_begin_before_they_are_asked_for():
    first, second = Source(), Source()
    (one, _), (_, _) = prefetch([(bag(first, 4), 0), (bag(second, 1), 0)], CPU)
    for chunk in one.chunks:
        one.pixels(chunk.start, chunk.stop, CPU, again=True)
    first.made.remove((6, 8))
    first.wait_for((6, 8))  # the last chunk again: the backward will want it
    for chunk in reversed(one.chunks[1:]):
        one.pixels(chunk.start, chunk.stop, CPU)
    assert one.chunks[0][:2] == (0, 2)
    second.wait_for((0, 2))  # though a chunk of the first bag is yet to be asked for


def test_a_fault_in_the_background_is_raised_to_the_one_who_asks_for_that_chunk():
    (one, _), (two, _) = prefetch([(bag(Source(broken=2), 3), 0), (bag(Source(), 1), 0)], CPU)
    one.pixels(0, 2, CPU)
    with pytest.raises(DamagedDataError, match="patch 2 is broken"):
        one.pixels(2, 4, CPU)
    assert one.pixels(4, 6, CPU).shape == (2, 3, 1, 1)
    assert two.pixels(0, 2, CPU).shape == (2, 3, 1, 1)


def test_rows_that_are_no_chunk_are_made_on_the_spot():
    source = Source()
    pixels = PrefetchedPixels(source, bag(source, 3).chunks, CPU, WaitTime())
    assert pixels(1, 5, CPU)[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert source.made == [(1, 5)]


def test_time_spent_waiting_is_counted():
    gate, waiting = threading.Event(), WaitTime()

    class Slow(Source):
        def __call__(self, start, stop, device, *, again=False):
            assert gate.wait(60)
            return super().__call__(start, stop, device, again=again)

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
    seen = step(streamed, kept=1)
    for pixels, chunk in zip(seen, [*expected, *reversed(expected[:-1])], strict=True):
        assert torch.equal(pixels, chunk)
    assert plain.pixels._kept == {}


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


def test_a_forked_process_makes_pixels_too(items):  # noqa: F811
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
