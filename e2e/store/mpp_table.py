"""Tables of resolutions that replace what slides say of themselves (``--mpp-override``)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from e2e.errors import UserError, format_list
from e2e.registry import suggest
from e2e.slides import show_id


def read_mpp(table: Path) -> dict[str, float]:
    """Read the resolution of slides from a CSV file with columns slide,mpp, or wsi,mpp as TRIDENT's.

    Returns
    -------
    dict
        Slide id or file name -> micrometres per level-0 pixel.

    Raises
    ------
    UserError
        If there is no such file, it has other columns, a slide occurs twice, or a resolution is not a
        number between 0 and 1000.
    """
    try:
        rows = list(csv.reader(table.read_text("utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the --mpp-override table {table}: {error}") from error
    header = [name.strip().lower() for name in rows[0]] if rows else []
    slide_column = next((name for name in ("slide", "wsi") if name in header), "")
    if not slide_column or "mpp" not in header or len(rows) < 2:
        columns = ", ".join(header) if len(rows) > 1 else "no rows"
        raise UserError(
            f"{table} needs the columns slide,mpp and a row per slide; it has {columns}"
        )
    mpp: dict[str, float] = {}
    faults: list[str] = []
    for line, cells in enumerate(rows[1:], start=2):
        row = dict(zip(header, map(str.strip, cells), strict=False))
        slide, text = row.get(slide_column, ""), row.get("mpp", "")
        if slide_column == "wsi":
            slide = Path(slide).name
        if not text and (not slide or slide_column == "wsi"):
            continue  # an empty line, or a slide of TRIDENT's table whose own resolution holds
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < 1000 or not slide:
            faults.append(f"line {line}: slide '{show_id(slide)}' has mpp '{show_id(text)}'")
        elif slide in mpp:
            faults.append(f"line {line}: slide '{show_id(slide)}' occurs twice")
        mpp[slide] = value
    if faults:
        raise UserError(
            f"{table} has {len(faults)} row(s) that cannot be used\n{format_list(faults)}\n"
            "  give each slide once, and its micrometres per level-0 pixel, such as 0.25"
        )
    return mpp


def check_overrides(mpp: Mapping[str, float], slides: Iterable[Path]) -> None:
    """Raise UserError if a row names no slide: the slide it was meant for would keep its wrong resolution.

    Parameters
    ----------
    mpp : mapping
        As :func:`read_mpp` returns it.
    slides : iterable of Path
        The slides, or folders of patches.
    """
    names = {name for path in slides for name in (path.stem, path.name)}
    unmatched = [name for name in mpp if name not in names]
    if not unmatched:
        return
    # Only of those that are shown: to compare two long lists takes minutes.
    shown = [f"'{name}'{suggest(name, names)}" for name in unmatched[:3]]
    raise UserError(
        f"--mpp-override: {len(unmatched)} row(s) name no slide\n"
        f"{format_list([*shown, *unmatched[3:]], most=3)}\n"
        "  give slide ids or file names, or remove these rows"
    )
