"""Find the tissue on a slide: stained pixels of its overview, by a bounded Otsu threshold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage import filters, morphology

METHOD = "chroma-otsu-1"
"""Name of this method in the recipe of a store. Increase the number when masks change."""

OVERVIEW_MPP = 8.0
"""Micrometres per overview pixel at which the constants below were chosen: a cell is about one pixel."""

MIN_THRESHOLD, MAX_THRESHOLD = 12, 20
"""Bounds of Otsu's threshold on chroma (0 to 255). JPEG and sensor noise of bare glass is below the lower
bound, so an empty slide stays empty. The palest eosin is above the upper bound, so a slide full of tissue
is not divided into pale and dark."""

GLASS_MIN, GLASS_CHROMA = 200, 14
"""Glass is at least this bright in each channel, and has at most this chroma."""

CLOSE_UM, SPECK_UM2, HOLE_UM2 = 24.0, 16_000.0, 60_000.0
"""Radius of the gaps that are closed, and the areas below which tissue is dust and a hole is a vessel or
fat."""


def tissue_mask(overview: NDArray[np.uint8], mpp: float) -> NDArray[np.bool_]:
    """Return where the overview of a slide shows tissue.

    Stained tissue is coloured; glass, scan borders, black ink, shadows and areas that were not scanned
    are grey. So the signal is chroma, the maximum minus the minimum over RGB after glass has been made
    white, and the threshold is Otsu's within two bounds. Coloured ink counts as tissue.

    Parameters
    ----------
    overview
        (H, W, 3) RGB.
    mpp
        Micrometres per pixel of the overview.

    Returns
    -------
    ndarray of bool
        (H, W), True on tissue.
    """
    chroma = _chroma(overview)
    threshold = MIN_THRESHOLD
    if chroma.min() < chroma.max():
        threshold = float(np.clip(filters.threshold_otsu(chroma), MIN_THRESHOLD, MAX_THRESHOLD))
    mask = chroma > threshold
    radius = round(CLOSE_UM / mpp)
    if radius >= 1:
        # Padding with glass, unlike reflection, does not connect tissue with the border.
        padded = np.pad(mask, radius)
        disk = morphology.disk(radius, decomposition="sequence")
        mask = morphology.closing(padded, disk)[radius:-radius, radius:-radius]
    mask = morphology.remove_small_objects(mask, max_size=int(SPECK_UM2 / mpp**2))
    return morphology.remove_small_holes(mask, max_size=int(HOLE_UM2 / mpp**2))


def _chroma(overview: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the (H, W) chroma after glass is made white, with single outlying pixels removed."""
    low, high = overview.min(axis=2), overview.max(axis=2)
    glass = overview[(low >= GLASS_MIN) & (high - low <= GLASS_CHROMA)]
    white = np.full(3, 255.0)
    if len(glass) >= 0.01 * low.size:
        # Pale tissue may look like glass; the brightest of these pixels are glass, if there is any.
        white = np.percentile(glass, 90, axis=0).clip(GLASS_MIN)
    balance = (np.arange(256)[:, None] * (255.0 / white)).clip(max=255).astype(np.uint8)
    balanced = [balance[:, c][overview[..., c]] for c in range(3)]
    chroma = np.maximum.reduce(balanced) - np.minimum.reduce(balanced)
    return np.asarray(filters.rank.median(chroma, morphology.disk(1)), np.uint8)
