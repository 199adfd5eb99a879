"""Paths of data in settings: relative to the YAML file that names them, or absolute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

DATA_PATHS = ("labels", "stores", "scales", "features", "coords", "split_file")
"""Settings of the section ``data`` that hold paths."""


def resolve_data_paths(layer: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a layer of settings whose relative paths of data are below a folder.

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
    data = layer.get("data")
    if not isinstance(data, Mapping):
        return dict(layer)
    paths = {key: _resolve(data[key], folder.absolute()) for key in DATA_PATHS if key in data}
    return {**layer, "data": {**data, **paths}}


def _resolve(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_resolve(item, folder) for item in value]
    return str(folder / Path(value).expanduser()) if isinstance(value, str) and value else value
