"""Augmentation of patches on their device: a pure function of the pixels and each patch's seed.

The order is flip, affine map, crop, stain, brightness, contrast, saturation, hue, blur. Normalisation is
not part of it: each encoder does its own (:mod:`e2e.encoders.base`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from e2e.errors import UserError
from e2e.images.colour import blend_, blur_, grey, restain_, turn_hue_
from e2e.images.draws import (
    BLUR,
    BLUR_SIGMA,
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    STAIN,
    STAIN_SHIFT,
    Seeds,
    as_column,
    symmetric_uniform,
)
from e2e.images.geometry import (
    cut_bytes,
    flip_and_turn,
    random_motion,
    random_windows,
    resample,
    resize,
)
from e2e.registry import Registry
from e2e.seeds import uniform

MAX_STRENGTH = MappingProxyType(
    {"translate": 1.0, "rotate": 180.0, "scale": 9.0, "shear": 89.0}
    | {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}
    | {"stain": 1.0, "stain_shift": 1.0, "blur": 1.0}
)
"""The greatest value of each strength; the least is 0, which is off."""


@dataclass(frozen=True)
class Augment:
    """Augmentation of training patches. Every random number is drawn for each patch, uniformly.

    Parameters
    ----------
    size : int, optional
        Side of the result in pixels; None leaves it as stored.
    flip : {"turns", "mirrors", "none"}
        ``turns``: mirror and turn by right angles (the eight symmetries of the square, equally likely; a
        patch that is not square is only mirrored). ``mirrors``: left-right and up-down, each for half of
        the patches.
    crop : float
        Smallest fraction of the area in a random resized crop, in (0, 1]; 1 for no crop.
    translate : float
        Greatest shift along each axis as a fraction of the side, rounded to whole pixels.
    rotate : float
        Greatest rotation to either side in degrees.
    scale : float
        Greatest zoom: by 1 / (1 + scale) to 1 + scale, in and out equally likely.
    shear : float
        Greatest shear along x in degrees. What translate, rotate, scale and shear uncover is black.
    brightness : float
        Factor 1 - brightness to 1 + brightness.
    contrast : float
        Likewise, around the mean grey of the patch.
    saturation : float
        Likewise, around the grey of each pixel.
    hue : float
        Greatest turn of the hue in turns; 0.5 reaches every hue. brightness, contrast, saturation and hue
        mean the same as in torchvision's ColorJitter, but come in this order instead of a random one.
    stain : float
        Factor 1 - stain to 1 + stain for each of haematoxylin, eosin and DAB.
    stain_shift : float
        Greatest amount added to each stain, in the units of ``skimage.color.rgb2hed``: tissue has about 0
        to 0.2, and 0.02 tints bare glass visibly.
    blur : float
        Fraction of the patches that are blurred.
    blur_sigma : (float, float)
        Smallest and greatest standard deviation of the blur, in pixels of the result.

    Raises
    ------
    UserError
        If a value is out of range.
    """

    size: int | None = None
    _: KW_ONLY
    flip: str = "turns"
    crop: float = 1.0
    translate: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    stain: float = 0.0
    stain_shift: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        if self.flip not in ("turns", "mirrors", "none"):
            _refuse_value("flip", self.flip, "turns, mirrors or none")
        if not 0 < self.crop <= 1:
            _refuse_value("crop", self.crop, "in (0, 1]")
        for name, maximum in MAX_STRENGTH.items():
            if not 0 <= getattr(self, name) <= maximum:
                _refuse_value(name, getattr(self, name), f"in [0, {maximum:g}]")
        low, high = self.blur_sigma
        if not 0 < low <= high < math.inf:
            _refuse_value("blur_sigma", self.blur_sigma, "two numbers above 0, the smaller first")

    def __call__(self, pixels: Tensor, seeds: Seeds, crop_seeds: Seeds | None = None) -> Tensor:
        """Augment patches; the input is not changed.

        Parameters
        ----------
        pixels : (n, 3, H, W) uint8 tensor
            The patches, on any device.
        seeds : (n,) uint64 array
            One seed for each patch.
        crop_seeds : (n,) uint64 array, optional
            Seeds for the crop alone: patches with equal ones get the same rectangle, as in published code
            that draws one for each quarter of a batch. (Such code flips an exact fraction of the batch
            instead of drawing for each patch, which is not reproduced.)

        Returns
        -------
        (n, 3, size, size) tensor
            uint8, or float in [0, 1] if resampled or recoloured. A crop alone stays uint8 on a CPU.
            Without ``size``, a crop is (W, W) and anything else (H, W).
        """
        if len(pixels) == 0:  # affine_grid refuses an empty batch: take the shape from an example
            return self(pixels.new_zeros(1, *pixels.shape[1:]), np.zeros(1, np.uint64))[:0]
        moved = pixels
        if self.flip != "none":
            moved = flip_and_turn(moved, seeds, turn=self.flip != "mirrors")
        moved = self._crop_and_move(moved, seeds, seeds if crop_seeds is None else crop_seeds)
        if moved is pixels and moved.is_floating_point():
            moved = moved.clone()  # colours are changed in place
        return self._recolour(moved, seeds)

    def _crop_and_move(self, pixels: Tensor, seeds: Seeds, crop_seeds: Seeds) -> Tensor:
        moves = self.translate or self.rotate or self.scale or self.shear
        if self.crop == 1 and not moves:
            return resize(pixels, self.size)
        height, width = pixels.shape[-2:]
        side = self.size or width
        windows, shape = None, (side, side)
        if self.crop < 1:
            windows = random_windows(crop_seeds, self.crop)
        elif self.size is None:
            shape = (height, width)
        motion = None
        if moves:
            motion = random_motion(
                seeds, (height, width), self.translate, self.rotate, self.scale, self.shear
            )
        if motion is None and pixels.dtype == torch.uint8 and pixels.device.type == "cpu":
            assert windows is not None
            return cut_bytes(pixels, shape, windows)
        return resample(pixels, shape, windows, motion)

    def _recolour(self, pixels: Tensor, seeds: Seeds) -> Tensor:
        stains = self.stain or self.stain_shift
        jitter = self.brightness or self.contrast or self.saturation or self.hue
        if not (stains or jitter or self.blur):
            return pixels
        # From here on everything works in place: this memory is not the caller's.
        image = pixels / 255 if pixels.dtype == torch.uint8 else pixels
        if stains:
            scales = np.stack([1 + symmetric_uniform(seeds, k, self.stain) for k in STAIN], 1)
            shifts = np.stack(
                [symmetric_uniform(seeds, k, self.stain_shift) for k in STAIN_SHIFT], 1
            )
            image = restain_(image, scales, shifts)
        if self.brightness:
            image.mul_(_random_factors(seeds, BRIGHTNESS, self.brightness, image)).clamp_(0, 1)
        if self.contrast:
            mean = grey(image).mean((1, 2, 3), keepdim=True)
            blend_(image, mean, _random_factors(seeds, CONTRAST, self.contrast, image))
        if self.saturation:
            factors = _random_factors(seeds, SATURATION, self.saturation, image)
            blend_(image, grey(image), factors)
        if self.hue:
            turn_hue_(image, as_column(symmetric_uniform(seeds, HUE, self.hue), image))
        if self.blur:
            low, high = self.blur_sigma
            rows = np.flatnonzero(uniform(seeds, BLUR) < self.blur)
            sigmas = low + (high - low) * uniform(seeds[rows], BLUR_SIGMA)
            blur_(image, rows, sigmas, radius=math.ceil(3 * high))
        return image


AUGMENTS: Registry[Augment] = Registry("augmentation")
"""``turns`` and ``none``, and the augmentations of the ABMILX project (arXiv 2506.02408) by their names
there, which crop to 224 pixels; the affine map comes before the crop."""

AUGMENTS.register("turns")(Augment)
AUGMENTS.register("none")(functools.partial(Augment, flip="none"))
AUGMENTS.register("weak")(functools.partial(Augment, flip="none", crop=0.08))
AUGMENTS.register("strong")(functools.partial(Augment, flip="mirrors", crop=0.08))
AUGMENTS.register("strong_v2")(functools.partial(Augment, flip="mirrors", crop=0.08, translate=0.5))
AUGMENTS.register("weak_strong")(
    functools.partial(Augment, flip="none", crop=0.08, translate=100 / 256)
)


def _refuse_value(name: str, value: object, requirement: str) -> None:
    raise UserError(f"augmentation: {name} must be {requirement}, got {value!r}")


def _random_factors(seeds: Seeds, draw: int, strength: float, image: Tensor) -> Tensor:
    """(n, 1, 1, 1) factors from 1 - strength to 1 + strength."""
    return as_column(1 + symmetric_uniform(seeds, draw, strength), image)
