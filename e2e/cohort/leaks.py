"""Find slides of different splits that hold the same patches: one slide under two names."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from e2e.errors import UserError, format_list
from e2e.features.reader import FeatureReader
from e2e.slides import Slide
from e2e.store.records import PatchReader, SlideReader

R = TypeVar("R", bound=SlideReader)

Checksums = NDArray[np.uint32]

READ_AT_ONCE = 256
"""Patches in memory at once."""
FIRST_ROWS = 4
"""Rows of features without coords that are compared first; most slides differ in them."""


def check_copied_patches(slides: Sequence[Slide], readers: Mapping[str, PatchReader]) -> None:
    """Check that no two slides of different splits hold the same patches.

    Patches are compared by the CRC-32 of their JPEGs, all of them and in order; a second scan, or
    another grid, passes. The check is cheap: only slides with equally many patches are compared, a
    store of ``e2e pack`` holds the checksums, and other stores are read completely only if the middle
    patch is the same.

    Of two slides whose checksums are stored it is enough that most patches of one are also in the
    other, in any order: the same slide, packed with more tissue or less.

    Parameters
    ----------
    slides
        The slides. Those without a split are ignored.
    readers
        Slide id -> its reader.

    Raises
    ------
    UserError
        Names the slides that are copies.
    """
    _refuse_copies(slides, readers, (_num_patches, _middle_patch, _all_patches))
    _refuse_shared_patches(slides, readers)


def check_copied_features(slides: Sequence[Slide], readers: Mapping[str, FeatureReader]) -> None:
    """Check that no two slides of different splits hold the same features.

    Features are read completely only if all coords are the same or, for slides without coords, the
    first rows.

    Parameters
    ----------
    slides
        The slides. Those without a split are ignored.
    readers
        Slide id -> its reader.

    Raises
    ------
    UserError
        Names the slides that are copies.
    """
    _refuse_copies(slides, readers, (_num_patches, _coords_or_first_rows, _all_features))


def _num_patches(slide: str, reader: SlideReader) -> int:
    return reader.num_patches(slide)


def _middle_patch(slide: str, reader: PatchReader) -> bytes:
    middle = reader.num_patches(slide) // 2  # the edges of tissue look alike
    return _checksums(slide, reader, [middle]).tobytes()


def _all_patches(slide: str, reader: PatchReader) -> bytes:
    # With one JPEG, since the checksum of a single patch may be another's by chance.
    count = reader.num_patches(slide)
    checksums = _checksums(slide, reader, range(count)).tobytes()
    return checksums + reader.read(slide, [count // 2])[0]


def _coords_or_first_rows(slide: str, reader: FeatureReader) -> bytes:
    coords = reader.record(slide).coords
    if coords is not None:
        return coords.tobytes()
    return reader.first_rows(slide, FIRST_ROWS).tobytes()


def _all_features(slide: str, reader: FeatureReader) -> bytes:
    return reader.features(slide).numpy().tobytes()


def _refuse_copies(
    slides: Sequence[Slide],
    readers: Mapping[str, R],
    keys: Sequence[Callable[[str, R], object]],
) -> None:
    """Raise UserError if slides of different splits are equal in all keys, the cheapest key first."""
    groups: dict[object, list[Slide]] = {(): [slide for slide in slides if slide.split]}
    for key in keys:
        finer: dict[object, list[Slide]] = defaultdict(list)
        for parent, group in groups.items():
            for slide in group:
                finer[parent, key(slide.id, readers[slide.id])].append(slide)
        groups = {k: group for k, group in finer.items() if len({s.split for s in group}) > 1}
    if groups:
        raise UserError(
            f"{len(groups)} slide(s) are in more than one split under different names, so test results"
            " would be biased\n"
            + format_list(
                " = ".join(f"'{s.id}' ({s.split})" for s in sorted(group, key=lambda s: s.id))
                + f": the same {readers[group[0].id].num_patches(group[0].id):,} patches"
                for group in groups.values()
            )
            + "\n  keep one name of each in the label table"
        )


def _refuse_shared_patches(slides: Sequence[Slide], readers: Mapping[str, PatchReader]) -> None:
    """Raise UserError if two slides of different splits have most patches of one in common."""
    stored: list[tuple[Slide, PatchReader, Checksums]] = []
    for slide in slides:
        reader = readers[slide.id]
        sums = reader.checksums(slide.id) if slide.split else None
        if sums is not None:
            stored.append((slide, reader, sums))
    if shared := _find_shared_patches(stored):
        raise UserError(
            f"{len(shared)} slide(s) have most of their patches in common with a slide of another split,"
            f" so test results would be biased\n{format_list(shared)}\n"
            "  keep one of each in the label table"
        )


def _find_shared_patches(stored: Sequence[tuple[Slide, PatchReader, Checksums]]) -> list[str]:
    """Return a line for each two slides of different splits that share over half of one's patches.

    A patch that a slide has twice is blank and does not count. One JPEG of each two slides is read to
    make sure that equal checksums are of equal patches.
    """
    unique_sums = []
    for _, _, sums in stored:
        values, counts = np.unique(sums, return_counts=True)
        unique_sums.append(values[counts == 1])
    all_sums = np.concatenate([np.zeros(0, np.uint32), *unique_sums])
    owner = np.repeat(np.arange(len(stored), dtype=np.int32), [len(s) for s in unique_sums])
    order = np.argsort(all_sums, kind="stable")
    all_sums, owner = all_sums[order], owner[order]
    equal = np.flatnonzero(all_sums[1:] == all_sums[:-1])
    pairs, firsts, counts = np.unique(
        np.stack([owner[equal], owner[equal + 1]]), axis=1, return_index=True, return_counts=True
    )
    lines = []
    for (a, b), first, common in zip(pairs.T, firsts, counts, strict=True):
        slide_a, slide_b = stored[a][0], stored[b][0]
        smaller = min(len(unique_sums[a]), len(unique_sums[b]))
        if slide_a.split == slide_b.split or 2 * common <= smaller:
            continue
        checksum = int(all_sums[equal[first]])
        if _read_by_checksum(stored[a], checksum) == _read_by_checksum(stored[b], checksum):
            names = f"'{slide_a.id}' ({slide_a.split}) and '{slide_b.id}' ({slide_b.split})"
            lines.append(f"{names}: {common:,} of {smaller:,} patches")
    return lines


def _read_by_checksum(entry: tuple[Slide, PatchReader, Checksums], checksum: int) -> bytes:
    slide, reader, sums = entry
    return reader.read(slide.id, np.flatnonzero(sums == checksum)[:1])[0]


def _checksums(slide: str, reader: PatchReader, rows: Sequence[int]) -> NDArray[np.uint32]:
    """Return the CRC-32 of patches: as stored if the reader holds them, else of what is read."""
    stored = reader.checksums(slide)
    if stored is not None:
        return stored[list(rows)]
    batches = (rows[start : start + READ_AT_ONCE] for start in range(0, len(rows), READ_AT_ONCE))
    sums = [zlib.crc32(jpeg) for batch in batches for jpeg in reader.read(slide, batch)]
    return np.array(sums, np.uint32)
