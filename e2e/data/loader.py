"""From slides and stores to bags. Nothing is decoded here before the engine asks for the pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.bag import Bag
from e2e.data.augment import Augment, resize
from e2e.data.cohort import Slide
from e2e.data.decode import Decoder, UndecodableError
from e2e.data.sampler import (
    group_bags,
    mix,
    patch_seeds,
    plan_epoch,
    rank_share,
    sample_patches,
)
from e2e.data.store import PatchStore, SlideRecord
from e2e.errors import DamagedDataError


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
    """The pixel source of a bag: reads, decodes and augments rows on demand, always alike."""

    def __init__(
        self, parts: Sequence[_Part], decoder: Decoder, augment: Augment | None, size: int | None
    ) -> None:
        self._parts = parts
        self._starts = np.cumsum([0] + [len(part.indices) for part in parts])
        self._decoder = decoder
        self._augment = augment
        self._size = size

    def __call__(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Rows start..stop as (n,3,H,W); DamagedDataError names the slide and patch at fault."""
        pieces = []
        for first, part in zip(self._starts, self._parts, strict=False):
            low, high = max(start - first, 0), min(stop - first, len(part.indices))
            if low < high:
                pieces.append(self._read(part, part.indices[low:high], device))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _read(self, part: _Part, indices: NDArray[np.int64], device: torch.device) -> Tensor:
        store, slide = part.item.store, part.item.slide.id
        try:
            pixels = self._decoder.decode(store.read(slide, indices), device)
        except UndecodableError as error:
            raise DamagedDataError(
                f"{store.path}: slide '{slide}' patch {indices[error.index]} {error}\n"
                "  tools/inspect_lmdb.py --verify lists all of them; pack the slide again"
            ) from error
        if self._augment is None:
            return resize(pixels, self._size)
        return self._augment(pixels, patch_seeds(part.seed, indices))


def make_bag(
    items: Sequence[LabelledSlide],
    *,
    decoder: Decoder,
    seed: int,
    epoch: int,
    bag_size: int | None,
    augment: Augment | None,
    size: int | None,
    counts: bool = True,
    groups: Sequence[int] | None = None,
) -> Bag:
    """One ragged batch: ``bag_size`` random patches (None: all) of each of ``items``.

    ``augment`` None is the view of evaluation: the patches as stored, at ``size``. ``groups`` None
    leaves each bag by itself.
    """
    parts = []
    for item in items:
        slide = item.slide.id
        indices = sample_patches(slide, item.store.count(slide), bag_size, seed=seed, epoch=epoch)
        parts.append(_Part(item, indices, mix(seed, epoch, slide)))
    coords = [part.item.record.coords[part.indices] for part in parts]
    return Bag(
        offsets=tuple(np.cumsum([0] + [len(part.indices) for part in parts]).tolist()),
        coords=torch.from_numpy(np.concatenate(coords)),
        pixels=StoredPixels(parts, decoder, augment, size),
        target=torch.stack([item.target for item in items]),
        slides=tuple(item.slide.id for item in items),
        seeds=tuple(part.seed for part in parts),
        weight=torch.full((len(items),), float(counts)),
        groups=tuple(range(len(items)) if groups is None else groups),
    )


@dataclass(frozen=True)
class TrainingLoader:
    """The bags of an epoch for one rank; an update is ``bags`` slides over all ranks.

    Neighbouring bags of up to ``chunk`` patches together are a group, and stay on one rank.
    """

    items: Sequence[LabelledSlide]
    decoder: Decoder
    augment: Augment
    seed: int
    bags: int
    bag_size: int | None
    chunk: int

    def updates(self) -> int:
        """Optimiser steps in an epoch."""
        return -(-len(self.items) // self.bags)

    def epoch(
        self, epoch: int, *, rank: int, world_size: int, first: int = 0
    ) -> Iterator[tuple[Bag, int]]:
        """From update ``first`` on: this rank's bag, and the number of slides on all ranks."""
        plan = plan_epoch(len(self.items), self.bags, seed=self.seed, epoch=epoch)
        for update in plan[first:]:
            slides = [self.items[i] for i in update]
            groups = group_bags([self._size(item) for item in slides], self.chunk)
            share, counts = rank_share(groups, rank, world_size)
            bag = make_bag(
                [slides[position] for group in share for position in group],
                decoder=self.decoder,
                seed=self.seed,
                epoch=epoch,
                bag_size=self.bag_size,
                augment=self.augment,
                size=self.augment.size,
                counts=counts,
                groups=[number for number, group in enumerate(share) for _ in group],
            )
            yield bag, len(update)

    def _size(self, item: LabelledSlide) -> int:
        count = item.store.count(item.slide.id)
        return count if self.bag_size is None else min(count, self.bag_size)


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
