"""Make a cohort of synthetic slides whose label depends on one planted anomaly.

  python -m e2e.toy --out toy
  python -m e2e.toy --out toy-macro --kind macro --slides 32,8,24 --workers 8

micro  Black discs are scattered over the tissue. Each has a white glyph: a letter o or, on about half
       of the discs of an anomaly slide, in clusters, a plus. Both glyphs have the same ink and the same
       length of edge, and at 5x they have identical pixels: they differ only at 20x (0.5 um/px) and, less
       clearly, at 10x.
macro  A few white rings with a thick black border: circles and, on an anomaly slide, some ellipses of
       the same area and the same ink. They are up to 1,039 px wide at 20x (0.5 um/px), where a patch
       shows only an arc; at 1.25x a patch shows the whole ring.

Writes OUT/slides/<slide>.tif (JPEG pyramids for OpenSlide), OUT/labels.csv (case,slide,split,label),
OUT/truth.csv (box of each anomalous object, level-0 pixels) and OUT/painter.json (the settings drawn
per slide; the two cases of a pair, one of each label, share them). Test slides are painted with
settings that no training slide has; the anomaly is the same. A slide depends only on the seed and its
name. The two anomalies follow the micro- and macro-anomaly data sets of CS-MIL (Deng et al., MMMI
2022), painted on synthetic tissue.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from e2e.errors import UserError
from e2e.toy.paint import (
    DEFAULT_SIZE,
    KINDS,
    MPP,
    SIZE_STEP,
    SMALLEST_LEVEL,
    SMALLEST_SIZE,
    SPLITS,
    Box,
    Settings,
    SlideSpec,
    paint,
    plan,
)


def write_pyramid(path: Path, image: npt.NDArray[np.uint8]) -> None:
    """Write ``image`` (H, W, 3) as a tiled JPEG pyramid; OpenSlide reads it as generic-tiff."""
    # Each level is averaged from the first: rounding twice could reveal the label at 5x.
    levels = [image]
    while min(levels[-1].shape[:2]) >= 2 * SMALLEST_LEVEL:
        levels.append(np.asarray(Image.fromarray(image).reduce(2 ** len(levels))))
    with tifffile.TiffWriter(path) as out:
        for number, level in enumerate(levels):
            per_cm = 10_000 / (MPP * 2**number)
            # With "ycbcr" the file would open too, but show wrong colours.
            out.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 90},
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=1 if number else 0,
                metadata=None,
            )


def make_slide(job: tuple[SlideSpec, str, int, int, Path]) -> tuple[SlideSpec, list[Box], Settings]:
    """Paint and write one slide. ``job`` = spec, kind, size, seed, folder."""
    spec, kind, size, seed, folder = job
    painted = paint(spec, kind, size, seed)
    path = folder / f"{spec.slide}.tif"
    write_pyramid(path, painted.image)
    sync(path)
    return spec, painted.truth, painted.settings


def make_slides(
    jobs: list[tuple[SlideSpec, str, int, int, Path]], workers: int
) -> Iterator[tuple[SlideSpec, list[Box], Settings]]:
    """Yield the slides in the order of ``jobs``, painted by ``workers`` processes."""
    if workers == 1:
        yield from map(make_slide, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        yield from pool.map(make_slide, jobs)


def make_cohort(
    out: Path, *, kind: str, slides: tuple[int, int, int], seed: int, size: int, workers: int
) -> int:
    """Write the cohort to ``out``, complete or not at all.

    Parameters
    ----------
    out
        A new or an empty folder.
    kind
        ``micro`` or ``macro``.
    slides
        Number of slides in train, val and test.
    seed
        Random seed.
    size
        Width and height of a slide in pixels.
    workers
        Processes that paint.

    Returns
    -------
    int
        Number of anomalous objects.

    Raises
    ------
    UserError
        ``out`` exists and is not empty, or cannot be made.
    """
    check_out(out)
    rows = plan(slides, seed)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror or error}") from error
    try:
        (work / "slides").mkdir()
        jobs = [(spec, kind, size, seed, work / "slides") for spec in rows]
        slides_made = list(with_progress(make_slides(jobs, workers), len(jobs)))
        truth = [(spec.slide, *box) for spec, boxes, _ in slides_made for box in boxes]
        write_table(work / "labels.csv", SlideSpec._fields, rows)
        write_table(work / "truth.csv", ("slide", *Box._fields), truth)
        settings = {spec.slide: drawn for spec, _, drawn in slides_made}
        painter = {"kind": kind, "seed": seed, "size": size, "mpp": MPP, "slides": settings}
        (work / "painter.json").write_text(json.dumps(painter, indent=1) + "\n")
        sync(work / "painter.json")
        sync(work / "slides")
        sync(work)
        work.chmod(0o755)
        # Replaces an empty folder; fails if it has been filled meanwhile.
        work.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return len(truth)


def with_progress(items: Iterator, total: int) -> Iterator:
    """Yield ``items`` and show a progress bar if the screen is a terminal."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(items, total=total, description="painting slides")


def write_table(path: Path, header: tuple[str, ...], rows: list) -> None:
    """Write a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    sync(path)


def sync(path: Path) -> None:
    """Wait until ``path``, a file or a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- command line ---------------------------------------------------------------------------------


def check_out(out: Path) -> None:
    """Raise UserError unless ``out`` does not exist or is an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        state = "contains files" if out.is_dir() else "is a file"
        raise UserError(f"--out {out} {state}\n  use a new or an empty folder, or remove it first")


def parse_slides(text: str) -> tuple[int, int, int]:
    """Return the number of slides in train, val and test: '64,16,48' -> (64, 16, 48)."""
    parts = text.split(",")
    if len(parts) != 3 or not all(p.strip().isascii() and p.strip().isdigit() for p in parts):
        raise UserError(f"--slides {text}: use three counts, train,val,test, for example 64,16,48")
    train, val, test = map(int, parts)
    if min(train, val, test) < 1:
        raise UserError(f"--slides {text}: each split needs at least one slide")
    return train, val, test


def check_numbers(kind: str, size: int, seed: int, workers: int) -> None:
    """Raise UserError for a size that cannot be painted, a negative seed, or no workers."""
    smallest = SMALLEST_SIZE[kind]
    if size < smallest or size % SIZE_STEP:
        raise UserError(
            f"--size {size}: {kind} slides need a multiple of {SIZE_STEP} pixels, "
            f"at least {smallest}"
        )
    if seed < 0:
        raise UserError(f"--seed {seed}: use 0 or more")
    if workers < 1:
        raise UserError(f"--workers {workers}: use 1 or more")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; its help is the docstring of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a new or an empty folder")
    parser.add_argument(
        "--kind",
        choices=sorted(KINDS, reverse=True),
        default="micro",
        help="of anomaly (%(default)s)",
    )
    parser.add_argument(
        "--slides", default="64,16,48", help="number in train,val,test (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument(
        "--size", type=int, help="side of a slide in pixels (micro 1024, macro 3072)"
    )
    parser.add_argument("--workers", type=int, default=2, help="number of processes (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Make the cohort that the command line describes; return the exit code."""
    args = parse(argv)
    slides = parse_slides(args.slides)
    size = DEFAULT_SIZE[args.kind] if args.size is None else args.size
    check_numbers(args.kind, size, args.seed, args.workers)
    objects = make_cohort(
        args.out, kind=args.kind, slides=slides, seed=args.seed, size=size, workers=args.workers
    )
    counts = ", ".join(f"{count} {split}" for count, split in zip(slides, SPLITS, strict=True))
    print(
        f"{sum(slides)} {args.kind} slides ({counts}) of {size} px, "
        f"{objects} anomalous objects, in {args.out}"
    )
    return 0
