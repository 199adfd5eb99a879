"""Geometry of patches on their device: flips, random crops, affine maps and resampling.

A window is (x, y, width, height): centre and half size in coordinates from -1 to 1 over the patch. A
motion is a (2, 3) affine map from positions in the result to positions in the patch, in the same
coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from e2e.images.draws import (
    ANGLE,
    AREA,
    ASPECT,
    LEFT,
    MIRROR_X,
    MIRROR_Y,
    SCALE,
    SHEAR,
    SHIFT_X,
    SHIFT_Y,
    TOP,
    TRANSPOSE,
    Floats,
    Seeds,
    as_column,
    symmetric_uniform,
)
from e2e.memory import Slabs
from e2e.seeds import uniform

ANTIALIAS_ABOVE = 1.5
"""A window more than this many times the side of the result is antialiased: below, it hardly matters."""

_FLIPPED = Slabs()
_CROPS = Slabs()


def resize(pixels: Tensor, size: int | None) -> Tensor:
    """Resize patches with antialiasing.

    Parameters
    ----------
    pixels : (n, 3, H, W) uint8 tensor
    size : int, optional
        Side of the result; None leaves the patches as they are.

    Returns
    -------
    (n, 3, size, size) float tensor in [0, 1]
        ``pixels`` itself if it has this size already.
    """
    if size is None or pixels.shape[-2:] == (size, size):
        return pixels
    small = F.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True)
    return small.clamp_(0, 255).div_(255)


def flip_and_turn(pixels: Tensor, seeds: Seeds, *, turn: bool = True) -> Tensor:
    """Apply a random symmetry of the square to each patch, all equally likely.

    Parameters
    ----------
    pixels : (n, 3, H, W) tensor
    seeds : (n,) uint64 array
        One seed for each patch.
    turn : bool
        Use all eight symmetries if the patches are square; otherwise only the four mirrorings.

    Returns
    -------
    (n, 3, H, W) tensor
        A new tensor with the same values in other positions.
    """
    draws = (MIRROR_X, MIRROR_Y, TRANSPOSE)
    coins = np.stack([uniform(seeds, draw) < 0.5 for draw in draws], 1)
    if not (turn and pixels.shape[-1] == pixels.shape[-2]):
        coins[:, 2] = False
    if pixels.dtype == torch.uint8 and pixels.device.type == "cpu":
        return _flip_bytes(pixels, coins)
    pixels = pixels.clone()
    flips = (lambda some: some.flip(-1), lambda some: some.flip(-2), lambda some: some.mT)
    for coin, flip in zip(coins.T, flips, strict=True):
        index = torch.from_numpy(np.flatnonzero(coin)).to(pixels.device)
        pixels[index] = flip(pixels[index])
    return pixels


def _flip_bytes(pixels: Tensor, coins: NDArray[np.bool_]) -> Tensor:
    """Patch by patch, with each pixel as one unit: several times as fast as single bytes."""
    count, channels, height, width = pixels.shape
    patches = pixels.permute(0, 2, 3, 1).contiguous()
    memory = _FLIPPED.take((count, height, width, channels), torch.uint8)
    flipped = memory.numpy().view(f"V{channels}")[..., 0]
    for patch, (mirror_x, mirror_y, transpose), out in zip(patches, coins, flipped, strict=True):
        # PyTorch mirrors the pixels of a row ten times as fast as NumPy, which transposes faster.
        mirrored = (patch.flip(1) if mirror_x else patch).numpy().view(f"V{channels}")[..., 0]
        mirrored = mirrored[:: -1 if mirror_y else 1]
        out[...] = mirrored.T if transpose else mirrored
    return memory.permute(0, 3, 1, 2)


def random_windows(seeds: Seeds, least_area: float) -> Floats:
    """Draw crop windows of ``least_area`` to 1 of the patch's area and aspect ratio 3/4 to 4/3.

    The aspect ratio of a large window is limited to what fits.

    Parameters
    ----------
    seeds : (n,) uint64 array
        One seed for each patch.
    least_area : float
        Smallest fraction of the area.

    Returns
    -------
    (n, 4) float64 array
        x, y, width, height as described at the top of this module.
    """
    area = least_area + (1 - least_area) * uniform(seeds, AREA)
    aspect = np.exp((2 * uniform(seeds, ASPECT) - 1) * math.log(4 / 3))
    aspect = np.clip(aspect, area, 1 / area)  # neither side longer than the patch
    width, height = np.sqrt(area * aspect), np.sqrt(area / aspect)
    x = (1 - width) * (2 * uniform(seeds, LEFT) - 1)
    y = (1 - height) * (2 * uniform(seeds, TOP) - 1)
    return np.stack([x, y, width, height], 1)


def random_motion(
    seeds: Seeds,
    shape: tuple[int, int],
    translate: float,
    rotate: float,
    scale: float,
    shear: float,
) -> Floats:
    """Draw affine maps, with the parameters of :class:`e2e.images.augment.Augment`.

    Parameters
    ----------
    seeds : (n,) uint64 array
        One seed for each patch.
    shape : (int, int)
        Height and width of the patches.
    translate, rotate, scale, shear : float
        Strength of each part; 0 is off.

    Returns
    -------
    (n, 2, 3) float64 array
        See :func:`motions`.
    """
    sides = np.array(shape[::-1], np.float64)
    shift = np.stack([uniform(seeds, SHIFT_X), uniform(seeds, SHIFT_Y)], 1)
    return motions(
        np.round((2 * shift - 1) * translate * sides),
        symmetric_uniform(seeds, ANGLE, rotate),
        (1 + scale) ** symmetric_uniform(seeds, SCALE, 1),
        symmetric_uniform(seeds, SHEAR, shear),
        shape,
    )


def motions(
    shift: Floats, angle: Floats, zoom: Floats, shear: Floats, shape: tuple[int, int]
) -> Floats:
    """Return affine maps with the conventions of ``torchvision.transforms.v2.functional.affine``.

    The patch is sheared about its centre, then rotated, then zoomed, then shifted.

    Parameters
    ----------
    shift : (n, 2) array
        x and y in pixels.
    angle : (n,) array
        Degrees.
    zoom : (n,) array
        Factors.
    shear : (n,) array
        Degrees along x.
    shape : (int, int)
        Height and width of the patches.

    Returns
    -------
    (n, 2, 3) float64 array
        Maps from positions in the result to positions in the patch.
    """
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    slant = np.tan(np.radians(shear))
    rows = [[cos, -cos * slant - sin], [sin, -sin * slant + cos]]
    forward = zoom[:, None, None] * np.moveaxis(np.array(rows), -1, 0)
    inverse = np.linalg.inv(forward)
    half = np.array(shape[::-1]) / 2  # pixels in one unit of -1..1
    offset = -np.einsum("nij,nj->ni", inverse, shift) / half
    return np.concatenate([inverse * half / half[:, None], offset[:, :, None]], 2)


def resample(
    pixels: Tensor,
    shape: tuple[int, int],
    windows: Floats | None = None,
    motion: Floats | None = None,
) -> Tensor:
    """Move patches, then cut a window out of each, in a single bilinear sampling.

    Compared with two samplings in a row, each to whole pixels: a shift by whole pixels gives the same; a
    rotation, zoom or shear is blurred once instead of twice. What the motion uncovers is black, and the
    window sees the patch's edge or the black there.

    The sampling has no antialiasing: from 256 pixels to 224 a window shrinks by 1.14 at most. A window
    more than :data:`ANTIALIAS_ABOVE` times the result is antialiased, and its patch is then moved by a
    sampling of its own before. A motion's own zoom is never antialiased.

    Parameters
    ----------
    pixels : (n, 3, H, W) tensor in 0..255, of any type
    shape : (int, int)
        Height and width of the result.
    windows : (n, 4) array, optional
        See :func:`random_windows`; rounded to whole pixels. None is the entire patch.
    motion : (n, 2, 3) array, optional
        See :func:`motions`; None is no motion.

    Returns
    -------
    (n, 3, *shape) float tensor in [0, 1]
    """
    image = pixels.float()
    if windows is None:
        windows = _full_windows(len(image))
    else:
        sides = np.array(image.shape[:-3:-1])
        corner, extent = np.split(window_boxes(windows, image.shape[-2:]), 2, axis=1)
        windows = np.concatenate([(2 * corner + extent) / sides - 1, extent / sides], 1)
    shrink_factors = windows[:, 2:] * image.shape[:-3:-1] / shape[::-1]
    antialias = (shrink_factors > ANTIALIAS_ABOVE).any(axis=1)
    if not antialias.any():
        image = _sample(image, windows, shape, motion)
    else:
        patches, image = image, image.new_empty(len(image), 3, *shape)
        for selected, cut in ((~antialias, _sample), (antialias, _sample_antialiased)):
            rows = np.flatnonzero(selected)
            if len(rows):
                index = torch.from_numpy(rows).to(image.device)
                row_motion = None if motion is None else motion[rows]
                image[index] = cut(patches[index], windows[rows], shape, row_motion)
    return image.clamp_(0, 255).div_(255)


def cut_bytes(pixels: Tensor, shape: tuple[int, int], windows: Floats) -> Tensor:
    """Cut a window out of each patch and resize it with antialiasing, as torchvision crops images.

    On a CPU this is several times as fast as :func:`resample`.

    Parameters
    ----------
    pixels : (n, 3, H, W) uint8 tensor on the CPU
    shape : (int, int)
        Height and width of the result.
    windows : (n, 4) array
        See :func:`random_windows`.

    Returns
    -------
    (n, 3, *shape) uint8 tensor
    """
    memory_shape = (len(pixels), *shape, pixels.shape[1])
    crops = _CROPS.take(memory_shape, torch.uint8).permute(0, 3, 1, 2)
    boxes = window_boxes(windows, pixels.shape[-2:]).tolist()
    for number, (x, y, width, height) in enumerate(boxes):
        window = pixels[number : number + 1, :, y : y + height, x : x + width]
        crops[number] = F.interpolate(window, shape, mode="bilinear", antialias=True)[0]
    return crops


def window_boxes(windows: Floats, shape: Sequence[int]) -> NDArray[np.int64]:
    """Round windows to whole pixels.

    Parameters
    ----------
    windows : (n, 4) array
        See :func:`random_windows`.
    shape : (int, int)
        Height and width of the patches.

    Returns
    -------
    (n, 4) int64 array
        left, top, width, height.
    """
    sides = np.array(shape[::-1])
    middle, half = (windows[:, :2] + 1) / 2 * sides, windows[:, 2:] / 2 * sides
    extent = np.clip(np.round(2 * half), 1, sides)
    corner = np.clip(np.round(middle - half), 0, sides - extent)
    return np.concatenate([corner, extent], 1).astype(np.int64)


def _full_windows(count: int) -> Floats:
    """Windows of the entire patch."""
    return np.tile([0.0, 0.0, 1.0, 1.0], (count, 1))


def _sample(
    image: Tensor, windows: Floats, shape: tuple[int, ...], motion: Floats | None
) -> Tensor:
    """Bilinear sampling of moved patches in windows."""
    x, y, width, height = windows.T
    zero = np.zeros_like(x)
    theta = np.stack([np.stack([width, zero, x], 1), np.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(
        torch.from_numpy(theta).to(image.device, torch.float32),
        [len(image), 3, *shape],
        align_corners=False,
    )
    if motion is None:
        return F.grid_sample(image, grid, "bilinear", "border", align_corners=False)
    # The window repeats the moved patch's outermost pixels, as it would those of an image.
    edge = 1 - 1 / grid.new_tensor(image.shape[:-3:-1])
    grid.clamp_(-edge, edge)
    move = torch.from_numpy(motion).to(grid.device, grid.dtype)
    grid = torch.baddbmm(move[:, None, :, 2], grid.flatten(1, 2), move[..., :2].mT).view_as(grid)
    return F.grid_sample(image, grid, "bilinear", "zeros", align_corners=False)


def _sample_antialiased(
    image: Tensor, windows: Floats, shape: tuple[int, ...], motion: Floats | None
) -> Tensor:
    """Antialiased sampling: sums over rows and columns by triangles as wide as the step between pixels.

    The same as ``F.interpolate(antialias=True)`` of the window, except that the pixels at its rim see
    what lies beyond it in the patch.
    """
    if motion is not None:
        image = _sample(image, _full_windows(len(image)), image.shape[-2:], motion)
    x, y, width, height = windows.T
    across = _triangle_weights(x, width, image.shape[-1], shape[1], image)
    down = _triangle_weights(y, height, image.shape[-2], shape[0], image)
    return down @ (image @ across.mT)


def _triangle_weights(
    centre: Floats, half_size: Floats, old: int, new: int, image: Tensor
) -> Tensor:
    """(n, 1, new, old) weights of the old pixels along one axis in each new pixel."""
    step = as_column(half_size * old / new, image)
    start = as_column((1 + centre - half_size) / 2 * old, image)
    new_positions = start + step * (torch.arange(new, device=image.device) + 0.5).view(-1, 1)
    old_positions = torch.arange(old, device=image.device) + 0.5
    weights = (1 - (old_positions - new_positions).abs() / step.clamp(min=1)).clamp_(min=0)
    return weights / weights.sum(-1, keepdim=True)
