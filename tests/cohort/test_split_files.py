"""Published splits: each format is known by its columns, and ids stay what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2e.cohort.ids import IdRules
from e2e.cohort.split_files import (
    SPLIT_FORMATS,
    clam_files,
    fold_table,
    pick_fold,
    read_splits,
    read_text_table,
)
from e2e.errors import UserError

FOLD = {"007": "train", "010": "train", "1e5": "val", "0012.0": "test"}
"""Ids that a reader which takes them for numbers would spoil."""

PUBLISHED = {
    "splits_3.csv": ",train,val,test\n0,007,1e5,0012.0\n1,010,,\n",
    "splits_3_bool.csv": (
        ",train,val,test\n007,True,False,False\n010,True,False,False\n"
        "1e5,False,True,False\n0012.0,False,False,True\n"
    ),
    "abmilx.csv": "case,slide,label,fold\n"
    + "".join(f"c{name},{name},1,{split}\n" for name, split in FOLD.items()),
    "fold_3.csv": "Study,ID,Event,Status,WSI,RNA,Label,Split\n"
    + "".join(f"BRCA,{n},1.5,0,{n}.pt;x.pt,r.csv,0,{s}\n" for n, s in FOLD.items()),
    "k=all.tsv": "case_id\tslide_id\tgrade\tfold_0\n"
    + "".join(f"c{name}\t{name}\t1\t{split}\n" for name, split in FOLD.items()),
    "split_3.json": json.dumps(
        {"train_names": ["007", "010"], "val_names": ["1e5"], "test_names": ["0012.0"]}
    ),
    "splits.json": json.dumps(
        {
            "splits": [
                {
                    "train_patients": ["007", "010"],
                    "val_patients": ["1e5"],
                    "test_patients": ["0012.0"],
                }
            ]
        }
    ),
}


def written(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_text(text, encoding=encoding)
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_format_is_known_by_what_it_holds(tmp_path, name):
    path = written(tmp_path, name, PUBLISHED[name])
    assert read_splits(path) == {"3" if "_3" in name else "0": FOLD}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, name):
    text = PUBLISHED[name].replace("\n", "\r\n")
    path = written(tmp_path, name, text, "utf-8-sig")
    assert list(read_splits(path).values()) == [FOLD]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.endswith("json")])
def test_another_encoding_is_an_error_with_its_line_and_the_remedy(tmp_path, name):
    text = PUBLISHED[name].replace("010", "Königs-10")
    path = written(tmp_path, name, text, "latin-1")
    line = next(n for n, row in enumerate(text.splitlines(), 1) if "ö" in row)
    with pytest.raises(
        UserError, match=rf"not in UTF-8: byte 0xf6 in line {line}\n.*Königs.*\n.*iconv"
    ):
        read_splits(path)


def test_every_format_is_tested_here(tmp_path):
    assert len(SPLIT_FORMATS.names()) == 6  # ABMILX's two tables are one format
    assert all(SPLIT_FORMATS.factory(name).__doc__ for name in SPLIT_FORMATS.names())


def test_folds_of_a_table_may_be_many_and_of_stamp_without_validation(tmp_path):
    path = written(tmp_path, "t.tsv", "case_id\tfold_0\tfold_10\tfold_2\na\ttrain\ttest\t\n")
    assert read_splits(path) == {"0": {"a": "train"}, "2": {"a": ""}, "10": {"a": "test"}}
    splits = [{"train_patients": ["a"], "test_patients": ["b"]}] * 2
    path = written(tmp_path, "s.json", json.dumps({"splits": splits}))
    fold = {"a": "train", "b": "test"}
    assert read_splits(path) == {"0": fold, "1": fold}


def test_a_folder_is_all_its_folds_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 0):
        for name, content in clam_files(str(number), FOLD, dict.fromkeys(FOLD, "x")).items():
            (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.csv").write_text("what,ever\n")
    assert list(read_splits(tmp_path).items()) == [(n, FOLD) for n in ("0", "9", "10")]
    (tmp_path / "splits_9_bool.csv").write_text(PUBLISHED["splits_3_bool.csv"].replace("007", "8"))
    with pytest.raises(
        UserError, match=r"contradicts another file of fold 9 in 2 id\(s\)\n  007\n  8\n"
    ):
        read_splits(tmp_path)


IDS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=6)
FOLDS = st.dictionaries(IDS, st.sampled_from(["train", "val", "test", ""]), min_size=1).filter(
    lambda fold: any(fold.values()) and not {"True", "False"} & fold.keys()
)


@given(FOLDS)
def test_clams_files_come_back_as_they_were(tmp_path_factory, fold):
    folder = tmp_path_factory.mktemp("clam")
    files = clam_files("0", fold, dict.fromkeys(fold, "x"))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert read_splits(folder / "splits_0_bool.csv") == {"0": fold}
    used = {name: split for name, split in fold.items() if split}
    assert read_splits(folder / "splits_0.csv") == {"0": used}
    assert read_splits(folder) == {"0": fold}


@given(st.lists(FOLDS, min_size=1, max_size=3))
def test_our_table_comes_back_as_it_was_with_all_its_columns(tmp_path_factory, folds):
    path = tmp_path_factory.mktemp("ours") / "splits.csv"
    names = sorted(set().union(*folds))
    pd.DataFrame({"case": names, "Note": "a, b", "fold": "train"}).to_csv(path, index=False)
    whole = {str(k): {name: fold.get(name, "") for name in names} for k, fold in enumerate(folds)}
    path.write_bytes(fold_table(read_text_table(path), "case", whole))
    assert read_splits(path) == whole
    assert [row["Note"] for row in read_text_table(path).rows] == ["a, b"] * len(names)


def test_pandas_reads_what_we_write_as_clam_does(tmp_path):
    labels = {"007": "a", "010": "b", "1e5": "b", "0012.0": "a"}
    for name, content in clam_files("4", FOLD, labels).items():
        (tmp_path / name).write_bytes(content)
    table = pd.read_csv(tmp_path / "splits_4.csv", dtype=str)
    assert table["train"].dropna().tolist() == ["007", "010"]
    assert table["test"].dropna().tolist() == ["0012.0"]
    bools = pd.read_csv(tmp_path / "splits_4_bool.csv", index_col=0)
    assert bools["train"].dtype == bool
    assert bools.sum().tolist() == [2, 1, 1]
    counts = pd.read_csv(tmp_path / "splits_4_descriptor.csv", index_col=0)
    assert counts.to_dict("index") == {
        "a": {"train": 1, "val": 0, "test": 1},
        "b": {"train": 1, "val": 1, "test": 0},
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", ",train,val,test\n0,s1,s2,s1\n", r"1 id.*two splits.*\n  fold 0: 's1' is in"),
        ("a.csv", "slide,fold\ns1,train\ns1,test\n", r"fold 0: 's1' is in train and test"),
        (
            "a.csv",
            "slide,fold_0,fold_1\ns,test,train\ns,test,val\n",
            r"fold 1: 's' is in train and val",
        ),
        (
            "a.csv",
            "slide,fold\ns1,train\ns2,tset\n",
            r"1 row\(s\) without a valid id and split\n  'tset' of 's2'",
        ),
        ("a.csv", "slide,fold\n,train\n", "'train' of ''"),
        (
            "a.csv",
            "slide,label\ns1,0\n",
            r"unknown format\n  it has: slide, label\n  known formats:\n  CLAM's splits_0.csv",
        ),
        ("a.csv", "", "it has: nothing"),
        ("a.csv", "slide,fold\n", "no id in train, val or test"),
        ("a.csv", "slide,fold\ns1,train,\ns2,val,x\n", "line 3: 3 cells under 2 columns"),
        ("a.csv", "slide,fold,fold\ns1,train,val\n", r"has the column\(s\) fold more than once"),
        ("a.csv", "image,fold\ns1,train\n", "has no column slide_id or slide or case_id"),
        ("a.json", "{", "is not valid JSON"),
        ("a.json", "[1]", "unknown format"),
        ("a.json", '{"train_names": [7]}', "train_names is not a list of strings"),
    ],
)
def test_unreadable_split_files_are_errors(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read_splits(written(tmp_path, name, text))


def test_the_column_of_the_ids_can_be_named(tmp_path):
    path = written(tmp_path, "a.csv", "image,slide,fold\ns1,x,train\n")
    assert read_splits(path, "image") == {"0": {"s1": "train"}}
    assert read_splits(path) == {"0": {"x": "train"}}
    path = written(tmp_path, "b.csv", "patient,image,fold\nc1,s1,train\n")
    assert read_splits(path, "image", "patient") == {"0": {"s1": "train"}}
    path = written(tmp_path, "c.csv", "pid,case,fold\nc1,s1,train\n")
    assert read_splits(path, "image", "pid") == {"0": {"c1": "train"}}


def test_a_fold_is_picked_by_its_number_or_its_columns_name_or_as_the_only_one(tmp_path):
    folds = {"0": {"a": "train"}, "7": {"a": "test"}}
    assert [pick_fold(folds, name, tmp_path) for name in ("0", "7", "fold_7")] == ["0", "7", "7"]
    assert pick_fold({"7": {}}, None, tmp_path) == "7"
    with pytest.raises(UserError) as error:
        pick_fold(folds, "1", Path("s.csv"))
    assert str(error.value) == (
        "s.csv has no fold '1'\n  it has: 0, 7\n  set data.fold to one of them"
    )
    with pytest.raises(UserError, match=r"s.csv has 2 folds\n  it has: 0, 7\n  set data.fold"):
        pick_fold(folds, None, Path("s.csv"))


# --- cells that name several slides ---


@pytest.mark.parametrize("name", [n for n in PUBLISHED if not n.endswith("json")])
def test_cells_with_several_ids_are_all_of_them_in_the_cells_split(tmp_path, name):
    text = PUBLISHED[name].replace("010", "010.svs; 011.svs").replace("007", "007.svs")
    path = written(tmp_path, name, text)
    [fold] = read_splits(path, rules=IdRules(".svs", ";")).values()
    assert fold == FOLD | {"011": "train"}


def test_a_slide_that_two_cells_name_is_in_one_split_of_a_fold(tmp_path):
    path = written(tmp_path, "a.csv", "slide,fold\na;b,train\nb;c,test\n;,val\nd;,val\n")
    with pytest.raises(
        UserError, match=r"1 id.*two splits.*\n  fold 0: 'b' is in train and test\n"
    ):
        read_splits(path, rules=IdRules(separator=";"))
    path = written(tmp_path, "a.csv", "slide,fold\na;b,train\nb;c,train\n;,val\nd;,val\n")
    with pytest.raises(UserError, match=r"without a valid id and split\n  'val' of ';'\n.*empty$"):
        read_splits(path, rules=IdRules(separator=";"))


def test_a_missing_file_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(UserError, match="no file at"):
        read_splits(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"has no splits_0.csv, fold_0.csv or split_0.json"):
        read_splits(tmp_path)


def test_rows_that_end_early_are_filled_up(tmp_path):
    path = written(tmp_path, "splits_0.csv", ",train,val,test\n0,a,b,c\n1,d\n\n")
    assert read_splits(path) == {"0": {"a": "train", "b": "val", "c": "test", "d": "train"}}


def test_a_table_with_folds_gets_no_second_ones(tmp_path):
    path = written(tmp_path, "t.csv", "case,fold_0\na,train\n")
    with pytest.raises(UserError, match=r"fold_0 already\n"):
        fold_table(read_text_table(path), "case", {"0": {"a": "train"}})


def test_the_abmilx_tables_are_read_as_published(shared_data):
    panda = read_splits(shared_data / "labels" / "panda.csv")["0"]
    words = list(panda.values())
    assert [words.count(split) for split in ("train", "val", "test")] == [7143, 1019, 2040]
    brca = list(read_splits(shared_data / "labels" / "subtyping_tcga_brca.csv")["0"].values())
    assert [brca.count(split) for split in ("train", "val", "test")] == [656, 95, 234]
    folds = read_splits(shared_data / "labels" / "survival_tcga_brca_3fold")
    assert list(folds) == ["0", "1", "2"]
    tests = [{case for case, split in fold.items() if split == "test"} for fold in folds.values()]
    assert [len(test) for test in tests] == [336, 336, 335]
    assert len(set().union(*tests)) == 1007


def test_each_slide_of_the_brca_survival_tables_is_tested_in_one_fold(shared_data):
    folder = shared_data / "labels" / "survival_tcga_brca_3fold"
    folds = read_splits(folder, "WSI", "ID", rules=IdRules(".pt", ";"))
    assert [len(fold) for fold in folds.values()] == [1073] * 3
    tested = [[n for n, split in fold.items() if split == "test"] for fold in folds.values()]
    assert len({name for names in tested for name in names}) == sum(map(len, tested)) == 1073
