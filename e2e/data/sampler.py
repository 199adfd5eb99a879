"""Which slides, which patches, in which order: pure functions of (seed, epoch, slide).

No generator is kept anywhere, so any rank, any worker and any resumed run draws the same.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def mix(*parts: int | str) -> int:
    """A 63-bit number from numbers and names; the seed of everything that is drawn."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_patches(
    slide: str, num_patches: int, bag_size: int | None, *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Indices of the patches that stand for ``slide`` in this epoch, drawn without replacement.

    Args:
        slide: slide id.
        num_patches: patches in the store for this slide, >= 1.
        bag_size: most patches to draw; None for all.
        seed: of the run.
        epoch: 0-based.

    Returns:
        Sorted unique indices, min(bag_size, num_patches) of them. Sorted, because the store
        then reads its pages forwards.

    Raises:
        ValueError: the slide has no patches, or ``bag_size`` is below 1.
    """
    if num_patches < 1:
        raise ValueError(f"slide '{slide}' has no patches")
    if bag_size is not None and bag_size < 1:
        raise ValueError(f"bag_size must be at least 1, got {bag_size}")
    if bag_size is None or bag_size >= num_patches:
        return np.arange(num_patches)
    rng = np.random.default_rng(mix(seed, epoch, slide, "patches"))
    return np.sort(rng.choice(num_patches, bag_size, replace=False))


def plan_epoch(num_slides: int, bags: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The updates of one epoch: every slide once, in random order, ``bags`` slides an update.

    Returns:
        Lists of slide numbers; the last may be short. The same for every number of ranks.
    """
    order = np.random.default_rng(mix(seed, epoch, "slides")).permutation(num_slides).tolist()
    return [order[start : start + bags] for start in range(0, num_slides, bags)]


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
