"""Speed and memory of the patch stream, beside other ways of making the same pixels.

  tools/bench/loader.py --store FILE.lmdb               # read, decode, augment, all together; other loaders
  tools/bench/loader.py --slides A.svs B.svs            # the same on slides that are cut first
  tools/bench/loader.py --store FILE.lmdb --check       # acceptance check; exit 1 if a row is short
  tools/bench/loader.py --check --rows overhead cold    # some of its rows

Patches of real tissue come from a store of tools/pack_lmdb.py, or from slides; without either they are
drawn, which the first line says. A bench store repeats them. All ways run in one process on one core, in
ABBA order; times are medians of CPU seconds, ratios medians of the rounds' ratios. Memory, cold reads and
two workers are measured in processes of their own. Prints JSON lines, then a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
import os
import statistics
import tempfile
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from e2e.errors import exit_code
from e2e.images.augment import Augment
from tools.bench.check_loader import check
from tools.bench.patches import Bench, Sizes, read_jpegs
from tools.bench.pixels import (
    bare_loop,
    dali,
    per_patch,
    published_loader,
    simplejpeg_library,
    turbojpeg_library,
    windows_of,
)
from tools.bench.stream import stages
from tools.bench.timing import time_ways


def report(bench: Bench) -> int:
    """Print the stages and the other loaders, a line each, then the table."""
    sizes = bench.sizes
    crop = Augment(crop=sizes.crop, size=sizes.out)
    library = turbojpeg_library() or simplejpeg_library()
    windows = windows_of(bench, Augment(flip="none", crop=sizes.crop, size=sizes.out))
    ways = {
        **{f"{name} (flip)": way for name, way in stages(bench, Augment()).items()},
        **{
            f"{name} (flip, crop to {sizes.out})": way
            for name, way in stages(bench, crop).items()
            if name in ("augment", "all together")
        },
        "bare decode loop, simplejpeg": partial(bare_loop, bench, simplejpeg_library()),
        f"published loader's way, {library.name}": partial(published_loader, bench, library),
        f"DataLoader, PIL, torchvision v2 (crop to {sizes.out})": partial(
            iter, per_patch(bench, windows, workers=0)
        ),
    }
    try:
        ways["DALI on the CPU: decode"] = dali(bench, crop=False)
        ways["DALI on the CPU: decode, crop"] = dali(bench, crop=True)
    except ImportError as error:
        print(json.dumps({"way": "DALI", "skipped": str(error)}))
    table = Table("way", "patches/s", "CPU us a patch")
    for name, times in time_ways(ways, sizes.rounds).items():
        line = times.line(sizes.patches)
        print(json.dumps({"way": name, **line}), flush=True)
        table.add_row(name, f"{line['patches_per_s']:,.0f}", f"{line['cpu_us_a_patch']:,.0f}")
    Console().print(table)
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--store", type=Path, help="store of real patches, packed by tools/pack_lmdb.py"
    )
    source.add_argument("--slides", type=Path, nargs="+", help="slides to cut patches from")
    parser.add_argument("--slide-mpp", type=float, help="um per level-0 pixel of --slides")
    parser.add_argument("--size", type=int, default=256, help="side of the patches (%(default)s)")
    for name, default in Sizes.__dataclass_fields__.items():
        kind = type(default.default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default.default)
    parser.add_argument("--check", action="store_true", help="acceptance check: every row")
    parser.add_argument("--rows", nargs="+", help="--check: only these rows")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Check or measure."""
    args = parse(argv)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-1:])
    try:
        with tempfile.TemporaryDirectory() as folder:
            jpegs, origin = read_jpegs(args, Path(folder))
            sizes = Sizes(**{name: getattr(args, name) for name in Sizes.__dataclass_fields__})
            bench = Bench(Path(folder), jpegs, args.size, sizes, cores)
            described = {"patches": origin, "bytes": round(statistics.mean(map(len, jpegs)))}
            print(json.dumps(described | {"load": os.getloadavg()[0]}), flush=True)
            if not args.check:
                return report(bench)
            return check(args.rows, bench)
    finally:
        os.sched_setaffinity(0, cores)


if __name__ == "__main__":
    sys.exit(exit_code(main))
