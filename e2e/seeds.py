"""Seeds and counter-based random numbers: pure functions of what they are drawn for."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def mix_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order.

    Parameters
    ----------
    *parts : int or str
        What the random numbers are for, for example the seed of the run, the epoch and a slide id.

    Returns
    -------
    int
        From 0 to 2**63 - 1; the BLAKE2b hash of the parts.
    """
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seeds: NDArray[np.uint64], draw: int) -> NDArray[np.float64]:
    """Return one uniform number in [0, 1) for each seed, from a counter-based generator (SplitMix64).

    The number of a seed does not depend on the other seeds, so patches can be cut into chunks in any way.

    Parameters
    ----------
    seeds : (n,) uint64 array
    draw : int
        Which random number of each seed, from 0.

    Returns
    -------
    (n,) float64 array

    References
    ----------
    Steele, Lea, Flood. Fast splittable pseudorandom number generators. OOPSLA 2014.
    """
    with np.errstate(over="ignore"):
        z = seeds + np.uint64((draw + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def patch_seeds(bag_seed: int, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a seed for each patch of a bag.

    Parameters
    ----------
    bag_seed : int
        Seed of the bag, at least 0.
    indices : (n,) int64 array
        Patch numbers within the slide.

    Returns
    -------
    (n,) uint64 array
        The seed of a patch depends on ``bag_seed`` and its own index only.
    """
    base = np.full(len(indices), bag_seed, np.uint64)
    with np.errstate(over="ignore"):
        spread = indices.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
    return (uniform(base ^ spread, 0) * 2.0**53).astype(np.uint64)
