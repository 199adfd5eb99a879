"""Cutting an update into chunks and sharing it out: every patch once, alike on any number of ranks."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from e2e.bags.chunk_plan import (
    assign_to_ranks,
    bag_range,
    balanced_cuts,
    cut_update,
    fixed_cuts,
    group_bags,
    single_chunk,
)

sizes_of_bags = st.lists(st.integers(1, 300), min_size=1, max_size=12)
chunks = st.integers(1, 120)
worlds = st.integers(1, 9)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30), max_patches=st.integers(1, 100))
def test_groups_are_neighbours_that_fit_together_and_no_two_could_be_one(sizes, max_patches):
    groups = group_bags(sizes, max_patches)
    assert [position for group in groups for position in group] == list(range(len(sizes)))
    totals = [sum(sizes[k] for k in group) for group in groups]
    for group, total in zip(groups, totals, strict=True):
        assert total <= max_patches or len(group) == 1
    for total, following in zip(totals, groups[1:], strict=False):
        assert total + sizes[following[0]] > max_patches


@given(rows=st.integers(1, 2000), chunk=chunks)
def test_cuts_cover_the_rows_in_as_few_chunks_as_possible(rows, chunk):
    for cuts in (balanced_cuts(rows, chunk), fixed_cuts(rows, chunk)):
        sizes = [stop - start for start, stop in cuts]
        assert cuts[0][0] == 0
        assert cuts[-1][1] == rows
        assert all(a[1] == b[0] for a, b in pairwise(cuts))
        assert max(sizes) <= chunk
        assert len(cuts) == -(-rows // chunk)
    balanced = [stop - start for start, stop in balanced_cuts(rows, chunk)]
    assert max(balanced) - min(balanced) <= 1
    assert all(stop - start == chunk for start, stop in fixed_cuts(rows, chunk)[:-1])


@given(sizes=sizes_of_bags, chunk=chunks, fixed_size=st.booleans())
def test_the_chunks_of_an_update_hold_every_patch_once_in_order(sizes, chunk, fixed_size):
    planned = [c for group in cut_update(sizes, chunk, fixed_size=fixed_size) for c in group]
    patches = [(p.bag, k) for c in planned for p in c.slices for k in range(p.start, p.stop)]
    assert patches == [(bag, k) for bag, size in enumerate(sizes) for k in range(size)]
    assert all(c.num_patches <= chunk for c in planned)
    names = [(c.slices[0].bag, c.number) for c in planned]
    assert len(set(names)) == len(names)  # no two chunks draw alike


@given(sizes=sizes_of_bags, chunk=chunks, world=worlds, over=st.none() | st.integers(0, 200))
def test_ranks_get_exactly_the_chunks_of_one_process(sizes, chunk, world, over):
    groups = cut_update(sizes, chunk)
    shares = assign_to_ranks(groups, world, shard_over=over)
    assert len(shares) == world
    planned = [c for group in groups for c in group]
    assert sorted(c for share in shares for c in share) == sorted(planned)
    for share in shares:
        assert share == sorted(share, key=planned.index)  # in the update's order
        for bag in range(len(sizes)):  # a rank's patches of a bag are a contiguous run
            rows = sum(p.stop - p.start for c in share for p in c.slices if p.bag == bag)
            start, stop = bag_range(share, bag)
            assert stop - start == rows


@given(sizes=sizes_of_bags, chunk=chunks, world=worlds, over=st.integers(0, 200))
def test_only_bags_over_the_limit_are_sharded(sizes, chunk, world, over):
    shares = assign_to_ranks(cut_update(sizes, chunk), world, shard_over=over)
    for bag, size in enumerate(sizes):
        owners = sum(bag_range(share, bag) != (0, 0) for share in shares)
        assert owners >= 1
        if size <= over or size <= chunk:
            assert owners == 1


@given(sizes=sizes_of_bags, chunk=st.integers(1, 30), world=worlds)
def test_sharding_all_large_bags_balances_the_ranks_to_within_two_chunks(sizes, chunk, world):
    shares = assign_to_ranks(cut_update(sizes, chunk), world, shard_over=0)
    loads = [sum(c.num_patches for c in share) for share in shares]
    assert max(loads) - min(loads) <= 2 * chunk


@given(sizes=sizes_of_bags, world=worlds)
def test_whole_bags_are_balanced_by_patch_count(sizes, world):
    # Largest first to the least loaded: at most 4/3 of the best (Graham 1969).
    loads = [sum(c.num_patches for c in s) for s in assign_to_ranks(cut_update(sizes, 1000), world)]
    groups = [sum(c.num_patches for c in group) for group in cut_update(sizes, 1000)]
    best = max(max(groups), sum(groups) / world)
    paired = sorted(groups)[-world - 1 : -world + 1 or None] if len(groups) > world else []
    assert max(loads) <= 4 / 3 * max(best, sum(paired[:2]))


def test_437_and_563_of_1000_patches_as_computed_by_hand():
    # 16 chunks of 62 or 63. Another bag of 126 lies on rank 0, so the level is 563: 437 + 126.
    shares = assign_to_ranks(cut_update([126, 1000], 63), 2, shard_over=126)
    assert [bag_range(share, 1) for share in shares] == [(0, 437), (437, 1000)]
    assert [bag_range(share, 0) for share in shares] == [(0, 126), (0, 0)]


def test_a_single_chunk_holds_all_patches_of_a_rank():
    chunks = assign_to_ranks(cut_update([5, 7, 9], 6), 1)[0]
    (merged,) = single_chunk(chunks)
    assert merged.num_patches == 21
    assert single_chunk([]) == []


def test_a_chunk_goes_to_the_rank_that_lacks_most_of_it():
    # Rank 0 has 5 already, so it wants 9 of the 23 and rank 1 wants 14: 7 and 16, not 15 and 8.
    shares = assign_to_ranks(cut_update([5, 23], 8), 2, shard_over=8)
    assert [bag_range(share, 1) for share in shares] == [(0, 7), (7, 23)]
