"""Folds: every case tested once, strata and centres held to what is promised."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2e.cohort.folds import (
    case_strata,
    few_shot,
    make_folds,
    nested_folds,
    site_preserved_test_sets,
    stratified_test_sets,
    tcga_sites,
)
from e2e.cohort.splits import cut_split, group_numbers
from e2e.errors import UserError
from e2e.slides import Slide

CASES = st.lists(st.sampled_from("aaabbc"), min_size=6, max_size=60).map(
    lambda labels: {f"{n:03}": label for n, label in enumerate(labels)}
)
SEEDS = st.integers(0, 50)


def sites_of(strata: dict[str, str], number: int, seed: int) -> dict[str, str]:
    """Of very different sizes, each with at least one case."""
    drawn = np.random.default_rng(seed).geometric(0.2, len(strata)) % number
    drawn[:number] = np.arange(number)
    return {case: f"S{site}" for case, site in zip(strata, drawn, strict=True)}


@given(CASES, st.integers(2, 6), SEEDS)
def test_every_case_is_tested_once_and_each_stratum_is_even_to_within_one(strata, folds, seed):
    tests = stratified_test_sets(strata, folds, seed=seed)
    assert sorted(case for test in tests for case in test) == sorted(strata)
    for part in ("a", "b", "c", "abc"):
        sizes = [sum(strata[case] in part for case in test) for test in tests]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1 or sum(sizes) < folds  # in each fold where it can be


@given(CASES, st.integers(2, 5), st.floats(0, 0.5), SEEDS)
def test_a_fold_has_each_case_in_one_split_and_validation_comes_out_of_training(
    strata, folds, val, seed
):
    tests = stratified_test_sets(strata, folds, seed=seed)
    for test, fold in zip(tests, make_folds(strata, tests, val=val, seed=seed), strict=True):
        assert fold.keys() == strata.keys()
        assert {case for case, split in fold.items() if split == "test"} == test
        sizes = Counter(fold.values())
        assert abs(sizes["val"] - val * (len(strata) - len(test))) <= 0.5 + 1e-9
        for label in "abc":
            rest = [case for case in strata if strata[case] == label and case not in test]
            assert abs(sum(fold[c] == "val" for c in rest) - val * len(rest)) <= 1 + 1e-9


@settings(max_examples=30)
@given(CASES, st.integers(2, 5), SEEDS)
def test_no_site_is_in_two_folds_and_no_fold_is_empty(strata, folds, seed):
    sites = sites_of(strata, 6, seed)
    tests = site_preserved_test_sets(strata, sites, folds, seed=seed)
    assert sorted(case for test in tests for case in test) == sorted(strata)
    assert all(tests)
    held = [{sites[case] for case in test} for test in tests]
    assert sum(map(len, held)) == 6


def chi_square(strata: dict[str, str], tests: list[set[str]]) -> float:
    table = np.array(
        [[sum(strata[c] in part for c in t) for part in ("a", "b", "c", "abc")] for t in tests]
    )
    table = table[:, table.any(axis=0)]
    return float(((table - table.mean(axis=0)) ** 2 / table.mean(axis=0)).sum())


@settings(max_examples=15)
@given(CASES, SEEDS)
def test_no_move_of_a_site_and_no_swap_of_two_would_balance_the_folds_better(strata, seed):
    sites = sites_of(strata, 6, seed)
    tests = site_preserved_test_sets(strata, sites, 3, seed=seed)
    best = chi_square(strata, tests)
    place = {sites[case]: fold for fold, test in enumerate(tests) for case in test}

    def cost(place: dict[str, int]) -> float:
        return chi_square(strata, [{c for c in strata if place[sites[c]] == f} for f in range(3)])

    for site in place:
        for fold in range(3):
            assert cost(place | {site: fold}) >= best - 1e-6
        for other in place:
            assert cost(place | {site: place[other], other: place[site]}) >= best - 1e-6


def test_sites_that_can_be_balanced_are():
    strata = {f"{site}{n}": "ab"[n < 3] for site in "pqrstu" for n in range(10)}
    tests = site_preserved_test_sets(strata, {case: case[0] for case in strata}, 3, seed=1)
    assert [Counter(strata[c] for c in test) for test in tests] == [{"a": 14, "b": 6}] * 3


@given(CASES, SEEDS, st.randoms())
def test_folds_are_free_of_the_order_of_the_rows(strata, seed, random):
    rows = list(strata.items())
    random.shuffle(rows)
    sites = sites_of(strata, 6, seed)
    made = []
    for cases in (strata, dict(rows)):
        tests = stratified_test_sets(cases, 3, seed=seed)
        kept = make_folds(cases, tests, val=0.2, seed=seed)
        made.append(
            (
                kept,
                nested_folds(cases, tests, 2, seed=seed),
                site_preserved_test_sets(cases, sites, 3, seed=seed),
                few_shot(
                    cases, dict.fromkeys(cases, "train"), 0, classes={*cases.values()}, seed=seed
                ),
            )
        )
    assert made[0] == made[1]


def test_another_seed_gives_other_folds():
    strata = {f"{n}": "ab"[n % 2] for n in range(30)}
    sites = {case: case[-1] for case in strata}
    assert (
        len({tuple(map(frozenset, stratified_test_sets(strata, 3, seed=s))) for s in range(20)})
        == 20
    )
    assert (
        len(
            {
                tuple(map(frozenset, site_preserved_test_sets(strata, sites, 3, seed=s)))
                for s in range(9)
            }
        )
        > 1
    )
    tests = stratified_test_sets(strata, 3, seed=0)
    vals = {
        tuple(sorted(fold.items()))
        for seed in range(10)
        for fold in make_folds(strata, tests, val=0.3, seed=seed)
    }
    assert len(vals) == 30


@given(CASES, st.integers(2, 3), st.integers(2, 3), SEEDS)
def test_nested_folds_validate_each_case_that_is_not_tested_once(strata, outer, inner, seed):
    tests = stratified_test_sets(strata, outer, seed=seed)
    folds = nested_folds(strata, tests, inner, seed=seed)
    assert len(folds) == outer * inner
    for number, test in enumerate(tests):
        own = folds[number * inner : (number + 1) * inner]
        for fold in own:
            assert {case for case, split in fold.items() if split == "test"} == test
        vals = Counter(case for fold in own for case, split in fold.items() if split == "val")
        assert vals == {case: 1 for case in strata if case not in test}


def test_few_shots_are_of_each_class_and_more_shots_keep_those_of_fewer():
    strata = {f"{n}": "aab"[n % 3] for n in range(60)}
    [fold, *_] = make_folds(strata, stratified_test_sets(strata, 3, seed=0), val=0.2, seed=0)
    last: set[str] = set()
    for shots in (1, 2, 4, 8):
        few = few_shot(strata, fold, shots, classes="ab", seed=3)
        train = {case for case, split in few.items() if split == "train"}
        assert Counter(strata[case] for case in train) == {"a": shots, "b": shots}
        assert last < train
        last = train
        for case, split in few.items():
            assert split == (fold[case] if fold[case] != "train" or case in train else "")
    with pytest.raises(UserError, match=r"fewer than 12 training cases\n  b: 11\n.*--few-shot"):
        few_shot(strata, fold, 12, classes="ab", seed=3)


def test_a_case_of_several_classes_is_no_shot_of_any():
    strata = {"a": "0", "b": "0+2", "c": "2", "d": "0+2", "e": "2"}
    fold = few_shot(strata, dict.fromkeys("abcde", "train"), 1, classes="02", seed=0)
    assert Counter(strata[case] for case, split in fold.items() if split) == {"0": 1, "2": 1}
    with pytest.raises(UserError, match=r"fewer than 1 training cases\n  1: 0\n"):
        few_shot(strata, dict.fromkeys("abcde", "train"), 1, classes="012", seed=0)


def test_numbers_are_stratified_by_groups_and_the_seed_decides():
    rng = np.random.default_rng(0)
    ages = {f"c{n}": f"{rng.uniform(20, 90):.3f}" for n in range(100)}
    slides = [Slide(case, case, "", {"age": age}) for case, age in ages.items()]
    grouped = group_numbers(slides, "age")
    strata = case_strata(grouped, "age")
    assert sorted(Counter(strata.values()).values()) == [20] * 5
    assert max(float(ages[c]) for c in strata if strata[c][0] == "1") < min(
        float(ages[c]) for c in strata if strata[c][0] == "2"
    )
    made = [tuple(map(frozenset, stratified_test_sets(strata, 4, seed=seed))) for seed in range(9)]
    assert len(set(made)) == 9
    for test in made[0]:
        assert Counter(strata[case] for case in test) == dict.fromkeys(strata.values(), 5)
    cuts = {
        frozenset(
            s.id for s in cut_split(slides, "test", 0.2, by="age", seed=seed) if s.split == "test"
        )
        for seed in range(9)
    }
    assert len(cuts) == 9
    assert cut_split(slides, "test", 0.2, by="age", seed=0)[0].target == slides[0].target


@pytest.mark.parametrize(
    "words",
    [
        [str(k % 20) for k in range(60)],
        ["1.5", "x", *map(str, range(40))],
        ["nan", *map(str, range(40))],
        [""],
    ],
)
def test_classes_and_words_are_no_groups(words):
    slides = [Slide(str(n), str(n), "", {"label": word}) for n, word in enumerate(words)]
    assert group_numbers(slides, "label") == slides


def test_a_blank_among_numbers_stays_blank():
    slides = [Slide(str(n), str(n), "", {"label": str(n) if n else ""}) for n in range(40)]
    assert group_numbers(slides, "label")[0].target == {"label": ""}
    assert group_numbers(slides, "label")[1].target == {"label": "1 of 5 (1 to 8.6)"}


def test_a_case_of_slides_with_several_labels_is_a_stratum_of_them_all():
    slides = [Slide(f"{n}", "ab"[n > 2], "", {"label": "210"[n % 2]}) for n in range(4)]
    assert case_strata([*slides, Slide("x", "c", "", {"label": "0"})], "label") == {
        "a": "1+2",
        "b": "1",
        "c": "0",
    }


def test_a_tcga_centre_is_characters_six_and_seven():
    assert tcga_sites(["TCGA-3C-AALI", "TCGA-A2-A04P-01Z"]) == {
        "TCGA-3C-AALI": "3C",
        "TCGA-A2-A04P-01Z": "A2",
    }
    with pytest.raises(UserError, match=r"1 case id.*\n  P-10\n.*--site COLUMN"):
        tcga_sites(["TCGA-3C-AALI", "P-10"])


def test_more_folds_than_cases_or_sites_are_refused():
    strata = dict.fromkeys("abcd", "x")
    with pytest.raises(UserError, match="4 cases cannot be divided into 5 folds"):
        stratified_test_sets(strata, 5, seed=0)
    with pytest.raises(UserError, match="4 cases cannot be divided into 1 folds"):
        stratified_test_sets(strata, 1, seed=0)
    with pytest.raises(UserError, match="2 sites cannot be divided into 3 folds"):
        site_preserved_test_sets(strata, dict(zip("abcd", "ssTT", strict=True)), 3, seed=0)


def test_ten_thousand_cases_in_many_sites_are_cut():
    rng = np.random.default_rng(0)
    strata = {f"{n}": str(rng.integers(6)) for n in range(10_000)}
    sites = {case: str(int(case) % 97) for case in strata}
    tests = site_preserved_test_sets(strata, sites, 5, seed=0)
    assert all(math.isclose(len(test), 2000, rel_tol=0.06) for test in tests)
    assert sum(map(len, stratified_test_sets(strata, 5, seed=0))) == 10_000


def test_blank_labels_are_no_part_of_a_stratum_and_no_shot():
    slides = [Slide(f"{k}", "abcc"[k], "", {"label": ["x", "", "", "y"][k]}) for k in range(4)]
    strata = case_strata(slides, "label")
    assert strata == {"a": "x", "b": "", "c": "y"}
    fold = few_shot(strata, dict.fromkeys("abc", "train"), 1, classes="xy", seed=0)
    assert fold == {"a": "train", "b": "", "c": "train"}
