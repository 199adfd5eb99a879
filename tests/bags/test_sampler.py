"""Sampling: pure functions of (seed, epoch, slide), without replacement, uniform."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2e.bags.sampler import SAMPLERS, equal_regions, pad_with_copies, sample_patches, scale_quotas
from e2e.errors import UserError
from e2e.seeds import mix_seed, patch_seeds, uniform

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
    indices = sample_patches(slide, count, None, seed=0, epoch=0)
    np.testing.assert_array_equal(indices, np.arange(count))


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


def test_draws_of_recorded_runs_are_reproduced():
    assert mix_seed(1, 2, "a") == 4869288256290416682
    assert sample_patches("slide", 1000, 8, seed=1, epoch=2).tolist() == [
        482,
        498,
        544,
        773,
        782,
        818,
        871,
        885,
    ]
    assert patch_seeds(7, np.array([0, 5])).tolist() == [3511274219185729, 5953524265992560]


@given(parts=st.lists(st.one_of(numbers, names), min_size=1, max_size=4))
def test_mixed_seeds_are_numbers_of_63_bits(parts):
    assert 0 <= mix_seed(*parts) < 2**63
    assert mix_seed(*parts) == mix_seed(*parts)
    assert mix_seed(*parts, "x") != mix_seed(*parts)


def test_mixing_does_not_run_parts_together():
    assert len({mix_seed(1, 23), mix_seed(12, 3), mix_seed(123), mix_seed("1", "2", "3")}) == 4


@given(seeds=seed_arrays, cut=st.integers(0, 60), draw=st.integers(0, 20))
def test_a_draw_does_not_depend_on_how_the_seeds_are_cut(seeds, cut, draw):
    at_once = uniform(seeds, draw)
    assert ((at_once >= 0) & (at_once < 1)).all()
    pieces = [uniform(seeds[:cut], draw), uniform(seeds[cut:], draw)]
    np.testing.assert_array_equal(np.concatenate(pieces), at_once)


@given(
    seed=st.integers(0, 2**63 - 1),
    indices=st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True),
    data=st.data(),
)
def test_a_patch_keeps_its_seed_whatever_else_is_in_the_bag(seed, indices, data):
    every = np.array(indices)
    seeds = patch_seeds(seed, every)
    assert seeds.dtype == np.uint64
    rows = data.draw(st.lists(st.integers(0, len(indices) - 1), min_size=1, max_size=5))
    np.testing.assert_array_equal(patch_seeds(seed, every[rows]), seeds[rows])


def test_splitmix_gives_its_published_numbers():
    # Vigna's splitmix64.c from state 1234567: the first outputs, whose upper 53 bits are used.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    draws = [float(uniform(np.array([1234567], np.uint64), draw)[0]) for draw in range(3)]
    assert draws == [(value >> 11) * 2.0**-53 for value in expected]


def test_draws_of_a_slides_patches_are_uniform_and_independent():
    seeds = patch_seeds(mix_seed(0, 0, "slide"), np.arange(40_000))
    assert len(np.unique(seeds)) == len(seeds)
    draws = np.stack([uniform(seeds, draw) for draw in range(8)])
    counts = np.stack([np.histogram(row, bins=20, range=(0, 1))[0] for row in draws])
    # 19 degrees of freedom: 54 is passed once in 30,000 tests.
    chi = ((counts - 2000) ** 2 / 2000).sum(axis=1)
    assert chi.max() < 54, chi
    between_draws = np.corrcoef(draws) - np.eye(8)
    neighbours = [np.corrcoef(row[:-1], row[1:])[0, 1] for row in draws]
    assert max(np.abs(between_draws).max(), np.abs(neighbours).max()) < 5 / np.sqrt(40_000)


# Every sampler of the registry.

every_sampler = pytest.mark.parametrize("name", SAMPLERS.names())


def slide_of(count: int, seed: int = 0) -> dict[str, Any]:
    """Coords on a grid, in no order, some twice; scores of 10 levels, so with ties."""
    rng = np.random.default_rng(seed)
    side = int(count**0.5) + 1
    return {
        "coords": rng.integers(0, side, (count, 2)) * 256,
        "scores": rng.integers(0, 10, count) / 10 - 0.5,
    }


def often(name: str, count: int, size: int, *, epochs: int = 2000, **options) -> np.ndarray:
    """How often each patch is drawn over epochs."""
    sampler, values = SAMPLERS.build(name, **options), slide_of(count)
    drawn = [
        sampler.choose("a", count, size, seed=1, epoch=epoch, **values) for epoch in range(epochs)
    ]
    return np.bincount(np.concatenate(drawn), minlength=count)


@every_sampler
@given(slide=names, count=st.integers(1, 150), size=st.integers(1, 200), seed=numbers)
def test_a_sampler_draws_sorted_different_patches(name, slide, count, size, seed):
    sampler, values = SAMPLERS.build(name), slide_of(count, seed)
    before = {key: value.copy() for key, value in values.items()}
    drawn = sampler.choose(slide, count, size, seed=seed, epoch=3, **values)
    assert drawn.dtype == np.int64
    assert len(drawn) == min(size, count)
    assert drawn.min() >= 0
    assert drawn.max() < count
    assert (np.diff(drawn) > 0).all()
    np.testing.assert_array_equal(
        drawn, sampler.choose(slide, count, size, seed=seed, epoch=3, **values)
    )
    for key, value in values.items():
        np.testing.assert_array_equal(value, before[key])


@every_sampler
@given(count=st.integers(1, 100), more=st.one_of(st.none(), st.integers(0, 50)))
def test_a_short_bag_is_all_of_the_slide(name, count, more):
    size = None if more is None else count + more
    drawn = SAMPLERS.build(name).choose("a", count, size, seed=0, epoch=0, **slide_of(count))
    np.testing.assert_array_equal(drawn, np.arange(count))


@every_sampler
def test_a_samplers_draws_differ_by_seed_epoch_slide_scale_and_repeat(name):
    sampler, values = SAMPLERS.build(name), slide_of(10_000)

    def draw(slide="a", seed=0, epoch=0, **which):
        drawn = sampler.choose(slide, 10_000, 8, seed=seed, epoch=epoch, **which, **values)
        return tuple(drawn.tolist())

    others = [draw(slide="b"), draw(seed=1), draw(epoch=1), draw(scale=1), draw(repeat=1)]
    assert len({draw(), *others, draw(scale=1, repeat=1)}) == 7


@every_sampler
def test_a_sampler_refuses_a_slide_it_cannot_draw_from(name):
    sampler = SAMPLERS.build(name)
    with pytest.raises(ValueError, match="slide 'a' has no patches"):
        sampler.choose("a", 0, 4, seed=0, epoch=0, **slide_of(0))
    with pytest.raises(ValueError, match="bag_size must be at least 1, got 0"):
        sampler.choose("a", 5, 0, seed=0, epoch=0, **slide_of(5))


@every_sampler
@pytest.mark.parametrize("size", [3, 20])
@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("scores", np.zeros(9), r"\(9,\), expected \(10,\) for its patches"),
        ("scores", np.zeros((10, 1)), r"\(10, 1\), expected \(10,\) for its patches"),
        ("coords", np.zeros((11, 2)), r"\(11, 2\), expected \(10, 2\) for its patches"),
        (
            "scores",
            [0.0] * 8 + [np.nan, np.inf],
            "2 of 10 patches are not finite, first patch 8",
        ),
        (
            "coords",
            [[0, -np.inf]] + [[0, 0]] * 9,
            "1 of 10 patches are not finite, first patch 0",
        ),
    ],
)
def test_wrong_scores_and_coords_are_refused_with_the_slides_name(name, size, what, value, message):
    with pytest.raises(UserError, match=f"^slide 'a7': {what} .*{message}"):
        SAMPLERS.build(name).choose(
            "a7", 10, size, seed=0, epoch=0, **(slide_of(10) | {what: value})
        )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("regions", {"grid": 0}, "grid must be at least 1, got 0"),
        ("attention", {"top": 1.1}, "top must be between 0 and 1, got 1.1"),
        ("attention", {"top": float("nan")}, "top must be between 0 and 1, got nan"),
        ("strata", {"grid": 2}, "sampler 'strata' has no option 'grid'"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        SAMPLERS.build(name, **options)


# strata


@given(count=st.integers(2, 60), seed=numbers, data=st.data())
def test_strata_draw_one_patch_of_each_interval(count, seed, data):
    size = data.draw(st.integers(1, count))
    drawn = SAMPLERS.build("strata").choose("a", count, size, seed=seed, epoch=0)
    edges = [count * i // size for i in range(size + 1)]
    # The intervals begin somewhere; from there on each holds exactly one.
    assert any(
        (np.histogram((drawn - start) % count, bins=[*edges[:-1], count - 0.5])[0] == 1).all()
        for start in range(count)
    )


def test_strata_draw_every_patch_equally_often_though_intervals_are_of_one_and_two():
    # 12 of 20 in 2,000 epochs: each patch 1,200 times, standard deviation 21.9.
    assert np.abs(often("strata", 20, 12) - 1200).max() < 5 * 21.9


# regions

positions = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=120
).map(lambda xy: np.array(xy, np.float64))


@given(coords=positions, grid=st.integers(1, 6))
def test_regions_hold_equally_many_patches_and_lie_side_by_side(coords, grid):
    region = equal_regions(coords, grid)
    held = np.bincount(region, minlength=grid**2)
    assert len(held) == grid**2
    assert np.ptp(held) <= 1
    column = region // grid
    for left in range(grid):
        x = coords[column == left, 0]
        assert len(x) == 0 or (coords[column > left, 0] >= x.max()).all()
        inside = column == left
        for top in range(grid):
            y = coords[region == left * grid + top, 1]
            below = inside & (region > left * grid + top)
            assert len(y) == 0 or (coords[below, 1] >= y.max()).all()


@given(count=st.integers(2, 120), grid=st.integers(1, 6), seed=numbers, data=st.data())
def test_regions_are_drawn_from_as_evenly_as_possible(count, grid, seed, data):
    size = data.draw(st.integers(1, count))
    coords = slide_of(count, seed)["coords"]
    drawn = SAMPLERS.build("regions", grid=grid).choose(
        "a", count, size, seed=seed, epoch=0, coords=coords
    )
    taken = np.bincount(equal_regions(coords, grid)[drawn], minlength=grid**2)
    assert np.ptp(taken) <= 1


def test_regions_draw_every_patch_equally_often():
    # 8 of 32 in 2,000 epochs, 16 regions of 2: each patch 500 times, standard deviation 19.4.
    assert np.abs(often("regions", 32, 8) - 500).max() < 5 * 19.4


def test_regions_need_coords():
    with pytest.raises(ValueError, match="slide 'a': RegionSampler needs coords"):
        SAMPLERS.build("regions").choose("a", 10, 4, seed=0, epoch=0)


def test_samplers_declare_what_they_use():
    uses = {name: SAMPLERS.build(name) for name in SAMPLERS.names()}
    assert [name for name, sampler in uses.items() if sampler.uses_coords] == ["regions"]
    assert [name for name, sampler in uses.items() if sampler.uses_scores] == ["attention"]


# attention


@given(
    scores=st.lists(st.integers(-3, 3), min_size=2, max_size=80),
    top=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
    size=st.integers(1, 79),
    seed=numbers,
)
def test_the_top_share_of_the_bag_is_the_highest_scored(scores, top, size, seed):
    drawn = SAMPLERS.build("attention", top=top).choose(
        "a", len(scores), size, seed=seed, epoch=0, scores=scores
    )
    if size < len(scores):
        number = (size * int(top * 100) * 2 + 100) // 200
        best = sorted(scores, reverse=True)[:number]
        assert sorted((scores[i] for i in drawn), reverse=True)[:number] == best


def test_a_head_that_weighs_all_patches_alike_draws_them_at_random():
    sampler = SAMPLERS.build("attention", top=1.0)
    drawn = [
        sampler.choose("a", 20, 5, seed=seed, epoch=0, scores=np.full(20, 0.05))
        for seed in range(400)
    ]
    counts = np.bincount(np.concatenate(drawn), minlength=20)
    assert np.abs(counts - 100).max() < 5 * 8.7  # standard deviation of 400 at 1/4


def test_the_rest_is_uniform_among_the_others():
    # Half of 8: the 4 highest always, 4 of the 20 others: 400 of 2,000 times, deviation 17.9.
    scores = np.random.default_rng(0).permutation(24)
    sampler, best = SAMPLERS.build("attention"), np.argsort(-scores)
    drawn = [sampler.choose("a", 24, 8, seed=1, epoch=e, scores=scores) for e in range(2000)]
    counts = np.bincount(np.concatenate(drawn), minlength=24)
    assert (counts[best[:4]] == 2000).all()
    assert np.abs(counts[best[4:]] - 400).max() < 5 * 17.9


@given(count=st.integers(1, 200), size=st.integers(1, 200), seed=numbers, epoch=numbers)
def test_a_slide_without_scores_is_drawn_at_random(count, size, seed, epoch):
    which: dict[str, Any] = {"seed": seed, "epoch": epoch}
    plain = sample_patches("a", count, size, **which)
    unscored = SAMPLERS.build("attention").choose("a", count, size, **which)
    np.testing.assert_array_equal(unscored, plain)
    scores = np.arange(count)
    none = SAMPLERS.build("attention", top=0.0).choose("a", count, size, **which, scores=scores)
    np.testing.assert_array_equal(none, plain)
    by_name = SAMPLERS.build("random").choose("a", count, size, **which, scores=scores)
    np.testing.assert_array_equal(by_name, plain)


# copies


@given(
    indices=st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True).map(sorted),
    size=st.one_of(st.none(), st.integers(1, 80)),
    seed=numbers,
)
def test_a_short_bag_is_filled_with_copies_behind_its_own_patches(indices, size, seed):
    drawn = np.array(indices)
    padded = pad_with_copies(drawn, size, slide="a", seed=seed, epoch=0)
    assert padded.dtype == np.int64
    assert len(padded) == max(len(drawn), size or 0)
    np.testing.assert_array_equal(padded[: len(drawn)], drawn)
    assert set(padded.tolist()) == set(indices)
    again = pad_with_copies(drawn, size, slide="a", seed=seed, epoch=0)
    np.testing.assert_array_equal(padded, again)


def test_copies_are_uniform_with_replacement():
    padded = pad_with_copies(np.arange(20) * 3, 8020, slide="a", seed=0, epoch=0)
    counts = np.array(list(Counter(padded[20:].tolist()).values()))
    # 400 each, standard deviation 19.5; drawn without replacement they would be exactly 400.
    assert 0 < np.abs(counts - 400).max() < 5 * 19.5


def test_copies_differ_by_seed_epoch_slide_scale_and_repeat():
    def draw(slide="a", seed=0, epoch=0, **which):
        padded = pad_with_copies(np.arange(9), 60, slide=slide, seed=seed, epoch=epoch, **which)
        return tuple(padded.tolist())

    assert len({draw(), draw("b"), draw(seed=1), draw(epoch=1), draw(scale=1), draw(repeat=1)}) == 6


def test_copies_of_an_empty_bag_are_refused():
    with pytest.raises(ValueError, match="slide 'a' has no patches"):
        pad_with_copies(np.arange(0), 4, slide="a", seed=0, epoch=0)


# scales

shares_of_scales = st.lists(
    st.one_of(st.integers(1, 1000), st.decimals("0.01", "9", places=2).map(float)),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("published", [(96, 32), (384, 128), (86, 42), (692, 76)])
def test_the_published_quotas_are_reproduced_by_giving_them_as_shares(published):
    assert scale_quotas(sum(published), published, (10**5, 10**5)) == published


def test_quotas_by_hand():
    many = (999,) * 3
    assert scale_quotas(128, (3, 1), many[:2]) == (96, 32)
    assert scale_quotas(128, (2, 1), many[:2]) == (85, 43)  # 85.33, 42.67
    assert scale_quotas(4, (1, 1, 1), many) == (2, 1, 1)  # the odd one to the first
    assert scale_quotas(10, (1, 1, 4), many) == (2, 2, 6)  # 1.67, 1.67, 6.67: two of three
    assert scale_quotas(2, (0.3, 0.1), many[:2]) == (2, 0)  # 1.5, 0.5: a tie as written
    assert scale_quotas(100, (3, 1), (999, 7)) == (75, 7)  # short, and nothing moved
    assert scale_quotas(None, (3, 1), (999, 7)) == (999, 7)


@given(bag=st.integers(1, 2000), shares=shares_of_scales)
def test_quotas_sum_to_the_bag_by_the_largest_remainder(bag, shares):
    quotas = scale_quotas(bag, shares, [bag] * len(shares))
    assert sum(quotas) == bag
    fractions = [Fraction(str(share)) for share in shares]
    exact = [bag * share / sum(fractions) for share in fractions]
    raised = []
    for quota, exact_quota in zip(quotas, exact, strict=True):
        assert quota in (int(exact_quota), int(exact_quota) + 1)
        raised.append((exact_quota % 1, quota > exact_quota))
    for i, (remainder, up) in enumerate(raised):
        for other, other_up in raised[i + 1 :]:
            if up != other_up:  # the larger remainder is raised, of equal ones the first
                assert up == (remainder >= other)


@given(bag=st.integers(1, 500), shares=shares_of_scales, data=st.data())
def test_a_scale_gives_no_more_than_it_has_and_no_other_scale_fills_in(bag, shares, data):
    counts = [data.draw(st.integers(0, 300)) for _ in shares]
    full = scale_quotas(bag, shares, [bag] * len(shares))
    short = scale_quotas(bag, shares, counts)
    assert short == tuple(min(pair) for pair in zip(full, counts, strict=True))


@pytest.mark.parametrize("bag", [8, None])
@pytest.mark.parametrize("share", [0, -1.0, float("nan"), float("inf")])
def test_an_invalid_share_is_refused(bag, share):
    with pytest.raises(UserError, match="shares of scales must be finite and above 0"):
        scale_quotas(bag, (1, share), (9, 9))


def test_there_is_one_share_for_each_scale():
    with pytest.raises(ValueError, match="1 shares for 2 scales"):
        scale_quotas(8, (1,), (9, 9))
    with pytest.raises(ValueError, match="bag_size must be at least 1, got 0"):
        scale_quotas(0, (1, 1), (9, 9))
