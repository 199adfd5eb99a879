"""Heads on tables of bags, by repeated cross-validation: accuracy, AUC, balanced accuracy, time.

  tools/bench/mil_tables.py                                  # three classic tables, eight heads
  tools/bench/mil_tables.py --table FILE.csv.gz --heads abmil,gabmil --folds 10 --seeds 5 --json OUT.json
  tools/bench/mil_tables.py --check                          # abmil against Ilse et al.; exit 1 if short

A table is a CSV file, gzipped or not, with or without a header: label, bag, then features, a row for each
instance. A bag's label is the largest of its rows'. Labels are any numbers, of two or more classes.

Protocol: every seed splits the bags into folds of its own, stratified by label; each fold is tested once
by a head trained on the others. Features are standardised by the training rows. Nothing is selected on a
test fold: the recipe is fixed beforehand and the same for every table and head (an option is set where
the head has it), and the weights are those after the last epoch. A result is the mean over seeds of the
mean over folds. Its standard error is over seeds, as in Ilse et al., and gives a 95 % t interval: both
describe other folds and initial weights on the same bags, not other bags.

The recipe is from the literature and was not searched: 100 epochs, learning rate 5e-4 and weight decay
5e-3 are those of Ilse et al. for these tables (arXiv:1802.04712), where a step is one bag and the decay
Adam's L2 term; here a step is 8 bags, for speed, the optimiser is this project's AdamW with a cosine, and
the projection is one layer of 128, the middle one of their 256-128-64.
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
from tools.bench.rows import Row, report

Indices = NDArray[np.int64]
Values = dict[str, float]

ROOT = Path(__file__).resolve().parents[2]
TABLES = ("musk1.csv.gz", "elephant.csv.gz", "ucsb_breast_cancer.csv.gz")
DEFAULT_HEADS = ("abmil", "gabmil", "abmilx", "dsmil", "clam_sb", "transmil", "mean", "max")

EPOCHS = 100
BATCH = 8
"""Bags a step."""
RATE = 5e-4
"""AdamW's learning rate, which falls to 0 along a cosine."""
DECAY = 5e-3
OPTIONS = {"embed_dim": 128, "dropout": 0.25}
"""Options of heads that have them; all others are the head's defaults."""
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
    """Return the bags of a file, sorted by their ids.

    Raises
    ------
    UserError
        The file is missing or is no table, a cell is not a finite number, or there is only one class.
    """
    frame = read_cells(path)
    if frame.shape[1] < 3:
        raise UserError(
            f"{path} has {frame.shape[1]} column(s)\n"
            "  a table has the columns label, bag and at least one feature, separated by commas"
        )
    names = frame[1].str.strip()
    if not (has_id := names.str.len() > 0).all():
        raise UserError(f"{path} has no bag id in data row {int(has_id.argmin()) + 1}, column 2")
    values = frame.drop(columns=1).apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    for row, column in np.argwhere(~np.isfinite(values))[:1]:
        column += column > 0  # skips the bag id
        raise UserError(
            f"{path} has '{frame.iat[row, column]}' in data row {row + 1}, column {column + 1}\n"
            "  every label and feature must be a finite number: fill such cells or drop their rows"
        )
    ids, bag = np.unique(names.to_numpy(str), return_inverse=True)
    rows = values[np.argsort(bag, kind="stable")]
    offsets = np.r_[0, np.cumsum(np.bincount(bag))]
    classes, labels = np.unique(np.maximum.reduceat(rows[:, 0], offsets[:-1]), return_inverse=True)
    if len(classes) < 2:
        raise UserError(
            f"all {len(ids)} bags of {path} have label {classes[0]:g}; a table needs two classes"
        )
    return BagTable(path, rows[:, 1:], offsets, labels, tuple(classes.tolist()))


def read_cells(path: Path) -> pd.DataFrame:
    """Return the file's cells without its header; column 1 as text, the types of others are inferred."""
    try:
        with path.open("rb") as file:
            is_gzipped = file.read(2) == b"\x1f\x8b"
        with (gzip.open if is_gzipped else open)(path, "rt", encoding="utf-8-sig") as file:
            lines = ((number, line) for number, line in enumerate(file) if line.strip())
            blank, first = next(lines, (0, ""))
        return pd.read_csv(
            path,
            header=None,
            skiprows=blank + (not is_number(first.split(",")[0].strip(' "'))),
            dtype={1: str},  # as written: 01 is not 1, and NA is a name
            keep_default_na=False,
            compression="gzip" if is_gzipped else None,
            encoding="utf-8-sig",
            low_memory=False,
        )
    except (OSError, EOFError, ValueError) as error:  # pandas' and Unicode's errors are ValueErrors
        raise UserError(f"cannot read {path} as a table: {error}") from error


def is_number(text: str) -> bool:
    """Return whether ``float`` can read the text."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def make_folds(table: BagTable, folds: int, seed: int) -> list[tuple[Indices, Indices]]:
    """Return (training bags, test bags) of each fold; UserError if a class has fewer bags than folds."""
    counts = np.bincount(table.labels)
    if counts.min() < folds:
        raise UserError(
            f"{table.path} has {counts.min()} bag(s) of label {table.classes[counts.argmin()]:g}, "
            f"fewer than {folds} folds\n  every fold tests bags of every class: lower --folds"
        )
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return list(splitter.split(table.labels, table.labels))


def standardise(table: BagTable, bags: Indices) -> Tensor:
    """Return all rows (R, D), standardised by mean and standard deviation of the rows of ``bags``."""
    bag_of_row = np.repeat(np.arange(len(table.labels)), np.diff(table.offsets))
    scaler = StandardScaler().fit(table.features[np.isin(bag_of_row, bags)])
    return torch.from_numpy(scaler.transform(table.features)).float()


def pad(table: BagTable, rows: Tensor, bags: Indices) -> tuple[Tensor, Tensor]:
    """Return features (B, N, D) of ``bags`` and mask (B, N); padding repeats a bag's last row."""
    first, count = table.offsets[bags, None], np.diff(table.offsets)[bags, None]
    position = np.arange(count.max())
    row_numbers = torch.from_numpy(first + np.minimum(position, count - 1))
    return rows[row_numbers], torch.from_numpy(position < count)


def fit(table: BagTable, name: str, bags: Indices, *, seed: int) -> tuple[Head, Tensor]:
    """Return head ``name`` trained on ``bags`` alone, and all rows standardised for it."""
    rows, labels = standardise(table, bags), torch.from_numpy(table.labels)
    torch.manual_seed(seed)
    options = {key: value for key, value in OPTIONS.items() if key in HEADS.options(name)}
    head = HEADS.build(name, rows.shape[1], len(table.classes), **options).train()
    optimizer = build_optimizer(head, lr=RATE, weight_decay=DECAY)
    steps, good = EPOCHS * -(-len(bags) // BATCH), torch.tensor(True)
    order = (bags[torch.randperm(len(bags)).numpy()] for _ in range(EPOCHS))
    batches = (epoch[k : k + BATCH] for epoch in order for k in range(0, len(bags), BATCH))
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(step, peak=RATE, warmup=0, steps=steps)
        output, target = head(*pad(table, rows, batch)), labels[batch]
        loss = cross_entropy(output.logits, target)
        aux_loss = head.aux_loss(output, target, partial(cross_entropy, reduction="none"))
        optimizer.zero_grad()
        (loss if aux_loss is None else loss + aux_loss).backward()
        optimizer.step()
        head.record_bags([output], target, list)
        head.after_step(good)
    return head.eval(), rows


@torch.inference_mode()
def predict(head: Head, table: BagTable, rows: Tensor, bags: Indices) -> Array:
    """Return probabilities (bags, C)."""
    batches = np.split(bags, range(BATCH, len(bags), BATCH))
    logits = torch.cat([head(*pad(table, rows, batch)).logits for batch in batches])
    return logits.double().softmax(dim=1).numpy()


def run_seed(table: BagTable, name: str, seed: int, *, folds: int, shuffled: bool) -> list[Values]:
    """Return the metrics of each fold; all but ``cpu_seconds`` depend on the arguments alone.

    Parameters
    ----------
    shuffled
        Whether to permute the labels, as a control.
    """
    if shuffled:
        drawn = np.random.default_rng(seed).permutation(table.labels)
        table = dataclasses.replace(table, labels=drawn)
    folds_metrics = []
    for fold, (train, test) in enumerate(make_folds(table, folds, seed)):
        start = time.process_time()
        head, rows = fit(table, name, train, seed=1000 * seed + fold)
        spent = time.process_time() - start
        probabilities = predict(head, table, rows, test)
        if not np.isfinite(probabilities).all():
            raise UserError(f"{name} on {table.path} diverged (seed {seed}, fold {fold})")
        unweighted = np.ones((1, len(test)))
        values = classification_metrics(probabilities, table.labels[test], unweighted)
        if len(table.classes) > 2:
            values["auc"] = values["auc_macro_ovr"]
        folds_metrics.append(
            {key: float(values[key][0]) for key in METRICS} | {"cpu_seconds": spent}
        )
    return folds_metrics


def measure(
    tables: Sequence[BagTable], heads: Sequence[str], args: argparse.Namespace, *, shuffled: bool
) -> Iterator[dict[str, Any]]:
    """Yield a result for each table and head, as soon as its seeds are done."""
    jobs = list(product(tables, heads, range(args.seeds)))
    run = partial(run_seed, folds=args.folds, shuffled=shuffled)
    # Fresh interpreters, because OpenMP does not survive a fork; a thread each.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, torch.set_num_threads, (1,)) as pool:
        results = pool.map(run, *zip(*jobs, strict=True))
        for table, name in product(tables, heads):
            yield describe(table, name, list(islice(results, args.seeds)))


def describe(table: BagTable, name: str, seeds: Sequence[Sequence[Values]]) -> dict[str, Any]:
    """Return the result of a table and head, as written in its JSON line."""
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
    """Return the mean over seeds of the mean over folds, its standard error and 95 % t interval.

    Parameters
    ----------
    values
        (seeds, folds) of a metric.

    Returns
    -------
    dict
        ``mean``, ``se``, ``low``, ``high`` and ``seeds``, the mean of each seed. A single seed has no
        standard error: ``se``, ``low`` and ``high`` are None.
    """
    means = np.mean(values, axis=1)
    result = {"mean": float(means.mean()), "se": None, "low": None, "high": None}
    if len(means) > 1:
        error = float(means.std(ddof=1)) / len(means) ** 0.5
        half = float(stats.t.ppf(0.975, len(means) - 1)) * error
        result |= {"se": error, "low": result["mean"] - half, "high": result["mean"] + half}
    return result | {"seeds": means.tolist()}


def bench(tables: Sequence[BagTable], heads: Sequence[str], args: argparse.Namespace) -> int:
    """Measure every head on every table: print JSON lines, write the file, print the table."""
    titles = ("table", "head", "accuracy", "95 %", "AUC", "balanced accuracy", "CPU s a training")
    printed, results = Table(*titles), []
    recipe = {"epochs": EPOCHS, "batch": BATCH, "lr": RATE, "weight_decay": DECAY, **OPTIONS}
    document = {"recipe": recipe, "shuffled": args.shuffle, "results": results}
    if args.json:
        write_json(args.json, document)  # now, so that an error to write it costs no training
    for result in measure(tables, heads, args, shuffled=args.shuffle):
        print(json.dumps(result), flush=True)
        results.append(result)
        if args.json:
            write_json(args.json, document)
        low, high = result["accuracy"]["low"], result["accuracy"]["high"]
        printed.add_row(
            result["table"],
            result["head"],
            mean_and_error(result["accuracy"]),
            "" if low is None else f"{low:.3f} to {high:.3f}",
            mean_and_error(result["auc"]),
            mean_and_error(result["balanced_accuracy"]),
            f"{result['cpu_seconds']:.2f}",
        )
    Console().print(printed)
    return 0


def mean_and_error(metric: dict[str, Any]) -> str:
    """``0.900 +- 0.012``: the mean and its standard error."""
    error = "" if metric["se"] is None else f" +- {metric['se']:.3f}"
    return f"{metric['mean']:.3f}{error}"


def check(tables: Sequence[BagTable], args: argparse.Namespace) -> int:
    """Print a row for each table and return the exit code: 1 where abmil is short of published results."""
    return report({"abmil": partial(rows_of_abmil, tables, args)}, None)


def rows_of_abmil(tables: Sequence[BagTable], args: argparse.Namespace) -> Iterator[Row]:
    """Accuracy of abmil against the published one less its standard error; the control is shuffled labels."""
    controls = list(measure(tables, ["abmil"], args, shuffled=True))
    results = measure(tables, ["abmil"], args, shuffled=False)
    for table, result, control in zip(tables, results, controls, strict=True):
        bar, good = "reported", None
        if table.name in PUBLISHED:
            published, error = PUBLISHED[table.name]
            bar = f">= {published:.3f} - {error:.3f}"
            good = result["accuracy"]["mean"] >= published - error > control["accuracy"]["mean"]
        yield Row(
            f"accuracy of abmil on {table.name}, {args.folds} folds, {args.seeds} seeds",
            bar,
            f"{mean_and_error(result['accuracy'])} (AUC {mean_and_error(result['auc'])})",
            f"shuffled labels: {mean_and_error(control['accuracy'])}",
            good,
        )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; ``heads`` holds each name once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--table", type=Path, nargs="+", help="files of tables (default: the three of --data)")
    add("--data", type=Path, default=ROOT.parent / "shared/data/mil_tables", help="their folder")
    add("--folds", type=int, default=10)
    add("--seeds", type=int, default=5, help="how many times the bags are split into folds")
    add("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    add("--json", type=Path, help="file of all results")
    add("--shuffle", action="store_true", help="permute the labels of the bags, as a control")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--heads", default=",".join(DEFAULT_HEADS), help="comma-separated")
    either.add_argument("--check", action="store_true", help="abmil against published results")
    args = parser.parse_args(argv)
    for name, least in (("folds", 2), ("seeds", 1), ("workers", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be {least} or more")
    args.heads = list(dict.fromkeys(filter(None, map(str.strip, args.heads.split(",")))))
    if not args.heads:
        raise UserError(f"--heads names no head\n  choose from: {', '.join(HEADS.names())}")
    return args


def main() -> int:
    """Check the tables and heads, then measure or check."""
    args = parse()
    tables = [read_table(path) for path in args.table or [args.data / name for name in TABLES]]
    for table in tables:
        make_folds(table, args.folds, seed=0)
    if args.check:
        return check(tables, args)
    for name in args.heads:
        HEADS.factory(name)
    return bench(tables, args.heads, args)


if __name__ == "__main__":
    sys.exit(exit_code(main))
