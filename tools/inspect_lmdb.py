"""What a patch store holds, whether all of it is whole, and how its patches look.

  python tools/inspect_lmdb.py cohort.lmdb                     recipe, totals, the first 10 slides
  python tools/inspect_lmdb.py cohort.lmdb --all               every slide
  python tools/inspect_lmdb.py a.lmdb b.lmdb --verify          check every value and decode every JPEG
  python tools/inspect_lmdb.py cohort.lmdb --sheet sheet.png   a picture of random patches

Exit codes: 0 nothing is wrong; 2 a mistake or an unreadable store, which the message names;
3 there are faults, each of them listed.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageDraw
from rich.markup import escape
from rich.table import Column, Table

from e2e.errors import DamagedDataError, UserError, exit_code
from e2e.files import write_atomically
from e2e.images.decode import Decoder, UndecodableError, build_decoder
from e2e.log import Screen
from e2e.seeds import mix_seed
from e2e.store.lmdb import PatchStore
from e2e.store.records import SlideRecord

BATCH = 64  # patches decoded at once
CELL = 96  # px of a patch on the sheet
HEADER = ("slide", "patches", "mpp", "level-0 side", "size", "source")


@dataclass
class Contents:
    """The slides of a store, and those whose record cannot be read."""

    records: list[SlideRecord]
    faults: list[str]

    @classmethod
    def of(cls, store: PatchStore) -> Contents:
        """Read every record."""
        contents = cls([], [])
        for slide in store.slides:
            try:
                contents.records.append(store.record(slide))
            except DamagedDataError as error:
                contents.faults.append(str(error))
        return contents


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stores", nargs="+", type=Path, metavar="STORE")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--all", action="store_true", help="list every slide")
    rows.add_argument("--first", type=int, default=10, metavar="N", help="list N slides (10)")
    parser.add_argument("--verify", action="store_true", help="check and decode every patch")
    parser.add_argument("--decoder", default="auto", help="for --verify and --sheet")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw random patches")
    parser.add_argument("--sheet-slides", type=int, default=8, metavar="N", help="rows (8)")
    parser.add_argument("--sheet-patches", type=int, default=12, metavar="N", help="a row (12)")
    parser.add_argument("--seed", type=int, default=0, help="of the random patches")
    return parser.parse_args(argv)


def describe(store: PatchStore, contents: Contents) -> list[str]:
    """The store in a few lines; what differs between slides is given as its range."""
    records = contents.records
    counts = [record.count for record in records]
    lines = [
        f"{store.path}: {store.path.stat().st_size:,} bytes",
        f"  recipe: {', '.join(f'{k}={v}' for k, v in store.recipe.items()) or 'none given'}",
        f"  slides: {len(store.slides):,}",
        f"  patches: {sum(counts):,}",
    ]
    if records:
        lines += [
            f"  patches a slide: {min(counts):,} to {max(counts):,},"
            f" median {int(np.median(counts)):,}",
            f"  patch size: {span([r.patch_px for r in records])} px",
            f"  mpp: {span([r.mpp for r in records])} um/px",
        ]
    return lines


def span(values: Sequence[float | None]) -> str:
    """``0.5``, ``0.25 to 0.5``, ``unknown``, or a range with the count of unknown values."""
    known = [value for value in values if value is not None]
    unknown = len(values) - len(known)
    if not known:
        return "unknown"
    low, high = (f"{value:.4g}" for value in (min(known), max(known)))
    text = low if low == high else f"{low} to {high}"
    return f"{text} ({unknown} unknown)" if unknown else text


def row(record: SlideRecord) -> tuple[str, ...]:
    """A slide as words, in the order of ``HEADER``."""
    return (
        record.slide,
        f"{record.count:,}",
        "unknown" if record.mpp is None else f"{record.mpp:.4g}",
        f"{record.level0_px:.6g}",
        f"{record.width}x{record.height}" if record.width else "unknown",
        f"{record.source} ({record.source_bytes:,} bytes)",
    )


def print_slides(screen: Screen, records: Sequence[SlideRecord], most: int | None) -> None:
    """A table on a terminal, columns of text elsewhere."""
    shown = [row(record) for record in records[:most]]
    if screen.console.is_terminal:
        # Folded, never cut short: an id that is not whole is no id.
        table = Table(*(Column(name, overflow="fold") for name in HEADER))
        for words in shown:
            table.add_row(*map(escape, words))
        screen.console.print(table, soft_wrap=False)
    elif shown:
        widths = [max(map(len, column)) for column in zip(HEADER, *shown, strict=True)]
        for words in (HEADER, *shown):
            cells = (word.ljust(width) for word, width in zip(words, widths, strict=True))
            screen.say("  " + "  ".join(cells).rstrip())
    if len(shown) < len(records):
        screen.say(f"  ... and {len(records) - len(shown):,} more slides; --all lists them")


def faults(
    store: PatchStore, records: Iterable[SlideRecord], decoder: Decoder, done: Callable[[int], None]
) -> Iterator[str]:
    """A line for each value that is not what was written, or is no JPEG of the right size.

    Args:
        done: called with the number of patches checked since the last call.
    """
    for record in records:
        yield from store.damage(record.slide)
        for start in range(0, record.count, BATCH):
            rows = range(start, min(start + BATCH, record.count))
            yield from _undecodable(store, record, rows, decoder)
            done(len(rows))


def _undecodable(
    store: PatchStore, record: SlideRecord, rows: range, decoder: Decoder
) -> Iterator[str]:
    try:
        side = tuple(decoder.decode(store.read(record.slide, rows)).shape[-2:])
    except (UndecodableError, DamagedDataError):
        side = None
    if side == (record.patch_px, record.patch_px):
        return
    for index in rows:  # one by one, because a batch tells of its first fault only
        where = f"slide '{record.slide}' patch {index}"
        try:
            height, width = decoder.decode(store.read(record.slide, [index])).shape[-2:]
        except UndecodableError as error:
            yield f"{where}: {error}"
        except DamagedDataError:
            continue  # missing, which the checksums tell already
        else:
            if (height, width) != (record.patch_px, record.patch_px):
                yield f"{where}: is {width}x{height} px, the record says {record.patch_px} px"


def verify(
    screen: Screen, store: PatchStore, records: Sequence[SlideRecord], decoder: Decoder
) -> list[str]:
    """Check all patches of a store, with a progress line; the faults, each said at once."""
    total = sum(record.count for record in records)
    checked = 0

    def done(patches: int) -> None:
        nonlocal checked
        checked += patches
        screen.step(checked, total, "patches checked")

    found = []
    for fault in faults(store, records, decoder, done):
        found.append(fault)
        screen.say(f"  FAULT {fault}")
    screen.pause()
    return found


def draw_sheet(
    stores: Sequence[tuple[PatchStore, Sequence[SlideRecord]]],
    decoder: Decoder,
    path: Path,
    *,
    slides: int,
    patches: int,
    seed: int,
) -> None:
    """Write a PNG: a row of random patches for each of some random slides, its id above it.

    A patch that cannot be decoded is a red cell. A pure function of the stores and ``seed``.
    """
    pairs = [(store, record) for store, records in stores for record in records if record.count]
    if not pairs:
        raise UserError(f"cannot draw {path}: there are no patches")
    rng = np.random.default_rng(mix_seed(seed, "sheet"))
    chosen = sorted(rng.choice(len(pairs), min(slides, len(pairs)), replace=False))
    caption = 18
    canvas = Image.new(
        "RGB", (patches * (CELL + 4) + 4, len(chosen) * (CELL + caption + 4) + 4), "white"
    )
    pen = ImageDraw.Draw(canvas)
    for line, number in enumerate(chosen):
        store, record = pairs[number]
        top = 4 + line * (CELL + caption + 4)
        mpp = "unknown mpp" if record.mpp is None else f"{record.mpp:.4g} um/px"
        text = f"{record.slide}   {record.count:,} patches of {record.patch_px} px, {mpp}"
        pen.text((4, top + 2), text, fill="black")
        draw = np.random.default_rng(mix_seed(seed, "sheet", record.slide))
        rows = sorted(draw.choice(record.count, min(patches, record.count), replace=False))
        for column, index in enumerate(rows):
            cell = _cell(store, record, int(index), decoder)
            canvas.paste(cell, (4 + column * (CELL + 4), top + caption))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def _cell(store: PatchStore, record: SlideRecord, index: int, decoder: Decoder) -> Image.Image:
    try:
        pixels = decoder.decode(store.read(record.slide, [index]))[0]
    except (UndecodableError, DamagedDataError):
        return Image.new("RGB", (CELL, CELL), (220, 0, 0))
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((CELL, CELL))


def main(argv: Sequence[str] | None = None) -> int:
    """Print, and verify or draw when asked."""
    args = parse(argv)
    for option, value in (
        ("--first", args.first),
        ("--sheet-slides", args.sheet_slides),
        ("--sheet-patches", args.sheet_patches),
    ):
        if value < (0 if option == "--first" else 1):
            raise UserError(f"{option} is a number of rows or patches, not {value}")
    if args.sheet and args.sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet writes a PNG; name it .png, not {args.sheet}")
    decoder = build_decoder(args.decoder)
    stores = [PatchStore(path) for path in args.stores]
    screen = Screen(is_leader=True)
    count, drawn = 0, []
    for store in stores:
        contents = Contents.of(store)
        drawn.append((store, contents.records))
        for line in describe(store, contents):
            screen.say(line)
        print_slides(screen, contents.records, None if args.all else args.first)
        for fault in contents.faults:
            screen.say(f"  FAULT {fault}")
        found = list(contents.faults)
        if args.verify:
            found += verify(screen, store, contents.records, decoder)
            patches = sum(record.count for record in contents.records)
            screen.say(f"  verified {patches:,} patches: {len(found)} fault(s)")
        count += len(found)
    if args.sheet:
        size = {"slides": args.sheet_slides, "patches": args.sheet_patches, "seed": args.seed}
        draw_sheet(drawn, decoder, args.sheet, **size)
        screen.say(f"sheet: {args.sheet}")
    return 3 if count else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
