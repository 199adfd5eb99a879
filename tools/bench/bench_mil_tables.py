"""Heads on tables of bags, by repeated cross-validation: accuracy, AUC, balanced accuracy, time.

  tools/bench/bench_mil_tables.py  # three classic tables, eight heads
  tools/bench/bench_mil_tables.py --table FILE.csv.gz --heads abmil,gabmil --folds 10 --seeds 5 --json O.json
  tools/bench/bench_mil_tables.py --check  # abmil against Ilse et al.; exit 1 if short

A table is a CSV file, gzipped or not, with or without a line of names: label, bag, then features, a row
an instance. A bag's label is the largest of its rows'. Labels are any numbers, two classes or more.

Protocol: every seed cuts the bags into its own folds, stratified by label; each fold is tested once by
a head that was trained on the others. Features are standardised by the training rows of that training.
Nothing is chosen on a test fold: a recipe fixed beforehand, the same for every table and head (an option
is set where the head has it), the weights after the last epoch. A figure is the mean over seeds of
a seed's mean over folds. Beside it stand its standard error over seeds, as in Ilse et al., and a 95 %
t interval made of that: they speak of other folds and starts on the same bags, not of other bags.

The recipe is from the literature and was not searched: 100 epochs, learning rate 5e-4 and weight decay
5e-3 are those of Ilse et al. for these tables (arXiv:1802.04712), where a step is one bag and the decay
Adam's L2 term; here a step is 8 bags, for speed, the optimiser this project's AdamW with a cosine, and the
projection one layer of 128, the middle one of their 256-128-64.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import dataclasses
import gzip
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy

import e2e.heads  # noqa: F401
from e2e.errors import UserError, exit_code
from e2e.files import write_json
from e2e.heads.base import HEADS, Head
from e2e.metrics.values import Array, classification_metrics
from e2e.training.optim import build_optimizer, learning_rate

Indices = NDArray[np.int64]
Figures = dict[str, float]

ROOT = Path(__file__).resolve().parents[2]
TABLES = ("musk1.csv.gz", "elephant.csv.gz", "ucsb_breast_cancer.csv.gz")
SHOWN = ("abmil", "gabmil", "abmilx", "dsmil", "clam_sb", "transmil", "mean", "max")

EPOCHS = 100
BATCH = 8
"""Bags a step."""
RATE = 5e-4
"""AdamW's learning rate, which falls to 0 along a cosine."""
DECAY = 5e-3
OPTIONS = {"embed_dim": 128, "dropout": 0.25}
"""Of a head that has them; all else is the head's default."""
METRICS = ("accuracy", "auc", "balanced_accuracy")

PUBLISHED = {
    "musk1": (0.900, 0.050),
    "musk2": (0.863, 0.042),
    "fox": (0.603, 0.029),
    "tiger": (0.845, 0.018),
    "elephant": (0.857, 0.027),
}
"""Table -> accuracy and standard error of gated attention, Ilse et al. 2018, arXiv:1802.04712, table 1."""


@dataclass(frozen=True)
class BagTable:
    """Bags of one file; bag b has the rows ``offsets[b]`` to ``offsets[b + 1]``."""

    path: Path
    features: Array  # (rows, D), a bag's rows together, in the file's order
    offsets: Indices  # (bags + 1,)
    labels: Indices  # (bags,) class numbers
    classes: tuple[float, ...]  # the file's label of each class number

    @property
    def name(self) -> str:
        """The file's name without its endings."""
        return self.path.name.lower().removesuffix(".gz").removesuffix(".csv")


def read_table(path: Path) -> BagTable:
    """The bags of a file, sorted by the bag's id.

    Raises:
        UserError: no such file, no such table, a cell that is no finite number, or one class alone.
    """
    frame = read_cells(path)
    if frame.shape[1] < 3:
        raise UserError(
            f"{path} has {frame.shape[1]} column(s)\n"
            "  a table has label, bag and one feature or more, separated by commas"
        )
    names = frame[1].str.strip()
    if not (named := names.str.len() > 0).all():
        raise UserError(f"{path} has no bag id in data row {int(named.argmin()) + 1}, column 2")
    values = frame.drop(columns=1).apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    for row, column in np.argwhere(~np.isfinite(values))[:1]:
        column += column > 0  # the bag's
        raise UserError(
            f"{path} has '{frame.iat[row, column]}' in data row {row + 1}, column {column + 1}\n"
            "  every label and feature must be a finite number: fill such cells or drop their rows"
        )
    ids, bag = np.unique(names.to_numpy(str), return_inverse=True)
    rows = values[np.argsort(bag, kind="stable")]
    offsets = np.r_[0, np.cumsum(np.bincount(bag))]
    classes, labels = np.unique(np.maximum.reduceat(rows[:, 0], offsets[:-1]), return_inverse=True)
    if len(classes) < 2:
        raise UserError(f"all {len(ids)} bags of {path} have label {classes[0]:g}; two are needed")
    return BagTable(path, rows[:, 1:], offsets, labels, tuple(classes.tolist()))


def read_cells(path: Path) -> pd.DataFrame:
    """The file's cells without its line of names; column 1 as text, the others as they look."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig") as file:
            lines = ((number, line) for number, line in enumerate(file) if line.strip())
            blank, first = next(lines, (0, ""))
        return pd.read_csv(
            path,
            header=None,
            skiprows=blank + (not is_number(first.split(",")[0].strip(' "'))),
            dtype={1: str},  # as written: 01 is not 1, and NA is a name
            keep_default_na=False,
            compression="gzip" if packed else None,
            encoding="utf-8-sig",
            low_memory=False,
        )
    except (OSError, EOFError, ValueError) as error:  # pandas' and Unicode's errors are ValueErrors
        raise UserError(f"cannot read {path} as a table: {error}") from error


def is_number(text: str) -> bool:
    """Whether it is one, as ``float`` reads it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def cut(table: BagTable, folds: int, seed: int) -> list[tuple[Indices, Indices]]:
    """(training bags, test bags) of each fold; UserError where a class has fewer bags than folds."""
    counts = np.bincount(table.labels)
    if counts.min() < folds:
        raise UserError(
            f"{table.path} has {counts.min()} bag(s) of label {table.classes[counts.argmin()]:g}, "
            f"fewer than {folds} folds\n  every fold tests bags of every class: lower --folds"
        )
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return list(splitter.split(table.labels, table.labels))


def standardise(table: BagTable, bags: Indices) -> Tensor:
    """All rows (R, D), less the mean and over the standard deviation of the rows of ``bags``."""
    bag_of_row = np.repeat(np.arange(len(table.labels)), np.diff(table.offsets))
    scaler = StandardScaler().fit(table.features[np.isin(bag_of_row, bags)])
    return torch.from_numpy(scaler.transform(table.features)).float()


def pad(table: BagTable, rows: Tensor, bags: Indices) -> tuple[Tensor, Tensor]:
    """Features (B, N, D) of ``bags`` and mask (B, N); padding repeats a bag's last row."""
    first, count = table.offsets[bags, None], np.diff(table.offsets)[bags, None]
    place = np.arange(count.max())
    chosen = torch.from_numpy(first + np.minimum(place, count - 1))
    return rows[chosen], torch.from_numpy(place < count)


def fit(table: BagTable, name: str, bags: Indices, *, seed: int) -> tuple[Head, Tensor]:
    """Head ``name`` trained on ``bags`` alone, and all rows as it wants them."""
    rows, labels = standardise(table, bags), torch.from_numpy(table.labels)
    torch.manual_seed(seed)
    options = {key: value for key, value in OPTIONS.items() if key in HEADS.options(name)}
    head = HEADS.build(name, rows.shape[1], len(table.classes), **options).train()
    optimizer = build_optimizer(head, lr=RATE, weight_decay=DECAY)
    steps, good = EPOCHS * -(-len(bags) // BATCH), torch.tensor(True)
    order = (bags[torch.randperm(len(bags)).numpy()] for _ in range(EPOCHS))
    some = (epoch[k : k + BATCH] for epoch in order for k in range(0, len(bags), BATCH))
    for step, batch in enumerate(some):
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(step, peak=RATE, warmup=0, steps=steps)
        output, target = head(*pad(table, rows, batch)), labels[batch]
        loss = cross_entropy(output.logits, target)
        extra = head.aux_loss(output, target, partial(cross_entropy, reduction="none"))
        optimizer.zero_grad()
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        head.record_bags([output], target, list)
        head.after_step(good)
    return head.eval(), rows


@torch.inference_mode()
def predict(head: Head, table: BagTable, rows: Tensor, bags: Indices) -> Array:
    """Probabilities (bags, C)."""
    batches = np.split(bags, range(BATCH, len(bags), BATCH))
    found = torch.cat([head(*pad(table, rows, batch)).logits for batch in batches])
    return found.double().softmax(dim=1).numpy()


def run_seed(table: BagTable, name: str, seed: int, *, folds: int, shuffled: bool) -> list[Figures]:
    """The figures of each fold; a function of its arguments alone, but for ``cpu_seconds``."""
    if shuffled:  # a control: nothing is left to learn
        drawn = np.random.default_rng(seed).permutation(table.labels)
        table = dataclasses.replace(table, labels=drawn)
    found = []
    for fold, (train, test) in enumerate(cut(table, folds, seed)):
        began = time.process_time()
        head, rows = fit(table, name, train, seed=1000 * seed + fold)
        spent = time.process_time() - began
        probabilities = predict(head, table, rows, test)
        if not np.isfinite(probabilities).all():
            raise UserError(f"{name} on {table.path} diverged (seed {seed}, fold {fold})")
        once = np.ones((1, len(test)))
        values = classification_metrics(probabilities, table.labels[test], once)
        if len(table.classes) > 2:
            values["auc"] = values["auc_macro_ovr"]
        found.append({key: float(values[key][0]) for key in METRICS} | {"cpu_seconds": spent})
    return found


def measure(
    tables: Sequence[BagTable], heads: Sequence[str], args: argparse.Namespace, *, shuffled: bool
) -> Iterator[dict[str, Any]]:
    """A result for each table and head, as soon as its seeds are through."""
    jobs = list(product(tables, heads, range(args.seeds)))
    run = partial(run_seed, folds=args.folds, shuffled=shuffled)
    # Fresh interpreters, because OpenMP does not survive a fork; a thread each.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, torch.set_num_threads, (1,)) as pool:
        found = pool.map(run, *zip(*jobs, strict=True))
        for table, name in product(tables, heads):
            yield describe(table, name, list(islice(found, args.seeds)))


def describe(table: BagTable, name: str, seeds: Sequence[Sequence[Figures]]) -> dict[str, Any]:
    """One JSON line of what was measured."""
    counts = np.bincount(table.labels).tolist()
    return {
        "table": table.name,
        "file": str(table.path),
        "head": name,
        "bags": {f"{label:g}": n for label, n in zip(table.classes, counts, strict=True)},
        "rows": table.features.shape[0],
        "features": table.features.shape[1],
        "folds": len(seeds[0]),
        **{key: summary([[fold[key] for fold in seed] for seed in seeds]) for key in METRICS},
        "cpu_seconds": float(np.median([fold["cpu_seconds"] for seed in seeds for fold in seed])),
    }


def summary(values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean over seeds of the mean over folds, its standard error and 95 % t interval, each seed's.

    ``values`` are (seeds, folds). A single seed has no error: those are None.
    """
    means = np.mean(values, axis=1)
    found = {"mean": float(means.mean()), "se": None, "low": None, "high": None}
    if len(means) > 1:
        error = float(means.std(ddof=1)) / len(means) ** 0.5
        half = float(stats.t.ppf(0.975, len(means) - 1)) * error
        found |= {"se": error, "low": found["mean"] - half, "high": found["mean"] + half}
    return found | {"seeds": means.tolist()}


def bench(tables: Sequence[BagTable], heads: Sequence[str], args: argparse.Namespace) -> int:
    """Every head on every table: JSON lines as they come, the file, then the table."""
    titles = ("table", "head", "accuracy", "95 %", "AUC", "balanced accuracy", "CPU s a training")
    shown, results = Table(*titles), []
    recipe = {"epochs": EPOCHS, "batch": BATCH, "lr": RATE, "weight_decay": DECAY, **OPTIONS}
    report = {"recipe": recipe, "shuffled": args.shuffle, "results": results}
    if args.json:
        write_json(args.json, report)  # at once, so that a place not writable costs no run
    for result in measure(tables, heads, args, shuffled=args.shuffle):
        print(json.dumps(result), flush=True)
        results.append(result)
        if args.json:
            write_json(args.json, report)
        low, high = result["accuracy"]["low"], result["accuracy"]["high"]
        shown.add_row(
            result["table"],
            result["head"],
            words(result["accuracy"]),
            "" if low is None else f"{low:.3f} to {high:.3f}",
            words(result["auc"]),
            words(result["balanced_accuracy"]),
            f"{result['cpu_seconds']:.2f}",
        )
    Console().print(shown)
    return 0


def words(figure: dict[str, Any]) -> str:
    """``0.900 +- 0.012``: the mean and its standard error."""
    error = "" if figure["se"] is None else f" +- {figure['se']:.3f}"
    return f"{figure['mean']:.3f}{error}"


def check(tables: Sequence[BagTable], args: argparse.Namespace) -> int:
    """Print a row a table; 1 where abmil is under what was published less its interval."""
    from check_engine import Row

    short = 0
    controls = list(measure(tables, ["abmil"], args, shuffled=True))
    real = measure(tables, ["abmil"], args, shuffled=False)
    for table, found, control in zip(tables, real, controls, strict=True):
        what = f"accuracy of abmil on {table.name}, {args.folds} folds, {args.seeds} seeds"
        measured = f"{words(found['accuracy'])} (AUC {words(found['auc'])})"
        broken = f"shuffled labels: {words(control['accuracy'])}"
        bar, good = "reported", None
        if table.name in PUBLISHED:
            published, error = PUBLISHED[table.name]
            least = published - error
            bar = f">= {published:.3f} - {error:.3f}"
            good = found["accuracy"]["mean"] >= least > control["accuracy"]["mean"]
        print(Row(what, bar, measured, broken, good), flush=True)
        short += good is False
    print(f"{short} short of the bar")
    return 1 if short else 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``heads`` are known ones, each once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--table", type=Path, nargs="+", help="files (default: the three in --data)")
    add("--data", type=Path, default=ROOT.parent / "shared/data/mil_tables", help="their folder")
    add("--folds", type=int, default=10)
    add("--seeds", type=int, default=5, help="how many times the bags are cut into folds")
    add("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    add("--json", type=Path, help="file of all results")
    add("--shuffle", action="store_true", help="labels drawn anew over the bags: a control")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--heads", default=",".join(SHOWN), help="comma-separated")
    either.add_argument("--check", action="store_true", help="abmil against what was published")
    args = parser.parse_args(argv)
    for name, least in (("folds", 2), ("seeds", 1), ("workers", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be {least} or more, found {getattr(args, name)}")
    args.heads = list(dict.fromkeys(filter(None, map(str.strip, args.heads.split(",")))))
    if not args.heads:
        raise UserError(f"--heads names none; known: {', '.join(HEADS.names())}")
    return args


def main() -> int:
    """Refuse what cannot be run, then measure or check."""
    args = parse()
    tables = [read_table(path) for path in args.table or [args.data / name for name in TABLES]]
    for table in tables:
        cut(table, args.folds, seed=0)
    if args.check:
        return check(tables, args)
    for name in args.heads:
        HEADS.factory(name)
    return bench(tables, args.heads, args)


if __name__ == "__main__":
    sys.exit(exit_code(main))
