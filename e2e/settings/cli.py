"""Command lines and their help. Nothing here imports PyTorch, so that help appears at once."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn

from e2e.errors import UserError
from e2e.registry import did_you_mean
from e2e.settings.schema import SECTIONS

OVERRIDE = "section.key=value"


class CommandParser(argparse.ArgumentParser):
    """The parser of one command of ``e2e``; mistakes are user errors that did_you_mean the nearest name.

    Parameters
    ----------
    command : str
        The command, such as ``train``.
    description : str
        What it does, with examples; printed as it stands.
    epilog : str, optional
        Printed after the options.
    add_help : bool
        Whether to add ``-h`` and ``--help``.
    allow_abbrev : bool
        Whether options may be shortened.
    """

    def __init__(
        self,
        command: str,
        description: str,
        *,
        epilog: str | None = None,
        add_help: bool = True,
        allow_abbrev: bool = True,
    ) -> None:
        super().__init__(
            prog=f"e2e {command}",
            description=description.strip(),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=add_help,
            allow_abbrev=allow_abbrev,
        )

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Return the parsed arguments; options and settings may be mixed.

        Parameters
        ----------
        argv : sequence of str, optional
            The arguments; by default those of the process.

        Raises
        ------
        UserError
            An option is unknown, incomplete or missing.
        """
        args, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            option = next((word for word in unknown if word.startswith("-")), None)
            if option is None:
                self.error(f"unexpected argument '{unknown[0]}'")
            option = option.partition("=")[0]
            self.error(
                f"unknown option '{option}'{did_you_mean(option, self._option_string_actions)}"
            )
        return args

    def error(self, message: str) -> NoReturn:
        """Raise a UserError with ``message``."""
        raise UserError(f"{self.prog}: {message}\n  see: {self.prog} --help")


class HelpAction(argparse.Action):
    """``--help`` prints the help of the command; ``--help TOPIC`` is left to the command."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """See :class:`argparse.Action`."""
        if values is None:
            parser.print_help()
            parser.exit()
        setattr(namespace, self.dest, values)


def settings_help() -> str:
    """Return a line for every setting: its name, default and meaning."""
    lines = [
        "settings (section.key=value). Those of encoder, head, task, sampler, augment and the",
        "regularisers (aem, spatial) are the options of the plug-in: --help head.abmilx lists them.",
    ]

    def add_section(path: str, section: Any) -> None:
        for item in dataclasses.fields(section):
            nested = item.default_factory
            if nested is not MISSING and dataclasses.is_dataclass(nested):
                add_section(f"{path}.{item.name}", nested)
                continue
            value = item.default if nested is MISSING else nested()
            shown = "null" if value is None else value
            lines.append(f"  {path}.{item.name}={shown}  {item.metadata['help']}")

    for name, section in SECTIONS.items():
        add_section(name, section)
    return "\n".join(lines)


def add_layers(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add ``--datasets``, ``--model``, ``-c`` and the settings, from which a run's settings are made."""
    parser.add_argument(
        "--datasets",
        required=required,
        metavar="COHORT",
        help="a cohort of configs/datasets, or a YAML file",
    )
    parser.add_argument(
        "--model",
        required=required,
        help="a model of configs/models, e2e_<encoder>_<head>, <head> for features, or a YAML file",
    )
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="YAML", help="a further layer"
    )
    parser.add_argument("overrides", nargs="*", metavar=OVERRIDE, help="settings")


def add_gpus(parser: argparse.ArgumentParser) -> None:
    """Add ``--gpus``: how many processes to start on this machine."""
    parser.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        help="start N processes on this machine, one a GPU (default: this process alone)",
    )


def positive(text: str) -> int:
    """Return a whole number of at least 1; for ``type=`` of an option."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not '{text}'")
    return int(text)


def train_parser() -> CommandParser:
    """Return the command line of ``e2e train``."""
    parser = CommandParser(
        "train",
        """
Train encoder and head together from slide labels, then evaluate the selected epoch.

  e2e train --datasets panda --model e2e_r18_abmilx
  e2e train --gpus 8 --datasets panda --model e2e_r18_abmilx optim.lr=1e-4
  e2e train --resume runs/panda_e2e_r18_abmilx
  e2e train --help head.abmilx          the options of a plug-in
  e2e train --help optim                the settings of a section

`torchrun --nproc-per-node 8 launch/train.py ...` in a checkout does the same as --gpus 8.

Settings are merged in this order, later ones win: the defaults below, configs/datasets/<cohort>.yaml,
configs/models/<model>.yaml, the files of -c in order, section.key=value. The run folder holds
settings.yaml, cohort.csv, task.json, metrics.jsonl, best.safetensors, last.safetensors,
predictions.csv, metrics.json, figures/ and heatmaps/.
""",
        epilog=settings_help(),
        add_help=False,
    )
    parser.add_argument(
        "-h",
        "--help",
        action=HelpAction,
        nargs="?",
        dest="help_topic",
        metavar="TOPIC",
        help="show this help, or that of a plug-in (head.abmilx), of all of a kind (head), or of a section",
    )
    add_layers(parser, required=False)
    add_gpus(parser)
    parser.add_argument("--resume", metavar="RUN", help="continue a stopped run")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run in the run folder"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the merged settings and exit"
    )
    return parser


def evaluate_parser() -> CommandParser:
    """Return the command line of ``e2e evaluate``."""
    parser = CommandParser(
        "evaluate",
        """
Evaluate the selected epoch of a run again, on its validation and test slides or on another cohort.

  e2e evaluate runs/panda_e2e_r18_abmilx
  e2e evaluate RUN --gpus 2 --out DIR engine.device=cpu
  e2e evaluate RUN --external --out DIR data.labels=OTHER.csv data.stores=[OTHER.lmdb]

Writes predictions.csv, metrics.json, figures/ and heatmaps/ to DIR (default: RUN/evaluation), with
settings.yaml, cohort.csv and task.json, so that `e2e compare` can read it. Settings given after the run
apply to this evaluation only, for example where the stores are. With --external the label table is a
cohort that the run has never seen: all of its slides are the test set, and it needs no splits.
""",
    )
    parser.add_argument("run", type=Path, help="a run folder, or a model of `e2e export`")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--external", action="store_true", help="evaluate a cohort that the run has never seen"
    )
    add_gpus(parser)
    parser.add_argument("overrides", nargs="*", metavar=OVERRIDE, help="settings")
    return parser


def predict_parser() -> CommandParser:
    """Return the command line of ``e2e predict``."""
    parser = CommandParser(
        "predict",
        """
Predict slides without labels.

  e2e predict slides/ --run runs/panda_e2e_r18_abmilx --out predictions
  e2e predict a.svs 'more/*.ndpi' --run runs/panda_e2e_r18_abmilx

SLIDES are slides, folders of slides or patterns, cut as the run's training slides were (tissue, grid and
magnification); for a run on frozen features, folders of features from the same encoder (`e2e extract`).
The run folder is all that is needed: it may have been moved, and its training data may be elsewhere.
Writes predictions.csv, a heatmap of each slide, and the patches as slides.lmdb.
Exit code 3: some slides could not be read or hold no tissue; the others are predicted.
""",
    )
    parser.add_argument(
        "slides",
        nargs="+",
        metavar="SLIDES",
        help="slides, folders, patterns; or features. Words like section.key=value are settings",
    )
    parser.add_argument(
        "--run", type=Path, required=True, help="a run folder, or a model of `e2e export`"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results (default: RUN/predict)"
    )
    add_mpp_override(parser)
    add_workers(parser)
    return parser


def export_parser() -> CommandParser:
    """Return the command line of ``e2e export``."""
    parser = CommandParser(
        "export",
        """
Export a trained run as a model for others, without its data.

  e2e export runs/panda_e2e_r18_abmilx --out panda_model
  e2e export RUN --out model.zip --license cc-by-nc-4.0
  e2e export RUN --out model --hub USER/NAME

Writes the selected weights, the settings without paths, the task, how slides are cut, the metrics, and
README.md, a model card. There are no ids of slides or cases in them. `e2e predict --run`, `e2e evaluate
--external` and e2e.load_run read the folder or the .zip like a run folder. --hub uploads the folder to a
private repository of the Hugging Face hub (log in with `hf auth login`).
""",
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder, or a file that ends in .zip",
    )
    parser.add_argument(
        "--license", default="", metavar="SPDX", help="licence of the model, for the card"
    )
    parser.add_argument("--hub", metavar="USER/NAME", help="also upload to the Hugging Face hub")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into paths, and settings like ``engine.device=cpu``."""
    overrides = [w for w in words if re.match(r"[a-z_]+(\.\w+)+=", w) and not Path(w).exists()]
    return [word for word in words if word not in overrides], overrides


def add_mpp_override(parser: argparse.ArgumentParser) -> None:
    """Add ``--mpp-override``."""
    parser.add_argument(
        "--mpp-override",
        type=Path,
        metavar="CSV",
        help="table slide,mpp: um per pixel of slides that do not state it",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add ``--workers``: processes that cut slides."""
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that cut slides (default: one a core)",
    )


def extract_parser() -> CommandParser:
    """Return the command line of ``e2e extract``."""
    parser = CommandParser(
        "extract",
        """
Extract frozen features of slides with any encoder, for heads without an encoder.

  e2e extract --stores A.lmdb B.lmdb --encoder r50 --out features
  e2e extract --slides SLIDES --encoder uni encoder.weights=uni.bin --out features
  e2e extract --gpus 4 --stores 'data/*.lmdb' --encoder virchow2 --out features

Writes features/20x_256px_0px_overlap/features_r50/<slide>.h5 in TRIDENT's layout. Slides that have
features are skipped; features of another encoder, other weights or another size in the same folder are
an error. Exit code 3: some slides could not be read; the others are done.
""",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--stores", nargs="+", metavar="FILE", help="patch stores, or globs")
    source.add_argument("--slides", type=Path, metavar="DIR", help="slides; patches are cut first")
    parser.add_argument("--encoder", required=True, help="r18, r50, uni ... or any timm name")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    add_gpus(parser)
    parser.add_argument(
        "--size", type=int, help="side in pixels of the encoder's input (default: as stored)"
    )
    parser.add_argument("--batch", type=int, default=256, help="patches encoded at once")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--device", default="auto", help="cpu or cuda")
    parser.add_argument(
        "--coords", type=Path, metavar="DIR", help="h5 files, for stores without coordinates"
    )
    parser.add_argument("--mpp", type=float, default=0.5, help="--slides: um per pixel of patches")
    parser.add_argument(
        "--patch-size", type=int, default=256, help="--slides: side of a patch in pixels"
    )
    add_mpp_override(parser)
    add_workers(parser)
    parser.add_argument("options", nargs="*", metavar="encoder.key=value")
    return parser


def crossval_parser() -> CommandParser:
    """Return the command line of ``e2e crossval``."""
    parser = CommandParser(
        "crossval",
        """
Cross-validate: train a run for each fold and seed, and report them together.

  e2e crossval --datasets brca --model e2e_r18_abmilx --folds 5 --out cv
  e2e crossval --datasets brca --model abmil --seeds 0,1,2 --gpus 0,1,2,3 --out cv \\
      data.split_file=splits/splits.csv
  e2e crossval ... --gpus 0+1,2+3         two runs at a time, each on two GPUs

Each run is what `e2e train` would do, in OUT/runs/fold_<k>_seed_<s>. The same command continues after a
stop: finished runs are kept, stopped ones resumed. More --seeds, or folds first left out by --only, can
be added later. OUT/results.csv has every metric of every run; results.md, .tex and .json have the mean,
the standard deviation, and the metric of all test slides together with its interval over cases.
""",
    )
    add_layers(parser, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of all runs and the tables"
    )
    parser.add_argument(
        "--folds", type=int, help="number of folds to make (default: those of data.split_file)"
    )
    parser.add_argument("--only", default="", help="folds to run, comma-separated (default: all)")
    parser.add_argument("--seeds", default="", help="comma-separated (default: run.seed)")
    parser.add_argument(
        "--gpus", default="", help="one run at a time on each of 0,1,2,3; or on several: 0+1,2+3"
    )
    parser.add_argument(
        "--at-once", type=int, default=1, metavar="N", help="without --gpus: N runs at a time"
    )
    return parser


def sweep_parser() -> CommandParser:
    """Return the command line of ``e2e sweep``."""
    parser = CommandParser(
        "sweep",
        """
Search for the best settings with Optuna. Every trial is a run; validation alone decides.

  e2e sweep --datasets panda --model e2e_r18_abmilx --space space.yaml --trials 30 --out sweep

space.yaml names settings and their ranges:

  optim.lr: {low: 1.0e-5, high: 1.0e-3, log: true}
  optim.bags: {low: 4, high: 16, step: 4}
  head.attn_dim: [64, 128, 256]

The same command continues after a stop, or with more --trials. OUT/trials.csv has every trial,
OUT/best.json the best one. Weights & Biases sweeps call launch/train.py: configs/sweeps/wandb.yaml.
""",
    )
    add_layers(parser, required=True)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of all runs and the tables"
    )
    parser.add_argument(
        "--space", type=Path, required=True, metavar="YAML", help="settings and their ranges"
    )
    parser.add_argument("--trials", type=int, default=20, help="in all (default: 20)")
    parser.add_argument(
        "--metric",
        default="",
        help="metric of validation (default: the one that selects the epoch)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the search")
    return parser


def compare_parser() -> CommandParser:
    """Return the command line of ``e2e compare``."""
    parser = CommandParser(
        "compare",
        """
Compare two runs by their predictions for the same slides, paired.

  e2e compare runs/a runs/b
  e2e compare runs/a runs/b --split val --metric kappa_quadratic --json ab.json

Reads settings.yaml, task.json and predictions.csv of both folders, which are run folders or results of
`e2e evaluate` (RUN/evaluation). Prints the metric of each run and A - B with 95 % intervals, and the
p-value of no difference: by DeLong's test for the AUC of two classes where every slide is its own case,
otherwise by the paired bootstrap over cases, which uses the same resamples for both runs.
""",
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="two run folders, A and B")
    parser.add_argument("--split", default="test", help="which slides (default: test)")
    parser.add_argument(
        "--metric", default="", help="default: the one by which run A selected its epoch"
    )
    parser.add_argument("--draws", type=int, default=10_000, help="resamples of the cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    return parser
