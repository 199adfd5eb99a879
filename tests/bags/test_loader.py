"""The loader: bags with the right patches, the same pixels each time, faults with their names."""

from __future__ import annotations

from dataclasses import replace

import lmdb
import numpy as np
import pytest
import torch

from e2e.bags.cache import PixelCache
from e2e.bags.loader import TrainingLoader, full_bag, subset_slides
from e2e.bags.readers import cut_rows
from e2e.bags.sampler import sample_patches
from e2e.bags.spec import LabelledSlide
from e2e.errors import DamagedDataError, UserError
from e2e.images.augment import Augment
from e2e.slides import Slide
from e2e.store.lmdb import PatchStore, StoreWriter
from tests.helpers.bags import COUNTS, CPU, DECODER, bag_of, spec_of
from tests.helpers.bags import items as items
from tests.helpers.stores import RECIPE, jpeg, patches, pixels_of, record


def loader_of(items, *, bags=2, chunk=4, **changes) -> TrainingLoader:
    loading = ("shard_over", "single_chunk_per_rank")
    options = {key: changes.pop(key) for key in list(changes) if key in loading}
    spec = {"seed": 0, "bag_size": 4, "size": 16, "augment": Augment(crop=0.5, size=16)}
    return TrainingLoader(items, spec_of(**(spec | changes)), bags, chunk, **options)


def test_slides_are_in_the_order_of_their_ids_with_their_targets(items):
    assert [item.slide.id for item in items] == list("abcde")
    assert [int(item.target) for item in items] == [0, 1, 2, 3, 4]
    assert items[1].record.num_patches == 30


def test_a_bag_holds_the_sampled_patches_of_its_slides(items):
    bag = bag_of(items[:3])
    indices = [sample_patches(s, COUNTS[s], 8, seed=3, epoch=2) for s in "abc"]
    assert bag.offsets == (0, 8, 16, 20)
    assert bag.slides == ("a", "b", "c")
    assert bag.target.tolist() == [0, 1, 2]
    assert bag.weight.tolist() == [1, 1, 1]
    expected = pixels_of(
        [patches(s, 30)[i] for s, rows in zip("abc", indices, strict=True) for i in rows]
    )
    np.testing.assert_array_equal(bag.pixels(0, 20, CPU).permute(0, 2, 3, 1), expected)
    for s, rows, coords in zip("abc", indices, bag.coords, strict=True):
        np.testing.assert_array_equal(coords, record(s, 30).coords[rows])


def test_all_patches_are_taken_in_their_order(items):
    bag = bag_of(items[1:2], bag_size=None)
    np.testing.assert_array_equal(bag.coords[0], record("b", 30).coords)
    np.testing.assert_array_equal(
        bag.pixels(5, 7, CPU).permute(0, 2, 3, 1), pixels_of(patches("b", 30)[5:7])
    )


@pytest.mark.parametrize("augment", [None, Augment(), Augment(crop=0.3, size=20), Augment(size=16)])
def test_pixels_are_the_same_each_time_and_however_they_are_cut(items, augment):
    bag = bag_of(items, augment=augment)
    at_once = bag.pixels(0, bag.num_patches, CPU)
    assert torch.equal(bag.pixels(0, bag.num_patches, CPU), at_once)
    for width in (1, 3, 8, 13):
        starts = range(0, bag.num_patches, width)
        ends = [min(start + width, bag.num_patches) for start in starts]
        pieces = [bag.pixels(s, e, CPU) for s, e in zip(starts, ends, strict=True)]
        assert torch.equal(torch.cat(pieces), at_once)


def test_a_slide_looks_the_same_in_any_batch(items):
    together = bag_of(items, augment=Augment(crop=0.3))
    alone = bag_of(items[1:2], augment=Augment(crop=0.3))
    start, stop = together.offsets[1], together.offsets[2]
    assert torch.equal(together.pixels(start, stop, CPU), alone.pixels(0, 8, CPU))
    assert together.seeds[1] == alone.seeds[0]


def test_other_epochs_and_seeds_give_other_pixels(items):
    views = [bag_of(items[:1], augment=Augment(), seed=s, epoch=e) for s in (0, 1) for e in (0, 1)]
    assert len({view.pixels(0, 8, CPU).numpy().tobytes() for view in views}) == 4


def test_evaluation_reads_patches_as_stored_at_the_requested_size(items):
    stored = bag_of(items[:1], bag_size=None)
    small = bag_of(items[:1], bag_size=None, size=16)
    assert stored.pixels(0, 9, CPU).dtype == torch.uint8
    assert small.pixels(0, 9, CPU).shape == (9, 3, 16, 16)
    mean = stored.pixels(0, 9, CPU).float().mean(dim=(2, 3)) / 255
    torch.testing.assert_close(small.pixels(0, 9, CPU).mean(dim=(2, 3)), mean, atol=0.01, rtol=0)


def test_an_epoch_shows_every_slide_once_over_the_ranks(items):
    loader = loader_of(items)
    assert loader.updates() == 3
    for world in (1, 2, 3):
        slides_of_ranks = []
        for rank in range(world):
            bags = list(loader.epoch(0, rank=rank, world_size=world))
            assert [slides for _, slides in bags] == [2, 2, 1]
            slides_of_ranks += [s for bag, _ in bags if bag.weight.all() for s in bag.slides]
        assert sorted(slides_of_ranks) == list("abcde")


@pytest.mark.parametrize("shard_over", [None, 8])
def test_chunks_and_their_draws_are_the_same_on_any_number_of_ranks(items, shard_over):
    loader = loader_of(items, bags=5, chunk=3, bag_size=None, shard_over=shard_over)

    def chunks(world: int) -> list[tuple[int, bytes]]:
        """Seed and pixels of all chunks that count."""
        bags = [
            bag for rank in range(world) for bag, _ in loader.epoch(0, rank=rank, world_size=world)
        ]
        return sorted(
            (chunk.seed, bag.pixels(chunk.start, chunk.stop, CPU).numpy().tobytes())
            for bag in bags
            for chunk in bag.chunks
            if chunk.counts
        )

    one = chunks(1)
    assert len({seed for seed, _ in one}) == len(one) > 20
    assert one == chunks(2) == chunks(3) == chunks(7)


def test_a_sharded_bag_is_on_every_rank_with_all_its_coords_and_its_own_rows(items):
    loader = loader_of(items, bags=5, chunk=3, bag_size=None, shard_over=8)
    bags = [next(iter(loader.epoch(0, rank=rank, world_size=3)))[0] for rank in range(3)]
    for slide, size in (("a", 9), ("b", 30), ("e", 17)):
        positions = [bag.slides.index(slide) for bag in bags]
        shards = {bag.shards[k] for bag, k in zip(bags, positions, strict=True)}
        assert len(shards) == 1  # all ranks agree on who has how much
        rows_of_ranks = [
            bag.offsets[k + 1] - bag.offsets[k] for bag, k in zip(bags, positions, strict=True)
        ]
        assert tuple(rows_of_ranks) == shards.pop()
        assert sum(rows_of_ranks) == size
        for bag, k in zip(bags, positions, strict=True):
            np.testing.assert_array_equal(bag.coords[k], record(slide, size).coords)
            assert bag.weight[k] == pytest.approx(1 / 3)
            assert bag.seeds[k] == bags[0].seeds[positions[0]]
    order = [[s for s in bag.slides if s in "abe"] for bag in bags]
    assert order[0] == order[1] == order[2]  # the gathers meet in the same order
    assert sum(float(bag.weight.sum()) for bag in bags) == pytest.approx(5)


def test_a_rank_without_patches_of_a_sharded_bag_has_the_bag_and_a_chunk_that_does_not_count(items):
    loader = loader_of(items[1:2], bags=1, chunk=20, bag_size=None, shard_over=20)
    bags = [next(iter(loader.epoch(0, rank=rank, world_size=3)))[0] for rank in range(3)]
    idle = [bag for bag in bags if not any(chunk.counts for chunk in bag.chunks)]
    assert len(idle) == 1
    assert idle[0].slides == ("b", "b")
    assert sorted(idle[0].shards[0]) == [0, 15, 15]
    assert idle[0].shards[1] == ()
    assert idle[0].weight.tolist() == [pytest.approx(1 / 3), 0]
    assert idle[0].chunks[0].stop == 15


def test_a_single_chunk_per_rank_or_an_error_that_says_why(items):
    loader = loader_of(items, bags=5, chunk=40, bag_size=None, single_chunk_per_rank=True)
    bags = [next(iter(loader.epoch(0, rank=rank, world_size=2)))[0] for rank in range(2)]
    assert [len(bag.chunks) for bag in bags] == [1, 1]
    assert sum(bag.num_patches for bag in bags) == sum(COUNTS.values())
    small = loader_of(items, bags=5, chunk=30, bag_size=None, single_chunk_per_rank=True)
    with pytest.raises(
        UserError, match=r"an update has 34 patches on a rank and engine.chunk is 30"
    ):
        small.check(world_size=2, epochs=1)
    loader.check(world_size=2, epochs=3)


@pytest.mark.parametrize("keep", ["jpeg", "uint8", "float"])
def test_a_stage_kept_in_memory_is_not_computed_twice_and_changes_no_pixel(
    items, keep, monkeypatch
):
    read, decoded = [], []
    store, decoder = PatchStore.borrow, type(DECODER).decode  # what is read is lent, then copied
    monkeypatch.setattr(PatchStore, "borrow", lambda *args: read.append(1) or store(*args))
    monkeypatch.setattr(type(DECODER), "decode", lambda *args: decoded.append(1) or decoder(*args))
    bag = bag_of(items[:2], augment=Augment(crop=0.3, size=16), keep=keep)
    passes = [
        [bag.pixels(c.start, c.stop, CPU, will_be_reread=will_be_reread) for c in bag.chunks]
        for will_be_reread in (True, False)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*passes, strict=True))
    work = {"jpeg": (1, 2), "uint8": (1, 1), "float": (1, 1)}[keep]
    once = sum(len(cut_rows(bag.pixels._rows, c.start, c.stop)) for c in bag.chunks)
    assert (len(read), len(decoded)) == (work[0] * once, work[1] * len(bag.chunks))
    assert bag.pixels._cache == {}  # nothing is held longer than it is wanted


@pytest.mark.parametrize(
    ("keep", "slides", "kind"), [(None, 1, memoryview), ("jpeg", 1, bytes), (None, 2, bytes)]
)
def test_jpegs_of_one_slide_are_decoded_without_a_copy_unless_they_are_kept(
    items, keep, slides, kind, monkeypatch
):
    types = []

    def decode(jpegs, device):
        types.extend(map(type, jpegs))
        return real(jpegs, device)

    bag = bag_of(items[:slides], keep=keep)
    before = bag.pixels(0, bag.offsets[-1], CPU)
    real = DECODER.decode
    monkeypatch.setattr(DECODER, "decode", decode)
    assert torch.equal(bag.pixels(0, bag.offsets[-1], CPU), before)
    assert set(types) == {kind}


def test_nothing_is_kept_of_rows_that_are_read_once(items):
    bag = full_bag(items[1], spec_of(keep="float"), chunk=8)
    for chunk in bag.chunks:
        bag.pixels(chunk.start, chunk.stop, CPU)
    assert bag.pixels._cache == {}
    assert [chunk.stop - chunk.start for chunk in bag.chunks] == [7, 8, 7, 8]


def test_training_reads_augmented_patches(items):
    (bag, _), *_ = loader_of(items, augment=Augment(crop=0.3, size=16)).epoch(
        0, rank=0, world_size=1
    )
    plain = bag_of(
        [i for i in items if i.slide.id in bag.slides], epoch=0, seed=0, bag_size=4, size=16
    )
    augmented = bag.pixels(0, bag.num_patches, CPU)
    assert augmented.shape == (8, 3, 16, 16)
    assert sorted(bag.slides) == sorted(plain.slides)
    augmented, expected = augmented.float() / 255, plain.pixels(0, 8, CPU)
    assert not any(
        torch.allclose(patch, stored, atol=0.02) for patch in augmented for stored in expected
    )


def test_a_rank_without_a_slide_gets_one_of_weight_zero(items):
    *_, (bag, slides) = loader_of(items).epoch(0, rank=1, world_size=2)
    assert slides == 1
    assert len(bag) == 1
    assert bag.weight.tolist() == [0]


def test_an_epoch_resumed_in_the_middle_gives_the_same_bags(items):
    loader = loader_of(items)
    uninterrupted = list(loader.epoch(4, rank=0, world_size=1))
    rest = list(loader.epoch(4, rank=0, world_size=1, first=1))
    assert len(rest) == 2
    for (bag, _), (resumed_bag, _) in zip(uninterrupted[1:], rest, strict=True):
        assert bag.slides == resumed_bag.slides
        assert torch.equal(
            bag.pixels(0, bag.num_patches, CPU), resumed_bag.pixels(0, bag.num_patches, CPU)
        )


def labelled(store) -> LabelledSlide:
    return LabelledSlide(Slide("s", "s", "train", {}), store, torch.tensor(0))


@pytest.mark.parametrize("broken", [b"", b"no jpeg", jpeg(1)[:-30], jpeg(1, width=48)])
def test_a_patch_that_cannot_be_decoded_is_named_by_its_number_in_the_slide(tmp_path, broken):
    values = patches("s", 12)
    values[9] = broken
    with StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer:
        writer.add(record("s", 12), values)
    bag = bag_of([labelled(PatchStore(tmp_path / "x.lmdb"))], bag_size=None)
    assert bag.pixels(0, 9, CPU).shape == (9, 3, 32, 32)
    with pytest.raises(
        DamagedDataError, match=r"x.lmdb: slide 's' patch 9 (is |has zero bytes)"
    ) as error:
        bag.pixels(6, 12, CPU)
    assert "e2e inspect --verify" in str(error.value)


def test_a_patch_that_is_missing_is_named(make_store, tmp_path):
    data = make_store({"s": 5}).path.read_bytes()
    path = tmp_path / "lost.lmdb"
    path.write_bytes(data)
    with lmdb.open(str(path), subdir=False, map_size=1 << 24) as env, env.begin(write=True) as txn:
        txn.delete(b"p" + bytes(7) + b"\x03")
    bag = bag_of([labelled(PatchStore(path))], bag_size=None)
    with pytest.raises(DamagedDataError, match="slide 's' patch 3 of 5 is missing"):
        bag.pixels(0, 5, CPU)


def test_a_ranks_patches_of_exactly_one_chunk_fit(items):
    loader = loader_of(items, bags=5, chunk=65, bag_size=None, single_chunk_per_rank=True)
    bag, _ = next(loader.epoch(0, rank=0, world_size=1))
    assert [(c.start, c.stop) for c in bag.chunks] == [(0, 65)]


def test_a_single_chunk_per_rank_is_checked_for_every_epoch_before_the_first(items):
    loader = loader_of(items, bags=2, chunk=40, bag_size=None, single_chunk_per_rank=True)
    with pytest.raises(UserError, match=r"engine.chunk is 40"):  # 30 + 17 meet in some epoch
        loader.check(world_size=1, epochs=50)


def test_head_draws_differ_between_epochs(items):
    assert set(bag_of(items, epoch=1).seeds).isdisjoint(bag_of(items, epoch=2).seeds)


def test_chunks_of_fixed_size_are_equal_except_the_last_of_a_bag(items):
    loader = TrainingLoader(items[1:2], spec_of(), 1, 8, fixed_size_chunks=True)
    bag, _ = next(loader.epoch(0, rank=0, world_size=1))
    assert [c.stop - c.start for c in bag.chunks] == [8, 8, 8, 6]


def test_cached_pixels_are_decoded_once_and_the_cache_keeps_its_limit(items, monkeypatch):
    decoded = []
    decoder = type(DECODER).decode
    monkeypatch.setattr(
        type(DECODER), "decode", lambda *a: decoded.append(len(a[1])) or decoder(*a)
    )
    patch_bytes = 3 * 32 * 32
    cache = PixelCache(20 * patch_bytes)  # two of the slide's four chunks of 7 or 8
    spec = replace(spec_of(), cache=cache)
    passes = []
    for _ in range(2):
        bag = full_bag(items[1], spec, chunk=8)
        passes.append(torch.cat([bag.pixels(c.start, c.stop, CPU) for c in bag.chunks]))
    assert torch.equal(passes[0], passes[1])
    assert torch.equal(passes[0], full_bag(items[1], spec_of(), 30).pixels(0, 30, CPU))
    assert decoded == [7, 8, 7, 8, 7, 8, 30]
    assert cache.cached_bytes == 15 * patch_bytes


def test_a_subset_of_slides_is_reproducible_and_balanced_by_label():
    cohort = [
        LabelledSlide(Slide(f"s{n}", f"s{n}", "val", {}), None, torch.tensor(n % 5 == 0).int())
        for n in range(40)
    ]
    few = subset_slides(cohort, 6, group=int, seed=1)
    assert [int(i.target) for i in few].count(1) == 3
    assert [i.slide.id for i in few] == [
        i.slide.id for i in subset_slides(cohort[::-1], 6, group=int, seed=1)
    ]
    assert few == sorted(few, key=lambda item: item.slide.id)
    assert subset_slides(cohort, 6, group=int, seed=2) != few
    assert (
        len(subset_slides(cohort, None, group=int, seed=1))
        == len(subset_slides(cohort, 99, group=int, seed=1))
        == 40
    )
