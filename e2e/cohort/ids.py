"""Compare the ids of tables with those of the data, and find the difference that explains a mismatch."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import product
from typing import NamedTuple

from e2e.slides import show_id

SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ome.tif", ".ome.tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms"),
    *(".vmu", ".svslide", ".dcm", ".czi", ".qptiff", ".vsi", ".isyntax", ".mds", ".kfb", ".sdpc"),
)
"""Suffixes of slide files, which several tools leave in the names of their features: slide.svs.h5."""

MOSTLY = 0.9
"""Least share of the ids that a difference must explain to be named."""
NUM_EXAMPLES = 3
"""Near misses that are named."""
NEAR = 0.85
"""Least similarity of two ids that are named as a near miss, from 0 to 1."""


class IdRules(NamedTuple):
    """How the ids of tables are turned into those of the data."""

    suffix: str = ""
    """Removed from the end of each id."""
    separator: str | None = None
    """Separates several ids in a cell; None if each cell is one id."""
    file_name: bool = False
    """Whether folders before the name are removed."""
    ignore_case: bool = False
    """Whether upper and lower case are the same."""

    def parse(self, cell: str) -> list[str]:
        """Return the ids in a cell, without surrounding blanks.

        An empty string stands where there is nothing between two separators.
        """
        parts = cell.split(self.separator) if self.separator else [cell]
        return [self.parse_one(part.strip()) for part in parts]

    def parse_one(self, text: str) -> str:
        """Return a text that is one id without what the rules remove."""
        name = re.split(r"[/\\]", text)[-1] if self.file_name else text
        return name.removesuffix(self.suffix)

    def key(self, text: str) -> str:
        """Return what two ids have in common that are the same."""
        return normalise_id(text.casefold() if self.ignore_case else text)


NO_RULES = IdRules()
"""Ids are as in the data."""


def normalise_id(text: str) -> str:
    """Return an id in the Unicode form NFC: the same letters are then the same characters."""
    return unicodedata.normalize("NFC", text)


def pair_ids(ids: Collection[str], data_ids: Collection[str], rules: IdRules) -> dict[str, str]:
    """Find the ids of the data that are written in another way.

    Parameters
    ----------
    ids
        Ids of a table.
    data_ids
        Ids of stores, of features or of another table.
    rules
        Says whether upper and lower case differ. The Unicode form never does; and an id of the data
        may end in the suffix of a slide file, as that of ``slide.svs.h5``.

    Returns
    -------
    dict
        Id -> id of the data, for ids that are not among those of the data and equal exactly one of
        those that are not in the table.
    """
    missing, spare = set(ids) - set(data_ids), set(data_ids) - set(ids)
    candidates: dict[str, set[str]] = {}
    for name in spare if missing else ():
        key = rules.key(name)
        suffix = next((s for s in SLIDE_SUFFIXES if key.lower().endswith(s)), "")
        for form in {key, key[: len(key) - len(suffix)]}:
            candidates.setdefault(form, set()).add(name)
    pairs = {
        name: next(iter(matches))
        for name in missing
        if len(matches := candidates.get(rules.key(name), set())) == 1
    }
    uses = Counter(pairs.values())
    return {name: other for name, other in pairs.items() if uses[other] == 1}


def explain_unmatched_ids(
    ids: Collection[str],
    data_ids: Collection[str],
    *,
    rules: IdRules = NO_RULES,
    first: str = "label table",
    second: str = "stores",
) -> list[str]:
    """Explain why ids do not match: by a difference that all or most have, or by near misses.

    Parameters
    ----------
    ids
        Ids of a table that are not in the data.
    data_ids
        Ids of the data that are not in the table.
    rules
        How the ids of the table have been read.
    first
        What ``ids`` come from, for the message.
    second
        What ``data_ids`` come from, for the message.

    Returns
    -------
    list of str
        One line that says after which change how many ids match, which has been tried, and one with
        the settings that make it; or one with near misses. Empty if there are none.
    """
    ids = set(ids)
    if not ids or not data_ids:
        return []
    if change := _find_change(ids, set(data_ids), rules):
        return [
            f"{_count(change.num_matches, len(ids))} in the {first} {_verb(change.num_matches, len(ids))}"
            f" {change.describe()}",
            f"set {' '.join(change.settings(rules))}",
        ]
    ends = Counter(name[cut:] for name in data_ids for cut in _cuts(name) if name[:cut] in ids)
    for suffix, count in ends.most_common(1):
        if count >= MOSTLY * len(ids):
            return [
                f"{_count(count, len(ids))} in the {first} {_verb(count, len(ids))} after removing"
                f" '{suffix}' from the ids in the {second}",
                f"write the same ids in both: with '{suffix}' in the {first}, or without it in the"
                f" {second}",
            ]
    return _name_near_misses(ids, data_ids, second)


class _Change(NamedTuple):
    """A change of the ids of a table after which they are in the data."""

    file_name: bool
    suffix: str
    ignore_case: bool
    num_matches: int

    def describe(self) -> str:
        parts = []
        if self.file_name or self.suffix:
            removed = ["folders"] * self.file_name + [f"'{self.suffix}'"] * bool(self.suffix)
            parts.append(f"after removing {' and '.join(removed)}")
        if self.ignore_case:
            parts.append("if upper and lower case are ignored")
        return ", ".join(parts)

    def settings(self, rules: IdRules) -> list[str]:
        words = ["file_name"] * (self.file_name or rules.file_name)
        words += ["ignore_case"] * (self.ignore_case or rules.ignore_case)
        settings = [f"data.match=[{','.join(words)}]"] if self.file_name or self.ignore_case else []
        if self.suffix:
            settings.append(f"data.slide_suffix={self.suffix}{rules.suffix}")
        return settings


def _find_change(ids: set[str], data_ids: set[str], rules: IdRules) -> _Change | None:
    """Return the smallest change after which most ids are in the data, each another one."""
    for file_name, ignore_case in sorted(product((False, True), repeat=2), key=sum):
        new_rules = IdRules(file_name=file_name, ignore_case=ignore_case or rules.ignore_case)
        keys = {name: new_rules.key(new_rules.parse(name)[0]) for name in ids}
        data_keys = Counter(map(new_rules.key, data_ids))
        unique = {key for key, count in data_keys.items() if count == 1}
        suffixes = Counter(
            name[cut:] for name, key in keys.items() for cut in _suffix_cuts(name, key, unique)
        )
        for suffix in ["", *(suffix for suffix, _ in suffixes.most_common(1))]:
            changed = Counter(key.removesuffix(new_rules.key(suffix)) for key in keys.values())
            num_matches = sum(1 for key, n in changed.items() if n == 1 and key in unique)
            if num_matches >= MOSTLY * len(ids):
                return _Change(file_name, suffix, ignore_case, num_matches)
    return None


def _suffix_cuts(name: str, key: str, data_keys: Collection[str]) -> Iterable[int]:
    """Positions in a name from which on it is a suffix: without that its key is in the data."""
    for cut in _cuts(key):
        if key[:cut] in data_keys:
            yield len(name) - (len(key) - cut)


def _cuts(name: str) -> Iterable[int]:
    """Positions at which a suffix such as .svs or _HE may begin, which is not a part of the id."""
    return (k for k in range(1, len(name) - 1) if not name[k].isalnum())


def _count(matches: int, total: int) -> str:
    return "every id" if matches == total else f"{matches:,} of {total:,} ids"


def _verb(matches: int, total: int) -> str:
    return "matches" if matches == total else "match"


def _name_near_misses(ids: Collection[str], data_ids: Collection[str], second: str) -> list[str]:
    """Name the ids of the data that are nearly those of the table, for the first few."""
    pairs = [
        f"'{show_id(name)}' is nearly '{show_id(near[0])}'"
        for name in sorted(ids)[:NUM_EXAMPLES]
        if (near := difflib.get_close_matches(name, data_ids, 1, NEAR))
    ]
    return [f"near misses: {'; '.join(pairs)} in the {second}; correct the ids"] if pairs else []
