"""Describe a cohort in a few lines: its columns, splits, centres and magnification."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from e2e.bags.spec import LabelledSlide
from e2e.cohort.folds import TCGA, tcga_sites
from e2e.cohort.spec import CohortSpec
from e2e.cohort.splits import SPLITS
from e2e.cohort.table import join_words
from e2e.slides import Slide
from e2e.tasks.base import Task

MAX_LINES = 20
"""Different words of a column, or centres, that are listed."""


def describe_table(spec: CohortSpec, task: Task, slides: Sequence[Slide]) -> list[str]:
    """Describe how the columns of the label table are used, and which words they hold.

    Parameters
    ----------
    spec
        The cohort.
    task
        Its ``columns`` are described.
    slides
        All slides of the table. Words are counted once a case if ``spec.unit`` is 'case'.

    Returns
    -------
    list of str
        The lines to print.
    """
    split = f"{spec.split_file}, fold {spec.fold}" if spec.split_file else spec.split_column
    case = spec.case_column or "none, each row is a case"
    centre = f"; centre: {spec.centre_column}" if spec.centre_column else ""
    units = {slide.case if spec.unit == "case" else slide.id: slide for slide in slides}
    lines = [
        f"{spec.labels}: {len(slides):,} slides, {len({s.case for s in slides}):,} cases",
        f"  slide: {spec.slide_column}; case: {case}; split: {split or 'none, see data.cut'}{centre}",
    ]
    for column in task.columns:
        counts = Counter(slide.target[column] for slide in units.values())
        listed = ", ".join(
            f"'{word}' {counts[word]:,}" if word else f"(blank) {counts[word]:,}"
            for word in sorted(counts)
        )
        if len(counts) > MAX_LINES:
            listed = f"{len(counts):,} different, such as {', '.join(list(counts)[:3])}"
        lines.append(f"  {column}: {listed}")
    return lines


def num_slides(item: LabelledSlide) -> int:
    """Return the number of slides in a bag: 1, or those of the case."""
    return len(item.reader.joined_slides(item.slide.id))


def describe_splits(
    items: Sequence[LabelledSlide], task: Task, *, count_patches: bool
) -> list[str]:
    """Describe each split: its slides, cases, patches and targets.

    Parameters
    ----------
    items
        The slides of the cohort.
    task
        Describes the targets.
    count_patches
        Whether to count the patches.

    Returns
    -------
    list of str
        One line for each split.
    """
    lines = []
    for split in SPLITS:
        members = [item for item in items if item.slide.split == split]
        cases = len({item.slide.case for item in members})
        line = f"{split:5}  {sum(map(num_slides, members)):,} slides, {cases:,} cases"
        if count_patches:
            line += f", {sum(item.reader.num_patches(item.slide.id) for item in members):,} patches"
        if members:
            line += f": {task.describe([item.target for item in members])}"
        lines.append(line)
    return lines


def describe_sites(
    items: Sequence[LabelledSlide], sites: Mapping[str, str], task: Task
) -> list[str]:
    """Describe each centre, the largest first: its cases in each split, and their targets.

    Parameters
    ----------
    items
        The slides of the cohort.
    sites
        Case -> its centre.
    task
        Describes the targets.

    Returns
    -------
    list of str
        A summary, and one line for each of the ``MAX_LINES`` largest centres.
    """
    items_of: dict[str, list[LabelledSlide]] = {}
    for item in items:
        items_of.setdefault(sites[item.slide.case], []).append(item)
    lines = []
    for site, members in sorted(items_of.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        counts = ", ".join(
            f"{split} {len({i.slide.case for i in members if i.slide.split == split}):,}"
            for split in SPLITS
        )
        targets = task.describe([item.target for item in members])
        lines.append(f"  {site or '(no centre)'}: cases {counts}; {targets}")
    divided = sum(len({item.slide.split for item in members}) > 1 for members in items_of.values())
    summary = f"{len(items_of)} centres, {divided} of them in more than one split"
    rest = [f"  ... and {len(lines) - MAX_LINES} smaller ones"] if len(lines) > MAX_LINES else []
    return [summary, *lines[:MAX_LINES], *rest]


def case_sites(slides: Sequence[Slide], site: str) -> dict[str, str]:
    """Return the centre of each case.

    Parameters
    ----------
    slides
        The slides of the cohort, with their centres.
    site
        ``tcga`` to take the centres from barcodes; else they are those of the slides.

    Returns
    -------
    dict
        Case -> its centre, or its centres joined by ``+``.

    Raises
    ------
    UserError
        A case id is not a TCGA barcode.
    """
    if site == TCGA:
        return tcga_sites({slide.case for slide in slides})
    centres: dict[str, set[str]] = {}
    for slide in slides:
        centres.setdefault(slide.case, set()).add(slide.centre)
    return {case: join_words(words) for case, words in centres.items()}


def find_tcga_patients_in_two_splits(items: Sequence[LabelledSlide]) -> list[str]:
    """Return the TCGA patients that are in more than one split, whatever their case ids are.

    Parameters
    ----------
    items
        The slides of the cohort. The patient is the first 12 characters of a slide's barcode.

    Returns
    -------
    list of str
        Patient and splits, one line each.
    """
    splits: dict[str, set[str]] = {}
    for item in items:
        if item.slide.id.startswith("TCGA-"):
            splits.setdefault(item.slide.id[:12], set()).add(item.slide.split)
    return [
        f"{patient}: {', '.join(sorted(names))}"
        for patient, names in sorted(splits.items())
        if len(names) > 1
    ]


def describe_mpp(items: Sequence[LabelledSlide]) -> str:
    """Describe the micrometres per pixel of the patches, and for how many slides they are unknown.

    Parameters
    ----------
    items
        The slides of the cohort.

    Returns
    -------
    str
        One line.
    """
    mpps = [item.record.mpp for item in items]
    values = sorted({mpp for mpp in mpps if mpp is not None})
    ends = " to ".join(f"{mpp:.4g}" for mpp in values[:: max(1, len(values) - 1)])
    line = f"um per pixel: {ends or 'unknown'}"
    if values and None in mpps:
        line += f"; unknown for {mpps.count(None):,} of {len(items):,}"
    return line
