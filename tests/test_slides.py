"""Ids of slides and cases."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2e.slides import find_id_fault


@pytest.mark.parametrize(
    "text",
    ["TCGA-02-0001", "a/b", "a b", "Müller_3", "1", "a..b", "..a", "x.svs", "a:b", "=1+1", "中文"],
)
def test_ids_of_real_cohorts_are_valid(text: str) -> None:
    assert find_id_fault(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "../x",
        "a/../../x",
        "/abs/x",
        "C:\\x",
        "..\\x",
        "\\\\host\\x",
        "a//b",
        "./a",
        ".",
        "..",
        *("a\0b", "a\nb", "a\x1b[2J", "a\u2028b", "a\x85b", "\ud800", "x" * 201, "ü" * 101),
    ],
)
def test_ids_that_escape_or_break_a_line_are_refused(text: str) -> None:
    assert find_id_fault(text)


@given(st.text(max_size=40))
def test_a_valid_id_stays_below_the_folder_it_is_joined_to(text: str) -> None:
    if find_id_fault(text) is None:
        folder = Path("/out")
        path = Path("/out", text).resolve()
        assert folder in path.parents
        assert not {"\n", "\0"} & {*text}
