"""Tables as several programs save them."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.cohort.split_files import read_text_table
from e2e.cohort.table import read_table
from e2e.errors import UserError


def read(path: Path) -> list[str]:
    columns = {"slide": "slide", "case": None, "split": None, "centre": None}
    slides, problems = read_table(path, columns=columns, targets=["label"], split_names={})
    assert not problems
    return [f"{slide.id}={slide.target['label']}" for slide in slides]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tabs.txt", "slide\tlabel\na\t1\nb\t2\n"),
        ("tabs.csv", "slide\tlabel\na\t1\nb\t2\n"),
        ("commas.txt", "slide,label\na,1\nb,2\n"),
        ("comments.csv", "# exported by a program\n# on a day, in a year\nslide,label\na,1\nb,2\n"),
        ("comment.tsv", "# one\n\nslide\tlabel\na\t1\nb\t2\n"),
        ("blanks.csv", " slide , label \n a , 1 \nb,2\n"),
    ],
)
def test_tabs_in_txt_comment_lines_and_blanks_are_read(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert read(path) == ["a=1", "b=2"]
    assert [row["slide"] for row in read_text_table(path).rows] == ["a", "b"]


def test_a_header_that_begins_with_a_hash_is_no_comment(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("#slide,label\na,1\n")
    assert read_text_table(path).columns == ["#slide", "label"]


def test_a_spreadsheet_is_read_or_the_package_is_named(tmp_path):
    path = tmp_path / "t.xlsx"
    path.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(UserError, match=r"openpyxl|not a readable spreadsheet"):
        read(path)


def test_the_cells_of_a_spreadsheet_are_text(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["slide", "label"], ["a", 1], ["b", 2]):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    assert read(tmp_path / "t.xlsx") == ["a=1", "b=2"]


def test_a_table_of_a_million_columns_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("slide,label" + ",x" * 1_000_000 + "\n")
    for reader in (read, read_text_table):
        with pytest.raises(UserError, match="1,000,002 columns"):
            reader(path)


def test_a_cell_over_a_megabyte_is_an_error_and_one_of_200_kb_is_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(f"slide,label,note\na,1,{'x' * 200_000}\n")
    assert [row["slide"] for row in read_text_table(path).rows] == ["a"]
    path.write_text(f"slide,label,note\na,1,{'x' * 2_000_000}\n")
    with pytest.raises(UserError, match="line 2"):
        read_text_table(path)
