"""The demo: draw slides, pack them, train end to end and evaluate, beside three controls."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from e2e.errors import UserError, describe_interrupt
from e2e.files import create_folder, read_json, write_json
from e2e.images.decode import build_decoder
from e2e.log import Screen, clock
from e2e.metrics.bootstrap import case_weights, confidence_interval
from e2e.metrics.values import auc
from e2e.runs.many import is_done, start_or_resume
from e2e.runs.processes import Children, Process, command_line
from e2e.settings.data_cli import demo_parser
from e2e.store.lmdb import PatchStore
from e2e.toy.cohort import parse_slides

DRAWS = 1000
"""Resamples of the cases for the interval of the mean-colour control."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``e2e demo`` and return its exit code."""
    args = demo_parser().parse(argv)
    parse_slides(args.slides)
    create_folder(args.out)
    started = time.monotonic()
    with describe_interrupt(
        lambda: f"interrupted; finished steps are in {args.out}; the same command continues"
    ):
        results = run_demo(args.out.resolve(), args.slides, args.seed)
    print_results(args.out, results, time.monotonic() - started, args.slides)
    return 0


def run_demo(out: Path, slides: str, seed: int) -> dict[str, dict[str, Any]]:
    """Draw, pack, train and evaluate, with the controls.

    Parameters
    ----------
    out : Path
        Folder of everything.
    slides : str
        Number of slides in train, val and test, separated by commas.
    seed : int
        Random seed of the slides and of the training.

    Returns
    -------
    dict
        Name of the model or control -> test AUC with its interval.

    Raises
    ------
    UserError
        A step failed.
    """
    children = Children()
    cohort, store = out / "cohort", out / "cohort.lmdb"
    labels, permuted = cohort / "labels.csv", out / "labels_permuted.csv"
    if not labels.is_file():
        options = ["--out", cohort, "--kind", "micro", "--slides", slides, "--seed", seed]
        run_step(children, "python -m e2e.toy", [sys.executable, "-m", "e2e.toy"], options)
    options = ["--slides", cohort / "slides", "--out", store, "--mpp", 0.5, "--patch-size", 64]
    run_step(children, "e2e pack", command_line("pack", []), options)
    permute_labels(labels, permuted, seed)
    # One thread each, side by side: on few cores two processes are faster than two threads.
    control = start_training(children, out / "control_permuted", permuted, store, seed, quiet=True)
    wait_for(children, start_training(children, out / "run", labels, store, seed))
    frozen = "optim.train_encoder=false"
    untrained = out / "control_untrained"
    wait_for(children, start_training(children, untrained, labels, store, seed, frozen, quiet=True))
    wait_for(children, control)
    results = {
        "encoder and head trained end to end": read_test_auc(out / "run"),
        "control: training labels permuted": read_test_auc(out / "control_permuted"),
        "control: mean colour, logistic model": mean_colour_auc(labels, store),
        "control: untrained encoder, trained head": read_test_auc(untrained),
    }
    write_json(out / "demo.json", results)
    return results


def run_step(
    children: Children, shown: str, command: Sequence[str], options: Sequence[object]
) -> None:
    """Print a command as a user would type it, and run it to its end."""
    words = [str(option) for option in options]
    print(f"\n$ {shown} {shlex.join(words)}", flush=True)
    wait_for(children, start(children, [*command, *words]))


def start_training(
    children: Children,
    folder: Path,
    labels: Path,
    store: Path,
    seed: int,
    *overrides: str,
    quiet: bool = False,
) -> Process | None:
    """Start a training in ``folder``, or resume it where it was stopped.

    Returns
    -------
    Process or None
        None if the run is done already. With ``quiet`` its output goes to ``<folder>.log``.
    """
    if is_done(folder):
        return None
    words = ["--datasets", "toy_micro", "--model", "e2e_r18_abmilx", "-c", "configs/demo.yaml"]
    words += [f"data.labels={labels}", f"data.stores=[{store}]", f"run.seed={seed}", *overrides]
    words = start_or_resume(words, folder)
    log = folder.with_suffix(".log") if quiet else None
    redirection = f" > {log}" if log else ""
    print(f"\n$ e2e train {shlex.join(words)}{redirection}", flush=True)
    return start(children, command_line("train", words), log)


def start(children: Children, command: Sequence[str], log: Path | None = None) -> Process:
    """Start a command with one thread; its output is appended to ``log``, if there is one."""
    changes = {"OMP_NUM_THREADS": "1"}
    if log is None:
        return children.start(command, changes=changes)
    with log.open("ab") as file:
        return children.start(command, file, changes)


def wait_for(children: Children, process: Process | None) -> None:
    """Wait for a command; raise UserError if it failed."""
    if process is None:
        return
    children.wait(process.wait)
    if process.returncode:
        command = shlex.join(map(str, process.args))  # pyright: ignore[reportArgumentType]
        raise UserError(
            f"exit code {process.returncode} of: {command}\n"
            "  fix what it reports (the output of a control is in a .log beside its folder), then run the"
            " demo again"
        )


def permute_labels(labels: Path, out: Path, seed: int) -> None:
    """Write the table with permuted labels of the training and validation cases.

    Half of each true class gets either label, so that no chance correlation is left to learn. Test slides
    keep their labels; the score of a model on them can only be chance.
    """
    table = pd.read_csv(labels, dtype=str)
    words = sorted(table["label"].unique())
    rng = np.random.default_rng(seed)
    not_test = table[table["split"] != "test"]
    for _, cases in not_test.groupby(["split", "label"])["case"]:
        names = rng.permutation(np.asarray(cases.unique(), dtype=str))
        first = rng.integers(len(words))
        dealt = {name: words[(first + k) % len(words)] for k, name in enumerate(names)}
        rows = table["case"].isin(list(dealt))
        table.loc[rows, "label"] = table.loc[rows, "case"].map(dealt)
    table.to_csv(out, index=False)


def read_test_auc(folder: Path) -> dict[str, Any]:
    """Return test AUC and interval of a run, of the weights selected on validation."""
    report = read_json(folder / "metrics.json")
    return report["test"][report["selected_weights"]]["auc"]


def mean_colour_auc(labels: Path, store_path: Path) -> dict[str, Any]:
    """Return the test AUC of a logistic model on the mean colour of each slide."""
    store, decoder = PatchStore(store_path), build_decoder()
    table = pd.read_csv(labels, dtype=str)
    table = table[[slide in store for slide in table["slide"]]]
    colours = np.stack(
        [
            decoder.decode(store.read(s, range(store.num_patches(s))))
            .double()
            .mean((0, 2, 3))
            .numpy()
            for s in table["slide"]
        ]
    )
    anomaly, test = (table["label"] == "anomaly").to_numpy(), (table["split"] == "test").to_numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(
        colours[~test], anomaly[~test]
    )
    scores = model.predict_proba(colours[test])[:, 1]
    weights = case_weights(table["case"][test].tolist(), DRAWS, seed=0)
    return dict(confidence_interval(auc(scores, anomaly[test], weights)))


def print_results(
    out: Path, results: dict[str, dict[str, Any]], seconds: float, slides: str
) -> None:
    """Print the results beside their controls, and where everything is."""
    screen = Screen(is_leader=True)
    rows = [
        [name, f"{r['value']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}"]
        for name, r in results.items()
    ]
    title = f"test AUC on {slides.split(',')[-1]} held-out slides"
    screen.table(title, ("", "AUC", "95 % interval over cases"), rows)
    for name, path in {
        "predictions": "run/predictions.csv",
        "metrics": "run/metrics.json",
        "heatmaps": "run/heatmaps/",
        "slides": "cohort/slides/",
        "tissue and grids": "cohort_overview/",
        "these results": "demo.json",
    }.items():
        screen.say(f"{name:17} {out / path}")
    screen.say(f"done in {clock(seconds)}")
