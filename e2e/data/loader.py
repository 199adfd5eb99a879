"""From slides and stores to bags. Nothing is decoded here before the engine asks for the pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.bag import Bag, Chunk
from e2e.data.augment import Augment, resize
from e2e.data.cohort import Slide
from e2e.data.decode import Decoder, UndecodableError
from e2e.data.order import plan_epoch
from e2e.data.plan import Piece, PlannedChunk, cut_update, in_one_piece, rows_of, share_update
from e2e.data.sampler import mix, patch_seeds, sample_patches
from e2e.data.store import PatchStore, SlideRecord
from e2e.errors import DamagedDataError, UserError

T = TypeVar("T")


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
class _Part:
    """The chosen patches of one slide."""

    item: LabelledSlide
    indices: NDArray[np.int64]
    seed: int


class StoredPixels:
    """The pixel source of a bag: reads, decodes and augments rows on demand, always alike.

    Of rows that will be asked for ``again``, what ``view.keep`` names stays in memory until then:
    ``jpeg``, ``uint8`` (decoded) or ``float`` (as the encoder gets them); None: nothing.
    """

    def __init__(self, parts: Sequence[_Part], view: View) -> None:
        self._parts = parts
        self._starts = np.cumsum([0] + [len(part.indices) for part in parts])
        self._view = view
        self._kept: dict[tuple[int, int], Any] = {}

    def __call__(
        self, start: int, stop: int, device: torch.device, *, again: bool = False
    ) -> Tensor:
        """Rows start..stop as (n,3,H,W); DamagedDataError names the slide and patch at fault."""

        def once(what: str, make: Callable[[], T]) -> T:
            """What ``make`` gives; from memory, if it was kept the time before."""
            if what != self._view.keep:
                return make()
            made = self._kept.pop((start, stop)) if (start, stop) in self._kept else make()
            if again:
                self._kept[start, stop] = made
            return made

        def jpegs() -> list[list[bytes]]:
            return [part.item.store.read(part.item.slide.id, indices) for part, indices in rows]

        def decoded() -> list[Tensor]:
            found = once("jpeg", jpegs)
            return [self._decode(*row, j, device) for row, j in zip(rows, found, strict=True)]

        def seen() -> Tensor:
            found = once("uint8", decoded)
            pieces = [self._augment(*row, p) for row, p in zip(rows, found, strict=True)]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        rows = self._rows(start, stop)
        return once("float", seen)

    def _rows(self, start: int, stop: int) -> list[tuple[_Part, NDArray[np.int64]]]:
        found = []
        for first, part in zip(self._starts, self._parts, strict=False):
            low, high = max(start - first, 0), min(stop - first, len(part.indices))
            if low < high:
                found.append((part, part.indices[low:high]))
        return found

    def _decode(
        self,
        part: _Part,
        indices: NDArray[np.int64],
        jpegs: Sequence[bytes],
        device: torch.device,
    ) -> Tensor:
        store, slide = part.item.store, part.item.slide.id
        try:
            return self._view.decoder.decode(jpegs, device)
        except UndecodableError as error:
            raise DamagedDataError(
                f"{store.path}: slide '{slide}' patch {indices[error.index]} {error}\n"
                "  tools/inspect_lmdb.py --verify lists all of them; pack the slide again"
            ) from error

    def _augment(self, part: _Part, indices: NDArray[np.int64], pixels: Tensor) -> Tensor:
        if self._view.augment is None:
            return resize(pixels, self._view.size)
        return self._view.augment(pixels, patch_seeds(part.seed, indices))


@dataclass(frozen=True)
class View:
    """Which patches stand for a slide, and how they become pixels.

    ``augment`` None is the view of evaluation: the patches as stored, at ``size``.
    """

    decoder: Decoder
    size: int | None = None
    augment: Augment | None = None
    seed: int = 0
    bag_size: int | None = None
    """Random patches a slide; None: all."""
    keep: str | None = None
    """See :class:`StoredPixels`."""

    def count(self, item: LabelledSlide) -> int:
        """Patches that stand for the slide."""
        count = item.store.count(item.slide.id)
        return count if self.bag_size is None else min(count, self.bag_size)


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
    chosen = {
        entry.slide: sample_patches(
            names[entry.slide],
            items[entry.slide].store.count(names[entry.slide]),
            view.bag_size,
            seed=view.seed,
            epoch=epoch,
        )
        for entry in entries
    }
    parts = [
        _Part(
            items[e.slide], chosen[e.slide][e.start : e.stop], mix(view.seed, epoch, names[e.slide])
        )
        for e in entries
    ]
    ends = np.cumsum([0] + [chunk.rows for chunk in chunks]).tolist()
    return Bag(
        offsets=tuple(np.cumsum([0] + [len(part.indices) for part in parts]).tolist()),
        chunks=tuple(
            Chunk(start, start + chunk.rows, _chunk_seed(view.seed, epoch, names, chunk), counts)
            for start, chunk in zip(ends, chunks, strict=False)
        ),
        coords=tuple(_coords(items[e.slide], e, chosen[e.slide]) for e in entries),
        pixels=StoredPixels(parts, view),
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


def _coords(item: LabelledSlide, entry: _Entry, chosen: NDArray[np.int64]) -> Tensor:
    """Of the rows here, or of the whole bag where it is sharded: the head sees all of it."""
    rows = chosen if entry.shards else chosen[entry.start : entry.stop]
    return torch.from_numpy(item.record.coords[rows])


def _chunk_seed(seed: int, epoch: int, names: Sequence[str], chunk: PlannedChunk) -> int:
    return mix(seed, epoch, names[chunk.pieces[0].bag], "chunk", chunk.number)


def whole_bag(item: LabelledSlide, view: View, chunk: int) -> Bag:
    """One slide by itself, in chunks of at most ``chunk`` patches."""
    return make_bag([item], view, share_update(cut_update([view.count(item)], chunk), 1))


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
