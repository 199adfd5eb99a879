"""Kill commands, fill disks and damage files, and count what is lost, silently wrong or ends in a traceback.

    python -m tools.faults                     # the whole campaign; the exit code is 1 if anything went wrong
    python -m tools.faults --only "kill pack,store"
    python -m tools.faults --seed 7              # other kills and mutations

Every fault is drawn from the seed, so a line that went wrong can be repeated. The campaign writes to a
temporary folder alone (--out keeps it).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from e2e.cli import VERBS
from e2e.log import clock
from tools.faults.commands import COMMANDS, kill_command, limit_command
from tools.faults.formats import FORMATS, mutate_format
from tools.faults.outcomes import BAD, Outcome, table
from tools.faults.project import make_project
from tools.faults.replaced import replace_stores

KILLS, MUTATIONS, FULL_DISKS, REPLACED = 320, 2200, 40, 60
"""Faults in a whole campaign."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of the rows, separated by commas")
    parser.add_argument("--share", type=float, default=1.0, help="share of the faults to try")
    parser.add_argument("--out", type=Path, help="keep the files in this new folder")
    args = parser.parse_args(argv)
    for verb in VERBS.values():  # before any fork
        importlib.import_module(verb.module)
    torch.set_num_threads(1)  # a forked process has no other threads
    wanted = [name for name in args.only.split(",") if name]
    if args.out is not None:
        args.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.out or Path(temporary)).resolve() / "work"
        (work / "here").mkdir(parents=True)
        with contextlib.chdir(work / "here"):
            return campaign(work, args.seed, wanted, args.share)


def campaign(folder: Path, seed: int, only: Sequence[str], share: float) -> int:
    """Run the faults in a new folder; return 1 if anything was lost or wrong."""
    started = time.monotonic()
    project = make_project(folder / "project")
    plan: dict[str, tuple[Any, Any, float]] = {
        f"kill {name}": (kill_command, command, KILLS / len(COMMANDS))
        for name, command in COMMANDS.items()
    }
    plan |= {
        f"full disk {name}": (limit_command, command, FULL_DISKS / len(COMMANDS))
        for name, command in COMMANDS.items()
    }
    plan |= {
        name: (mutate_format, file_format, MUTATIONS / len(FORMATS))
        for name, file_format in FORMATS.items()
    }
    plan["replaced store"] = (replace_stores, None, REPLACED)
    rows: dict[str, Counter[Outcome]] = {}
    for name, (work, subject, count) in plan.items():
        if only and name not in only:
            continue
        work_folder = folder / name.replace(" ", "_")
        work_folder.mkdir()
        outside = list_outside(folder)
        rows[name] = work(project, work_folder, subject, math.ceil(count * share), seed)
        if new := list_outside(folder) - outside - {work_folder.name}:
            rows[name][Outcome.OUTSIDE] += len(new)
            print(f"{name}: written outside its folder: {sorted(new)}")
        print(f"{name}: {dict(rows[name])}", flush=True)
    print(table(rows))
    print(f"seed {seed}, {clock(time.monotonic() - started)}")
    return int(any(row[outcome] for row in rows.values() for outcome in BAD))


def list_outside(folder: Path) -> set[str]:
    """Return the entries of the campaign's folder, the one above and the current one."""
    return {*os.listdir(folder), *os.listdir(folder.parent), *os.listdir()}


if __name__ == "__main__":
    sys.exit(main())
