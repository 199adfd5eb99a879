"""Every cohort of configs/datasets: its YAML, its table's form, what is said where its data are missing."""

from __future__ import annotations

import pandas as pd
import pytest

from e2e.cohort.load import load_cohort
from e2e.errors import UserError
from e2e.runs.cohort import cohort_spec
from e2e.runs.parts import build_task
from e2e.settings.configs import config_folder
from tests.helpers.configured_cohorts import SLIDES, load, small_cohort
from tests.helpers.stores import write_store

COHORTS = sorted(path.stem for path in (config_folder() / "datasets").glob("*.yaml"))


@pytest.mark.parametrize("name", COHORTS)
def test_a_cohort_says_where_its_data_come_from_and_how_they_are_packed(name):
    settings = load(name)
    task = build_task(settings.task)
    assert task.num_outputs >= 2
    assert len(task.columns) == len(set(task.columns))
    assert settings.data.source or name.startswith("lung")
    assert "--mpp" in settings.data.pack
    assert "--patch-size" in settings.data.pack


@pytest.mark.parametrize("name", COHORTS)
def test_missing_data_are_an_error_with_table_columns_and_store(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load(name)
    data, task = settings.data, build_task(settings.task)
    with pytest.raises(UserError) as error:
        load_cohort(cohort_spec(data, name=name), task)
    text = str(error.value)
    assert text.startswith(f"cohort '{name}': ")
    assert "data files not found" in text.splitlines()[0]
    assert f"put the label table at {data.labels} (columns " in text
    for column in (data.columns.slide, *task.columns):
        assert column in text.partition("(columns ")[2]
    for store in data.stores:
        assert f"patch store not found: {store}" in text
        assert f"e2e pack --slides SLIDES --out {store} {data.pack}" in text


@pytest.mark.parametrize("name", COHORTS)
def test_a_table_with_the_columns_of_the_cohort_is_loaded(name, tmp_path):
    overrides, slides = small_cohort(load(name), tmp_path)
    write_store(tmp_path / "s.lmdb", {slide: 1 + k for k, slide in enumerate(slides)})
    settings = load(name, *overrides, f"data.stores=[{tmp_path}/s.lmdb]")
    task = build_task(settings.task)
    items, problems = load_cohort(cohort_spec(settings.data, name=name), task)
    assert not problems
    assert len(items) == SLIDES
    assert {item.slide.split for item in items} == {"train", "val", "test"}
    assert sorted(item.slide.case for item in items) == sorted(
        f"case {k}" if settings.data.columns.case else slide for k, slide in enumerate(slides)
    )


def test_camelyon17_tests_on_two_centres_that_training_never_sees(tmp_path):
    overrides, slides = small_cohort(load("camelyon17"), tmp_path)
    table = pd.read_csv(tmp_path / "fold_0.csv", dtype=str)
    table["center"] = [str(k % 5) for k in range(SLIDES)]
    table.to_csv(tmp_path / "fold_0.csv", index=False)
    write_store(tmp_path / "s.lmdb", {slide: 1 + k for k, slide in enumerate(slides)})
    settings = load("camelyon17", *overrides, f"data.stores=[{tmp_path}/s.lmdb]")
    task = build_task(settings.task)
    items, _ = load_cohort(cohort_spec(settings.data), task)
    centre = dict(zip(slides, table["center"], strict=True))
    seen = {(centre[item.slide.id], item.slide.split == "test") for item in items}
    assert seen == {("0", False), ("1", False), ("2", False), ("3", True), ("4", True)}
    assert all(item.slide.centre == centre[item.slide.id] for item in items)


def test_bracs_in_three_classes_reads_the_groups_of_the_same_table():
    seven, three = load("bracs"), load("bracs3")
    assert seven.data == three.data
    assert (seven.task.options["column"], three.task.options["column"]) == ("type", "group")


@pytest.mark.parametrize("name", [name for name in COHORTS if name.startswith("surv_")])
def test_survival_is_a_cases_and_the_code_of_a_death_is_written_down(name):
    settings = load(name)
    assert settings.data.unit == "case"
    censored = {"Status": "0", "censorship": "1"}[settings.task.options["event_column"]]
    assert {settings.task.options["event"], censored} == {"0", "1"}


@pytest.mark.parametrize("name", [name for name in COHORTS if name.startswith("surv_")])
def test_survival_tables_may_name_several_slides_of_a_case_in_a_row(name, tmp_path):
    overrides, slides = small_cohort(load(name), tmp_path)
    column, suffix = load(name).data.columns.slide, load(name).data.slide_suffix
    table = pd.read_csv(tmp_path / "fold_0.csv", dtype=str)
    table[column] = [f"{slide}{suffix};{slide}-2{suffix}" for slide in slides]
    table.to_csv(tmp_path / "fold_0.csv", index=False)
    both = [name for slide in slides for name in (slide, f"{slide}-2")]
    write_store(tmp_path / "s.lmdb", {slide: 1 + k for k, slide in enumerate(both)})
    settings = load(name, *overrides, f"data.stores=[{tmp_path}/s.lmdb]")
    task = build_task(settings.task)
    items, problems = load_cohort(cohort_spec(settings.data, name=name), task)
    assert problems == []
    counts = {item.slide.case: item.reader.num_patches(item.slide.id) for item in items}
    assert counts == {f"case {k}": 4 * k + 3 for k in range(SLIDES)}
