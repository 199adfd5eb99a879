"""The bags of training updates and of evaluation, from labelled slides and a bag specification."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise, zip_longest
from typing import Generic, NamedTuple

import numpy as np
import torch
from torch import Tensor

from e2e.bags.bag import Bag, Chunk
from e2e.bags.chunk_plan import (
    BagSlice,
    PlannedChunk,
    assign_to_ranks,
    bag_range,
    cut_update,
    single_chunk,
)
from e2e.bags.epoch_plan import plan_epoch, repeat_counts
from e2e.bags.readers import R, SlideRows, cut_rows, share_crops
from e2e.bags.spec import BagSpec, LabelledSlide, slide_key
from e2e.errors import UserError
from e2e.seeds import mix_seed
from e2e.slides import Slide
from e2e.store.records import SlideReader


class _BagPart(NamedTuple):
    """Patches ``start`` to ``stop`` of a bag of the update, as a bag of a rank's batch."""

    bag: int
    start: int
    stop: int
    weight: float
    shards: tuple[int, ...] = ()


def make_bag(
    items: Sequence[LabelledSlide[R]],
    spec: BagSpec[R],
    chunks_of_ranks: Sequence[Sequence[PlannedChunk]],
    *,
    repeats: Sequence[int] | None = None,
    rank: int = 0,
    epoch: int = 0,
) -> Bag:
    """Return what a rank has of an update.

    Parameters
    ----------
    items : sequence of LabelledSlide
        The slides of the update, over all ranks.
    spec : BagSpec
        Which patches make up a bag.
    chunks_of_ranks : sequence of sequences of PlannedChunk
        The chunks of each rank, see :func:`e2e.bags.chunk_plan.assign_to_ranks`.
    repeats : sequence of int, optional
        How often the epoch drew each slide before; None for never.
    rank, epoch : int
        This rank; number of the epoch, from 0.
    """
    planned, counts = chunks_of_ranks[rank], True
    parts = _bag_parts(chunks_of_ranks, rank)
    if not planned:
        # A rank without patches encodes a chunk that counts nothing, to take part in collectives.
        planned, counts = [next(chain.from_iterable(chunks_of_ranks))], False
        parts += [_BagPart(*bag_slice, weight=0.0) for bag_slice in planned[0].slices]
    repeats = repeats or [0] * len(items)
    keys = [slide_key(item.slide.id, n) for item, n in zip(items, repeats, strict=True)]
    drawn = {p.bag: spec.rows(items[p.bag], epoch, repeats[p.bag]) for p in parts}
    rows = [row for p in parts for row in cut_rows(drawn[p.bag][0], p.start, p.stop)]
    if spec.shared_crops:
        rows = share_crops(rows, spec.shared_crops, mix_seed(spec.seed, epoch, keys[0], "crop"))
    chunk_ends = np.cumsum([0] + [chunk.num_patches for chunk in planned]).tolist()
    return Bag(
        offsets=tuple(np.cumsum([0] + [p.stop - p.start for p in parts]).tolist()),
        chunks=tuple(
            Chunk(start, stop, _chunk_seed(spec.seed, epoch, keys, chunk), counts)
            for (start, stop), chunk in zip(pairwise(chunk_ends), planned, strict=True)
        ),
        # The head sees all patches of a sharded bag.
        coords=tuple(
            coords if p.shards or coords is None else coords[p.start : p.stop]
            for p, (_, coords) in ((p, drawn[p.bag]) for p in parts)
        ),
        pixels=spec.reader.source(rows),
        target=torch.stack([items[p.bag].target for p in parts]),
        slides=tuple(items[p.bag].slide.id for p in parts),
        seeds=tuple(mix_seed(spec.seed, epoch, keys[p.bag], "head") for p in parts),
        weight=torch.tensor([p.weight for p in parts]),
        shards=tuple(p.shards for p in parts),
        sides=tuple(_common_side(drawn[p.bag][0]) for p in parts),
    )


def _common_side(rows: Sequence[SlideRows[R]]) -> float:
    """Return the side of a bag's patches in level-0 pixels; NaN if it is unknown or they differ."""
    sides = {part.level0_px for part in rows}
    return (sides.pop() if len(sides) == 1 else 0.0) or math.nan


def _bag_parts(chunks_of_ranks: Sequence[Sequence[PlannedChunk]], rank: int) -> list[_BagPart]:
    """The bags whose head runs on ``rank``: those that lie there, and all that are sharded."""
    ranges = [
        {part.bag: bag_range(chunks, part.bag) for chunk in chunks for part in chunk.slices}
        for chunks in chunks_of_ranks
    ]
    parts = []
    for bag in sorted(set().union(*ranges)):
        num_ranks = sum(bag in ranges_of_rank for ranges_of_rank in ranges)
        start, stop = ranges[rank].get(bag, (0, 0))
        if num_ranks > 1:
            spans = [ranges_of_rank.get(bag, (0, 0)) for ranges_of_rank in ranges]
            shards = tuple(high - low for low, high in spans)
            parts.append(_BagPart(bag, start, stop, 1 / len(ranges), shards))
        elif bag in ranges[rank]:
            parts.append(_BagPart(bag, start, stop, 1.0))
    return parts


def _chunk_seed(seed: int, epoch: int, keys: Sequence[str], chunk: PlannedChunk) -> int:
    return mix_seed(seed, epoch, keys[chunk.slices[0].bag], "chunk", chunk.number)


def full_bag(item: LabelledSlide[R], spec: BagSpec[R], chunk: int) -> Bag:
    """Return the bag of one slide, for evaluation.

    Parameters
    ----------
    item : LabelledSlide
        The slide.
    spec : BagSpec
        Which patches make up the bag. Its cache is used if it has one.
    chunk : int
        Most patches of a chunk.
    """
    bag = make_bag([item], spec, assign_to_ranks(cut_update([spec.num_patches(item)], chunk), 1))
    if spec.cache is None:
        return bag
    return replace(bag, pixels=spec.cache.over(bag.pixels, item.slide.id))


@dataclass(frozen=True)
class TrainingLoader(Generic[R]):
    """The bags of training epochs for one rank."""

    items: Sequence[LabelledSlide[R]]
    """The training slides."""
    spec: BagSpec[R]
    """Which patches make up a bag."""
    bags: int
    """Slides of an update, over all ranks."""
    chunk: int
    """Most patches encoded at once."""
    shard_over: int | None = None
    """Bags with more patches than this are sharded over the ranks; None shards no bag."""
    fixed_size_chunks: bool = False
    """Whether all chunks of a large bag but its last have exactly ``chunk`` patches."""
    single_chunk_per_rank: bool = False
    """Whether a rank's patches must be a single chunk, for statistics over the whole batch."""
    groups: Sequence[int] | None = None
    """Group of each slide; groups are drawn equally often. None draws each slide once."""
    single_chunk_per_bag: bool = False
    """Whether each bag is one chunk, however large. Without ``groups``, bags of similar size then share an
    update. For features, where the head pads the bags of an update to one size."""

    def updates(self) -> int:
        """Return the number of updates in an epoch."""
        return -(-len(self.items) // self.bags)

    def check(self, world_size: int, epochs: int) -> None:
        """Check that bags can be drawn before training starts.

        Parameters
        ----------
        world_size : int
            Number of ranks.
        epochs : int
            Epochs of the training.

        Raises
        ------
        UserError
            If the sampler needs coordinates that are unknown, or if a rank's patches in some update must
            be a single chunk and are more than ``chunk``.
        """
        if self.spec.sampler.uses_coords:
            for item in self.items:
                self.spec.check_coords(item)
        for epoch in range(epochs if self.single_chunk_per_rank else 0):
            for update in self._plan(epoch):
                self._chunks_of_ranks([self._sizes[i] for i in update], world_size)

    def epoch(
        self, epoch: int, *, rank: int, world_size: int, first: int = 0
    ) -> Iterator[tuple[Bag, int]]:
        """Yield a rank's bags of an epoch.

        Parameters
        ----------
        epoch : int
            Number of the epoch, from 0.
        rank, world_size : int
            This rank; number of ranks.
        first : int
            First update to yield.

        Yields
        ------
        bag : Bag
            This rank's bag of the update.
        num_slides : int
            Slides of the update, over all ranks.
        """
        plan = self._plan(epoch)
        for update, repeats in list(zip(plan, repeat_counts(plan), strict=True))[first:]:
            items = [self.items[i] for i in update]
            chunks = self._chunks_of_ranks([self._sizes[i] for i in update], world_size)
            bag = make_bag(items, self.spec, chunks, repeats=repeats, rank=rank, epoch=epoch)
            yield bag, len(update)

    def _plan(self, epoch: int) -> list[list[int]]:
        by_size = self.single_chunk_per_bag and self.groups is None
        return plan_epoch(
            len(self.items),
            self.bags,
            seed=self.spec.seed,
            epoch=epoch,
            groups=self.groups,
            sizes=self._sizes if by_size else None,
        )

    @cached_property
    def _sizes(self) -> list[int]:
        """Patches in the bag of each slide."""
        return [self.spec.num_patches(item) for item in self.items]

    def _chunks_of_ranks(self, sizes: Sequence[int], world_size: int) -> list[list[PlannedChunk]]:
        """The chunks of each rank in an update of bags of these sizes."""
        if not (self.single_chunk_per_bag or self.single_chunk_per_rank):
            groups = cut_update(sizes, self.chunk, fixed_size=self.fixed_size_chunks)
            return assign_to_ranks(groups, world_size, shard_over=self.shard_over)
        bags = [[PlannedChunk(0, (BagSlice(bag, 0, size),))] for bag, size in enumerate(sizes)]
        chunks_of_ranks = assign_to_ranks(bags, world_size)
        if self.single_chunk_per_bag:
            return chunks_of_ranks
        merged = [single_chunk(chunks) for chunks in chunks_of_ranks]
        largest = max(chunk.num_patches for chunks in merged for chunk in chunks)
        if largest > self.chunk:
            raise UserError(
                f"engine.batch_norm=sync needs all patches of a rank in one chunk, but an update has "
                f"{largest} patches on a rank and engine.chunk is {self.chunk}\n"
                "  raise engine.chunk, lower bag.patches or optim.bags, or set engine.batch_norm=chunk or "
                "frozen"
            )
        return merged


def subset_slides(
    items: Sequence[LabelledSlide[R]],
    max_slides: int | None,
    *,
    group: Callable[[Tensor], int],
    seed: int,
) -> list[LabelledSlide[R]]:
    """Return a random subset of slides with the groups as balanced as possible.

    Parameters
    ----------
    items : sequence of LabelledSlide
        Slides, in any order.
    max_slides : int, optional
        Most slides to return; None returns all.
    group : callable
        Gives the group of a target, for example its class.
    seed : int
        The same seed gives the same subset.

    Returns
    -------
    list of LabelledSlide
        Sorted by slide id.
    """
    shuffled = sorted(items, key=lambda item: mix_seed(seed, item.slide.id, "some"))
    groups: dict[int, list[LabelledSlide[R]]] = {}
    for item in shuffled:
        groups.setdefault(group(item.target), []).append(item)
    interleaved = chain.from_iterable(zip_longest(*(groups[key] for key in sorted(groups))))
    subset = [item for item in interleaved if item is not None][:max_slides]
    return sorted(subset, key=lambda item: item.slide.id)


def label_slides(
    slides: Sequence[Slide],
    readers: Mapping[str, Sequence[SlideReader]],
    encode: Callable[[Mapping[str, str]], Tensor],
) -> list[LabelledSlide]:
    """Combine slides with their readers and encoded targets.

    Parameters
    ----------
    slides : sequence of Slide
        Rows of the label table.
    readers : mapping of str to sequence of SlideReader
        By slide id, the readers of its scales, the main one first.
    encode : callable
        Gives the target of the values in a slide's label columns, see ``Task.encode``.

    Returns
    -------
    list of LabelledSlide
        Sorted by slide id, so that every run has the same order.
    """
    return [
        LabelledSlide(slide, reader, encode(slide.target), tuple(other_scales))
        for slide in sorted(slides, key=lambda slide: slide.id)
        for reader, *other_scales in [readers[slide.id]]
    ]
