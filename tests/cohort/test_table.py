"""Label tables: read by an explicit column map, every row checked, nothing guessed."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2e.cohort.ids import IdRules
from e2e.cohort.match import match_slides
from e2e.cohort.report import write_problems
from e2e.cohort.splits import check_splits, cut_split
from e2e.cohort.table import Problem, read_table, summarise_problems
from e2e.errors import UserError
from e2e.slides import Slide
from tests.helpers.stores import write_store

COLUMNS = {"slide": "slide", "case": "case", "split": "split"}
SPLITS = {"train": "train", "val": "val", "test": "test"}
HEADER = "case,slide,split,label\n"


def read(path: Path, **changes) -> tuple[list[Slide], list[Problem]]:
    options = {"columns": COLUMNS, "targets": ["label"], "split_names": SPLITS}
    return read_table(path, **(options | changes))


@pytest.fixture
def table(tmp_path):
    def write(text: str, name: str = "labels.csv", encoding: str = "utf-8") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        return path

    return write


def test_rows_become_slides(table):
    slides, problems = read(table(HEADER + "c1,s1,train,IDC\nc1,s2,train,ILC\nc2,s3,test,IDC\n"))
    assert slides == [
        Slide("s1", "c1", "train", {"label": "IDC"}),
        Slide("s2", "c1", "train", {"label": "ILC"}),
        Slide("s3", "c2", "test", {"label": "IDC"}),
    ]
    assert problems == []


def test_columns_and_splits_go_by_the_tables_own_names(table):
    path = table("Patient,WSI,Fold,grade,other\np,w.svs,development,3,x\n")
    slides, _ = read(
        path,
        columns={"slide": "WSI", "case": "Patient", "split": "Fold"},
        targets=["grade"],
        split_names={"development": "train"},
        rules=IdRules(".svs"),
    )
    assert slides == [Slide("w", "p", "train", {"grade": "3"})]


def test_without_a_case_column_each_slide_is_a_case_and_splits_may_be_missing(table):
    columns = {"slide": "slide", "case": None, "split": None}
    slides, _ = read(table("slide,label\na,0\nb,1\n"), columns=columns)
    assert [(s.id, s.case, s.split) for s in slides] == [("a", "a", ""), ("b", "b", "")]


def test_ids_are_text_and_never_numbers(table):
    rows = "007,007,train,1\n7,7,train,1\n7.0,7.0,train,01\n1e3,1e3,train,NA\nnull,NaN,train,None\n"
    slides, problems = read(table(HEADER + rows))
    assert [s.id for s in slides] == ["007", "7", "7.0", "1e3", "NaN"]
    assert [s.target["label"] for s in slides] == ["1", "1", "01", "NA", "None"]
    assert slides[4].case == "null"
    assert problems == []


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("a.tsv", (HEADER + "c,ä ö,train,x\n").replace(",", "\t"), "utf-8"),
        ("a.csv", HEADER + "c,ä ö,train,x\n", "utf-8-sig"),
        ("a.csv", (HEADER + "c,ä ö,train,x\n").replace("\n", "\r\n"), "utf-8"),
        (
            "a.csv",
            HEADER + 'c, "ä ö" ,train, x \n'.replace(', "', ',"').replace('" ,', '",'),
            "utf-8",
        ),
        ("a.csv", HEADER + "c,ä ö,train,x", "utf-8"),
        ("a.csv", HEADER + "c,ä ö,train,x\n\n\n", "utf-8"),
    ],
    ids=["tsv", "byte order mark", "crlf", "quotes and spaces", "no last newline", "blank lines"],
)
def test_tables_as_other_programs_write_them(table, name, text, encoding):
    slides, problems = read(table(text, name, encoding))
    assert slides == [Slide("ä ö", "c", "train", {"label": "x"})]
    assert problems == []


def test_a_missing_column_names_those_that_are_there(table):
    with pytest.raises(UserError) as error:
        read(table("case,slide,grade,fold\na,b,0,train\n"))
    message = str(error.value)
    assert "lacks column(s) label, split" in message
    assert "it has: case, slide, grade, fold" in message
    assert "data.columns" in message


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("", "utf-8"),
        (HEADER, "utf-8"),
        (HEADER + "a,b,train,x,extra\nc,d,train,y\n", "utf-8"),
        (HEADER + "a,b,train,x\nc,d,train,y,extra\n", "utf-8"),
        (HEADER + "a,b,train,x,\n", "utf-8"),  # would shift every column by one
        (HEADER + 'a,"b,train,x\n', "utf-8"),
    ],
    ids=["empty", "no rows", "long first row", "long row", "comma at the end", "quote"],
)
def test_a_table_that_cannot_be_read_is_one_message(table, text, encoding):
    with pytest.raises(UserError, match=r"labels.csv (is not a readable table: .+|has no rows)"):
        read(table(text, encoding=encoding))


def test_a_missing_table_is_an_error_that_names_the_setting(tmp_path):
    with pytest.raises(UserError, match=r"no label table at .*\n.*data.labels="):
        read(tmp_path / "nothing.csv")


def test_bad_rows_are_listed_with_their_lines(table):
    rows = [
        "c1,s1,train,x",
        "c1,s1,train,x",  # line 3
        "c1,s1,train,y",  # line 4
        "c9,s1,train,x",  # line 5
        "c2,,train,x",  # line 6
        ",s3,train,x",  # line 7
        "c4,s4,train,",  # line 8: what no label means is the task's to say
        "c5,s5,holdout,x",  # line 9
        "c6,s6",  # line 10
        "c7,s7,val,x",
    ]
    slides, problems = read(table(HEADER + "\n".join(rows)))
    assert [s.id for s in slides] == ["s4", "s7"]  # which of the rows of s1 is right, nobody knows
    assert [(p.slide, p.where, p.problem) for p in problems] == [
        ("s1", "labels.csv line 3", "duplicate row"),
        ("s1", "labels.csv line 4", "contradicts an earlier row"),
        ("s1", "labels.csv line 5", "contradicts an earlier row"),
        ("", "labels.csv line 6", "empty slide or case id"),
        ("s3", "labels.csv line 7", "empty slide or case id"),
        ("s5", "labels.csv line 9", "split 'holdout' is not one of train, val, test"),
        ("s6", "labels.csv line 10", "split '' is not one of train, val, test"),
    ]
    assert str(problems[3]) == "(no slide id): empty slide or case id (labels.csv line 6)"


def test_slides_and_stores_are_compared_in_both_directions(tmp_path):
    first = write_store(tmp_path / "one.lmdb", {"a": 1, "both": 1, "extra": 1})
    second = write_store(tmp_path / "two.lmdb", {"b": 1, "both": 1})
    slides = [Slide(name, name, "train", {}) for name in ("a", "b", "both", "missing")]
    where, problems = match_slides(slides, [first, second])
    assert {slide: store.path.name for slide, store in where.items()} == {
        "a": "one.lmdb",
        "b": "two.lmdb",
        "both": "one.lmdb",
    }
    assert sorted(map(str, problems)) == [
        "both: also in one.lmdb (two.lmdb)",
        "extra: not in the label table (one.lmdb)",
        "missing: not in any store (label table)",
    ]


def test_ids_are_matched_exactly(tmp_path):
    store = write_store(tmp_path / "x.lmdb", {"7": 1, "S1": 1, "TCGA-1": 1})
    slides = [Slide(name, name, "train", {}) for name in ("007", "s1", "TCGA")]
    where, problems = match_slides(slides, [store])
    assert where == {}
    assert len(problems) == 6


def test_all_problems_are_written(tmp_path):
    problems = [Problem(f"s,{n}", "labels.csv line 2", 'has "quotes"') for n in range(30)]
    write_problems(problems, tmp_path / "new" / "problems.csv")
    with (tmp_path / "new" / "problems.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    assert rows[7] == {"slide": "s,7", "problem": 'has "quotes"', "where": "labels.csv line 2"}


# --- encodings, separators, many rows ---


def test_a_table_in_latin_1_is_an_error_with_the_line_and_the_remedy(table):
    path = table(HEADER + "c1,s1,train,x\nc2,Müller,train,x\n", encoding="latin-1")
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).splitlines() == [
        f"{path} is not in UTF-8: byte 0xfc in line 3",
        "  as latin-1 that line is: c2,Müller,train,x",
        f"  if that is right: iconv -f latin1 -t utf8 '{path}' > NEW.csv",
    ]


def test_a_table_in_utf_16_is_an_error_that_says_so(table):
    with pytest.raises(UserError, match=r"in UTF-16, not in UTF-8\n  iconv -f utf16 -t utf8 "):
        read(table(HEADER + "a,b,train,x\n", encoding="utf-16"))


def test_semicolons_as_separators_are_an_error_that_says_so(table):
    with pytest.raises(UserError, match=r"lacks column\(s\)(?s:.*)separated by ';': save it with"):
        read(table((HEADER + "a,b,train,x\n").replace(",", ";")))


def test_cells_of_blanks_are_empty_and_labels_that_differ_by_blanks_are_one(table):
    rows = "c1,s1,train, x y \nc1, s1 ,train,x y\nc2,s2,train,   \nc3,\t,train,x\n"
    slides, problems = read(table(HEADER + rows))
    assert [(s.id, s.target["label"]) for s in slides] == [("s1", "x y"), ("s2", "")]
    assert [p.problem for p in problems] == ["duplicate row", "empty slide or case id"]


def test_two_columns_of_one_name_are_refused_if_the_name_is_used(table):
    path = table("case,slide,split,label,label,note,note\nc,s,train,a,b,x,y\n")
    with pytest.raises(UserError, match=r"the column\(s\) label more than once"):
        read(path)
    slides, _ = read(path, targets=["split"])
    assert slides == [Slide("s", "c", "train", {"split": "train"})]


def test_blanks_around_the_names_of_columns_and_rows_without_any_word_do_not_count(table):
    path = table("case, slide,split , label\nc, s, train, a\n,,,\n , , ,\n")
    assert read(path) == ([Slide("s", "c", "train", {"label": "a"})], [])


def test_a_bad_row_after_empty_lines_has_the_right_line_number(table):
    _, problems = read(table(HEADER + "c,s,train,a\n\n\nd,,train,a\n"))
    assert [problem.where for problem in problems] == ["labels.csv line 5"]


def test_a_table_of_empty_lines_is_an_error(table):
    with pytest.raises(UserError, match="is empty"):
        read(table(",,\n,,\n"))


def test_ten_thousand_cases_are_read_and_every_bad_row_of_them_is_listed(table):
    rows = [f"c{n},s{n},{('train', 'val')[n % 5 == 0]},{'xy'[n % 2]}\n" for n in range(10_000)]
    again = [row.replace(",x", ",y") for row in rows[::10]]  # each contradicts the first
    slides, problems = read(table(HEADER + "".join([*rows, *again, "c,,train,x\n"])))
    assert len({slide.id for slide in slides}) == 9_000
    assert [p.problem for p in problems[:-1]] == ["contradicts an earlier row"] * 1000
    assert (problems[999].where, problems[999].slide) == ("labels.csv line 11001", "s9990")
    assert problems[-1].problem == "empty slide or case id"
    check_splits(slides)
    done = cut_split(slides, "test", 0.25, by="label", seed=0)
    assert Counter((s.split, s.target["label"]) for s in done if s.split == "test") == {
        ("test", "x"): 1000,
        ("test", "y"): 1000,
    }


# --- rows that name several slides ---


def test_each_slide_of_a_row_has_the_rows_case_label_and_split(table):
    rows = 'c1,"a.svs; b.svs ;c",train,x\nc2,d.svs,val,y\nc1,e.svs,train,z\n'
    slides, problems = read(table(HEADER + rows), rules=IdRules(".svs", ";"))
    assert problems == []
    assert [(s.id, s.case, s.split, s.target["label"]) for s in slides] == [
        ("a", "c1", "train", "x"),
        ("b", "c1", "train", "x"),
        ("c", "c1", "train", "x"),
        ("d", "c2", "val", "y"),
        ("e", "c1", "train", "z"),
    ]


def test_without_a_case_column_the_slides_of_a_row_are_one_case(table):
    columns = {"slide": "slide", "case": None, "split": None}
    text = "slide,label\na.svs;b.svs,0\nc.svs,1\n"
    slides, _ = read(table(text), columns=columns, rules=IdRules(".svs", ";"))
    assert [s.id for s in slides] == ["a", "b", "c"]
    assert slides[0].case == slides[1].case
    assert slides[2].case == "c"


def test_empty_parts_and_slides_named_twice_are_listed_and_the_others_stay(table):
    rows = [
        "c1,a;;b;,train,x",  # line 2
        "c2,d;e;d,train,x",
        "c3,f;a,train,x",  # line 4: a is of c1
        "c1,b,train,x",
        ",g;h,train,x",  # line 6
        "c4,;,train,x",
    ]
    slides, problems = read(table(HEADER + "\n".join(rows)), rules=IdRules(separator=";"))
    assert [s.id for s in slides] == ["b", "d", "e", "f"]
    empty = "empty slide or case id"
    assert [(p.slide, p.where[-1], p.problem) for p in problems] == [
        ("", "2", empty),
        ("", "2", empty),
        ("d", "3", "listed twice in its row"),
        ("a", "4", "contradicts an earlier row"),
        ("b", "5", "duplicate row"),
        ("g", "6", empty),
        ("h", "6", empty),
        ("", "7", empty),
        ("", "7", empty),
    ]


def test_without_a_separator_a_cell_is_one_id_and_the_message_names_the_setting(table, tmp_path):
    store = write_store(tmp_path / "x.lmdb", {"a": 1, "b": 1, "c;d": 1})
    slides, _ = read(
        table(HEADER + "c1,a.svs;b.svs,train,x\nc2,c;d,train,x\n"), rules=IdRules(".svs")
    )
    where, problems = match_slides(slides, [store])
    assert list(where) == ["c;d"]  # an id may have any sign
    assert str(problems[0]) == (
        "a.svs;b: not in any store; for several slides in a cell set data.slide_separator=';' (label table)"
    )
    slides, _ = read(table(HEADER + "c1,a.svs;b.svs,train,x\n"), rules=IdRules(".svs", ";"))
    assert sorted(match_slides(slides, [store])[0]) == ["a", "b"]


IDS = st.text(st.characters(exclude_characters=";.", exclude_categories=("C", "Z")), min_size=1)


@given(st.lists(IDS, min_size=1), st.sampled_from(["", ".svs"]), st.sampled_from([";", " ; "]))
def test_ids_that_are_joined_come_apart_as_they_were(ids, suffix, joint):
    assert IdRules(suffix, ";").parse(joint.join(name + suffix for name in ids)) == ids


# --- centres ---


def test_a_slide_has_its_centre_and_one_slide_has_not_two(table):
    text = (
        "case,slide,split,label,hospital\nc1,a,train,x,north\nc2,b,train,x,\nc1,a,train,x,south\n"
    )
    slides, problems = read(table(text), columns={**COLUMNS, "centre": "hospital"})
    assert [(s.id, s.centre) for s in slides] == [("b", "")]
    assert [p.problem for p in problems] == ["contradicts an earlier row"]
    slides, problems = read(table(text), columns={**COLUMNS, "centre": None})
    assert [s.centre for s in slides] == ["", ""]
    with pytest.raises(UserError, match=r"lacks column\(s\) city"):
        read(table(text), columns={**COLUMNS, "centre": "city"})


def test_a_column_may_be_of_the_splits_and_of_the_centres_at_once(table):
    text = "case,slide,label,center\nc1,a,x,0\nc2,b,x,3\n"
    columns = {"slide": "slide", "case": "case", "split": "center", "centre": "center"}
    slides, _ = read(table(text), columns=columns, split_names={"0": "train", "3": "test"})
    assert [(s.split, s.centre) for s in slides] == [("train", "0"), ("test", "3")]


# --- real tables ---


def test_all_of_the_panda_table_is_read(shared_data):
    slides, problems = read(shared_data / "labels/panda.csv", columns=COLUMNS | {"split": "fold"})
    assert problems == []
    counts = {split: sum(s.split == split for s in slides) for split in SPLITS}
    assert counts == {"train": 7143, "val": 1019, "test": 2040}
    assert {s.target["label"] for s in slides} == set("012345")
    assert all(s.case == s.id for s in slides)


def test_all_of_the_brca_subtyping_table_is_read(shared_data):
    path = shared_data / "labels/subtyping_tcga_brca.csv"
    slides, problems = read(path, columns=COLUMNS | {"split": "fold"})
    assert problems == []
    assert len(slides) == 985
    assert len({s.case for s in slides}) == 985
    assert {label: sum(s.target["label"] == label for s in slides) for label in ("IDC", "ILC")} == {
        "IDC": 787,
        "ILC": 198,
    }


@pytest.mark.parametrize("fold", [0, 1, 2])
def test_the_brca_survival_tables_are_read(shared_data, fold):
    slides, problems = read(
        shared_data / f"labels/survival_tcga_brca_3fold/fold_{fold}.csv",
        columns={"slide": "WSI", "case": "ID", "split": "Split"},
        targets=["Event", "Status"],
        rules=IdRules(".pt", ";"),
    )
    assert problems == []
    cases: dict[str, list[Slide]] = {}
    for slide in slides:
        assert slide.id.startswith(f"{slide.case}-")
        assert not slide.id.endswith(".pt")
        cases.setdefault(slide.case, []).append(slide)
    assert len(slides) == 1073
    assert Counter(map(len, cases.values())) == {1: 946, 2: 57, 3: 3, 4: 1}
    assert sum(own[0].target["Status"] == "1" for own in cases.values()) == 146
    for own in cases.values():  # what the row says, each of its slides says
        assert len({(slide.split, *slide.target.values()) for slide in own}) == 1


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ("label", "LUAD"),  # subtyping
        ("label", "normal"),  # detection
        ("time,event", "12.345,1"),  # survival
    ],
)
def test_the_made_cohorts_tables_are_read(table, columns, row):
    # As the generator of real-tissue cohorts writes them: case, slide, split, then the targets.
    text = f"case,slide,split,{columns}\r\ncase001,case001-s000,train,{row}\r\n"
    slides, problems = read(table(text), targets=columns.split(","))
    assert problems == []
    expected = dict(zip(columns.split(","), row.split(","), strict=True))
    assert slides == [Slide("case001-s000", "case001", "train", expected)]


def test_a_slide_without_patches_is_a_problem_of_its_store(tmp_path):
    store = write_store(tmp_path / "one.lmdb", {"a": 1, "empty": 0})
    slides = [Slide(name, name, "train", {}) for name in ("a", "empty")]
    where, problems = match_slides(slides, [store])
    assert list(where) == ["a"]
    assert list(map(str, problems)) == ["empty: has no patches (one.lmdb)"]


def test_problems_are_one_line_a_kind_with_three_examples_and_their_lines():
    row = "empty slide or case id"
    problems = [
        Problem("", "t.csv", row, 2),
        Problem("", "t.csv", row, 2),
        Problem("g", "t.csv", row, 6),
    ]
    problems += [Problem(f"s{k}", "x.lmdb", "has no patches") for k in range(5)]
    problems += [Problem("a", "t.csv", "duplicate row", 4)]
    assert summarise_problems(problems) == [
        "3 slides (g): empty slide or case id (t.csv lines 2, 6)",
        "5 slides (s0, s1, s2, ...): has no patches (x.lmdb)",
        "a: duplicate row (t.csv line 4)",
    ]
    assert summarise_problems(problems[:2]) == ["2 slides: empty slide or case id (t.csv line 2)"]
