"""Memory and time of one forward and backward of a head, against the number of patches.

  tools/bench/heads.py
  tools/bench/heads.py --head abmilx --patches 1000 5000 20000 --dense-up-to 5000
  tools/bench/heads.py --head abmil --patches 100000 --device cuda --options embed_dim=256
  tools/bench/heads.py --table                 # every head at 1,000, 10,000 and 50,000 patches
  tools/bench/heads.py --table abmil dsmil --in-dim 512 --patches 2000 --memory 4GiB
  tools/bench/heads.py --check                 # acceptance check of training on features; exit 1 if short

Each figure comes from a process of its own: its peak memory less what it held before the forward. "dense"
allows only the kernels that write attention matrices out. The loss includes the head's auxiliary loss.
Prints one JSON line a measurement, then a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from e2e.errors import UserError, exit_code
from e2e.heads.base import HEADS
from tools.bench import head_step
from tools.bench.check_heads import check
from tools.bench.head_step import HeadStep, describe_costs

SIZES = (1000, 10_000, 50_000)
"""Patches of the table: a biopsy, a section, a large section cut finely."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", default="abmilx")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--in-dim", type=int, default=1024)
    parser.add_argument("--patches", type=int, nargs="+")
    parser.add_argument("--padding", type=float, default=0.1, help="fraction of masked patches")
    parser.add_argument("--dense-up-to", type=int, default=5000, help="largest N run dense as well")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--memory", default="8GiB", help="memory limit of a measurement")
    parser.add_argument("--limit", type=float, default=600, help="its time limit in seconds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--table", nargs="*", metavar="HEAD", help="every head, or these")
    parser.add_argument("--check", action="store_true", help="acceptance check: every row")
    parser.add_argument("--rows", nargs="*", help="--check: only these rows")
    parser.add_argument("--bags", type=int, default=1000, help="--check: bags of an epoch")
    parser.add_argument("--updates", type=int, help="--check: only so many of the epoch's updates")
    parser.add_argument("--turn", type=int, default=2, help="--check: updates timed at a time")
    args = parser.parse_args(argv)
    args.patches = args.patches or list(
        SIZES if args.check or args.table is not None else (1000, 5000, 20_000)
    )
    return args


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Return ``{"heads": 4}`` for ``["heads=4"]``; UserError where there is no ``=``."""
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--options {pair} is not of the form KEY=VALUE")
    split = (pair.split("=", 1) for pair in pairs)
    return {key: yaml.safe_load(value) for key, value in split}


def step_of(args: argparse.Namespace) -> HeadStep:
    """Return the step of the command line, for its first number of patches."""
    return HeadStep(
        head=args.head,
        options=parse_options(args.options),
        in_dim=args.in_dim,
        patches=args.patches[0],
        padding=args.padding,
        device=args.device,
        bf16=args.bf16,
        memory=args.memory,
        limit=args.limit,
        threads=args.threads,
    )


def measure_heads(
    step: HeadStep, heads: Iterable[str], counts: Iterable[int]
) -> dict[str, dict[int, dict[str, Any]]]:
    """Return head -> patches -> its costs, which are printed as they come."""
    costs: dict[str, dict[int, dict[str, Any]]] = {}
    for head in heads:
        for n in counts:
            line = head_step.measure(replace(step, head=head, patches=n))
            print(json.dumps(line), flush=True)
            costs.setdefault(head, {})[n] = line
    return costs


def print_table(args: argparse.Namespace) -> None:
    """Print a row for each head."""
    costs = measure_heads(step_of(args), args.table or HEADS.names(), args.patches)
    table = Table("head", "parameters", *(f"N = {n:,}" for n in args.patches), box=box.MARKDOWN)
    for head, lines in costs.items():
        counts = {line["parameters"] for line in lines.values() if "parameters" in line}
        count = f"{counts.pop():,}" if counts else "-"
        table.add_row(head, count, *(describe_costs(lines[n]) for n in args.patches))
    Console(width=160).print(table)


def print_kernels(args: argparse.Namespace) -> None:
    """Print fused against dense kernels of one head."""
    table = Table("patches", "kernel", "peak above start (MiB)", "seconds")
    for n in args.patches:
        for kernel in ("fused", "dense"):
            if kernel == "dense" and n > args.dense_up_to:
                continue
            line = head_step.measure(replace(step_of(args), patches=n, kernel=kernel))
            print(json.dumps(line), flush=True)
            peak, seconds = (line.get(key, line.get("failed")) for key in ("peak_mib", "seconds"))
            table.add_row(f"{n:,}", kernel, f"{peak}", f"{seconds}")
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    """Check, or measure every size, print as it goes, then the table."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.check:
        return check(args.rows, step_of(args), args)
    if args.table is not None:
        print_table(args)
    else:
        print_kernels(args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
