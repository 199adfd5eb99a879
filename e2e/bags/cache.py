"""A cache of pixels for slides that are read every epoch, as those of validation are."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from e2e.bags.bag import PixelSource


class PixelCache:
    """Keeps pixels as the encoder sees them in main memory, up to a number of bytes.

    Chunks that no longer fit are read anew each time.

    Parameters
    ----------
    max_bytes : int
        Most bytes to keep.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.cached_bytes = max_bytes, 0
        self._lock = threading.Lock()  # several threads read chunks
        self._cache: dict[tuple[str, int, int], Tensor] = {}

    def over(self, source: PixelSource, slide: str) -> CachedPixels:
        """Return ``source``, that of the only bag of ``slide``, through the cache."""
        return CachedPixels(self, source, slide)

    def get(self, slide: str, start: int, stop: int) -> Tensor | None:
        """Return the pixels of these rows of the slide; None if they are not kept."""
        return self._cache.get((slide, start, stop))

    def put(self, slide: str, start: int, stop: int, pixels: Tensor) -> None:
        """Keep a copy of the pixels, if it fits."""
        with self._lock:
            if self.cached_bytes + pixels.nbytes > self.max_bytes:
                return
            self.cached_bytes += pixels.nbytes
        # A copy, because the pixels may lie in memory that is used again for other chunks.
        self._cache[slide, start, stop] = pixels.to("cpu", copy=True)


class CachedPixels(PixelSource):
    """A pixel source that looks in a cache first.

    Parameters
    ----------
    cache : PixelCache
        Where pixels are kept.
    source : PixelSource
        Reads the others.
    slide : str
        Id of the only slide of the bag.
    """

    def __init__(self, cache: PixelCache, source: PixelSource, slide: str) -> None:
        self._cache, self._source, self._slide = cache, source, slide

    def __call__(
        self, start: int, stop: int, device: torch.device, *, will_be_reread: bool = False
    ) -> Tensor:
        """Return rows ``start`` to ``stop``; see :class:`PixelSource`."""
        cached = self._cache.get(self._slide, start, stop)
        if cached is not None:
            return cached.to(device)
        pixels = self._source(start, stop, device, will_be_reread=will_be_reread)
        self._cache.put(self._slide, start, stop, pixels)
        return pixels

    def forget(self, start: int, stop: int) -> None:
        """Free what the source keeps of these rows to reread them; the cache stays as it is."""
        self._source.forget(start, stop)
