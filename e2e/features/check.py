"""Whether features come from the same encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from e2e.errors import UserError, format_list
from e2e.features.formats import (
    ENCODER,
)
from e2e.features.reader import FeatureFiles


def made_by(recipe: Mapping[str, Any]) -> str:
    """The encoder and a digest of its weights, as far as a store's recipe says; else empty."""
    said = (recipe.get(name) for name in (*ENCODER, "weights"))
    return " ".join(str(word) for word in said if word)


def may_be_same(one: str, other: str) -> bool:
    """Whether two of :func:`made_by` agree as far as both say: not all files tell encoder and weights."""
    return all(a == b for a, b in zip(one.split(), other.split(), strict=False))


def common_width(stores: Sequence[FeatureFiles]) -> int:
    """The width of all of them; UserError where that, or their encoders, differ."""
    makers = {store.path: made_by(store.recipe) for store in stores}
    known = {path: maker for path, maker in makers.items() if maker}
    if not all(may_be_same(*pair) for pair in combinations(known.values(), 2)):
        raise UserError(
            f"features of different encoders\n{format_list(f'{p}: {m}' for p, m in known.items())}\n"
            "  take features of one encoder"
        )
    widths = {store.path: store.width for store in stores}
    (first, width), *others = widths.items()
    for path, other in others:
        if other != width:
            raise UserError(
                f"features of different widths: {width} in {first}, {other} in {path}\n"
                "  take features of one encoder"
            )
    return width


def check_features(now: Mapping[str, Any], trained: Mapping[str, Any], run: Path) -> None:
    """UserError where features differ from those a run was trained on, as far as both are known."""
    known = [key for key in trained if now[key] and trained[key]]
    differ = [key for key in known if not may_be_same(str(now[key]), str(trained[key]))]
    if differ:
        lines = [f"{key}: {trained[key]} in training, {now[key]} now" for key in differ]
        raise UserError(
            f"{run} was trained on other features\n{format_list(lines)}\n"
            "  set data.features to those of the same encoder and weights"
        )
