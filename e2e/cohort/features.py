"""The frozen features of a cohort's slides, in the two-stage mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from e2e.bags.spec import LabelledSlide
from e2e.errors import DamagedDataError, UserError, format_list
from e2e.features.check import describe_encoder
from e2e.features.reader import FeatureFiles
from e2e.log import Screen


def describe_features(items: Sequence[LabelledSlide]) -> dict[str, Any]:
    """``width`` and ``encoder`` (empty where the files do not say) of the slides' features."""
    makers = (describe_encoder(item.store.recipe) for item in items)
    width = cast(FeatureFiles, items[0].store).width
    return {"width": width, "encoder": next(filter(None, makers), "")}


def check_values(items: Sequence[LabelledSlide], screen: Screen) -> None:
    """Read the features of all ``items``; UserError that names each slide whose ones cannot be used."""
    faults: list[str] = []
    for done, item in enumerate(items):
        try:
            cast(FeatureFiles, item.store).features(item.slide.id)
        except DamagedDataError as error:
            faults.append(str(error).splitlines()[0])
        screen.step(done + 1, len(items), "slides' features looked over")
    screen.pause()
    if faults:
        raise UserError(
            f"the features of {len(faults)} slide(s) cannot be used\n{format_list(faults)}\n"
            "  extract them again (in bf16 or fp32, if fp16 overflowed), or leave the slides out of "
            "the label table"
        )
