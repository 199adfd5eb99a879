"""A study: arms of training in one folder, each a run of the project's commands, compared over cases."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from e2e.cohort.load import load_cohort
from e2e.errors import UserError
from e2e.files import write_atomically, write_json
from e2e.metrics.bootstrap import case_weights, confidence_interval
from e2e.metrics.values import Array, auc
from e2e.runs.cohort import cohort_spec
from e2e.runs.many import is_done, run_command, start_or_resume, write_plan
from e2e.runs.parts import REGISTRIES, build_task
from e2e.settings.layers import load_settings

ROOT = Path(__file__).resolve().parents[2]
PEAK_MEMORY = Path(__file__).with_name("peak_memory.py")


@dataclass(frozen=True)
class Arm:
    """One way to train, and what it costs."""

    name: str
    bag: int | None
    """Patches of a bag in training; None for all."""
    train_encoder: bool
    epochs: int
    steps: int
    """Optimiser steps in all."""
    patches: int
    """Patches trained on in all, counted each time."""
    full_encoder: bool = False
    """Whether to use the whole encoder, whatever encoder.stage says."""

    def settings(self) -> list[str]:
        """Return the settings of this arm, as on the command line."""
        train = str(self.train_encoder).lower()
        arguments = [f"bag.patches={self.bag or 'null'}", f"optim.epochs={self.epochs}"]
        return [
            *arguments,
            f"optim.train_encoder={train}",
            *["encoder.stage=null"] * self.full_encoder,
        ]


def plan_arms(
    counts: Sequence[int], *, bag: int, bags: int, epochs: int, frozen_epochs: int
) -> dict[str, Arm]:
    """Return the arms by name.

    Parameters
    ----------
    counts
        Patches of each training slide.
    bag
        Patches of a bag in the arms that sample.
    bags
        Slides of an update.
    epochs
        Epochs of ``all``.
    frozen_epochs
        Epochs of the frozen arms.
    """
    every, drawn = sum(counts), sum(min(n, bag) for n in counts)
    updates = -(-len(counts) // bags)

    def arm(name: str, size: int | None, train: bool, passes: int, full: bool = False) -> Arm:
        per_epoch = every if size is None else drawn
        return Arm(name, size, train, passes, passes * updates, passes * per_epoch, full)

    arms = [
        arm("all", None, True, epochs),
        arm("same_steps", bag, True, epochs),
        arm("same_patches", bag, True, max(1, round(epochs * every / drawn))),
        arm("frozen", None, False, frozen_epochs),
        arm("frozen_whole", None, False, frozen_epochs, full=True),
    ]
    return {a.name: a for a in arms}


def compare_auc(
    scores: Mapping[str, Array], positive: np.ndarray, cases: Sequence[str], *, draws: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the mean AUC of each arm over seeds, and ``all`` minus each other arm, with intervals.

    A case is drawn with all its slides; a resample is the same for all arms and seeds.

    Parameters
    ----------
    scores
        Arm -> (seeds, n) scores of the same n slides.
    positive
        (n,) bool.
    cases
        Case of each slide.
    draws
        Resamples of the cases.
    """
    weights = case_weights(cases, draws, seed=0)
    means = {k: np.mean([auc(s, positive, weights) for s in rows], 0) for k, rows in scores.items()}
    others = means.keys() - {"all"} if "all" in means else set()
    differences = {name: dict(confidence_interval(means["all"] - means[name])) for name in others}
    return {name: dict(confidence_interval(values)) for name, values in means.items()}, differences


class Study:
    """The runs of a study in one folder.

    Parameters
    ----------
    args
        The command line: ``out``, ``datasets``, ``model``, ``config``, ``overrides``, ``validations``.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.out: Path = args.out.resolve()
        (self.out / "runs").mkdir(parents=True, exist_ok=True)
        self.validations: int = args.validations
        self.command = ["--datasets", args.datasets, "--model", args.model]
        self.command += [word for path in args.config for word in ("-c", path)] + args.overrides
        self.settings = load_settings(
            datasets=args.datasets,
            model=args.model,
            files=args.config,
            overrides=args.overrides,
            registries=REGISTRIES,
        )
        self.task = build_task(self.settings.task)
        self.seconds = _read_numbers(self.out / "times.json")
        self.memory = _read_numbers(self.out / "memory.json")  # MiB

    def prepare(self) -> list[int]:
        """Write label tables of training and of test; return the patches of each training slide."""
        data = self.settings.data
        if data.columns.split is None or len(self.task.output_names) != 2:
            raise UserError(
                "a study needs a cohort of two classes with a split column\n"
                "  set task.classes and data.columns.split"
            )
        items, _ = load_cohort(cohort_spec(data, name="study"), self.task)
        table = pd.read_csv(data.labels, sep=None, engine="python", dtype=str)
        tests = [word for word, split in data.splits.items() if split == "test"]
        rest = table[~table[data.columns.split].isin(tests)]
        # A cohort needs every split, so one slide of each other split goes with those of test.
        test_table = pd.concat([rest.groupby(data.columns.split).head(1), table.drop(rest.index)])
        for name, rows in (("without_test", rest), ("test", test_table)):
            write_atomically(self.out / f"labels_{name}.csv", rows.to_csv(index=False).encode())
        return [item.record.num_patches for item in items if item.slide.split == "train"]

    def write_plan(self, arms: Mapping[str, Arm]) -> None:
        """Write the plan into the folder; UserError where it holds the runs of another study."""
        plan = {name: asdict(arm) for name, arm in arms.items()}
        plan |= {"command": self.command, "validations": self.validations}
        write_plan(self.out / "plan.json", plan, "study")

    def train(self, arm: Arm, lr: float, seed: int) -> dict[str, float]:
        """Train a run, or resume it, and return its metrics on validation."""
        folder = self.folder(arm, lr, seed)
        if not is_done(folder):
            arguments = [*self.command, *arm.settings(), f"optim.lr={lr:g}", f"run.seed={seed}"]
            arguments += [f"data.labels={self.out}/labels_without_test.csv"]
            arguments += ["data.unmatched=drop"]  # the test slides of the store
            arguments += [f"select.every={-(-arm.epochs // self.validations)}"]
            self.run("train", start_or_resume(arguments, folder), folder.name)
        report = json.loads((folder / "metrics.json").read_text())
        return {
            k: report["val"][report["selected_weights"]][k]["value"] for k in ("auc", "log_loss")
        }

    def test(self, arm: Arm, lr: float, seed: int) -> Any:
        """Evaluate a run, if it was not, and return its predictions of the test slides."""
        folder = self.folder(arm, lr, seed)
        if not is_done(folder / "test"):
            arguments = [str(folder), "--out", str(folder / "test")]
            arguments += [f"data.labels={self.out}/labels_test.csv"]
            self.run("evaluate", arguments, f"{folder.name}_test")
        table = pd.read_csv(folder / "test" / "predictions.csv", dtype={"case": str, "slide": str})
        return table[table["split"] == "test"].reset_index(drop=True)

    def folder(self, arm: Arm, lr: float, seed: int) -> Path:
        """Return the folder of a run."""
        return self.out / "runs" / f"{arm.name}_lr{lr:g}_seed{seed}"

    def run(self, command: str, arguments: list[str], name: str) -> None:
        """Run one of the project's commands and record its seconds and peak memory.

        Raises
        ------
        UserError
            The command failed.
        """
        log = self.out / "runs" / f"{name}.log"
        print(f"{time.strftime('%H:%M:%S')}  e2e {command} {name}", flush=True)
        start, peak_file = time.monotonic(), self.out / "peak_kib.txt"
        peak_file.unlink(missing_ok=True)
        wrapper = [sys.executable, "-I", "-S", str(PEAK_MEMORY), str(peak_file)]
        code = run_command(command, arguments, log, wrapper=wrapper)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
        peak = int(peak_file.read_text()) / 1024 if peak_file.is_file() else 0.0
        self.memory[name] = max(self.memory.get(name, 0.0), peak)
        write_json(self.out / "times.json", self.seconds)
        write_json(self.out / "memory.json", self.memory)
        if code:
            raise UserError(
                f"e2e {command} ended with exit code {code}; see {log}\n"
                "  fix the cause, then run the same command again: finished runs are kept"
            )


def _read_numbers(file: Path) -> dict[str, float]:
    return json.loads(file.read_text()) if file.is_file() else {}


def select_rate(study: Study, arm: Arm, rates: Sequence[float], seed: int) -> dict[str, Any]:
    """Return the learning rate with the best validation AUC (then log loss), and the metrics of all."""
    metrics = {lr: study.train(arm, lr, seed) for lr in rates}
    best = max(rates, key=lambda lr: (metrics[lr]["auc"], -metrics[lr]["log_loss"]))
    return {"lr": best, "validation": {f"{lr:g}": values for lr, values in metrics.items()}}
