"""Which patches stand for a slide, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.bags.cache import PixelCache
from e2e.bags.readers import RowReader, SlideRows
from e2e.bags.sampler import RandomSampler, Sampler, pad_with_copies, scale_quotas
from e2e.seeds import mix_seed
from e2e.slides import Slide
from e2e.store.records import SlideReader, SlideRecord


@dataclass(frozen=True)
class LabelledSlide:
    """A slide with its stores and the number the task made of its label."""

    slide: Slide
    store: SlideReader
    target: Tensor
    more: tuple[SlideReader, ...] = ()
    """Its patches at other magnifications; evaluation does without them."""

    @property
    def record(self) -> SlideRecord:
        """What the store knows of the slide."""
        return self.store.record(self.slide.id)


@dataclass(frozen=True)
class BagSpec:
    """Which patches stand for a slide, and what the encoder sees of them."""

    reader: RowReader
    seed: int = 0
    bag_size: int | None = None
    """Patches drawn for a slide; None: all."""
    sampler: Sampler = RandomSampler()
    """Which ones."""
    shares: tuple[float, ...] = ()
    """Parts of a bag from each of a slide's stores (MRIS); empty: all from the first."""
    copies: bool = False
    """Fill short bags up with copies of their own patches."""
    scores: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Slide -> what the patches of its first store are worth, for samplers that ask."""
    shared_crops: int = 0
    """Crop rectangles that all of a rank's patches of an update share, neighbours the same one; 0: each
    patch has its own."""
    cache: PixelCache | None = None
    """Of :func:`whole_bag`."""

    def count(self, item: LabelledSlide) -> int:
        """Patches that stand for the slide."""
        return sum(self.quotas(item))

    def quotas(self, item: LabelledSlide) -> tuple[int, ...]:
        """Of each of its stores."""
        counts = [store.num_patches(item.slide.id) for store in self._stores(item)]
        if self.copies and self.bag_size is not None:
            counts = [self.bag_size] * len(counts)
        return scale_quotas(self.bag_size, self.shares or (1,), counts)

    def rows(
        self, item: LabelledSlide, epoch: int, turn: int = 0
    ) -> tuple[list[SlideRows], Tensor | None]:
        """The patches that stand for the slide in this epoch, and their (n,2) coords, if known.

        ``turn`` is how often the slide came before in the epoch.
        """
        slide, rows, coords = item.slide.id, [], []
        when = {"seed": self.seed, "epoch": epoch, "turn": turn}
        for scale, (store, quota) in enumerate(
            zip(self._stores(item), self.quotas(item), strict=True)
        ):
            if quota == 0:  # a share too small for one patch
                continue
            record = store.record(slide)
            indices = self.sampler.choose(
                slide,
                record.num_patches,
                quota,
                scale=scale,
                coords=record.coords if self.sampler.uses_coords else None,
                scores=None if scale else self.scores.get(slide),
                **when,
            )
            if self.copies:
                indices = pad_with_copies(indices, quota, slide=slide, scale=scale, **when)
            seed = mix_seed(
                self.seed, epoch, _key(slide, turn), *(("scale", scale) if scale else ())
            )
            rows.append(SlideRows(store, slide, indices, record.patch_px, seed))
            coords.append(None if record.coords is None else record.coords[indices])
        if any(places is None for places in coords):
            return rows, None
        return rows, torch.from_numpy(np.concatenate(coords))

    def check_places(self, item: LabelledSlide) -> None:
        """UserError where nobody knows the coords of its patches."""
        for store in self._stores(item):
            store.record(item.slide.id).require_coords()

    def _stores(self, item: LabelledSlide) -> tuple[SlideReader, ...]:
        return (item.store, *item.more)[: len(self.shares) or 1]


def _key(slide: str, turn: int) -> str:
    """What draws go by: another one each time that the slide comes in an epoch."""
    return slide if turn == 0 else f"{slide}\x1f{turn}"
