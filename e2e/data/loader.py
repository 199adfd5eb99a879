"""From slides and stores to bags: which patches of which slides make an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from e2e.bag import Bag, Chunk
from e2e.data.cohort import Slide
from e2e.data.pixels import Look, PixelCache, Rows, StoredPixels, cut_rows
from e2e.data.plan import Piece, PlannedChunk, cut_update, in_one_piece, rows_of, share_update
from e2e.data.sampler import mix, plan_epoch, sample_patches
from e2e.data.store import PatchStore, SlideRecord
from e2e.errors import UserError


@dataclass(frozen=True)
class LabelledSlide:
    """A slide with its store and the number the task made of its label."""

    slide: Slide
    store: PatchStore
    target: Tensor

    @property
    def record(self) -> SlideRecord:
        """What the store knows of the slide."""
        return self.store.record(self.slide.id)


@dataclass(frozen=True)
class View:
    """Which patches stand for a slide, and what the encoder sees of them."""

    look: Look
    seed: int = 0
    bag_size: int | None = None
    """Random patches a slide; None: all."""
    cache: PixelCache | None = None
    """Of :func:`whole_bag`."""

    def count(self, item: LabelledSlide) -> int:
        """Patches that stand for the slide."""
        count = item.store.count(item.slide.id)
        return count if self.bag_size is None else min(count, self.bag_size)

    def rows(self, item: LabelledSlide, epoch: int) -> tuple[list[Rows], Tensor]:
        """The patches that stand for the slide in this epoch, and their (n,2) coords."""
        slide, store = item.slide.id, item.store
        record = store.record(slide)
        indices = sample_patches(slide, record.count, self.bag_size, seed=self.seed, epoch=epoch)
        rows = Rows(store, slide, indices, record.patch_px, mix(self.seed, epoch, slide))
        return [rows], torch.from_numpy(record.coords[indices])


class _Entry(NamedTuple):
    """Patches ``start`` to ``stop`` of a slide, as a bag of a rank's batch."""

    slide: int
    start: int
    stop: int
    weight: float
    shards: tuple[int, ...] = ()


def make_bag(
    items: Sequence[LabelledSlide],
    view: View,
    shares: Sequence[Sequence[PlannedChunk]],
    *,
    rank: int = 0,
    epoch: int = 0,
) -> Bag:
    """What ``rank`` has of an update of ``items``.

    Args:
        shares: the chunks of each rank, as :func:`e2e.data.plan.share_update` gives them.
    """
    chunks, counts = shares[rank], True
    entries = _entries(shares, rank)
    if not chunks:
        # A rank without patches encodes a chunk that counts nothing: it takes part in collectives.
        chunks, counts = [next(chunk for share in shares for chunk in share)], False
        entries += [_Entry(*piece, weight=0.0) for piece in chunks[0].pieces]
    names = [item.slide.id for item in items]
    chosen = {e.slide: view.rows(items[e.slide], epoch) for e in entries}
    ends = np.cumsum([0] + [chunk.rows for chunk in chunks]).tolist()
    return Bag(
        offsets=tuple(np.cumsum([0] + [e.stop - e.start for e in entries]).tolist()),
        chunks=tuple(
            Chunk(start, start + chunk.rows, _chunk_seed(view.seed, epoch, names, chunk), counts)
            for start, chunk in zip(ends, chunks, strict=False)
        ),
        # The head sees the whole of a bag that is sharded.
        coords=tuple(
            coords if e.shards else coords[e.start : e.stop]
            for e, (_, coords) in ((e, chosen[e.slide]) for e in entries)
        ),
        pixels=StoredPixels(
            [part for e in entries for part in cut_rows(chosen[e.slide][0], e.start, e.stop)],
            view.look,
        ),
        target=torch.stack([items[e.slide].target for e in entries]),
        slides=tuple(names[e.slide] for e in entries),
        seeds=tuple(mix(view.seed, epoch, names[e.slide], "head") for e in entries),
        weight=torch.tensor([e.weight for e in entries]),
        shards=tuple(e.shards for e in entries),
    )


def _entries(shares: Sequence[Sequence[PlannedChunk]], rank: int) -> list[_Entry]:
    """The bags whose head runs on ``rank``: those that are here, and all that are sharded."""
    ranges = [
        {p.bag: rows_of(share, p.bag) for chunk in share for p in chunk.pieces} for share in shares
    ]
    entries = []
    for bag in sorted(set().union(*ranges)):
        owners = sum(bag in found for found in ranges)
        start, stop = ranges[rank].get(bag, (0, 0))
        if owners > 1:
            spans = [found.get(bag, (0, 0)) for found in ranges]
            rows = tuple(high - low for low, high in spans)
            entries.append(_Entry(bag, start, stop, 1 / len(shares), rows))
        elif bag in ranges[rank]:
            entries.append(_Entry(bag, start, stop, 1.0))
    return entries


def _chunk_seed(seed: int, epoch: int, names: Sequence[str], chunk: PlannedChunk) -> int:
    return mix(seed, epoch, names[chunk.pieces[0].bag], "chunk", chunk.number)


def whole_bag(item: LabelledSlide, view: View, chunk: int) -> Bag:
    """One slide by itself, in chunks of at most ``chunk`` patches."""
    bag = make_bag([item], view, share_update(cut_update([view.count(item)], chunk), 1))
    if view.cache is None:
        return bag
    return replace(bag, pixels=view.cache.over(bag.pixels, item.slide.id))


@dataclass(frozen=True)
class TrainingLoader:
    """The bags of an epoch for one rank; an update is ``bags`` slides over all ranks.

    Args:
        chunk: most patches encoded at once.
        shard_over: bags of more patches are spread over the ranks; None: none.
        full: all chunks but a bag's last have exactly ``chunk`` patches.
        one_piece: a rank's patches are a single chunk, for statistics over the whole batch.
    """

    items: Sequence[LabelledSlide]
    view: View
    bags: int
    chunk: int
    shard_over: int | None = None
    full: bool = False
    one_piece: bool = False

    def updates(self) -> int:
        """Optimiser steps in an epoch."""
        return -(-len(self.items) // self.bags)

    def check(self, world_size: int, epochs: int) -> None:
        """UserError where a rank's share must be one chunk and is not, in any epoch."""
        sizes = [self.view.count(item) for item in self.items]
        for epoch in range(epochs if self.one_piece else 0):
            for update in plan_epoch(len(sizes), self.bags, seed=self.view.seed, epoch=epoch):
                self._shares([sizes[i] for i in update], world_size)

    def epoch(
        self, epoch: int, *, rank: int, world_size: int, first: int = 0
    ) -> Iterator[tuple[Bag, int]]:
        """From update ``first`` on: this rank's bag, and the number of slides on all ranks."""
        plan = plan_epoch(len(self.items), self.bags, seed=self.view.seed, epoch=epoch)
        for update in plan[first:]:
            slides = [self.items[i] for i in update]
            shares = self._shares([self.view.count(item) for item in slides], world_size)
            yield make_bag(slides, self.view, shares, rank=rank, epoch=epoch), len(update)

    def _shares(self, sizes: Sequence[int], world_size: int) -> list[list[PlannedChunk]]:
        if not self.one_piece:
            groups = cut_update(sizes, self.chunk, full=self.full)
            return share_update(groups, world_size, shard_over=self.shard_over)
        alone = [[PlannedChunk(0, (Piece(bag, 0, size),))] for bag, size in enumerate(sizes)]
        shares = [in_one_piece(share) for share in share_update(alone, world_size)]
        rows = max(chunk.rows for share in shares for chunk in share)
        if rows > self.chunk:
            raise UserError(
                f"engine.batch_norm=sync takes statistics over a whole update, so a rank must encode its "
                f"share in one piece:\n  one has {rows} patches, engine.chunk is {self.chunk}\n"
                "  raise engine.chunk, lower bag.patches or optim.bags, or use"
                " engine.batch_norm=chunk or frozen"
            )
        return shares


def some_slides(
    items: Sequence[LabelledSlide], most: int | None, *, seed: int
) -> list[LabelledSlide]:
    """At most ``most`` slides, always the same ones, of each label as many as can be."""
    drawn = sorted(items, key=lambda item: mix(seed, item.slide.id, "some"))
    groups: dict[str, list[LabelledSlide]] = {}
    for item in drawn:
        groups.setdefault(str(item.target), []).append(item)
    turns = chain.from_iterable(zip_longest(*(groups[key] for key in sorted(groups))))
    chosen = [item for item in turns if item is not None][:most]
    return sorted(chosen, key=lambda item: item.slide.id)


def label_slides(
    slides: Sequence[Slide],
    stores: Mapping[str, PatchStore],
    encode: Callable[[Mapping[str, str]], Tensor],
) -> list[LabelledSlide]:
    """Slides with their stores and encoded targets, by id: the order every run has."""
    return [
        LabelledSlide(slide, stores[slide.id], encode(slide.target))
        for slide in sorted(slides, key=lambda slide: slide.id)
    ]
