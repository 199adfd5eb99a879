"""Cut a cohort into folds, by case and stratified; or take published splits, and check them.

  python tools/make_splits.py --labels T.csv --case case --slide slide --label label --out DIR
  ... --repeats 3                     three times five folds, cut anew each time
  ... --site tcga                     no centre tested in two folds, nor trained on where it is tested
                                      (TCGA barcodes; or the column of the centre)
  ... --inner 4                       nested: in each fold four ways to choose the validation cases
  ... --few-shot 16                   16 training cases of each class
  ... --splits published/             no cut: CLAM's, ABMILX's, Patho-Bench's, STAMP's, AEM's files

Validation cases are cut from the training cases, stratified; with --site from the training centres.
DIR/splits.csv is the table with a column fold_<k> for each fold to train on
(data.split_file=DIR/splits.csv data.fold=0), DIR/clam/ has the same as CLAM writes it, DIR/made.json
how it was made. For survival, --label is the event column: each fold then has its share of events.
A column of many different numbers is stratified by five groups of them. Cases without a word there are dealt
evenly too; a case whose slides are of several classes is none of --few-shot. A row may name several
slides: --slide-separator ";".

Exit codes: 0 written, and the counts printed; 2 a mistake, which the message names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e.cohort.folds import (
    Fold,
    case_strata,
    few_shot,
    held_out,
    held_out_sites,
    make_folds,
    nested_folds,
    tcga_sites,
)
from e2e.cohort.split_files import clam_files, fold_table, names_cases, read_cells, read_splits
from e2e.cohort.splits import SPLITS, assign, find_missing_classes, group_numbers
from e2e.cohort.table import read_table
from e2e.errors import UserError, exit_code, format_list
from e2e.files import write_atomically
from e2e.log import Screen
from e2e.seeds import mix_seed
from e2e.slides import Slide

TCGA = "tcga"
BLANK = "(blank)"
CUT = {"folds": 5, "repeats": 1, "val": 0.15, "inner": None}
"""What says how to cut, and by default: nothing of it goes with published splits."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=Path, required=True, metavar="TABLE.csv")
    parser.add_argument("--case", required=True, metavar="COLUMN", help="of the patients' ids")
    parser.add_argument("--slide", metavar="COLUMN", help="of the slides' ids (that of --case)")
    parser.add_argument("--slide-suffix", default="", metavar=".svs", help="taken off these ids")
    parser.add_argument("--slide-separator", metavar="SIGN", help="between several ids in a row")
    parser.add_argument("--label", required=True, metavar="COLUMN", help="by which to stratify")
    parser.add_argument("--site", metavar="COLUMN", help=f"of the centre; {TCGA}: from barcodes")
    parser.add_argument("--folds", type=int, help="each case is tested in one (5)")
    parser.add_argument("--repeats", type=int, help="cut anew so many times (1)")
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--val", type=float, help="of the training cases (0.15)")
    share.add_argument("--inner", type=int, metavar="K", help="nested: K validation sets a fold")
    parser.set_defaults(**CUT)
    parser.add_argument("--few-shot", type=int, metavar="N", help="training cases of each class")
    parser.add_argument("--splits", type=Path, metavar="PATH", help="published: a file or folder")
    parser.add_argument("--allow-missing", action="store_true", help="splits that lack a class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """UserError for numbers that make no sense."""
    for option, value, least in (
        ("--repeats", args.repeats, 1),
        ("--inner", args.inner, 2),
        ("--few-shot", args.few_shot, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{option} must be at least {least}, not {value}")
    if not 0 <= args.val < 1:
        raise UserError(f"--val is a share of the training cases, 0 to below 1, not {args.val}")
    if args.splits and (given := [f"--{k}" for k, v in CUT.items() if getattr(args, k) != v]):
        raise UserError(f"--splits takes folds as they are: leave out {', '.join(given)}")


def read_slides(args: argparse.Namespace) -> list[Slide]:
    """The rows of the table; UserError that lists those which cannot be used."""
    columns = {
        "case": args.case,
        "slide": args.slide or args.case,
        "split": None,
        "centre": None if args.site == TCGA else args.site,
    }
    slides, problems = read_table(
        args.labels,
        columns=columns,
        targets=[args.label],
        split_names={},
        slide_suffix=args.slide_suffix,
        slide_separator=args.slide_separator,
    )
    if problems:
        raise UserError(
            f"{args.labels} has {len(problems)} row(s) that cannot be used\n{format_list(problems)}\n"
            "  mend them, or take them out"
        )
    return slides


def sites_of(slides: Sequence[Slide], site: str) -> dict[str, str]:
    """Case -> its centre; UserError where a case has two, or none."""
    if site == TCGA:
        return tcga_sites({slide.case for slide in slides})
    found: dict[str, str] = {}
    torn = {s.case for s in slides if found.setdefault(s.case, s.centre) != s.centre}
    if torn:
        raise UserError(
            f"{len(torn)} case(s) have slides of two centres\n{format_list(sorted(torn))}\n"
            "  give each case one centre in that column"
        )
    if nowhere := sorted(case for case, centre in found.items() if not centre):
        raise UserError(
            f"{len(nowhere)} case(s) have no word in the column '{site}', so their centre is not known\n"
            f"{format_list(nowhere)}\n  mend them, or take them out"
        )
    return found


def draw_folds(
    args: argparse.Namespace, strata: Mapping[str, str], sites: Mapping[str, str] | None
) -> dict[str, Fold]:
    """Number -> fold: those of the first repeat first, in a fold the inner ones in turn."""
    folds: list[Fold] = []
    for repeat in range(args.repeats):
        seed = mix_seed(args.seed, repeat)
        if sites is None:
            tests = held_out(strata, args.folds, seed=seed)
        else:
            tests = held_out_sites(strata, sites, args.folds, seed=seed)
        if args.inner:
            cut = nested_folds(strata, tests, args.inner, seed=seed)
        else:
            cut = make_folds(strata, tests, val=args.val, seed=seed)
        folds += cut
    return {str(number): fold for number, fold in enumerate(folds)}


def published_folds(args: argparse.Namespace, slides: Sequence[Slide]) -> dict[str, Fold]:
    """Number -> fold of a published split; UserError where table and split do not agree."""
    path, folds = args.splits, dict[str, Fold]()
    published = read_splits(
        path,
        args.slide,
        args.case,
        slide_suffix=args.slide_suffix,
        slide_separator=args.slide_separator,
    )
    cases = names_cases(path, args.slide, args.case)
    for number, splits in published.items():
        kept, problems = assign(slides, splits, f"{path.name}, fold {number}", cases=cases)
        if problems:
            raise UserError(
                f"{path} and the label table do not agree in {len(problems)} place(s) of fold "
                f"{number}\n{format_list(problems)}\n"
                "  give the columns of the ids in which the splits are written: --case, --slide"
            )
        used = {slide.id: slide.split for slide in kept}
        found: dict[str, set[str]] = {slide.case: set() for slide in slides}
        for slide in slides:
            found[slide.case].add(used.get(slide.id, ""))
        torn = [
            f"case '{c}': {', '.join(sorted(s))}" for c, s in found.items() if len(s - {""}) > 1
        ]
        in_part = sorted(f"case '{case}'" for case, own in found.items() if len(own) > 1)
        if in_part and not torn:
            raise UserError(
                f"{path}, fold {number}: of {len(in_part)} case(s) some slides are used and others not, "
                f"and folds here are of whole cases\n{format_list(in_part)}\n"
                f"  train on the published splits themselves: data.split_file={path}"
            )
        if torn:
            raise UserError(
                f"{path}, fold {number}: {len(torn)} case(s) lie in more than one split: the test "
                f"would not be honest\n{format_list(sorted(torn))}"
            )
        folds[number] = {case: "".join(own) for case, own in found.items()}
    return folds


def counts(
    folds: Mapping[str, Fold], slides: Sequence[Slide], label: str, sites: Mapping[str, str] | None
) -> list[list[str]]:
    """The header, and a row for each split of each fold: slides a class, cases, slides, centres."""
    classes = sorted({slide.target[label] for slide in slides})
    where = [] if sites is None else ["sites"]
    rows = [
        ["fold", "split", *(f"{label}={c or BLANK}" for c in classes), "slides", "cases", *where]
    ]
    for number, fold in folds.items():
        for split in (*SPLITS, ""):
            own = [slide for slide in slides if fold[slide.case] == split]
            cases = {slide.case for slide in own}
            found = Counter(slide.target[label] for slide in own)
            told = [*(found[c] for c in classes), len(own), len(cases)]
            told += [] if sites is None else [len({sites[case] for case in cases})]
            if own:
                rows.append([number, split or "(unused)", *(f"{count:,}" for count in told)])
    return rows


def same_tests(folds: Mapping[str, Fold], repeats: int) -> list[str]:
    """A line for each repeat that tests what another does: few sites leave no other balance."""
    numbers = list(folds)
    size = len(numbers) // repeats
    seen: dict[frozenset[frozenset[str]], int] = {}
    lines = []
    for repeat in range(repeats):
        tests = frozenset(
            frozenset(case for case, split in folds[number].items() if split == "test")
            for number in numbers[repeat * size : (repeat + 1) * size]
        )
        if seen.setdefault(tests, repeat) != repeat:
            lines.append(f"repeat {repeat} has the same test sets as repeat {seen[tests]}")
    return lines


def check_classes(folds: Mapping[str, Fold], slides: Sequence[Slide], label: str) -> list[str]:
    """A line for each split of a fold that lacks a class; a blank is none."""
    classes = {slide.case: set[str]() for slide in slides}
    for slide in slides:
        classes[slide.case].update(filter(None, [slide.target[label]]))
    return [
        f"fold {number}: {split} has no {' and no '.join(f'{label}={c}' for c in lacking)}"
        for number, fold in folds.items()
        for split, lacking in find_missing_classes(fold, classes).items()
    ]


def contents(
    args: argparse.Namespace, folds: Mapping[str, Fold], slides: Sequence[Slide]
) -> dict[Path, bytes]:
    """All files to write."""
    labels = {slide.id: slide.target[args.label] for slide in slides}
    files = {args.out / "splits.csv": fold_table(read_cells(args.labels), args.case, folds)}
    for number, fold in folds.items():
        clam = clam_files(number, {slide.id: fold[slide.case] for slide in slides}, labels)
        files |= {args.out / "clam" / name: content for name, content in clam.items()}
    # Names without their folders, so that the file is the same wherever the splits are made.
    given = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
    how = {k: v for k, v in given.items() if not (args.splits and k in CUT)}
    how["labels_blake2b"] = hashlib.blake2b(args.labels.read_bytes(), digest_size=16).hexdigest()
    files[args.out / "made.json"] = (json.dumps(how, indent=1) + "\n").encode()
    return files


def write(files: Mapping[Path, bytes], out: Path) -> None:
    """Write what is not there yet; UserError rather than change splits that a run may have used."""
    there = [path for path in out.rglob("*") if path.is_file() and not path.name.startswith(".")]
    other = [path for path in there if path not in files or path.read_bytes() != files[path]]
    if other:
        raise UserError(
            f"{out} holds other splits already\n{format_list(sorted(other))}\n  choose another --out"
        )
    for path, content in files.items():
        if path not in there:
            write_atomically(path, content)


def main(argv: Sequence[str] | None = None) -> int:
    """Cut or read, check, print, write."""
    args = parse(argv)
    check(args)
    slides = group_numbers(read_slides(args), args.label)
    sites = sites_of(slides, args.site) if args.site else None
    strata = case_strata(slides, args.label)
    folds = published_folds(args, slides) if args.splits else draw_folds(args, strata, sites)
    if args.few_shot:
        classes = {slide.target[args.label] for slide in slides} - {""}
        folds = {
            k: few_shot(strata, fold, args.few_shot, classes=classes, seed=mix_seed(args.seed, k))
            for k, fold in folds.items()
        }
    if bare := [number for number, fold in folds.items() if "train" not in fold.values()]:
        raise UserError(
            f"fold(s) {', '.join(bare)} have no training case\n  ask for a smaller --val, or fewer --folds"
        )
    rows = counts(folds, slides, args.label, sites)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    screen = Screen(is_leader=True)
    for row in rows:
        screen.say("  ".join(word.rjust(n) for word, n in zip(row, widths, strict=True)))
    for line in [] if args.splits else same_tests(folds, args.repeats):
        screen.say(f"NOTE {line}")
    lacking = check_classes(folds, slides, args.label)
    if lacking and not args.allow_missing:
        raise UserError(
            f"{len(lacking)} split(s) lack a class, so metrics of them are not defined\n"
            f"{format_list(lacking)}\n"
            "  ask for fewer --folds or a larger --val, or go on with --allow-missing"
        )
    for line in lacking:
        screen.say(f"NOTE {line}: its metrics are not all defined")
    write(contents(args, folds, slides), args.out)
    screen.say(f"{len(folds)} fold(s): {args.out / 'splits.csv'}; CLAM's form: {args.out / 'clam'}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
