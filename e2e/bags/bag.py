"""The bags of one update on one rank: sizes, chunks, coordinates, targets and a pixel source."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class PixelSource(Protocol):
    """Gives the pixels (or features) of a rank's rows, the same ones at every call.

    The second pass of the engine reads, decodes and augments the patches again instead of keeping them.
    """

    def __call__(
        self, start: int, stop: int, device: torch.device, *, will_be_reread: bool = False
    ) -> Tensor:
        """Return rows ``start`` to ``stop``.

        Parameters
        ----------
        start, stop : int
            Range of rows, ``stop`` excluded.
        device : torch.device
            Where the result lies.
        will_be_reread : bool
            Whether the same rows are read once more later.

        Returns
        -------
        Tensor
            Pixels (n, 3, H, W), uint8 or float in [0, 1]; or features (n, dim).
        """
        ...

    def forget(self, start: int, stop: int) -> None:
        """Free what is kept of rows that were to be reread and will not be; by default nothing is."""


class Chunk(NamedTuple):
    """Rows that the encoder sees together."""

    start: int
    stop: int
    seed: int
    """Seed of the encoder's random draws for these rows, the same on whichever rank they are."""
    counts: bool
    """Whether the rows count in BatchNorm's running statistics."""


@dataclass(frozen=True)
class Bag:
    """B bags of one update as one rank sees them.

    A bag lies either entirely on one rank or is sharded. A sharded bag is in the batch of every rank,
    with that rank's rows, but with all coordinates, the target and the seed of the bag. The rank's rows
    of bag b are ``offsets[b]`` to ``offsets[b + 1]``.

    Raises
    ------
    ValueError
        If the fields do not fit together, or a bag has no patch.
    """

    offsets: tuple[int, ...]
    """B + 1 row numbers. The first is 0, none is smaller than the one before it, and only a sharded bag
    may have no row on this rank."""
    chunks: tuple[Chunk, ...]
    """All rows in order."""
    coords: tuple[Tensor | None, ...]
    """For each bag the upper left corners of its patches, (patches of the bag, 2) in level-0 pixels; None
    where they are unknown."""
    pixels: PixelSource
    """Reads the rows."""
    target: Tensor
    """Targets as the task encodes them, (B,) or (B, ...)."""
    slides: tuple[str, ...]
    """Slide (or case) id of each bag."""
    seeds: tuple[int, ...]
    """Seed of the head's random draws for each bag, made from (seed, epoch, slide)."""
    weight: Tensor
    """(B,) weight of each bag in this rank's loss; the weights of a bag sum to 1 over the ranks. 0 for a
    bag that only keeps an idle rank in step with the others."""
    shards: tuple[tuple[int, ...], ...]
    """For each bag the number of rows on each rank; empty for a bag that lies on one rank."""
    sides: tuple[float, ...] = ()
    """For each bag the side of its patches in level-0 pixels, NaN where it is unknown; empty: all unknown."""

    def __post_init__(self) -> None:
        sizes = self.sizes
        decreasing = any(a > b for a, b in pairwise(self.offsets))
        if not self.slides or self.offsets[0] != 0 or decreasing or min(sizes) < 1:
            raise ValueError(
                f"offsets must start at 0 and must not decrease, and no bag may be empty; "
                f"got {self.offsets}"
            )
        fields = (self.coords, self.target, self.seeds, self.weight, self.shards, sizes)
        lengths = {len(field) for field in fields}
        if lengths != {len(self.slides)}:
            raise ValueError(
                f"{len(self.slides)} slides, but targets, seeds, coords ... of length {sorted(lengths)}"
            )
        for size, coords in zip(sizes, self.coords, strict=True):
            if coords is not None and coords.shape != (size, 2):
                raise ValueError(
                    f"coords have shape {tuple(coords.shape)}, expected ({size}, 2) for {size} patches"
                )
        cuts = [0, *(chunk.stop for chunk in self.chunks)]
        if [chunk.start for chunk in self.chunks] != cuts[:-1] or cuts[-1] != self.offsets[-1]:
            raise ValueError(f"chunks {self.chunks} do not cover rows 0 to {self.offsets[-1]}")

    def __len__(self) -> int:
        return len(self.slides)

    @property
    def sizes(self) -> list[int]:
        """Patches of each bag, over all ranks."""
        local = [stop - start for start, stop in pairwise(self.offsets)]
        return [sum(shards) or rows for rows, shards in zip(local, self.shards, strict=False)]

    @property
    def num_patches(self) -> int:
        """Patches on this rank."""
        return self.offsets[-1]
