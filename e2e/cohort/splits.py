"""Train, validation and test: always by case, and what makes them dishonest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from e2e.cohort.table import Problem
from e2e.errors import UserError, format_list
from e2e.seeds import mix_seed
from e2e.slides import Slide

if TYPE_CHECKING:  # it needs PyTorch, and the tools that cut cohorts do not
    pass

SPLITS = ("train", "val", "test")
CLASSES = 20  # different numbers in a column; more are no classes
GROUPS = 5


class Protocol(NamedTuple):
    """What the splits of a table are used for."""

    needs: tuple[str, ...]
    """Splits that must not be empty; on the last of them epochs are compared."""
    joined: Mapping[str, str]
    """Split -> the one that it is part of; none is cut off for it."""
    fitted_to: tuple[str, ...]
    """Splits, as joined, that the task takes what it needs from."""

    @property
    def chosen_on(self) -> str:
        """The split on which epochs are compared."""
        return self.needs[-1]

    @property
    def cuts(self) -> tuple[str, ...]:
        """The splits that may be cut off the training slides."""
        known = () if "train" in self.joined else ("test", "val")
        return tuple(split for split in known if split not in self.joined)


HONEST = Protocol(("train", "val"), {}, ("train",))
AS_PUBLISHED = Protocol(("train", "test"), {"val": "test"}, ("train", "test"))
EXTERNAL = Protocol(("test",), dict.fromkeys(("", "train", "val"), "test"), ())
"""A cohort that the run has never seen: all of it is the test."""


def check_cases(slides: Sequence[Slide]) -> None:
    """UserError when a case lies in two splits."""
    found: dict[str, set[str]] = defaultdict(set)
    for slide in slides:
        found[slide.case].add(slide.split)
    torn = {case: splits for case, splits in found.items() if len(splits) > 1}
    if torn:
        raise UserError(
            f"{len(torn)} case(s) lie in more than one split: the test would not be honest\n"
            + format_list(f"case '{c}': {', '.join(sorted(s))}" for c, s in sorted(torn.items()))
            + "\n  give each case one split, in the label table or in data.split_file"
        )


def check_splits(slides: Sequence[Slide], *, needs: Sequence[str] = HONEST.needs) -> None:
    """UserError when a case lies in two splits, or one of ``needs`` is empty."""
    check_cases(slides)
    for split in needs:
        if not any(slide.split == split for slide in slides):
            cut_it = ", or set data.cut.val=0.1 to cut it from the training cases"
            raise UserError(
                f"no slide has the split '{split}'\n  put it into the label table"
                f"{cut_it if split == 'val' else ''}"
            )


def find_missing_classes(
    splits: Mapping[str, str], classes: Mapping[str, Iterable[str]]
) -> dict[str, list[str]]:
    """The classes that a split lacks, of those that any other has; splits without ids are left out.

    Args:
        splits: id -> train, val, test, or empty where it is not used.
        classes: id -> its classes: of survival the words of the event column, or whether it has an event.

    Returns:
        Split -> sorted classes; nothing where all is well.
    """
    found: dict[str, set[str]] = {split: set() for split in SPLITS if split in splits.values()}
    for name, split in splits.items():
        if split:
            found[split].update(classes[name])
    known = set().union(*found.values())
    return {split: sorted(known - own) for split, own in found.items() if known - own}


def assign(
    slides: Sequence[Slide], splits: Mapping[str, str], where: str, *, cases: bool = False
) -> tuple[list[Slide], list[Problem]]:
    """Give each slide the split of its id, or of its case's.

    Args:
        splits: slide or case id -> train, val, test, or empty where it is not to be used.
        where: they come from, for the problems.
        cases: the ids are those of cases, of which one may be another's slide's too: 1, 2, 3.

    Returns:
        The slides that have a split; the ids that no slide has, and the slides of no id.
    """
    known = {slide.id for slide in slides} | {slide.case for slide in slides}
    problems = [
        Problem(i, where, "the label table has no row for it") for i in splits.keys() - known
    ]
    kept: list[Slide] = []
    for slide in slides:
        first, second = (slide.case, slide.id) if cases else (slide.id, slide.case)
        split = splits.get(first, splits.get(second))
        if split is None:
            problems.append(Problem(slide.id, where, "neither the slide nor its case has a split"))
        elif split:
            kept.append(replace(slide, split=split))
    return kept, sorted(problems, key=lambda problem: (problem.problem, problem.slide))


def cut(slides: Sequence[Slide], split: str, share: float, *, by: str, seed: int) -> list[Slide]:
    """Move ``share`` of the cases that are in train, or in no split yet, to ``split``.

    Stratified by the first value of column ``by`` of each case, so that each stratum gives its
    share to within one case; a pure function of its arguments.
    """
    free: dict[str, str] = {}
    for slide in sorted(group_numbers(slides, by), key=lambda s: (s.case, s.id)):
        if slide.split in ("", "train"):
            free.setdefault(slide.case, slide.target[by])
    moved = draw(free, share, seed, split)
    return [
        replace(slide, split=split if slide.case in moved else slide.split or "train")
        for slide in slides
    ]


def group_numbers(slides: Sequence[Slide], by: str) -> list[Slide]:
    """With the group of the number, where column ``by`` holds more than ``CLASSES`` different ones.

    To be stratified by: numbers that hardly two cases share stratify nothing. The ``GROUPS`` groups are
    cut at quantiles; blanks, and a column with other words, stay as they are.
    """
    words = {slide.target[by] for slide in slides} - {""}
    try:
        number = {word: float(word) for word in words}
    except ValueError:
        return list(slides)
    if len(words) <= CLASSES or not np.isfinite([*number.values()]).all():
        return list(slides)
    known = [number[slide.target[by]] for slide in slides if slide.target[by]]
    edges = np.quantile(known, np.arange(GROUPS + 1) / GROUPS)
    groups = [f"{k + 1} of {GROUPS} ({edges[k]:g} to {edges[k + 1]:g})" for k in range(GROUPS)]
    name = {w: groups[np.searchsorted(edges[1:-1], n, side="right")] for w, n in number.items()}
    return [replace(s, target={**s.target, by: name.get(s.target[by], "")}) for s in slides]


def draw(strata: Mapping[str, str], share: float, *seed: int | str) -> set[str]:
    """A ``share`` of the cases, of each stratum to within one case.

    Args:
        strata: case -> its stratum.
        seed: numbers and words; the same give the same cases, in whatever order ``strata`` lies.
    """
    chosen: set[str] = set()
    owed = 0.0
    for _, cases in shuffled(strata, *seed):
        owed += share * len(cases)
        chosen.update(cases[: round(owed) - len(chosen)])
    return chosen


def shuffled(strata: Mapping[str, str], *seed: int | str) -> list[tuple[str, list[str]]]:
    """The strata, sorted, each with its cases in an order that ``seed`` and they alone decide."""
    members: dict[str, list[str]] = defaultdict(list)
    for case in sorted(strata):
        members[strata[case]].append(case)
    return [
        (
            value,
            [
                cases[i]
                for i in np.random.default_rng(mix_seed(*seed, value)).permutation(len(cases))
            ],
        )
        for value, cases in sorted(members.items())
    ]
