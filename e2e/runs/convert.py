"""Convert an LMDB of the ABMILX project into a patch store; the JPEGs stay the same byte for byte."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from e2e.errors import DamagedDataError, UserError, describe_interrupt, format_list
from e2e.log import Screen
from e2e.settings.data_cli import convert_parser
from e2e.store.abmilx import AbmilxStore, jpeg_size
from e2e.store.lmdb import StoreWriter
from e2e.store.pack import Report, Row
from e2e.store.records import SlideRecord

BATCH_SIZE = 256
"""Patches in memory at a time."""


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError if an option has an impossible value."""
    for option, value in (("--mpp", args.mpp), ("--level0-px", args.level0_px)):
        if value is not None and not 0 < value < 1e6:
            raise UserError(f"{option} {value:g}: must be greater than 0")
    if args.coords and args.level0_px:
        raise UserError("--coords gives the size of the patches\n  omit --level0-px")


def convert(
    old: AbmilxStore, out: Path, screen: Screen, *, mpp: float | None, level0_px: float | None
) -> Report:
    """Write every slide of `old` that is not in `out` yet, each completely or not at all.

    Parameters
    ----------
    old : AbmilxStore
        The slides.
    out : Path
        The store, which is created or appended to.
    screen : Screen
        Prints a line per slide.
    mpp : float or None
        Micrometres per pixel of the patches; None if unknown.
    level0_px : float or None
        Side of a patch in level-0 pixels; None takes that of the coords.

    Returns
    -------
    Report
        All slides in the store, and those that could not be converted.

    Raises
    ------
    UserError
        If `out` was made with other settings, the disk is full, or it returns other bytes than were
        written. What was written before stays.
    """
    recipe = {"source": "abmilx lmdb", "file": old.path.name, "mpp": mpp, "level0_px": level0_px}
    with StoreWriter(out, recipe | {"coords": old.has_coords}) as writer:
        rows = [Row.of(writer.record(slide), "packed") for slide in writer.done]
        other = [s for s in old.slides if s in writer.done and not _is_copied(old, writer, s)]
        if other:
            raise UserError(
                f"{out}: {len(other)} slide(s) have the names of slides in {old.path}, but other patches\n"
                f"{format_list(other, most=3)}\n  choose another --out, or remove the store first"
            )
        remaining = [slide for slide in old.slides if slide not in writer.done]
        if rows:
            screen.say(f"{len(rows)} slides are in the store already")
        try:
            for number, slide in enumerate(remaining, start=1):
                row = _convert_slide(old, writer, slide, mpp, level0_px)
                rows.append(row)
                detail = row.reason.splitlines()[0] if row.reason else f"{row.patches} patches"
                screen.say(f"{number}/{len(remaining)} {slide}: {row.status}, {detail}")
        finally:
            report = Report(out, sorted(rows, key=lambda row: row.slide))
            report.write()
    return report


def _is_copied(old: AbmilxStore, writer: StoreWriter, slide: str) -> bool:
    """Whether a slide of the new store is that of the old one: compares number, first and last patch."""
    count = old.num_patches(slide)
    if writer.record(slide).num_patches != count:
        return False
    ends = [0, count - 1]
    return writer.read(slide, ends) == old.read(slide, ends)


def _convert_slide(
    old: AbmilxStore, writer: StoreWriter, slide: str, mpp: float | None, level0_px: float | None
) -> Row:
    path = str(old.path)
    try:
        record = replace(old.record(slide), mpp=mpp)
        if record.num_patches == 0:
            return Row(slide, "quarantined", path=path, reason="it has no patches")
        if level0_px is not None:
            record = replace(record, level0_px=level0_px)
        writer.add(record, _jpegs_of_slide(old, record))
    except DamagedDataError as error:  # of OLD.lmdb; a fault of the store is another UserError
        return Row(slide, "quarantined", path=path, reason=str(error))
    _verify_copy(old, writer, record)
    return Row.of(record, "packed", path)


def _jpegs_of_slide(old: AbmilxStore, record: SlideRecord) -> Iterator[bytes]:
    """Yield the patches in order; DamagedDataError if one has another size than the first."""
    for rows in _batches(record.num_patches):
        for index, jpeg in zip(rows, old.read(record.slide, rows), strict=True):
            size = jpeg_size(jpeg, old.path, record.slide, index)
            if size != (record.patch_px, record.patch_px):
                raise DamagedDataError(
                    f"{old.path}: slide '{record.slide}' patch {index} has {size[0]}x{size[1]} "
                    f"pixels, but its first patch has {record.patch_px}, and all patches of a slide "
                    "must be squares of one size"
                )
            yield jpeg


def _verify_copy(old: AbmilxStore, writer: StoreWriter, record: SlideRecord) -> None:
    """Read a slide back and compare it with its source."""
    for rows in _batches(record.num_patches):
        pairs = zip(old.read(record.slide, rows), writer.read(record.slide, rows), strict=True)
        for index, (source, stored) in zip(rows, pairs, strict=True):
            if zlib.crc32(source) != zlib.crc32(stored):
                raise UserError(
                    f"{writer.path}: slide '{record.slide}' patch {index} differs from what was "
                    "written: disk or memory is faulty\n"
                    "  delete the store and convert again on another machine"
                )


def _batches(count: int) -> Iterator[range]:
    for start in range(0, count, BATCH_SIZE):
        yield range(start, min(start + BATCH_SIZE, count))


def main(argv: Sequence[str] | None = None) -> int:
    """Convert and report; return 3 if some slides are not in the store."""
    args = convert_parser().parse(argv)
    check_options(args)
    old = AbmilxStore(args.old, args.coords)
    if args.out.exists() and args.out.samefile(old.path):
        raise UserError(f"--out {args.out} is the file to convert\n  choose another --out")
    screen = Screen(is_leader=True)
    with describe_interrupt(lambda: "interrupted; run the same command again to continue"):
        report = convert(old, args.out, screen, mpp=args.mpp, level0_px=args.level0_px)
    patches = sum(row.patches for row in report.packed)
    screen.say(f"{report.out}: {len(report.packed)} slides, {patches:,} patches; {report.path}")
    if report.problems:
        screen.say(f"  {len(report.problems)} slides are NOT in it, see {report.quarantine}")
    return 3 if report.problems else 0
