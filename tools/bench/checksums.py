"""Cost of comparing each patch with its checksum at its first read, against decoding it.

    python -m tools.bench.checksums --store mine.lmdb --check

Reads and decodes the patches of a store as a run does, once with and once without `data.verify`, in turns,
and prints the median of the differences. With --check the exit code is 1 if it is over 3 % of decoding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from e2e.images.decode import build_decoder
from e2e.images.threads import decoder_threads
from e2e.store.lmdb import PatchStore

BAR = 0.03
"""Largest cost, as a fraction of the time of decoding."""
CHUNK = 128
"""Patches that are read and decoded together."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and compare with the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True, help="a patch store")
    parser.add_argument("--patches", type=int, default=4096, help="most patches (default: 4096)")
    parser.add_argument("--repeats", type=int, default=7, help="default: 7")
    parser.add_argument("--check", action="store_true", help=f"fail above {BAR:.0%}")
    args = parser.parse_args(argv)
    chunks = list_chunks(PatchStore(args.store), args.patches)
    with decoder_threads(1):
        seconds = [
            [read_and_decode(args.store, chunks, verify=verify) for verify in (False, True)]
            for _ in range(args.repeats)
        ]
    without = statistics.median(plain for plain, _ in seconds)
    added = statistics.median(verified - plain for plain, verified in seconds)
    num_patches = sum(len(indices) for _, indices in chunks)
    print(
        f"{num_patches} patches, one thread: {1e6 * without / num_patches:.1f} us a patch to decode, "
        f"{1e6 * added / num_patches:.2f} us more with checksums ({added / without:.2%})"
    )
    return int(args.check and added > BAR * without)


def list_chunks(store: PatchStore, most: int) -> list[tuple[str, range]]:
    """Return slides and patches to read, up to ``most`` patches."""
    chunks: list[tuple[str, range]] = []
    left = most
    for slide in store.slides:
        for start in range(0, store.num_patches(slide), CHUNK):
            indices = range(start, min(start + CHUNK, store.num_patches(slide), start + left))
            if indices:
                chunks.append((slide, indices))
            left -= len(indices)
    return chunks


def read_and_decode(path: Path, chunks: Sequence[tuple[str, range]], *, verify: bool) -> float:
    """Return the seconds; each call opens the store anew, so that every patch is read for the first time."""
    store, decoder = PatchStore(path, verify=verify), build_decoder()
    start = time.perf_counter()
    for slide, indices in chunks:
        store.borrow(slide, indices, decoder.decode)
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
