"""Overviews of slides: small images, with tissue outlined and patches boxed, that show what was cut."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from skimage.morphology import erosion

from e2e.files import write_atomically
from e2e.wsi import tissue
from e2e.wsi.slide import WholeSlide

MAX_OVERVIEW_PX = 4096
"""Longest side of an overview; it bounds the memory of the tissue mask of the largest slides."""

DRAWING_PX = (640, 1280)
"""Longest side of a drawing, at least and at most."""


def read_overview(slide: WholeSlide) -> tuple[NDArray[np.uint8], float]:
    """Read a small image of a slide, in about the resolution that tissue is found at.

    Returns
    -------
    overview : ndarray of uint8, shape (H, W, 3)
        The image.
    scale : float
        Level-0 pixels per pixel of the image.
    """
    longest = max(slide.width, slide.height)
    scale = max(1.0, tissue.OVERVIEW_MPP / slide.mpp)
    return slide.overview(min(MAX_OVERVIEW_PX, math.ceil(longest / scale)))


def draw_patches(
    path: Path,
    overview: NDArray[np.uint8],
    scale: float,
    coords: NDArray[np.int32],
    level0_px: float,
    mask: NDArray[np.bool_] | None,
) -> None:
    """Write a PNG of the overview with tissue outlined in green and patches boxed in blue.

    Parameters
    ----------
    path : Path
        The PNG.
    overview : ndarray of uint8, shape (H, W, 3)
        Image of the slide.
    scale : float
        Level-0 pixels per pixel of the image.
    coords : ndarray of int32, shape (N, 2)
        Upper left corners of the patches in level-0 pixels.
    level0_px : float
        Side of a patch in level-0 pixels.
    mask : ndarray of bool, shape (H, W), or None
        Tissue mask of the overview.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    longest = max(overview.shape[:2])
    smallest_px, largest_px = DRAWING_PX
    zoom = max(1, smallest_px // longest) if longest <= largest_px else largest_px / longest
    size = round(overview.shape[1] * zoom), round(overview.shape[0] * zoom)
    image = Image.fromarray(overview).resize(size, Image.Resampling.BOX)
    if mask is not None:
        resized = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        outline = resized & ~erosion(resized, np.ones((3, 3), bool))
        image.paste((0, 150, 0), mask=Image.fromarray(outline))
    pen = ImageDraw.Draw(image)
    side = level0_px * zoom / scale
    for x, y in coords * (zoom / scale):
        pen.rectangle((x, y, x + side, y + side), outline=(0, 60, 255))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
