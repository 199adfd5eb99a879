"""From slides and stores to bags: which patches of which slides make an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from e2e.bags.bag import Bag, Chunk
from e2e.bags.chunk_plan import Piece, PlannedChunk, cut_update, rows_of, share_update, single_chunk
from e2e.bags.epoch_plan import plan_epoch, repeat_counts
from e2e.bags.readers import cut_rows, share_draws
from e2e.bags.spec import BagSpec, LabelledSlide, _key
from e2e.errors import UserError
from e2e.seeds import mix_seed
from e2e.slides import Slide
from e2e.store.records import SlideReader


class _Entry(NamedTuple):
    """Patches ``start`` to ``stop`` of a slide, as a bag of a rank's batch."""

    slide: int
    start: int
    stop: int
    weight: float
    shards: tuple[int, ...] = ()


def make_bag(
    items: Sequence[LabelledSlide],
    view: BagSpec,
    shares: Sequence[Sequence[PlannedChunk]],
    *,
    repeat_counts: Sequence[int] | None = None,
    rank: int = 0,
    epoch: int = 0,
) -> Bag:
    """What ``rank`` has of an update of ``items``.

    Args:
        shares: the chunks of each rank, as :func:`e2e.bags.chunk_plan.share_update` gives them.
        repeat_counts: how often each slide came before in this epoch; None: never.
    """
    chunks, counts = shares[rank], True
    entries = _entries(shares, rank)
    if not chunks:
        # A rank without patches encodes a chunk that counts nothing: it takes part in collectives.
        chunks, counts = [next(chunk for share in shares for chunk in share)], False
        entries += [_Entry(*piece, weight=0.0) for piece in chunks[0].pieces]
    repeat_counts = repeat_counts or [0] * len(items)
    keys = [_key(item.slide.id, turn) for item, turn in zip(items, repeat_counts, strict=True)]
    chosen = {e.slide: view.rows(items[e.slide], epoch, repeat_counts[e.slide]) for e in entries}
    rows = [part for e in entries for part in cut_rows(chosen[e.slide][0], e.start, e.stop)]
    if view.shared_crops:
        rows = share_draws(rows, view.shared_crops, mix_seed(view.seed, epoch, keys[0], "crop"))
    ends = np.cumsum([0] + [chunk.rows for chunk in chunks]).tolist()
    return Bag(
        offsets=tuple(np.cumsum([0] + [e.stop - e.start for e in entries]).tolist()),
        chunks=tuple(
            Chunk(start, start + chunk.rows, _chunk_seed(view.seed, epoch, keys, chunk), counts)
            for start, chunk in zip(ends, chunks, strict=False)
        ),
        # The head sees the whole of a bag that is sharded.
        coords=tuple(
            coords if e.shards or coords is None else coords[e.start : e.stop]
            for e, (_, coords) in ((e, chosen[e.slide]) for e in entries)
        ),
        pixels=view.reader.source(rows),
        target=torch.stack([items[e.slide].target for e in entries]),
        slides=tuple(items[e.slide].slide.id for e in entries),
        seeds=tuple(mix_seed(view.seed, epoch, keys[e.slide], "head") for e in entries),
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


def _chunk_seed(seed: int, epoch: int, keys: Sequence[str], chunk: PlannedChunk) -> int:
    return mix_seed(seed, epoch, keys[chunk.pieces[0].bag], "chunk", chunk.number)


def full_bag(item: LabelledSlide, view: BagSpec, chunk: int) -> Bag:
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
        groups: a number for each slide; groups are drawn equally often. None: each slide once.
        whole: each bag is one chunk, however large; and where groups do not decide, bags of like
            size share an update: for features, whose bags are padded to one size.
    """

    items: Sequence[LabelledSlide]
    view: BagSpec
    bags: int
    chunk: int
    shard_over: int | None = None
    full: bool = False
    one_piece: bool = False
    groups: Sequence[int] | None = None
    whole: bool = False

    def updates(self) -> int:
        """Optimiser steps in an epoch."""
        return -(-len(self.items) // self.bags)

    def check(self, world_size: int, epochs: int) -> None:
        """UserError where a sampler lacks coords, or a rank's share must be one chunk and is not."""
        if self.view.sampler.uses_coords:
            for item in self.items:
                self.view.check_places(item)
        for epoch in range(epochs if self.one_piece else 0):
            for update in self._plan(epoch):
                self._shares([self._sizes[i] for i in update], world_size)

    def epoch(
        self, epoch: int, *, rank: int, world_size: int, first: int = 0
    ) -> Iterator[tuple[Bag, int]]:
        """From update ``first`` on: this rank's bag, and the number of slides on all ranks."""
        plan = self._plan(epoch)
        for update, came in list(zip(plan, repeat_counts(plan), strict=True))[first:]:
            slides = [self.items[i] for i in update]
            shares = self._shares([self._sizes[i] for i in update], world_size)
            where = {"repeat_counts": came, "rank": rank, "epoch": epoch}
            yield make_bag(slides, self.view, shares, **where), len(update)

    def _plan(self, epoch: int) -> list[list[int]]:
        where = {"seed": self.view.seed, "epoch": epoch}
        sizes = self._sizes if self.whole and self.groups is None else None
        return plan_epoch(len(self.items), self.bags, groups=self.groups, sizes=sizes, **where)

    @cached_property
    def _sizes(self) -> list[int]:
        return [self.view.count(item) for item in self.items]

    def _shares(self, sizes: Sequence[int], world_size: int) -> list[list[PlannedChunk]]:
        alone = [[PlannedChunk(0, (Piece(bag, 0, size),))] for bag, size in enumerate(sizes)]
        if self.whole:
            return share_update(alone, world_size)
        if not self.one_piece:
            groups = cut_update(sizes, self.chunk, full=self.full)
            return share_update(groups, world_size, shard_over=self.shard_over)
        shares = [single_chunk(share) for share in share_update(alone, world_size)]
        rows = max(chunk.rows for share in shares for chunk in share)
        if rows > self.chunk:
            raise UserError(
                f"engine.batch_norm=sync takes statistics over a whole update, so a rank must encode its "
                f"share in one piece:\n  one has {rows} patches, engine.chunk is {self.chunk}\n"
                "  raise engine.chunk, lower bag.patches or optim.bags, or use"
                " engine.batch_norm=chunk or frozen"
            )
        return shares


def subset_slides(
    items: Sequence[LabelledSlide], most: int | None, *, group: Callable[[Tensor], int], seed: int
) -> list[LabelledSlide]:
    """At most ``most`` slides, always the same ones, of each group of targets as many as can be."""
    drawn = sorted(items, key=lambda item: mix_seed(seed, item.slide.id, "some"))
    groups: dict[int, list[LabelledSlide]] = {}
    for item in drawn:
        groups.setdefault(group(item.target), []).append(item)
    interleaved = chain.from_iterable(zip_longest(*(groups[key] for key in sorted(groups))))
    chosen = [item for item in interleaved if item is not None][:most]
    return sorted(chosen, key=lambda item: item.slide.id)


def label_slides(
    slides: Sequence[Slide],
    stores: Mapping[str, Sequence[SlideReader]],
    encode: Callable[[Mapping[str, str]], Tensor],
) -> list[LabelledSlide]:
    """Slides with their stores and encoded targets, by id: the order every run has."""
    return [
        LabelledSlide(slide, store, encode(slide.target), tuple(more))
        for slide in sorted(slides, key=lambda slide: slide.id)
        for store, *more in [stores[slide.id]]
    ]
