"""The order of slides: pure functions of (seed, epoch); balanced groups."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2e.bags.epoch_plan import balanced_order, plan_epoch, repeat_counts

numbers = st.integers(0, 2**31)
sizes = st.integers(1, 9)
labels = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def spread(counts) -> int:
    return max(counts) - min(counts)


def of_group(groups, group) -> list[int]:
    return [slide for slide, other in enumerate(groups) if other == group]


def epochs(groups, seed, first, number) -> list[int]:
    return [
        slide
        for epoch in range(first, first + number)
        for slide in balanced_order(groups, seed=seed, epoch=epoch).tolist()
    ]


@given(slides=st.integers(0, 200), bags=st.integers(1, 17), seed=numbers, epoch=numbers)
def test_an_epoch_covers_each_slide_once(slides, bags, seed, epoch):
    plan = plan_epoch(slides, bags, seed=seed, epoch=epoch)
    assert sorted(slide for update in plan for slide in update) == list(range(slides))
    assert all(len(update) == bags for update in plan[:-1])
    assert all(1 <= len(update) <= bags for update in plan[-1:])


def test_without_groups_the_order_is_that_of_recorded_runs():
    assert plan_epoch(7, 3, seed=1, epoch=2) == [[4, 1, 0], [5, 6, 2], [3]]


@pytest.mark.parametrize("groups", [None, [0] * 25 + [1] * 5])
def test_epochs_have_different_orders(groups):
    plans = [
        plan_epoch(30, 4, seed=seed, epoch=epoch, groups=groups)
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({str(plan) for plan in plans}) == 4


@given(groups=labels, bags=sizes, seed=numbers, epoch=numbers)
def test_balancing_keeps_the_number_of_draws_and_is_reproducible(groups, bags, seed, epoch):
    plan = plan_epoch(len(groups), bags, seed=seed, epoch=epoch, groups=groups)
    assert sum(map(len, plan)) == len(groups)
    assert all(len(update) == bags for update in plan[:-1])
    again = plan_epoch(len(groups), bags, seed=seed, epoch=epoch, groups=tuple(groups))
    assert plan == again


@given(groups=labels, seed=numbers, epoch=numbers)
def test_an_epoch_draws_groups_and_the_slides_of_each_equally_often(groups, seed, epoch):
    drawn = Counter(epochs(groups, seed, epoch, 1))
    per_group = [sum(drawn[slide] for slide in of_group(groups, g)) for g in set(groups)]
    assert spread(per_group) <= 1
    for group in set(groups):
        assert spread([drawn[slide] for slide in of_group(groups, group)]) <= 1


@given(groups=labels, seed=numbers, number=st.integers(1, 12))
def test_all_epochs_together_draw_groups_and_slides_equally_often(groups, seed, number):
    drawn = Counter(epochs(groups, seed, 0, number))
    per_group = [sum(drawn[slide] for slide in of_group(groups, g)) for g in set(groups)]
    assert spread(per_group) <= 1
    for group in set(groups):
        assert spread([drawn[slide] for slide in of_group(groups, group)]) <= 1


@given(groups=labels, seed=numbers, first=st.integers(0, 50))
def test_every_slide_is_drawn_over_the_epochs(groups, seed, first):
    fewest = len(groups) // len(set(groups))  # draws of a group in an epoch
    needed = -(-max(Counter(groups).values()) // fewest)
    assert set(epochs(groups, seed, first, needed)) == set(range(len(groups)))


def test_slides_left_out_of_an_epoch_come_in_the_next():
    groups = [0] * 30 + [1] * 10  # 20 draws each: 10 of the first group are left out
    left = set(range(40)) - set(epochs(groups, 5, 7, 1))
    assert len(left) == 10
    assert left <= set(epochs(groups, 5, 8, 1))


@given(groups=labels, bags=sizes, seed=numbers, epoch=numbers)
def test_every_update_holds_the_groups_as_evenly_as_possible(groups, bags, seed, epoch):
    for update in plan_epoch(len(groups), bags, seed=seed, epoch=epoch, groups=groups):
        held = Counter(groups[slide] for slide in update)
        assert spread([held[group] for group in set(groups)]) <= 1


@given(
    events=st.lists(st.booleans(), min_size=2, max_size=60).filter(lambda e: len(set(e)) == 2),
    bags=st.integers(2, 9),
    seed=numbers,
    epoch=numbers,
)
def test_every_update_of_two_or_more_has_an_event(events, bags, seed, epoch):
    for update in plan_epoch(len(events), bags, seed=seed, epoch=epoch, groups=events):
        assert len(update) == 1 or any(events[slide] for slide in update)


@given(groups=labels, bags=sizes, seed=numbers, epoch=numbers)
def test_a_slide_is_twice_in_an_update_only_if_its_group_is_too_small(groups, bags, seed, epoch):
    for update in plan_epoch(len(groups), bags, seed=seed, epoch=epoch, groups=groups):
        held = Counter(groups[slide] for slide in update)
        for slide, times in Counter(update).items():
            members = len(of_group(groups, groups[slide]))
            assert times <= -(-held[groups[slide]] // members)


def test_slides_share_updates_with_other_slides_in_each_epoch():
    groups = [0] * 12 + [1] * 12
    met = Counter(
        frozenset(update)
        for epoch in range(200)
        for update in plan_epoch(24, 2, seed=0, epoch=epoch, groups=groups)
    )
    # 144 pairs, 2,400 updates: 16.7 each, standard deviation 4.1.
    assert len(met) == 144
    assert max(abs(times - 16.7) for times in met.values()) < 5 * 4.1


def test_which_slide_of_a_group_comes_first_is_uniform():
    groups = [0] * 5 + [1] * 15
    first = Counter(balanced_order(groups, seed=seed, epoch=3).tolist()[1] for seed in range(3000))
    # 15 slides, 200 each, standard deviation 13.7.
    assert set(first) == set(range(5, 20))
    assert max(abs(times - 200) for times in first.values()) < 5 * 13.7


@pytest.mark.parametrize("groups", [[0, 1], [0] * 6, []])
def test_each_slide_has_one_group(groups):
    with pytest.raises(
        ValueError, match=f"groups has {len(groups)} entries, expected one for each of 5 slides"
    ):
        plan_epoch(5, 2, seed=0, epoch=0, groups=groups)


def test_no_slides_make_no_updates():
    assert plan_epoch(0, 2, seed=0, epoch=0, groups=[]) == []


def test_repeats_count_how_often_a_slide_was_drawn_before():
    assert repeat_counts([[3, 1], [3, 3], [2]]) == [[0, 0], [1, 2], [0]]
