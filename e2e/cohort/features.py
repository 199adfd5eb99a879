"""Checks of the frozen features that a cohort is trained on in the two-stage mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from e2e.bags.spec import LabelledSlide
from e2e.errors import DamagedDataError, UserError, format_list
from e2e.features.check import describe_encoder
from e2e.features.reader import FeatureReader
from e2e.log import Screen


def describe_features(items: Sequence[LabelledSlide[FeatureReader]]) -> dict[str, Any]:
    """Describe the features of a cohort.

    Parameters
    ----------
    items
        The slides, at least one.

    Returns
    -------
    dict
        ``width`` of the features, and ``encoder``: its name and a digest of its weights, empty if the
        files do not say.
    """
    encoders = (describe_encoder(item.reader.recipe) for item in items)
    return {"width": items[0].reader.width, "encoder": next(filter(None, encoders), "")}


def check_values(items: Sequence[LabelledSlide[FeatureReader]], screen: Screen) -> None:
    """Read all features once, and check that they are complete and finite.

    Parameters
    ----------
    items
        The slides.
    screen
        Shows the progress.

    Raises
    ------
    UserError
        Names each slide whose features cannot be used.
    """
    faults: list[str] = []
    for done, item in enumerate(items):
        try:
            item.reader.features(item.slide.id)
        except DamagedDataError as error:
            faults.append(str(error).splitlines()[0])
        screen.step(done + 1, len(items), "slides' features checked")
    screen.pause()
    if faults:
        raise UserError(
            f"the features of {len(faults)} slide(s) cannot be used\n{format_list(faults)}\n"
            "  extract them again (in bf16 or fp32, if fp16 overflowed), or remove the slides from "
            "the label table"
        )
