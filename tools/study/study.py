"""Does training end to end on all patches of a slide learn more? Arms paired over cases.

  python tools/study/study.py --datasets lung_detection --out study encoder.weights=FILE
  python tools/study/study.py --datasets mine.yaml --out study --epochs 20 --lr all=1e-4 optim.bags=4

Arms: `all` (end to end, all patches of a slide a bag), `same_steps` (end to end, --bag random
patches, as many optimiser steps as `all`), `same_patches` (the same, as many patches seen as `all`:
more steps), `frozen` (the encoder as it is, all patches) and `frozen_whole` (the same without
encoder.stage: where the others end early, the whole network). Each arm's learning rate is the one
of its candidates with the best validation AUC (among equals: log loss) for the first seed; then
come the other seeds. No training run sees a test slide: the table they get holds none, and
launch/evaluate.py judges only the runs with the chosen rates.

Every run is one of the commands a user would type, with its output in OUT/runs/*.log. Run it again
to go on after a stop: finished runs are kept. OUT/study.json and study.md are written after every
seed: test AUC a seed, and the paired differences to `all` with 95 % percentile intervals over cases.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd

from e2e.cohort.load import load_cohort
from e2e.errors import UserError, exit_code
from e2e.files import write_atomically, write_json
from e2e.metrics.bootstrap import case_weights, confidence_interval
from e2e.metrics.values import Array, auc
from e2e.runs.cohort import cohort_spec
from e2e.runs.many import is_done, run_command, start_or_resume
from e2e.runs.parts import REGISTRIES, build_task
from e2e.settings.layers import load_settings

ROOT = Path(__file__).resolve().parents[2]
RATES = dict.fromkeys(("all", "same_steps", "same_patches"), (1e-4, 3e-4))
RATES |= dict.fromkeys(("frozen", "frozen_whole"), (3e-4, 1e-3))
"""Arm -> learning rates it chooses from."""


@dataclass(frozen=True)
class Arm:
    """One way to train, and what it costs."""

    name: str
    bag: int | None  # patches a bag in training; None for all
    train_encoder: bool
    epochs: int
    steps: int  # optimiser steps in all
    patches: int  # seen in all, counted each time
    whole: bool = False  # the whole network, whatever encoder.stage says

    def settings(self) -> list[str]:
        """What sets this arm apart on the command line."""
        train = str(self.train_encoder).lower()
        asked = [f"bag.patches={self.bag or 'null'}", f"optim.epochs={self.epochs}"]
        return [*asked, f"optim.train_encoder={train}", *["encoder.stage=null"] * self.whole]


def plan(
    counts: Sequence[int], *, bag: int, bags: int, epochs: int, frozen_epochs: int
) -> dict[str, Arm]:
    """The arms; ``counts`` are the patches of each training slide, ``bags`` slides an update."""
    every, drawn = sum(counts), sum(min(n, bag) for n in counts)
    updates = -(-len(counts) // bags)

    def arm(name: str, size: int | None, train: bool, passes: int, whole: bool = False) -> Arm:
        seen = every if size is None else drawn
        return Arm(name, size, train, passes, passes * updates, passes * seen, whole)

    arms = [
        arm("all", None, True, epochs),
        arm("same_steps", bag, True, epochs),
        arm("same_patches", bag, True, max(1, round(epochs * every / drawn))),
        arm("frozen", None, False, frozen_epochs),
        arm("frozen_whole", None, False, frozen_epochs, whole=True),
    ]
    return {a.name: a for a in arms}


def paired(
    scores: Mapping[str, Array], positive: np.ndarray, cases: Sequence[str], *, draws: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """AUC of each arm, meaned over seeds, and how much higher that of ``all`` is, with intervals.

    ``scores`` are (seeds, n) of the same n slides for each arm, ``positive`` is (n,) bool. A case is
    drawn with all its slides; a resample is the same for all arms and seeds.
    """
    weights = case_weights(cases, draws, seed=0)
    means = {k: np.mean([auc(s, positive, weights) for s in rows], 0) for k, rows in scores.items()}
    others = means.keys() - {"all"} if "all" in means else set()
    differences = {name: dict(confidence_interval(means["all"] - means[name])) for name in others}
    return {name: dict(confidence_interval(values)) for name, values in means.items()}, differences


class Study:
    """The runs of a study in one folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out: Path = args.out.resolve()
        (self.out / "runs").mkdir(parents=True, exist_ok=True)
        self.validations: int = args.validations
        self.command = ["--datasets", args.datasets, "--model", args.model]
        self.command += [word for path in args.config for word in ("-c", path)] + args.overrides
        given = {"files": args.config, "overrides": args.overrides, "registries": REGISTRIES}
        self.settings = load_settings(datasets=args.datasets, model=args.model, **given)
        self.task = build_task(self.settings.task)
        times = self.out / "times.json"
        self.seconds = json.loads(times.read_text()) if times.is_file() else {}

    def prepare(self) -> list[int]:
        """Cut the label table into that of training and of test; patches of each training slide."""
        data = self.settings.data
        if data.columns.split is None or len(self.task.output_names) != 2:
            raise UserError("a study needs a cohort of two classes with a split column")
        items, _ = load_cohort(cohort_spec(data, name="study"), self.task)
        table = pd.read_csv(data.labels, sep=None, engine="python", dtype=str)
        tests = [word for word, split in data.splits.items() if split == "test"]
        rest = table[~table[data.columns.split].isin(tests)]
        # One slide of each other split goes with those of test: a cohort without is refused.
        some = pd.concat([rest.groupby(data.columns.split).head(1), table.drop(rest.index)])
        for name, rows in (("without_test", rest), ("test", some)):
            write_atomically(self.out / f"labels_{name}.csv", rows.to_csv(index=False).encode())
        return [item.record.num_patches for item in items if item.slide.split == "train"]

    def keep_to(self, arms: Mapping[str, Arm]) -> None:
        """Runs of another plan or other settings in this folder are no part of this study."""
        file, asked = self.out / "plan.json", {k: asdict(arm) for k, arm in arms.items()}
        asked |= {"command": self.command, "validations": self.validations}
        if file.is_file() and json.loads(file.read_text()) != asked:
            raise UserError(f"{file} is another plan than this command's\n  choose another --out")
        write_json(file, asked)

    def train(self, arm: Arm, lr: float, seed: int) -> dict[str, float]:
        """Train a run, or go on with it; its metrics on validation."""
        folder = self.folder(arm, lr, seed)
        if not is_done(folder):
            asked = [*self.command, *arm.settings(), f"optim.lr={lr:g}", f"run.seed={seed}"]
            asked += [f"data.labels={self.out}/labels_without_test.csv"]
            asked += ["data.unmatched=drop"]  # the test slides of the store
            asked += [f"select.every={-(-arm.epochs // self.validations)}"]
            self.step("train", start_or_resume(asked, folder), folder.name)
        report = json.loads((folder / "metrics.json").read_text())
        return {
            k: report["val"][report["selected_weights"]][k]["value"] for k in ("auc", "log_loss")
        }

    def test(self, arm: Arm, lr: float, seed: int) -> Any:
        """What a run predicts for the test slides, in their order."""
        folder = self.folder(arm, lr, seed)
        if not is_done(folder / "test"):
            asked = [str(folder), "--out", str(folder / "test")]
            asked += [f"data.labels={self.out}/labels_test.csv"]
            self.step("evaluate", asked, f"{folder.name}_test")
        table = pd.read_csv(folder / "test" / "predictions.csv", dtype={"case": str, "slide": str})
        return table[table["split"] == "test"].reset_index(drop=True)

    def folder(self, arm: Arm, lr: float, seed: int) -> Path:
        """Where a run lives."""
        return self.out / "runs" / f"{arm.name}_lr{lr:g}_seed{seed}"

    def step(self, command: str, arguments: list[str], name: str) -> None:
        """Run one of the project's commands, time it; its failure ends the study."""
        log = self.out / "runs" / f"{name}.log"
        print(f"{time.strftime('%H:%M:%S')}  e2e {command} {name}", flush=True)
        started = time.monotonic()
        code = run_command(command, arguments, log)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
        write_json(self.out / "times.json", self.seconds)
        if code:
            raise UserError(
                f"e2e {command} ended with exit code {code}; {log} says why\n"
                "  mend it, then run the study again: it goes on from here"
            )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``rates`` holds the candidates of the chosen arms."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--datasets", default="lung_detection", help="as for launch/train.py")
    add("--model", default="e2e_r18_abmil", help="as for launch/train.py")
    add("-c", "--config", action="append", help="YAML layers (default: configs/study.yaml)")
    add("--out", type=Path, required=True, help="folder of all runs and the tables")
    add("--arms", default=",".join(RATES), help="which arms, comma-separated")
    add("--seeds", default="0,1,2", help="comma-separated; the first chooses the learning rates")
    add("--epochs", type=int, default=8, help="of `all`")
    add("--frozen-epochs", type=int, help="of the frozen arms (default: --epochs)")
    add("--bag", type=int, default=16, help="random patches a bag of the sampling arms")
    add("--lr", action="append", default=[], metavar="ARM=LR[,LR]", help="an arm's candidates")
    add("--validations", type=int, default=4, help="of a run: every arm can pick an epoch as often")
    add("--draws", type=int, default=2000, help="resamples of the cases")
    add("overrides", nargs="*", metavar="section.key=value", help="settings, for every arm")
    args = parser.parse_intermixed_args(argv)
    args.config = args.config or [str(ROOT / "configs" / "study.yaml")]
    try:
        args.seeds = [int(word) for word in args.seeds.split(",")]
        given = dict(word.split("=") for word in args.lr)
        rates = RATES | {k: tuple(map(float, text.split(","))) for k, text in given.items()}
    except ValueError as error:
        raise UserError(f"--seeds or --lr cannot be read: {error}") from error
    names = args.arms.split(",")
    if unknown := {*names, *rates} - RATES.keys():
        raise UserError(f"no arm {', '.join(sorted(unknown))}\n  there are: {', '.join(RATES)}")
    args.rates = {name: rates[name] for name in names}
    return args


def choose(study: Study, arm: Arm, rates: Sequence[float], seed: int) -> dict[str, Any]:
    """The candidate with the best validation AUC (among equals: log loss), and what all had."""
    found = {lr: study.train(arm, lr, seed) for lr in rates}
    best = max(rates, key=lambda lr: (found[lr]["auc"], -found[lr]["log_loss"]))
    return {"lr": best, "validation": {f"{lr:g}": values for lr, values in found.items()}}


def report(
    study: Study, arms: Sequence[Arm], chosen: Mapping[str, Any], seeds: Sequence[int], draws: int
) -> None:
    """What is known after ``seeds``: written to study.json and study.md, and printed."""
    tables = {a.name: [study.test(a, chosen[a.name]["lr"], s) for s in seeds] for a in arms}
    slides = tables[arms[0].name][0]
    if any(not t["slide"].equals(slides["slide"]) for found in tables.values() for t in found):
        raise UserError("the runs do not have the same test slides; use another --out")
    last = study.task.output_names[-1]
    positive, cases = (slides["label"] == last).to_numpy(), slides["case"].tolist()
    scores = {k: np.stack([t[f"prob_{last}"] for t in found]) for k, found in tables.items()}
    means, differences = paired(scores, positive, cases, draws=draws)
    rows: list[dict[str, Any]] = []
    for arm in arms:
        names = [study.folder(arm, chosen[arm.name]["lr"], seed).name for seed in seeds]
        row = asdict(arm) | chosen[arm.name]
        row["minutes"] = [round(study.seconds.get(name, 0.0) / 60, 2) for name in names]
        once = np.ones((1, len(slides)))
        row["test_auc"] = [float(auc(s, positive, once)[0]) for s in scores[arm.name]]
        row["mean_test_auc"], row["all_minus_this"] = means[arm.name], differences.get(arm.name)
        rows.append(row)
    count = {"slides": len(slides), "cases": len(set(cases)), "draws": draws}
    result = {"test": count, "seeds": list(seeds), "arms": rows}
    write_json(study.out / "study.json", result)
    write_atomically(study.out / "study.md", as_text(result).encode())
    print(f"\n{as_text(result)}", flush=True)


def as_text(result: Mapping[str, Any]) -> str:
    """The table as Markdown, and how each learning rate was chosen."""
    span = "{value:.3f} [{low:.3f}, {high:.3f}]"
    head = "{slides} test slides of {cases} cases; 95 % intervals over {draws} resamples of cases"
    lines = [
        head.format(**result["test"]) + f"; seeds {str(result['seeds'])[1:-1]}\n",
        "| arm | bag | lr | steps | patches seen | min a run | test AUC a seed | mean | all - this |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in result["arms"]:
        other, each = arm["all_minus_this"], ", ".join(f"{value:.3f}" for value in arm["test_auc"])
        lines.append(
            f"| {arm['name']} | {arm['bag'] or 'all'} | {arm['lr']:g} | {arm['steps']} "
            f"| {arm['patches']:,} | {np.mean(arm['minutes']):.1f} | {each} "
            f"| {span.format(**arm['mean_test_auc'])} | {span.format(**other) if other else ''} |"
        )
    lines += ["", "Learning rates by validation AUC (log loss), first seed:"]
    for arm in result["arms"]:
        tried = arm["validation"].items()
        words = [f"{lr}: {v['auc']:.3f} ({v['log_loss']:.3f})" for lr, v in tried]
        lines.append(f"  {arm['name']}: {'; '.join(words)}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Choose the learning rates, train the other seeds, report after each."""
    args = parse()
    study = Study(args)
    arms = plan(
        study.prepare(),
        bag=args.bag,
        bags=study.settings.optim.bags,
        epochs=args.epochs,
        frozen_epochs=args.frozen_epochs or args.epochs,
    )
    study.keep_to(arms)
    wanted = [arms[name] for name in args.rates]
    chosen = {a.name: choose(study, a, args.rates[a.name], args.seeds[0]) for a in wanted}
    for done, seed in enumerate(args.seeds, start=1):
        for arm in wanted:
            study.train(arm, chosen[arm.name]["lr"], seed)
        report(study, wanted, chosen, args.seeds[:done], args.draws)


if __name__ == "__main__":
    sys.exit(exit_code(main))
