"""Find the tissue on a slide: stained pixels of its overview, by a bounded Otsu threshold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from skimage import filters, morphology

METHOD = "chroma-otsu-2"
"""Name of this method in the recipe of a store. Increase the number when masks change."""

OVERVIEW_MPP = 8.0
"""Micrometres per overview pixel at which the constants below were chosen: a cell is about one pixel."""

MIN_THRESHOLD, MAX_THRESHOLD = 12, 20
"""Bounds of Otsu's threshold on chroma (0 to 255). JPEG and sensor noise of bare glass is below the lower
bound, so an empty slide stays empty. The palest eosin is above the upper bound, so a slide full of tissue
is not divided into pale and dark."""

GLASS_MIN, GLASS_CHROMA = 200, 14
"""Glass is at least this bright in each channel, and has at most this chroma."""

TINTED_MIN, TINTED_CHROMA, TINTED_ROUGHNESS = 160, 64, 6.0
"""Tinted glass, such as that of old mounting media, is at least this bright, of at most this chroma, and
differs this little (standard deviation over 5 x 5 pixels). Green is not its weakest channel, as it is in
stained tissue, because haematoxylin and eosin both absorb green."""

FILL = 254
"""A pixel with all channels from here up may be fill of what was not scanned, and says nothing of glass."""

CLOSE_UM, SPECK_UM2, HOLE_UM2 = 24.0, 16_000.0, 60_000.0
"""Radius of the gaps that are closed, and the areas below which tissue is dust and a hole is a vessel or
fat."""


def tissue_mask(overview: NDArray[np.uint8], mpp: float) -> NDArray[np.bool_]:
    """Return where the overview of a slide shows tissue.

    Stained tissue is coloured; glass, scan borders, black ink, shadows and areas that were not scanned
    are grey. So the signal is chroma, the maximum minus the minimum over RGB after glass, which may be
    tinted, has been made white, and the threshold is Otsu's within two bounds. Coloured ink counts as
    tissue.

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
    white = _colour_of_glass(overview)
    balance = (np.arange(256)[:, None] * (255.0 / white)).clip(max=255).astype(np.uint8)
    balanced = [balance[:, c][overview[..., c]] for c in range(3)]
    chroma = np.maximum.reduce(balanced) - np.minimum.reduce(balanced)
    return np.asarray(filters.rank.median(chroma, morphology.disk(1)), np.uint8)


def _colour_of_glass(overview: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return (3,) the colour of bare glass; white if the slide shows none."""
    low, high = overview.min(axis=2), overview.max(axis=2)
    is_scanned = low < FILL
    is_grey = is_scanned & (low >= GLASS_MIN) & (high - low <= GLASS_CHROMA)
    is_tinted = is_scanned & _looks_tinted(overview, low, high)
    # Where both occur, what there is much more of is the glass; the other is tissue, dust or a bubble.
    glass = overview[is_tinted if is_tinted.sum() > 3 * is_grey.sum() else is_grey]
    if len(glass) < 0.01 * low.size:
        return np.full(3, 255.0)
    # Pale tissue may look like glass; the brightest of these pixels are glass, if there is any.
    return np.percentile(glass, 90, axis=0).clip(TINTED_MIN)


def _looks_tinted(
    overview: NDArray[np.uint8], low: NDArray[np.uint8], high: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """Return (H, W) where the overview is bright, smooth, and of a colour that stains do not have."""
    red, green, blue = np.moveaxis(overview.astype(np.float32), 2, 0)
    variance = uniform_filter(green**2, 5) - uniform_filter(green, 5) ** 2
    has_colour_of_glass = 2 * green >= red + blue
    is_bright = (low >= TINTED_MIN) & (high >= GLASS_MIN)
    is_pale = (high - low > GLASS_CHROMA) & (high - low <= TINTED_CHROMA)
    return has_colour_of_glass & is_bright & is_pale & (variance <= TINTED_ROUGHNESS**2)
