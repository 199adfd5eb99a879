"""The loader: bags with the right patches, the same pixels each time, faults with their names."""

from __future__ import annotations

import lmdb
import numpy as np
import pytest
import torch

from e2e.data.augment import Augment
from e2e.data.cohort import Slide
from e2e.data.decode import build_decoder
from e2e.data.loader import LabelledSlide, TrainingLoader, label_slides, make_bag
from e2e.data.sampler import sample_patches
from e2e.data.store import PatchStore, StoreWriter
from e2e.errors import DamagedDataError
from tests.conftest import RECIPE, jpeg, patches, pixels_of, record

CPU = torch.device("cpu")
COUNTS = {"a": 9, "b": 30, "c": 4, "d": 5, "e": 17}
DECODER = build_decoder()


@pytest.fixture
def items(make_store):
    store = make_store(COUNTS)
    slides = [Slide(name, name, "train", {"label": str(n)}) for n, name in enumerate(COUNTS)]
    return label_slides(
        slides[::-1],
        dict.fromkeys(COUNTS, store),
        lambda words: torch.tensor(int(words["label"])),
    )


def bag_of(items, **changes):
    options = {"seed": 3, "epoch": 2, "bag_size": 8, "augment": None, "size": None}
    return make_bag(items, decoder=DECODER, **(options | changes))


def loader_of(items, **changes) -> TrainingLoader:
    options = {
        "seed": 0,
        "bags": 2,
        "bag_size": 4,
        "augment": Augment(crop=0.5, size=16),
        "chunk": 4,
    }
    return TrainingLoader(items, DECODER, **(options | changes))


def test_slides_are_in_the_order_of_their_ids_with_their_targets(items):
    assert [item.slide.id for item in items] == list("abcde")
    assert [int(item.target) for item in items] == [0, 1, 2, 3, 4]
    assert items[1].record.count == 30


def test_a_bag_holds_the_sampled_patches_of_its_slides(items):
    bag = bag_of(items[:3])
    chosen = [sample_patches(s, COUNTS[s], 8, seed=3, epoch=2) for s in "abc"]
    assert bag.offsets == (0, 8, 16, 20)
    assert bag.slides == ("a", "b", "c")
    assert bag.target.tolist() == [0, 1, 2]
    assert bag.weight.tolist() == [1, 1, 1]
    expected = pixels_of(
        [patches(s, 30)[i] for s, rows in zip("abc", chosen, strict=True) for i in rows]
    )
    np.testing.assert_array_equal(bag.pixels(0, 20, CPU).permute(0, 2, 3, 1), expected)
    coords = np.concatenate(
        [record(s, 30).coords[rows] for s, rows in zip("abc", chosen, strict=True)]
    )
    np.testing.assert_array_equal(bag.coords, coords)


def test_all_patches_are_taken_in_their_order(items):
    bag = bag_of(items[1:2], bag_size=None)
    np.testing.assert_array_equal(bag.coords, record("b", 30).coords)
    np.testing.assert_array_equal(
        bag.pixels(5, 7, CPU).permute(0, 2, 3, 1), pixels_of(patches("b", 30)[5:7])
    )


@pytest.mark.parametrize("augment", [None, Augment(), Augment(crop=0.3, size=20), Augment(size=16)])
def test_pixels_are_the_same_each_time_and_however_they_are_cut(items, augment):
    bag = bag_of(items, augment=augment)
    whole = bag.pixels(0, bag.num_patches, CPU)
    assert torch.equal(bag.pixels(0, bag.num_patches, CPU), whole)
    for width in (1, 3, 8, 13):
        starts = range(0, bag.num_patches, width)
        ends = [min(start + width, bag.num_patches) for start in starts]
        pieces = [bag.pixels(s, e, CPU) for s, e in zip(starts, ends, strict=True)]
        assert torch.equal(torch.cat(pieces), whole)


def test_a_slide_looks_the_same_in_any_batch(items):
    together = bag_of(items, augment=Augment(crop=0.3))
    alone = bag_of(items[1:2], augment=Augment(crop=0.3))
    start, stop = together.offsets[1], together.offsets[2]
    assert torch.equal(together.pixels(start, stop, CPU), alone.pixels(0, 8, CPU))
    assert together.seeds[1] == alone.seeds[0]


def test_epochs_and_seeds_give_other_views(items):
    views = [bag_of(items[:1], augment=Augment(), seed=s, epoch=e) for s in (0, 1) for e in (0, 1)]
    assert len({view.pixels(0, 8, CPU).numpy().tobytes() for view in views}) == 4


def test_evaluation_sees_patches_as_stored_at_the_asked_size(items):
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
        seen = []
        for rank in range(world):
            bags = list(loader.epoch(0, rank=rank, world_size=world))
            assert [slides for _, slides in bags] == [2, 2, 1]
            seen += [s for bag, _ in bags if bag.weight.all() for s in bag.slides]
        assert sorted(seen) == list("abcde")


def test_bags_are_grouped_alike_on_any_number_of_ranks(items):
    loader = loader_of(items, bags=5, chunk=8)  # at most two bags of four

    def groups(world: int) -> set[tuple[str, ...]]:
        bags = [
            bag for rank in range(world) for bag, _ in loader.epoch(0, rank=rank, world_size=world)
        ]
        return {bag.slides[a:b] for bag in bags if bag.weight.all() for a, b in bag.runs}

    assert sorted(map(len, groups(1))) == [1, 2, 2]
    assert groups(1) == groups(2) == groups(3) == groups(7)


def test_training_sees_the_augmented_view(items):
    (bag, _), *_ = loader_of(items, augment=Augment(crop=0.3, size=16)).epoch(
        0, rank=0, world_size=1
    )
    plain = bag_of(
        [i for i in items if i.slide.id in bag.slides], seed=0, epoch=0, bag_size=4, size=16
    )
    seen = bag.pixels(0, bag.num_patches, CPU)
    assert seen.shape == (8, 3, 16, 16)
    assert sorted(bag.slides) == sorted(plain.slides)
    expected = plain.pixels(0, 8, CPU)
    assert not any(torch.allclose(view, stored, atol=0.02) for view in seen for stored in expected)


def test_a_rank_without_a_slide_gets_one_that_counts_nothing(items):
    *_, (bag, slides) = loader_of(items).epoch(0, rank=1, world_size=2)
    assert slides == 1
    assert len(bag) == 1
    assert bag.weight.tolist() == [0]


def test_an_epoch_goes_on_in_the_middle_as_if_never_stopped(items):
    loader = loader_of(items)
    whole = list(loader.epoch(4, rank=0, world_size=1))
    rest = list(loader.epoch(4, rank=0, world_size=1, first=1))
    assert len(rest) == 2
    for (bag, _), (again, _) in zip(whole[1:], rest, strict=True):
        assert bag.slides == again.slides
        assert torch.equal(
            bag.pixels(0, bag.num_patches, CPU), again.pixels(0, bag.num_patches, CPU)
        )


def labelled(store) -> LabelledSlide:
    return LabelledSlide(Slide("s", "s", "train", {}), store, torch.tensor(0))


@pytest.mark.parametrize("broken", [b"", b"no jpeg", jpeg(1)[:-30], jpeg(1, width=48)])
def test_a_patch_that_cannot_be_decoded_is_named_by_its_place_in_the_slide(tmp_path, broken):
    values = patches("s", 12)
    values[9] = broken
    with StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer:
        writer.add(record("s", 12), values)
    bag = bag_of([labelled(PatchStore(tmp_path / "x.lmdb"))], bag_size=None)
    assert bag.pixels(0, 9, CPU).shape == (9, 3, 32, 32)
    with pytest.raises(DamagedDataError, match=r"x.lmdb: slide 's' patch 9 is ") as error:
        bag.pixels(6, 12, CPU)
    assert "inspect_lmdb.py --verify" in str(error.value)


def test_a_patch_that_is_missing_is_named(make_store, tmp_path):
    data = make_store({"s": 5}).path.read_bytes()
    path = tmp_path / "lost.lmdb"
    path.write_bytes(data)
    with lmdb.open(str(path), subdir=False, map_size=1 << 24) as env, env.begin(write=True) as txn:
        txn.delete(b"p" + bytes(7) + b"\x03")
    bag = bag_of([labelled(PatchStore(path))], bag_size=None)
    with pytest.raises(DamagedDataError, match="slide 's' lacks patch 3 of 5"):
        bag.pixels(0, 5, CPU)
