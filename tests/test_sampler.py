"""Sampling: pure functions of (seed, epoch, slide), without replacement, uniform."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2e.data.sampler import (
    mix,
    patch_seeds,
    plan_epoch,
    sample_patches,
    uniform,
)

numbers = st.integers(0, 2**31)
names = st.text(min_size=1, max_size=20)
seed_arrays = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60).map(
    lambda values: np.array(values, np.uint64)
)


@given(slide=names, count=st.integers(1, 500), size=st.integers(1, 600), seed=numbers)
def test_patches_are_drawn_without_replacement(slide, count, size, seed):
    drawn = sample_patches(slide, count, size, seed=seed, epoch=3)
    assert len(drawn) == min(size, count)
    assert drawn.min() >= 0
    assert drawn.max() < count
    assert (np.diff(drawn) > 0).all()  # sorted, so none twice
    np.testing.assert_array_equal(drawn, sample_patches(slide, count, size, seed=seed, epoch=3))


@given(slide=names, count=st.integers(1, 300))
def test_all_patches_are_all_of_them(slide, count):
    whole = sample_patches(slide, count, None, seed=0, epoch=0)
    np.testing.assert_array_equal(whole, np.arange(count))


def test_draws_differ_by_seed_epoch_and_slide():
    def draw(slide="a", seed=0, epoch=0):
        return tuple(sample_patches(slide, 10_000, 8, seed=seed, epoch=epoch))

    assert len({draw(), draw(slide="b"), draw(seed=1), draw(epoch=1)}) == 4


def test_every_patch_is_drawn_equally_often():
    # 4 of 20 in 2,000 epochs: each patch 400 times, standard deviation sqrt(2000 * .2 * .8) = 17.9.
    counts = np.zeros(20)
    for epoch in range(2000):
        counts[sample_patches("a", 20, 4, seed=1, epoch=epoch)] += 1
    assert np.abs(counts - 400).max() < 5 * 17.9


@pytest.mark.parametrize(("count", "size"), [(0, 4), (0, None), (5, 0), (5, -1)])
def test_nothing_to_draw_is_an_error(count, size):
    with pytest.raises(ValueError, match=r"no patches|at least 1"):
        sample_patches("a", count, size, seed=0, epoch=0)


@given(slides=st.integers(0, 200), bags=st.integers(1, 17), seed=numbers, epoch=numbers)
def test_an_epoch_covers_each_slide_once(slides, bags, seed, epoch):
    plan = plan_epoch(slides, bags, seed=seed, epoch=epoch)
    assert sorted(slide for update in plan for slide in update) == list(range(slides))
    assert all(len(update) == bags for update in plan[:-1])
    assert all(1 <= len(update) <= bags for update in plan[-1:])


def test_epochs_have_different_orders():
    plans = [plan_epoch(30, 4, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(plan) for plan in plans}) == 4


@given(parts=st.lists(st.one_of(numbers, names), min_size=1, max_size=4))
def test_mixed_seeds_are_numbers_of_63_bits(parts):
    assert 0 <= mix(*parts) < 2**63
    assert mix(*parts) == mix(*parts)
    assert mix(*parts, "x") != mix(*parts)


def test_mixing_does_not_run_parts_together():
    assert len({mix(1, 23), mix(12, 3), mix(123), mix("1", "2", "3")}) == 4


@given(seeds=seed_arrays, cut=st.integers(0, 60), draw=st.integers(0, 20))
def test_a_draw_is_free_of_how_the_seeds_are_cut(seeds, cut, draw):
    whole = uniform(seeds, draw)
    assert ((whole >= 0) & (whole < 1)).all()
    pieces = [uniform(seeds[:cut], draw), uniform(seeds[cut:], draw)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@given(
    seed=st.integers(0, 2**63 - 1),
    indices=st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True),
    data=st.data(),
)
def test_a_patch_keeps_its_seed_whatever_else_is_in_the_bag(seed, indices, data):
    every = np.array(indices)
    seeds = patch_seeds(seed, every)
    assert seeds.dtype == np.uint64
    chosen = data.draw(st.lists(st.integers(0, len(indices) - 1), min_size=1, max_size=5))
    np.testing.assert_array_equal(patch_seeds(seed, every[chosen]), seeds[chosen])


def test_splitmix_gives_its_published_numbers():
    # Vigna's splitmix64.c from state 1234567: the first outputs, whose upper 53 bits are used.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = [float(uniform(np.array([1234567], np.uint64), draw)[0]) for draw in range(3)]
    assert found == [(value >> 11) * 2.0**-53 for value in expected]


def test_draws_of_a_slides_patches_are_uniform_and_independent():
    seeds = patch_seeds(mix(0, 0, "slide"), np.arange(40_000))
    assert len(np.unique(seeds)) == len(seeds)
    draws = np.stack([uniform(seeds, draw) for draw in range(8)])
    counts = np.stack([np.histogram(row, bins=20, range=(0, 1))[0] for row in draws])
    # 19 degrees of freedom: 54 is passed once in 30,000 tests.
    chi = ((counts - 2000) ** 2 / 2000).sum(axis=1)
    assert chi.max() < 54, chi
    between_draws = np.corrcoef(draws) - np.eye(8)
    neighbours = [np.corrcoef(row[:-1], row[1:])[0, 1] for row in draws]
    assert max(np.abs(between_draws).max(), np.abs(neighbours).max()) < 5 / np.sqrt(40_000)
