"""Predict raw slides without labels: cut as the run's training slides were, then predicted by it.

  python launch/predict.py SLIDES --run runs/panda_e2e_r18_abmilx --out predictions

SLIDES is a slide or a folder of slides; of a run on frozen features, a folder of features made alike
(launch/extract.py). Tissue, grid and magnification are those of the store the
run was trained on. Writes predictions.csv, a heatmap a slide, and the patches as slides.lmdb.
Exit code 3: some slides could not be read or hold no tissue; the others are predicted.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.errors import exit_code
from e2e.runs.parts import REGISTRIES
from e2e.runs.predict import predict
from e2e.settings.layers import saved_settings


def main() -> int:
    """Parse and predict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slides", type=Path, help="a slide, or a folder of slides, or of features")
    parser.add_argument("--run", type=Path, required=True, help="a run folder")
    parser.add_argument("--out", type=Path, help="folder for the results (RUN/predict)")
    parser.add_argument("--mpp-override", type=Path, help="CSV slide,mpp for slides that lack it")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    settings = saved_settings(args.run, args.overrides, REGISTRIES)
    return predict(
        settings,
        args.run,
        args.slides,
        args.out or args.run / "predict",
        mpp_override=args.mpp_override,
        workers=args.workers,
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
