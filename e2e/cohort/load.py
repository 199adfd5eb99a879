"""Load a cohort: read its table, split it, match it with patches or features, and check it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from e2e.bags.loader import label_slides
from e2e.bags.spec import LabelledSlide
from e2e.cohort.cases import check_one_label_per_case, group_by_case
from e2e.cohort.data import CohortData, FeatureData, PatchData
from e2e.cohort.ids import explain_unmatched_ids, pair_ids
from e2e.cohort.labels import check_classes, select_labelled, suggest_classes
from e2e.cohort.match import (
    NOT_IN_STORE,
    NOT_IN_TABLE,
    match_scales,
    match_slides,
)
from e2e.cohort.readers import open_feature_readers, open_patch_readers, require_files
from e2e.cohort.report import report_unusable_rows, warn_of_dropped
from e2e.cohort.spec import CohortSpec
from e2e.cohort.split_files import Folds, ids_are_cases, pick_fold, read_splits
from e2e.cohort.split_words import suggest_split_names
from e2e.cohort.splits import (
    HONEST,
    SplitProtocol,
    assign_splits,
    check_cases,
    check_splits,
    cut_split,
)
from e2e.cohort.table import Problem, read_table
from e2e.errors import UserError
from e2e.log import Screen
from e2e.slides import ABSOLUTE_PATH, Slide
from e2e.store.records import SlideReader
from e2e.tasks.base import Task

R = TypeVar("R", bound=SlideReader)


def load_cohort(
    spec: CohortSpec,
    task: Task,
    *,
    seed: int = 0,
    features: bool = False,
    size: int | None = None,
    protocol: SplitProtocol = HONEST,
    problems_file: Path | None = None,
) -> tuple[list[LabelledSlide], list[Problem]]:
    """Load the slides of a cohort, or its cases, with their labels, splits and patches or features.

    Parameters
    ----------
    spec
        Where the label table, splits and data are.
    task
        Encodes the labels. It need not be fitted.
    seed
        Random seed of splits that are cut from the training cases.
    features
        Whether the slides have frozen features rather than patches.
    size
        Side in pixels that all patches are resized to; None if they stay as stored.
    protocol
        What the splits are used for.
    problems_file
        Where the list of unusable rows is written; None on ranks that do not lead, which print
        nothing either.

    Returns
    -------
    items : list of LabelledSlide
        The slides, or the cases if ``spec.unit`` is 'case'.
    problems : list of Problem
        What was left out; empty unless ``spec.unmatched`` is 'drop'.

    Raises
    ------
    UserError
        Data are missing, a row or slide is unusable, or the splits are invalid: a case or a copied
        slide is in two splits, or a split that is needed is empty.
    """
    require_files(spec, task.columns, features=features)
    if features:
        data = FeatureData([open_feature_readers(spec.features)])
        return _load_data(spec, task, data, seed, protocol, problems_file)
    stores = open_patch_readers((spec.stores, *spec.scales), spec.coords, verify=spec.verify)
    return _load_data(spec, task, PatchData(stores, size), seed, protocol, problems_file)


def _load_data(
    spec: CohortSpec,
    task: Task,
    data: CohortData[R],
    seed: int,
    protocol: SplitProtocol,
    problems_file: Path | None,
) -> tuple[list[LabelledSlide], list[Problem]]:
    """Load a cohort whose data are open."""
    screen = Screen(is_leader=problems_file is not None)
    report = partial(
        report_unusable_rows,
        policy=spec.unmatched,
        tables=spec.tables,
        cohort=spec.name,
        report_path=problems_file,
    )
    table, problems = _read_label_table(spec, task)
    used, split_problems = apply_split_file(table, spec)
    pairs = _pair_with_data(table, data, spec)
    table, used = ([replace(s, id=pairs.get(s.id, s.id)) for s in rows] for rows in (table, used))
    labelled, label_problems = select_labelled(used, task)
    # What is left out must be known before the task is fitted; otherwise it is an error where it is read.
    check_content = data.check_content if spec.unmatched == "drop" else None
    matches, match_problems = match_slides(labelled, data.scales[0], check_content=check_content)
    # A slide of a store may have a row that is not used: then the row is the problem, if any.
    other_rows = {slide.id for slide in table} | {problem.slide for problem in problems}
    other_rows -= {slide.id for slide in labelled}
    match_problems = [p for p in match_problems if p.slide not in other_rows]
    explained = [*problems, *match_problems]
    problems += [*split_problems, *label_problems, *match_problems]
    slides = [slide for slide in labelled if slide.id in matches]
    explanations = _explain_problems(problems, split_problems, explained, table, used, task, spec)
    report(problems, num_usable=len(slides), explanations=explanations)

    slides = cut_missing_splits(
        slides, spec, protocol, by=task.columns[0], seed=seed, screen=screen
    )
    check_splits(slides, required=protocol.required)
    training = [slide for slide in slides if slide.split == "train"]
    scale_matches, scale_problems = match_scales(training, data.scales[1:])
    problems += scale_problems
    slides = [s for s in slides if s.split != "train" or s.id in scale_matches]
    report(problems, num_usable=len(slides))
    check_splits(slides, required=protocol.required)

    readers = {s.id: [matches[s.id], *scale_matches.get(s.id, [])] for s in slides}
    data.check(slides, readers)
    warnings = warn_of_dropped(problems, problems_file)
    if spec.unit == "case":
        slides, readers = group_by_case(slides, readers, data.join_case)
    elif task.is_case_level:
        warnings += check_one_label_per_case(slides)
    items = label_slides(slides, readers, task.encode)
    for line in [*warnings, *check_classes(items, task)]:
        screen.say(f"warning: {line}")
    return items, problems


def _explain_problems(
    problems: Sequence[Problem],
    split_problems: Sequence[Problem],
    match_problems: Sequence[Problem],
    table: Sequence[Slide],
    used: Sequence[Slide],
    task: Task,
    spec: CohortSpec,
) -> list[str]:
    """Return what to change, for each kind of problem of which it is known."""
    return [
        *_explain_split_file(split_problems, table, spec),
        *suggest_split_names(problems),
        *suggest_classes(used, task),
        *_explain_stores(match_problems, spec),
    ]


def _pair_with_data(
    table: Sequence[Slide], data: CohortData[R], spec: CohortSpec
) -> dict[str, str]:
    """Return id of the table -> id of the data, for ids that are written in another way there."""
    data_ids = {slide for reader in data.scales[0] for slide in reader.slides}
    return pair_ids({slide.id for slide in table}, data_ids, spec.rules)


def _read_label_table(spec: CohortSpec, task: Task) -> tuple[list[Slide], list[Problem]]:
    return read_table(
        spec.labels,
        columns=spec.columns,
        targets=task.columns,
        split_names=spec.split_names,
        rules=spec.rules,
    )


def apply_split_file(
    slides: Sequence[Slide], spec: CohortSpec
) -> tuple[list[Slide], list[Problem]]:
    """Give the slides the splits of the split file, if the cohort has one.

    Parameters
    ----------
    slides
        All slides of the label table.
    spec
        Names the split file and the fold.

    Returns
    -------
    slides : list of Slide
        The slides that the fold uses.
    problems : list of Problem
        Ids of the file without a slide, and slides without an id in the file.

    Raises
    ------
    UserError
        There is no such file or fold, or the file cannot be read.
    """
    if not spec.split_file:
        return list(slides), []
    path = Path(spec.split_file)
    if not path.exists():
        raise UserError(
            f"no split file at {path}\n  set data.split_file to a file or folder of splits"
        )
    folds = read_cohort_folds(spec, path)
    fold = pick_fold(folds, spec.fold, path)
    by_case = ids_are_cases(path, spec.slide_column, spec.case_column)
    ids = {slide.id for slide in slides} | {slide.case for slide in slides}
    pairs = pair_ids(folds[fold], ids, spec.rules)
    splits = {pairs.get(name, name): split for name, split in folds[fold].items()}
    return assign_splits(slides, splits, f"{path.name}, fold {fold}", by_case=by_case)


def read_cohort_folds(spec: CohortSpec, path: Path) -> Folds:
    """Read the folds of a split file, with the ids written as in the cohort's label table.

    Parameters
    ----------
    spec
        Says how slides and cases are named.
    path
        The file or folder; see :func:`e2e.cohort.split_files.read_splits`.

    Returns
    -------
    dict
        Fold -> id -> split.
    """
    return read_splits(
        path,
        spec.slide_column,
        spec.case_column,
        rules=spec.rules,
    )


def cut_missing_splits(
    slides: Sequence[Slide],
    spec: CohortSpec,
    protocol: SplitProtocol,
    *,
    by: str,
    seed: int,
    screen: Screen,
) -> list[Slide]:
    """Merge splits as the protocol says, and cut those that no slide has from the training cases.

    A split that the table or the fold has is never cut again.

    Parameters
    ----------
    slides
        The slides with the splits of the table.
    spec
        Says which shares are cut.
    protocol
        What the splits are used for.
    by
        Column of the target to stratify by.
    seed
        Random seed of the cut.
    screen
        Where a warning is printed about a share that has no effect.

    Returns
    -------
    list of Slide
        The slides with their final splits.

    Raises
    ------
    UserError
        A case is in two splits.
    """
    merged = [replace(s, split=protocol.merged_into.get(s.split, s.split)) for s in slides]
    check_cases(merged)  # before the cut, which moves a case as a whole
    shares = {"val": spec.val_share, "test": spec.test_share}
    for split in protocol.cut_splits:
        if not shares[split]:
            continue
        if any(slide.split == split for slide in merged):
            screen.say(
                f"warning: data.cut.{split} has no effect: there are slides in '{split}' already"
            )
        else:
            merged = cut_split(merged, split, shares[split], by=by, seed=seed)
    return merged


def _explain_stores(problems: Sequence[Problem], spec: CohortSpec) -> list[str]:
    """Explain why no id of the label table is in the stores, if one difference explains all."""
    table_ids = [p.slide for p in problems if p.problem.startswith((NOT_IN_STORE, ABSOLUTE_PATH))]
    store_ids = [p.slide for p in problems if p.problem == NOT_IN_TABLE]
    return explain_unmatched_ids(table_ids, store_ids, rules=spec.rules)


def _explain_split_file(
    problems: Sequence[Problem], table: Sequence[Slide], spec: CohortSpec
) -> list[str]:
    """Explain why no id of the split file is in the label table, if one difference explains all."""
    file_ids = [p.slide for p in problems if p.problem == NOT_IN_TABLE]
    for table_ids in ({slide.id for slide in table}, {slide.case for slide in table}):
        explanation = explain_unmatched_ids(
            file_ids,
            table_ids,
            rules=spec.rules,
            first="split file",
            second="label table",
        )
        if explanation:
            return explanation
    return []
