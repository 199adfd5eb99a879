"""Augmentation: per patch, a function of its seed alone, and geometry that can be worked out."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import hed2rgb, rgb2hed
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from e2e.errors import UserError
from e2e.images import draws as augment_draws
from e2e.images.augment import AUGMENTS, MAX_STRENGTH, Augment
from e2e.images.colour import restain_
from e2e.images.draws import (
    BLUR,
    BLUR_SIGMA,
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    STAIN,
    STAIN_SHIFT,
)
from e2e.images.geometry import (
    cut_bytes,
    flip_and_turn,
    motions,
    random_motion,
    random_windows,
    resample,
    resize,
    window_boxes,
)
from e2e.seeds import patch_seeds, uniform

SEEDS = patch_seeds(1, np.arange(400))
seed_arrays = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12).map(
    lambda values: np.array(values, np.uint64)
)


def patches(count: int, height: int = 6, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def symmetries(patch: Tensor) -> list[Tensor]:
    turned = [torch.rot90(patch, turns, (-2, -1)) for turns in range(4)]
    return turned + [image.flip(-1) for image in turned]


def test_each_patch_is_one_of_its_eight_symmetries_and_all_are_equally_likely():
    patch = patches(1)[0]
    results = flip_and_turn(patch.expand(400, -1, -1, -1), SEEDS)
    kinds = [
        [torch.equal(result, symmetry) for symmetry in symmetries(patch)] for result in results
    ]
    assert all(sum(kind) == 1 for kind in kinds)
    counts = np.sum(kinds, axis=0)
    # 400 / 8 = 50 each, standard deviation 6.6.
    assert counts.min() > 50 - 5 * 6.6
    assert counts.max() < 50 + 5 * 6.6


def test_patches_that_are_not_square_are_mirrored_only():
    patch = patches(1, 4, 6)[0]
    results = flip_and_turn(patch.expand(100, -1, -1, -1), SEEDS[:100])
    mirrored = [patch, patch.flip(-1), patch.flip(-2), patch.flip((-2, -1))]
    kinds = {i for result in results for i, m in enumerate(mirrored) if torch.equal(result, m)}
    assert kinds == {0, 1, 2, 3}
    assert results.shape == (100, 3, 4, 6)


EVERYTHING = Augment(
    flip="turns",
    crop=0.3,
    size=9,
    translate=0.3,
    rotate=90,
    scale=0.5,
    shear=20,
    brightness=0.5,
    contrast=0.5,
    saturation=0.5,
    hue=0.5,
    stain=0.3,
    stain_shift=0.03,
    blur=0.5,
)
ONE_BY_ONE = [
    AUGMENTS.build("none", **{name: value})
    for name, value in (
        {"crop": 0.3, "translate": 0.5, "rotate": 90, "scale": 0.5, "shear": 20}
        | {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.5}
        | {"stain": 0.3, "stain_shift": 0.03, "blur": 0.5}
    ).items()
]
ALL = [*ONE_BY_ONE, EVERYTHING, *map(AUGMENTS.build, AUGMENTS.names())]


@settings(max_examples=30)
@given(seeds=seed_arrays, cut=st.integers(0, 12), data=st.data())
def test_a_patch_does_not_depend_on_its_chunk_whatever_is_done(seeds, cut, data):
    augment = data.draw(st.sampled_from(ALL))
    pixels = patches(len(seeds), 12, data.draw(st.sampled_from([12, 17])))
    together = augment(pixels, seeds)
    pieces = torch.cat(
        [augment(pixels[part], seeds[part]) for part in (slice(cut), slice(cut, None))]
    )
    torch.testing.assert_close(pieces, together, rtol=0, atol=1e-6)
    assert torch.equal(augment(pixels, seeds), together)


@settings(max_examples=20)
@given(
    seeds=seed_arrays, cut=st.integers(0, 12), flip=st.sampled_from(["turns", "mirrors", "none"])
)
def test_flips_do_not_depend_on_the_chunk_to_the_bit(seeds, cut, flip):
    pixels, augment = patches(len(seeds)), Augment(flip=flip)
    pieces = [augment(pixels[part], seeds[part]) for part in (slice(cut), slice(cut, None))]
    assert torch.equal(torch.cat(pieces), augment(pixels, seeds))


@settings(max_examples=25)
@given(
    seeds=seed_arrays,
    cut=st.integers(0, 12),
    flip=st.sampled_from(["turns", "none"]),
    data=st.data(),
)
def test_a_patch_does_not_depend_on_its_chunk(seeds, cut, flip, data):
    crop = data.draw(st.sampled_from([0.08, 0.5, 1.0]))
    augment = Augment(flip=flip, crop=crop, size=data.draw(st.sampled_from([None, 4, 6, 9])))
    pixels = patches(len(seeds))
    together = augment(pixels, seeds)
    pieces = [
        augment(pixels[part], seeds[part])
        for part in (slice(cut), slice(cut, None))
        if len(seeds[part])
    ]
    assert torch.equal(torch.cat(pieces), together)
    assert torch.equal(augment(pixels, seeds), together)


@pytest.mark.parametrize("augment", [Augment(crop=0.3, size=4), *ALL], ids=repr)
def test_the_input_is_left_as_it_was(augment):
    pixels = patches(10)
    before = pixels.clone()
    augment(pixels, SEEDS[:10])
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("augment", ALL, ids=repr)
def test_bytes_stay_bytes_only_where_nothing_is_moved_or_recoloured(augment):
    result = augment(patches(40), SEEDS[:40])
    if augment in (Augment(flip=augment.flip), Augment(flip=augment.flip, crop=augment.crop)):
        assert result.dtype == torch.uint8
    else:
        assert result.dtype == torch.float32
        assert result.min() >= 0
        assert result.max() <= 1
        assert result.max() > 0.9  # not divided twice


@pytest.mark.parametrize("shape", [(12, 12), (10, 15)])
@pytest.mark.parametrize("augment", ALL, ids=repr)
def test_no_patches_have_the_shape_and_type_of_some(augment, shape):
    none = augment(patches(0, *shape), SEEDS[:0])
    some = augment(patches(3, *shape), SEEDS[:3])
    assert none.dtype == some.dtype
    assert none.shape == (0, *some.shape[1:])
    side = augment.size or shape[1]
    cut = augment.crop < 1 or augment.size
    assert some.shape[2:] == ((side, side) if cut else shape)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("augment", [Augment(), *ALL], ids=repr)
def test_a_gpu_gives_what_the_cpu_gives(augment):
    pixels = patches(40, 64, 64)
    on_gpu = augment(pixels.cuda(), SEEDS[:40]).cpu()
    torch.testing.assert_close(on_gpu, augment(pixels, SEEDS[:40]), rtol=0, atol=1e-3)


def test_the_old_draws_stay_as_they_are():
    # Golden runs hang on them.
    pixels, seeds = patches(16), SEEDS[:16]
    flipped = Augment(flip="turns")(pixels, seeds)
    assert hashlib.sha256(flipped.numpy().tobytes()).hexdigest()[:16] == "df6ca3c25f002528"
    window = Augment(flip="none", crop=0.3)(pixels, seeds)[:4, 0, 2, 3]
    assert window.tolist() == [92, 151, 120, 144]


def test_without_flip_crop_and_size_nothing_changes():
    pixels = patches(5)
    assert Augment(flip="none", crop=1.0, size=None)(pixels, SEEDS[:5]) is pixels
    assert Augment(flip="none", crop=1.0, size=6)(pixels, SEEDS[:5]) is pixels
    assert Augment(flip="turns")(pixels, SEEDS[:5]).dtype == torch.uint8


def random_resized_crop(pixels, seeds, least_area: float, size: int) -> torch.Tensor:
    """The crop as it is made of floats, and on a GPU."""
    return resample(pixels, (size, size), random_windows(seeds, least_area))


@given(seeds=seed_arrays, value=st.integers(0, 255), size=st.integers(1, 12))
def test_a_crop_of_one_colour_is_that_colour(seeds, value, size):
    plain = torch.full((len(seeds), 3, 7, 7), value, dtype=torch.uint8)
    cropped = random_resized_crop(plain, seeds, 0.08, size)
    assert cropped.shape == (len(seeds), 3, size, size)
    torch.testing.assert_close(cropped, torch.full_like(cropped, value / 255))


@pytest.mark.parametrize("least_area", [0.08, 0.9])
def test_a_window_lies_within_the_patch(least_area):
    x, y, width, height = random_windows(SEEDS, least_area).T
    for place, length in ((x, width), (y, height)):
        assert (abs(place) + length <= 1 + 1e-12).all()


def windows(least_area: float, side: int = 64, size: int = 32) -> np.ndarray:
    """(n, 4) left, top, width, height as shares of the side, measured on the pixels.

    Red rises by one a pixel from left to right, green from top to bottom. Rows and columns
    away from the border give the line, free of its clamping there.
    """
    ramp = torch.arange(side, dtype=torch.float64)
    pixels = torch.stack(
        [ramp.expand(side, side), ramp.expand(side, side).T, 0 * ramp.expand(side, side)]
    )
    cut = 255 * random_resized_crop(pixels.expand(400, -1, -1, -1), SEEDS, least_area, size)
    middle = slice(size // 4, 3 * size // 4)
    spans = []
    for axis, channel in ((2, 0), (1, 1)):
        line = cut[:, channel].double().mean(dim=3 - axis).numpy()[:, middle]
        steps = np.arange(size)[middle]
        slope, start = np.polyfit(steps, line.T, 1)
        length = slope * size / side
        spans.append((((start + 0.5) - slope / 2) / side, length))
    (left, width), (top, height) = spans
    return np.stack([left, top, width, height], axis=1)


def test_a_crop_is_a_window_of_the_promised_area_and_aspect():
    left, top, width, height = windows(0.2).T
    width, height = np.minimum(width, 1 - 1e-9), np.minimum(height, 1 - 1e-9)
    slack, pixel = 2e-3, 1 / 64  # windows come in whole pixels of 64
    assert (left > -slack).all()
    assert (top > -slack).all()
    assert (left + width < 1 + slack).all()
    assert (top + height < 1 + slack).all()
    for edge in (left, top, left + width, top + height):
        np.testing.assert_allclose(64 * edge, np.round(64 * edge), atol=0.2)
    area, aspect = width * height, width / height
    inside = (width < 1 - 1.5 * pixel) & (height < 1 - 1.5 * pixel)
    assert inside.sum() > 200
    assert (area[inside] > 0.2 - pixel).all()
    assert (aspect > 3 / 4 - 2 * pixel).all()
    assert (aspect < 4 / 3 + 4 * pixel).all()
    # All of the range is used, and no side is favoured.
    assert area.min() < 0.25
    assert area.max() > 0.85
    assert abs(np.log(aspect).mean()) < 5 * np.log(4 / 3) / np.sqrt(3 * 400)
    across, down = (left / (1 - width))[inside], (top / (1 - height))[inside]
    for place in (across, down):
        assert abs(place.mean() - 0.5) < 5 / np.sqrt(12 * len(place))
    assert abs(np.corrcoef(across, down)[0, 1]) < 5 / np.sqrt(len(across))


def test_a_crop_by_hand():
    # Area 1/4 and aspect 1, so a window of half the side; its left edge at 3/4 of the way that is
    # left, its top edge at 1/4: x 3..7, y 1..5 of 8. Four pixels to four pixels: a plain cut.
    draws = {4: 0.0, 5: 0.5, 6: 0.75, 7: 0.25}
    seed = seed_with(draws)
    pixels = patches(1, 8, 8)
    cut = random_resized_crop(pixels, np.array([seed], np.uint64), 0.25, 4)
    x, y = 3, 1
    expected = pixels[:, :, y : y + 4, x : x + 4].float() / 255
    assert torch.allclose(cut, expected, atol=0.08), (cut - expected).abs().max()


def seed_with(draws: dict[int, float], tries: int = 4_000_000) -> int:
    """A seed whose draws are near the wanted ones: searched, because none can be set."""
    seeds = np.arange(tries, dtype=np.uint64)
    for draw, value in draws.items():
        seeds = seeds[np.abs(uniform(seeds, draw) - value) < 0.02]
    miss = sum(np.abs(uniform(seeds, draw) - value) for draw, value in draws.items())
    return int(seeds[np.argmin(miss)])


def test_resizing_by_half_blurs_as_it_should():
    # Antialiased bilinear to half the size: a triangle of four taps, 1 3 3 1 over 8.
    line = torch.tensor([0, 0, 0, 240, 0, 0, 0, 0], dtype=torch.uint8)
    small = resize(line.expand(1, 3, 8, 8).clone(), 4)
    expected = torch.tensor([0.0, 3 / 8, 1 / 8, 0.0]) * 240 / 255
    torch.testing.assert_close(small[0, 0, 0], expected)
    assert small.shape == (1, 3, 4, 4)


@pytest.mark.parametrize("size", [3, 12, 32])
def test_resizing_agrees_with_torch_and_stays_in_range(size):
    pixels = patches(3, 12, 12)
    result = resize(pixels, size)
    expected = F.interpolate(pixels.double(), (size, size), mode="bilinear", antialias=True) / 255
    torch.testing.assert_close((result.double() if size != 12 else result.double() / 255), expected)
    assert float(resize(pixels, 5).min()) >= 0
    assert float(resize(pixels, 5).max()) <= 1


# Flips


def test_mirrors_are_the_four_mirrorings_equally_likely_and_nothing_turns():
    patch = patches(1)[0]
    results = Augment(flip="mirrors")(patch.expand(400, -1, -1, -1), SEEDS)
    mirrored = [patch, patch.flip(-1), patch.flip(-2), patch.flip((-2, -1))]
    counts = [sum(torch.equal(result, m) for result in results) for m in mirrored]
    assert sum(counts) == 400
    assert min(counts) > 100 - 5 * 8.7  # standard deviation of 400 / 4
    assert max(counts) < 100 + 5 * 8.7


def test_turns_turn_and_none_leaves():
    pixels, seeds = patches(30), SEEDS[:30]
    assert torch.equal(Augment()(pixels, seeds), Augment(flip="turns")(pixels, seeds))
    assert not torch.equal(Augment()(pixels, seeds), Augment(flip="mirrors")(pixels, seeds))
    assert Augment(flip="none")(pixels, seeds) is pixels


# Affine


@pytest.mark.parametrize(
    ("shift", "angle", "zoom", "shear"),
    [
        ((3, -5), 0, 1, 0),
        ((0, 0), 90, 1, 0),
        ((0, 0), 30, 1, 0),
        ((0, 0), 0, 1.7, 0),
        ((0, 0), 0, 1, 20),
        ((-4, 2), -40, 0.6, 15),
    ],
)
@pytest.mark.parametrize("shape", [(16, 16), (12, 20)])
def test_an_affine_map_is_torchvisions(shift, angle, zoom, shear, shape):
    pixels = patches(2, *shape)
    a, z, s = (np.array([value, value], np.float64) for value in (angle, zoom, shear))
    motion = motions(np.array([shift, shift], np.float64), a, z, s, shape)
    result = resample(pixels, shape, motion=motion)
    expected = tv.affine(
        pixels.float() / 255,
        angle,
        list(shift),
        zoom,
        [shear, 0.0],
        interpolation=tv.InterpolationMode.BILINEAR,
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


def test_shifts_are_whole_pixels_up_to_their_share_of_each_side_and_use_all_of_it():
    motion = random_motion(SEEDS, (100, 50), translate=0.2, rotate=0, scale=0, shear=0)
    pixels = -motion[:, :, 2] * [25, 50]  # half of width and height
    np.testing.assert_allclose(pixels, np.round(pixels), atol=1e-9)
    np.testing.assert_array_equal(np.abs(np.round(pixels)).max(0), [10, 20])
    assert (np.abs(pixels.mean(0)) < 5 * np.array([10, 20]) / np.sqrt(3 * 400)).all()
    np.testing.assert_allclose(motion[:, :, :2], np.tile(np.eye(2), (400, 1, 1)))


def test_rotation_scale_and_shear_fill_their_ranges():
    turned = np.linalg.inv(random_motion(SEEDS, (8, 8), 0, 30, 0, 0)[:, :, :2])
    angles = np.degrees(np.arctan2(turned[:, 1, 0], turned[:, 0, 0]))
    zoomed = 1 / random_motion(SEEDS, (8, 8), 0, 0, 1, 0)[:, 0, 0]
    sheared = np.linalg.inv(random_motion(SEEDS, (8, 8), 0, 0, 0, 20)[:, :, :2])
    slants = np.degrees(np.arctan(sheared[:, 0, 1]))
    for drawn, most in ((angles, 30), (np.log2(zoomed), 1), (slants, 20)):
        assert np.abs(drawn).max() <= most * (1 + 1e-9)
        assert drawn.min() < -0.95 * most
        assert drawn.max() > 0.95 * most
        assert abs(drawn.mean()) < 5 * most / np.sqrt(3 * 400)


def test_a_shift_then_a_crop_in_one_pass_is_what_two_passes_give():
    # Black from outside may enter the window, and the window repeats its patch's edge pixels.
    pixels, seeds = patches(60, 20, 20), SEEDS[:60]
    result = Augment(flip="none", crop=0.3, size=18, translate=100 / 256)(pixels, seeds)
    motion = random_motion(seeds, (20, 20), 100 / 256, 0, 0, 0)
    shifts = np.round(-motion[:, :, 2] * 10).astype(int).tolist()
    moved = [
        tv.affine(pixel, 0.0, shift, 1.0, [0.0, 0.0])
        for pixel, shift in zip(pixels, shifts, strict=True)
    ]
    expected = random_resized_crop(torch.stack(moved), seeds, 0.3, 18)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
    assert (result == 0).float().mean() > 0.1


def test_a_motion_of_nothing_leaves_the_patch_to_its_edges():
    pixels = patches(3, 12, 9)
    still = random_motion(SEEDS[:3], (12, 9), 0, 0, 0, 0)
    torch.testing.assert_close(
        resample(pixels, (12, 9), motion=still), pixels / 255, rtol=0, atol=2e-5
    )


# Antialiasing


def smooth(count: int, side: int) -> Tensor:
    """Patches with structure of about four pixels, as tissue at 20x has."""
    rough = patches(count, side // 4, side // 4).float()
    fine = F.interpolate(rough, (side, side), mode="bicubic", align_corners=False)
    return fine.clamp(0, 255).round().to(torch.uint8)


def window_of(left: int, top: int, width: int, height: int, side: int) -> np.ndarray:
    """In the terms of random_windows, from whole pixels."""
    x, y = (2 * left + width) / side - 1, (2 * top + height) / side - 1
    return np.array([[x, y, width / side, height / side]])


@pytest.mark.parametrize("box", [(0, 0, 64, 64), (3, 10, 60, 50), (20, 0, 40, 64), (0, 0, 64, 20)])
def test_a_window_that_shrinks_much_is_antialiased_as_torchvision_does(box):
    left, top, width, height = box
    pixels = patches(2, 64, 64)
    result = resample(pixels, (16, 16), window_of(left, top, width, height, 64).repeat(2, 0))
    expected = tv.resized_crop(
        pixels.float() / 255, top, left, height, width, [16, 16], antialias=True
    )
    inner = slice(1, -1)  # a window's rim sees beyond it here, in torchvision it does not
    torch.testing.assert_close(
        result[..., inner, inner], expected[..., inner, inner], rtol=0, atol=1e-5
    )
    if box == (0, 0, 64, 64):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "most", "mean"),
    [(20, 1e-5, 1e-6), (28, 1e-5, 1e-6), (32, 0.03, 5e-3), (42, 0.06, 0.01)],
)
def test_a_window_that_shrinks_little_is_close_to_torchvisions_antialiased_one(width, most, mean):
    # 28 pixels wide; 32 are the worst case of 256 to 224, 42 the limit of ANTIALIAS_ABOVE.
    pixels = smooth(4, 64)
    result = resample(pixels, (28, 28), window_of(8, 8, width, width, 64).repeat(4, 0))
    expected = tv.resized_crop(pixels.float() / 255, 8, 8, width, width, [28, 28], antialias=True)
    difference = (result - expected).abs()[..., 1:-1, 1:-1]
    assert difference.max() < most
    assert difference.mean() < mean


def test_only_windows_that_shrink_much_are_antialiased_and_patches_keep_their_order():
    pixels, size = patches(60, 32, 32), 16
    result = random_resized_crop(pixels, SEEDS[:60], 0.08, size)
    windows = random_windows(SEEDS[:60], 0.08)
    wide = torch.from_numpy((window_boxes(windows, (32, 32))[:, 2:] / size > 1.5).any(1))
    assert 10 < wide.sum() < 50
    left, top, w, h = torch.from_numpy(window_boxes(windows, (32, 32))).float().T / 32
    x, y = 2 * left + w - 1, 2 * top + h - 1
    zero = torch.zeros(60)
    theta = torch.stack([torch.stack([w, zero, x], 1), torch.stack([zero, h, y], 1)], 1)
    grid = F.affine_grid(theta, [60, 3, size, size], align_corners=False)
    plain = F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False) / 255
    torch.testing.assert_close(result[~wide], plain[~wide], rtol=0, atol=1e-5)
    apart = (result - plain).abs().amax((1, 2, 3))
    assert (apart[wide] > 0.05).all()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_bytes_on_a_cpu_are_cropped_to_the_bit_as_torchvision_crops_them(layout):
    pixels, windows = (
        patches(40, 24, 24).contiguous(memory_format=layout),
        random_windows(SEEDS[:40], 0.1),
    )
    result = cut_bytes(pixels, (16, 16), windows)
    assert result.is_contiguous(memory_format=torch.channels_last)
    for patch, cut, (x, y, w, h) in zip(
        pixels, result, window_boxes(windows, (24, 24)), strict=True
    ):
        assert torch.equal(cut, tv.resized_crop(patch, y, x, h, w, [16, 16], antialias=True))
    floats = resample(smooth(40, 24).float(), (20, 20), windows)
    assert (floats - cut_bytes(smooth(40, 24), (20, 20), windows) / 255).abs().mean() < 0.01


def test_a_moved_patch_that_shrinks_much_is_moved_first():
    pixels, seeds = patches(30, 48, 48), SEEDS[:30]
    motion = random_motion(seeds, (48, 48), 0.3, 45, 0, 0)
    result = resample(pixels, (12, 12), motion=motion)
    expected = resize(resample(pixels, (48, 48), motion=motion) * 255, 12)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


# Colour


COLOURS = patches(40, 8, 8)
COLOURS[0] = 255
COLOURS[1] = 0
COLOURS[2] = 90  # grey
COLOURS[3, 1] = COLOURS[3, 0]  # two channels alike
DRAWN = SEEDS[:40]


def factors(draw: int, strength: float) -> list[float]:
    return (1 - strength + 2 * strength * uniform(DRAWN, draw)).tolist()


def one_by_one(adjust, pixels: Tensor, values: list[float]) -> Tensor:
    return torch.stack([adjust(p, v) for p, v in zip(pixels, values, strict=True)])


def turns(strength: float) -> list[float]:
    return (strength * (2 * uniform(DRAWN, HUE) - 1)).tolist()


@pytest.mark.parametrize(
    ("name", "strength", "adjust", "values"),
    [
        ("brightness", 0.6, tv.adjust_brightness, factors(BRIGHTNESS, 0.6)),
        ("contrast", 1.0, tv.adjust_contrast, factors(CONTRAST, 1.0)),
        ("saturation", 1.0, tv.adjust_saturation, factors(SATURATION, 1.0)),
        ("hue", 0.5, tv.adjust_hue, turns(0.5)),
    ],
)
def test_a_colour_jitter_is_torchvisions_by_the_drawn_factor(name, strength, adjust, values):
    result = Augment(flip="none", **{name: strength})(COLOURS, DRAWN)
    expected = one_by_one(adjust, COLOURS / 255, values)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert len(set(values)) == 40
    assert min(values) < (1 if name != "hue" else 0) - 0.8 * strength
    assert max(values) > (1 if name != "hue" else 0) + 0.8 * strength


def test_colour_jitters_follow_crop_and_each_other_and_leave_the_other_draws_alone():
    geometry = {"flip": "turns", "crop": 0.4, "size": 8, "translate": 0.2}
    result = Augment(**geometry, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)(
        COLOURS, DRAWN
    )
    expected = Augment(**geometry)(COLOURS, DRAWN)
    expected = one_by_one(tv.adjust_brightness, expected, factors(BRIGHTNESS, 0.4))
    expected = one_by_one(tv.adjust_contrast, expected, factors(CONTRAST, 0.4))
    expected = one_by_one(tv.adjust_saturation, expected, factors(SATURATION, 0.4))
    expected = one_by_one(tv.adjust_hue, expected, turns(0.1))
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


# Stain


def to_skimage(image: Tensor) -> np.ndarray:
    return image.movedim(1, -1).numpy()


def test_stain_jitter_is_skimages_deconvolution_scaled_shifted_and_recombined():
    generator = np.random.default_rng(0)
    # Colours that the stains can make: skimage cuts negative amounts away.
    image = hed2rgb(generator.uniform(0.005, 0.1, (20, 6, 6, 3)))
    assert (rgb2hed(image) > 0).all()
    scales, shifts = generator.uniform(0.7, 1.3, (20, 3)), generator.uniform(-0.003, 0.03, (20, 3))
    stains = rgb2hed(image) * scales[:, None, None] + shifts[:, None, None]
    result = restain_(torch.from_numpy(image).movedim(-1, 1).contiguous(), scales, shifts)
    np.testing.assert_allclose(to_skimage(result), hed2rgb(stains), rtol=0, atol=1e-12)


def test_stain_jitter_draws_each_stain_of_each_patch_within_its_strength():
    stained = torch.from_numpy(hed2rgb(np.full((40, 1, 1, 3), 0.04))).movedim(-1, 1)
    pixels = (stained * 255).round().to(torch.uint8).expand(-1, -1, 4, 4)
    result = Augment(flip="none", stain=0.3, stain_shift=0.02)(pixels, DRAWN)
    scale = np.stack([1 - 0.3 + 0.6 * uniform(DRAWN, draw) for draw in STAIN], 1)
    shift = np.stack([0.02 * (2 * uniform(DRAWN, draw) - 1) for draw in STAIN_SHIFT], 1)
    stains = rgb2hed(to_skimage(pixels / 255).astype(np.float64))
    expected = hed2rgb(stains * scale[:, None, None] + shift[:, None, None])
    np.testing.assert_allclose(to_skimage(result), expected, rtol=0, atol=2e-5)


def test_stain_jitter_of_no_strength_changes_no_colour_not_even_one_outside_the_stains():
    result = restain_(COLOURS / 255, np.ones((40, 3)), np.zeros((40, 3)))
    torch.testing.assert_close(result, COLOURS / 255, rtol=0, atol=2e-5)


# Blur


def test_blur_is_torchvisions_gaussian_for_its_share_of_the_patches():
    pixels = patches(200, 16, 20)
    seeds = SEEDS[:200]
    result = Augment(flip="none", blur=0.3, blur_sigma=(0.5, 2.0))(pixels, seeds)
    hit = torch.from_numpy(uniform(seeds, BLUR) < 0.3)
    assert 60 - 5 * 6.5 < hit.sum() < 60 + 5 * 6.5
    assert torch.equal(result[~hit], pixels[~hit] / 255)
    sigmas = 0.5 + 1.5 * uniform(seeds, BLUR_SIGMA)
    for row in hit.nonzero().flatten().tolist():
        expected = tv.gaussian_blur(pixels[row] / 255, [13, 13], [float(sigmas[row])] * 2)
        torch.testing.assert_close(result[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 5])
def test_blur_of_a_patch_smaller_than_its_kernel_keeps_a_flat_colour(side):
    flat = torch.full((20, 3, side, side), 51, dtype=torch.uint8)
    result = Augment(flip="none", blur=1.0)(flat, SEEDS[:20])
    torch.testing.assert_close(result, torch.full_like(result, 0.2))


# Presets, shared crops, bad values


def test_presets_are_the_published_ones():
    assert AUGMENTS.build("none") == Augment(flip="none")
    assert AUGMENTS.build("weak", 224) == Augment(flip="none", crop=0.08, size=224)
    assert AUGMENTS.build("weak", crop=0.25) == Augment(flip="none", crop=0.25)
    assert AUGMENTS.build("strong") == Augment(flip="mirrors", crop=0.08)
    assert AUGMENTS.build("strong_v2") == Augment(flip="mirrors", crop=0.08, translate=0.5)
    assert AUGMENTS.build("weak_strong") == Augment(flip="none", crop=0.08, translate=100 / 256)
    assert AUGMENTS.build("strong", flip="turns", hue=0.1) == Augment(
        flip="turns", crop=0.08, hue=0.1
    )


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(
        UserError,
        match=r"unknown augmentation 'stong'; did you mean 'strong'\?\n  available: none, ",
    ):
        AUGMENTS.build("stong")


def test_patches_with_one_shared_seed_share_the_rectangle_and_nothing_else():
    pixels, seeds = patches(40, 12, 12), SEEDS[:40]
    crop_seeds = patch_seeds(7, np.arange(4)).repeat(10)
    result = Augment(flip="turns", crop=0.2, size=12, brightness=0.5)(pixels, seeds, crop_seeds)
    cut = cut_bytes(flip_and_turn(pixels, seeds), (12, 12), random_windows(crop_seeds, 0.2)) / 255
    expected = one_by_one(tv.adjust_brightness, cut, factors(BRIGHTNESS, 0.5))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert len(np.unique(random_windows(crop_seeds, 0.2), axis=0)) == 4
    augment = Augment(flip="turns", crop=0.2, size=12)
    assert torch.equal(augment(pixels, seeds, seeds), augment(pixels, seeds))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": "twist"}, "flip must be turns, mirrors or none, got 'twist'"),
        ({"crop": 0.0}, r"crop must be in \(0, 1\], got 0.0"),
        ({"crop": float("nan")}, r"crop must be in \(0, 1\], got nan"),
        ({"blur_sigma": (2.0, 1.0)}, "blur_sigma must be two numbers above 0, the smaller first"),
        *[
            ({name: 1.01 * most}, rf"{name} must be in \[0, {most:g}\]")
            for name, most in MAX_STRENGTH.items()
        ],
        *[({name: -0.1}, rf"{name} must be in \[0, ") for name in MAX_STRENGTH],
    ],
)
def test_a_value_out_of_range_is_refused_by_name(options, message):
    with pytest.raises(UserError, match=f"^augmentation: {message}"):
        Augment(**options)


def test_every_draw_has_a_number_of_its_own_that_never_changes():
    # Two options with one number would vary together; a new number would change old runs.
    single = "MIRROR_X MIRROR_Y TRANSPOSE AREA ASPECT LEFT TOP SHIFT_X SHIFT_Y ANGLE SCALE SHEAR"
    names = [*single.split(), "BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"]
    numbers = [getattr(augment_draws, name) for name in names]
    assert [*numbers, *STAIN, *STAIN_SHIFT, BLUR, BLUR_SIGMA] == list(range(1, 25))
