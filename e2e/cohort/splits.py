"""Training, validation and test: split by case, stratified, and checked for leaks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from e2e.cohort.table import Problem
from e2e.errors import UserError, format_list
from e2e.seeds import mix_seed
from e2e.slides import Slide

SPLITS = ("train", "val", "test")
MAX_CLASSES = 20
"""A column with more different numbers than this is stratified by groups of numbers."""
NUM_GROUPS = 5
"""Number of these groups."""


class SplitProtocol(NamedTuple):
    """What the splits of a cohort are used for."""

    required: tuple[str, ...]
    """Splits that must not be empty. The last of them selects the epoch."""
    merged_into: Mapping[str, str]
    """Split -> the split that it becomes part of. It is never cut from the training cases."""
    fit_splits: tuple[str, ...]
    """Splits, after merging, that the task is fitted to."""

    @property
    def selection_split(self) -> str:
        """The split that selects the epoch."""
        return self.required[-1]

    @property
    def cut_splits(self) -> tuple[str, ...]:
        """The splits that may be cut from the training cases."""
        if "train" in self.merged_into:
            return ()
        return tuple(split for split in ("test", "val") if split not in self.merged_into)


HONEST = SplitProtocol(("train", "val"), {}, ("train",))
"""Fit to train, select the epoch on val, test on test."""
AS_PUBLISHED = SplitProtocol(("train", "test"), {"val": "test"}, ("train", "test"))
"""Select the epoch on the test slides, as some publications do."""
EXTERNAL = SplitProtocol(("test",), dict.fromkeys(("", "train", "val"), "test"), ())
"""An external cohort: all slides are one test set."""


def check_cases(slides: Sequence[Slide]) -> None:
    """Check that no case is in two splits.

    Parameters
    ----------
    slides
        The slides with their splits.

    Raises
    ------
    UserError
        A case is in more than one split; names up to ten of them.
    """
    splits_by_case: dict[str, set[str]] = defaultdict(set)
    for slide in slides:
        splits_by_case[slide.case].add(slide.split)
    leaking = {case: splits for case, splits in splits_by_case.items() if len(splits) > 1}
    if leaking:
        raise UserError(
            f"{len(leaking)} case(s) are in more than one split, so test results would be biased\n"
            + format_list(f"case '{c}': {', '.join(sorted(s))}" for c, s in sorted(leaking.items()))
            + "\n  give each case one split, in the label table or in data.split_file"
        )


def check_splits(slides: Sequence[Slide], *, required: Sequence[str] = HONEST.required) -> None:
    """Check that no case is in two splits and that no required split is empty.

    Parameters
    ----------
    slides
        The slides with their splits.
    required
        Splits that must have a slide.

    Raises
    ------
    UserError
        A case is in more than one split, or a required split is empty.
    """
    check_cases(slides)
    for split in required:
        if not any(slide.split == split for slide in slides):
            cut_it = ", or set data.cut.val=0.1 to cut it from the training cases"
            raise UserError(
                f"no slide has the split '{split}'\n  add it to the label table"
                f"{cut_it if split == 'val' else ''}"
            )


def find_missing_classes(
    splits: Mapping[str, str], classes: Mapping[str, Iterable[str]]
) -> dict[str, list[str]]:
    """Return the classes that one split lacks and another has.

    Parameters
    ----------
    splits
        Id -> train, val, test, or empty if it is not used. Splits without any id are ignored.
    classes
        Id -> its classes. For survival: the values of the event column, or whether there was an
        event.

    Returns
    -------
    dict
        Split -> sorted classes that it lacks; a split that lacks none is left out.
    """
    classes_by_split: dict[str, set[str]] = {
        split: set() for split in SPLITS if split in splits.values()
    }
    for name, split in splits.items():
        if split:
            classes_by_split[split].update(classes[name])
    all_classes = set().union(*classes_by_split.values())
    return {
        split: sorted(all_classes - present)
        for split, present in classes_by_split.items()
        if all_classes - present
    }


def assign_splits(
    slides: Sequence[Slide], splits: Mapping[str, str], source: str, *, by_case: bool = False
) -> tuple[list[Slide], list[Problem]]:
    """Give each slide the split of its id, or of its case's id.

    Parameters
    ----------
    slides
        All slides of the label table.
    splits
        Slide or case id -> train, val, test, or empty if it is not used.
    source
        Where the splits come from, for the problems.
    by_case
        Whether the ids are those of cases. Then a case's id comes first where it is also the id of
        another case's slide, such as 1, 2, 3.

    Returns
    -------
    slides : list of Slide
        The slides that have a split.
    problems : list of Problem
        Ids without a slide, and slides without an id.
    """
    ids = {slide.id for slide in slides} | {slide.case for slide in slides}
    problems = [Problem(name, source, "not in the label table") for name in splits.keys() - ids]
    assigned: list[Slide] = []
    for slide in slides:
        first, second = (slide.case, slide.id) if by_case else (slide.id, slide.case)
        split = splits.get(first, splits.get(second))
        if split is None:
            problems.append(Problem(slide.id, source, "neither the slide nor its case has a split"))
        elif split:
            assigned.append(replace(slide, split=split))
    return assigned, sorted(problems, key=lambda problem: (problem.problem, problem.slide))


def cut_split(
    slides: Sequence[Slide], split: str, share: float, *, by: str, seed: int
) -> list[Slide]:
    """Move a share of the training cases, and of those without a split, to another split.

    A pure function of its arguments, whatever the order of the slides.

    Parameters
    ----------
    slides
        The slides of the cohort.
    split
        Where the cases go: ``val`` or ``test``.
    share
        Share of the cases, in [0, 1).
    by
        Column of the target to stratify by. Each stratum gives its share to within one case; the
        stratum of a case is that of its first slide.
    seed
        Random seed.

    Returns
    -------
    list of Slide
        All slides in the given order; those that had no split and are not moved are in ``train``.
    """
    strata: dict[str, str] = {}
    for slide in sorted(group_numbers(slides, by), key=lambda s: (s.case, s.id)):
        if slide.split in ("", "train"):
            strata.setdefault(slide.case, slide.target[by])
    moved = draw_cases(strata, share, seed, split)
    return [
        replace(slide, split=split if slide.case in moved else slide.split or "train")
        for slide in slides
    ]


def group_numbers(slides: Sequence[Slide], by: str) -> list[Slide]:
    """Replace the numbers of a column by groups of numbers, to stratify by them.

    Numbers that hardly two cases share stratify nothing. A column with more than ``MAX_CLASSES``
    different numbers is cut at its quantiles into ``NUM_GROUPS`` groups.

    Parameters
    ----------
    slides
        The slides of the cohort.
    by
        Column of the target.

    Returns
    -------
    list of Slide
        The slides, with the name of the group in the column. Blanks stay blank, and a column with
        few different numbers, or with other words, stays as it is.
    """
    words = {slide.target[by] for slide in slides} - {""}
    try:
        number = {word: float(word) for word in words}
    except ValueError:
        return list(slides)
    if len(words) <= MAX_CLASSES or not np.isfinite([*number.values()]).all():
        return list(slides)
    values = [number[slide.target[by]] for slide in slides if slide.target[by]]
    edges = np.quantile(values, np.arange(NUM_GROUPS + 1) / NUM_GROUPS)
    groups = [
        f"{k + 1} of {NUM_GROUPS} ({edges[k]:g} to {edges[k + 1]:g})" for k in range(NUM_GROUPS)
    ]
    name = {w: groups[np.searchsorted(edges[1:-1], n, side="right")] for w, n in number.items()}
    return [replace(s, target={**s.target, by: name.get(s.target[by], "")}) for s in slides]


def draw_cases(strata: Mapping[str, str], share: float, *seed: int | str) -> set[str]:
    """Draw a share of the cases, from each stratum to within one case.

    Parameters
    ----------
    strata
        Case -> its stratum.
    share
        Share of the cases, in [0, 1).
    *seed
        Numbers and words. The same seed draws the same cases, whatever the order of ``strata``.

    Returns
    -------
    set of str
        The drawn cases.
    """
    drawn: set[str] = set()
    target_size = 0.0
    for _, cases in shuffle_strata(strata, *seed):
        target_size += share * len(cases)
        drawn.update(cases[: round(target_size) - len(drawn)])
    return drawn


def shuffle_strata(strata: Mapping[str, str], *seed: int | str) -> list[tuple[str, list[str]]]:
    """Return the strata, each with its cases in random order.

    Parameters
    ----------
    strata
        Case -> its stratum.
    *seed
        Numbers and words; they and the cases alone decide the order.

    Returns
    -------
    list of (str, list of str)
        Stratum and its cases, sorted by stratum.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for case in sorted(strata):
        members[strata[case]].append(case)
    shuffled = []
    for stratum, cases in sorted(members.items()):
        order = np.random.default_rng(mix_seed(*seed, stratum)).permutation(len(cases))
        shuffled.append((stratum, [cases[i] for i in order]))
    return shuffled
