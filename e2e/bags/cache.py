"""The rows of a bag where they are features: read once, and from memory from then on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from e2e.bags.bag import PixelSource
from e2e.bags.readers import SlideRows, cut_rows
from e2e.features.reader import FeatureFiles


@dataclass
class FeatureRowReader:
    """How a bag's features are had; see :class:`e2e.bags.readers.PixelRowReader`, whose place it takes.

    Args:
        most: bytes of features that are kept, of the slides that come first; the others are read
            anew each time.
    """

    most: int
    held: int = 0
    _found: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def source(self, rows: Sequence[SlideRows]) -> PixelSource:
        """See :class:`e2e.bags.readers.RowReader`."""

        def features(start: int, stop: int, device: torch.device, *, again: bool = False) -> Tensor:
            """Rows start..stop as (n, dim), float16 or float32 as stored."""
            parts = [self._rows(part) for part in cut_rows(rows, start, stop)]
            found = parts[0] if len(parts) == 1 else torch.cat(parts)
            return found.to(device, non_blocking=True)

        return features

    def _rows(self, part: SlideRows) -> Tensor:
        whole = self._slide(part.store, part.slide)  # pyright: ignore[reportArgumentType]
        if np.array_equal(part.indices, np.arange(len(whole))):
            return whole  # nothing is copied
        return whole[torch.from_numpy(part.indices)]

    def _slide(self, store: FeatureFiles, slide: str) -> Tensor:
        key = (str(store.path), slide)
        found = self._found.get(key)
        if found is not None:
            return found
        made = store.features(slide)
        with self._lock:
            fits = self.held + made.nbytes <= self.most and key not in self._found
            self.held += made.nbytes if fits else 0
            if fits:
                self._found[key] = made
        return made


class PixelCache:
    """Pixels of slides that are seen again and again, as validation's are, up to a number of bytes.

    What no longer fits is made anew each time. Kept in main memory, as the encoder gets them.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self._lock = threading.Lock()  # chunks are made in several threads
        self._found: dict[tuple[str, int, int], Tensor] = {}

    def over(self, source: PixelSource, slide: str) -> PixelSource:
        """``source``, the only bag of ``slide``, through the cache."""

        def pixels(start: int, stop: int, device: torch.device, *, again: bool = False) -> Tensor:
            found = self._found.get((slide, start, stop))
            if found is not None:
                return found.to(device)
            made = source(start, stop, device, again=again)
            with self._lock:
                fits = self.held + made.nbytes <= self.most
                self.held += made.nbytes if fits else 0
            if fits:
                # A copy: the pixels may lie in a larger slab that is wanted again.
                self._found[slide, start, stop] = made.to("cpu", copy=True)
            return made

        return pixels
