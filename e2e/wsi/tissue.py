"""Where a slide has tissue, from its overview: stained pixels, by a threshold that has guards."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage import filters, morphology

METHOD = "chroma-otsu-1"
"""Names this method in a store's recipe; raise the number when masks change."""

OVERVIEW_MPP = 8.0
"""um per overview pixel the constants below were chosen at: a cell is about one pixel."""

LOWEST, HIGHEST = 12, 20
"""Limits of Otsu's threshold on chroma (0..255). Below the lowest lie JPEG and sensor noise of bare
glass, so an empty slide stays empty; eosin at its palest lies above the highest, so a slide full of
tissue is not split into pale and dark."""

GLASS_MIN, GLASS_CHROMA = 200, 14
"""Glass is at least this bright in each channel, and at most this far from grey."""

CLOSE_UM, SPECK_UM2, HOLE_UM2 = 24.0, 16_000.0, 60_000.0
"""Gaps closed (radius), and the areas below which tissue is dust and a hole is a vessel or fat."""


def tissue_mask(overview: NDArray[np.uint8], mpp: float) -> NDArray[np.bool_]:
    """(H, W) True on tissue, for an (H, W, 3) RGB overview of ``mpp`` um per pixel.

    Stained tissue is coloured; glass, scan borders, black ink, shadows and the white where nothing
    was scanned are grey. So the signal is chroma, max - min over RGB after glass is made white, and
    the threshold is Otsu's between two limits. Ink in colour counts as tissue.
    """
    chroma = _chroma(overview)
    threshold = LOWEST
    if chroma.min() < chroma.max():
        threshold = float(np.clip(filters.threshold_otsu(chroma), LOWEST, HIGHEST))
    mask = chroma > threshold
    radius = round(CLOSE_UM / mpp)
    if radius >= 1:
        # Unlike reflection, padding with glass does not glue tissue to the border.
        padded = np.pad(mask, radius)
        disk = morphology.disk(radius, decomposition="sequence")
        mask = morphology.closing(padded, disk)[radius:-radius, radius:-radius]
    mask = morphology.remove_small_objects(mask, max_size=int(SPECK_UM2 / mpp**2))
    return morphology.remove_small_holes(mask, max_size=int(HOLE_UM2 / mpp**2))


def _chroma(overview: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) distance from grey once glass is white; single odd pixels smoothed away."""
    low, high = overview.min(axis=2), overview.max(axis=2)
    glass = overview[(low >= GLASS_MIN) & (high - low <= GLASS_CHROMA)]
    white = np.full(3, 255.0)
    if len(glass) >= 0.01 * low.size:
        # Pale tissue may pass for glass; the bright end of what passes is glass where there is any.
        white = np.percentile(glass, 90, axis=0).clip(GLASS_MIN)
    balance = (np.arange(256)[:, None] * (255.0 / white)).clip(max=255).astype(np.uint8)
    balanced = [balance[:, c][overview[..., c]] for c in range(3)]
    chroma = np.maximum.reduce(balanced) - np.minimum.reduce(balanced)
    return np.asarray(filters.rank.median(chroma, morphology.disk(1)), np.uint8)
