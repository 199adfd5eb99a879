"""A cohort as a run loads it: splits from a split file, errors and warnings."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from e2e.bags.spec import LabelledSlide
from e2e.cohort.ids import explain_unmatched_ids
from e2e.cohort.labels import check_classes, suggest_classes
from e2e.cohort.load import load_cohort
from e2e.cohort.report import count_problems
from e2e.cohort.split_files import clam_files, fold_table, read_text_table
from e2e.errors import UserError
from e2e.runs.cohort import cohort_spec
from e2e.runs.crossval import make_plan
from e2e.runs.parts import REGISTRIES, build_task
from e2e.settings.layers import load_settings
from e2e.settings.schema import Columns, Cut, Data, Plugin, Settings
from e2e.slides import Slide
from e2e.store.lmdb import StoreWriter
from e2e.tasks.base import TASKS, Task
from tests.helpers.stores import RECIPE, patches, record, write_store

NAMES = [f"s{k}" for k in range(8)]
FOLDS = {
    "0": dict(
        zip(NAMES, ["train", "train", "train", "train", "val", "val", "test", ""], strict=True)
    ),
    "1": dict(
        zip(NAMES, ["", "test", "val", "train", "train", "val", "train", "test"], strict=True)
    ),
}


def write_labels(folder: Path, *, slides: Sequence[str] = NAMES, label: str = "abababab") -> Path:
    rows = [f"{n},{n.replace('s', 'c')},{x}\n" for n, x in zip(slides, label, strict=False)]
    path = folder / "labels.csv"
    path.write_text("slide,case,label\n" + "".join(rows))
    return path


@pytest.fixture
def cohort(tmp_path) -> Path:
    """Eight slides, their labels, and two folds of them in our form and in CLAM's."""
    write_store(tmp_path / "s.lmdb", {name: 2 + k for k, name in enumerate(NAMES)})
    labels = write_labels(tmp_path)
    (tmp_path / "splits.csv").write_bytes(fold_table(read_text_table(labels), "slide", FOLDS))
    for fold, splits in FOLDS.items():
        for name, content in clam_files(fold, splits, dict.fromkeys(NAMES, "x")).items():
            (tmp_path / name).write_bytes(content)
    return tmp_path


def classes(*words: str) -> Task:
    return build_task(Plugin("classification", {"classes": list(words or "ab")}))


def load(folder: Path, task: Task | None = None, **data: object):
    values = {"labels": str(folder / "labels.csv"), "stores": [str(folder / "s.lmdb")], **data}
    return load_cohort(
        cohort_spec(Data(**values), name="mine"),  # type: ignore[arg-type]
        task or classes(),
        problems_file=folder / "problems.csv",
    )


def splits_of(items: Sequence[LabelledSlide]) -> dict[str, str]:
    return {item.slide.id: item.slide.split for item in items}


def used(fold: str) -> dict[str, str]:
    return {name: split for name, split in FOLDS[fold].items() if split}


# --- data.split_file, data.fold ---


@pytest.mark.parametrize(
    ("file", "fold"),
    [("splits.csv", "0"), ("splits.csv", "fold_1"), ("", "1"), ("splits_0_bool.csv", None)],
)
def test_the_splits_come_from_a_fold_of_their_file_and_unused_slides_are_no_problem(
    cohort, file, fold
):
    items, problems = load(cohort, split_file=str(cohort / file), fold=fold)
    assert splits_of(items) == used((fold or "0").removeprefix("fold_"))
    assert problems == []


def test_the_tables_own_column_of_splits_does_not_count_beside_a_split_file(cohort):
    labels = cohort / "labels.csv"
    first, *rest = labels.read_text().splitlines()
    labels.write_text("\n".join([f"{first},split", *(f"{row},train" for row in rest)]))
    items, _ = load(cohort, split_file=str(cohort / "splits.csv"), fold="0")
    assert splits_of(items) == used("0")


def test_slides_a_fold_does_not_use_need_no_patches_and_no_label_of_the_task(cohort):
    write_labels(cohort, label="abababaz")  # s7
    items, _ = load(cohort, split_file=str(cohort / "splits_0_bool.csv"))
    assert splits_of(items) == used("0")
    write_labels(cohort, slides=[*NAMES, "s8"], label="abababaza")
    fold = cohort / "splits_5.csv"
    splits = FOLDS["0"] | {"s8": ""}
    files = clam_files("5", splits, dict.fromkeys(splits, "x"))
    fold.write_bytes(files["splits_5_bool.csv"])
    items, _ = load(cohort, split_file=str(fold))
    assert splits_of(items) == used("0")


def test_a_split_file_may_name_cases_or_files_with_their_ending(cohort):
    rows = [f"{name.replace('s', 'c')},{split}\n" for name, split in FOLDS["0"].items()]
    (cohort / "cases.csv").write_text("patient,fold\n" + "".join(rows))
    items, _ = load(cohort, split_file=str(cohort / "cases.csv"))
    assert splits_of(items) == used("0")
    write_labels(cohort, slides=[f"{name}.svs" for name in NAMES])
    rows = [f"{name}.svs,{split}\n" for name, split in FOLDS["0"].items()]
    (cohort / "files.csv").write_text("slide,fold\n" + "".join(rows))
    items, _ = load(cohort, split_file=str(cohort / "files.csv"), slide_suffix=".svs")
    assert splits_of(items) == used("0")


def test_slides_without_a_split_and_splits_without_a_slide_are_problems_as_others_are(cohort):
    text = (cohort / "splits_0.csv").read_text()
    (cohort / "other.csv").write_text(text.replace("s6", "s66"))
    asked = {"split_file": str(cohort / "other.csv"), "cut": Cut(test=0.25)}
    with pytest.raises(UserError) as error:
        load(cohort, **asked)
    where = "other.csv, fold 0"
    expected = [
        f"s6: neither the slide nor its case has a split ({where})",
        f"s7: neither the slide nor its case has a split ({where})",
        f"s66: not in the label table ({where})",
    ]
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{cohort}/labels.csv, {cohort}/other.csv and the stores of cohort")
    assert lines[0].endswith("do not match: 3 row(s) or slide(s) cannot be used, 6 can")
    assert lines[1:] == [
        f"  2 slides (s6, s7): neither the slide nor its case has a split ({where})",
        f"  s66: not in the label table ({where})",
        f"  full list: {cohort}/problems.csv",
        "  correct the table or pack the slides",
        "  or set data.unmatched=drop to continue without them",
    ]
    items, problems = load(cohort, **asked, unmatched="drop")
    assert sorted(splits_of(items)) == NAMES[:6]
    assert list(map(str, problems)) == expected


def test_validation_can_be_cut_where_the_file_has_none(cohort):
    rows = [f"{name},{'test' if name == 's7' else 'train'}\n" for name in NAMES]
    (cohort / "two.csv").write_text("slide,fold\n" + "".join(rows))
    with pytest.raises(UserError, match=r"no slide has the split 'val'\n.*data.cut.val=0.1"):
        load(cohort, split_file=str(cohort / "two.csv"))
    items, _ = load(cohort, split_file=str(cohort / "two.csv"), cut=Cut(val=0.3))
    assert sorted(splits_of(items).values()) == ["test", *["train"] * 5, "val", "val"]


def test_a_split_that_exists_is_not_cut_again(cohort, capsys):
    # As cohorts have it whose table has no splits, under the folds of a cross-validation.
    asked = {"split_file": str(cohort / "splits.csv"), "fold": "0", "cut": Cut(val=0.5, test=0.5)}
    items, _ = load(cohort, **asked)
    assert splits_of(items) == used("0")
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"warning: data.cut.{split} has no effect: there are slides in '{split}' already"
        for split in ("test", "val")
    ]


def test_a_missing_fold_or_split_file_is_an_error(cohort):
    with pytest.raises(UserError, match=r"has no fold '5'\n  it has: 0, 1\n  set data.fold"):
        load(cohort, split_file=str(cohort / "splits.csv"), fold="5")
    with pytest.raises(UserError, match=r"has 2 folds\n  it has: 0, 1\n  set data.fold"):
        load(cohort, split_file=str(cohort))
    with pytest.raises(UserError, match=r"no split file at .*none.csv\n  set data.split_file "):
        load(cohort, split_file=str(cohort / "none.csv"))
    with pytest.raises(UserError, match=r"data.fold must be null where data.split_file names no"):
        load(cohort, fold="0")


# --- what leaks ---


def test_a_split_file_with_a_case_in_two_splits_is_refused(cohort):
    labels = cohort / "labels.csv"
    labels.write_text(labels.read_text().replace("s4,c4", "s4,c0"))
    with pytest.raises(
        UserError, match=r"1 case\(s\) are in(?s:.*)'c0': train, val(?s:.*)split_file"
    ):
        load(cohort, split_file=str(cohort / "splits_0_bool.csv"))


def test_a_case_in_two_splits_is_refused_even_if_a_validation_cut_would_hide_it(cohort):
    rows = [f"{name},{'test' if k in (1, 6) else 'train'}\n" for k, name in enumerate(NAMES)]
    (cohort / "two.csv").write_text("slide,fold\n" + "".join(rows))
    labels = cohort / "labels.csv"
    labels.write_text(labels.read_text().replace("s1,c1", "s1,c0"))
    # All training cases but one become validation, so that the torn one is among them or left.
    for share in (0.3, 0.5, 0.8):
        with pytest.raises(UserError, match=r"'c0': test, train"):
            load(cohort, split_file=str(cohort / "two.csv"), cut=Cut(val=share))


def test_a_case_is_not_taken_for_another_ones_slide_of_that_name(cohort):
    slides = [str(k) for k in range(8)]
    write_store(cohort / "n.lmdb", {name: 2 + k for k, name in enumerate(slides)})
    rows = [f"{k},{7 - k},{'ab'[k % 2]}\n" for k in range(8)]
    (cohort / "labels.csv").write_text("slide,case,label\n" + "".join(rows))
    splits = ["train"] * 4 + ["val", "val", "test", "test"]
    cases = [f"{case},{split}\n" for case, split in enumerate(splits)]
    (cohort / "cases.csv").write_text("patient,fold\n" + "".join(cases))
    asked = {"stores": [str(cohort / "n.lmdb")], "split_file": str(cohort / "cases.csv")}
    assert splits_of(load(cohort, **asked)[0]) == dict(zip(slides, splits[::-1], strict=True))
    (cohort / "cases.csv").write_text("slide,fold\n" + "".join(cases))
    assert splits_of(load(cohort, **asked)[0]) == dict(zip(slides, splits, strict=True))


def test_the_same_patches_in_two_splits_stop_the_run(cohort):
    with StoreWriter(cohort / "other.lmdb", RECIPE) as writer:
        for name in NAMES:
            seen = "s0" if name == "s6" else name  # a training slide is tested as s6
            writer.add(record(name, 3), patches(seen, 3))
    asked = {"stores": [str(cohort / "other.lmdb")]}
    with pytest.raises(UserError, match=r"'s0' \(train\) = 's6' \(test\): the same 3 patches"):
        load(cohort, **asked, split_file=str(cohort / "splits_0_bool.csv"))
    items, _ = load(
        cohort, **asked, split_file=str(cohort / "splits.csv"), fold="1"
    )  # s0 is not used there
    assert splits_of(items) == used("1")


# --- classes ---


def test_training_with_one_class_alone_stops(cohort):
    write_labels(cohort, label="aaaababa")
    items, _ = load(cohort, split_file=str(cohort / "splits_0_bool.csv"))
    trained = [item for item in items if item.slide.split == "train"]
    with pytest.raises(
        UserError, match=r"all training slides have label=a: training needs slides of two or more"
    ):
        classes().fit([item.target for item in trained], [item.slide.case for item in trained])


def test_a_class_missing_from_a_split_is_one_warning_on_the_leading_rank(cohort, capsys):
    write_labels(cohort, label="abababca")
    asked = {"labels": str(cohort / "labels.csv"), "stores": [str(cohort / "s.lmdb")]}
    load(cohort, classes("a", "b", "c"), split_file=str(cohort / "splits_0_bool.csv"))
    assert capsys.readouterr().out.splitlines() == [
        "warning: train has no label=c: it cannot be learned",
        "warning: val has no label=c: metrics that need every class are undefined on this split and "
        "cannot select the epoch",
        "warning: test has no label=a and no label=b: metrics that need every class are undefined on "
        "this split",
    ]
    data = Data(**asked, split_file=str(cohort / "splits_0_bool.csv"))
    load_cohort(cohort_spec(data), classes("a", "b", "c"))
    assert capsys.readouterr().out == ""


MONTHS = {"time": "7"}
LACKING = {
    "survival": ({"event": "1"}, {"event": "1", **MONTHS}, {"event": "0", **MONTHS}, ["event"]),
    "grading": ({"classes": ["0", "1"], "loss": "coral"}, {"label": "0"}, {"label": "1"}, ["label=0"]),
    "multilabel": (
        {"labels": ["er", "pr"]}, {"er": "1", "pr": "0"}, {"er": "1", "pr": ""}, ["pr=0"],
    ),
    "regression": ({}, {"label": "1.5"}, {"label": "2.5"}, []),
}  # fmt: skip
"""Task -> its options, a slide of training and one of test; what the test lacks."""


@pytest.mark.parametrize("name", LACKING)
def test_a_split_without_an_event_a_grade_or_a_label_gives_a_warning_for_every_task(
    name, make_store
):
    options, one, other, lacking = LACKING[name]
    task, store = TASKS.build(name, **options), make_store({"a": 1, "b": 1})
    items = [
        LabelledSlide(Slide(slide, slide, split, words), store, task.encode(words))
        for slide, split, words in (("a", "train", one), ("b", "test", other))
    ]
    said = [line for line in check_classes(items, task) if line.startswith("test")]
    undefined = "metrics that need every class are undefined on this split"
    assert said == [f"test has no {word}: {undefined}" for word in lacking]


# --- rows that name several slides ---


def join_rows(cohort: Path) -> None:
    """The label table with the slides of two rows in a cell, a case each."""
    rows = [f"{a}.svs;{b}.svs,c{a},{'ab'[k % 2]}" for k, (a, b) in enumerate(PAIRS)]
    (cohort / "labels.csv").write_text("\n".join(["slide,case,label", *rows]) + "\n")


PAIRS = list(zip(NAMES[::2], NAMES[1::2], strict=True))
JOINED = {"slide_suffix": ".svs", "slide_separator": ";"}


@pytest.mark.parametrize("ids", ["cells", "slides", "cases"])
def test_every_slide_of_a_row_is_taken_in_whatever_a_split_file_names(cohort, ids):
    join_rows(cohort)
    words = ["train", "train", "val", "test"]
    named = {
        "cells": [[f"{a}.svs;{b}.svs"] for a, b in PAIRS],
        "slides": [[a, f"{b}.svs"] for a, b in PAIRS],
        "cases": [[f"c{a}"] for a, _ in PAIRS],
    }[ids]
    lines = [f"{name},{word}" for own, word in zip(named, words, strict=True) for name in own]
    column = "case" if ids == "cases" else "slide"
    (cohort / "file.csv").write_text("\n".join([f"{column},fold", *lines]) + "\n")
    items, problems = load(cohort, split_file=str(cohort / "file.csv"), **JOINED)
    assert problems == []
    assert splits_of(items) == dict(zip(NAMES, [w for w in words for _ in "ab"], strict=True))
    assert [item.slide.target["label"] for item in items] == list("aabbaabb")
    cases, _ = load(cohort, split_file=str(cohort / "file.csv"), unit="case", **JOINED)
    assert [item.reader.num_patches(item.slide.id) for item in cases] == [5, 9, 13, 17]


def test_without_the_setting_such_rows_are_problems_that_name_it(cohort):
    join_rows(cohort)
    with pytest.raises(
        UserError, match=r"4 slides \(s0.svs;s1, .*: not in any store; .* data.slide_separator=';'"
    ):
        load(cohort, slide_suffix=".svs", columns=Columns(split=None), cut=Cut(val=0.5))


def crossval_settings(cohort: Path, *overrides: str) -> Settings:
    join_rows(cohort)
    (cohort / "mine.yaml").write_text(
        f"data: {{labels: {cohort}/labels.csv, stores: [{cohort}/s.lmdb], slide_suffix: .svs,"
        " slide_separator: ';', columns: {case: null}}\n"
        "task: {name: classification, classes: [a, b]}\n"
    )
    given = {"model": "e2e_r18_abmil", "files": [], "registries": REGISTRIES}
    return load_settings(datasets=f"{cohort}/mine.yaml", overrides=overrides, **given)


def test_folds_that_a_cross_validation_cuts_are_of_whole_rows(cohort):
    settings, out = crossval_settings(cohort), cohort / "cv"
    make_plan(settings, (), out=out, num_folds=2, only=(), seeds=[0])
    for fold in "01":
        chosen = {"split_file": str(out / "splits.csv"), "fold": fold}
        data = replace(settings.data, **chosen, cut=Cut(val=0.5))
        items, problems = load_cohort(cohort_spec(data), classes())
        assert problems == []
        found = splits_of(items)
        assert set(found) == set(NAMES)
        assert all(found[a] == found[b] for a, b in PAIRS)
        assert list(found.values()).count("test") == 4


def test_a_cross_validation_tells_bad_cells_before_any_training(cohort):
    splits = cohort / "torn.csv"
    splits.write_text("slide,fold\ns0.svs;s1.svs,train\ns1.svs;s2.svs,test\n")
    settings = crossval_settings(cohort, f"data.split_file={splits}")
    with pytest.raises(UserError, match=r"fold 0: 's1' is in train and test"):
        make_plan(settings, (), out=cohort / "cv", num_folds=None, only=(), seeds=[0])
    settings, labels = crossval_settings(cohort), cohort / "labels.csv"
    labels.write_text(labels.read_text().replace("s2.svs;s3.svs", "s2.svs;s2.svs"))
    with pytest.raises(UserError, match=r"s2.svs: listed twice in its row \(labels.csv line 3\)"):
        make_plan(settings, (), out=cohort / "cv", num_folds=2, only=(), seeds=[0])


# --- rows that are labelled in part, or not at all ---


@pytest.mark.parametrize("name", TASKS.names())
def test_blanks_are_what_the_task_makes_of_them_and_what_has_no_label_is_listed(tmp_path, name):
    options, examples = TASKS.plugin_class(name).examples()[0]
    task = TASKS.build(name, **options)
    rows = [dict(examples[k % len(examples)]) for k in range(8 + len(task.columns))]
    for row, column in zip(rows[8:], task.columns, strict=True):
        row[column] = ""  # one cell less
    rows.append(dict.fromkeys(task.columns, ""))
    splits = [["train", "val"][k % 4 == 0] for k in range(len(rows))]
    names = [f"s{k:02d}" for k in range(len(rows))]
    table = pd.DataFrame(rows).assign(slide=names, case=names, split=splits)
    table.to_csv(tmp_path / "labels.csv", index=False)
    write_store(tmp_path / "s.lmdb", {slide: 1 + k for k, slide in enumerate(names)})
    known = [
        slide for slide, row in zip(names, rows, strict=True) if task.is_labelled(task.encode(row))
    ]
    assert set(names[:8]) <= set(known) <= set(names[:-1])
    unlabelled = [slide for slide in names if slide not in known]
    blank = [dict(zip(names, rows, strict=True))[slide] == rows[-1] for slide in unlabelled]
    line = f"{names[-1]}: " if sum(blank) == 1 else f"{sum(blank)} slides .*{names[-1]}.: "
    with pytest.raises(UserError, match=f"{line}no value for {', '.join(task.columns)} "):
        load(tmp_path, task)
    items, problems = load(tmp_path, task, unmatched="drop")
    assert [item.slide.id for item in items] == known
    assert sorted(p.slide for p in problems) == unlabelled
    assert (tmp_path / "problems.csv").read_text().count("no value for") == len(unlabelled)
    task.fit([item.target for item in items], known)
    losses = task.loss(
        torch.zeros(len(items), task.num_outputs), torch.stack([item.target for item in items])
    )
    assert losses.isfinite().all()


def test_a_slide_with_one_of_two_labels_is_trained_on(tmp_path):
    rows = ["a,1,0,train", "b,0,1,train", "c,1,,train", "d,,1,val", "e,,,val"]
    (tmp_path / "labels.csv").write_text("\n".join(["slide,er,pr,split", *rows]) + "\n")
    write_store(tmp_path / "s.lmdb", {slide: 1 + k for k, slide in enumerate("abcde")})
    task = TASKS.build("multilabel", labels=["er", "pr"])
    items, problems = load(tmp_path, task, columns=Columns(case=None), unmatched="drop")
    assert splits_of(items) == {"a": "train", "b": "train", "c": "train", "d": "val"}
    assert items[2].target.tolist() == pytest.approx([1, math.nan], nan_ok=True)
    assert list(map(str, problems)) == ["e: no value for er, pr (label table)"]


def test_a_slide_that_a_fold_does_not_use_may_lack_its_label(cohort):
    write_labels(cohort, label="ababab")
    table = pd.read_csv(cohort / "labels.csv", dtype=str, keep_default_na=False)
    table.loc[len(table)] = ["s6", "c6", "a"]
    table.loc[len(table)] = ["s7", "c7", ""]
    table.to_csv(cohort / "labels.csv", index=False)
    items, problems = load(cohort, split_file=str(cohort / "splits_0_bool.csv"))
    assert problems == []
    assert splits_of(items) == used("0")


# --- centres ---


def test_slides_have_the_centres_of_the_table(cohort):
    table = pd.read_csv(cohort / "labels.csv").assign(hospital=[*"nnssnns", ""])
    table.to_csv(cohort / "labels.csv", index=False)
    asked = {"columns": Columns(split=None, centre="hospital"), "cut": Cut(val=0.5)}
    items, _ = load(cohort, **asked)
    assert [item.slide.centre for item in items] == ["n", "n", "s", "s", "n", "n", "s", ""]


# --- what a message says of many rows ---


def error_of(cohort: Path, task: Task | None = None, **data: object) -> list[str]:
    with pytest.raises(UserError) as error:
        load(cohort, task, **({"columns": Columns(split=None), "cut": Cut(val=0.3)} | data))
    return str(error.value).splitlines()


def test_identical_problems_are_one_line_with_a_count_and_three_examples(cohort):
    extra = [f"x{k}" for k in range(20)]
    write_labels(cohort, slides=[*NAMES, *extra], label="ab" * 14)
    labels = cohort / "labels.csv"
    labels.write_text(labels.read_text() + "x0,x0,a\nx1,x1,b\n")
    assert error_of(cohort) == [
        f"{labels} and the stores of cohort 'mine' do not match: 22 row(s) or slide(s) cannot be "
        "used, 8 can",
        "  2 slides (x0, x1): duplicate row (labels.csv lines 30, 31)",
        "  20 slides (x0, x1, x2, ...): not in any store (label table)",
        f"  full list: {cohort}/problems.csv",
        "  correct the table or pack the slides",
        "  or set data.unmatched=drop to continue without them",
    ]
    assert len(pd.read_csv(cohort / "problems.csv")) == 22


SYSTEMATIC = {
    "a suffix in the table": (
        lambda name: f"{name}.svs",
        ["every id in the label table matches after removing '.svs'", "set data.slide_suffix=.svs"],
    ),
    "paths in the table": (
        lambda name: f"/data/wsi/{name}.svs",
        [
            "every id in the label table matches after removing folders and '.svs'",
            "set data.match=[file_name] data.slide_suffix=.svs",
        ],
    ),
    "paths, letter case and a suffix": (
        lambda name: f"centre\\{name.upper()}_HE.SVS",
        [
            "every id in the label table matches after removing folders and '_HE.SVS', if upper and lower"
            " case are ignored",
            "set data.match=[file_name,ignore_case] data.slide_suffix=_HE.SVS",
        ],
    ),
    "upper case in the table": (
        str.upper,
        [
            "every id in the label table matches if upper and lower case are ignored",
            "set data.match=[ignore_case]",
        ],
    ),
}


@pytest.mark.parametrize("difference", SYSTEMATIC)
def test_a_difference_that_explains_all_ids_is_named_and_dropping_everything_is_not_advised(
    cohort, difference
):
    change, explanation = SYSTEMATIC[difference]
    rows = [f"{change(name)},c{k},{'ab'[k % 2]}\n" for k, name in enumerate(NAMES)]
    (cohort / "labels.csv").write_text("slide,case,label\n" + "".join(rows))
    lines = error_of(cohort)
    assert lines[0].endswith("16 row(s) or slide(s) cannot be used, 0 can")
    assert [line.strip() for line in lines[-len(explanation) :]] == explanation
    assert not any("data.unmatched" in line for line in lines)
    assert error_of(cohort, unmatched="drop") == lines  # nothing would be left


@pytest.mark.parametrize("difference", SYSTEMATIC)
def test_the_advised_settings_match_all_ids(cohort, difference):
    change, explanation = SYSTEMATIC[difference]
    rows = [f"{change(name)},c{k},{'ab'[k % 2]}\n" for k, name in enumerate(NAMES)]
    (cohort / "labels.csv").write_text("slide,case,label\n" + "".join(rows))
    advice = dict(word.split("=") for word in explanation[1].removeprefix("set ").split())
    values = {}
    if "data.match" in advice:
        values["match"] = advice["data.match"].strip("[]").split(",")
    if "data.slide_suffix" in advice:
        values["slide_suffix"] = advice["data.slide_suffix"]
    items, problems = load(cohort, columns=Columns(split=None), cut=Cut(val=0.3), **values)
    assert ([item.slide.id for item in items], problems) == (NAMES, [])


def test_an_explanation_holds_for_most_ids_and_counts_them():
    ids, data_ids = [f"s{k}.svs" for k in range(20)], [f"s{k}" for k in range(1, 20)]
    assert explain_unmatched_ids(ids, data_ids) == [
        "19 of 20 ids in the label table match after removing '.svs'",
        "set data.slide_suffix=.svs",
    ]


def test_a_near_miss_is_named():
    assert explain_unmatched_ids(["TCGA-O2-0001"], ["TCGA-02-0001", "x"]) == [
        "near misses: 'TCGA-O2-0001' is nearly 'TCGA-02-0001' in the stores; correct the ids"
    ]


def test_an_id_that_leads_out_of_a_folder_is_a_problem_of_its_row(cohort):
    write_labels(cohort, slides=[*NAMES, "../../x"], label="ababababa")
    lines = error_of(cohort)
    assert lines[1] == "  ../../x: leads out of a folder ('..') (labels.csv line 10)"


def test_the_advised_suffix_works(cohort):
    write_labels(cohort, slides=[f"{name}.svs" for name in NAMES])
    given = {"columns": Columns(split=None), "cut": Cut(val=0.3)}
    items, problems = load(cohort, **given, slide_suffix=".svs")
    assert ([item.slide.id for item in items], problems) == (NAMES, [])


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_ids_that_differ_in_their_unicode_form_alone_match(cohort, form):
    names = [unicodedata.normalize(form, f"{'é'}{k}") for k in range(8)]
    other = "NFD" if form == "NFC" else "NFC"
    write_store(cohort / "u.lmdb", {name: 2 + k for k, name in enumerate(names)})
    write_labels(cohort, slides=[unicodedata.normalize(other, name) for name in names])
    given = {"columns": Columns(split=None), "cut": Cut(val=0.3)}
    items, problems = load(cohort, stores=[str(cohort / "u.lmdb")], **given)
    assert ([item.slide.id for item in items], problems) == (names, [])


def test_a_suffix_that_only_the_stores_have_is_explained():
    assert explain_unmatched_ids(["a", "b"], ["a.ome", "b.ome", "c.ome"]) == [
        "every id in the label table matches after removing '.ome' from the ids in the stores",
        "write the same ids in both: with '.ome' in the label table, or without it in the stores",
    ]


@pytest.mark.parametrize(
    ("ids", "data_ids"),
    [
        (["a.svs", "b.svs"], ["a"]),  # one of them has no partner
        (["a.svs", "b.tif"], ["a", "b"]),  # no common suffix
        (["s66"], ["s6"]),  # another number, not a suffix
        (["s6"], ["s66"]),
        (["aB", "Ab"], ["ab"]),  # would become one
        (["a"], []),
        ([], ["a"]),
    ],
)
def test_ids_without_one_difference_that_explains_all_are_not_explained(ids, data_ids):
    assert explain_unmatched_ids(ids, data_ids) == []


def test_ids_of_a_split_file_that_have_a_suffix_are_explained(cohort):
    rows = [f"{name}.svs,{split}\n" for name, split in FOLDS["0"].items()]
    (cohort / "files.csv").write_text("slide,fold\n" + "".join(rows))
    lines = error_of(cohort, split_file=str(cohort / "files.csv"), cut=Cut())
    assert lines[-2:] == [
        "  every id in the split file matches after removing '.svs'",
        "  set data.slide_suffix=.svs",
    ]


def test_labels_that_are_no_classes_are_counted_beside_the_classes_with_the_setting(cohort):
    (cohort / "labels.csv").write_text(
        "slide,case,label\n"
        + "".join(f"{n},{n},{'tumor' if k > 4 else 'normal'}\n" for k, n in enumerate(NAMES))
    )
    lines = error_of(cohort, classes("benign", "malignant"))
    assert lines[1] == (
        "  8 slides (s0, s1, s2, ...): column 'label' holds normal (5 rows), tumor (3); "
        "task.classes is [benign, malignant] (label table)"
    )
    assert lines[-1] == "  set task.classes=[normal,tumor]"
    items, _ = load(
        cohort,
        classes("normal", "tumor"),
        columns=Columns(split=None),
        cut=Cut(val=0.3),
    )
    assert len(items) == 8


def test_one_unknown_label_may_be_corrected_added_or_dropped(cohort):
    write_labels(cohort, label="abababac")
    lines = error_of(cohort)
    assert lines[1] == (
        "  s7: column 'label' holds a (4 rows), b (3), c (1); task.classes is [a, b] (label table)"
    )
    assert lines[-2:] == [
        "  correct the labels, or set task.classes=[a,b,c]",
        "  or set data.unmatched=drop to continue without them",
    ]
    assert "label 'c'" in (cohort / "problems.csv").read_text()


@pytest.mark.parametrize(
    ("names", "words", "advice"),
    [
        ("ba", "AB", "every label matches if upper and lower case are ignored: set task.classes=[B,A]"),
        ("10", ("0.0", "1.0"), "every label matches after removing '.0': a program wrote whole "
         "numbers as decimals; save the column 'label' as text"),
        ("ab", ("no tumor", "it's"), "set task.classes=\"['it''s','no tumor']\""),
        ("ab", ("x", "x"), "set task.column to the column of the classes"),
        ("ab", ("10", "9"), "set task.classes=[9,10]"),
    ],
)  # fmt: skip
def test_what_to_change_where_no_label_is_a_class(names, words, advice):
    slides = [Slide(f"s{k}", "c", "", {"label": word}) for k, word in enumerate(words)]
    assert suggest_classes(slides, classes(*names)) == [advice]


def test_a_task_without_classes_has_no_words_to_suggest():
    slides = [Slide("s", "c", "", {"label": "x"})]
    assert suggest_classes(slides, TASKS.build("regression")) == []


def test_other_words_for_the_splits_are_counted_with_the_setting_that_works(cohort):
    words = ["Training"] * 4 + ["Val"] * 2 + ["Hold-out"] * 2
    rows = [
        f"{n},{n},{'ab'[k % 2]},{w}\n" for k, (n, w) in enumerate(zip(NAMES, words, strict=True))
    ]
    (cohort / "labels.csv").write_text("slide,case,label,split\n" + "".join(rows))
    lines = error_of(cohort, columns=Columns(split="split"), cut=Cut())
    assert lines[-2:] == [
        "  the split column also holds Training (4), Val (2), Hold-out (2)",
        "  set 'data.splits={Training: train, Val: val, \"Hold-out\": test}'",
    ]
    splits = Data().splits | {"Training": "train", "Val": "val", "Hold-out": "test"}
    items, problems = load(cohort, columns=Columns(split="split"), splits=splits)
    assert (len(items), problems) == (8, [])


def test_what_is_dropped_is_a_warning_with_counts(cohort, capsys):
    write_labels(cohort, slides=[*NAMES, "x1", "x2"], label="ab" * 5)
    values = {"columns": Columns(split=None), "cut": Cut(val=0.3), "unmatched": "drop"}
    items, problems = load(cohort, **values)
    assert (len(items), count_problems(problems)) == (8, {"not in any store (label table)": 2})
    assert (
        "warning: 2 row(s) or slide(s) left out (data.unmatched=drop), listed in "
        f"{cohort}/problems.csv\n  2 slides (x1, x2): not in any store (label table)"
    ) in capsys.readouterr().out
