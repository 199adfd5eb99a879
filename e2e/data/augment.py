"""Augmentation of patches on their device: a pure function of (pixels, seed of each patch)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from e2e.data.sampler import uniform


@dataclass(frozen=True)
class Augment:
    """What is done to training patches; every draw is made for each patch by itself.

    Args:
        flip: mirror and turn by right angles (the eight symmetries of the square, equally likely).
        crop: least share of the area that a random resized crop keeps; 1 for no crop.
        size: side of the result in pixels; None leaves it as stored.
    """

    flip: bool = True
    crop: float = 1.0
    size: int | None = None

    def __call__(self, pixels: Tensor, seeds: NDArray[np.uint64]) -> Tensor:
        """(n,3,H,W) uint8 -> (n,3,size,size): uint8, or float in 0..1 when resampled."""
        if self.flip:
            pixels = flip_and_turn(pixels, seeds)
        if self.crop < 1:
            return random_resized_crop(pixels, seeds, self.crop, self.size or pixels.shape[-1])
        return resize(pixels, self.size)


def resize(pixels: Tensor, size: int | None) -> Tensor:
    """(n,3,H,W) uint8 -> (n,3,size,size) float in 0..1, antialiased; itself when it has the size."""
    if size is None or pixels.shape[-2:] == (size, size):
        return pixels
    small = F.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True)
    return small.clamp_(0, 255).div_(255)


def flip_and_turn(pixels: Tensor, seeds: NDArray[np.uint64]) -> Tensor:
    """Each patch under one of the square's eight symmetries."""

    def coin(draw: int) -> Tensor:
        heads = torch.from_numpy(uniform(seeds, draw) < 0.5).to(pixels.device)
        return heads.view(-1, 1, 1, 1)

    pixels = torch.where(coin(1), pixels.flip(-1), pixels)
    pixels = torch.where(coin(2), pixels.flip(-2), pixels)
    if pixels.shape[-1] == pixels.shape[-2]:
        pixels = torch.where(coin(3), pixels.transpose(-1, -2), pixels)
    return pixels


def random_resized_crop(
    pixels: Tensor, seeds: NDArray[np.uint64], least_area: float, size: int
) -> Tensor:
    """A window of ``least_area`` to 1 of the area, aspect 3/4 to 4/3, resampled to ``size``.

    A large window's aspect is held to what fits. Bilinear. Returns float in 0..1.
    """
    area = least_area + (1 - least_area) * uniform(seeds, 4)
    aspect = np.exp((2 * uniform(seeds, 5) - 1) * math.log(4 / 3))
    aspect = np.clip(aspect, area, 1 / area)  # neither side longer than the patch
    width, height = np.sqrt(area * aspect), np.sqrt(area / aspect)
    # affine_grid wants centre and half size in -1..1.
    x = (1 - width) * (2 * uniform(seeds, 6) - 1)
    y = (1 - height) * (2 * uniform(seeds, 7) - 1)
    zero = np.zeros_like(x)
    theta = np.stack([np.stack([width, zero, x], 1), np.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(
        torch.from_numpy(theta).to(pixels.device, torch.float32),
        [len(pixels), 3, size, size],
        align_corners=False,
    )
    window = F.grid_sample(
        pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return window.clamp_(0, 255).div_(255)
