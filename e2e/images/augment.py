"""Augmentation of patches on their device: a pure function of (pixels, seed of each patch).

The order is flip, affine, crop, stain, brightness, contrast, saturation, hue, blur. Normalisation
is no part of it: each encoder does its own (:mod:`e2e.encoders.base`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from e2e.errors import UserError
from e2e.memory import Slabs
from e2e.registry import Registry
from e2e.seeds import uniform

Seeds = NDArray[np.uint64]
Floats = NDArray[np.float64]

# The number of each draw. Runs are repeated by these: new ones are added, none is renumbered.
MIRROR_X, MIRROR_Y, TRANSPOSE = 1, 2, 3
AREA, ASPECT, LEFT, TOP = 4, 5, 6, 7
SHIFT_X, SHIFT_Y, ANGLE, SCALE, SHEAR = 8, 9, 10, 11, 12
BRIGHTNESS, CONTRAST, SATURATION, HUE = 13, 14, 15, 16
STAIN, STAIN_SHIFT = (17, 18, 19), (20, 21, 22)
BLUR, BLUR_SIGMA = 23, 24

MOST = MappingProxyType(
    {"translate": 1.0, "rotate": 180.0, "scale": 9.0, "shear": 89.0}
    | {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}
    | {"stain": 1.0, "stain_shift": 1.0, "blur": 1.0}
)
"""The greatest strength of each option; the least is 0, which is off."""

SHRINKS = 1.5
"""A window this many times the side of the result is antialiased: below, it hardly matters."""


@dataclass(frozen=True)
class Augment:
    """What is done to training patches; every draw is made for each patch by itself, uniformly.

    Args:
        size: side of the result in pixels; None leaves it as stored.
        flip: ``turns``: mirror and turn by right angles (the eight symmetries of the square,
            equally likely; a patch that is not square is mirrored only); ``mirrors``: left-right
            and up-down, each for half of the patches; ``none``.
        crop: least share of the area that a random resized crop keeps; 1 for no crop.
        translate: most shift along each axis, as a share of the side; in whole pixels.
        rotate: most degrees to either side.
        scale: most zoom: by 1/(1+scale) to 1+scale, in and out equally likely.
        shear: most degrees of a slant along x. What these four uncover is black.
        brightness: factor 1-brightness to 1+brightness.
        contrast: likewise, around the patch's mean grey.
        saturation: likewise, around each pixel's grey.
        hue: most turn of the hue, in turns; 0.5 reaches every hue. These four mean what they mean
            to torchvision's ColorJitter, but come in this order, not a drawn one.
        stain: factor 1-stain to 1+stain for each of haematoxylin, eosin and DAB.
        stain_shift: most that is added to each stain, in the units of ``skimage.color.rgb2hed``:
            tissue has about 0 to 0.2, and 0.02 tints the bare glass visibly.
        blur: share of the patches that are blurred.
        blur_sigma: least and greatest standard deviation of the blur, in pixels of the result.

    Raises:
        UserError: a value out of range.
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
            _refuse("flip", self.flip, "turns, mirrors or none")
        if not 0 < self.crop <= 1:
            _refuse("crop", self.crop, "in (0, 1]")
        for name, most in MOST.items():
            if not 0 <= getattr(self, name) <= most:
                _refuse(name, getattr(self, name), f"in [0, {most:g}]")
        low, high = self.blur_sigma
        if not 0 < low <= high < math.inf:
            _refuse("blur_sigma", self.blur_sigma, "two numbers over 0, the lesser first")

    def __call__(self, pixels: Tensor, seeds: Seeds, shared: Seeds | None = None) -> Tensor:
        """(n,3,H,W) uint8 -> (n,3,size,size): uint8, or float in 0..1 if resampled or recoloured.

        A crop alone stays uint8 on a CPU.

        Without ``size`` a crop is (W,W) and anything else (H,W). The input is left as it is.

        Args:
            pixels: the patches, on any device.
            seeds: (n,), one a patch.
            shared: (n,) seeds for the crop alone: patches with equal ones get the same rectangle,
                as published code that draws one for each quarter of a batch. (That such code flips
                an exact share of the batch, no coin for each patch, is not repeated.)
        """
        if len(pixels) == 0:  # affine_grid refuses an empty batch: the shape, by an example
            return self(pixels.new_zeros(1, *pixels.shape[1:]), np.zeros(1, np.uint64))[:0]
        given = pixels
        if self.flip != "none":
            pixels = flip_and_turn(pixels, seeds, turn=self.flip != "mirrors")
        pixels = self._place(pixels, seeds, seeds if shared is None else shared)
        if pixels is given and pixels.is_floating_point():
            pixels = pixels.clone()  # colours are changed in place
        return self._recolour(pixels, seeds)

    def _place(self, pixels: Tensor, seeds: Seeds, crop_seeds: Seeds) -> Tensor:
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
        if not (
            stains or self.brightness or self.contrast or self.saturation or self.hue or self.blur
        ):
            return pixels
        # From here on the memory is ours, and everything works in it.
        image = pixels / 255 if pixels.dtype == torch.uint8 else pixels

        def factor(draw: int, strength: float) -> Tensor:
            return _column(1 + _either_way(seeds, draw, strength), image)

        if stains:
            scales = np.stack([1 + _either_way(seeds, k, self.stain) for k in STAIN], 1)
            shifts = np.stack([_either_way(seeds, k, self.stain_shift) for k in STAIN_SHIFT], 1)
            image = restain_(image, scales, shifts)
        if self.brightness:
            image.mul_(factor(BRIGHTNESS, self.brightness)).clamp_(0, 1)
        if self.contrast:
            mean = grey(image).mean((1, 2, 3), keepdim=True)
            blend_(image, mean, factor(CONTRAST, self.contrast))
        if self.saturation:
            blend_(image, grey(image), factor(SATURATION, self.saturation))
        if self.hue:
            turn_hue_(image, _column(_either_way(seeds, HUE, self.hue), image))
        if self.blur:
            low, high = self.blur_sigma
            rows = np.flatnonzero(uniform(seeds, BLUR) < self.blur)
            sigmas = low + (high - low) * uniform(seeds[rows], BLUR_SIGMA)
            blur_(image, rows, sigmas, radius=math.ceil(3 * high))
        return image


AUGMENTS: Registry[Augment] = Registry("augmentation")
"""``turns`` and ``none``, and those of the ABMILX project (arXiv 2506.02408) by their names there, which
crop to 224 pixels; the affine map comes before the crop."""

AUGMENTS.register("turns")(Augment)
AUGMENTS.register("none")(functools.partial(Augment, flip="none"))
AUGMENTS.register("weak")(functools.partial(Augment, flip="none", crop=0.08))
AUGMENTS.register("strong")(functools.partial(Augment, flip="mirrors", crop=0.08))
AUGMENTS.register("strong_v2")(functools.partial(Augment, flip="mirrors", crop=0.08, translate=0.5))
AUGMENTS.register("weak_strong")(
    functools.partial(Augment, flip="none", crop=0.08, translate=100 / 256)
)


def _refuse(name: str, value: object, wanted: str) -> None:
    raise UserError(f"augmentation: {name} must be {wanted}, found {value!r}")


def _either_way(seeds: Seeds, draw: int, most: float) -> Floats:
    """(n,) from -most to most."""
    return (2 * uniform(seeds, draw) - 1) * most


def _column(values: Floats, image: Tensor) -> Tensor:
    """(n,) -> (n,1,1,1) beside the image."""
    return torch.from_numpy(values).to(image.device, image.dtype).view(-1, 1, 1, 1)


def resize(pixels: Tensor, size: int | None) -> Tensor:
    """(n,3,H,W) uint8 -> (n,3,size,size) float in 0..1, antialiased; itself when it has the size."""
    if size is None or pixels.shape[-2:] == (size, size):
        return pixels
    small = F.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True)
    return small.clamp_(0, 255).div_(255)


def flip_and_turn(pixels: Tensor, seeds: Seeds, *, turn: bool = True) -> Tensor:
    """Each patch under one of the square's eight symmetries; of the four mirrorings without ``turn``.

    By index, so no value changes, and only on the patches whose coin fell so.
    """
    draws = (MIRROR_X, MIRROR_Y, TRANSPOSE)
    coins = np.stack([uniform(seeds, draw) < 0.5 for draw in draws], 1)
    if not (turn and pixels.shape[-1] == pixels.shape[-2]):
        coins[:, 2] = False
    if pixels.dtype == torch.uint8 and pixels.device.type == "cpu":
        return _turn_bytes(pixels, coins)
    pixels = pixels.clone()
    turns = (lambda some: some.flip(-1), lambda some: some.flip(-2), lambda some: some.mT)
    for coin, turned in zip(coins.T, turns, strict=True):
        index = torch.from_numpy(np.flatnonzero(coin)).to(pixels.device)
        pixels[index] = turned(pixels[index])
    return pixels


def _turn_bytes(pixels: Tensor, coins: NDArray[np.bool_]) -> Tensor:
    """Patch by patch, pixels as units of bytes: several times as fast as by single bytes."""
    count, channels, height, width = pixels.shape
    whole = pixels.permute(0, 2, 3, 1).contiguous()
    memory = _TURNED.take((count, height, width, channels), torch.uint8)
    found = memory.numpy().view(f"V{channels}")[..., 0]
    for patch, (x, y, transpose), out in zip(whole, coins, found, strict=True):
        # PyTorch mirrors the units of a row ten times as fast as NumPy, which transposes faster.
        patch = (patch.flip(1) if x else patch).numpy().view(f"V{channels}")[..., 0]
        turned = patch[:: -1 if y else 1]
        out[...] = turned.T if transpose else turned
    return memory.permute(0, 3, 1, 2)


_TURNED = Slabs()


def random_windows(seeds: Seeds, least_area: float) -> Floats:
    """(n,4) x, y, width, height: a window of ``least_area`` to 1 of the area, aspect 3/4 to 4/3.

    Centre and half size in coordinates from -1 to 1 over the patch. A large window's aspect is
    held to what fits.
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
    """(n,2,3) affine maps from places in the result to places in the patch (H,W).

    The conventions are those of ``torchvision.transforms.v2.functional.affine``: about the middle,
    sheared, then turned, then zoomed, then shifted by whole pixels.
    """
    sides = np.array(shape[::-1], np.float64)
    shift = np.stack([uniform(seeds, SHIFT_X), uniform(seeds, SHIFT_Y)], 1)
    return motions(
        np.round((2 * shift - 1) * translate * sides),
        _either_way(seeds, ANGLE, rotate),
        (1 + scale) ** _either_way(seeds, SCALE, 1),
        _either_way(seeds, SHEAR, shear),
        shape,
    )


def motions(
    shift: Floats, angle: Floats, zoom: Floats, shear: Floats, shape: tuple[int, int]
) -> Floats:
    """(n,2,3) from (n,2) pixels, (n,) degrees, (n,) factors and (n,) degrees: ``random_motion``."""
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    slant = np.tan(np.radians(shear))
    rows = [[cos, -cos * slant - sin], [sin, -sin * slant + cos]]
    forward = zoom[:, None, None] * np.moveaxis(np.array(rows), -1, 0)
    back = np.linalg.inv(forward)
    half = np.array(shape[::-1]) / 2  # pixels in one unit of -1..1
    offset = -np.einsum("nij,nj->ni", back, shift) / half
    return np.concatenate([back * half / half[:, None], offset[:, :, None]], 2)


def resample(
    pixels: Tensor,
    shape: tuple[int, int],
    windows: Floats | None = None,
    motion: Floats | None = None,
) -> Tensor:
    """(n,3,H,W) in 0..255 moved, then cut to a window, bilinear: (n,3,*shape) float in 0..1.

    Both at once, in a single sampling of the patch. Against two in a row, each to whole pixels:
    a shift by whole pixels gives the same, a rotation, zoom or shear is blurred once, not twice.
    What the motion uncovers is black, and the window sees the patch's edge or the black there.

    The sampling has no antialiasing; 256 pixels to 224 shrink a window by 1.14 at most. A window
    more than :data:`SHRINKS` times the result is antialiased, and its patch's motion then is a
    sampling of its own before it. A motion's own zoom is never antialiased.

    Args:
        pixels: of any type.
        shape: height and width of the result.
        windows: (n,4) of :func:`random_windows`, taken in whole pixels; None: the whole patch.
        motion: (n,2,3) of :func:`random_motion`; None: none.
    """
    image = pixels.float()
    if windows is None:
        windows = _whole(len(image))
    else:
        sides = np.array(image.shape[:-3:-1])
        corner, extent = np.split(window_boxes(windows, image.shape[-2:]), 2, axis=1)
        windows = np.concatenate([(2 * corner + extent) / sides - 1, extent / sides], 1)
    shrinks = windows[:, 2:] * image.shape[:-3:-1] / shape[::-1]
    wide = (shrinks > SHRINKS).any(axis=1)
    if not wide.any():
        image = _sample(image, windows, shape, motion)
    else:
        patches, image = image, image.new_empty(len(image), 3, *shape)
        for rows, cut in ((np.flatnonzero(~wide), _sample), (np.flatnonzero(wide), _shrink)):
            if len(rows):
                index = torch.from_numpy(rows).to(image.device)
                own = None if motion is None else motion[rows]
                image[index] = cut(patches[index], windows[rows], shape, own)
    return image.clamp_(0, 255).div_(255)


_CROPS = Slabs()


def cut_bytes(pixels: Tensor, shape: tuple[int, int], windows: Floats) -> Tensor:
    """As :func:`resample` without a motion, but antialiased and rounded to bytes: uint8.

    On a CPU several times as fast, patch by patch. Torchvision crops images in this way.
    """
    size = (len(pixels), *shape, pixels.shape[1])
    found = _CROPS.take(size, torch.uint8).permute(0, 3, 1, 2)
    boxes = window_boxes(windows, pixels.shape[-2:]).tolist()
    for number, (x, y, width, height) in enumerate(boxes):
        window = pixels[number : number + 1, :, y : y + height, x : x + width]
        found[number] = F.interpolate(window, shape, mode="bilinear", antialias=True)[0]
    return found


def window_boxes(windows: Floats, shape: Sequence[int]) -> NDArray[np.int64]:
    """(n,4) left, top, width, height in whole pixels of a patch (H,W), as torchvision's crops have."""
    sides = np.array(shape[::-1])
    middle, half = (windows[:, :2] + 1) / 2 * sides, windows[:, 2:] / 2 * sides
    extent = np.clip(np.round(2 * half), 1, sides)
    corner = np.clip(np.round(middle - half), 0, sides - extent)
    return np.concatenate([corner, extent], 1).astype(np.int64)


def _whole(count: int) -> Floats:
    """The windows that leave nothing out."""
    return np.tile([0.0, 0.0, 1.0, 1.0], (count, 1))


def _sample(
    image: Tensor, windows: Floats, shape: tuple[int, ...], motion: Floats | None
) -> Tensor:
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


def _shrink(
    image: Tensor, windows: Floats, shape: tuple[int, ...], motion: Floats | None
) -> Tensor:
    """Antialiased: sums over rows and columns by triangles as wide as the step between pixels.

    The same as ``F.interpolate(antialias=True)`` of the window, except that the pixels at its rim
    see what lies beyond it in the patch.
    """
    if motion is not None:
        image = _sample(image, _whole(len(image)), image.shape[-2:], motion)

    def taps(centre: Floats, share: Floats, old: int, new: int) -> Tensor:
        step = _column(share * old / new, image)
        start = _column((1 + centre - share) / 2 * old, image)
        middles = start + step * (torch.arange(new, device=image.device) + 0.5).view(-1, 1)
        places = torch.arange(old, device=image.device) + 0.5
        weights = (1 - (places - middles).abs() / step.clamp(min=1)).clamp_(min=0)
        return weights / weights.sum(-1, keepdim=True)  # (n,1,new,old)

    x, y, width, height = windows.T
    across = taps(x, width, image.shape[-1], shape[1])
    return taps(y, height, image.shape[-2], shape[0]) @ (image @ across.mT)


def grey(image: Tensor) -> Tensor:
    """(n,3,H,W) -> (n,1,H,W) luma, with torchvision's weights."""
    red, green, blue = image.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def blend_(image: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """In place, ``other`` at 0, the image at 1, and as far beyond: in 0..1."""
    return image.mul_(factor).add_((1 - factor) * other).clamp_(0, 1)


def turn_hue_(image: Tensor, turns: Tensor) -> Tensor:
    """In place, the hue of (n,3,H,W) in 0..1 by (n,1,1,1) turns; value and saturation stay."""
    red, green, blue = channels = image.split(1, dim=1)
    value = image.amax(1, keepdim=True)
    chroma = value - image.amin(1, keepdim=True)
    some = chroma.clamp(min=1e-12)  # grey has no hue, and chroma 0 keeps it grey
    sixths = torch.where(
        value == red,
        (green - blue) / some,
        torch.where(value == green, 2 + (blue - red) / some, 4 + (red - green) / some),
    )
    sixths += 6 * turns
    for channel, start in zip(channels, (5, 3, 1), strict=True):
        k = (sixths + start).remainder_(6)
        channel.copy_(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return image


# Rows: haematoxylin, eosin, DAB; columns: what they take from red, green, blue.
# Ruifrok & Johnston, Quantification of histochemical staining by color deconvolution (2001).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
DARKEST = 1e-6


def restain_(image: Tensor, scales: Floats, shifts: Floats) -> Tensor:
    """(n,3,H,W) in 0..1 with each stain c at c * scale + shift, both (n,3); the input is used up.

    The units are those of ``skimage.color.rgb2hed``. A negative amount, which that sets to 0, is
    kept, so that scale 1 and shift 0 change nothing.
    """
    # To stains, scaled, and back is one matrix a patch; optical densities are mixed by it.
    mix = np.linalg.inv(STAINS) @ (scales[:, :, None] * STAINS)
    matrix = torch.from_numpy(mix).to(image.device, image.dtype)
    offset = torch.from_numpy((shifts @ STAINS)[:, :, None]).to(image.device, image.dtype)
    density = image.clamp_(min=DARKEST).log_().div_(math.log(DARKEST)).flatten(2)
    mixed = torch.baddbmm(offset, matrix.mT, density).view_as(image)
    return mixed.mul_(math.log(DARKEST)).exp_().clamp_(0, 1)


def blur_(image: Tensor, rows: NDArray[np.int64], sigmas: Floats, radius: int) -> Tensor:
    """In place, a Gaussian of its own over each of the ``rows``; the patch goes on by reflection.

    The kernel is cut at ``radius`` pixels, and at the patch's side.
    """
    if not len(rows):
        return image
    height, width = image.shape[-2:]
    radius = min(radius, height - 1, width - 1)
    index = torch.from_numpy(rows).to(image.device)
    steps = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernels = torch.exp(-0.5 * (steps / _column(sigmas, image)) ** 2)
    kernels = (kernels / kernels.sum(-1, keepdim=True)).repeat_interleave(3, dim=0)
    # One channel for each plane of each patch: a convolution by groups keeps them apart.
    planes = F.pad(image[index], [radius] * 4, mode="reflect").flatten(0, 1).unsqueeze(0)
    planes = F.conv2d(planes, kernels, groups=3 * len(rows))
    planes = F.conv2d(planes, kernels.mT, groups=3 * len(rows))
    image[index] = planes.view(len(rows), 3, height, width)
    return image
