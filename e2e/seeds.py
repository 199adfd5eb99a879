"""Seeds and counter-based random numbers: pure functions of what they are drawn for."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def mix_seed(*parts: int | str) -> int:
    """A 63-bit number from numbers and names; the seed of everything that is drawn."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seeds: NDArray[np.uint64], draw: int) -> NDArray[np.float64]:
    """One number in [0, 1) for each seed, from a counter-based generator (SplitMix64).

    Vectorised over patches, and free of how the patches are cut into chunks.
    """
    with np.errstate(over="ignore"):
        z = seeds + np.uint64((draw + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def patch_seeds(bag_seed: int, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A seed for each patch of a bag: (n,) uint64, by patch index within the slide."""
    base = np.full(len(indices), bag_seed, np.uint64)
    with np.errstate(over="ignore"):
        spread = indices.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
    return (uniform(base ^ spread, 0) * 2.0**53).astype(np.uint64)
