"""The patch stream of training: its stages, its memory, cold reads, and two cores.

:func:`stream_memory`, :func:`cold_read` and :func:`two_workers` are for processes of their own
(:func:`measure`).
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import statistics
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch

from e2e.bags.loader import full_bag
from e2e.bags.prefetch import AHEAD, prefetch
from e2e.bags.readers import PixelRowReader
from e2e.bags.spec import BagSpec
from e2e.errors import UserError
from e2e.images.augment import Augment
from e2e.images.decode import build_decoder
from e2e.store.lmdb import PatchStore
from tools.bench.patches import CPU, Bench, Pixels, Sizes, item_of
from tools.bench.pixels import simplejpeg_library, training_pixels
from tools.bench.process import (
    call_in_fresh_process,
    peak_above,
    process_memory,
    reset_peak_memory,
)
from tools.bench.timing import time_ways


class OtherPixelsError(UserError):
    """Two ways do not make the same pixels, so their speeds cannot be compared."""


def stages(bench: Bench, augment: Augment) -> dict[str, Callable[[], Iterable[object]]]:
    """Return reading, decoding and augmenting, each by itself chunk by chunk, and all as in training."""
    reader, store, chunk = bench.reader(augment), bench.store, bench.sizes.chunk
    rows = BagSpec(reader).rows(item_of(store, bench.slide), 0)[0][0]
    parts = [rows.part(start, start + chunk) for start in bench.starts()]
    jpegs = [store.read(part.slide, part.indices) for part in parts]
    decoded = [reader.decoder.decode(part, CPU) for part in jpegs]
    return {
        "read": lambda: (store.read(part.slide, part.indices) for part in parts),
        "decode": lambda: (reader.decoder.decode(part, CPU) for part in jpegs),
        "augment": lambda: (
            augment(pixels, part.seeds()) for pixels, part in zip(decoded, parts, strict=True)
        ),
        "all together": lambda: training_pixels(bench, reader),
    }


def difference(a: Pixels, b: Pixels) -> tuple[float, float]:
    """Return the largest and the mean absolute difference; OtherPixelsError where shapes differ."""
    most, total, count = 0.0, 0.0, 0
    for x, y in zip_longest(a, b, fillvalue=torch.empty(0)):
        if x.shape != y.shape:
            raise OtherPixelsError(f"chunks of {tuple(x.shape)} and {tuple(y.shape)}")
        gap = (x.float() - y.float()).abs()
        most, total, count = (
            max(most, float(gap.max())),
            total + float(gap.sum()),
            count + x.numel(),
        )
    return most, total / count


def require_same(what: str, a: Pixels, b: Pixels) -> None:
    """Raise OtherPixelsError unless all values are equal."""
    most, mean = difference(a, b)
    if most:
        raise OtherPixelsError(f"{what}: pixels differ by up to {most:g}, {mean:.3g} in the mean")


def measure(function: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """Return ``function(**arguments)`` as measured by a single-threaded process of its own."""
    return call_in_fresh_process(
        function, arguments, label=function.__name__, environment={"OMP_NUM_THREADS": "1"}
    )


def stream_memory(store: str, chunk: int, decoder: str, mode: str) -> dict[str, Any]:
    """Return the peak bytes above those held before, while the slide ``long`` is streamed.

    Parameters
    ----------
    mode
        ``evaluation``; ``training``: every chunk will be read again, and its JPEG bytes are kept;
        ``at once``: all JPEG bytes of the slide are read before the first is decoded.
    """
    opened = PatchStore(store)
    keep = "jpeg" if mode == "training" else None
    reader = PixelRowReader(build_decoder(decoder), augment=Augment(flip="none"), keep=keep)
    slide = item_of(opened, "long")
    side, count = opened.record("long").patch_px, opened.num_patches("long")
    warm = [(full_bag(item_of(opened, "c0"), BagSpec(reader), chunk), 0)]
    for bag, _ in prefetch(warm, CPU):
        bag.pixels(0, bag.chunks[0].stop, CPU)
    before = process_memory()
    reset_peak_memory()
    jpegs = opened.read("long", range(count)) if mode == "at once" else []
    for bag, _ in prefetch(
        [(full_bag(slide, BagSpec(reader), chunk), 0)] if not jpegs else [], CPU
    ):
        for one in bag.chunks:
            bag.pixels(one.start, one.stop, CPU, will_be_reread=mode == "training")
    peak = peak_above(before)
    each = statistics.mean(map(len, opened.read("long", range(min(count, 256)))))
    return {
        "peak": peak,
        "pixels": 3 * side * side * chunk,
        "jpeg_bytes": each,
        "patches": count,
        "ahead": AHEAD,
    }


def pages_in_memory(path: str) -> tuple[int, int]:
    """Return how many of a file's pages are in the page cache, by mincore, and how many there are."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        is_held = np.zeros(pages, np.uint8)
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        if libc.mincore(address, len(mapped), is_held.ctypes.data):
            raise OSError(ctypes.get_errno(), "mincore", path)
    return int((is_held & 1).sum()), pages


def evict(path: str) -> None:
    """Drop a file from the page cache; UserError where that fails."""
    held, pages = 1, 1
    for _ in range(20):  # a page in use at that moment stays
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        held, pages = pages_in_memory(path)
        if not held:
            return
    raise UserError(
        f"{held} of {pages} pages of {path} stay in memory, so no read of it is cold\n"
        "  another process has it open, or its file system is in memory (tmpfs): set TMPDIR"
    )


def cold_read(store: str, slide: str, count: int, number: int, way: str) -> dict[str, Any]:
    """Return the seconds to read a slide's patches when no page of the file is in memory.

    Parameters
    ----------
    number
        Number of the slide in the store.
    way
        ``store``; or ``single``: single gets in random order with readahead off.
    """
    evict(store)
    held, pages = pages_in_memory(store)
    if way == "store":
        opened = PatchStore(store)
        start = time.perf_counter()
        jpegs = opened.read(slide, range(count))
    else:
        order = np.random.default_rng(0).permutation(count).tolist()
        flags = {"readonly": True, "lock": False, "readahead": False, "meminit": False}
        with lmdb.open(store, subdir=False, **flags) as env, env.begin(buffers=True) as txn:
            start = time.perf_counter()
            get: Any = txn.get
            by_number = {k: bytes(get(b"p" + struct.pack(">II", number, k))) for k in order}
        jpegs = [by_number[k] for k in range(count)]
    seconds = time.perf_counter() - start
    after, _ = pages_in_memory(store)
    return {
        "seconds": seconds,
        "held_before": held,
        "held_after": after,
        "pages": pages,
        "digest": hash_of(jpegs),
    }


def hash_of(jpegs: Sequence[bytes]) -> str:
    """Return a digest, to check that two ways read the same."""
    return hashlib.blake2b(b"".join(jpegs), digest_size=8).hexdigest()


EPOCHS = 16
"""Epochs that two cores share; only at the end of the last may one wait for the other."""


def two_workers(
    store: str, slide: str, chunk: int, decoder: str, rounds: int, cores: list[int]
) -> dict[str, Any]:
    """Return wall seconds of each round: the training path on two cores, bare decode loops on one and two."""
    os.sched_setaffinity(0, cores)
    opened = PatchStore(store)
    sizes = Sizes(patches=opened.num_patches(slide), chunk=chunk, decoder=decoder)
    jpegs = opened.read(slide, range(sizes.patches))
    bench = Bench(Path(store).parent, jpegs, opened.record(slide).patch_px, sizes, cores)
    bench.store = opened
    jpegs *= EPOCHS
    half = len(jpegs) // 2
    halves = [jpegs[:half], jpegs[half:]]
    context = get_context("spawn")  # forked, it would inherit locks of torch's threads
    with context.Pool(2) as pool, ThreadPoolExecutor(2) as threads:
        job = partial(decode_all, bench.side, chunk)
        ways: dict[str, Callable[[], Iterable[object]]] = {
            "training": lambda: training_pixels(bench, bench.reader(), EPOCHS),
            "one": lambda: [job(jpegs)],
            "processes": lambda: pool.map(job, halves, chunksize=1),
            "threads": lambda: threads.map(job, halves),
        }
        times_of = time_ways(ways, rounds)
    return {name: times.wall for name, times in times_of.items()}


def decode_all(side: int, chunk: int, jpegs: Sequence[bytes]) -> int:
    """Decode like :func:`tools.bench.pixels.bare_loop` and return the number of patches."""
    decode_into = simplejpeg_library().decode_into
    pixels = np.empty((chunk, side, side, 3), np.uint8)
    for start in range(0, len(jpegs), chunk):
        for jpeg, row in zip(jpegs[start : start + chunk], pixels, strict=False):
            decode_into(jpeg, row)
    return len(jpegs)
