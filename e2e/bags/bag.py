"""The batch that flows: bags of different sizes, ragged, cut into chunks, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class PixelSource(Protocol):
    """Where the pixels of a rank's patches come from.

    It gives the same ones every time it is asked: the second pass of the engine decodes and augments
    again instead of keeping them.
    """

    def __call__(
        self, start: int, stop: int, device: torch.device, *, again: bool = False
    ) -> Tensor:
        """Rows start..stop as (n,3,H,W) on ``device``: uint8, or float in 0..1.

        ``again`` says that these rows will be asked for once more.
        """
        ...


class Chunk(NamedTuple):
    """Rows that the encoder sees together."""

    start: int
    stop: int
    seed: int
    """All that the encoder draws for these rows comes from it, on whichever rank they are."""
    counts: bool
    """Whether BatchNorm statistics are to remember these rows."""


@dataclass(frozen=True)
class Bag:
    """A batch of B bags as one rank sees it.

    A bag lies on this rank whole, or is sharded: then every rank of the run has it in its batch,
    with its own rows, and all of its coords, target, seed. The rank's rows of bag b are
    ``offsets[b]`` to ``offsets[b + 1]``.

    Raises:
        ValueError: the parts do not fit together, or a bag has no patch.
    """

    offsets: tuple[int, ...]
    """B + 1 row numbers, the first 0; none falls, and only a sharded bag may have no row here."""
    chunks: tuple[Chunk, ...]
    """All rows in order."""
    coords: tuple[Tensor | None, ...]
    """B times (patches of the bag, 2) level-0 pixels, upper left corner of each patch; None where
    nobody knows."""
    pixels: PixelSource
    target: Tensor
    """(B,) or (B, ...) what the task made of the labels."""
    slides: tuple[str, ...]
    seeds: tuple[int, ...]
    """One number a bag, made of (seed, epoch, slide): what the head draws for the bag comes from it."""
    weight: Tensor
    """(B,) share of each bag in this rank's loss; summed over ranks it is 1 a bag. 0 for a bag that
    only keeps an idle rank in step."""
    shards: tuple[tuple[int, ...], ...]
    """For each bag the rows that each rank has of it; empty for a bag that is whole."""

    def __post_init__(self) -> None:
        sizes = self.sizes
        falls = any(a > b for a, b in pairwise(self.offsets))
        if not self.slides or self.offsets[0] != 0 or falls or min(sizes) < 1:
            raise ValueError(f"offsets must start at 0 and rise; got {self.offsets}")
        parts = (self.coords, self.target, self.seeds, self.weight, self.shards, sizes)
        lengths = {len(part) for part in parts}
        if lengths != {len(self.slides)}:
            raise ValueError(
                f"{len(self.slides)} bags, but targets, seeds, coords ... of {lengths}"
            )
        for size, coords in zip(sizes, self.coords, strict=True):
            if coords is not None and coords.shape != (size, 2):
                raise ValueError(
                    f"coords {tuple(coords.shape)} for {size} patches; need (patches, 2)"
                )
        cuts = [0, *(chunk.stop for chunk in self.chunks)]
        if [chunk.start for chunk in self.chunks] != cuts[:-1] or cuts[-1] != self.offsets[-1]:
            raise ValueError(f"chunks {self.chunks} do not cover rows 0 to {self.offsets[-1]}")

    def __len__(self) -> int:
        return len(self.slides)

    @property
    def sizes(self) -> list[int]:
        """Patches of each bag, over all ranks."""
        own = [stop - start for start, stop in zip(self.offsets, self.offsets[1:], strict=False)]
        return [sum(shards) or rows for rows, shards in zip(own, self.shards, strict=False)]

    @property
    def num_patches(self) -> int:
        """Patches on this rank."""
        return self.offsets[-1]
