"""The index over several store files that were packed together: ``<stem>.stores.json``.

It is JSON: ``{"format", "version", "recipe", "stores": [{"file", "patches", "slides"}, ...]}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from e2e.errors import UserError, format_list
from e2e.files import write_atomically
from e2e.slides import MAX_NAME_BYTES, find_id_fault

FORMAT = "e2e patch store index"
VERSION = 1


def index_path(out: Path) -> Path:
    """Return the path of the index over the store files of `out`."""
    return out.with_name(f"{out.stem}.stores.json")


def read_index(path: Path) -> list[Path]:
    """Return the store files that an index lists; no slide is in two of them.

    Raises
    ------
    UserError
        If there is no such index, it is another kind of file, it has a newer version, or a store file
        is missing.
    """
    try:
        index = json.loads(path.read_text())
        is_index = index["format"] == FORMAT
        names = [store["file"] for store in index["stores"]] if is_index else []
        version = int(index["version"])
    except OSError as error:
        raise UserError(f"cannot read the index {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is not an index of patch stores ({error})") from error
    if not is_index:
        raise UserError(
            f"{path} is not an index of patch stores: its format is '{index['format']}'"
        )
    if version > VERSION:
        raise UserError(
            f"{path} has index version {version}; this program reads up to {VERSION}\n"
            "  update the program"
        )
    for name in names:  # they lie beside the index
        if not _is_file_name(name):
            raise UserError(f"{path} lists {str(name)[:100]!r}, which is not a file name")
    files = [path.parent / name for name in names]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{path} lists {len(missing)} store file(s) that do not exist\n{format_list(missing)}\n"
            "  keep the store files beside the index"
        )
    return files


def _is_file_name(name: object) -> bool:
    if not isinstance(name, str) or find_id_fault(name):
        return False
    return Path(name).name == name and len(name.encode()) <= MAX_NAME_BYTES


def write_index(
    out: Path, recipe: dict[str, Any], stores: Mapping[Path, Mapping[str, int]]
) -> None:
    """Write the index over the store files of `out`.

    Parameters
    ----------
    out : Path
        The path that names the store files.
    recipe : dict
        How the patches were cut.
    stores : mapping
        Store file -> slide -> number of patches. Files without slides are left out.
    """
    files = [
        {"file": file.name, "patches": sum(slides.values()), "slides": sorted(slides)}
        for file, slides in stores.items()
        if slides
    ]
    index = {"format": FORMAT, "version": VERSION, "recipe": recipe, "stores": files}
    write_atomically(index_path(out), (json.dumps(index, indent=1) + "\n").encode())
