"""The settings and their defaults are those in settings.txt: a new one, or another default, is a decision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from e2e.settings.schema import Settings

FROZEN = Path(__file__).parent / "settings.txt"


def defaults(schema: type, path: str = "") -> Iterator[str]:
    """A line ``section.key = default`` for each setting. Options of plug-ins are not among them."""
    types = get_type_hints(schema)
    for field in fields(schema):
        name = f"{path}{field.name}"
        if is_dataclass(types[field.name]):
            yield from defaults(types[field.name], f"{name}.")
            continue
        default: Any = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        yield f"{name} = {'(none)' if default is MISSING else repr(default)}"


def test_settings_and_defaults_are_the_frozen_ones():
    """Every setting is one more thing to learn, and every default is a promise to recorded runs.

    After a decision for a new setting or another default, edit the line in settings.txt and give the
    reason in the commit.
    """
    assert list(defaults(Settings)) == FROZEN.read_text().splitlines()
