"""The check of a cohort: it describes the cohort, and refuses what a run would refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from e2e.errors import exit_code
from e2e.runs.check import main
from e2e.store.lmdb import PatchStore, StoreWriter
from tests.helpers.stores import RECIPE, record, write_store

SPLITS = ["train"] * 8 + ["val"] * 4 + ["test"] * 4
SLIDES = [f"TCGA-{'AB'[k % 3 == 0]}{k % 2}-{k:04d}-01Z-00-DX1" for k in range(16)]


def write_table(folder: Path, **columns: list[str]) -> Path:
    table = {
        "case": [slide[:12] for slide in SLIDES],
        "slide": SLIDES,
        "split": SPLITS,
        "label": ["ab"[k % 2] for k in range(16)],
        **columns,
    }
    pd.DataFrame(table).to_csv(folder / "labels.csv", index=False)
    return folder


@pytest.fixture
def cohort(tmp_path, monkeypatch) -> Path:
    """A table of 16 slides, no store yet; the folder is the one worked in."""
    (tmp_path / "mine.yaml").write_text(
        "data: {labels: labels.csv, stores: [s.lmdb], pack: --mpp 0.5 --patch-size 100}\n"
        "task: {name: classification, classes: [a, b]}\n"
    )
    monkeypatch.chdir(tmp_path)
    return write_table(tmp_path)


@pytest.fixture
def said(capsys):
    """Run the doctor; its exit code, what it printed, its error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = exit_code(lambda: main(["--datasets", "mine.yaml", *arguments]))
        return code, *capsys.readouterr()

    return run


def pack(folder: Path, slides=SLIDES) -> None:
    write_store(folder / "s.lmdb", {slide: 1 + k for k, slide in enumerate(slides)})


def test_without_a_store_the_table_alone_is_checked_and_packing_is_next(cohort, said):
    code, out, _ = said()
    assert code == 0
    assert "labels.csv: 16 slides, 16 cases" in out
    assert "label: 'a' 8, 'b' 8" in out
    assert "train  8 slides, 8 cases: 'a' 4, 'b' 4" in out
    assert "if a slide has 1,000 patches (--patches) of 100 px at 2.5 kB" in out
    # The path in the YAML is relative to it.
    assert f"e2e pack --slides SLIDES --out {cohort}/s.lmdb --mpp 0.5 --patch-size 100" in out


def test_with_a_store_its_patches_are_counted_and_training_is_next(cohort, said):
    pack(cohort)
    code, out, _ = said("bag.patches=5", "--model", "e2e_r18_abmil")
    assert code == 0
    assert "train  8 slides, 8 cases, 36 patches: 'a' 4, 'b' 4" in out
    assert "no slide's patches are in two splits" in out
    assert "um per pixel: 0.5\n" in out
    assert "8 bags of at most 5 patches" in out
    assert f"disk: {(cohort / 's.lmdb').stat().st_size / 2**20:.3g} MiB" in out
    command = "e2e train --datasets mine.yaml --model e2e_r18_abmil bag.patches=5"
    assert f"next: {command}" in out


def test_frozen_features_are_weighed_in_memory(cohort, said):
    (cohort / "feats").mkdir()
    for k, slide in enumerate(SLIDES):
        np.save(cohort / "feats" / f"{slide}.npy", np.full((3, 10), 1 + k, np.float32))
    code, out, _ = said("--model", "abmil", "data.features=[feats]")
    assert code == 0
    assert "all features" in out
    assert "(48 x 10 x 4 bytes)" in out


def test_features_are_read_in_every_split_and_all_that_cannot_be_used_are_named(cohort, said):
    (cohort / "feats").mkdir()
    for k, slide in enumerate(SLIDES):
        found = np.full((3, 10), 1 + k, np.float32)
        found[1, 4] = np.nan if k in (2, 15) else 1 + k  # of training, and of the test
        np.save(cohort / "feats" / f"{slide}.npy", found)
    code, _, error = said("--model", "abmil", "data.features=[feats]")
    assert code == 2
    assert "the features of 2 slide(s) cannot be used" in error
    assert SLIDES[2] in error
    assert SLIDES[15] in error


REFUSED = {
    "a case in two splits": ({"case": ["one"] * 16}, [], "1 case(s) are in more than one split"),
    "an unknown label": (
        {"label": ["a", "c"] * 8}, [],
        "column 'label' holds a (8 rows), c (8); task.classes is [a, b]",
    ),
    "one class in training": (
        {"label": ["a"] * 8 + ["a", "b"] * 4}, [], "needs slides of two or more classes",
    ),
    "a slide twice": ({"slide": [*SLIDES[:15], SLIDES[0]]}, [], "contradicts an earlier row"),
    "a word for no split": ({"split": [*SPLITS[:15], "dev"]}, [], "split 'dev' is not one of"),
    "no validation": ({"split": ["train", "test"] * 8}, [], "no slide has the split 'val'"),
    "another column": ({}, ["task.column=grade"], "lacks column(s) grade"),
    "no table": ({}, ["data.labels=x.csv"], "label table not found: x.csv"),
    "an unknown setting": ({}, ["data.lables=x"], "did you mean 'labels'?"),
}  # fmt: skip


@pytest.mark.parametrize("stored", [False, True], ids=["table alone", "with a store"])
@pytest.mark.parametrize("fault", REFUSED)
def test_what_a_run_refuses_is_refused_with_exit_code_2(cohort, said, fault, stored):
    columns, arguments, message = REFUSED[fault]
    write_table(cohort, **columns)
    if stored:
        pack(cohort)
    code, _, error = said(*arguments)
    assert code == 2
    assert message in error


COX = ["task.name=survival", "task.event=1", "task.event_column=dead", "task.time_column=months"]
MODELS = {
    "an update of one bag for Cox": (
        [*COX, "task.loss=cox", "optim.bags=1"], "optim.bags must be 2 or more, found 1",
    ),
    "a head that cannot take the task": (
        [*COX, "task.bins=2", "--model", "e2e_r18_clam_sb"], "needs one class number a slide",
    ),
    "a head's loss of single bags beside Cox": (
        [*COX, "task.loss=cox", "--model", "e2e_r18_dtfd"], "compares all bags of an update",
    ),
    "a head that cannot be": (["head.heads=7"], "head.heads=7 does not divide head.embed_dim=512"),
    "statistics of more patches than a chunk": (
        ["engine.batch_norm=sync", "engine.chunk=20"], "needs all patches of a rank in one chunk",
    ),
    "weights to judge that are not kept": (
        ["select.weights=ema", "optim.ema=0"], "select.weights=ema needs a moving average",
    ),
    "a regulariser that the head cannot have": (
        ["spatial.weight=1", "--model", "e2e_r18_mean"], "spatial.weight=1, but the head",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", MODELS)
def test_a_model_that_a_run_refuses_before_its_first_step_is_refused(cohort, said, fault):
    words, message = MODELS[fault]
    write_table(cohort, months=[str(1 + k) for k in range(16)], dead=["1", "1", "1", "0"] * 4)
    pack(cohort)
    code, _, error = said(*words)
    assert code == 2
    assert message in error


def test_the_check_follows_the_protocol_of_the_run(cohort, said):
    write_table(cohort, split=["train"] * 8 + ["test"] * 8, label=["a"] * 8 + ["a", "b"] * 4)
    code, _, error = said()
    assert code == 2
    assert "no slide has the split 'val'" in error
    code, out, _ = said("run.protocol=as_published")
    assert code == 0
    assert "warning: train has no label=b" in out


def test_slides_without_patches_stop_it_and_are_all_in_the_list(cohort, said):
    pack(cohort, SLIDES[2:])
    code, out, error = said("--problems", "list.csv")
    assert code == 2
    assert "do not match: 2 row(s) or slide(s) cannot be used, 14 can" in error
    assert list(pd.read_csv("list.csv")["slide"]) == SLIDES[:2]
    assert "labels.csv: 16 slides" in out  # what could be told was told
    code, out, _ = said("data.unmatched=drop")
    assert code == 0
    assert "warning: 2 row(s) or slide(s) left out" in out


def test_a_copied_slide_in_another_split_stops_it(cohort, said):
    same = [SLIDES[0], SLIDES[15]]
    write_store(cohort / "rest.lmdb", {s: 2 + k for k, s in enumerate(SLIDES) if s not in same})
    pack(cohort, same[:1])
    jpegs = PatchStore(cohort / "s.lmdb").read(same[0], [0])
    with StoreWriter(cohort / "copy.lmdb", RECIPE) as writer:
        writer.add(record(same[1], 1), jpegs)
    code, _, error = said("data.stores=[s.lmdb,copy.lmdb,rest.lmdb]")
    assert code == 2
    assert same[0] in error
    assert same[1] in error


def test_centres_come_from_barcodes_or_from_a_column(cohort, said):
    write_table(cohort, hospital=["north"] * 12 + ["south"] * 4)
    _, out, _ = said("--site", "tcga")
    assert "4 centres, 4 of them in more than one split" in out
    assert "  A1: cases train 3, val 1, test 1; 'a' 0, 'b' 5" in out
    _, out, _ = said("--site", "hospital")
    assert "2 centres, 1 of them in more than one split" in out
    assert "  south: cases train 0, val 0, test 4; 'a' 2, 'b' 2" in out


def test_centres_of_the_column_in_the_settings_are_counted_by_default(cohort, said):
    write_table(cohort, hospital=["north"] * 12 + ["south"] * 3 + [""])
    code, out, _ = said("data.columns.centre=hospital")
    assert code == 0
    assert "split: split; centre: hospital" in out
    assert "3 centres, 1 of them in more than one split" in out
    assert "  south: cases train 0, val 0, test 3; 'a' 2, 'b' 1" in out
    assert "  (no centre): cases train 0, val 0, test 1; 'a' 0, 'b' 1" in out
    _, out, _ = said("data.columns.centre=hospital", "--site", "tcga")
    assert "4 centres, 4 of them in more than one split" in out
    code, _, error = said("data.columns.centre=city")
    assert code == 2
    assert "lacks column(s) city" in error


def test_the_slides_of_rows_that_name_several_are_counted(cohort, said):
    joined = [f"{s}.svs" if k % 4 else f"{s}.svs; {s}B.svs" for k, s in enumerate(SLIDES)]
    write_table(cohort, slide=joined)
    code, out, _ = said("data.slide_suffix=.svs", "data.slide_separator=';'")
    assert code == 0
    assert "labels.csv: 20 slides, 16 cases" in out
    assert "train  10 slides, 8 cases: 'a' 6, 'b' 4" in out
    pack(cohort)
    code, _, error = said("data.slide_suffix=.svs", "data.slide_separator=';'")
    assert code == 2
    assert (
        f"4 slides ({SLIDES[0]}B, {SLIDES[4]}B, {SLIDES[8]}B, ...): not in any store (label table)"
        in error
    )
    code, _, error = said("data.slide_suffix=.svs")
    assert code == 2
    assert "data.slide_separator=';'" in error


@pytest.mark.parametrize("stored", [False, True], ids=["table alone", "with a store"])
def test_slides_without_a_label_stop_it_or_are_left_out_and_listed(cohort, said, stored):
    write_table(cohort, label=["a", "b"] * 7 + ["a", ""])
    if stored:
        pack(cohort)
    code, out, error = said()
    assert code == 2
    assert "label: (blank) 1, 'a' 8, 'b' 7" in out
    assert f"{SLIDES[15]}: no value for label (label table)" in error
    code, out, _ = said("data.unmatched=drop")
    assert code == 0
    assert "warning: 1 row(s) or slide(s) left out" in out
    assert list(pd.read_csv("problems.csv")["slide"]) == [SLIDES[15]]


def test_a_patient_with_two_case_ids_is_recognised_by_the_barcode(cohort, said):
    slides = [*SLIDES[:15], SLIDES[0].replace("DX1", "DX2")]
    write_table(cohort, slide=slides, case=[f"patient_{k}" for k in range(16)])
    code, out, _ = said()
    assert code == 0  # a run takes the table's word for it
    assert "warning: 1 TCGA patients are in two splits" in out
    assert f"{SLIDES[0][:12]}: test, train" in out


def test_all_slides_of_a_case_are_one_bag_and_still_counted(cohort, said):
    cases = [f"c{k // 2}" for k in range(16)]
    write_table(cohort, case=cases, label=["aabb"[k % 4] for k in range(16)])
    pack(cohort)
    _, out, _ = said("data.unit=case")
    assert "train  8 slides, 4 cases, 36 patches: 'a' 2, 'b' 2" in out


SURVIVAL = ["task.name=survival", "task.time_column=months", "task.event_column=dead"]


def survival(cohort: Path, dead: list[str]) -> None:
    write_table(cohort, months=[str(1 + k) for k in range(16)], dead=dead)


def test_the_rate_of_events_hangs_on_the_code_which_is_asked_and_never_guessed(cohort, said):
    survival(cohort, ["1", "1", "1", "0"] * 4)
    code, _, error = said(*SURVIVAL)
    assert code == 2
    assert "which code of column 'dead' is an observed event" in error
    _, out, _ = said(*SURVIVAL, "task.event=1", "task.bins=2")
    assert "dead: '0' 4, '1' 12" in out
    assert "6 with an event (75%; '1' in dead)" in out
    _, out, _ = said(*SURVIVAL, "task.event=0", "task.bins=2")
    assert "2 with an event (25%; '0' in dead)" in out


def test_training_without_events_and_unknown_event_codes_are_refused(cohort, said):
    survival(cohort, ["0"] * 8 + ["1", "0"] * 4)
    code, _, error = said(*SURVIVAL, "task.event=1")
    assert code == 2
    assert "has an event ('1' in column 'dead')" in error
    survival(cohort, ["dead", "alive"] * 8)
    code, _, error = said(*SURVIVAL, "task.event=1")
    assert code == 2
    assert "is neither task.event ('1') nor" in error


def test_slides_of_a_case_with_different_times_are_refused_and_several_slides_give_a_warning(
    cohort, said
):
    asked = [*SURVIVAL, "task.event=1", "task.bins=2"]
    cases = [f"c{k // 2}" for k in range(16)]
    dead, months = ["1", "1", "0", "0"] * 4, [str(1 + k // 2) for k in range(16)]
    write_table(cohort, case=cases, months=months, dead=dead)
    code, out, _ = said(*asked)
    assert code == 0
    assert "warning: 16 slides of 8 cases: each slide is evaluated by itself" in out
    assert "evaluated by itself" not in said(*asked, "data.unit=case")[1]
    write_table(cohort, case=cases, months=["30", *months[1:]], dead=dead)
    code, _, error = said(*asked)
    assert code == 2
    assert "1 case(s) have slides of different labels" in error
    assert f"case 'c0': {SLIDES[1]} 1/1, {SLIDES[0]} 1/30" in error


def test_the_published_tables_are_counted(shared_data, said, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    labels = shared_data / "labels"

    def doctor(*arguments: str) -> str:
        assert exit_code(lambda: main([*arguments])) == 0
        return capsys.readouterr().out

    out = doctor("--datasets", "brca", f"data.labels={labels}/subtyping_tcga_brca.csv")
    assert "test   234 slides, 234 cases: 'IDC' 194, 'ILC' 40" in out
    folds = labels / "survival_tcga_brca_3fold"
    out = doctor("--datasets", "surv_brca", f"data.labels={folds}/fold_1.csv",
                 f"data.split_file={folds}", "data.fold=1")  # fmt: skip
    assert "1,073 slides, 1,007 cases" in out
    assert "Status: '0' 861, '1' 146" in out


@pytest.mark.slow
def test_panda_is_counted(shared_data, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    labels = shared_data / "labels" / "panda.csv"
    assert exit_code(lambda: main(["--datasets", "panda", f"data.labels={labels}"])) == 0
    out = capsys.readouterr().out
    assert "panda.csv: 10,202 slides, 10,202 cases" in out
    assert (
        "train  7,143 slides, 7,143 cases: '0' 1907, '1' 1822, '2' 925, '3' 844, '4' 831, '5' 814"
        in out
    )
