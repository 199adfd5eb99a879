"""Which rank encodes which patches of an update, and in which chunks: pure functions of the bags' sizes.

Every rank knows the sizes of all bags, so every rank makes the whole plan and takes its share.
Cutting into chunks comes first and sharing out after it: a chunk is the same on any number of ranks,
with the same random draws and, under per-chunk BatchNorm, the same statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple


class Piece(NamedTuple):
    """Patches ``start`` to ``stop`` of one bag of the update."""

    bag: int
    start: int
    stop: int


class PlannedChunk(NamedTuple):
    """Patches that are encoded together."""

    number: int
    """Within its group; with the first piece's bag it names the chunk."""
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """Patches in all pieces."""
        return sum(piece.stop - piece.start for piece in self.pieces)


Group = list[PlannedChunk]
"""The chunks of one large bag, or one chunk of several small ones."""


def group_bags(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Positions of neighbouring bags that have at most ``most`` patches together.

    They are encoded together and share BatchNorm statistics in training. A bag over ``most`` is a
    group of its own.
    """
    groups: list[list[int]] = []
    room = 0
    for position, size in enumerate(sizes):
        if size > room:
            groups.append([])
            room = most
        groups[-1].append(position)
        room -= size
    return groups


def balanced_cuts(rows: int, chunk: int) -> list[tuple[int, int]]:
    """The fewest pieces of at most ``chunk``, sizes differing by at most 1.

    A short last piece would be a chunk with other BatchNorm statistics than the rest.
    """
    count = -(-rows // chunk)
    return list(pairwise(rows * k // count for k in range(count + 1)))


def full_cuts(rows: int, chunk: int) -> list[tuple[int, int]]:
    """Pieces of exactly ``chunk`` and a last one of what is left: for one compiled shape."""
    return list(pairwise([*range(0, rows, chunk), rows]))


def cut_update(sizes: Sequence[int], chunk: int, *, full: bool = False) -> list[Group]:
    """The chunks of an update's bags, in the bags' order."""
    groups: list[Group] = []
    for group in group_bags(sizes, chunk):
        if len(group) > 1 or sizes[group[0]] <= chunk:
            pieces = tuple(Piece(bag, 0, sizes[bag]) for bag in group)
            groups.append([PlannedChunk(0, pieces)])
        else:
            cuts = (full_cuts if full else balanced_cuts)(sizes[group[0]], chunk)
            groups.append([PlannedChunk(k, (Piece(group[0], *cut),)) for k, cut in enumerate(cuts)])
    return groups


def share_update(
    groups: Sequence[Group], ranks: int, *, shard_over: int | None = None
) -> list[list[PlannedChunk]]:
    """The chunks of each rank, balanced by patch count, in the update's order.

    Groups go to ranks whole, the largest first, each to the rank with the least to do. A bag of
    more than ``shard_over`` patches (None: none) is spread over the ranks instead, in contiguous
    runs of chunks that level what the ranks have to do.
    """
    sizes = [sum(chunk.rows for chunk in group) for group in groups]
    spread = [
        k
        for k, group in enumerate(groups)
        if shard_over is not None and len(group) > 1 and sizes[k] > shard_over and ranks > 1
    ]
    loads = [0] * ranks
    owned: list[list[tuple[int, PlannedChunk]]] = [[] for _ in range(ranks)]
    for k in sorted(set(range(len(groups))) - set(spread), key=lambda k: (-sizes[k], k)):
        rank = loads.index(min(loads))
        loads[rank] += sizes[k]
        owned[rank] += [(k, chunk) for chunk in groups[k]]
    for k in spread:
        for chunk, rank in zip(groups[k], _spread(groups[k], loads), strict=True):
            loads[rank] += chunk.rows
            owned[rank].append((k, chunk))
    return [[chunk for _, chunk in sorted(share)] for share in owned]


def _spread(group: Group, loads: Sequence[int]) -> list[int]:
    """The rank of each chunk: contiguous runs that bring all ranks to one level."""
    rows = [chunk.rows for chunk in group]
    wants = _fill(loads, sum(rows))
    ends = list(accumulate(wants))
    ranks, done = [], 0.0
    for count in rows:
        middle = done + count / 2
        ranks.append(next((r for r, end in enumerate(ends) if middle < end), len(ends) - 1))
        done += count
    return ranks


def _fill(loads: Sequence[int], amount: float) -> list[float]:
    """How much each rank takes of ``amount`` for all to stand as level as they can."""
    level = 0.0
    for count in range(1, len(loads) + 1):
        lowest = sorted(loads)[:count]
        level = (sum(lowest) + amount) / count
        if count == len(loads) or level <= sorted(loads)[count]:
            break
    return [max(0.0, level - load) for load in loads]


def single_chunk(share: Sequence[PlannedChunk]) -> list[PlannedChunk]:
    """A rank's whole share as a single chunk."""
    pieces = tuple(piece for chunk in share for piece in chunk.pieces)
    return [PlannedChunk(0, pieces)] if pieces else []


def rows_of(share: Sequence[PlannedChunk], bag: int) -> tuple[int, int]:
    """First and last + 1 patch of ``bag`` in a rank's share; (0, 0) where it has none."""
    pieces = [piece for chunk in share for piece in chunk.pieces if piece.bag == bag]
    return (pieces[0].start, pieces[-1].stop) if pieces else (0, 0)
