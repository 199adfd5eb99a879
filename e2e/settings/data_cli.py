"""Command lines of what prepares data: slides, stores, cohorts and splits. See :mod:`e2e.settings.cli`."""

from __future__ import annotations

from pathlib import Path

from e2e.settings.cli import CommandParser

TCGA = "tcga"
"""Value of ``--site``: the centre is read from TCGA barcodes."""

DEFAULT_TISSUE = 0.25
"""Default of ``--tissue``; a test keeps it equal to that of :class:`e2e.wsi.tiling.Tiling`."""

SPLIT_DEFAULTS = {"folds": 5, "repeats": 1, "val": 0.15, "inner": None}
"""Options of ``e2e splits`` that say how to cut, with their defaults; none goes with published splits."""


PACK = """
Cut slides into patches and store them, with their coordinates, in one LMDB file.

  e2e pack --slides DIR --out cohort.lmdb                  256 px at 0.5 um/px (20x)
  e2e pack --slides DIR --out a.lmdb --scale 0.5 --scale 2 two stores, a_0.5.lmdb and a_2.lmdb
  e2e pack --coords DIR --slides DIR --out cohort.lmdb     at coordinates of CLAM or TRIDENT
  e2e pack --patches DIR --out cohort.lmdb                 DIR/<slide>/*.jpg, png
  e2e pack --slides DIR --out cohort.lmdb --scheduler tcp://HOST:8786    on a Dask cluster

After an interruption of any kind, or to add slides, run the same command again: slides in the store are
skipped. A slide that cannot be used is left out and listed in FILE.lmdb.quarantine.csv;
FILE.lmdb.report.csv lists all slides. FILE_overview/<slide>.png shows tissue outlined in green and
patches in blue.

On a cluster, all machines see DIR and the folder of FILE.lmdb under the same paths and have the same
version of the project. Each worker (dask worker ADDRESS --nworkers N --nthreads 1) writes its own file,
FILE.<host>-<n>.lmdb; FILE.stores.json is the index over these files.

Exit codes: 0 all slides were packed; 2 a user error, explained in one message; 3 packed, but some slides
are not in the store; 130 interrupted by Ctrl-C.
"""


def pack_parser() -> CommandParser:
    """Return the command line of ``e2e pack``."""
    parser = CommandParser("pack", PACK, allow_abbrev=False)
    source = parser.add_argument_group("source")
    source.add_argument(
        "--slides", type=Path, metavar="DIR", help="folder of slides, searched in any depth"
    )
    source.add_argument(
        "--suffix",
        action="append",
        metavar=".SVS",
        help="what the names of slides end in; repeatable (default: any that OpenSlide reads)",
    )
    source.add_argument(
        "--coords", type=Path, metavar="DIR", help="folder of the .h5 files of CLAM or TRIDENT"
    )
    source.add_argument(
        "--patches", type=Path, metavar="DIR", help="folder with a folder of images per slide"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.lmdb")
    cut = parser.add_argument_group("how to cut")
    cut.add_argument(
        "--mpp", type=float, help="micrometres per pixel of the patches (default: 0.5)"
    )
    cut.add_argument("--mag", type=float, help="the same as a magnification: mpp = 10 / mag")
    cut.add_argument(
        "--scale",
        type=float,
        action="append",
        metavar="MPP",
        help="a store for each mpp; repeatable",
    )
    cut.add_argument(
        "--mpp-override",
        type=Path,
        metavar="CSV",
        help="columns slide,mpp: slides whose files are wrong",
    )
    cut.add_argument(
        "--patch-size", type=int, metavar="PX", help="side of a patch in pixels (default: 256)"
    )
    cut.add_argument(
        "--overlap", type=int, metavar="PX", help="overlap of neighbouring patches (default: 0)"
    )
    cut.add_argument(
        "--tissue",
        type=float,
        metavar="FRACTION",
        help=f"minimum tissue fraction of a patch (default: {DEFAULT_TISSUE})",
    )
    cut.add_argument("--quality", type=int, default=80, help="JPEG quality (default: 80)")
    parser.add_argument("--workers", type=int, help="worker processes (default: one per core)")
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="address of a Dask scheduler; local starts one on this machine",
    )
    return parser


def inspect_parser() -> CommandParser:
    """Return the command line of ``e2e inspect``."""
    parser = CommandParser(
        "inspect",
        """
Show what patch stores hold, check them for damage, and draw some of their patches.

  e2e inspect cohort.lmdb                     recipe, totals, the first 10 slides
  e2e inspect cohort.lmdb --all               every slide
  e2e inspect a.lmdb b.lmdb --verify          check every value and decode every JPEG
  e2e inspect cohort.lmdb --sheet sheet.png   a picture of random patches

Exit codes: 0 no faults; 2 a user error or an unreadable store, explained in one message; 3 there are
faults, and each is listed.
""",
    )
    parser.add_argument("stores", nargs="+", type=Path, metavar="STORE")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--all", action="store_true", help="list every slide")
    rows.add_argument(
        "--first", type=int, default=10, metavar="N", help="list the first N slides (default: 10)"
    )
    parser.add_argument("--verify", action="store_true", help="check and decode every patch")
    parser.add_argument("--decoder", default="auto", help="JPEG decoder of --verify and --sheet")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw random patches")
    parser.add_argument(
        "--sheet-slides", type=int, default=8, metavar="N", help="rows of the sheet (default: 8)"
    )
    parser.add_argument(
        "--sheet-patches", type=int, default=12, metavar="N", help="patches per row (default: 12)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sheet")
    return parser


def convert_parser() -> CommandParser:
    """Return the command line of ``e2e convert``."""
    parser = CommandParser(
        "convert",
        """
Convert an LMDB of the ABMILX project into a patch store; the JPEGs stay the same byte for byte.

  e2e convert OLD.lmdb --out NEW.lmdb                  patches without coordinates
  e2e convert OLD.lmdb --out NEW.lmdb --coords DIR     with the .h5 of CLAM or TRIDENT
  e2e convert OLD.lmdb --out NEW.lmdb --mpp 0.5 --level0-px 512

After an interruption of any kind, run the same command again: slides in the store are skipped. Every
slide that is written is read back and compared with OLD.lmdb. A slide that cannot be converted is left
out and listed in NEW.lmdb.quarantine.csv; NEW.lmdb.report.csv lists all slides. OLD.lmdb is only read, and
the pickles in it are not executed. (The project gave its models BGR because its decoder returned that;
the files are ordinary JPEGs.)

Exit codes: 0 all slides were converted; 2 a user error, explained in one message; 3 converted, but some
slides are not in the store; 130 interrupted by Ctrl-C.
""",
        allow_abbrev=False,
    )
    parser.add_argument("old", type=Path, metavar="OLD.lmdb")
    parser.add_argument("--out", type=Path, required=True, metavar="NEW.lmdb")
    parser.add_argument(
        "--coords", type=Path, metavar="DIR", help="folder of the .h5 files of CLAM or TRIDENT"
    )
    parser.add_argument(
        "--mpp", type=float, help="micrometres per pixel of the patches (default: unknown)"
    )
    parser.add_argument(
        "--level0-px",
        type=float,
        metavar="PX",
        help="side of a patch in level-0 pixels (without --coords)",
    )
    return parser


def check_parser() -> CommandParser:
    """Return the command line of ``e2e check``."""
    parser = CommandParser(
        "check",
        """
Check a cohort before a run: its table, stores or features, splits, and the memory it needs.

  e2e check --datasets panda                        table and stores as in the YAML
  e2e check --datasets panda data.labels=panda.csv  no store yet: the table alone
  ... --model abmil data.features=[FOLDER]                           frozen features
  ... --site tcga                                                    by centre too: from TCGA barcodes, or
                                                                     a column (default:
                                                                     data.columns.centre, if set)

Whatever stops a run stops this command, because it uses the same code: it loads the cohort and builds
the model as a run does, without downloading weights. Rows and slides that a run would drop or refuse
are listed in the file of --problems. All features are read, to find NaN and damaged files.

Exit codes: 0 a run would start, or, if there is no store yet, the table is in order; 2 a run would be
refused, and the message says why.
""",
    )
    parser.add_argument("--datasets", required=True, help="a YAML of configs/datasets, or a path")
    parser.add_argument("--model", default="e2e_r18_abmilx", help="as for e2e train")
    parser.add_argument("-c", "--config", action="append", default=[], help="a further YAML file")
    parser.add_argument(
        "--site", metavar="COLUMN", help=f"column of the centre, or {TCGA}: from TCGA barcodes"
    )
    parser.add_argument(
        "--problems",
        type=Path,
        default=Path("problems.csv"),
        metavar="FILE.csv",
        help="where unusable rows and slides are listed (%(default)s)",
    )
    parser.add_argument(
        "--patches",
        type=int,
        default=1000,
        metavar="N",
        help="patches per slide, for estimates without a store (%(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


SPLITS = """
Cut a cohort into folds, by case and stratified; or check published splits and convert them.

  e2e splits --labels T.csv --case case --slide slide --label label --out DIR
  ... --repeats 3                     three times five folds, each time cut anew
  ... --site tcga                     no centre is tested in two folds, or trained on where it is tested
                                      (from TCGA barcodes, or name the column of the centre)
  ... --inner 4                       nested: in each fold four choices of the validation cases
  ... --few-shot 16                   16 training cases of each class
  ... --splits published/             use the splits of CLAM, ABMILX, Patho-Bench, STAMP or AEM

Validation cases are cut from the training cases, stratified; with --site from the training centres.
DIR/splits.csv is the label table with a column fold_<k> for each fold, to train on with
data.split_file=DIR/splits.csv data.fold=0; DIR/clam/ has the same in CLAM's format, and DIR/made.json
the options. For survival, --label is the event column, so that each fold has its share of events.
A column of many different numbers is stratified by five groups of them. Cases with a blank label are
divided evenly too. A case whose slides have several classes is not used by --few-shot. If a row names
several slides: --slide-separator ";".

Exit codes: 0 the files are written and the counts printed; 2 a user error, explained in one message.
"""


def splits_parser() -> CommandParser:
    """Return the command line of ``e2e splits``."""
    parser = CommandParser(
        "splits",
        SPLITS,
    )
    parser.add_argument(
        "--labels", type=Path, required=True, metavar="TABLE.csv", help="the label table"
    )
    parser.add_argument(
        "--case", required=True, metavar="COLUMN", help="column of the case (patient) ids"
    )
    parser.add_argument(
        "--slide", metavar="COLUMN", help="column of the slide ids (default: that of --case)"
    )
    parser.add_argument(
        "--slide-suffix", default="", metavar=".svs", help="removed from the end of slide ids"
    )
    parser.add_argument(
        "--slide-separator", metavar="SIGN", help="separates several slide ids in one cell"
    )
    parser.add_argument("--label", required=True, metavar="COLUMN", help="column to stratify by")
    parser.add_argument(
        "--site", metavar="COLUMN", help=f"column of the centre, or {TCGA}: from TCGA barcodes"
    )
    parser.add_argument("--folds", type=int, help="number of folds; each case is tested in one (5)")
    parser.add_argument("--repeats", type=int, help="number of times the folds are cut anew (1)")
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--val", type=float, help="validation share of the training cases (0.15)")
    share.add_argument(
        "--inner", type=int, metavar="K", help="nested: K validation sets for each fold"
    )
    parser.set_defaults(**SPLIT_DEFAULTS)
    parser.add_argument(
        "--few-shot", type=int, metavar="N", help="keep N training cases of each class"
    )
    parser.add_argument(
        "--splits", type=Path, metavar="PATH", help="published splits: a file or folder"
    )
    parser.add_argument(
        "--unmatched",
        choices=("error", "drop"),
        default="error",
        help="ids that only the table or only --splits has: stop, or leave them out and list them",
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="allow splits that lack a class"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    return parser


def demo_parser() -> CommandParser:
    """Return the command line of ``e2e demo``."""
    parser = CommandParser(
        "demo",
        """
Draw slides, pack them, train end to end and evaluate on held-out slides: everything, in minutes on a CPU.

  e2e demo --out demo

Every step is a command that a user would type, and is printed. Finished steps are kept, so the same
command continues after a stop. The model is shown beside three controls, whose AUC must be near 0.5 or
clearly lower: permuted training labels, the mean colour of the slides, an untrained encoder.
""",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="folder (default: demo)"
    )
    parser.add_argument(
        "--slides",
        default="64,16,48",
        metavar="TRAIN,VAL,TEST",
        help="number of slides (default: 64,16,48)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of slides and training")
    return parser
