"""A cohort as a run loads it: splits from their own file, and what of them stops or is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from e2e.build import build_task, check_classes, load_cohort
from e2e.config import Cut, Data, Plugin
from e2e.data.cohort import Slide
from e2e.data.loader import LabelledSlide
from e2e.data.split_files import clam_files, fold_table, read_cells
from e2e.data.store import StoreWriter
from e2e.errors import UserError
from e2e.tasks.base import Task
from tests.conftest import RECIPE, patches, record, write_store

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
        "NOTE val has no label=c: metrics that need every class are not defined there",
        "NOTE test has no label=a and no label=b: metrics that need every class are not defined there",
    ]
    data = Data(**asked, split_file=str(cohort / "splits_0_bool.csv"))
    load_cohort(data, classes("a", "b", "c"), name="", seed=0, problems_file=None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("target", [torch.tensor(1.5), torch.tensor([1, 0, 1])])
def test_targets_that_are_no_class_numbers_have_no_missing_class(target, make_store):
    store = make_store({"a": 1, "b": 1})
    items = [
        LabelledSlide(Slide(name, name, split, {"label": name}), store, target)
        for name, split in (("a", "train"), ("b", "val"))
    ]
    assert check_classes(items, classes()) == []
