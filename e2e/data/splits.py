"""Train, validation and test: always by case, and what makes them dishonest."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from e2e.data.cohort import Problem, Slide
from e2e.data.sampler import mix
from e2e.data.store import PatchStore, Slides, Store
from e2e.errors import UserError, listing

if TYPE_CHECKING:  # it needs PyTorch, and the tools that cut cohorts do not
    from e2e.data.features import FeatureStore

SPLITS = ("train", "val", "test")
PIECE = 256  # patches in memory at once
ROWS = 4  # of features without coords, by which most slides differ
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
            + listing(f"case '{c}': {', '.join(sorted(s))}" for c, s in sorted(torn.items()))
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


def missing_classes(
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


def check_copies(slides: Sequence[Slide], stores: Mapping[str, Slides]) -> None:
    """UserError when slides of different splits have the same patches: one slide under two names.

    Patches are compared by the CRC-32 of their JPEGs, all of them and in order; so a second scan, or
    another cut of the grid, passes. It costs little: only slides with equally many patches are looked
    at, a :class:`PatchStore` knows the sums, and other stores are read whole only where the middle
    patch is the same. Features are read whole only where all coords are the same, or where neither
    slide has coords and the first rows are the same.

    Of slides in such stores, which know the sums, it is enough that one has most of its patches in
    common with the other, in whatever order: the same slide, packed with more tissue or less.

    Args:
        stores: of each slide, by its id.
    """
    alike: dict[object, list[Slide]] = {(): [slide for slide in slides if slide.split]}
    for key in (_count, _glance, _whole):
        finer: dict[object, list[Slide]] = defaultdict(list)
        for before, group in alike.items():
            for slide in group:
                finer[before, key(slide.id, stores[slide.id])].append(slide)
        alike = {k: group for k, group in finer.items() if len({s.split for s in group}) > 1}
    if alike:
        raise UserError(
            f"{len(alike)} slide(s) lie in more than one split under different names: the test "
            "would not be honest\n"
            + listing(
                " = ".join(f"'{s.id}' ({s.split})" for s in sorted(group, key=lambda s: s.id))
                + f": the same {stores[group[0].id].count(group[0].id):,} patches"
                for group in alike.values()
            )
            + "\n  keep one name of each in the label table"
        )
    kept = [s for s in slides if s.split and isinstance(stores[s.id], PatchStore)]
    if shared := _shared(kept, [cast(PatchStore, stores[slide.id]) for slide in kept]):
        raise UserError(
            f"{len(shared)} slide(s) have most of their patches in common with one of another split: the "
            f"test would not be honest\n{listing(shared)}\n  keep one of each in the label table"
        )


def _shared(slides: Sequence[Slide], stores: Sequence[PatchStore]) -> list[str]:
    """A line for each two slides of different splits of which one has over half its patches of the other.

    A patch that a slide has twice is blank, and counts for nothing. That sums are of the same JPEGs is
    seen by reading one of each two slides.
    """
    counted = [
        np.unique(store.checksums(slide.id), return_counts=True)
        for slide, store in zip(slides, stores, strict=True)
    ]
    own = [sums[times == 1] for sums, times in counted]
    sums = np.concatenate([np.zeros(0, np.uint32), *own])
    of = np.repeat(np.arange(len(own), dtype=np.int32), [len(part) for part in own])
    order = np.argsort(sums, kind="stable")
    sums, of = sums[order], of[order]
    at = np.flatnonzero(sums[1:] == sums[:-1])
    pairs, firsts, times = np.unique(
        np.stack([of[at], of[at + 1]]), axis=1, return_index=True, return_counts=True
    )
    lines = []
    for (a, b), first, common in zip(pairs.T, firsts, times, strict=True):
        least = min(len(own[a]), len(own[b]))
        if slides[a].split == slides[b].split or 2 * common <= least:
            continue
        one, other = (_jpeg_of(slides[k].id, stores[k], int(sums[at[first]])) for k in (a, b))
        if one == other:
            names = (f"'{slides[k].id}' ({slides[k].split})" for k in (a, b))
            lines.append(f"{' and '.join(names)}: {common:,} of {least:,} patches")
    return lines


def _jpeg_of(slide: str, store: PatchStore, checksum: int) -> bytes:
    return store.read(slide, np.flatnonzero(store.checksums(slide) == checksum)[:1])[0]


def _count(slide: str, store: Slides) -> int:
    return store.count(slide)


def _glance(slide: str, store: Slides) -> object:
    """What differs between most slides, and is cheap to see."""
    if hasattr(store, "features"):
        coords = store.record(slide).coords
        if coords is not None:
            return coords.tobytes()
        return cast("FeatureStore", store).first_rows(slide, ROWS).tobytes()
    middle = store.count(slide) // 2  # the edges of tissue look alike
    return _checksums(slide, cast(Store, store), [middle]).tobytes()


def _whole(slide: str, store: Slides) -> bytes:
    """All that is compared; besides the sums one JPEG, since a single patch's sum may be another's."""
    if hasattr(store, "features"):
        return cast("FeatureStore", store).features(slide).numpy().tobytes()
    count, patches = store.count(slide), cast(Store, store)
    return _checksums(slide, patches, range(count)).tobytes() + patches.read(slide, [count // 2])[0]


def _checksums(slide: str, store: Store, rows: Sequence[int]) -> NDArray[np.uint32]:
    """CRC-32 of the given patches: as packed, or else of what is read."""
    if isinstance(store, PatchStore):
        return store.checksums(slide)[list(rows)]
    pieces = (rows[start : start + PIECE] for start in range(0, len(rows), PIECE))
    sums = [zlib.crc32(jpeg) for piece in pieces for jpeg in store.read(slide, piece)]
    return np.array(sums, np.uint32)


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
            [cases[i] for i in np.random.default_rng(mix(*seed, value)).permutation(len(cases))],
        )
        for value, cases in sorted(members.items())
    ]
