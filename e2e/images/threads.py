"""The CPU threads that decode JPEGs: how many, and the pool that all decoders of a process share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

CONCURRENT_CALLS = 2
"""Decode calls for the CPU that run at once and share the threads: more threads than cores are slower. For
a GPU there is one at a time, see :mod:`e2e.bags.prefetch`."""


@contextmanager
def decoder_threads(count: int | None) -> Iterator[None]:
    """Set the number of CPU threads of two concurrent decode calls in the process, inside the block.

    Parameters
    ----------
    count : int, optional
        Threads, including those of the callers; with 1 no other thread is used. None takes this rank's
        share of the cores, at most 16.
    """
    if count is not None and count < 1:
        raise ValueError(f"a decoder needs at least 1 thread, got {count}")
    global _num_threads
    before, _num_threads = _num_threads, count
    decoder_pool.cache_clear()
    try:
        yield
    finally:
        _num_threads = before
        decoder_pool.cache_clear()


def num_threads() -> int:
    """Return the number of CPU threads of two concurrent decode calls; see :func:`decoder_threads`."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks on this machine, set by torchrun
    return _num_threads or max(1, min(16, len(os.sched_getaffinity(0)) // ranks))


_num_threads: int | None = None


@cache
def decoder_pool() -> ThreadPoolExecutor:
    """Return the threads that all decoders share. Decoding releases the interpreter lock."""
    return ThreadPoolExecutor(num_threads() - 1, thread_name_prefix="decode")


# A forked process has the pool but none of its threads, and would wait for them forever.
os.register_at_fork(after_in_child=decoder_pool.cache_clear)
