"""Bags of several magnifications, filled with copies, in turn by label, drawn by attention."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from e2e.bags.loader import TrainingLoader, full_bag, label_slides
from e2e.bags.readers import PixelRowReader
from e2e.bags.sampler import SAMPLERS, sample_patches
from e2e.bags.spec import BagSpec, LabelledSlide
from e2e.cohort.load import load_cohort
from e2e.cohort.match import check_patch_sizes, match_scales
from e2e.cohort.readers import open_patch_readers
from e2e.errors import DamagedDataError, UserError
from e2e.images.augment import Augment
from e2e.images.decode import build_decoder
from e2e.runs.cohort import cohort_spec
from e2e.runs.parts import build_task
from e2e.settings.schema import Columns, Data, Plugin
from e2e.slides import Slide
from e2e.store.lmdb import PatchStore, StoreWriter
from e2e.store.open import expand_store_paths
from tests.helpers.stores import RECIPE, jpeg, patches, pixels_of, record, write_store

CPU = torch.device("cpu")
DECODER = build_decoder()
MAIN, SUB = {"a": 40, "b": 30, "c": 9}, {"a": 10, "b": 12, "c": 2}


def slides_of(counts) -> list[Slide]:
    return [Slide(s, s, "train", {"label": str(n % 2)}) for n, s in enumerate(counts)]


@pytest.fixture
def items(tmp_path):
    stores = [write_store(tmp_path / f"{n}.lmdb", c) for n, c in (("main", MAIN), ("sub", SUB))]
    matched, problems = match_scales(slides_of(MAIN), [stores[1:]])
    assert problems == []
    both = {slide: [stores[0], *others] for slide, others in matched.items()}
    return label_slides(slides_of(MAIN), both, lambda words: torch.tensor(int(words["label"])))


def bag(items, epoch=1, **options):
    spec = BagSpec(
        PixelRowReader(DECODER, augment=options.pop("augment", None)), **({"seed": 5} | options)
    )
    loader = TrainingLoader(items, spec, bags=len(items), chunk=16)
    return next(loader.epoch(epoch, rank=0, world_size=1))[0]


def rows_of(bag, slide: str):
    return [part for part in bag.pixels._rows if part.slide == slide]


def test_a_bag_takes_its_share_from_each_magnification(items):
    both = bag(items, bag_size=16, shares=(3, 1))
    for slide, main, sub in (("a", 12, 4), ("b", 12, 4), ("c", 9, 2)):
        assert [len(part) for part in rows_of(both, slide)] == [main, sub]
        assert [part.reader.path.stem for part in rows_of(both, slide)] == ["main", "sub"]
    assert dict(zip(both.slides, both.sizes, strict=True)) == {"a": 16, "b": 16, "c": 11}
    place = both.slides.index("a")
    main, sub = rows_of(both, "a")
    expected = np.concatenate(
        [record("a", 40).coords[main.indices], record("a", 10).coords[sub.indices]]
    )
    np.testing.assert_array_equal(both.coords[place], expected)
    start = both.offsets[place]
    pixels = both.pixels(start, start + 16, CPU).permute(0, 2, 3, 1)
    jpegs = [patches("a", 40)[i] for i in main.indices] + [patches("a", 10)[i] for i in sub.indices]
    np.testing.assert_array_equal(pixels, pixels_of(jpegs))


def test_one_magnification_does_not_depend_on_the_others(items):
    alone = [replace(item, other_scales=()) for item in items]
    one, two = bag(items, bag_size=7), bag(alone, bag_size=7)
    assert torch.equal(one.pixels(0, 21, CPU), two.pixels(0, 21, CPU))
    assert one.seeds == two.seeds
    np.testing.assert_array_equal(
        rows_of(one, "a")[0].indices, sample_patches("a", 40, 7, seed=5, epoch=1)
    )


def test_the_same_patch_number_looks_different_at_each_magnification(items):
    main, sub = rows_of(bag(items, bag_size=None, shares=(1, 1)), "a")
    assert set(main.seeds()).isdisjoint(sub.seeds())


def test_evaluation_reads_the_first_magnification_alone(items):
    spec = BagSpec(PixelRowReader(DECODER))
    assert full_bag(items[0], spec, 64).num_patches == 40


def test_short_bags_are_short_or_filled_with_copies_on_request(items):
    assert bag(items, bag_size=16, shares=(3, 1)).num_patches == 43
    filled = bag(items, bag_size=16, shares=(3, 1), fill_with_copies=True)
    assert filled.sizes == [16, 16, 16]
    main, sub = rows_of(filled, "c")
    assert sorted(set(main.indices)) == list(range(9))
    assert (len(main), len(sub)) == (12, 4)


def test_neighbours_share_a_crop_on_request_and_nothing_else(items):
    augment = Augment(24, flip="none", crop=0.2)
    one, two = (bag(items, bag_size=8, augment=augment, shared_crops=n) for n in (4, 0))
    shared = np.concatenate([part.crop_seeds for part in one.pixels._rows])
    assert [len(set(group)) for group in np.split(shared, 4)] == [1, 1, 1, 1]
    assert len(set(shared)) == 4
    assert not torch.equal(one.pixels(0, 24, CPU), two.pixels(0, 24, CPU))
    later = bag(items, 2, bag_size=8, augment=augment, shared_crops=4)
    assert set(shared).isdisjoint(np.concatenate([part.crop_seeds for part in later.pixels._rows]))
    halves = torch.cat([one.pixels(0, 11, CPU), one.pixels(11, 24, CPU)])
    torch.testing.assert_close(halves, one.pixels(0, 24, CPU))


def test_blue_and_red_are_swapped_on_request(items):
    spec = BagSpec(PixelRowReader(DECODER, bgr=True))
    plain, swapped = (full_bag(items[0], v, 64) for v in (BagSpec(PixelRowReader(DECODER)), spec))
    assert torch.equal(swapped.pixels(0, 40, CPU), plain.pixels(0, 40, CPU).flip(1))


def test_labels_come_in_turn_and_a_slide_that_comes_again_shows_other_patches(tmp_path):
    counts = {f"s{n}": 20 for n in range(8)}
    store = write_store(tmp_path / "x.lmdb", counts)
    items = [
        LabelledSlide(Slide(s, s, "train", {}), store, torch.tensor(int(n == 0)))
        for n, s in enumerate(counts)
    ]
    spec = BagSpec(PixelRowReader(DECODER, augment=Augment(crop=0.5)), seed=1, bag_size=6)
    loader = TrainingLoader(items, spec, bags=2, chunk=6, groups=[int(i.target) for i in items])
    bags = [bag for bag, _ in loader.epoch(0, rank=0, world_size=1)]
    assert loader.updates() == len(bags) == 4
    resumed = [bag for bag, _ in loader.epoch(0, rank=0, world_size=1, first=2)]
    assert [bag.seeds for bag in resumed] == [bag.seeds for bag in bags[2:]]
    assert [sorted(bag.target.tolist()) for bag in bags] == [[0, 1]] * 4
    drawn = Counter(slide for bag in bags for slide in bag.slides)
    assert drawn["s0"] == 4
    again = [
        (tuple(part.indices), bag.seeds[bag.slides.index("s0")], bag.chunks[0].seed)
        for bag in bags
        for part in rows_of(bag, "s0")
    ]
    for values in zip(*again, strict=True):
        assert len(set(values)) == 4


def test_scores_decide_which_patches_of_the_first_magnification_are_drawn(items):
    scores = {"a": np.arange(40, dtype=np.float32)}
    sampler = SAMPLERS.build("attention", top=1.0)
    both = bag(items, bag_size=16, shares=(3, 1), sampler=sampler, scores=scores)
    main, sub = rows_of(both, "a")
    assert main.indices.tolist() == list(range(28, 40))
    unscored = bag(items, bag_size=16, shares=(3, 1), sampler=SAMPLERS.build("random"))
    np.testing.assert_array_equal(sub.indices, rows_of(unscored, "a")[1].indices)
    np.testing.assert_array_equal(rows_of(both, "b")[0].indices, rows_of(unscored, "b")[0].indices)


def test_regions_are_drawn_by_the_coords_of_each_magnification(items):
    both = bag(items, bag_size=16, shares=(3, 1), sampler=SAMPLERS.build("regions", grid=2))
    assert [len(part) for part in rows_of(both, "a")] == [12, 4]


def test_a_slide_without_patches_at_one_magnification_is_named_with_it(tmp_path):
    sub = write_store(tmp_path / "sub.lmdb", {"a": 2, "c": 0, "other": 3})
    matched, problems = match_scales(slides_of("abc"), [[sub]])
    assert set(matched) == {"a"}
    assert [(p.slide, p.problem) for p in problems] == [
        ("b", "not in any store (data.scales[0])"),
        ("c", "has no patches (data.scales[0])"),
    ]


def write_side(path: Path, side: int) -> PatchStore:
    with StoreWriter(path, RECIPE) as writer:
        for slide in "st":
            writer.add(record(slide, 2, patch_px=side), [jpeg(n, width=side) for n in range(2)])
    return PatchStore(path)


def test_stores_of_different_patch_sizes_are_refused_within_a_scale_and_without_a_size(tmp_path):
    small, large = (write_side(tmp_path / f"{side}.lmdb", side) for side in (32, 48))
    with pytest.raises(UserError, match=r"different sizes\n  .*32.lmdb: 32 px\n  .*48.lmdb: 48 px"):
        check_patch_sizes({"s": [small], "t": [large]}, 32)
    with pytest.raises(UserError, match=r"set bag\.size=PX if magnifications differ"):
        check_patch_sizes({"s": [small, large]}, None)
    check_patch_sizes({"s": [small, large], "t": [small, large]}, 32)
    check_patch_sizes({"s": [small, small], "t": [small, small]}, None)


@pytest.mark.parametrize("size", [24, 32, 48])
def test_magnifications_of_different_patch_sizes_come_at_one_size_and_scale(tmp_path, size):
    stores = [write_side(tmp_path / f"{side}.lmdb", side) for side in (32, 48)]
    item = LabelledSlide(Slide("s", "s", "train", {}), stores[0], torch.tensor(0), (stores[1],))
    spec = BagSpec(PixelRowReader(DECODER, size, Augment(size)), shares=(1, 1))
    both, _ = next(TrainingLoader([item], spec, 1, 8).epoch(0, rank=0, world_size=1))
    pixels = both.pixels(0, 4, CPU)
    assert pixels.shape == (4, 3, size, size)
    assert (pixels.amax((1, 2, 3)) <= 1).all()
    assert (pixels.amax((1, 2, 3)) > 0.5).all()


def test_a_damaged_patch_is_named_with_its_own_magnifications_store(tmp_path):
    good = write_store(tmp_path / "good.lmdb", {"s": 2})
    with StoreWriter(tmp_path / "bad.lmdb", RECIPE) as writer:
        writer.add(record("s", 2, patch_px=48), [jpeg(1, width=48), b"no jpeg"])
    bad = PatchStore(tmp_path / "bad.lmdb")
    item = LabelledSlide(Slide("s", "s", "train", {}), good, torch.tensor(0), (bad,))
    spec = BagSpec(PixelRowReader(DECODER, 24), shares=(1, 1))
    both, _ = next(TrainingLoader([item], spec, 1, 8).epoch(0, rank=0, world_size=1))
    with pytest.raises(DamagedDataError, match=r"bad.lmdb: slide 's' patch 1 "):
        both.pixels(0, 4, CPU)


def test_regions_without_coords_are_refused_before_training(items, monkeypatch):
    spec = BagSpec(PixelRowReader(DECODER), bag_size=4, sampler=SAMPLERS.build("regions"))
    loader = TrainingLoader(items, spec, 1, 8)
    loader.check(1, 1)
    record_of = PatchStore.record
    monkeypatch.setattr(PatchStore, "record", lambda *a: replace(record_of(*a), coords=None))
    with pytest.raises(UserError, match=r"slide 'a' has no patch coordinates(?s:.*)data\.coords"):
        loader.check(1, 1)


def test_stores_are_files_globs_or_an_index(tmp_path):
    for name in ("b", "a"):
        write_store(tmp_path / f"{name}.lmdb", {name: 2})
    assert expand_store_paths(str(tmp_path / "a.lmdb")) == [tmp_path / "a.lmdb"]
    both = [tmp_path / "a.lmdb", tmp_path / "b.lmdb"]
    assert expand_store_paths(f"{tmp_path}/*.lmdb") == both
    scales = open_patch_readers([[f"{tmp_path}/*.lmdb"], [str(both[1])]])
    assert [[store.slides for store in stores] for stores in scales] == [[["a"], ["b"]], [["b"]]]


def test_no_training_slide_at_the_other_magnification_is_reported_before_training(tmp_path):
    main, sub = tmp_path / "main.lmdb", tmp_path / "sub.lmdb"
    write_store(main, MAIN)
    write_store(sub, {"other": 2})
    table = tmp_path / "labels.csv"
    table.write_text("slide,case,split,label\na,a,train,0\nb,b,train,1\nc,c,val,1\n")
    data = Data(
        labels=str(table), stores=[str(main)], scales=[[str(sub)]], columns=Columns(split="split"),
        unmatched="drop",
    )  # fmt: skip
    task = build_task(Plugin("classification", {"classes": ["0", "1"], "column": "label"}))
    with pytest.raises(UserError, match="no slide has the split 'train'"):
        load_cohort(cohort_spec(data), task, problems_file=tmp_path / "problems.csv")
    told = (tmp_path / "problems.csv").read_text()
    assert [f"{slide}," in told for slide in "abc"] == [True, True, False]
