"""Train encoder and head together from slide labels, then evaluate the best epoch.

  torchrun launch/train.py --datasets panda --model e2e_r18_abmilx
  torchrun --nproc-per-node 8 launch/train.py --datasets panda --model e2e_r18_abmilx optim.lr=1e-4
  python launch/train.py --resume runs/panda_e2e_r18_abmilx

Settings are read in this order, later ones winning: the defaults of e2e/settings/schema.py,
configs/datasets/<datasets>.yaml, configs/models/<model>.yaml, -c files in order, section.key=value.
The run folder holds settings.yaml, cohort.csv, task.json, metrics.jsonl, best.safetensors,
last.safetensors, predictions.csv, metrics.json, figures/ and heatmaps/.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.errors import exit_code
from e2e.runs.parts import REGISTRIES
from e2e.runs.train import train
from e2e.settings.cli import settings_from_args, train_parser
from e2e.settings.layers import dump_settings


def main() -> None:
    """Parse, build, train."""
    args = train_parser(__doc__ or "").parse_intermixed_args()
    settings, folder = settings_from_args(args, REGISTRIES)
    if args.print_config:
        print(dump_settings(settings), end="")
        return
    train(settings, folder, resume=bool(args.resume))


if __name__ == "__main__":
    sys.exit(exit_code(main))
