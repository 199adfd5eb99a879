"""Colours of patches on their device: grey, saturation, hue, stains and blur.

Functions whose name ends in ``_`` change their input in place and return it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from e2e.images.draws import Floats, as_column

# Rows: haematoxylin, eosin, DAB; columns: what they absorb of red, green, blue.
# Ruifrok & Johnston, Quantification of histochemical staining by color deconvolution (2001).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
DARKEST = 1e-6
"""Intensities below this are raised to it before the logarithm."""


def grey(image: Tensor) -> Tensor:
    """Return the luma of (n, 3, H, W) images as (n, 1, H, W), with torchvision's weights."""
    red, green, blue = image.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def blend_(image: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Blend linearly: ``other`` at factor 0, ``image`` at 1, extrapolated beyond; clamped to [0, 1]."""
    return image.mul_(factor).add_((1 - factor) * other).clamp_(0, 1)


def turn_hue_(image: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue; value and saturation stay as they are.

    Parameters
    ----------
    image : (n, 3, H, W) float tensor in [0, 1]
    turns : (n, 1, 1, 1) tensor
        Full turns; 0.5 is the opposite hue.
    """
    red, green, blue = channels = image.split(1, dim=1)
    value = image.amax(1, keepdim=True)
    chroma = value - image.amin(1, keepdim=True)
    divisor = chroma.clamp(min=1e-12)  # grey has no hue, and chroma 0 leaves it grey
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixths += 6 * turns
    for channel, start in zip(channels, (5, 3, 1), strict=True):
        k = (sixths + start).remainder_(6)
        channel.copy_(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return image


def restain_(image: Tensor, scales: Floats, shifts: Floats) -> Tensor:
    """Change the amount c of each stain to c * scale + shift.

    The units are those of ``skimage.color.rgb2hed``. Negative amounts, which that function sets to 0, are
    kept, so that scale 1 and shift 0 change nothing. The memory of the input is overwritten; the result
    may lie elsewhere.

    Parameters
    ----------
    image : (n, 3, H, W) float tensor in [0, 1]
    scales, shifts : (n, 3) arrays
        For haematoxylin, eosin and DAB.
    """
    # To stains, scaled, and back is one matrix for each patch, which mixes optical densities.
    mix = np.linalg.inv(STAINS) @ (scales[:, :, None] * STAINS)
    matrix = torch.from_numpy(mix).to(image.device, image.dtype)
    offset = torch.from_numpy((shifts @ STAINS)[:, :, None]).to(image.device, image.dtype)
    density = image.clamp_(min=DARKEST).log_().div_(math.log(DARKEST)).flatten(2)
    mixed = torch.baddbmm(offset, matrix.mT, density).view_as(image)
    return mixed.mul_(math.log(DARKEST)).exp_().clamp_(0, 1)


def blur_(image: Tensor, rows: NDArray[np.int64], sigmas: Floats, radius: int) -> Tensor:
    """Blur some of the patches, each by a Gaussian of its own; patches are extended by reflection.

    Parameters
    ----------
    image : (n, 3, H, W) float tensor
    rows : (m,) int64 array
        Which patches.
    sigmas : (m,) array
        Standard deviations in pixels.
    radius : int
        The kernel is cut off at this many pixels, and at the side of the patch.
    """
    if not len(rows):
        return image
    height, width = image.shape[-2:]
    radius = min(radius, height - 1, width - 1)
    index = torch.from_numpy(rows).to(image.device)
    steps = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernels = torch.exp(-0.5 * (steps / as_column(sigmas, image)) ** 2)
    kernels = (kernels / kernels.sum(-1, keepdim=True)).repeat_interleave(3, dim=0)
    # One channel for each plane of each patch: a convolution by groups keeps them apart.
    planes = F.pad(image[index], [radius] * 4, mode="reflect").flatten(0, 1).unsqueeze(0)
    planes = F.conv2d(planes, kernels, groups=3 * len(rows))
    planes = F.conv2d(planes, kernels.mT, groups=3 * len(rows))
    image[index] = planes.view(len(rows), 3, height, width)
    return image
