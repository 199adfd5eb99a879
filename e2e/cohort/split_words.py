"""Suggest what the words in a split column mean."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from e2e.cohort.splits import SPLITS
from e2e.cohort.table import Problem

UNKNOWN = re.compile("split '(.*)' is not one of .*", re.DOTALL)
"""The problem of a row whose split has another name."""
MAX_WORDS = 10
"""Words of a split column that a message lists."""
SYNONYMS = {
    "train": ("train", "training", "tr", "trn", "development", "dev", "discovery"),
    "val": ("val", "valid", "validation", "validate", "tuning", "tune", "internal_validation"),
    "test": ("test", "testing", "tst", "ts", "holdout", "hold-out", "held-out", "heldout", "eval"),
}
"""Split -> what others call it, in lower case."""


def suggest_split_names(problems: Sequence[Problem]) -> list[str]:
    """Suggest the setting that makes the words of a split column valid.

    Parameters
    ----------
    problems
        The problems of the rows of a label table.

    Returns
    -------
    list of str
        The words with their counts, and the setting to paste; empty if no word is unknown.
    """
    matches = (UNKNOWN.fullmatch(problem.problem) for problem in problems)
    counts = Counter(match[1] for match in matches if match and match[1])
    if not counts:
        return []
    meanings = {synonym: split for split in SPLITS for synonym in SYNONYMS[split]}
    guesses = {word: meanings.get(word.casefold(), "") for word in counts}
    held = ", ".join(f"{word} ({count})" for word, count in counts.most_common(MAX_WORDS))
    pairs = ", ".join(f"{_quote(word)}: {split or 'train'}" for word, split in guesses.items())
    if len(counts) > MAX_WORDS:
        return ["set data.columns.split to the column of the splits, or to null"]
    if all(guesses.values()):
        return [f"the split column also holds {held}", f"set 'data.splits={{{pairs}}}'"]
    return [
        f"the split column also holds {held}",
        f"set what each word means: 'data.splits={{{pairs}}}' (train, val or test)",
    ]


def _quote(word: str) -> str:
    """Return a word as a YAML key inside single quotes of the shell."""
    return word if word.replace("_", "").isalnum() else '"' + word.replace('"', '\\"') + '"'
