"""Repeat the evaluation of a run: its best epoch on its validation and test slides.

  python launch/evaluate.py runs/panda_e2e_r18_abmilx
  torchrun --nproc-per-node 2 launch/evaluate.py RUN --out DIR engine.device=cpu

Writes predictions.csv, metrics.json, figures/ and heatmaps/ to DIR (RUN/evaluation unless told otherwise),
with settings.yaml, cohort.csv and task.json, by which tools/compare_runs.py reads it. Settings after the
run change it for this evaluation alone, such as the place of the stores.

  python launch/evaluate.py RUN --external --out DIR data.labels=OTHER.csv data.stores=[OTHER.lmdb]

Of a cohort that the run has never seen all slides of the table are the test; it needs no splits.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.errors import exit_code
from e2e.runs.evaluate import evaluate
from e2e.runs.parts import REGISTRIES
from e2e.settings.layers import saved_settings


def main() -> None:
    """Parse and evaluate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--external", action="store_true", help="a cohort never seen: all is test")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    settings = saved_settings(args.run, args.overrides, REGISTRIES)
    name = "external" if args.external else "evaluation"
    evaluate(settings, args.run, args.out or args.run / name, external=args.external)


if __name__ == "__main__":
    sys.exit(exit_code(main))
