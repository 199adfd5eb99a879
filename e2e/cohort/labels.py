"""Select the slides that have a label, and explain labels that the task does not accept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from e2e.bags.spec import LabelledSlide
from e2e.cohort.match import LABEL_TABLE
from e2e.cohort.splits import find_missing_classes
from e2e.cohort.table import Problem
from e2e.errors import UserError
from e2e.slides import Slide
from e2e.tasks.base import Task

MAX_WORDS = 20
"""Different words of a label column that a message lists."""


def select_labelled(slides: Sequence[Slide], task: Task) -> tuple[list[Slide], list[Problem]]:
    """Return the slides that have a label, and a problem for each of the others.

    Parameters
    ----------
    slides
        Slides of the label table.
    task
        Encodes the labels.

    Returns
    -------
    labelled : list of Slide
        Slides of which the task knows at least one label.
    problems : list of Problem
        Slides whose labels are all blank, or that have a word which the task does not accept.
    """
    labelled: list[Slide] = []
    problems: list[Problem] = []
    words = describe_unknown_classes(slides, task)
    for slide in slides:
        try:
            is_labelled = task.is_labelled(task.encode(slide.target))
        except UserError as error:
            problems.append(Problem(slide.id, LABEL_TABLE, str(error), group=words))
            continue
        if is_labelled:
            labelled.append(slide)
        else:
            blank = ", ".join(column for column, word in slide.target.items() if not word)
            problems.append(Problem(slide.id, LABEL_TABLE, f"no value for {blank}"))
    return labelled, problems


def describe_unknown_classes(slides: Sequence[Slide], task: Task) -> str:
    """Describe a label column with words that are not among the classes of the task.

    Parameters
    ----------
    slides
        Slides of the label table.
    task
        The task.

    Returns
    -------
    str
        For example ``column 'label' holds normal (43 rows), tumor (29); task.classes is [benign,
        malignant]``. Empty if all words are classes, or the task has none.
    """
    counts = _count_words(slides, task)
    if not set(counts) - set(task.classes):
        return ""
    first, *others = counts.most_common(MAX_WORDS)
    listed = [f"{first[0]} ({first[1]} row{'s' if first[1] > 1 else ''})"]
    listed += [f"{word} ({count})" for word, count in others]
    if len(counts) > MAX_WORDS:
        listed.append(f"and {len(counts) - MAX_WORDS} other words")
    return (
        f"column '{task.columns[0]}' holds {', '.join(listed)}; "
        f"task.classes is [{', '.join(task.classes)}]"
    )


def suggest_classes(slides: Sequence[Slide], task: Task) -> list[str]:
    """Suggest what to change where a label column has words that are not classes of the task.

    Parameters
    ----------
    slides
        Slides of the label table.
    task
        The task.

    Returns
    -------
    list of str
        One line; none if all words are classes, or the task has none.
    """
    counts = _count_words(slides, task)
    unknown = set(counts) - set(task.classes)
    if not unknown:
        return []
    if all(word.removesuffix(".0") in task.classes for word in unknown):
        return [
            "every label matches after removing '.0': a program wrote whole numbers as decimals; save"
            f" the column '{task.columns[0]}' as text"
        ]
    word_of = {word.casefold(): word for word in counts}
    if len(word_of) == len(counts) and all(name.casefold() in word_of for name in task.classes):
        words = [word_of.pop(name.casefold()) for name in task.classes]
        if not word_of:
            return [
                "every label matches if upper and lower case are ignored: "
                f"set task.classes={_format_list_setting(words)}"
            ]
    words = [name for name in task.classes if name in counts] + sorted(unknown, key=_natural_order)
    if not 2 <= len(words) <= MAX_WORDS:
        return ["set task.column to the column of the classes"]
    setting = f"set task.classes={_format_list_setting(words)}"
    return [setting if len(unknown) == len(counts) else f"correct the labels, or {setting}"]


def check_classes(items: Sequence[LabelledSlide], task: Task) -> list[str]:
    """Return a warning for each split that lacks a class, a label or events that another has.

    Parameters
    ----------
    items
        The labelled slides with their splits.
    task
        Says which kinds of slides there are.

    Returns
    -------
    list of str
        One line for each split that lacks something.
    """
    classes = {item.slide.id: task.categories(item.target) for item in items}
    splits = {item.slide.id: item.slide.split for item in items}
    undefined = "metrics that need every class are undefined on this split"
    consequence = {
        "train": "it cannot be learned",
        "val": f"{undefined} and cannot select the epoch",
    }
    return [
        f"{split} has no {' and no '.join(missing)}: {consequence.get(split, undefined)}"
        for split, missing in find_missing_classes(splits, classes).items()
    ]


def _count_words(slides: Sequence[Slide], task: Task) -> Counter[str]:
    """Count the words of the label column of a task with classes; blanks do not count."""
    if not task.classes:
        return Counter()
    words = (slide.target[task.columns[0]] for slide in slides)
    return Counter(sorted(word for word in words if word))


def _natural_order(word: str) -> tuple[float, str]:
    try:
        return float(word), word
    except ValueError:
        return float("inf"), word


def _format_list_setting(words: Sequence[str]) -> str:
    """Return words as a list on the command line: [a,b], quoted where it is needed."""
    plain = all(re.fullmatch(r"[\w.+-]+", word) for word in words)
    quoted = [word if plain else "'" + word.replace("'", "''") + "'" for word in words]
    return f"[{','.join(quoted)}]" if plain else f'"[{",".join(quoted)}]"'
