"""Cut a cohort into folds, by case and stratified; or check published splits and convert them."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from e2e.cohort.folds import (
    TCGA,
    Fold,
    case_strata,
    count_slides,
    few_shot,
    find_equal_repeats,
    find_lacking_splits,
    make_folds,
    nested_folds,
    site_preserved_test_sets,
    stratified_test_sets,
    tcga_sites,
)
from e2e.cohort.ids import IdRules
from e2e.cohort.report import write_problems
from e2e.cohort.split_files import (
    clam_files,
    fold_table,
    ids_are_cases,
    read_splits,
    read_text_table,
)
from e2e.cohort.splits import assign_splits, group_numbers
from e2e.cohort.table import read_table, summarise_problems
from e2e.errors import UserError, format_list
from e2e.files import write_atomically
from e2e.log import Screen
from e2e.seeds import mix_seed
from e2e.settings.data_cli import SPLIT_DEFAULTS, splits_parser
from e2e.slides import Slide


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for numbers out of range, or options that do not go together."""
    for option, value, minimum in (
        ("--repeats", args.repeats, 1),
        ("--inner", args.inner, 2),
        ("--few-shot", args.few_shot, 1),
    ):
        if value is not None and value < minimum:
            raise UserError(f"{option} must be at least {minimum}, not {value}")
    if not 0 <= args.val < 1:
        raise UserError(
            f"--val must be a share of the training cases, at least 0 and below 1, not {args.val}"
        )
    if args.splits:
        options = [f"--{k}" for k, default in SPLIT_DEFAULTS.items() if getattr(args, k) != default]
        if options:
            raise UserError(
                f"--splits uses folds as published, so {', '.join(options)} has no effect\n"
                f"  leave out {', '.join(options)}"
            )


def read_slides(args: argparse.Namespace) -> list[Slide]:
    """Read the slides of the label table.

    Raises
    ------
    UserError
        A row cannot be used; all of them are counted by their problem.
    """
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
        rules=IdRules(args.slide_suffix, args.slide_separator),
    )
    if problems:
        raise UserError(
            f"{args.labels} has {len(problems)} row(s) that cannot be used\n"
            f"{format_list(summarise_problems(problems))}\n  correct or remove them"
        )
    return slides


def single_sites(slides: Sequence[Slide], site: str) -> dict[str, str]:
    """Return the centre of each case.

    Parameters
    ----------
    slides
        The slides, with the centres of the table.
    site
        Column of the centre, or ``tcga``.

    Returns
    -------
    dict
        Case -> its centre.

    Raises
    ------
    UserError
        A case has two centres, or none.
    """
    if site == TCGA:
        return tcga_sites({slide.case for slide in slides})
    site_of: dict[str, str] = {}
    ambiguous = {s.case for s in slides if site_of.setdefault(s.case, s.centre) != s.centre}
    if ambiguous:
        raise UserError(
            f"{len(ambiguous)} case(s) have slides of two centres\n{format_list(sorted(ambiguous))}\n"
            f"  give each case one centre in the column '{site}'"
        )
    if blank := sorted(case for case, centre in site_of.items() if not centre):
        raise UserError(
            f"{len(blank)} case(s) have no value in the column '{site}', so their centre is unknown\n"
            f"{format_list(blank)}\n  add their centre, or remove them"
        )
    return site_of


def cut_folds(
    args: argparse.Namespace, strata: Mapping[str, str], sites: Mapping[str, str] | None
) -> dict[str, Fold]:
    """Cut the cases into folds.

    Parameters
    ----------
    args
        The command line.
    strata
        Case -> its stratum.
    sites
        Case -> its centre; None if folds need not keep centres together.

    Returns
    -------
    dict
        Number -> fold: those of the first repeat first, and for each test set its inner folds in turn.
    """
    folds: list[Fold] = []
    for repeat in range(args.repeats):
        seed = mix_seed(args.seed, repeat)
        if sites is None:
            tests = stratified_test_sets(strata, args.folds, seed=seed)
        else:
            tests = site_preserved_test_sets(strata, sites, args.folds, seed=seed)
        if args.inner:
            folds += nested_folds(strata, tests, args.inner, seed=seed)
        else:
            folds += make_folds(strata, tests, val=args.val, seed=seed)
    return {str(number): fold for number, fold in enumerate(folds)}


def published_folds(args: argparse.Namespace, slides: Sequence[Slide]) -> dict[str, Fold]:
    """Read published splits as folds of whole cases.

    Parameters
    ----------
    args
        The command line.
    slides
        The slides of the label table.

    Returns
    -------
    dict
        Number -> fold.

    Raises
    ------
    UserError
        Table and splits do not match, or a case is in two splits of a fold, or used in part.
    """
    published = read_splits(
        args.splits,
        args.slide,
        args.case,
        rules=IdRules(args.slide_suffix, args.slide_separator),
    )
    by_case = ids_are_cases(args.splits, args.slide, args.case)
    return {
        number: _published_fold(args, number, slides, splits, by_case=by_case)
        for number, splits in published.items()
    }


def _published_fold(
    args: argparse.Namespace,
    number: str,
    slides: Sequence[Slide],
    splits: Mapping[str, str],
    *,
    by_case: bool,
) -> Fold:
    path: Path = args.splits
    assigned, problems = assign_splits(
        slides, splits, f"{path.name}, fold {number}", by_case=by_case
    )
    if problems:
        lines = format_list(summarise_problems(problems))
        summary = f"do not match in {len(problems)} id(s) of fold {number}\n{lines}"
        if args.unmatched != "drop" or not assigned:
            remedy = "set --case and --slide to the columns of the ids that the splits use"
            if assigned:
                remedy += ", or leave these ids out with --unmatched drop"
            raise UserError(f"{path} and the label table {summary}\n  {remedy}")
        list_path = args.out.with_name(f"{args.out.name}.problems_{number}.csv")
        write_problems(problems, list_path)
        Screen(is_leader=True).say(f"warning: {path} and the label table {summary}\n  {list_path}")
    split_of = {slide.id: slide.split for slide in assigned}
    splits_of: dict[str, set[str]] = {slide.case: set() for slide in slides}
    for slide in slides:
        splits_of[slide.case].add(split_of.get(slide.id, ""))
    leaking = [
        f"case '{case}': {', '.join(sorted(names))}"
        for case, names in splits_of.items()
        if len(names - {""}) > 1
    ]
    if leaking:
        raise UserError(
            f"{path}, fold {number}: {len(leaking)} case(s) are in more than one split, so test results"
            f" would be biased\n{format_list(sorted(leaking))}\n  cut folds by case: leave out --splits"
        )
    partial = sorted(f"case '{case}'" for case, names in splits_of.items() if len(names) > 1)
    if partial:
        raise UserError(
            f"{path}, fold {number}: {len(partial)} case(s) are used in part, but folds here are of whole"
            f" cases\n{format_list(partial)}\n"
            f"  train on the published splits themselves: data.split_file={path}"
        )
    return {case: "".join(names) for case, names in splits_of.items()}


def output_files(
    args: argparse.Namespace, folds: Mapping[str, Fold], slides: Sequence[Slide]
) -> dict[Path, bytes]:
    """Return the content of all files to write: path -> bytes."""
    labels = {slide.id: slide.target[args.label] for slide in slides}
    files = {args.out / "splits.csv": fold_table(read_text_table(args.labels), args.case, folds)}
    for number, fold in folds.items():
        clam = clam_files(number, {slide.id: fold[slide.case] for slide in slides}, labels)
        files |= {args.out / "clam" / name: content for name, content in clam.items()}
    # Names without their folders, so that the file is the same wherever the splits are made.
    options = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
    recipe = {
        k: v
        for k, v in options.items()
        if not (args.splits and k in SPLIT_DEFAULTS) and (k, v) != ("unmatched", "error")
    }
    recipe["labels_blake2b"] = hashlib.blake2b(args.labels.read_bytes(), digest_size=16).hexdigest()
    files[args.out / "made.json"] = (json.dumps(recipe, indent=1) + "\n").encode()
    return files


def write_files(files: Mapping[Path, bytes], out: Path) -> None:
    """Write the files that do not exist yet.

    Parameters
    ----------
    files
        Path -> content.
    out
        The output folder.

    Raises
    ------
    UserError
        The folder has other splits, which a run may have used.
    """
    present = [path for path in out.rglob("*") if path.is_file() and path.name[0] != "."]
    other = [path for path in present if path not in files or path.read_bytes() != files[path]]
    if other:
        raise UserError(
            f"{out} contains other splits already\n{format_list(sorted(other))}\n  use another --out"
        )
    for path, content in files.items():
        if path not in present:
            write_atomically(path, content)


def main(argv: Sequence[str] | None = None) -> int:
    """Cut folds or read published splits, check and print them, and write the files.

    Parameters
    ----------
    argv
        The arguments; None for those of the process.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    UserError
        The table, the splits or the options cannot be used.
    """
    args = splits_parser().parse(argv)
    check_options(args)
    slides = group_numbers(read_slides(args), args.label)
    sites = single_sites(slides, args.site) if args.site else None
    strata = case_strata(slides, args.label)
    folds = published_folds(args, slides) if args.splits else cut_folds(args, strata, sites)
    if args.few_shot:
        classes = {slide.target[args.label] for slide in slides} - {""}
        folds = {
            k: few_shot(strata, fold, args.few_shot, classes=classes, seed=mix_seed(args.seed, k))
            for k, fold in folds.items()
        }
    if untrained := [number for number, fold in folds.items() if "train" not in fold.values()]:
        raise UserError(
            f"fold(s) {', '.join(untrained)} have no training case\n  use a smaller --val or fewer --folds"
        )
    screen = Screen(is_leader=True)
    _print_counts(count_slides(folds, slides, args.label, sites), screen)
    for line in [] if args.splits else find_equal_repeats(folds, args.repeats):
        screen.say(f"warning: {line}")
    lacking_splits = find_lacking_splits(folds, slides, args.label)
    if lacking_splits and not args.allow_missing:
        raise UserError(
            f"{len(lacking_splits)} split(s) lack a class, so some of their metrics are undefined\n"
            f"{format_list(lacking_splits)}\n"
            "  use fewer --folds or a larger --val, or continue with --allow-missing"
        )
    for line in lacking_splits:
        screen.say(f"warning: {line}: some of its metrics are undefined")
    write_files(output_files(args, folds, slides), args.out)
    screen.say(
        f"{len(folds)} fold(s): {args.out / 'splits.csv'}; CLAM's format: {args.out / 'clam'}"
    )
    return 0


def _print_counts(rows: Sequence[Sequence[str]], screen: Screen) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        screen.say("  ".join(word.rjust(n) for word, n in zip(row, widths, strict=True)))
