"""Folds: which cases are tested when. Pure functions of cases, strata and a seed.

A fold is ``{case: split}``, the split train, val, test, or empty for a case that is not used.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from e2e.cohort.splits import draw, shuffled
from e2e.cohort.table import join_words
from e2e.errors import UserError, format_list
from e2e.seeds import mix_seed
from e2e.slides import Slide

Fold = dict[str, str]

STARTS = 8  # of the search for site-preserved folds; more changed nothing on 39 sites
BARCODE = re.compile(r"TCGA-([0-9A-Z]{2})-")


def case_strata(slides: Iterable[Slide], by: str) -> dict[str, str]:
    """Case -> the label its slides have in column ``by``; where they differ, all of them: ``0+2``.

    Blanks do not count; a case whose slides have nothing else is of the stratum ``""``.
    """
    words: dict[str, set[str]] = defaultdict(set)
    for slide in slides:
        words[slide.case].add(slide.target[by])
    return {case: join_words(own) for case, own in words.items()}


def tcga_sites(cases: Iterable[str]) -> dict[str, str]:
    """Case -> the centre that gave the tissue: characters 6 and 7 of its TCGA barcode.

    Raises:
        UserError: an id is no barcode.
    """
    found = {case: BARCODE.match(case) for case in cases}
    strange = sorted(case for case, match in found.items() if match is None)
    if strange:
        raise UserError(
            f"{len(strange)} case id(s) are no TCGA barcodes, so their centre is not known\n"
            f"{format_list(strange)}\n  give the column of the centre: --site COLUMN"
        )
    return {case: match[1] for case, match in found.items() if match}


def held_out(strata: Mapping[str, str], folds: int, *, seed: int) -> list[set[str]]:
    """Every case in one of ``folds`` sets; sizes, and each stratum's share, are even to within one.

    So a stratum of at least ``folds`` cases is in every set.

    Raises:
        UserError: fewer cases than folds.
    """
    _enough(len(strata), folds, "cases")
    dealt = [case for _, cases in shuffled(strata, seed, "folds") for case in cases]
    return [set(dealt[fold::folds]) for fold in range(folds)]


def held_out_sites(
    strata: Mapping[str, str], sites: Mapping[str, str], folds: int, *, seed: int
) -> list[set[str]]:
    """Every case in one of ``folds`` sets, all cases of a site in the same.

    After Howard et al. 2021 (Nature Communications 12, 4423), who solve a quadratic programme; here
    a local search: the largest site first, each goes where it costs least, and then sites move, or
    two change places, as long as that lowers the cost, which is Pearson's chi-square of the table
    sets x (strata, all). The best of some starts counts.

    Guaranteed: no site is in two sets; none is empty; no move of one site, nor a swap of two,
    would lower the cost. Not guaranteed: that each stratum is in each set, which sites may forbid.

    Raises:
        UserError: fewer sites than folds.
    """
    names, labels = sorted({sites[c] for c in strata}), sorted(set(strata.values()))
    _enough(len(names), folds, "sites")
    counts = np.zeros((len(names), len(labels) + 1))
    for case, label in strata.items():
        counts[names.index(sites[case]), [labels.index(label), -1]] += 1
    scaled = counts / np.sqrt(counts.sum(axis=0) / folds)
    starts = [_settled(scaled, folds, mix_seed(seed, "sites", start)) for start in range(STARTS)]
    place = min(starts, key=lambda place: round(_cost(scaled, place, folds), 6))
    fold_of = dict(zip(names, place.tolist(), strict=True))
    return [{c for c in strata if fold_of[sites[c]] == fold} for fold in range(folds)]


def _settled(counts: NDArray[np.float64], folds: int, seed: int) -> NDArray[np.int64]:
    """The set of each site: dealt by size, then moved and swapped until nothing is better.

    Moving ``d`` from set a to b changes the sum of squares by ``2 d (b - a + d)``; a swap of two
    sites moves their difference, and a move of one is a swap with a site of no cases.
    """
    sites = len(counts)
    order = np.random.default_rng(seed).permutation(sites)
    order = order[np.argsort(-counts[order, -1], kind="stable")]
    place = np.full(sites, -1)
    sums = np.zeros((folds, counts.shape[1]))
    for site in order:
        place[site] = np.argmin((counts[site] * sums).sum(axis=1))
        sums[place[site]] += counts[site]
    others = np.concatenate([counts, np.zeros((folds, counts.shape[1]))])
    better = True
    while better:
        better = False
        for site in order:
            goals = np.concatenate([place, np.arange(folds)])
            step = counts[site] - others
            change = (step * (sums[goals] - sums[place[site]] + step)).sum(axis=1)
            change[goals == place[site]] = 0
            other = int(np.argmin(change))
            if change[other] < -1e-9:
                better = True
                here, there = place[site], goals[other]
                sums[here] -= step[other]
                sums[there] += step[other]
                place[site] = there
                if other < sites:
                    place[other] = here
    return place


def _cost(counts: NDArray[np.float64], place: NDArray[np.int64], folds: int) -> float:
    sums = np.stack([counts[place == fold].sum(axis=0) for fold in range(folds)])
    return float(((sums - sums.mean(axis=0)) ** 2).sum())


def make_folds(
    strata: Mapping[str, str], tests: Sequence[set[str]], *, val: float, seed: int
) -> list[Fold]:
    """A fold for each test set; the share ``val`` of its other cases, stratified, is validation."""
    folds = []
    for number, test in enumerate(tests):
        rest = {case: label for case, label in strata.items() if case not in test}
        folds.append(_fold(strata, test, draw(rest, val, seed, "val", number)))
    return folds


def nested_folds(
    strata: Mapping[str, str], tests: Sequence[set[str]], inner: int, *, seed: int
) -> list[Fold]:
    """For each test set ``inner`` folds, of which each has another part of the rest as validation."""
    folds = []
    for number, test in enumerate(tests):
        rest = {case: label for case, label in strata.items() if case not in test}
        vals = held_out(rest, inner, seed=mix_seed(seed, "inner", number))
        folds += [_fold(strata, test, val) for val in vals]
    return folds


def few_shot(
    strata: Mapping[str, str], fold: Fold, shots: int, *, classes: Iterable[str], seed: int
) -> Fold:
    """The fold with ``shots`` training cases of each of the ``classes``; the others are not used, nor those
    of no label, or of several.

    The cases of fewer shots are among those of more.

    Raises:
        UserError: a class has fewer training cases.
    """
    train = {case: strata[case] for case, split in fold.items() if split == "train"}
    sizes, wanted = Counter(train.values()), {*classes}
    short = [f"{name}: {sizes[name]}" for name in sorted(wanted) if sizes[name] < shots]
    if short:
        raise UserError(
            f"{shots} training cases of each class are asked for, and there are fewer\n"
            f"{format_list(short)}\n  ask for fewer with --few-shot"
        )
    drawn = shuffled(train, seed, "few-shot")
    kept = {c for label, cases in drawn if label in wanted for c in cases[:shots]}
    return {c: "" if c in train and c not in kept else split for c, split in fold.items()}


def _fold(strata: Mapping[str, str], test: set[str], val: set[str]) -> Fold:
    return {c: "test" if c in test else "val" if c in val else "train" for c in strata}


def _enough(found: int, folds: int, what: str) -> None:
    if folds < 2 or found < folds:
        raise UserError(
            f"{found} {what} cannot be laid in {folds} folds\n"
            f"  ask for at least 2 folds, and for no more than there are {what}"
        )
