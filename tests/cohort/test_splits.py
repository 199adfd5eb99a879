"""Splits: always by case, stratified, and checked for leaks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2e.cohort.leaks import check_copied_features, check_copied_patches
from e2e.cohort.splits import assign_splits, check_splits, cut_split, find_missing_classes
from e2e.errors import UserError
from e2e.features.reader import FeatureFiles, open_features
from e2e.slides import Slide
from e2e.store.abmilx import AbmilxStore
from e2e.store.lmdb import PatchStore, StoreWriter
from tests.helpers.abmilx_lmdb import write_seed
from tests.helpers.stores import RECIPE, jpeg, patches, record, write_store


def slide(name: str, case: str = "", split: str = "train", label: str = "x") -> Slide:
    return Slide(name, case or name, split, {"label": label})


@st.composite
def cohorts(draw) -> list[Slide]:
    """Cases of one to three slides, one split and label a case."""
    slides = []
    for number in range(draw(st.integers(1, 40))):
        split = draw(st.sampled_from(["", "train", "train", "val", "test"]))
        label = draw(st.sampled_from("aab"))
        for part in range(draw(st.integers(1, 3))):
            slides.append(slide(f"{number}-{part}", f"case{number}", split, label))
    return draw(st.permutations(slides))


@given(cohorts(), st.floats(0, 0.9), st.integers(0, 100), st.sampled_from(["val", "test"]))
def test_cutting_moves_whole_cases_out_of_train_only(slides, share, seed, split):
    done = cut_split(slides, split, share, by="label", seed=seed)
    assert [s.id for s in done] == [s.id for s in slides]
    splits = {}
    for before, after in zip(slides, done, strict=True):
        assert splits.setdefault(after.case, after.split) == after.split
        assert (after.case, after.target) == (before.case, before.target)
        if before.split not in ("", "train"):
            assert after.split == before.split
        else:
            assert after.split in ("train", split)


@given(cohorts(), st.floats(0, 0.9), st.integers(0, 100))
def test_every_stratum_gives_its_share_to_within_one_case(slides, share, seed):
    free = {s.case for s in slides if s.split in ("", "train")}
    label = {s.case: s.target["label"] for s in slides}
    moved = {
        s.case for s in cut_split(slides, "val", share, by="label", seed=seed) if s.split == "val"
    } & free
    assert abs(len(moved) - share * len(free)) <= 0.5 + 1e-9
    for stratum in "ab":
        all_of_it = [case for case in free if label[case] == stratum]
        taken = [case for case in moved if label[case] == stratum]
        assert abs(len(taken) - share * len(all_of_it)) <= 1 + 1e-9


@given(cohorts(), st.integers(0, 100), st.randoms())
def test_a_cut_is_free_of_the_order_of_the_rows(slides, seed, random):
    shuffled = list(slides)
    random.shuffle(shuffled)
    first = {s.id: s.split for s in cut_split(slides, "val", 0.3, by="label", seed=seed)}
    assert first == {s.id: s.split for s in cut_split(shuffled, "val", 0.3, by="label", seed=seed)}


def test_cuts_differ_by_seed_and_use_every_case():
    slides = [slide(str(n)) for n in range(20)]
    cuts = [
        frozenset(
            s.id for s in cut_split(slides, "val", 0.25, by="label", seed=k) if s.split == "val"
        )
        for k in range(40)
    ]
    assert {len(chosen) for chosen in cuts} == {5}
    assert len(set(cuts)) > 30
    assert len(Counter(name for chosen in cuts for name in chosen)) == 20


def test_two_cuts_take_different_cases():
    slides = [slide(str(n), label="ab"[n % 2]) for n in range(40)]
    once = cut_split(slides, "test", 0.25, by="label", seed=0)
    twice = cut_split(once, "val", 0.2, by="label", seed=0)
    assert Counter(s.split for s in twice) == {"train": 24, "test": 10, "val": 6}
    assert Counter(s.target["label"] for s in twice if s.split == "test") == {"a": 5, "b": 5}


def test_honest_splits_pass():
    check_splits([slide("a1", "a"), slide("a2", "a"), slide("b", split="val")])
    check_splits([slide("a"), slide("b", split="val"), slide("c", split="test")])


def test_a_case_in_two_splits_is_named():
    slides = [slide("a1", "A", "train"), slide("a2", "A", "test"), slide("a3", "A", "val")]
    slides += [slide("b1", "B", "train"), slide("b2", "B", "val"), slide("c", "C", "val")]
    with pytest.raises(UserError) as error:
        check_splits(slides)
    assert str(error.value) == (
        "2 case(s) are in more than one split, so test results would be biased\n"
        "  case 'A': test, train, val\n"
        "  case 'B': train, val\n"
        "  give each case one split, in the label table or in data.split_file"
    )


def test_a_long_list_of_cases_in_two_splits_is_counted():
    slides = [slide(f"{n}{s}", f"c{n}", s) for n in range(30) for s in ("train", "val")]
    with pytest.raises(UserError, match=r"30 case\(s\)(?s:.*)and 20 more"):
        check_splits(slides)


def test_an_empty_split_is_an_error_with_its_remedy():
    with pytest.raises(UserError, match=r"no slide has the split 'val'\n.*data.cut.val=0.1"):
        check_splits([slide("a"), slide("b", split="test")])
    with pytest.raises(UserError, match="no slide has the split 'train'") as error:
        check_splits([slide("a", split="val")])
    assert "data.cut" not in str(error.value)  # nothing can be cut from no training cases


def test_a_class_missing_from_a_split_is_found():
    classes = {"1": ["a"], "2": ["b"], "3": ["a", "c"], "4": ["b"], "5": ["z"]}
    splits = {"1": "train", "2": "train", "3": "val", "4": "test", "5": ""}
    assert find_missing_classes(splits, classes) == {
        "train": ["c"],
        "val": ["b"],
        "test": ["a", "c"],
    }
    assert find_missing_classes({"1": "train", "3": "train"}, classes) == {}


def test_splits_are_given_by_slide_or_by_case_and_what_has_none_is_listed():
    slides = [
        slide("a1", "A", ""),
        slide("a2", "A", ""),
        slide("b1", "B", ""),
        slide("01", "1", ""),
    ]
    kept, problems = assign_splits(
        slides, {"A": "train", "b1": "test", "1": "", "01 ": "val"}, "f.csv"
    )
    assert [(s.id, s.split) for s in kept] == [("a1", "train"), ("a2", "train"), ("b1", "test")]
    assert [str(p) for p in problems] == ["01 : not in the label table (f.csv)"]
    kept, problems = assign_splits(slides, {"a1": "train", "1": "val", "c": "val"}, "f.csv")
    assert [(s.id, s.split) for s in kept] == [("a1", "train"), ("01", "val")]
    assert [str(p) for p in problems] == [
        "a2: neither the slide nor its case has a split (f.csv)",
        "b1: neither the slide nor its case has a split (f.csv)",
        "c: not in the label table (f.csv)",
    ]


def store_of(path: Path, **slides: list[bytes]) -> PatchStore:
    with StoreWriter(path, RECIPE) as writer:
        for name, jpegs in slides.items():
            writer.add(record(name, len(jpegs)), jpegs)
    return PatchStore(path)


def test_the_same_patches_under_two_names_in_two_splits_stop_with_the_names(tmp_path):
    one, two = patches("one", 5), patches("two", 5)
    first = store_of(tmp_path / "a.lmdb", p=one, q=two, r=two, s=patches("s", 4))
    second = store_of(tmp_path / "b.lmdb", x=one)
    stores = {"p": first, "q": first, "r": first, "s": first, "x": second}
    slides = [slide("p"), slide("q"), slide("r"), slide("s"), slide("x", split="test")]
    with pytest.raises(UserError) as error:
        check_copied_patches(slides, stores)
    assert str(error.value) == (
        "1 slide(s) are in more than one split under different names, so test results would be biased\n"
        "  'p' (train) = 'x' (test): the same 5 patches\n"
        "  keep one name of each in the label table"
    )
    check_copied_patches(slides[:4], stores)  # q and r are one slide too, but in one split
    check_copied_patches([slide("p"), slide("x", split="")], stores)  # not used


def test_slides_that_share_some_patches_are_not_one(tmp_path):
    one, blank = patches("one", 5), jpeg(77)
    other = [*patches("other", 2), one[2], *patches("more", 2)]
    store = store_of(tmp_path / "a.lmdb", a=one, b=other, c=[blank] * 2, d=[blank] * 3)
    slides = [
        slide(n, split=s) for n, s in zip("abcd", ("train", "val", "test", "train"), strict=True)
    ]
    check_copied_patches(slides, dict.fromkeys("abcd", store))


@pytest.mark.parametrize("second", [[0, 1, 2, 3], [4, 3, 2, 1, 0], [0, 2, 4, 99, 98], [1]])
def test_a_slide_that_has_most_of_its_patches_in_common_with_one_of_another_split_stops(
    tmp_path, second
):
    one, other = patches("one", 5), patches("other", 100)
    some = [one[k] if k < 5 else other[k] for k in second]
    first = store_of(tmp_path / "a.lmdb", a=one, b=other[:9])
    stores = {"a": first, "b": first, "x": store_of(tmp_path / "b.lmdb", x=some)}
    slides = [slide("a"), slide("b"), slide("x", split="test")]
    with pytest.raises(UserError) as error:
        check_copied_patches(slides, stores)
    common, least = sum(k < 5 for k in second), min(5, len(second))
    assert str(error.value) == (
        "1 slide(s) have most of their patches in common with a slide of another split, so test results "
        f"would be biased\n  'a' (train) and 'x' (test): {common} of {least} patches\n"
        "  keep one of each in the label table"
    )
    check_copied_patches([*slides[:2], slide("x")], stores)


def test_sums_that_are_alike_by_chance_are_no_patches_in_common(tmp_path, monkeypatch):
    store = store_of(tmp_path / "a.lmdb", a=patches("a", 3), b=patches("b", 2))
    monkeypatch.setattr(
        PatchStore, "checksums", lambda self, name: np.arange(self.num_patches(name))
    )
    check_copied_patches([slide("a"), slide("b", split="test")], dict.fromkeys("ab", store))


def test_a_slide_in_a_file_without_checksums_is_found_in_a_store_that_has_them(tmp_path):
    theirs = AbmilxStore(write_seed(tmp_path / "theirs.lmdb", {"a": 6, "b": 6, "c": 1, "d": 1}))
    ours = store_of(tmp_path / "ours.lmdb", A=patches("a", 6), C=patches("c", 1))
    stores = dict.fromkeys("abcd", theirs) | dict.fromkeys("AC", ours)
    slides = [slide(name) for name in "abcd"] + [slide(name, split="test") for name in "AC"]
    with pytest.raises(UserError) as error:
        check_copied_patches(slides, stores)
    assert sorted(str(error.value).splitlines()[1:3]) == [
        "  'A' (test) = 'a' (train): the same 6 patches",
        "  'C' (test) = 'c' (train): the same 1 patches",
    ]
    check_copied_patches([slide("b"), slide("d"), *slides[4:]], stores)


def test_a_store_with_checksums_is_not_read_to_tell_its_slides_apart(tmp_path, monkeypatch):
    store = write_store(tmp_path / "s.lmdb", dict.fromkeys("abcd", 9))
    monkeypatch.setattr(PatchStore, "read", lambda *_: pytest.fail("patches were read"))
    slides = [slide(n, split="train" if n < "c" else "test") for n in "abcd"]
    check_copied_patches(slides, dict.fromkeys("abcd", store))


def write_features(path: Path, seed: int, coords: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["features"] = np.random.default_rng(seed).normal(size=(7, 3)).astype(np.float32)
        file["coords"] = coords


def test_the_same_features_at_the_same_places_under_two_names_are_found_too(tmp_path):
    grid = np.arange(14).reshape(7, 2) * 256
    for name, seed, coords in (("a", 1, grid), ("b", 2, grid), ("c", 1, grid), ("d", 1, grid + 1)):
        write_features(tmp_path / f"{name}.h5", seed, coords)
    stores = dict.fromkeys("abcd", open_features(tmp_path))
    slides = [slide("a"), slide("b", split="val"), slide("c", split="test")]
    with pytest.raises(UserError, match=r"'a' \(train\) = 'c' \(test\): the same 7 patches"):
        check_copied_features(slides, stores)
    check_copied_features(slides[:2], stores)
    check_copied_features([slides[0], slide("d", split="val")], stores)


@pytest.mark.parametrize("ending", [".pt", ".npy"])
def test_the_same_features_without_places_are_found_too(tmp_path, ending):
    one, other = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    late = one.copy()
    late[-1] += 1  # differs after the rows that are glanced at
    for name, found in (("a", one), ("b", other), ("c", one), ("d", late), ("e", one[:6])):
        if ending == ".pt":
            torch.save(torch.from_numpy(found), tmp_path / f"{name}.pt")
        else:
            np.save(tmp_path / f"{name}.npy", found)
    stores = dict.fromkeys("abcde", open_features(tmp_path))
    slides = [slide("a"), *(slide(name, split="test") for name in "bcde")]
    with pytest.raises(UserError) as error:
        check_copied_features(slides, stores)
    assert str(error.value).splitlines()[1] == "  'a' (train) = 'c' (test): the same 7 patches"
    check_copied_features([s for s in slides if s.id != "c"], stores)


@pytest.mark.parametrize("placed", [True, False])
def test_features_with_other_coords_or_first_rows_are_not_read_completely(
    tmp_path, monkeypatch, placed
):
    for n, name in enumerate("ab"):
        if placed:
            write_features(tmp_path / f"{name}.h5", 1, np.full((7, 2), n))
        else:
            torch.save(torch.full((7, 3), float(n)), tmp_path / f"{name}.pt")
    monkeypatch.setattr(FeatureFiles, "features", lambda *_: pytest.fail("features were read"))
    stores = dict.fromkeys("ab", open_features(tmp_path))
    check_copied_features([slide("a"), slide("b", split="val")], stores)
