"""Does training end to end on all patches of a slide learn more? Arms paired over cases.

  python tools/study/arms.py --datasets lung_detection --out study encoder.weights=FILE
  python tools/study/arms.py --datasets mine.yaml --out study --epochs 20 --lr all=1e-4 optim.bags=4

Arms: `all` (end to end, bags of all patches of a slide), `same_steps` (end to end, bags of --bag random
patches, as many optimiser steps as `all`), `same_patches` (the same, trained on as many patches as `all`:
more steps), `frozen` (frozen encoder, all patches) and `frozen_whole` (the same with the whole encoder,
without encoder.stage). Each arm's learning rate is the candidate with the best validation AUC (then log
loss) for the first seed; the other seeds follow. No training run gets a test slide: its label table has
none, and `e2e evaluate` evaluates only the runs with the selected rates.

Every run is one of the project's commands, with its output in OUT/runs/*.log. Run the same command again
to continue after a stop: finished runs are kept. OUT/study.json and study.md are written after every seed:
test AUC of each seed, and paired differences to `all` with 95 % percentile intervals over cases.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from e2e.errors import UserError, exit_code
from e2e.files import write_atomically, write_json
from e2e.metrics.values import auc
from tools.study.base import ROOT, Arm, Study, compare_auc, plan_arms, select_rate

RATES = dict.fromkeys(("all", "same_steps", "same_patches"), (1e-4, 3e-4))
RATES |= dict.fromkeys(("frozen", "frozen_whole"), (3e-4, 1e-3))
"""Arm -> its candidate learning rates."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; ``rates`` holds the candidate learning rates of the selected arms."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--datasets", default="lung_detection", help="as for launch/train.py")
    add("--model", default="e2e_r18_abmil", help="as for launch/train.py")
    add("-c", "--config", action="append", help="YAML layers (default: configs/study.yaml)")
    add("--out", type=Path, required=True, help="folder of all runs and the tables")
    add("--arms", default=",".join(RATES), help="arms, comma-separated")
    add("--seeds", default="0,1,2", help="comma-separated; the first selects learning rates")
    add("--epochs", type=int, default=8, help="epochs of `all`")
    add("--frozen-epochs", type=int, help="epochs of the frozen arms (default: --epochs)")
    add("--bag", type=int, default=16, help="patches of a bag in the arms that sample")
    add("--lr", action="append", default=[], metavar="ARM=LR[,LR]", help="candidates of an arm")
    add("--validations", type=int, default=4, help="validations of a run, equal for all arms")
    add("--draws", type=int, default=2000, help="resamples of the cases")
    add("overrides", nargs="*", metavar="section.key=value", help="settings, for every arm")
    args = parser.parse_intermixed_args(argv)
    args.config = args.config or [str(ROOT / "configs" / "study.yaml")]
    try:
        args.seeds = [int(word) for word in args.seeds.split(",")]
        candidates = dict(word.split("=") for word in args.lr)
        rates = RATES | {k: tuple(map(float, text.split(","))) for k, text in candidates.items()}
    except ValueError as error:
        raise UserError(f"--seeds or --lr cannot be read: {error}") from error
    names = args.arms.split(",")
    if unknown := {*names, *rates} - RATES.keys():
        raise UserError(f"no arm {', '.join(sorted(unknown))}\n  choose from: {', '.join(RATES)}")
    args.rates = {name: rates[name] for name in names}
    return args


def report(
    study: Study, arms: Sequence[Arm], selected: Mapping[str, Any], seeds: Sequence[int], draws: int
) -> None:
    """Write the results after ``seeds`` to study.json and study.md, and print them."""
    tables = {a.name: [study.test(a, selected[a.name]["lr"], s) for s in seeds] for a in arms}
    slides = tables[arms[0].name][0]
    if any(not t["slide"].equals(slides["slide"]) for of_arm in tables.values() for t in of_arm):
        raise UserError("the runs do not have the same test slides\n  use another --out")
    last = study.task.output_names[-1]
    positive, cases = (slides["label"] == last).to_numpy(), slides["case"].tolist()
    scores = {k: np.stack([t[f"prob_{last}"] for t in of_arm]) for k, of_arm in tables.items()}
    means, differences = compare_auc(scores, positive, cases, draws=draws)
    rows: list[dict[str, Any]] = []
    for arm in arms:
        names = [study.folder(arm, selected[arm.name]["lr"], seed).name for seed in seeds]
        row = asdict(arm) | selected[arm.name]
        row["minutes"] = [round(study.seconds.get(name, 0.0) / 60, 2) for name in names]
        unweighted = np.ones((1, len(slides)))
        row["test_auc"] = [float(auc(s, positive, unweighted)[0]) for s in scores[arm.name]]
        row["mean_test_auc"], row["all_minus_this"] = means[arm.name], differences.get(arm.name)
        rows.append(row)
    count = {"slides": len(slides), "cases": len(set(cases)), "draws": draws}
    result = {"test": count, "seeds": list(seeds), "arms": rows}
    write_json(study.out / "study.json", result)
    write_atomically(study.out / "study.md", as_text(result).encode())
    print(f"\n{as_text(result)}", flush=True)


def as_text(result: Mapping[str, Any]) -> str:
    """Return the table as Markdown, and the metrics by which learning rates were selected."""
    span = "{value:.3f} [{low:.3f}, {high:.3f}]"
    head = "{slides} test slides of {cases} cases; 95 % intervals over {draws} resamples of cases"
    lines = [
        head.format(**result["test"]) + f"; seeds {str(result['seeds'])[1:-1]}\n",
        "| arm | bag | lr | steps | patches trained on | min a run | test AUC a seed | mean | all - this |",
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
    """Select the learning rates, train the other seeds, report after each."""
    args = parse()
    study = Study(args)
    arms = plan_arms(
        study.prepare(),
        bag=args.bag,
        bags=study.settings.optim.bags,
        epochs=args.epochs,
        frozen_epochs=args.frozen_epochs or args.epochs,
    )
    study.write_plan(arms)
    compared = [arms[name] for name in args.rates]
    selected = {a.name: select_rate(study, a, args.rates[a.name], args.seeds[0]) for a in compared}
    for done, seed in enumerate(args.seeds, start=1):
        for arm in compared:
            study.train(arm, selected[arm.name]["lr"], seed)
        report(study, compared, selected, args.seeds[:done], args.draws)


if __name__ == "__main__":
    sys.exit(exit_code(main))
