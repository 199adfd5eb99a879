"""The tool: what it prints and writes, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from e2e.cohort.ids import IdRules
from e2e.cohort.split_files import read_splits
from e2e.errors import UserError
from e2e.runs.splits import main
from tests.helpers.paths import ROOT

TOOL = ROOT / "tools" / "make_splits.py"


def table(folder: Path, cases: int = 20) -> Path:
    """Cases of one to two slides in five centres; the zeros of the ids count."""
    rows = [
        {
            "pid": f"{n:03}",
            "image": f"{n:03}-{part}",
            "grade": "01"[n % 2],
            "hospital": f"h{n % 5}",
            "note": "a, b",
        }
        for n in range(cases)
        for part in range(1 + n % 3 // 2)
    ]
    path = folder / "labels.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def make(labels: Path, *more: object) -> int:
    known = ["--labels", labels, "--case", "pid", "--slide", "image", "--label", "grade"]
    return main([str(word) for word in (*known, *more)])


def test_counts_are_printed_and_both_forms_written(tmp_path, capsys):
    out = tmp_path / "out"
    assert make(table(tmp_path), "--folds", 2, "--val", 0.2, "--out", out) == 0
    assert capsys.readouterr().out.splitlines() == [
        "fold  split  grade=0  grade=1  slides  cases",
        "   0  train        5        6      11      8",
        "   0    val        1        2       3      2",
        "   0   test        7        5      12     10",
        "   1  train        6        4      10      8",
        "   1    val        1        1       2      2",
        "   1   test        6        8      14     10",
        f"2 fold(s): {out / 'splits.csv'}; CLAM's format: {out / 'clam'}",
    ]
    ours = pd.read_csv(out / "splits.csv", dtype=str)
    assert list(ours) == ["pid", "image", "grade", "hospital", "note", "fold_0", "fold_1"]
    pd.testing.assert_frame_equal(ours.iloc[:, :5], pd.read_csv(tmp_path / "labels.csv", dtype=str))
    assert (ours.groupby("pid")[["fold_0", "fold_1"]].nunique() == 1).all(axis=None)
    assert ((ours[["fold_0", "fold_1"]] == "test").sum(axis=1) == 1).all()
    folds = read_splits(out / "splits.csv", "image")
    assert read_splits(out / "clam") == folds
    made = json.loads((out / "made.json").read_text())
    assert (made["labels"], made["folds"], made["val"], made["seed"]) == ("labels.csv", 2, 0.2, 0)


def test_the_same_command_writes_the_same_and_another_seed_never_overwrites(tmp_path):
    labels, out = table(tmp_path), tmp_path / "out"
    make(labels, "--folds", 2, "--out", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "clam" / "splits_0.csv").unlink()  # as if the first run had been killed
    make(labels, "--folds", 2, "--out", out)
    with pytest.raises(UserError, match=r"contains other splits already\n(?s:.*)another --out"):
        make(labels, "--folds", 2, "--seed", 1, "--out", out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_centre_is_tested_in_one_fold_and_never_trained_on_there(tmp_path, capsys):
    out = tmp_path / "out"
    make(table(tmp_path, 60), "--folds", 2, "--site", "hospital", "--out", out)
    assert capsys.readouterr().out.splitlines()[0].endswith("cases  sites")
    done = pd.read_csv(out / "splits.csv", dtype=str)
    for fold in ("fold_0", "fold_1"):
        tested = set(done.hospital[done[fold] == "test"])
        assert tested
        assert tested.isdisjoint(done.hospital[done[fold] != "test"])


def test_repeats_are_other_folds_and_inner_ones_go_round(tmp_path):
    make(table(tmp_path), "--folds", 2, "--repeats", 2, "--inner", 3, "--out", tmp_path / "out")
    folds = read_splits(tmp_path / "out" / "splits.csv", "image")
    assert len(folds) == 12
    tests = [frozenset(i for i, s in fold.items() if s == "test") for fold in folds.values()]
    assert list(Counter(tests).values()) == [3, 3, 3, 3]


def test_repeats_with_equal_test_sets_give_a_warning(tmp_path, capsys):
    sites = ["--site", "hospital", "--folds", 5, "--repeats", 2]
    make(table(tmp_path, 60), *sites, "--out", tmp_path / "out")
    assert "warning: repeat 1 has the same test sets as repeat 0" in capsys.readouterr().out


def test_few_shots_leave_the_rest_unused(tmp_path, capsys):
    make(table(tmp_path), "--folds", 2, "--few-shot", 2, "--out", tmp_path / "out")
    assert "(unused)" in capsys.readouterr().out
    done = pd.read_csv(tmp_path / "out" / "splits.csv", dtype=str, keep_default_na=False)
    cases = done.drop_duplicates("pid")
    assert Counter(cases.grade[cases.fold_0 == "train"]) == {"0": 2, "1": 2}
    assert (cases.fold_0 == "").sum() > 0


def test_published_splits_are_taken_checked_and_written_in_both_forms(tmp_path):
    labels = table(tmp_path)
    make(labels, "--folds", 2, "--out", tmp_path / "a")
    make(labels, "--splits", tmp_path / "a" / "clam", "--out", tmp_path / "b")
    for name in ("splits.csv", "clam/splits_1.csv", "clam/splits_1_bool.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "folds" not in json.loads((tmp_path / "b" / "made.json").read_text())
    make(
        labels, "--splits", tmp_path / "a" / "splits.csv", "--few-shot", 1, "--out", tmp_path / "c"
    )
    before, after = (read_splits(tmp_path / n / "splits.csv", "image")["1"] for n in "ac")
    assert {i for i in before if after[i] != before[i]} <= {
        i for i, split in before.items() if split == "train"
    }
    assert Counter(after.values())["train"] < Counter(before.values())["train"]
    with pytest.raises(UserError, match="--splits uses folds as published, so --val has no effect"):
        make(labels, "--splits", tmp_path / "a" / "clam", "--val", 0.3, "--out", tmp_path / "d")


def test_published_splits_with_a_case_in_two_splits_or_unknown_ids_are_refused_by_name(tmp_path):
    labels, splits = table(tmp_path, 4), tmp_path / "splits_0.csv"
    splits.write_text(",train,val,test\n0,000-0,001-0,002-1\n1,002-0,,003-0\n")
    with pytest.raises(
        UserError, match=r"1 case\(s\) are in more than one(?s:.*)'002': test, train"
    ):
        make(labels, "--splits", splits, "--out", tmp_path / "out")
    splits.write_text(",train,val,test\n0,000-0,1-0,2-0\n")
    with pytest.raises(UserError) as error:
        make(labels, "--splits", splits, "--out", tmp_path / "out")
    assert "2 slides (1-0, 2-0): not in the label table (splits_0.csv, fold 0)" in str(error.value)
    line = "4 slides (001-0, 002-0, 002-1, ...): neither the slide nor its case has a split"
    assert line in str(error.value)
    assert not (tmp_path / "out").exists()


def test_ids_that_one_side_lacks_can_be_left_out_and_are_listed(tmp_path, capsys):
    labels, splits = table(tmp_path), tmp_path / "splits_0.csv"
    make(labels, "--out", tmp_path / "a")
    published = (tmp_path / "a" / "clam" / "splits_0.csv").read_text()
    splits.write_text(published.replace("000-0", "unknown"))
    options = ["--splits", splits, "--allow-missing", "--out", tmp_path / "b"]
    with pytest.raises(UserError, match="--unmatched drop"):
        make(labels, *options)
    assert make(labels, *options, "--unmatched", "drop") == 0
    assert "warning: " in capsys.readouterr().out
    listed = (tmp_path / "b.problems_0.csv").read_text()
    assert "unknown" in listed
    assert "000-0" in listed


def test_published_splits_that_use_a_case_in_part_are_refused(tmp_path):
    labels, splits = table(tmp_path, 4), tmp_path / "splits_0_bool.csv"
    rows = ["000-0,True,False", "001-0,False,True", "002-0,True,False", "002-1,False,False"]
    splits.write_text("\n".join([",train,test", *rows, "003-0,False,True", ""]))
    with pytest.raises(UserError, match=r"1 case\(s\) are used in part(?s:.*)case '002'"):
        make(labels, "--splits", splits, "--out", tmp_path / "out")
    splits.write_text(splits.read_text().replace("002-0,True", "002-0,False"))
    assert make(labels, "--splits", splits, "--allow-missing", "--out", tmp_path / "out") == 0
    assert pd.read_csv(tmp_path / "out" / "splits.csv")["fold_0"].isna().sum() == 2


def test_published_splits_of_cases_are_not_taken_for_those_of_slides_of_that_name(tmp_path):
    labels, splits = tmp_path / "labels.csv", tmp_path / "splits.csv"
    labels.write_text("image,pid,grade\n1,4,0\n2,3,1\n3,2,0\n4,1,1\n")
    splits.write_text("pid,fold\n1,train\n2,train\n3,test\n4,test\n")
    assert make(labels, "--splits", splits, "--out", tmp_path / "out") == 0
    found = pd.read_csv(tmp_path / "out" / "splits.csv")
    assert found["fold_0"].tolist() == ["test", "test", "train", "train"]


def test_a_split_without_a_class_stops_unless_it_is_allowed(tmp_path, capsys):
    labels = table(tmp_path)
    done = pd.read_csv(labels, dtype=str)
    done.loc[done.pid != "003", "grade"] = "0"  # a single event
    done.to_csv(labels, index=False)
    with pytest.raises(UserError, match=r"4 split\(s\) lack a class(?s:.*)has no grade=1"):
        make(labels, "--folds", 2, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert make(labels, "--folds", 2, "--allow-missing", "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("warning: fold ") == 4


def test_slides_of_rows_that_name_several_are_counted_and_are_in_both_formats(tmp_path, capsys):
    rows = [f"p{k:02d},{k:02d}a.svs;{k:02d}b.svs,{k % 2},\n" for k in range(12)]
    labels = tmp_path / "labels.csv"
    labels.write_text("pid,image,grade,note\n" + "".join(rows))
    given = ["--folds", 2, "--val", 0.34, "--slide-suffix", ".svs", "--slide-separator", ";"]
    make(labels, *given, "--out", tmp_path / "a")
    tested = [line.split() for line in capsys.readouterr().out.splitlines() if " test " in line]
    assert [row[2:] for row in tested] == [["6", "6", "12", "6"]] * 2
    whole = read_splits(tmp_path / "a" / "clam")
    assert set(whole["0"]) == {f"{k:02d}{part}" for k in range(12) for part in "ab"}
    form = {"rules": IdRules(".svs", ";")}
    assert read_splits(tmp_path / "a" / "splits.csv", "image", **form) == whole
    published = ["--splits", tmp_path / "a" / "splits.csv", *given[4:]]
    make(labels, *published, "--out", tmp_path / "b")
    for name in ("clam/splits_1.csv", "splits.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_numbers_are_cut_and_counted_by_groups_and_written_as_they_are(tmp_path, capsys):
    ages = {f"p{k:02d}": f"{20 + 7 * k % 60}.5" for k in range(60)}
    labels = tmp_path / "labels.csv"
    labels.write_text("pid,image,grade\n" + "".join(f"{c},{c}s,{a}\n" for c, a in ages.items()))
    make(labels, "--folds", 3, "--val", 0.25, "--out", tmp_path / "out")
    head, *lines = capsys.readouterr().out.splitlines()
    assert "grade=1 of 5 (20.5 to 32.3)" in head
    assert [line.split()[2:] for line in lines if " test " in line] == [
        ["4"] * 5 + ["20", "20"]
    ] * 3
    assert (
        dict(pd.read_csv(tmp_path / "out" / "splits.csv", dtype=str)[["pid", "grade"]].values)
        == ages
    )


def test_cases_without_a_label_are_dealt_evenly_and_are_no_class(tmp_path, capsys):
    rows = [f"p{k:02d},s{k:02d},{'01'[k % 2] if k % 4 else ''}\n" for k in range(24)]
    labels = tmp_path / "labels.csv"
    labels.write_text("pid,image,grade\n" + "".join(rows))
    make(labels, "--folds", 2, "--val", 0.25, "--out", tmp_path / "out")
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[2] == "grade=(blank)"
    assert [line.split()[2:5] for line in lines if " test " in line] == [["3", "3", "6"]] * 2
    make(labels, "--folds", 2, "--val", 0.25, "--few-shot", 2, "--out", tmp_path / "few")
    done = pd.read_csv(tmp_path / "few" / "splits.csv", dtype=str, keep_default_na=False)
    assert Counter(done.grade[done.fold_0 == "train"]) == {"0": 2, "1": 2}
    labels.write_text(labels.read_text().replace(",1\n", ",\n"))
    make(labels, "--folds", 2, "--out", tmp_path / "one")  # a blank is no class that a split lacks
    assert "warning" not in capsys.readouterr().out


def test_cases_of_no_centre_are_named_where_folds_go_by_centre(tmp_path):
    labels = table(tmp_path)
    labels.write_text(labels.read_text().replace("007,007-0,1,h2", "007,007-0,1,"))
    with pytest.raises(
        UserError, match=r"1 case\(s\) have no value in the column 'hospital'.*\n  007"
    ):
        make(labels, "--folds", 2, "--site", "hospital", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--site", "tcga"], "20 case.* are not TCGA barcodes"),
        (["--label", "nota"], "lacks column"),
        (["--folds", "21"], "20 cases cannot be divided into 21 folds"),
        (["--folds", "1"], "20 cases cannot be divided into 1 folds"),
        (["--site", "hospital", "--folds", "6"], "5 sites cannot be divided into 6 folds"),
        (["--site", "image"], "have slides of two centres"),
        (["--val", "1"], "--val must be a share"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--inner", "1"], "--inner must be at least 2"),
        (["--val", "0.99", "--allow-missing"], "0, 1, 2, 3, 4 have no training case"),
        (["--few-shot", "0"], "--few-shot must be at least 1"),
        (["--few-shot", "9"], "fewer than 9 training cases"),
    ],
)
def test_impossible_options_are_errors(tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        make(table(tmp_path), *more, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_listed_and_the_exit_code_is_2(tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("pid,image,grade\n1,a,0\n1,a,1\n2,,1\n3,c,0\n3,c,0\n")
    command = ["--labels", labels, "--case", "pid", "--slide", "image", "--label", "grade"]
    done = subprocess.run(
        [sys.executable, TOOL, *command, "--out", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: {labels} has 3 row(s) that cannot be used",
        "  a: contradicts an earlier row (labels.csv line 3)",
        "  (no slide id): empty slide or case id (labels.csv line 4)",
        "  c: duplicate row (labels.csv line 6)",
        "  correct or remove them",
    ]


def cut_real(labels: Path, out: Path, capsys, *more: object) -> list[list[str]]:
    """The printed rows of a real table, without their header."""
    args = ["--labels", labels, "--out", out, *more]
    assert main([str(word) for word in args]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]


def test_panda_is_cut_into_five_folds_of_even_grades(shared_data, tmp_path, capsys):
    labels = shared_data / "labels" / "panda.csv"
    known = ["--case", "case", "--slide", "slide", "--label", "label"]
    rows = cut_real(labels, tmp_path / "ours", capsys, *known)
    assert [row[1] for row in rows] == ["train", "val", "test"] * 5
    assert [" ".join(row[2:-1]) for row in rows[:3]] == [
        "1,852 1,769 898 820 807 791 6,937",
        "327 312 159 144 143 139 1,224",
        "545 521 264 241 237 233 2,041",
    ]
    tests = np.array([[int(n.replace(",", "")) for n in row[2:8]] for row in rows[2::3]])
    assert tests.sum(axis=0).tolist() == [2724, 2602, 1321, 1205, 1187, 1163]
    assert np.ptp(tests, axis=0).max() <= 1
    published = cut_real(labels, tmp_path / "theirs", capsys, *known, "--splits", labels)
    assert [row[-1] for row in published] == ["7,143", "1,019", "2,040"]


def test_brca_is_cut_by_site(shared_data, tmp_path, capsys):
    labels = shared_data / "labels" / "subtyping_tcga_brca.csv"
    known = ["--case", "case", "--slide", "slide", "--label", "label", "--site", "tcga"]
    rows = cut_real(labels, tmp_path / "out", capsys, *known)
    tested = [row[2:] for row in rows if row[1] == "test"]
    assert [(idc, ilc) for idc, ilc, *_ in tested] == [
        ("156", "42"),
        ("158", "39"),
        ("157", "39"),
        ("158", "39"),
        ("158", "39"),
    ]
    assert sum(int(sites) for *_, sites in tested) == 39  # each in one fold
    done = pd.read_csv(tmp_path / "out" / "splits.csv", dtype=str)
    for number in range(5):
        tests = done[f"fold_{number}"] == "test"
        assert set(done.case[tests].str[5:7]).isdisjoint(done.case[~tests].str[5:7])


def test_brca_survival_is_cut_and_taken_over_with_its_events(shared_data, tmp_path, capsys):
    folder = shared_data / "labels" / "survival_tcga_brca_3fold"
    known = ["--case", "ID", "--label", "Status"]
    ours = cut_real(folder / "fold_0.csv", tmp_path / "ours", capsys, *known, "--folds", 3)
    theirs = cut_real(
        folder / "fold_0.csv", tmp_path / "theirs", capsys, *known, "--splits", folder
    )
    tested = [[row[3] for row in rows if row[1] == "test"] for rows in (ours, theirs)]
    assert tested == [["49", "49", "48"], ["54", "48", "44"]]  # events
    assert [row[-1] for row in theirs] == ["671", "336", "671", "336", "672", "335"]
