"""Speed and memory of a training step, ways of taking it side by side.

  tools/bench/step.py                                   # naive, checkpoint, exact, exact that keeps graphs
  tools/bench/step.py --compare exact naive exact       # a ratio, refused where the gradients differ
  tools/bench/step.py --compare recipe fp32:precision=fp32 bf16:precision=bf16
  tools/bench/step.py --patches 4096 --size 224 --chunk 256 --encoder r50 --device cuda
  tools/bench/step.py --check [--long]                  # acceptance check; exit 1 if a row is short

A way is NAME, or NAME:key=value,... with the fields of ``Way`` in tools/bench/engine.py. Patches are JPEGs
in a real store, read, decoded and augmented by the training loader. All ways run in one process in ABBA
order; times are medians. Each memory figure comes from a process of its own. Prints JSON lines, then a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from e2e.errors import UserError, exit_code
from tools.bench.check_engine import check
from tools.bench.engine import (
    WAYS,
    Way,
    Work,
    build_model,
    gradients,
    make_update,
    measure_memory,
    parse_way,
    relative_distance,
    time_ways,
    write_store,
)


def compare(ways: Sequence[Way], work: Work, rounds: int, how: str) -> int:
    """Print the speed of every way relative to the first one and return the exit code.

    Parameters
    ----------
    how
        ``exact``: no ratio is given where gradients differ, and the exit code is 1. ``recipe``: the
        differences of the options are printed beside the ratio.
    """
    device, first = torch.device(work.device), ways[0]
    clock = "cpu_seconds" if device.type == "cpu" else "seconds"
    bound = {"float64": 1e-12}.get(first.dtype, 1e-5)
    refused = 0
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder), [work.patches, 8], work.size)

        def gradients_of(way: Way) -> dict[str, torch.Tensor]:
            bag = make_update(store, [work.patches], work, way)
            return gradients(build_model(work, way), bag, way, device)

        times = time_ways(ways, work, store, rounds=rounds)
        reference = gradients_of(first)
        for way in ways[1:]:
            gap = relative_distance(gradients_of(way), reference)
            line: dict[str, Any] = {"way": way.name, "over": first.name, "gradient_difference": gap}
            if how == "exact" and not gap <= bound:
                refused += 1
                line["refused"] = f"not the same mathematics: over {bound:g}"
            else:
                line["time_ratio"] = round(times[way.name][clock] / times[first.name][clock], 3)
            if how == "recipe":
                a, b = dataclasses.asdict(first), dataclasses.asdict(way)
                line["differs_in"] = {k: [a[k], b[k]] for k in a if a[k] != b[k] and k != "name"}
            print(json.dumps(line), flush=True)
    return 1 if refused else 0


def bench(ways: Sequence[Way], work: Work, args: argparse.Namespace) -> int:
    """Print speed at one size and memory at several, a line each, then the table."""
    counts = sorted({*args.memory, work.patches, 2 * work.chunk})
    table = Table("way", "patches/s", "waiting", *(f"MiB at N = {n:,}" for n in args.memory))
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder), counts, work.size)
        times = time_ways(ways, work, store, rounds=args.rounds)
        for way in ways:
            cells = []
            for count in args.memory:
                sized = dataclasses.replace(work, patches=count)
                memory = measure_memory(sized, way, store, args.threads)
                print(json.dumps({"way": way.name, "patches": count, **memory}), flush=True)
                cells.append(f"{memory['peak'] / 2**20:,.0f}")
            speed = times[way.name]
            line = {"way": dataclasses.asdict(way), "work": dataclasses.asdict(work), **speed}
            print(json.dumps(line), flush=True)
            table.add_row(
                way.name, f"{speed['patches_per_s']:,}", f"{speed['waiting']:.1%}", *cells
            )
    Console().print(table)
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ways", nargs="*", default=list(WAYS), metavar="WAY")
    for field in dataclasses.fields(Work):
        kind: Callable[[str], Any] = int if isinstance(field.default, int) else str
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    parser.add_argument("--memory", type=int, nargs="*", default=[64, 256], help="sizes of bags")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the encoder")
    parser.add_argument("--compare", choices=("exact", "recipe"), help="ratios to the first way")
    parser.add_argument("--check", action="store_true", help="acceptance check: every row")
    parser.add_argument("--rows", nargs="*", help="--check: only these rows")
    parser.add_argument("--long", action="store_true", help="--check: 20,000 patches at 224 px too")
    return parser.parse_args(argv)


def main() -> int:
    """Compare, check or measure."""
    args = parse()
    torch.set_num_threads(args.threads)
    if args.check:
        return check(args.rows, long=args.long, threads=args.threads)
    work = Work(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Work)})
    ways = [parse_way(text) for text in args.ways]
    if work.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch sees no CUDA device (torch.cuda.is_available() is False)\n"
            "  use --device cpu, or check the driver and CUDA_VISIBLE_DEVICES"
        )
    if args.compare:
        return compare(ways, work, args.rounds, args.compare)
    return bench(ways, work, args)


if __name__ == "__main__":
    sys.exit(exit_code(main))
