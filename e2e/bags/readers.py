"""The pixels of a bag: rows are read, decoded and augmented when they are asked for, always alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.bags.bag import PixelSource
from e2e.errors import DamagedDataError
from e2e.images.augment import Augment, resize
from e2e.images.decode import Buffer, Decoder, UndecodableError
from e2e.seeds import patch_seeds
from e2e.store.records import PatchReader, SlideReader

T = TypeVar("T")


@dataclass(frozen=True)
class SlideRows:
    """Patches of one slide in one store."""

    store: SlideReader
    slide: str
    indices: NDArray[np.int64]
    side: int
    """Of the stored JPEGs, in pixels."""
    seed: int
    """With its index it gives each patch its draws."""
    shared: NDArray[np.uint64] | None = None
    """(n,) seeds of the crops alone, where patches share them."""

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, start: int, stop: int) -> SlideRows:
        """Rows ``start`` to ``stop`` of these."""
        shared = None if self.shared is None else self.shared[start:stop]
        return replace(self, indices=self.indices[start:stop], shared=shared)

    def seeds(self) -> NDArray[np.uint64]:
        """(n,) the seed of each patch."""
        return patch_seeds(self.seed, self.indices)


class RowReader(Protocol):
    """How the rows of a bag are had: a :class:`PixelRowReader`, or a cache of features."""

    def source(self, rows: Sequence[SlideRows]) -> PixelSource:
        """Where a bag of these rows gets what the encoder sees."""
        ...


@dataclass(frozen=True)
class PixelRowReader:
    """How JPEG bytes become what the encoder sees.

    ``augment`` None is the look of evaluation: the patches as stored, at ``size``.
    """

    decoder: Decoder
    size: int | None = None
    augment: Augment | None = None
    bgr: bool = False
    """Blue and red are swapped, as the ABMILX project's models were trained."""
    keep: str | None = None
    """What :class:`StoredPixels` keeps of rows it is asked for again."""

    def source(self, rows: Sequence[SlideRows]) -> PixelSource:
        """See :class:`RowReader`."""
        return StoredPixels(rows, self)


def cut_rows(rows: Sequence[SlideRows], start: int, stop: int) -> list[SlideRows]:
    """Rows ``start`` to ``stop`` of all of them together."""
    found, first = [], 0
    for part in rows:
        low, high = max(start - first, 0), min(stop - first, len(part))
        if low < high:
            found.append(part.part(low, high))
        first += len(part)
    return found


def share_draws(rows: Sequence[SlideRows], rectangles: int, seed: int) -> list[SlideRows]:
    """All rows in so many runs of neighbours, each of one crop, as the ABMILX project has them."""
    total = sum(map(len, rows))
    run = np.arange(total) * rectangles // max(1, total)
    seeds = patch_seeds(seed, run)
    ends = np.cumsum([len(part) for part in rows])[:-1]
    return [
        replace(part, shared=own) for part, own in zip(rows, np.split(seeds, ends), strict=True)
    ]


class StoredPixels:
    """The pixel source of a bag.

    Of rows that will be asked for ``again``, what ``look.keep`` names stays in memory until then:
    ``jpeg``, ``uint8`` (decoded) or ``float`` (as the encoder gets them); None: nothing.
    """

    def __init__(self, rows: Sequence[SlideRows], look: PixelRowReader) -> None:
        self._rows, self._look = rows, look
        self._kept: dict[tuple[int, int], Any] = {}

    def __call__(
        self, start: int, stop: int, device: torch.device, *, again: bool = False
    ) -> Tensor:
        """Rows start..stop as (n,3,H,W); DamagedDataError names the slide and patch at fault."""

        def once(what: str, make: Callable[[], T]) -> T:
            """What ``make`` gives; from memory, if it was kept the time before."""
            if what != self._look.keep:
                return make()
            made = self._kept.pop((start, stop)) if (start, stop) in self._kept else make()
            if again:
                self._kept[start, stop] = made
            return made

        def jpegs() -> list[list[bytes]]:
            return [_copies(group) for group in groups]

        def decoded() -> list[Tensor]:
            if self._look.keep == "jpeg":
                kept = zip(groups, once("jpeg", jpegs), strict=True)
                return [self._decode(group, values, device) for group, values in kept]
            return [self._read(group, device) for group in groups]

        def seen() -> Tensor:
            pieces = [
                self._augment(p, part)
                for p, part in zip(once("uint8", decoded), groups, strict=True)
            ]
            if len({piece.dtype for piece in pieces}) > 1:  # some were resampled, some were not
                pieces = [p / 255 if p.dtype == torch.uint8 else p for p in pieces]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        groups = _by_side(cut_rows(self._rows, start, stop))
        return once("float", seen)

    def forget(self, start: int, stop: int) -> None:
        """These rows will not be asked for again after all."""
        self._kept.pop((start, stop), None)

    def _read(self, group: Sequence[SlideRows], device: torch.device) -> Tensor:
        """The pixels of one group; of one slide, decoded out of the store's own memory."""
        first, *more = group
        if more or not self._look.decoder.borrows:
            return self._decode(group, _copies(group), device)
        store = cast(PatchReader, first.store)
        return store.borrow(
            first.slide, first.indices, lambda jpegs: self._decode(group, jpegs, device)
        )

    def _decode(
        self, group: Sequence[SlideRows], jpegs: Sequence[Buffer], device: torch.device
    ) -> Tensor:
        try:
            pixels = self._look.decoder.decode(jpegs, device)
            return pixels.flip(1) if self._look.bgr else pixels
        except UndecodableError as error:
            at = cut_rows(group, error.index, error.index + 1)[0]
            raise DamagedDataError(
                f"{at.store.path}: slide '{at.slide}' patch {at.indices[0]} {error}\n"
                "  tools/inspect_lmdb.py --verify lists all of them; pack the slide again"
            ) from error

    def _augment(self, pixels: Tensor, rows: Sequence[SlideRows]) -> Tensor:
        look = self._look
        if look.augment is None:
            return resize(pixels, look.size)
        seeds = np.concatenate([part.seeds() for part in rows])
        shared = [part.shared for part in rows if part.shared is not None]
        return look.augment(pixels, seeds, np.concatenate(shared) if shared else None)


def _copies(group: Sequence[SlideRows]) -> list[bytes]:
    """The JPEGs of these rows, apart from their stores."""
    read = (cast(PatchReader, part.store).read(part.slide, part.indices) for part in group)
    return list(chain.from_iterable(read))


def _by_side(rows: Sequence[SlideRows]) -> list[list[SlideRows]]:
    """Neighbours whose patches have one size, which are decoded and augmented together."""
    return [list(group) for _, group in groupby(rows, key=lambda part: part.side)]
