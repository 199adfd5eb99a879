"""Cut slides into patches and store them, with their coordinates, in one LMDB file."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from e2e.errors import UserError, describe_interrupt
from e2e.settings.data_cli import pack_parser
from e2e.store.cluster import connect, pack_on_cluster
from e2e.store.index import index_path
from e2e.store.mpp_table import check_overrides, read_mpp
from e2e.store.pack import Progress as PackProgress
from e2e.store.pack import Report, Row, pack
from e2e.store.patch_folders import PatchFolders
from e2e.store.sources import CoordsFiles, SlideFiles, Source
from e2e.wsi.slide import describe_unread, find_slides
from e2e.wsi.tiling import Tiling


def sources(args: argparse.Namespace) -> list[tuple[Path, Source]]:
    """Return the stores to make and the source of each.

    Raises
    ------
    UserError
        If options are missing or contradict each other.
    """
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality {args.quality}: must be 1 to 100")
    check_workers(args)
    if args.patches and (args.slides or args.coords):
        raise UserError(
            "--patches cannot be combined with --slides or --coords\n  omit one of them"
        )
    if not args.patches and not args.slides:
        raise UserError(
            "nothing to pack\n  give --slides DIR, --coords DIR --slides DIR, or --patches DIR"
        )
    if [args.mpp, args.mag, args.scale].count(None) < 2:
        raise UserError("--mpp, --mag and --scale contradict each other\n  give one of them")
    if args.mag is not None and args.mag <= 0:
        raise UserError(f"--mag {args.mag:g}: must be greater than 0")
    mpp = args.mpp if args.mag is None else 10 / args.mag
    overrides = read_mpp(args.mpp_override) if args.mpp_override else {}
    if args.patches:
        reject_options(args, "--patches", "overlap", "tissue", "scale", "suffix")
        folders = PatchFolders(args.patches, args.patch_size, args.quality, mpp, overrides)
        check_overrides(overrides, folders.slide_folders())
        return [(args.out, folders)]
    if args.coords:
        reject_options(args, "--coords", "mpp", "mag", "scale", "overlap", "tissue")
        paths = _find_slides(args)
        check_overrides(overrides, paths)
        coords = CoordsFiles(args.coords, paths, args.patch_size, args.quality, overrides)
        return [(args.out, coords)]
    options = {
        "patch_px": args.patch_size,
        "overlap": args.overlap,
        "tissue": args.tissue,
        "mpp": mpp,
    }
    tiling = Tiling(**{name: value for name, value in options.items() if value is not None})
    scales = {args.out: tiling}
    if args.scale:
        scales = {
            args.out.with_name(f"{args.out.stem}_{scale:g}{args.out.suffix}"): replace(
                tiling, mpp=scale
            )
            for scale in args.scale
        }
    paths = _find_slides(args)
    check_overrides(overrides, paths)
    return [
        (out, SlideFiles(paths, tiling, args.quality, overrides)) for out, tiling in scales.items()
    ]


def _find_slides(args: argparse.Namespace) -> list[Path]:
    for line in describe_unread(args.slides):
        print(line)
    return find_slides(args.slides, suffixes=args.suffix or ())


def check_workers(args: argparse.Namespace) -> None:
    """Raise UserError if --workers does not fit the other options."""
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers {args.workers}: must be 0 (everything in this process) or more")
    if args.scheduler == "local" and args.workers == 0:
        raise UserError("--scheduler local needs workers\n  give --workers 1 or more")
    if args.scheduler not in (None, "local") and args.workers is not None:
        raise UserError("--scheduler ADDRESS uses the workers of the cluster\n  omit --workers")


def reject_options(args: argparse.Namespace, source: str, *options: str) -> None:
    """Raise UserError if options were given that have no effect on this source."""
    useless = [f"--{option}" for option in options if getattr(args, option) is not None]
    if useless:
        names = ", ".join(useless)
        raise UserError(f"{names} cannot be used with {source}\n  omit {names}")


class Lines(PackProgress):
    """Prints a line per slide, and on a terminal a progress bar."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} slides, {task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = TaskID(0)
        self._slides = self._total = self._patches = 0
        self._slide_done = self._slide_total = 0

    def __enter__(self) -> Lines:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def started(self, slides: int, stored: int) -> None:
        """See the base class."""
        self._total = slides
        self._task = self._bar.add_task("packing", total=slides, rate="0 patches")
        if stored:
            self._print(f"{stored} slides are in the store already")

    def planned(self, slide: str, patches: int) -> None:
        """See the base class."""
        self._slide_done, self._slide_total = 0, patches

    def written(self, patches: int) -> None:
        """See the base class."""
        self._slide_done += patches
        self._patches += patches
        elapsed = self._bar.tasks[-1].elapsed or 0.0
        self._bar.update(
            self._task,
            completed=self._slides + min(1.0, self._slide_done / max(1, self._slide_total)),
            rate=f"{self._patches:,} patches, {self._patches / max(elapsed, 0.1):,.0f}/s",
        )

    def finished(self, row: Row) -> None:
        """See the base class."""
        self._slides += 1
        self._slide_done = 0
        self._bar.update(self._task, completed=self._slides)
        line = f"{self._slides}/{self._total} {row.slide}: {row.status}"
        if row.status == "packed":
            mpp = "unknown" if row.mpp is None else f"{row.mpp:.4g}"
            line += f", {row.patches} patches of {row.patch_px} px, {mpp} um/px"
            line += f", {row.level0_px:.6g} px at level 0"
            line += f"; {row.reason}" if row.reason else ""
        else:
            line += f": {row.reason.splitlines()[0]}"
        self._print(line)

    def noted(self, text: str) -> None:
        """See the base class."""
        self._print(text)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def packing(args: argparse.Namespace) -> Iterator[Report]:
    """Pack store by store, on this machine or on a cluster; yield the report of each."""
    outputs = sources(args)
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    with ExitStack() as stack:
        pack_store = partial(pack, workers=workers)
        if args.scheduler:
            client = stack.enter_context(connect(args.scheduler, workers))
            pack_store = partial(pack_on_cluster, client)
        for out, source in outputs:
            if not args.scheduler and index_path(out).exists():
                raise UserError(
                    f"{out} was packed on a cluster into the files listed in {index_path(out)}\n"
                    "  continue with --scheduler local, or choose another --out"
                )
            print(f"{out}: {source.recipe()}", flush=True)
            with Lines(Console()) as progress:
                yield pack_store(source, out, progress=progress)


def main(argv: Sequence[str] | None = None) -> int:
    """Pack and report; return 3 if some slides are not in the store."""
    args = pack_parser().parse(argv)
    if args.scheduler:  # workers have their own working folder
        for name in ("slides", "coords", "patches", "out"):
            path = getattr(args, name)
            setattr(args, name, path and path.absolute())
    with describe_interrupt(lambda: "interrupted; run the same command again to continue"):
        reports = list(packing(args))
    for report in reports:
        print(
            f"{report.index or report.out}: {len(report.packed)} slides, "
            f"{sum(row.patches for row in report.packed):,} patches; list: {report.path}"
        )
        if remarks := Counter(row.reason.split(":")[0] for row in report.packed if row.reason):
            print(*(f"  {count} slides: {remark}" for remark, count in remarks.items()), sep="\n")
        if report.problems:
            print(f"  {len(report.problems)} slides are NOT in it, see {report.quarantine}")
    return 3 if any(report.problems for report in reports) else 0
