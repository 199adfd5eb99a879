"""Cut slides into patches and store them, with their places, in one LMDB file.

tools/pack_lmdb.py --slides DIR --out cohort.lmdb                  256 px at 0.5 um/px (20x)
tools/pack_lmdb.py --slides DIR --out a.lmdb --scale 0.5 --scale 2 two stores, a_0.5.lmdb, a_2.lmdb
tools/pack_lmdb.py --coords DIR --slides DIR --out cohort.lmdb     where CLAM or TRIDENT cut
tools/pack_lmdb.py --patches DIR --out cohort.lmdb                 DIR/<slide>/*.jpg, png
tools/pack_lmdb.py --slides DIR --out cohort.lmdb --scheduler tcp://HOST:8786    on a Dask cluster

Run it again to go on after a stop of any kind, or to add slides: those in the store are skipped.
A slide that cannot be used is left out and named in FILE.lmdb.quarantine.csv; every slide is in
FILE.lmdb.report.csv. Look at FILE_overview/<slide>.png: tissue outlined in green, patches in blue.

On a cluster all machines see DIR and the folder of FILE.lmdb under the same paths, and have the same
version of the project. Each worker (dask worker ADDRESS --nworkers N --nthreads 1) writes a file of
its own, FILE.<host>-<n>.lmdb; FILE.stores.json is the index over them.

Exit codes: 0 all packed; 2 stopped by a mistake, which the message names; 3 packed, but some slides
are not in the store; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from e2e.errors import UserError, exit_code
from e2e.store.cluster import connected, index_path, pack_on_cluster
from e2e.store.pack import Progress as PackProgress
from e2e.store.pack import Report, Row, pack
from e2e.store.sources import CoordsFiles, PatchFolders, SlideFiles, Source, read_mpp
from e2e.wsi.slide import find_slides
from e2e.wsi.tiling import Tiling


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; what was not given is None, so that conflicts can be told."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text, allow_abbrev=False)
    source = parser.add_argument_group("source")
    source.add_argument(
        "--slides", type=Path, metavar="DIR", help="slides, in any depth of folders"
    )
    source.add_argument("--coords", type=Path, metavar="DIR", help="h5 files of CLAM or TRIDENT")
    source.add_argument("--patches", type=Path, metavar="DIR", help="a folder of images per slide")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.lmdb")
    cut = parser.add_argument_group("how to cut")
    cut.add_argument("--mpp", type=float, help="um per pixel of the patches (default: 0.5)")
    cut.add_argument("--mag", type=float, help="the same by magnification: mpp = 10 / mag")
    cut.add_argument(
        "--scale", type=float, action="append", metavar="MPP", help="one store for each; repeatable"
    )
    cut.add_argument(
        "--mpp-override", type=Path, metavar="CSV", help="columns slide,mpp: what files say wrongly"
    )
    cut.add_argument("--patch-size", type=int, metavar="PX", help="side of a patch (default: 256)")
    cut.add_argument("--overlap", type=int, metavar="PX", help="of neighbours (default: 0)")
    cut.add_argument(
        "--tissue",
        type=float,
        metavar="FRACTION",
        help=f"least tissue in a patch (default: {Tiling().tissue})",
    )
    cut.add_argument("--quality", type=int, default=80, help="JPEG quality (default: 80)")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="of a Dask cluster; local: started here, in processes",
    )
    return parser.parse_args(argv)


def sources(args: argparse.Namespace) -> list[tuple[Path, Source]]:
    """The stores to make, each with what goes into it. UserError where options contradict."""
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality is 1 to 100, not {args.quality}")
    check_workers(args)
    if args.patches and (args.slides or args.coords):
        raise UserError("--patches has its pixels itself: give it without --slides and --coords")
    if not args.patches and not args.slides:
        raise UserError(
            "nothing to pack: give --slides DIR, --coords DIR --slides DIR, or --patches DIR"
        )
    if [args.mpp, args.mag, args.scale].count(None) < 2:
        raise UserError("--mpp, --mag and --scale all say how fine patches are: give one of them")
    if args.mag is not None and args.mag <= 0:
        raise UserError(f"--mag is more than 0, not {args.mag}")
    mpp = args.mpp if args.mag is None else 10 / args.mag
    overrides = read_mpp(args.mpp_override) if args.mpp_override else {}
    if args.patches:
        refuse(args, "--patches", "overlap", "tissue", "scale")
        folders = PatchFolders(args.patches, args.patch_size, args.quality, mpp, overrides)
        return [(args.out, folders)]
    paths = find_slides(args.slides)
    if args.coords:
        refuse(args, "--coords", "mpp", "mag", "scale", "overlap", "tissue")
        coords = CoordsFiles(args.coords, paths, args.patch_size, args.quality, overrides)
        return [(args.out, coords)]
    given = {
        "patch_px": args.patch_size,
        "overlap": args.overlap,
        "tissue": args.tissue,
        "mpp": mpp,
    }
    tiling = Tiling(**{name: value for name, value in given.items() if value is not None})
    scales = {args.out: tiling}
    if args.scale:
        scales = {
            args.out.with_name(f"{args.out.stem}_{scale:g}{args.out.suffix}"): replace(
                tiling, mpp=scale
            )
            for scale in args.scale
        }
    return [
        (out, SlideFiles(paths, tiling, args.quality, overrides)) for out, tiling in scales.items()
    ]


def check_workers(args: argparse.Namespace) -> None:
    """UserError where --workers makes no sense."""
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers is 0 (all in this process) or more, not {args.workers}")
    if args.scheduler == "local" and args.workers == 0:
        raise UserError("--scheduler local has workers: give --workers 1 or more")
    if args.scheduler not in (None, "local") and args.workers is not None:
        raise UserError("a cluster has its own workers: give --scheduler without --workers")


def refuse(args: argparse.Namespace, source: str, *options: str) -> None:
    """UserError where an option was given that the source leaves nothing to do."""
    given = [f"--{option}" for option in options if getattr(args, option) is not None]
    if given:
        raise UserError(f"{source} are cut already: {', '.join(given)} cannot change that")


class Lines(PackProgress):
    """A line a slide; above them, on a terminal, a bar."""

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
        self._slides = self._total = self._done = self._patches = self._of = 0

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
            self._say(f"{stored} slides are in the store already")

    def planned(self, slide: str, patches: int) -> None:
        """See the base class."""
        self._done, self._of = 0, patches

    def written(self, patches: int) -> None:
        """See the base class."""
        self._done += patches
        self._patches += patches
        elapsed = self._bar.tasks[-1].elapsed or 0.0
        self._bar.update(
            self._task,
            completed=self._slides + min(1.0, self._done / max(1, self._of)),
            rate=f"{self._patches:,} patches, {self._patches / max(elapsed, 0.1):,.0f}/s",
        )

    def finished(self, row: Row) -> None:
        """See the base class."""
        self._slides += 1
        self._done = 0
        self._bar.update(self._task, completed=self._slides)
        line = f"{self._slides}/{self._total} {row.slide}: {row.status}"
        if row.status == "packed":
            mpp = "unknown" if row.mpp is None else f"{row.mpp:.4g}"
            line += f", {row.patches} patches of {row.patch_px} px, {mpp} um/px"
            line += f", {row.level0_px:.6g} px at level 0"
        elif row.status == "quarantined":
            line += f": {row.reason.splitlines()[0]}"
        self._say(line)

    def noted(self, text: str) -> None:
        """See the base class."""
        self._say(text)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def packing(args: argparse.Namespace) -> Iterator[Report]:
    """Pack store by store, here or on a cluster."""
    made = sources(args)
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    with ExitStack() as stack:
        work = partial(pack, workers=workers)
        if args.scheduler:
            work = partial(pack_on_cluster, stack.enter_context(connected(args.scheduler, workers)))
        for out, source in made:
            if not args.scheduler and index_path(out).exists():
                raise UserError(
                    f"{out} has files of a cluster's workers, named in {index_path(out)}\n"
                    "  go on with --scheduler local, or choose another --out"
                )
            print(f"{out}: {source.recipe()}", flush=True)
            with Lines(Console()) as progress:
                yield work(source, out, progress=progress)


def main() -> int:
    """Pack, report, and tell by the exit code whether every slide is in the store."""
    args = parse()
    if args.scheduler:  # workers have their own working folder
        for name in ("slides", "coords", "patches", "out"):
            given = getattr(args, name)
            setattr(args, name, given and given.absolute())
    reports = list(packing(args))
    for report in reports:
        print(
            f"{report.index or report.out}: {len(report.packed)} slides, "
            f"{sum(row.patches for row in report.packed):,} patches; list: {report.path}"
        )
        if report.problems:
            print(f"  {len(report.problems)} slides are NOT in it, see {report.quarantine}")
    return 3 if any(report.problems for report in reports) else 0


if __name__ == "__main__":
    said = "stopped; the same command goes on where this one ended"
    sys.exit(exit_code(main, interrupted=said))
