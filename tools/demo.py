"""The whole way on drawn slides: make them, pack them, train end to end, judge on unseen slides.

  python tools/demo.py --out demo

Every step is one of the commands a user would type; each is printed. A step that is done is kept,
so a stopped demo goes on. Beside the model's figure stand three controls that must be near 0.5 or
clearly lower: labels permuted before training, the slides' mean colour, an untrained encoder.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from e2e.errors import UserError, exit_code
from e2e.files import write_json
from e2e.images.decode import build_decoder
from e2e.log import Screen, clock
from e2e.metrics.bootstrap import case_weights, confidence_interval
from e2e.metrics.values import auc
from e2e.store.lmdb import PatchStore

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
DRAWS = 1000
Running = subprocess.Popen[bytes] | None


def main() -> None:
    """Make, pack, train, judge, and train the controls."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--slides", default="64,16,48", help="train,val,test")
    parser.add_argument("--seed", type=int, default=0, help="of the slides and the training")
    args = parser.parse_args()
    out, slides, seed = args.out.resolve(), args.slides, args.seed
    started = time.monotonic()
    cohort, store = out / "cohort", out / "cohort.lmdb"
    labels, permuted = cohort / "labels.csv", out / "labels_permuted.csv"
    if not labels.is_file():
        step(
            "tools/make_toy.py",
            "--out",
            cohort,
            "--kind",
            "micro",
            "--slides",
            slides,
            "--seed",
            seed,
        )
    step(
        "tools/pack_lmdb.py",
        "--slides",
        cohort / "slides",
        "--out",
        store,
        "--mpp",
        0.5,
        "--patch-size",
        64,
    )
    permute_labels(labels, permuted, seed)
    # One thread each, side by side: on few cores two processes are faster than two threads.
    control = train(out / "control_permuted", permuted, store, seed, quiet=True)
    finish(train(out / "run", labels, store, seed))
    frozen = ("optim.train_encoder=false",)
    finish(train(out / "control_untrained", labels, store, seed, *frozen, quiet=True))
    finish(control)
    results = {
        "encoder and head trained end to end": test_auc(out / "run"),
        "control: training labels permuted": test_auc(out / "control_permuted"),
        "control: mean colour, logistic model": mean_colour_auc(labels, store),
        "control: untrained encoder, trained head": test_auc(out / "control_untrained"),
    }
    write_json(out / "demo.json", results)
    tell(args.out, results, time.monotonic() - started, slides)


def step(script: str, *arguments: object) -> None:
    """Run one of the project's commands; its failure ends the demo."""
    command = [script, *map(str, arguments)]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    finish(start([sys.executable, *command]))


def train(
    folder: Path, labels: Path, store: Path, seed: int, *overrides: str, quiet: bool = False
) -> Running:
    """Start training in ``folder`` through torchrun, or go on where it was stopped.

    Returns:
        The process; None when the run is done already. ``quiet`` writes to ``<folder>.log``.
    """
    if (folder / "metrics.json").is_file():
        return None
    asked = ["--resume", str(folder.resolve())]
    if not (folder / "settings.yaml").is_file():
        asked = ["--datasets", "toy_micro", "--model", "e2e_r18_abmilx", "-c", "configs/demo.yaml"]
        asked += [f"data.labels={labels.resolve()}", f"data.stores=[{store.resolve()}]"]
        asked += [f"run.out={folder.resolve()}", f"run.seed={seed}", *overrides]
    log = folder.with_suffix(".log") if quiet else None
    where = f" > {log}" if log else ""
    print(f"\n$ torchrun launch/train.py {shlex.join(asked)}{where}", flush=True)
    return start([str(BIN / "torchrun"), "launch/train.py", *asked], log)


def start(command: list[str], log: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a command in the repository's root, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if log is None:
        return subprocess.Popen(command, cwd=ROOT, env=environment)
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def finish(process: Running) -> None:
    """Wait for a command; UserError when it failed."""
    if process is not None and process.wait():
        command = shlex.join(map(str, process.args))  # pyright: ignore[reportArgumentType]
        raise UserError(
            f"this ended with exit code {process.returncode}: {command}\n"
            "  mend what it says (quiet ones write a .log beside their folder), then run the demo again"
        )


def permute_labels(labels: Path, out: Path, seed: int) -> None:
    """The table with the labels of the training and validation cases dealt out anew.

    Half of each true class gets either label, so that no chance correlation is left to learn; test
    slides keep theirs. What a model then scores on them can only be chance.
    """
    table = pd.read_csv(labels, dtype=str)
    words = sorted(table["label"].unique())
    rng = np.random.default_rng(seed)
    chosen = table[table["split"] != "test"]
    for _, cases in chosen.groupby(["split", "label"])["case"]:
        names = rng.permutation(np.asarray(cases.unique(), dtype=str))
        first = rng.integers(len(words))
        dealt = {name: words[(first + k) % len(words)] for k, name in enumerate(names)}
        rows = table["case"].isin(list(dealt))
        table.loc[rows, "label"] = table.loc[rows, "case"].map(dealt)
    table.to_csv(out, index=False)


def test_auc(folder: Path) -> dict[str, Any]:
    """Test AUC and confidence_interval of a run, by the weights that its validation selected."""
    report = json.loads((folder / "metrics.json").read_text())
    return report["test"][report["selected_weights"]]["auc"]


def mean_colour_auc(labels: Path, store_path: Path) -> dict[str, Any]:
    """A logistic model on each slide's mean red, green and blue over its patches."""
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


def tell(out: Path, results: dict[str, dict[str, Any]], seconds: float, slides: str) -> None:
    """The figures beside their controls, and where everything lies."""
    screen = Screen(is_leader=True)
    rows = [
        [name, f"{r['value']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}"]
        for name, r in results.items()
    ]
    title = f"test AUC on {slides.split(',')[-1]} unseen slides"
    screen.table(title, ("", "AUC", "95 % confidence_interval over cases"), rows)
    for name, place in {
        "predictions": "run/predictions.csv",
        "metrics": "run/metrics.json",
        "heatmaps": "run/heatmaps/",
        "slides": "cohort/slides/",
        "tissue and grids": "cohort_overview/",
        "these figures": "demo.json",
    }.items():
        screen.say(f"{name:17} {out / place}")
    screen.say(f"done in {clock(seconds)}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
