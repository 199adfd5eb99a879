"""Augmentation: per patch, a function of its seed alone, and geometry that can be worked out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from e2e.data.augment import Augment, flip_and_turn, random_resized_crop, resize
from e2e.data.sampler import patch_seeds, uniform

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


@settings(max_examples=25)
@given(seeds=seed_arrays, cut=st.integers(0, 12), flip=st.booleans(), data=st.data())
def test_a_patch_does_not_depend_on_its_chunk(seeds, cut, flip, data):
    crop = data.draw(st.sampled_from([0.08, 0.5, 1.0]))
    augment = Augment(flip=flip, crop=crop, size=data.draw(st.sampled_from([None, 4, 6, 9])))
    pixels = patches(len(seeds))
    whole = augment(pixels, seeds)
    pieces = [
        augment(pixels[part], seeds[part])
        for part in (slice(cut), slice(cut, None))
        if len(seeds[part])
    ]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(augment(pixels, seeds), whole)


def test_the_input_is_left_as_it_was():
    pixels = patches(10)
    before = pixels.clone()
    Augment(flip=True, crop=0.3, size=4)(pixels, SEEDS[:10])
    assert torch.equal(pixels, before)


def test_without_flip_crop_and_size_nothing_changes():
    pixels = patches(5)
    assert Augment(flip=False, crop=1.0, size=None)(pixels, SEEDS[:5]) is pixels
    assert Augment(flip=False, crop=1.0, size=6)(pixels, SEEDS[:5]) is pixels
    assert Augment(flip=True)(pixels, SEEDS[:5]).dtype == torch.uint8


@given(seeds=seed_arrays, value=st.integers(0, 255), size=st.integers(1, 12))
def test_a_crop_of_one_colour_is_that_colour(seeds, value, size):
    plain = torch.full((len(seeds), 3, 7, 7), value, dtype=torch.uint8)
    cropped = random_resized_crop(plain, seeds, 0.08, size)
    assert cropped.shape == (len(seeds), 3, size, size)
    torch.testing.assert_close(cropped, torch.full_like(cropped, value / 255))


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
    found = []
    for axis, channel in ((2, 0), (1, 1)):
        line = cut[:, channel].double().mean(dim=3 - axis).numpy()[:, middle]
        steps = np.arange(size)[middle]
        slope, start = np.polyfit(steps, line.T, 1)
        length = slope * size / side
        found.append((((start + 0.5) - slope / 2) / side, length))
    (left, width), (top, height) = found
    return np.stack([left, top, width, height], axis=1)


def test_a_crop_is_a_window_of_the_promised_area_and_aspect():
    left, top, width, height = windows(0.2).T
    width, height = np.minimum(width, 1 - 1e-9), np.minimum(height, 1 - 1e-9)
    slack = 1e-4
    assert (left > -slack).all()
    assert (top > -slack).all()
    assert (left + width < 1 + slack).all()
    assert (top + height < 1 + slack).all()
    area, aspect = width * height, width / height
    inside = (width < 1 - slack) & (height < 1 - slack)
    assert inside.sum() > 200
    assert (area[inside] > 0.2 - slack).all()
    assert (aspect > 3 / 4 - slack).all()
    assert (aspect < 4 / 3 + slack).all()
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
    for draw, wanted in draws.items():
        seeds = seeds[np.abs(uniform(seeds, draw) - wanted) < 0.02]
    miss = sum(np.abs(uniform(seeds, draw) - wanted) for draw, wanted in draws.items())
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
    found = resize(pixels, size)
    expected = F.interpolate(pixels.double(), (size, size), mode="bilinear", antialias=True) / 255
    torch.testing.assert_close((found.double() if size != 12 else found.double() / 255), expected)
    assert float(resize(pixels, 5).min()) >= 0
    assert float(resize(pixels, 5).max()) <= 1
