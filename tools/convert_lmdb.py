"""Turn an LMDB of the ABMILX project into a store of ours; the JPEGs stay byte for byte as they are.

  python tools/convert_lmdb.py OLD.lmdb --out NEW.lmdb                  patches, without their places
  python tools/convert_lmdb.py OLD.lmdb --out NEW.lmdb --coords DIR     with CLAM's or TRIDENT's h5
  python tools/convert_lmdb.py OLD.lmdb --out NEW.lmdb --mpp 0.5 --level0-px 512

Run it again to go on after a stop of any kind: slides in the store are skipped. Every slide that is
written is read back and compared with OLD.lmdb. One that cannot be converted is left out and named in
NEW.lmdb.quarantine.csv; every slide is in NEW.lmdb.report.csv. OLD.lmdb is only read, and the pickles
in it are not executed. (The project fed its models BGR: that was its decoder, not its files.)

Exit codes: 0 all converted; 2 stopped by a mistake, which the message names; 3 converted, but some
slides are not in the store; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.errors import DamagedDataError, UserError, exit_code
from e2e.log import Screen
from e2e.store.abmilx import AbmilxStore, jpeg_size
from e2e.store.lmdb import StoreWriter
from e2e.store.pack import Report, Row
from e2e.store.records import SlideRecord

BATCH = 256
"""Patches in memory at a time."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text, allow_abbrev=False)
    parser.add_argument("old", type=Path, metavar="OLD.lmdb")
    parser.add_argument("--out", type=Path, required=True, metavar="NEW.lmdb")
    parser.add_argument("--coords", type=Path, metavar="DIR", help="h5 files of CLAM or TRIDENT")
    parser.add_argument("--mpp", type=float, help="um per pixel of the patches (default: unknown)")
    parser.add_argument(
        "--level0-px", type=float, metavar="PX", help="side of a patch at level 0 (or by --coords)"
    )
    args = parser.parse_args(argv)
    for option, value in (("--mpp", args.mpp), ("--level0-px", args.level0_px)):
        if value is not None and not 0 < value < 1e6:
            raise UserError(f"{option} is more than 0, not {value}")
    if args.coords and args.level0_px:
        raise UserError("the files of --coords say how large patches are: leave --level0-px out")
    return args


def convert(
    old: AbmilxStore, out: Path, screen: Screen, *, mpp: float | None, level0_px: float | None
) -> Report:
    """Write every slide of ``old`` that is not in ``out`` yet; a slide whole or not at all.

    Raises:
        UserError: ``out`` was made in another way, the disk is full, or it returns other bytes
            than were written. What was written before stays.
    """
    recipe = {"source": "seed lmdb", "file": old.path.name, "mpp": mpp, "level0_px": level0_px}
    with StoreWriter(out, recipe | {"coords": old.has_coords}) as writer:
        rows = [_row(writer.record(slide)) for slide in writer.done]
        todo = [slide for slide in old.slides if slide not in writer.done]
        if rows:
            screen.say(f"{len(rows)} slides are in the store already")
        try:
            for number, slide in enumerate(todo, start=1):
                row = _convert_slide(old, writer, slide, mpp, level0_px)
                rows.append(row)
                fate = row.reason.splitlines()[0] if row.reason else f"{row.patches} patches"
                screen.say(f"{number}/{len(todo)} {slide}: {row.status}, {fate}")
        finally:
            report = Report(out, sorted(rows, key=lambda row: row.slide))
            report.write()
    return report


def _convert_slide(
    old: AbmilxStore, writer: StoreWriter, slide: str, mpp: float | None, level0_px: float | None
) -> Row:
    path = str(old.path)
    try:
        record = replace(old.record(slide), mpp=mpp)
        if record.count == 0:
            return Row(slide, "quarantined", path=path, reason="it has no patches")
        if level0_px is not None:
            record = replace(record, level0_px=level0_px)
        writer.add(record, _jpegs(old, record))
    except DamagedDataError as error:  # of OLD; what the store cannot do is another UserError
        return Row(slide, "quarantined", path=path, reason=str(error))
    _compare(old, writer, record)
    return replace(_row(record), path=path)


def _jpegs(old: AbmilxStore, record: SlideRecord) -> Iterator[bytes]:
    """The patches in order; DamagedDataError where one has another size than the first."""
    for rows in _batches(record.count):
        for index, jpeg in zip(rows, old.read(record.slide, rows), strict=True):
            size = jpeg_size(jpeg, old.path, record.slide, index)
            if size != (record.patch_px, record.patch_px):
                raise DamagedDataError(
                    f"{old.path}: slide '{record.slide}' patch {index} has {size[0]}x{size[1]} "
                    f"pixels, and a slide's patches are squares of one size, by its first "
                    f"{record.patch_px}"
                )
            yield jpeg


def _compare(old: AbmilxStore, writer: StoreWriter, record: SlideRecord) -> None:
    """Read a slide back and compare it with its source."""
    for rows in _batches(record.count):
        pairs = zip(old.read(record.slide, rows), writer.read(record.slide, rows), strict=True)
        for index, (source, stored) in zip(rows, pairs, strict=True):
            if zlib.crc32(source) != zlib.crc32(stored):
                raise UserError(
                    f"{writer.path}: slide '{record.slide}' patch {index} is not what was written; "
                    "disk or memory is faulty\n  delete the store and convert again elsewhere"
                )


def _batches(count: int) -> Iterator[range]:
    for start in range(0, count, BATCH):
        yield range(start, min(start + BATCH, count))


def _row(record: SlideRecord) -> Row:
    known = {f.name: getattr(record, f.name) for f in fields(SlideRecord) if f.name != "coords"}
    return Row(status="packed", patches=record.count, **known)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, report, and tell by the exit code whether every slide is in the store."""
    args = parse(argv)
    old = AbmilxStore(args.old, args.coords)
    if args.out.exists() and args.out.samefile(old.path):
        raise UserError(f"--out {args.out} is the file to convert: name another")
    screen = Screen(is_leader=True)
    report = convert(old, args.out, screen, mpp=args.mpp, level0_px=args.level0_px)
    patches = sum(row.patches for row in report.packed)
    screen.say(f"{report.out}: {len(report.packed)} slides, {patches:,} patches; {report.path}")
    if report.problems:
        screen.say(f"  {len(report.problems)} slides are NOT in it, see {report.quarantine}")
    return 3 if report.problems else 0


if __name__ == "__main__":
    said = "stopped; the same command goes on where this one ended"
    sys.exit(exit_code(main, interrupted=said))
