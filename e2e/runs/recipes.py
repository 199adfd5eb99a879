"""How the patches of a run were cut: kept in its folder, and compared with what the run is used on later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from e2e.bags.spec import LabelledSlide
from e2e.errors import UserError
from e2e.files import damaged_json, read_json, write_json
from e2e.settings.schema import Data
from e2e.store.open import expand_store_paths, open_store

RECIPES = "recipes.json"
"""File of a run folder: the packing recipe of each magnification, and what the patches are."""
SAME_MPP = 1.1
"""Factor between two resolutions up to which they count as one: scanners differ by some per cent."""


@dataclass(frozen=True)
class PatchKind:
    """Patches of one size and resolution, and how many slides have them."""

    patch_px: int
    """Side in pixels; 0 if unknown."""
    mpp: float | None
    """Micrometres per pixel; None if unknown."""
    slides: int

    def __str__(self) -> str:
        side = f"{self.patch_px} px" if self.patch_px else "of unknown side"
        return f"{side} at {_format_mpp(self.mpp)}"

    def is_like(self, other: PatchKind) -> bool:
        """Return whether side and resolution agree, as far as both are known."""
        if self.patch_px and other.patch_px and self.patch_px != other.patch_px:
            return False
        if self.mpp is None or other.mpp is None:
            return True
        return max(self.mpp, other.mpp) <= SAME_MPP * min(self.mpp, other.mpp)


def find_patch_kinds(items: Iterable[LabelledSlide]) -> list[PatchKind]:
    """Return the kinds of patches that slides have, the most common first."""
    kinds: list[PatchKind] = []
    for item in items:
        record = item.record
        kind = PatchKind(record.patch_px, record.mpp, 1)
        for position, other in enumerate(kinds):
            if kind.is_like(other):
                kinds[position] = PatchKind(other.patch_px, other.mpp, other.slides + 1)
                break
        else:
            kinds.append(kind)
    return sorted(kinds, key=lambda kind: -kind.slides)


def write_recipes(items: Sequence[LabelledSlide], kinds: Sequence[PatchKind], folder: Path) -> None:
    """Write how the patches of a run were cut into its folder."""
    first = next((item for item in items if item.slide.split == "train"), items[0])
    recipes = [reader.recipe for reader in (first.reader, *first.other_scales)]
    content = {"recipes": recipes, "patches": [asdict(kind) for kind in kinds]}
    write_json(folder / RECIPES, content)


def packing_recipe(folder: Path, data: Data) -> dict[str, Any]:
    """Return how new slides are to be cut for a run.

    Parameters
    ----------
    folder : Path
        The run folder. One of an earlier version has no recipe; that of its training store is taken.
    data : Data
        The run's settings of the cohort.

    Raises
    ------
    UserError
        The folder has no recipe, and there is no training store.
    """
    if (folder / RECIPES).is_file():
        return _read_recipes(folder)["recipes"][0]
    return _first_recipe(data)


def _read_recipes(folder: Path) -> dict[str, Any]:
    """Return what :func:`write_recipes` wrote; UserError if it is not that any more."""
    content = read_json(folder / RECIPES)
    try:
        for recipe in content["recipes"]:
            recipe.keys()
        content["recipes"][0].keys()
        for kind in content["patches"]:
            str(PatchKind(**kind))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise damaged_json(folder / RECIPES, f"{type(error).__name__}: {error}") from error
    return content


def _first_recipe(data: Data) -> dict[str, Any]:
    """Return how the patches of ``data.stores`` were cut.

    Raises
    ------
    UserError
        No file matches.
    """
    for entry in data.stores:
        for path in expand_store_paths(entry):
            return open_store(path).recipe
    raise UserError(f"no file matches data.stores={data.stores}")


def recorded_patches(folder: Path) -> list[PatchKind]:
    """Return the kinds of patches that a run was trained on; empty if its folder does not say."""
    if not (folder / RECIPES).is_file():
        return []
    return [PatchKind(**kind) for kind in _read_recipes(folder)["patches"]]


def find_other_patches(kinds: Sequence[PatchKind], folder: Path) -> str | None:
    """Return how the patches of slides differ from those that a run was trained on; None if they do not."""
    trained = recorded_patches(folder)
    if not trained:
        return None
    others = [kind for kind in kinds if not any(kind.is_like(t) for t in trained)]
    if not others:
        return None
    return (
        f"{sum(kind.slides for kind in others)} slide(s) have patches of {_join(others)}; "
        f"the run was trained on patches of {_join(trained)}"
    )


def check_same_patches(kinds: Sequence[PatchKind], folder: Path) -> None:
    """Raise UserError if the patches of a run's slides are no longer those it was started on."""
    difference = find_other_patches(kinds, folder)
    if difference is not None:
        raise UserError(
            f"the stores have changed since {folder} was started: {difference}\n"
            "  restore the stores it was started on, or train a new run on these"
        )


def describe_patches(kinds: Sequence[PatchKind], size: int | None) -> list[str]:
    """Return one line about what the encoder sees, and warnings.

    Parameters
    ----------
    kinds : sequence of PatchKind
        Those of the slides of the run, at least one, the most common first.
    size : int or None
        Side in pixels to which patches are resized (``bag.size``).
    """
    kind, line = kinds[0], f"patches of {kinds[0]}"
    lines = []
    if size and kind.patch_px and size != kind.patch_px:
        mpp = kind.mpp and kind.mpp * kind.patch_px / size
        line += f", resized to {size} px ({_format_mpp(mpp)})"
        if size > kind.patch_px:
            lines.append(
                f"warning: bag.size={size} enlarges the patches of {kind.patch_px} px "
                f"{(size / kind.patch_px) ** 2:.1f}-fold in pixels, which costs time and adds no detail\n"
                f"  bag.size=null uses them as they are"
            )
    if len(kinds) > 1:
        lines.append(
            f"warning: the patches of the slides differ: {_join(kinds, count=True)}\n"
            "  pack all slides at one resolution and size, unless this is intended"
        )
    return [line, *lines]


def _join(kinds: Sequence[PatchKind], *, count: bool = False) -> str:
    return ", ".join(f"{kind} ({kind.slides} slides)" if count else str(kind) for kind in kinds)


def _format_mpp(mpp: float | None) -> str:
    return "unknown um/px" if mpp is None else f"{mpp:.3g} um/px"
