"""Slide ids: which are accepted, and the file names made of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2e.errors import UserError
from e2e.slides import MAX_NAME_BYTES, check_ids, file_name, find_id_fault, slide_of_file

WRONG = [
    "", " ", "/abs/x", "../x", "a/../b", "a/../../x", "a//b", "a/", "./a", "..", ".", "..\\x", "C:\\x",
    "\\\\host\\x", "a\x00b", "a\nb", "a\tb", "a\x1b[2J", "a\u2028b", "a\x85b", "\ud800", "x" * 501, "ü" * 251,
]  # fmt: skip
RIGHT = [
    "TCGA-3C-AALI-01Z", "a/b", "scan 1 (2)", "Größe", "Müller_3", ".hidden", "a..b", "..a", "x.svs", "a:b",
    "=SUM(A1)", "中文", "1", "x" * 500,
]  # fmt: skip


@pytest.mark.parametrize("slide", WRONG)
def test_an_id_that_could_do_harm_is_refused(slide):
    assert find_id_fault(slide) is not None
    with pytest.raises(UserError, match=r"^here: 1 slide id\(s\) cannot be used"):
        check_ids(["good", slide], "here")


@pytest.mark.parametrize("slide", RIGHT)
def test_an_id_that_people_use_is_accepted(slide):
    assert find_id_fault(slide) is None
    check_ids([slide], "here")


def test_many_wrong_ids_are_one_message_with_three_examples():
    with pytest.raises(UserError) as error:
        check_ids([f"../{k}" for k in range(50)], "store.lmdb")
    assert str(error.value).startswith("store.lmdb: 50 slide id(s)")
    assert len(str(error.value).splitlines()) == 6


@given(st.sets(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), max_size=20))
def test_file_names_stay_in_the_folder_and_differ_for_different_ids(slides):
    names = {file_name(slide) for slide in slides}
    assert len(names) == len(slides)
    for name in names:
        assert not re.search(r"[/\\\x00]", name)
        assert not name.startswith(".")
        assert len(name.encode()) <= MAX_NAME_BYTES


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40))
def test_a_file_name_leads_back_to_the_id(slide):
    assert slide_of_file(file_name(slide)) == slide


@pytest.mark.parametrize("name", ["S%20A", "100%", "a%2fb", "slide_1", "a%zz"])
def test_names_of_other_programs_stay_as_they_are(name):
    assert slide_of_file(name) == name


def test_ids_that_used_to_share_a_file_have_one_each():
    assert file_name("a/b") != file_name("a_b")


@given(st.text(max_size=40))
def test_a_valid_id_stays_below_the_folder_it_is_joined_to(text):
    if find_id_fault(text) is None:
        folder = Path("/out")
        path = Path("/out", text).resolve()
        assert folder in path.parents
        assert not {"\n", "\0"} & {*text}
