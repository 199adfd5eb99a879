"""Show what patch stores hold, check them for damage, and draw some of their patches."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.markup import escape
from rich.table import Column, Table

from e2e.errors import DamagedDataError, UserError
from e2e.files import write_atomically
from e2e.images.decode import Decoder, UndecodableError, build_decoder
from e2e.log import Screen
from e2e.seeds import mix_seed
from e2e.settings.data_cli import inspect_parser
from e2e.store.abmilx import AbmilxStore
from e2e.store.lmdb import PatchStore
from e2e.store.open import open_store
from e2e.store.records import SlideRecord

Store = PatchStore | AbmilxStore
BATCH_SIZE = 64
"""Patches decoded at a time."""
CELL = 96
"""Side of a patch on the sheet, in pixels."""
HEADER = ("slide", "patches", "mpp", "level-0 side", "size", "source")


@dataclass
class Contents:
    """The records of a store."""

    records: list[SlideRecord]
    """Those that can be read."""
    faults: list[str]
    """A line per record that cannot be read."""

    @classmethod
    def of(cls, store: Store) -> Contents:
        """Read every record."""
        contents = cls([], [])
        for slide in store.slides:
            try:
                contents.records.append(store.record(slide))
            except DamagedDataError as error:
                contents.faults.append(str(error))
        return contents


def describe(store: Store, contents: Contents) -> list[str]:
    """Describe a store in a few lines; what differs between slides is given as a range."""
    records = contents.records
    counts = [record.num_patches for record in records]
    lines = [
        f"{store.path}: {store.path.stat().st_size:,} bytes",
        f"  recipe: {', '.join(f'{k}={v}' for k, v in store.recipe.items()) or 'none'}",
        f"  slides: {len(store.slides):,}",
        f"  patches: {sum(counts):,}",
    ]
    if records:
        lines += [
            f"  patches per slide: {min(counts):,} to {max(counts):,},"
            f" median {int(np.median(counts)):,}",
            f"  patch size: {span([r.patch_px for r in records])} px",
            f"  mpp: {span([r.mpp for r in records])} um/px",
        ]
    return lines


def span(values: Sequence[float | None]) -> str:
    """Return a range as text: ``0.5``, ``0.25 to 0.5``, ``unknown`` or ``0.5 (2 unknown)``."""
    numbers = [value for value in values if value is not None]
    unknown = len(values) - len(numbers)
    if not numbers:
        return "unknown"
    low, high = (f"{value:.4g}" for value in (min(numbers), max(numbers)))
    text = low if low == high else f"{low} to {high}"
    return f"{text} ({unknown} unknown)" if unknown else text


def row(record: SlideRecord) -> tuple[str, ...]:
    """Return the cells of a slide, in the order of `HEADER`."""
    return (
        record.slide,
        f"{record.num_patches:,}",
        "unknown" if record.mpp is None else f"{record.mpp:.4g}",
        f"{record.level0_px:.6g}",
        f"{record.width}x{record.height}" if record.width else "unknown",
        f"{record.source} ({record.source_bytes:,} bytes)",
    )


def print_slides(screen: Screen, records: Sequence[SlideRecord], limit: int | None) -> None:
    """Print the first slides: a table on a terminal, columns of text elsewhere."""
    shown = [row(record) for record in records[:limit]]
    if screen.console.is_terminal:
        # Folded, never truncated: part of an id is useless.
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


def find_faults(
    store: Store, records: Iterable[SlideRecord], decoder: Decoder, done: Callable[[int], None]
) -> Iterator[str]:
    """Yield a line per value that differs from what was written, or is not a JPEG of the right size.

    Parameters
    ----------
    store : PatchStore
        The store.
    records : iterable of SlideRecord
        The slides to check.
    decoder : Decoder
        Decodes the JPEGs.
    done : callable
        Called with the number of patches checked since the last call.
    """
    for record in records:
        yield from store.find_damage(record.slide)
        for start in range(0, record.num_patches, BATCH_SIZE):
            rows = range(start, min(start + BATCH_SIZE, record.num_patches))
            yield from _undecodable(store, record, rows, decoder)
            done(len(rows))


def _undecodable(store: Store, record: SlideRecord, rows: range, decoder: Decoder) -> Iterator[str]:
    try:
        side = tuple(decoder.decode(store.read(record.slide, rows)).shape[-2:])
    except (UndecodableError, DamagedDataError):
        side = None
    if side == (record.patch_px, record.patch_px):
        return
    for index in rows:  # one by one, because a batch reports its first fault only
        where = f"slide '{record.slide}' patch {index}"
        try:
            height, width = decoder.decode(store.read(record.slide, [index])).shape[-2:]
        except UndecodableError as error:
            yield f"{where}: {error}"
        except DamagedDataError:
            continue  # missing, which find_damage has reported
        else:
            if (height, width) != (record.patch_px, record.patch_px):
                yield f"{where}: is {width}x{height} px, but the record says {record.patch_px} px"


def verify(
    screen: Screen, store: Store, records: Sequence[SlideRecord], decoder: Decoder
) -> list[str]:
    """Check all patches of a store with a progress line; print and return the faults."""
    total = sum(record.num_patches for record in records)
    checked = 0

    def done(patches: int) -> None:
        nonlocal checked
        checked += patches
        screen.step(checked, total, "patches checked")

    faults = []
    for fault in find_faults(store, records, decoder, done):
        faults.append(fault)
        screen.say(f"  FAULT {fault}")
    screen.pause()
    return faults


def draw_sheet(
    stores: Sequence[tuple[Store, Sequence[SlideRecord]]],
    decoder: Decoder,
    path: Path,
    *,
    slides: int,
    patches: int,
    seed: int,
) -> None:
    """Write a PNG with a row of random patches for each of some random slides, its id above it.

    A patch that cannot be decoded is a red cell. The same stores and seed give the same picture.

    Parameters
    ----------
    stores : sequence of (PatchStore, sequence of SlideRecord)
        The stores and their slides.
    decoder : Decoder
        Decodes the JPEGs.
    path : Path
        The PNG.
    slides : int
        Rows.
    patches : int
        Patches per row.
    seed : int
        Random seed.

    Raises
    ------
    UserError
        If there are no patches, or the file cannot be written.
    """
    pairs = [
        (store, record) for store, records in stores for record in records if record.num_patches
    ]
    if not pairs:
        raise UserError(f"cannot draw {path}: there are no patches in the stores")
    rng = np.random.default_rng(mix_seed(seed, "sheet"))
    numbers = sorted(rng.choice(len(pairs), min(slides, len(pairs)), replace=False))
    caption = 18
    canvas = Image.new(
        "RGB", (patches * (CELL + 4) + 4, len(numbers) * (CELL + caption + 4) + 4), "white"
    )
    pen = ImageDraw.Draw(canvas)
    for line, number in enumerate(numbers):
        store, record = pairs[number]
        top = 4 + line * (CELL + caption + 4)
        mpp = "unknown mpp" if record.mpp is None else f"{record.mpp:.4g} um/px"
        text = f"{record.slide}   {record.num_patches:,} patches of {record.patch_px} px, {mpp}"
        pen.text((4, top + 2), text, fill="black")
        draw = np.random.default_rng(mix_seed(seed, "sheet", record.slide))
        size = min(patches, record.num_patches)
        rows = sorted(draw.choice(record.num_patches, size, replace=False))
        for column, index in enumerate(rows):
            cell = _cell(store, record, int(index), decoder)
            canvas.paste(cell, (4 + column * (CELL + 4), top + caption))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def _cell(store: Store, record: SlideRecord, index: int, decoder: Decoder) -> Image.Image:
    try:
        pixels = decoder.decode(store.read(record.slide, [index]))[0]
    except (UndecodableError, DamagedDataError):
        return Image.new("RGB", (CELL, CELL), (220, 0, 0))
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((CELL, CELL))


def main(argv: Sequence[str] | None = None) -> int:
    """Describe the stores; verify and draw them as requested. Return 3 if there are faults."""
    args = inspect_parser().parse(argv)
    for option, value in (
        ("--first", args.first),
        ("--sheet-slides", args.sheet_slides),
        ("--sheet-patches", args.sheet_patches),
    ):
        if value < (0 if option == "--first" else 1):
            raise UserError(f"{option} {value}: must be a number of rows or patches")
    if args.sheet and args.sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet {args.sheet}: must end in .png")
    decoder = build_decoder(args.decoder)
    stores = [open_store(path) for path in args.stores]
    screen = Screen(is_leader=True)
    num_faults, drawn = 0, []
    for store in stores:
        contents = Contents.of(store)
        drawn.append((store, contents.records))
        for line in describe(store, contents):
            screen.say(line)
        print_slides(screen, contents.records, None if args.all else args.first)
        for fault in contents.faults:
            screen.say(f"  FAULT {fault}")
        faults = list(contents.faults)
        if args.verify:
            faults += verify(screen, store, contents.records, decoder)
            patches = sum(record.num_patches for record in contents.records)
            screen.say(f"  verified {patches:,} patches: {len(faults)} fault(s)")
        num_faults += len(faults)
    if args.sheet:
        size = {"slides": args.sheet_slides, "patches": args.sheet_patches, "seed": args.seed}
        draw_sheet(drawn, decoder, args.sheet, **size)
        screen.say(f"sheet: {args.sheet}")
    return 3 if num_faults else 0
