"""The record of a slide."""

from __future__ import annotations

import numpy as np
import pytest

from e2e.errors import UserError
from e2e.store.records import SlideRecord
from tests.helpers.stores import record


def test_coords_have_one_row_per_patch():
    with pytest.raises(ValueError, match=r"slide 'a' has 3 patches, but coords of shape \(2, 2\)"):
        SlideRecord("a", 3, np.zeros((2, 2), np.int32))


def test_a_slice_is_the_record_of_some_patches():
    whole = record("a", 9)
    part = whole.slice(2, 5)
    assert part.num_patches == 3
    np.testing.assert_array_equal(part.coords, whole.require_coords()[2:5])
    assert (part.slide, part.mpp, part.source) == ("a", whole.mpp, whole.source)
    without = record("a", 9, coords=None).slice(2, 5)
    assert (without.num_patches, without.coords) == (3, None)


def test_missing_coords_are_reported_with_the_setting_that_gives_them():
    with pytest.raises(UserError) as error:
        record("x", 9, coords=None).require_coords()
    assert str(error.value).startswith(
        "slide 'x' has no patch coordinates\n"
        "  Set data.coords to the folder of the .h5 files it was cut by."
    )
