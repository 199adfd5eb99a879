"""The YAML files that come with the package: cohorts, models, recipes, DeepSpeed configurations."""

from __future__ import annotations

import importlib.resources
from pathlib import Path


def config_folder() -> Path:
    """Return the folder of the configuration files.

    An installed wheel holds it as ``e2e/configs``; in a checkout, installed in editable mode or not at
    all, it lies beside the package.
    """
    package = Path(str(importlib.resources.files("e2e")))
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(path: str | Path) -> Path:
    """Return the file at ``path``, or the file of that name which comes with the package.

    Parameters
    ----------
    path : str or Path
        A file relative to the working directory, or one like ``configs/recipes/abmilx_r18_panda.yaml``.

    Returns
    -------
    Path
        The file; ``path`` itself where neither exists.
    """
    path = Path(path)
    shipped = config_folder().parent / path
    return shipped if not path.exists() and shipped.is_file() else path


def is_shipped(path: Path) -> bool:
    """Return whether a file is one of those that come with the package."""
    return path.resolve().is_relative_to(config_folder().resolve())


def config_names(kind: str) -> list[str]:
    """Return the names in a folder of the configuration files, such as ``datasets``, sorted."""
    return sorted(path.stem for path in (config_folder() / kind).glob("*.yaml"))
