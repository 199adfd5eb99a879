"""Train, validation and test: always by case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from e2e.data.cohort import Slide
from e2e.data.sampler import mix
from e2e.errors import UserError, listing

SPLITS = ("train", "val", "test")


def check_splits(slides: Sequence[Slide]) -> None:
    """UserError when a case lies in two splits, or train or val is empty."""
    found: dict[str, set[str]] = defaultdict(set)
    for slide in slides:
        found[slide.case].add(slide.split)
    torn = {case: splits for case, splits in found.items() if len(splits) > 1}
    if torn:
        raise UserError(
            f"{len(torn)} case(s) lie in more than one split: the test would not be honest\n"
            + listing(f"case '{c}': {', '.join(sorted(s))}" for c, s in sorted(torn.items()))
            + "\n  give each case one split in the label table"
        )
    for split in ("train", "val"):
        if not any(slide.split == split for slide in slides):
            cut_it = ", or set data.cut.val=0.1 to cut it from the training cases"
            raise UserError(
                f"no slide has the split '{split}'\n  put it into the label table"
                f"{cut_it if split == 'val' else ''}"
            )


def cut(slides: Sequence[Slide], split: str, share: float, *, by: str, seed: int) -> list[Slide]:
    """Move ``share`` of the cases that are in train, or in no split yet, to ``split``.

    Stratified by the first value of column ``by`` of each case, so that each stratum gives its
    share to within one case; a pure function of its arguments.
    """
    strata: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for slide in sorted(slides, key=lambda s: (s.case, s.id)):
        if slide.split in ("", "train") and slide.case not in seen:
            seen.add(slide.case)
            strata[slide.target[by]].append(slide.case)
    moved: set[str] = set()
    owed = 0.0
    for value, cases in sorted(strata.items()):
        order = np.random.default_rng(mix(seed, split, value)).permutation(len(cases))
        owed += share * len(cases)
        take = round(owed) - len(moved)
        moved.update(cases[i] for i in order[:take])
    return [
        replace(slide, split=split if slide.case in moved else slide.split or "train")
        for slide in slides
    ]
