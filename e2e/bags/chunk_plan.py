"""Which rank encodes which patches of an update, and in which chunks: pure functions of the bags' sizes.

Every rank knows the sizes of all bags, so every rank makes the same plan and takes its own chunks. Bags
are cut into chunks first and the chunks are assigned to ranks afterwards. A chunk is therefore the same
on any number of ranks, with the same random draws and, under per-chunk BatchNorm, the same statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple


class BagSlice(NamedTuple):
    """Patches ``start`` to ``stop`` of one bag of the update."""

    bag: int
    """Position of the bag in the update."""
    start: int
    stop: int


class PlannedChunk(NamedTuple):
    """Patches that are encoded together."""

    number: int
    """Number within its group. Together with the bag of the first slice it identifies the chunk."""
    slices: tuple[BagSlice, ...]
    """The patches, in order."""

    @property
    def num_patches(self) -> int:
        """Patches in all slices."""
        return sum(part.stop - part.start for part in self.slices)


ChunkGroup = list[PlannedChunk]
"""All chunks of one large bag, or the only chunk of several small bags."""


def group_bags(sizes: Sequence[int], max_patches: int) -> list[list[int]]:
    """Group neighbouring bags that have at most ``max_patches`` patches together.

    The bags of a group are encoded together and share BatchNorm statistics in training.

    Parameters
    ----------
    sizes : sequence of int
        Patches of each bag.
    max_patches : int
        Most patches of a group. A bag with more is a group by itself.

    Returns
    -------
    list of lists of int
        Positions of the bags, in order.
    """
    groups: list[list[int]] = []
    room = 0
    for position, size in enumerate(sizes):
        if size > room:
            groups.append([])
            room = max_patches
        groups[-1].append(position)
        room -= size
    return groups


def balanced_cuts(num_patches: int, chunk: int) -> list[tuple[int, int]]:
    """Cut a bag into as few chunks of at most ``chunk`` patches as possible, of nearly equal size.

    Sizes differ by at most 1: a short last chunk would have other BatchNorm statistics than the rest.

    Returns
    -------
    list of (start, stop)
    """
    count = -(-num_patches // chunk)
    return list(pairwise(num_patches * k // count for k in range(count + 1)))


def fixed_cuts(num_patches: int, chunk: int) -> list[tuple[int, int]]:
    """Cut a bag into chunks of exactly ``chunk`` patches and a last one with the rest.

    For compiled encoders, which run fastest on one shape.

    Returns
    -------
    list of (start, stop)
    """
    return list(pairwise([*range(0, num_patches, chunk), num_patches]))


def cut_update(sizes: Sequence[int], chunk: int, *, fixed_size: bool = False) -> list[ChunkGroup]:
    """Cut the bags of an update into chunks.

    Parameters
    ----------
    sizes : sequence of int
        Patches of each bag.
    chunk : int
        Most patches of a chunk.
    fixed_size : bool
        Cut a large bag by :func:`fixed_cuts` instead of :func:`balanced_cuts`.

    Returns
    -------
    list of ChunkGroup
        In the order of the bags.
    """
    cut = fixed_cuts if fixed_size else balanced_cuts
    groups: list[ChunkGroup] = []
    for bags in group_bags(sizes, chunk):
        if len(bags) > 1 or sizes[bags[0]] <= chunk:
            groups.append([PlannedChunk(0, tuple(BagSlice(bag, 0, sizes[bag]) for bag in bags))])
        else:
            cuts = cut(sizes[bags[0]], chunk)
            groups.append(
                [
                    PlannedChunk(number, (BagSlice(bags[0], start, stop),))
                    for number, (start, stop) in enumerate(cuts)
                ]
            )
    return groups


def assign_to_ranks(
    groups: Sequence[ChunkGroup], world_size: int, *, shard_over: int | None = None
) -> list[list[PlannedChunk]]:
    """Assign the chunks of an update to ranks, balanced by the number of patches.

    A group goes to one rank: the largest first, each to the rank with the fewest patches so far. Then
    every bag of more than ``shard_over`` patches is sharded: each rank gets a contiguous run of its
    chunks, so long that all ranks end with as equal a number of patches as possible.

    Parameters
    ----------
    groups : sequence of ChunkGroup
        See :func:`cut_update`.
    world_size : int
        Number of ranks.
    shard_over : int, optional
        Bags with more patches than this are sharded. None shards no bag.

    Returns
    -------
    list of lists of PlannedChunk
        The chunks of each rank, in the order of the update.
    """
    sizes = [sum(chunk.num_patches for chunk in group) for group in groups]
    sharded = [
        k
        for k, group in enumerate(groups)
        if shard_over is not None and len(group) > 1 and sizes[k] > shard_over and world_size > 1
    ]
    loads = [0] * world_size
    assigned: list[list[tuple[int, PlannedChunk]]] = [[] for _ in range(world_size)]
    for k in sorted(set(range(len(groups))) - set(sharded), key=lambda k: (-sizes[k], k)):
        rank = loads.index(min(loads))
        loads[rank] += sizes[k]
        assigned[rank] += [(k, chunk) for chunk in groups[k]]
    for k in sharded:
        for chunk, rank in zip(groups[k], _ranks_of_chunks(groups[k], loads), strict=True):
            loads[rank] += chunk.num_patches
            assigned[rank].append((k, chunk))
    return [[chunk for _, chunk in sorted(chunks)] for chunks in assigned]


def _ranks_of_chunks(group: ChunkGroup, loads: Sequence[int]) -> list[int]:
    """The rank of each chunk of a sharded bag, given the patches that each rank has already."""
    counts = [chunk.num_patches for chunk in group]
    ends = list(accumulate(_levelling_amounts(loads, sum(counts))))
    ranks, patches_before = [], 0.0
    for count in counts:
        middle = patches_before + count / 2
        ranks.append(next((r for r, end in enumerate(ends) if middle < end), len(ends) - 1))
        patches_before += count
    return ranks


def _levelling_amounts(loads: Sequence[int], amount: float) -> list[float]:
    """How much of ``amount`` each rank takes so that the loads become as equal as possible."""
    level = 0.0
    for count in range(1, len(loads) + 1):
        lowest = sorted(loads)[:count]
        level = (sum(lowest) + amount) / count
        if count == len(loads) or level <= sorted(loads)[count]:
            break
    return [max(0.0, level - load) for load in loads]


def single_chunk(chunks: Sequence[PlannedChunk]) -> list[PlannedChunk]:
    """Merge the chunks of a rank into one; an empty list stays empty."""
    slices = tuple(part for chunk in chunks for part in chunk.slices)
    return [PlannedChunk(0, slices)] if slices else []


def bag_range(chunks: Sequence[PlannedChunk], bag: int) -> tuple[int, int]:
    """Return the range of patches of a bag in a rank's chunks.

    Parameters
    ----------
    chunks : sequence of PlannedChunk
        The chunks of one rank.
    bag : int
        Position of the bag in the update.

    Returns
    -------
    (start, stop) : tuple of int
        (0, 0) if the rank has no patch of the bag.
    """
    slices = [part for chunk in chunks for part in chunk.slices if part.bag == bag]
    return (slices[0].start, slices[-1].stop) if slices else (0, 0)
