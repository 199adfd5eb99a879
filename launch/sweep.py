"""Search settings with Optuna; every trial is a run, and validation alone decides.

  python launch/sweep.py --datasets panda --model e2e_r18_abmilx --space space.yaml --trials 30 --out sweep

space.yaml names settings and their ranges:

  optim.lr: {low: 1.0e-5, high: 1.0e-3, log: true}
  optim.bags: {low: 4, high: 16, step: 4}
  head.attn_dim: [64, 128, 256]

Give the same command again to go on after a stop, or with more --trials. OUT/trials.csv has every trial,
OUT/best.json the best one. Weights & Biases sweeps drive launch/train.py itself: configs/sweeps/wandb.yaml.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.errors import UserError, exit_code
from e2e.runs import sweep
from e2e.runs.parts import REGISTRIES, build_task
from e2e.settings.cli import common_settings, many_runs_parser


def main() -> None:
    """Parse, check, search."""
    parser = many_runs_parser(__doc__ or "")
    add = parser.add_argument
    add("--space", type=Path, required=True, help="YAML of settings and their ranges")
    add("--trials", type=int, default=20, help="in all")
    add("--metric", default="", help="of validation (default: the one that selects the epoch)")
    add("--seed", type=int, default=0, help="of the search")
    args = parser.parse_intermixed_args()
    if args.trials < 1:
        raise UserError(f"--trials must be at least 1, found {args.trials}")
    settings, command = common_settings(args, REGISTRIES)
    if settings.run.protocol != "honest":
        raise UserError(
            f"run.protocol={settings.run.protocol} chooses on the test, a search on validation alone\n"
            "  leave it out"
        )
    best = sweep.search(
        command,
        sweep.read_space(args.space),
        out=args.out,
        trials=args.trials,
        metric=args.metric or build_task(settings.task).monitor,
        seed=args.seed,
        report=print,
    )
    print(f"best: {best['metric']} {best['value']:.4f} on validation, {best['run']}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
