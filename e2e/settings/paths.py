"""Paths of data and weights in settings: relative to the YAML file that names them, or absolute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

DATA_PATHS = ("labels", "stores", "scales", "features", "coords", "split_file")
"""Settings of the section ``data`` that hold paths."""
WEIGHTS = "weights"
"""The option of an encoder that is a path."""


def resolve_data_paths(layer: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a layer of settings whose relative paths of data and weights are below a folder.

    Parameters
    ----------
    layer
        Section -> key -> value.
    folder
        The folder of the YAML file, or the working directory.

    Returns
    -------
    dict
        The same with absolute paths; globs stay globs, and ``~`` the home folder.
    """
    resolved = dict(layer)
    for section, keys in (("data", DATA_PATHS), ("encoder", (WEIGHTS,))):
        values = layer.get(section)
        if isinstance(values, Mapping):
            paths = {key: resolve_paths(values[key], folder) for key in keys if key in values}
            resolved[section] = {**values, **paths}
    return resolved


def resolve_paths(value: Any, folder: Path) -> Any:
    """Return a path, or the paths in a list of any depth, below a folder; other values as they are."""
    if isinstance(value, list):
        return [resolve_paths(item, folder) for item in value]
    if not isinstance(value, str) or not value:
        return value
    return str(folder.absolute() / Path(value).expanduser())
