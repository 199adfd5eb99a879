"""Cut cases into folds: pure functions of the cases, their strata and a seed.

A fold is ``{case: split}``, with the split train, val, test, or empty for a case that is not used.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from e2e.cohort.splits import SPLITS, draw_cases, find_missing_classes, shuffle_strata
from e2e.cohort.table import join_words
from e2e.errors import UserError, format_list
from e2e.seeds import mix_seed
from e2e.slides import Slide

Fold = dict[str, str]

TCGA = "tcga"
"""In place of the name of a column of centres: take the centres from TCGA barcodes."""
BLANK = "(blank)"
"""Name of the class of slides without a label, in tables."""
STARTS = 8
"""Starts of the search for site-preserved folds; more changed nothing on 39 sites."""
BARCODE = re.compile(r"TCGA-([0-9A-Z]{2})-")


def case_strata(slides: Iterable[Slide], by: str) -> dict[str, str]:
    """Return the stratum of each case.

    Parameters
    ----------
    slides
        The slides of the cohort.
    by
        Column of the target to stratify by.

    Returns
    -------
    dict
        Case -> the label of its slides. Where they differ, all labels joined, such as ``0+2``.
        Blanks do not count; a case with nothing else is in the stratum ``""``.
    """
    words: dict[str, set[str]] = defaultdict(set)
    for slide in slides:
        words[slide.case].add(slide.target[by])
    return {case: join_words(labels) for case, labels in words.items()}


def tcga_sites(cases: Iterable[str]) -> dict[str, str]:
    """Return the tissue source site of each case: characters 6 and 7 of its TCGA barcode.

    Parameters
    ----------
    cases
        Case or slide ids.

    Returns
    -------
    dict
        Id -> two-letter code of the site.

    Raises
    ------
    UserError
        An id is not a TCGA barcode.
    """
    matches = {case: BARCODE.match(case) for case in cases}
    other_ids = sorted(case for case, match in matches.items() if match is None)
    if other_ids:
        raise UserError(
            f"{len(other_ids)} case id(s) are not TCGA barcodes, so their centre is unknown\n"
            f"{format_list(other_ids)}\n  name the column of the centre: --site COLUMN"
        )
    return {case: match[1] for case, match in matches.items() if match}


def stratified_test_sets(strata: Mapping[str, str], folds: int, *, seed: int) -> list[set[str]]:
    """Divide the cases into test sets, one for each fold.

    Parameters
    ----------
    strata
        Case -> its stratum.
    folds
        Number of test sets.
    seed
        Random seed.

    Returns
    -------
    list of set of str
        ``folds`` sets; every case is in one. Their sizes, and those of each stratum within them,
        differ by at most one, so a stratum of at least ``folds`` cases is in every set.

    Raises
    ------
    UserError
        There are fewer cases than folds.
    """
    _check_num_folds(len(strata), folds, "cases")
    dealt = [case for _, cases in shuffle_strata(strata, seed, "folds") for case in cases]
    return [set(dealt[fold::folds]) for fold in range(folds)]


def site_preserved_test_sets(
    strata: Mapping[str, str], sites: Mapping[str, str], folds: int, *, seed: int
) -> list[set[str]]:
    """Divide the cases into test sets, with all cases of a site in the same set.

    After Howard et al. 2021 (Nature Communications 12, 4423), who solve a quadratic programme. Here
    a local search: the largest site first, each goes where it costs least; then sites move, or two
    change places, as long as that lowers the cost, which is Pearson's chi-square of the table
    sets x (strata, all). The best of ``STARTS`` starts counts.

    Parameters
    ----------
    strata
        Case -> its stratum.
    sites
        Case -> its site.
    folds
        Number of test sets.
    seed
        Random seed.

    Returns
    -------
    list of set of str
        ``folds`` sets, none empty; every case is in one, and no site in two. No move of one site
        and no swap of two would lower the cost. A stratum may be missing from a set.

    Raises
    ------
    UserError
        There are fewer sites than folds.
    """
    names, labels = sorted({sites[c] for c in strata}), sorted(set(strata.values()))
    _check_num_folds(len(names), folds, "sites")
    counts = np.zeros((len(names), len(labels) + 1))
    for case, label in strata.items():
        counts[names.index(sites[case]), [labels.index(label), -1]] += 1
    scaled = counts / np.sqrt(counts.sum(axis=0) / folds)
    starts = [
        _improve_by_swaps(scaled, folds, mix_seed(seed, "sites", start)) for start in range(STARTS)
    ]
    best = min(starts, key=lambda set_of: round(_imbalance(scaled, set_of, folds), 6))
    fold_of = dict(zip(names, best.tolist(), strict=True))
    return [{c for c in strata if fold_of[sites[c]] == fold} for fold in range(folds)]


def _improve_by_swaps(counts: NDArray[np.float64], folds: int, seed: int) -> NDArray[np.int64]:
    """Return the set of each site: assigned by size, then moved and swapped until nothing is better.

    Moving ``d`` from set a to b changes the sum of squares by ``2 d (b - a + d)``; a swap of two
    sites moves their difference, and a move of one is a swap with a site of no cases.
    """
    sites = len(counts)
    order = np.random.default_rng(seed).permutation(sites)
    order = order[np.argsort(-counts[order, -1], kind="stable")]
    set_of = np.full(sites, -1)
    sums = np.zeros((folds, counts.shape[1]))
    for site in order:
        set_of[site] = np.argmin((counts[site] * sums).sum(axis=1))
        sums[set_of[site]] += counts[site]
    partners = np.concatenate([counts, np.zeros((folds, counts.shape[1]))])
    improved = True
    while improved:
        improved = False
        for site in order:
            goals = np.concatenate([set_of, np.arange(folds)])
            step = counts[site] - partners
            change = (step * (sums[goals] - sums[set_of[site]] + step)).sum(axis=1)
            change[goals == set_of[site]] = 0
            partner = int(np.argmin(change))
            if change[partner] < -1e-9:
                improved = True
                old, new = set_of[site], goals[partner]
                sums[old] -= step[partner]
                sums[new] += step[partner]
                set_of[site] = new
                if partner < sites:
                    set_of[partner] = old
    return set_of


def _imbalance(counts: NDArray[np.float64], set_of: NDArray[np.int64], folds: int) -> float:
    sums = np.stack([counts[set_of == fold].sum(axis=0) for fold in range(folds)])
    return float(((sums - sums.mean(axis=0)) ** 2).sum())


def make_folds(
    strata: Mapping[str, str], tests: Sequence[set[str]], *, val: float, seed: int
) -> list[Fold]:
    """Make a fold from each test set, with a share of the other cases as validation.

    Parameters
    ----------
    strata
        Case -> its stratum.
    tests
        The test set of each fold.
    val
        Share of the cases that are not tested, stratified.
    seed
        Random seed.

    Returns
    -------
    list of dict
        The folds, case -> split.
    """
    folds = []
    for number, test in enumerate(tests):
        rest = {case: label for case, label in strata.items() if case not in test}
        folds.append(_assemble_fold(strata, test, draw_cases(rest, val, seed, "val", number)))
    return folds


def nested_folds(
    strata: Mapping[str, str], tests: Sequence[set[str]], inner: int, *, seed: int
) -> list[Fold]:
    """Make several folds from each test set, with another part of the rest as validation each time.

    Parameters
    ----------
    strata
        Case -> its stratum.
    tests
        The test set of each outer fold.
    inner
        Number of inner folds; each case that is not tested is validation in one of them.
    seed
        Random seed.

    Returns
    -------
    list of dict
        The folds, case -> split: all inner folds of the first test set first.
    """
    folds = []
    for number, test in enumerate(tests):
        rest = {case: label for case, label in strata.items() if case not in test}
        vals = stratified_test_sets(rest, inner, seed=mix_seed(seed, "inner", number))
        folds += [_assemble_fold(strata, test, val) for val in vals]
    return folds


def few_shot(
    strata: Mapping[str, str], fold: Fold, shots: int, *, classes: Iterable[str], seed: int
) -> Fold:
    """Reduce the training cases of a fold to a few of each class.

    The cases of fewer shots are among those of more.

    Parameters
    ----------
    strata
        Case -> its stratum.
    fold
        Case -> split.
    shots
        Training cases of each class.
    classes
        The classes. Training cases without a label, or with several, are not used.
    seed
        Random seed.

    Returns
    -------
    dict
        The fold, with an empty split for the training cases that are not used.

    Raises
    ------
    UserError
        A class has fewer training cases.
    """
    train = {case: strata[case] for case, split in fold.items() if split == "train"}
    sizes, classes = Counter(train.values()), {*classes}
    short = [f"{name}: {sizes[name]}" for name in sorted(classes) if sizes[name] < shots]
    if short:
        raise UserError(
            f"--few-shot {shots}: these classes have fewer than {shots} training cases\n"
            f"{format_list(short)}\n  use a smaller --few-shot"
        )
    shuffled = shuffle_strata(train, seed, "few-shot")
    used = {case for label, cases in shuffled if label in classes for case in cases[:shots]}
    return {c: "" if c in train and c not in used else split for c, split in fold.items()}


def count_slides(
    folds: Mapping[str, Fold], slides: Sequence[Slide], label: str, sites: Mapping[str, str] | None
) -> list[list[str]]:
    """Count what is in each split of each fold.

    Parameters
    ----------
    folds
        Number -> fold.
    slides
        The slides of the label table.
    label
        Column of the classes.
    sites
        Case -> its centre; None if centres are not counted.

    Returns
    -------
    list of list of str
        The header, and a row for each split that is not empty: slides of each class, all slides,
        cases, and centres.
    """
    classes = sorted({slide.target[label] for slide in slides})
    header = ["fold", "split", *(f"{label}={c or BLANK}" for c in classes), "slides", "cases"]
    rows = [header + ([] if sites is None else ["sites"])]
    for number, fold in folds.items():
        for split in (*SPLITS, ""):
            members = [slide for slide in slides if fold[slide.case] == split]
            if not members:
                continue
            cases = {slide.case for slide in members}
            class_counts = Counter(slide.target[label] for slide in members)
            counts = [*(class_counts[c] for c in classes), len(members), len(cases)]
            counts += [] if sites is None else [len({sites[case] for case in cases})]
            rows.append([number, split or "(unused)", *(f"{count:,}" for count in counts)])
    return rows


def find_equal_repeats(folds: Mapping[str, Fold], repeats: int) -> list[str]:
    """Find repeats with equal test sets: with few sites there may be no other balanced choice.

    Parameters
    ----------
    folds
        Number -> fold.
    repeats
        Number of repeats that the folds were cut in.

    Returns
    -------
    list of str
        One line for each repeat that equals an earlier one.
    """
    numbers = list(folds)
    size = len(numbers) // repeats
    first_with: dict[frozenset[frozenset[str]], int] = {}
    lines = []
    for repeat in range(repeats):
        tests = frozenset(
            frozenset(case for case, split in folds[number].items() if split == "test")
            for number in numbers[repeat * size : (repeat + 1) * size]
        )
        first = first_with.setdefault(tests, repeat)
        if first != repeat:
            lines.append(f"repeat {repeat} has the same test sets as repeat {first}")
    return lines


def find_lacking_splits(
    folds: Mapping[str, Fold], slides: Sequence[Slide], label: str
) -> list[str]:
    """Find splits that lack a class which another split of the fold has; a blank is no class.

    Parameters
    ----------
    folds
        Number -> fold.
    slides
        The slides of the label table.
    label
        Column of the classes.

    Returns
    -------
    list of str
        One line for each split.
    """
    classes = {slide.case: set[str]() for slide in slides}
    for slide in slides:
        classes[slide.case].update(filter(None, [slide.target[label]]))
    return [
        f"fold {number}: {split} has no {' and no '.join(f'{label}={c}' for c in missing)}"
        for number, fold in folds.items()
        for split, missing in find_missing_classes(fold, classes).items()
    ]


def _assemble_fold(strata: Mapping[str, str], test: set[str], val: set[str]) -> Fold:
    return {c: "test" if c in test else "val" if c in val else "train" for c in strata}


def _check_num_folds(count: int, folds: int, unit: str) -> None:
    """Raise UserError unless ``count`` cases or sites can be divided into ``folds`` folds."""
    if folds < 2 or count < folds:
        raise UserError(
            f"{count} {unit} cannot be divided into {folds} folds\n"
            f"  use at least 2 folds, and no more than there are {unit}"
        )
