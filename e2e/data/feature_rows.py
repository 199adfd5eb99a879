"""The rows of a bag where they are features: read once, and from memory from then on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from e2e.bag import PixelSource
from e2e.data.features import FeatureStore
from e2e.data.pixels import Rows, cut_rows


@dataclass
class FeatureCache:
    """How a bag's features are had; see :class:`e2e.data.pixels.Look`, whose place it takes.

    Args:
        most: bytes of features that are kept, of the slides that come first; the others are read
            anew each time.
    """

    most: int
    held: int = 0
    _found: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def source(self, rows: Sequence[Rows]) -> PixelSource:
        """See :class:`e2e.data.pixels.Sight`."""

        def features(start: int, stop: int, device: torch.device, *, again: bool = False) -> Tensor:
            """Rows start..stop as (n, dim), float16 or float32 as stored."""
            parts = [self._rows(part) for part in cut_rows(rows, start, stop)]
            found = parts[0] if len(parts) == 1 else torch.cat(parts)
            return found.to(device, non_blocking=True)

        return features

    def _rows(self, part: Rows) -> Tensor:
        whole = self._slide(part.store, part.slide)  # pyright: ignore[reportArgumentType]
        if np.array_equal(part.indices, np.arange(len(whole))):
            return whole  # nothing is copied
        return whole[torch.from_numpy(part.indices)]

    def _slide(self, store: FeatureStore, slide: str) -> Tensor:
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
