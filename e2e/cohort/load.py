"""Load a cohort: table, splits, matching with stores or features, checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from e2e.bags.loader import label_slides
from e2e.bags.spec import LabelledSlide
from e2e.cohort.cases import check_single, group_by_case
from e2e.cohort.leaks import check_copies
from e2e.cohort.match import check_sides, match_scales, match_slides
from e2e.cohort.report import write_problems
from e2e.cohort.split_files import Folds, names_cases, pick_fold, read_splits
from e2e.cohort.splits import (
    HONEST,
    Protocol,
    assign,
    check_cases,
    check_splits,
    cut,
    find_missing_classes,
)
from e2e.cohort.table import Problem, read_table
from e2e.errors import UserError, format_list
from e2e.features.check import common_width
from e2e.features.reader import FeatureFiles, open_features
from e2e.log import Screen
from e2e.settings.schema import Cut, Data
from e2e.slides import Slide
from e2e.store.open import expand_store_paths, open_store
from e2e.store.records import PatchReader
from e2e.tasks.base import Task


def load_cohort(
    data: Data,
    task: Task,
    *,
    name: str,
    seed: int,
    problems_file: Path | None,
    size: int | None = None,
    features: bool = False,
    protocol: Protocol = HONEST,
) -> tuple[list[LabelledSlide], list[Problem]]:
    """The cohort's slides, or its cases, checked, split and matched with their patches.

    Args:
        problems_file: where the whole list of unusable rows goes; None on ranks that do not lead,
            which say nothing either.
        size: to which all patches are brought; None: they stay as stored.
        features: take ``data.features`` in place of the stores.
        protocol: what the splits are used for.

    Returns:
        The slides, and what was left out under ``data.unmatched=drop``.

    Raises:
        UserError: data are missing, a row is unusable, or the splits are not honest.
    """
    require_files(data, name, task.columns, features=features)
    slides, problems = read_table(
        data.labels,
        columns=_columns(data),
        targets=task.columns,
        split_names=data.splits,
        slide_suffix=data.slide_suffix,
        slide_separator=data.slide_separator,
    )
    used, strange = _split_by_file(slides, data)
    known, unknown = _with_known_labels(used, task)
    # A store's slide that no known slide is may yet have its row.
    rows = {slide.id for slide in slides} | {problem.slide for problem in problems}
    aside = rows - {slide.id for slide in known}
    scales = [open_feature_readers(data)] if features else open_patch_readers(data)
    first, unmatched = match_slides(known, scales[0])
    problems += [*strange, *unknown, *(p for p in unmatched if p.slide not in aside)]
    _settle(problems, data, name, problems_file)
    screen = Screen(is_leader=problems_file is not None)
    kept = [slide for slide in known if slide.id in first]
    kept = _resplit(kept, protocol, data.cut, by=task.columns[0], seed=seed, screen=screen)
    check_splits(kept, needs=protocol.needs)
    trained = [slide for slide in kept if slide.split == "train"]
    more, lacking = match_scales(trained, scales[1:])
    problems += lacking
    _settle(problems, data, name, problems_file)
    kept = [slide for slide in kept if slide.split != "train" or slide.id in more]
    check_splits(kept, needs=protocol.needs)
    stores = {slide.id: [first[slide.id], *more.get(slide.id, [])] for slide in kept}
    if not features:
        check_sides(stores, size)
    check_copies(kept, first)
    if data.unit == "case":
        kept, stores = group_by_case(kept, stores)
    elif task.of_cases:
        for line in check_single(kept):
            screen.say(f"NOTE {line}")
    items = label_slides(kept, stores, task.encode)
    for line in check_classes(items, task):
        screen.say(f"NOTE {line}")
    return items, problems


def _resplit(
    slides: list[Slide], protocol: Protocol, shares: Cut, *, by: str, seed: int, screen: Screen
) -> list[Slide]:
    """With the protocol's splits, and those of ``data.cut`` that no slide has yet: a test of the table or of
    a fold stays."""
    slides = [replace(s, split=protocol.joined.get(s.split, s.split)) for s in slides]
    check_cases(slides)  # before the cut, which moves a case whole
    for split in protocol.cuts:
        share = getattr(shares, split)
        if share and any(slide.split == split for slide in slides):
            screen.say(
                f"NOTE data.cut.{split} cuts nothing, since there are slides of '{split}' already"
            )
        elif share:
            slides = cut(slides, split, share, by=by, seed=seed)
    return slides


def _split_by_file(slides: list[Slide], data: Data) -> tuple[list[Slide], list[Problem]]:
    """The slides that the fold of ``data.split_file`` uses, in its splits; and whom it does not know."""
    if not data.split_file:
        return slides, []
    path = Path(data.split_file)
    if not path.exists():
        raise UserError(f"no split file at {path}\n  set data.split_file=FILE, or a folder of them")
    folds = read_folds(data, path)
    fold = pick_fold(folds, data.fold, path)
    cases = names_cases(path, data.columns.slide, data.columns.case)
    return assign(slides, folds[fold], f"{path.name}, fold {fold}", cases=cases)


def read_folds(data: Data, path: Path) -> Folds:
    """:func:`e2e.cohort.split_files.read_splits`, with slides and cases named as in the label table."""
    return read_splits(
        path,
        data.columns.slide,
        data.columns.case,
        slide_suffix=data.slide_suffix,
        slide_separator=data.slide_separator,
    )


def check_classes(items: Sequence[LabelledSlide], task: Task) -> list[str]:
    """A line for each split that lacks a class which another has, a label, or events."""
    classes = {item.slide.id: task.kinds(item.target) for item in items}
    splits = {item.slide.id: item.slide.split for item in items}
    undefined = "metrics that need every class are not defined there"
    meaning = {"train": "it cannot be learned", "val": f"{undefined}, nor choose an epoch"}
    return [
        f"{split} has no {' and no '.join(lacking)}: {meaning.get(split, undefined)}"
        for split, lacking in find_missing_classes(splits, classes).items()
    ]


def _settle(problems: Sequence[Problem], data: Data, name: str, file: Path | None) -> None:
    """Write the list of what cannot be used; UserError unless it is to be dropped."""
    if problems and file is not None:
        write_problems(problems, file)
    if problems and data.unmatched == "error":
        where = f"  all of them: {file}\n" if file else ""
        tables = f"{data.labels}, {data.split_file}" if data.split_file else data.labels
        raise UserError(
            f"{tables} and the stores of cohort '{name}' do not agree in {len(problems)} place(s)\n"
            f"{format_list(problems)}\n{where}"
            "  mend the table or pack the slides, or set data.unmatched=drop to go on without them"
        )


def open_feature_readers(data: Data) -> list[FeatureFiles]:
    """Those of ``data.features``, all of one width."""
    paths = [path for entry in data.features for path in expand_store_paths(entry)]
    found = [open_features(path) for path in paths]
    common_width(found)
    return found


def open_patch_readers(data: Data) -> list[list[PatchReader]]:
    """The stores of each magnification, ``data.stores`` first."""
    return [
        [open_store(path, data.coords) for entry in entries for path in expand_store_paths(entry)]
        for entries in (data.stores, *data.scales)
    ]


def require_files(data: Data, name: str, targets: Sequence[str], *, features: bool = False) -> None:
    """UserError that says what the cohort needs, where it goes, and how it is made."""
    stores = [entry for entries in (data.stores, *data.scales) for entry in entries]
    kind, entries = ("features", data.features) if features else ("patch store", stores)
    if not data.labels or not entries:
        what = "data.features=[FOLDER]" if features else "data.stores=[FILE.lmdb]"
        raise UserError(
            f"cohort '{name}' needs data.labels=FILE.csv and {what}\n  {_how_made(kind, 'FOLDER', data)}"
        )
    needed = [("label table", data.labels), *((kind, entry) for entry in entries)]
    missing = [
        (kind, path)
        for kind, path in needed
        if not any(file.exists() for file in expand_store_paths(path))
    ]
    if not missing:
        return
    lines = [f"the data of cohort '{name}' are not here"]
    lines += [f"  {kind}: {path} is missing" for kind, path in missing]
    if data.source:
        lines.append(f"  source: {data.source}")
    if any(kind == "label table" for kind, _ in missing):
        names = dict.fromkeys(name for name in (*_columns(data).values(), *targets) if name)
        lines.append(
            f"  put the label table at {data.labels} (columns {', '.join(names)}),"
            " or set data.labels=FILE.csv"
        )
    for kind, path in missing:
        if kind != "label table" and "*" not in path:
            lines.append(f"  {_how_made(kind, path, data)}")
    lines.append("  without slides of your own: make demo")
    raise UserError("\n".join(lines))


def _how_made(kind: str, path: str, data: Data) -> str:
    if kind == "features":
        stores = " ".join(data.stores) or "FILE.lmdb"
        return f"make the features: python launch/extract.py --stores {stores} --encoder NAME --out {path}"
    return f"make the store: python tools/pack_lmdb.py --slides SLIDES --out {path} {data.pack}".rstrip()


def _with_known_labels(slides: Sequence[Slide], task: Task) -> tuple[list[Slide], list[Problem]]:
    """The slides with a label, be it in part; the others, and those whose words the task refuses."""
    known, problems = [], []
    for slide in slides:
        try:
            if task.is_labelled(task.encode(slide.target)):
                known.append(slide)
            else:
                blank = ", ".join(column for column, word in slide.target.items() if not word)
                problems.append(Problem(slide.id, "label table", f"no value for {blank}"))
        except UserError as error:
            problems.append(Problem(slide.id, "label table", str(error)))
    return known, problems


def _columns(data: Data) -> dict[str, str | None]:
    """Our word -> the label table's column, of what the splits' own file does not say."""
    columns = data.columns
    split = None if data.split_file else columns.split
    return {
        "case": columns.case,
        "slide": columns.slide,
        "split": split,
        "centre": columns.centre,
    }
