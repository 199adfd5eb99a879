"""The random draws of the augmentation: each has a number, and is a function of a patch's seed alone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from e2e.seeds import uniform

Seeds = NDArray[np.uint64]
"""(n,) one seed for each patch."""
Floats = NDArray[np.float64]

# The number of each draw. Recorded runs depend on them: new draws get new numbers, none is renumbered.
MIRROR_X, MIRROR_Y, TRANSPOSE = 1, 2, 3
AREA, ASPECT, LEFT, TOP = 4, 5, 6, 7
SHIFT_X, SHIFT_Y, ANGLE, SCALE, SHEAR = 8, 9, 10, 11, 12
BRIGHTNESS, CONTRAST, SATURATION, HUE = 13, 14, 15, 16
STAIN, STAIN_SHIFT = (17, 18, 19), (20, 21, 22)
BLUR, BLUR_SIGMA = 23, 24


def symmetric_uniform(seeds: Seeds, draw: int, bound: float) -> Floats:
    """Return one number from -bound to bound for each patch.

    Parameters
    ----------
    seeds : (n,) uint64 array
    draw : int
        Number of the draw.
    bound : float
        Greatest absolute value.

    Returns
    -------
    (n,) float64 array
    """
    return (2 * uniform(seeds, draw) - 1) * bound


def as_column(values: Floats, image: Tensor) -> Tensor:
    """Return (n,) values as (n, 1, 1, 1) in the type and on the device of the image."""
    return torch.from_numpy(values).to(image.device, image.dtype).view(-1, 1, 1, 1)
