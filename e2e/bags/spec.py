"""Labelled slides, and the rule by which patches of a slide make up its bag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.bags.cache import PixelCache
from e2e.bags.readers import R, R_co, RowReader, SlideRows
from e2e.bags.sampler import RandomSampler, Sampler, pad_with_copies, scale_quotas
from e2e.seeds import mix_seed
from e2e.slides import Slide
from e2e.store.records import SlideRecord


@dataclass(frozen=True)
class LabelledSlide(Generic[R_co]):
    """A slide with the reader of its patches or features and its target."""

    slide: Slide
    """As the label table describes it."""
    reader: R_co
    """Reads its patches or features."""
    target: Tensor
    """The label as the task encodes it."""
    other_scales: tuple[R_co, ...] = ()
    """Readers of its patches at other magnifications, for training; evaluation uses ``reader`` alone."""

    @property
    def record(self) -> SlideRecord:
        """Count, coordinates and sizes of the patches of ``reader``."""
        return self.reader.record(self.slide.id)


@dataclass(frozen=True)
class BagSpec(Generic[R]):
    """Which patches of a slide make up its bag, and how they are read."""

    reader: RowReader[R]
    """Reads the rows of the bag."""
    seed: int = 0
    """Seed of the run."""
    bag_size: int | None = None
    """Patches drawn from a slide; None takes all."""
    sampler: Sampler = RandomSampler()
    """Draws them."""
    shares: tuple[float, ...] = ()
    """Share of the bag from each scale of the slide (MRIS); empty takes the first scale only."""
    fill_with_copies: bool = False
    """Whether short bags are filled up with copies of their patches."""
    scores: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Scores of the patches at the first scale by slide id, for samplers that use them."""
    shared_crops: int = 0
    """Number of crop rectangles that all patches of a rank's update share, neighbours the same one; 0
    gives each patch its own."""
    cache: PixelCache | None = None
    """Cache of the pixels of :func:`e2e.bags.loader.full_bag`."""

    def num_patches(self, item: LabelledSlide[R]) -> int:
        """Return the number of patches in the bag of a slide."""
        return sum(self.quotas(item))

    def quotas(self, item: LabelledSlide[R]) -> tuple[int, ...]:
        """Return the number of patches in the bag from each scale of a slide."""
        counts = [reader.num_patches(item.slide.id) for reader in self._scales(item)]
        if self.fill_with_copies and self.bag_size is not None:
            counts = [self.bag_size] * len(counts)
        return scale_quotas(self.bag_size, self.shares or (1,), counts)

    def rows(
        self, item: LabelledSlide[R], epoch: int, repeat: int = 0
    ) -> tuple[list[SlideRows[R]], Tensor | None]:
        """Return the rows of a slide's bag in an epoch, and their coordinates.

        Parameters
        ----------
        item : LabelledSlide
            The slide.
        epoch : int
            Number of the epoch, from 0.
        repeat : int
            How often the epoch drew the slide before.

        Returns
        -------
        rows : list of SlideRows
            One for each scale with at least one patch.
        coords : Tensor or None
            (n, 2) upper left corners in level-0 pixels; None if those of one scale are unknown.
        """
        slide, rows, coords = item.slide.id, [], []
        draw = {"seed": self.seed, "epoch": epoch, "repeat": repeat}
        for scale, (reader, quota) in enumerate(
            zip(self._scales(item), self.quotas(item), strict=True)
        ):
            if quota == 0:  # the share is too small for one patch
                continue
            record = reader.record(slide)
            indices = self.sampler.choose(
                slide,
                record.num_patches,
                quota,
                scale=scale,
                coords=record.coords if self.sampler.uses_coords else None,
                scores=None if scale else self.scores.get(slide),
                **draw,
            )
            if self.fill_with_copies:
                indices = pad_with_copies(indices, quota, slide=slide, scale=scale, **draw)
            seed_key = ("scale", scale) if scale else ()
            seed = mix_seed(self.seed, epoch, slide_key(slide, repeat), *seed_key)
            rows.append(
                SlideRows(reader, slide, indices, record.patch_px, seed, level0_px=record.level0_px)
            )
            coords.append(None if record.coords is None else record.coords[indices])
        if any(corners is None for corners in coords):
            return rows, None
        return rows, torch.from_numpy(np.concatenate(coords))

    def check_coords(self, item: LabelledSlide[R]) -> None:
        """Raise UserError if the coordinates of a slide's patches are unknown."""
        for reader in self._scales(item):
            reader.record(item.slide.id).require_coords()

    def _scales(self, item: LabelledSlide[R]) -> tuple[R, ...]:
        """The readers of the scales that bags are drawn from."""
        return (item.reader, *item.other_scales)[: len(self.shares) or 1]


def slide_key(slide: str, repeat: int) -> str:
    """Return what random draws for a slide are seeded by: another string each time an epoch draws it."""
    return slide if repeat == 0 else f"{slide}\x1f{repeat}"
