"""Checks that features come from the same encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from e2e.errors import UserError, format_list
from e2e.features.formats import ENCODER_ATTRIBUTES
from e2e.features.reader import FeatureReader


def describe_encoder(recipe: Mapping[str, Any]) -> str:
    """Return the encoder of features and a digest of its weights, as far as known.

    Parameters
    ----------
    recipe : mapping
        The recipe of a feature reader.

    Returns
    -------
    str
        Such as ``"uni_v1 3f2a"``; empty if the recipe names no encoder.
    """
    words = (recipe.get(name) for name in (*ENCODER_ATTRIBUTES, "weights"))
    return " ".join(str(word) for word in words if word)


def may_be_same(first: str, second: str) -> bool:
    """Return whether two of :func:`describe_encoder` agree as far as both are known.

    Not all files name their encoder and its weights.
    """
    return all(a == b for a, b in zip(first.split(), second.split(), strict=False))


def common_width(readers: Sequence[FeatureReader]) -> int:
    """Return the number of features that all readers have in common.

    Raises
    ------
    UserError
        If their widths or their encoders differ.
    """
    encoders = {reader.path: describe_encoder(reader.recipe) for reader in readers}
    named = {path: encoder for path, encoder in encoders.items() if encoder}
    if not all(may_be_same(*pair) for pair in combinations(named.values(), 2)):
        lines = format_list(f"{path}: {encoder}" for path, encoder in named.items())
        raise UserError(f"features of different encoders\n{lines}\n  use features of one encoder")
    widths = {reader.path: reader.width for reader in readers}
    (first_path, width), *others = widths.items()
    for path, other_width in others:
        if other_width != width:
            raise UserError(
                f"features of different widths: {width} in {first_path}, {other_width} in {path}\n"
                "  use features of one encoder"
            )
    return width


def check_features(current: Mapping[str, Any], trained: Mapping[str, Any], run: Path) -> None:
    """Check that features match those that a run was trained on, as far as both are known.

    Parameters
    ----------
    current, trained : mapping
        Properties of the features, such as width and encoder. An empty value is unknown.
    run : Path
        Folder of the run, for the message.

    Raises
    ------
    UserError
        If a property differs.
    """
    comparable = [key for key in trained if current[key] and trained[key]]
    differing = [key for key in comparable if not may_be_same(str(current[key]), str(trained[key]))]
    if differing:
        lines = [f"{key}: {trained[key]} in training, {current[key]} now" for key in differing]
        raise UserError(
            f"{run} was trained on other features\n{format_list(lines)}\n"
            "  set data.features to features of the same encoder and weights"
        )
