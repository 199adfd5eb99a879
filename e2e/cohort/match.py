"""Match the slides of a table with those of stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from e2e.cohort.table import Problem
from e2e.errors import UserError, format_list
from e2e.slides import Slide
from e2e.store.records import SlideReader


def match_slides(
    slides: Sequence[Slide], stores: Sequence[SlideReader]
) -> tuple[dict[str, SlideReader], list[Problem]]:
    """Which store holds each slide; what lies on one side only, or in two stores, is listed."""
    where: dict[str, SlideReader] = {}
    problems: list[Problem] = []
    for store in stores:
        for slide in store.slides:
            if slide in where:
                problems.append(
                    Problem(slide, store.path.name, f"is in {where[slide].path.name} too")
                )
            where.setdefault(slide, store)
    named = {slide.id for slide in slides}
    problems += [
        Problem(slide.id, "label table", _no_store(slide.id))
        for slide in slides
        if slide.id not in where
    ]
    problems += [
        Problem(slide, store.path.name, "the label table has no row for it")
        for slide, store in where.items()
        if slide not in named
    ]
    empty = {
        slide for slide, store in where.items() if slide in named and not store.num_patches(slide)
    }
    problems += [
        Problem(slide, where[slide].path.name, "has no patches") for slide in sorted(empty)
    ]
    whole = {slide: store for slide, store in where.items() if slide in named - empty}
    return whole, problems


def match_scales(
    slides: Sequence[Slide], scales: Sequence[Sequence[SlideReader]]
) -> tuple[dict[str, list[SlideReader]], list[Problem]]:
    """The stores of each slide at further magnifications; who lacks patches at one is listed.

    What these stores have besides ``slides`` is no fault.
    """
    found: dict[str, list[SlideReader]] = {slide.id: [] for slide in slides}
    named = set(found)
    problems: list[Problem] = []
    for number, stores in enumerate(scales):
        where, wrong = match_slides(slides, stores)
        problems += [
            Problem(p.slide, p.where, f"{p.problem} (data.scales[{number}])")
            for p in wrong
            if p.slide in named
        ]
        found = {k: [*before, where[k]] for k, before in found.items() if k in where}
    return found, problems


def check_sides(stores: Mapping[str, Sequence[SlideReader]], size: int | None) -> None:
    """UserError unless a scale's stores hold patches of one size, and all scales do or are resized.

    A slide of each store is looked at.

    Args:
        stores: of each slide, one a scale.
        size: to which all patches are brought; None: they stay as stored.
    """
    sides: dict[int, dict[int, Path]] = {}
    seen: set[tuple[int, Path]] = set()
    for slide, own in stores.items():
        for scale, store in enumerate(own):
            if (scale, store.path) not in seen:
                seen.add((scale, store.path))
                side = store.record(slide).patch_px
                sides.setdefault(0 if size is None else scale, {})[side] = store.path
    for found in sides.values():
        if len(found) > 1:
            raise UserError(
                "stores hold patches of different sizes\n"
                + format_list(f"{path}: {side} px" for side, path in found.items())
                + "\n  pack the stores of a scale alike; set bag.size=PX where scales differ"
            )


def _no_store(slide: str) -> str:
    hint = "; are these several slides? data.slide_separator=';'" if ";" in slide else ""
    return f"no store has it{hint}"
