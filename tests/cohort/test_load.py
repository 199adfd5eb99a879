"""A cohort as a run loads it: splits from their own file, and what of them stops or is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from e2e.bags.spec import LabelledSlide
from e2e.cohort.load import check_classes, load_cohort
from e2e.cohort.split_files import clam_files, fold_table, read_cells
from e2e.errors import UserError
from e2e.runs.crossval import make_plan
from e2e.runs.parts import REGISTRIES, build_task
from e2e.settings.layers import load_settings
from e2e.settings.schema import Columns, Cut, Data, Plugin, Settings
from e2e.slides import Slide
from e2e.store.lmdb import StoreWriter
from e2e.tasks.base import TASKS, Task
from tests.helpers.stores import RECIPE, patches, record, write_store
from tests.helpers.tasks import EXAMPLES

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
    (tmp_path / "splits.csv").write_bytes(fold_table(read_cells(labels), "slide", FOLDS))
    for fold, splits in FOLDS.items():
        for name, content in clam_files(fold, splits, dict.fromkeys(NAMES, "x")).items():
            (tmp_path / name).write_bytes(content)
    return tmp_path


def classes(*words: str) -> Task:
    return build_task(Plugin("classification", {"classes": list(words or "ab")}))


def load(folder: Path, task: Task | None = None, **data: object):
    values = {"labels": str(folder / "labels.csv"), "stores": [str(folder / "s.lmdb")], **data}
    return load_cohort(
        Data(**values),  # type: ignore[arg-type]
        task or classes(),
        name="mine",
        seed=0,
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
        f"s66: the label table has no row for it ({where})",
    ]
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{cohort}/labels.csv, {cohort}/other.csv and the stores of cohort")
    assert [line.strip() for line in lines[1:4]] == expected
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


def test_a_split_that_is_there_is_not_cut_once_more(cohort, capsys):
    # As cohorts have it whose table has no splits, under the folds of a cross-validation.
    asked = {"split_file": str(cohort / "splits.csv"), "fold": "0", "cut": Cut(val=0.5, test=0.5)}
    items, _ = load(cohort, **asked)
    assert splits_of(items) == used("0")
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"NOTE data.cut.{split} cuts nothing, since there are slides of '{split}' already"
        for split in ("test", "val")
    ]


def test_a_fold_or_a_file_that_is_not_there_is_told(cohort):
    with pytest.raises(UserError, match=r"has no fold '5'\n  it has: 0, 1\n  set data.fold"):
        load(cohort, split_file=str(cohort / "splits.csv"), fold="5")
    with pytest.raises(UserError, match=r"has 2 folds\n  it has: 0, 1\n  set data.fold"):
        load(cohort, split_file=str(cohort))
    with pytest.raises(UserError, match=r"no split file at .*none.csv\n  set data.split_file="):
        load(cohort, split_file=str(cohort / "none.csv"))
    with pytest.raises(UserError, match=r"data.fold must be null where data.split_file names no"):
        load(cohort, fold="0")


# --- what leaks ---


def test_a_case_that_a_split_file_tears_stops_the_run(cohort):
    labels = cohort / "labels.csv"
    labels.write_text(labels.read_text().replace("s4,c4", "s4,c0"))
    with pytest.raises(
        UserError, match=r"1 case\(s\) lie in(?s:.*)'c0': train, val(?s:.*)split_file"
    ):
        load(cohort, split_file=str(cohort / "splits_0_bool.csv"))


def test_a_torn_case_stops_the_run_also_where_validation_is_cut_and_would_take_it_whole(cohort):
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
    with pytest.raises(UserError, match=r"all training slides have label=a: one class alone"):
        classes().fit([item.target for item in trained], [item.slide.case for item in trained])


def test_a_class_that_a_split_lacks_is_one_line_on_the_screen_of_the_rank_that_leads(
    cohort, capsys
):
    write_labels(cohort, label="abababca")
    asked = {"labels": str(cohort / "labels.csv"), "stores": [str(cohort / "s.lmdb")]}
    load(cohort, classes("a", "b", "c"), split_file=str(cohort / "splits_0_bool.csv"))
    assert capsys.readouterr().out.splitlines() == [
        "NOTE train has no label=c: it cannot be learned",
        "NOTE val has no label=c: metrics that need every class are not defined there, nor choose an epoch",
        "NOTE test has no label=a and no label=b: metrics that need every class are not defined there",
    ]
    data = Data(**asked, split_file=str(cohort / "splits_0_bool.csv"))
    load_cohort(data, classes("a", "b", "c"), name="", seed=0, problems_file=None)
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
def test_a_split_without_an_event_a_grade_or_a_label_is_told_of_every_task(name, make_store):
    options, one, other, lacking = LACKING[name]
    task, store = TASKS.build(name, **options), make_store({"a": 1, "b": 1})
    items = [
        LabelledSlide(Slide(slide, slide, split, words), store, task.encode(words))
        for slide, split, words in (("a", "train", one), ("b", "test", other))
    ]
    said = [line for line in check_classes(items, task) if line.startswith("test")]
    undefined = "metrics that need every class are not defined there"
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
    assert [item.store.num_patches(item.slide.id) for item in cases] == [5, 9, 13, 17]


def test_without_the_setting_such_rows_are_problems_that_name_it(cohort):
    join_rows(cohort)
    with pytest.raises(UserError, match=r"s0.svs;s1: no store has it; .* data.slide_separator=';'"):
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
    make_plan(settings, (), out=out, cut=2, only=(), seeds=[0])
    for fold in "01":
        chosen = {"split_file": str(out / "splits.csv"), "fold": fold}
        data = replace(settings.data, **chosen, cut=Cut(val=0.5))
        items, problems = load_cohort(data, classes(), name="", seed=0, problems_file=None)
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
        make_plan(settings, (), out=cohort / "cv", cut=None, only=(), seeds=[0])
    settings, labels = crossval_settings(cohort), cohort / "labels.csv"
    labels.write_text(labels.read_text().replace("s2.svs;s3.svs", "s2.svs;s2.svs"))
    with pytest.raises(UserError, match=r"s2.svs: named twice in its row \(labels.csv line 3\)"):
        make_plan(settings, (), out=cohort / "cv", cut=2, only=(), seeds=[0])


# --- rows that are labelled in part, or not at all ---


@pytest.mark.parametrize("name", TASKS.names())
def test_blanks_are_what_the_task_makes_of_them_and_what_has_no_label_is_listed(tmp_path, name):
    options, words = EXAMPLES[name]
    task = TASKS.build(name, **options)
    rows = [dict(words[k % len(words)]) for k in range(8 + len(task.columns))]
    for row, column in zip(rows[8:], task.columns, strict=True):
        row[column] = ""  # one word less
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
    with pytest.raises(UserError, match=f"{names[-1]}: no value for {', '.join(task.columns)} "):
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
