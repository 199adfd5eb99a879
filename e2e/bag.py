"""The batch that flows: bags of different sizes, ragged, checked when made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

PixelSource = Callable[[int, int, torch.device], Tensor]
"""``pixels(start, stop, device)`` -> rows start..stop of the batch's patches, (n,3,H,W) on ``device``.

uint8, or float in 0..1. It gives the same pixels every time it is asked: the second pass of the
engine decodes and augments again instead of keeping them.
"""


@dataclass(frozen=True)
class Bag:
    """A batch of B bags; patches of bag b are the rows ``offsets[b]`` to ``offsets[b + 1]``.

    Raises:
        ValueError: the parts do not fit together, or a bag has no patch.
    """

    offsets: tuple[int, ...]
    """B + 1 rising row numbers, the first 0."""
    coords: Tensor
    """(total, 2) level-0 pixels, upper left corner of each patch."""
    pixels: PixelSource
    target: Tensor
    """(B,) or (B, ...) what the task made of the labels."""
    slides: tuple[str, ...]
    seeds: tuple[int, ...]
    """One number a bag, made of (seed, epoch, slide): all that is drawn for the bag comes from it."""
    weight: Tensor
    """(B,) share of each bag in the loss; 0 for a bag that only keeps an idle rank in step."""
    groups: tuple[int, ...]
    """(B,) rising; neighbours with the same number may be encoded together. The grouping is that of
    the whole update, so it is the same on any number of ranks."""

    def __post_init__(self) -> None:
        sizes = [stop - start for start, stop in zip(self.offsets, self.offsets[1:], strict=False)]
        if not sizes or self.offsets[0] != 0 or min(sizes) < 1:
            raise ValueError(f"offsets must start at 0 and rise; got {self.offsets}")
        if self.coords.shape != (self.offsets[-1], 2):
            raise ValueError(
                f"coords {tuple(self.coords.shape)} for {self.offsets[-1]} patches; need (patches, 2)"
            )
        parts = (self.target, self.slides, self.seeds, self.weight, self.groups)
        lengths = {len(part) for part in parts}
        if lengths != {len(sizes)}:
            raise ValueError(f"{len(sizes)} bags, but targets, slides, seeds ... of {lengths}")

    def __len__(self) -> int:
        return len(self.slides)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(first, last + 1) bag of each group."""
        cuts = [k for k in range(1, len(self)) if self.groups[k] != self.groups[k - 1]]
        return list(pairwise([0, *cuts, len(self)]))

    @property
    def num_patches(self) -> int:
        """Patches of all bags together."""
        return self.offsets[-1]
