"""Slides of different splits that hold the same patches."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from e2e.errors import UserError, format_list
from e2e.features.reader import FeatureFiles
from e2e.slides import Slide
from e2e.store.lmdb import PatchStore
from e2e.store.records import PatchReader, SlideReader


def check_copies(slides: Sequence[Slide], stores: Mapping[str, SlideReader]) -> None:
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
            + format_list(
                " = ".join(f"'{s.id}' ({s.split})" for s in sorted(group, key=lambda s: s.id))
                + f": the same {stores[group[0].id].num_patches(group[0].id):,} patches"
                for group in alike.values()
            )
            + "\n  keep one name of each in the label table"
        )
    kept = [s for s in slides if s.split and isinstance(stores[s.id], PatchStore)]
    if shared := _shared(kept, [cast(PatchStore, stores[slide.id]) for slide in kept]):
        raise UserError(
            f"{len(shared)} slide(s) have most of their patches in common with one of another split: the "
            f"test would not be honest\n{format_list(shared)}\n  keep one of each in the label table"
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


def _count(slide: str, store: SlideReader) -> int:
    return store.num_patches(slide)


def _glance(slide: str, store: SlideReader) -> object:
    """What differs between most slides, and is cheap to see."""
    if hasattr(store, "features"):
        coords = store.record(slide).coords
        if coords is not None:
            return coords.tobytes()
        return cast("FeatureFiles", store).first_rows(slide, ROWS).tobytes()
    middle = store.num_patches(slide) // 2  # the edges of tissue look alike
    return _checksums(slide, cast(PatchReader, store), [middle]).tobytes()


def _whole(slide: str, store: SlideReader) -> bytes:
    """All that is compared; besides the sums one JPEG, since a single patch's sum may be another's."""
    if hasattr(store, "features"):
        return cast("FeatureFiles", store).features(slide).numpy().tobytes()
    count, patches = store.num_patches(slide), cast(PatchReader, store)
    return _checksums(slide, patches, range(count)).tobytes() + patches.read(slide, [count // 2])[0]


def _checksums(slide: str, store: PatchReader, rows: Sequence[int]) -> NDArray[np.uint32]:
    """CRC-32 of the given patches: as packed, or else of what is read."""
    if isinstance(store, PatchStore):
        return store.checksums(slide)[list(rows)]
    pieces = (rows[start : start + PIECE] for start in range(0, len(rows), PIECE))
    sums = [zlib.crc32(jpeg) for piece in pieces for jpeg in store.read(slide, piece)]
    return np.array(sums, np.uint32)


PIECE = 256  # patches in memory at once


ROWS = 4  # of features without coords, by which most slides differ
