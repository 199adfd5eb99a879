"""Cross-validation: a run for each fold and seed, and one table of what they say together.

  python launch/crossval.py --datasets brca --model e2e_r18_abmilx --folds 5 --out cv
  python launch/crossval.py --datasets brca --model abmil --seeds 0,1,2 --gpus 0,1,2,3 --out cv \\
      data.split_file=splits/splits.csv
  python launch/crossval.py ... --gpus 0+1,2+3         two runs at a time, each on two GPUs

Each run is what launch/train.py would do, in OUT/runs/fold_<k>_seed_<s>. Give the same command again
to go on after a stop: what is done stays, what was stopped resumes. More --seeds, or folds once
kept out by --only, may follow. OUT/results.csv has every metric of every run; results.md, .tex and .json
mean, standard deviation, and the metric of all test slides together with its interval over cases.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.errors import UserError, exit_code
from e2e.runs import crossval
from e2e.runs.parts import REGISTRIES
from e2e.settings.cli import common_settings, many_runs_parser


def parse() -> argparse.Namespace:
    """The command line: that of launch/train.py, and what a cross-validation needs."""
    parser = many_runs_parser(__doc__ or "")
    add = parser.add_argument
    add("--folds", type=int, help="cut so many folds; without it: those of data.split_file")
    add("--only", default="", help="folds to run, comma-separated (all)")
    add("--seeds", default="", help="comma-separated (run.seed)")
    add("--gpus", default="", help="a run at a time on each of 0,1,2,3; or on several: 0+1,2+3")
    add("--at-once", type=int, default=1, help="without --gpus: so many runs at a time")
    args = parser.parse_intermixed_args()
    try:
        args.seeds = [int(word) for word in args.seeds.split(",")] if args.seeds else []
    except ValueError as error:
        raise UserError(f"--seeds cannot be read: {error}") from error
    if args.at_once < 1:
        raise UserError(f"--at-once must be at least 1, found {args.at_once}")
    return args


def main() -> None:
    """Plan, train, report."""
    args = parse()
    settings, command = common_settings(args, REGISTRIES)
    plan = crossval.make_plan(
        settings,
        command,
        out=args.out,
        num_folds=args.folds,
        only=[word for word in args.only.split(",") if word],
        seeds=args.seeds or [settings.run.seed],
    )
    plan.write()
    slots = [word.replace("+", ",") for word in args.gpus.split(",") if word]
    crossval.train_trials(plan, slots or [""] * args.at_once, print)
    print(crossval.write_results(plan, draws=settings.run.bootstrap))


if __name__ == "__main__":
    sys.exit(exit_code(main))
