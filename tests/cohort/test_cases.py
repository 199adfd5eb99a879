"""A case's slides as one bag: of patches and of features."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from e2e.cohort.cases import (
    CaseFeatures,
    CasePatches,
    check_one_label_per_case,
    group_by_case,
)
from e2e.errors import DamagedDataError, UserError
from e2e.features.reader import open_features
from e2e.slides import Slide
from e2e.store.lmdb import PatchStore, StoreWriter
from launch import train
from tests.helpers.commands import call
from tests.helpers.feature_cohort import D, arguments, cohort, write_slide  # noqa: F401
from tests.helpers.patch_cohort import arguments as patch_arguments
from tests.helpers.patch_cohort import cohort as patch_cohort  # noqa: F401
from tests.helpers.stores import RECIPE, patches, record

COUNTS = {"a1": 5, "a2": 3, "b1": 4}


def slide(name: str, label: str = "x") -> Slide:
    return Slide(name, name[0], "train", {"label": label})


@pytest.fixture
def stores(tmp_path) -> dict[str, PatchStore]:
    """The slides of case a lie in two files."""
    for name, held in (("one", ["a1", "b1"]), ("two", ["a2"])):
        with StoreWriter(tmp_path / f"{name}.lmdb", RECIPE) as writer:
            for one in held:
                writer.add(record(one, COUNTS[one]), patches(one, COUNTS[one]))
    one, two = (PatchStore(tmp_path / f"{name}.lmdb") for name in ("one", "two"))
    return {"a1": one, "a2": two, "b1": one}


def joined(stores, **labels: str):
    slides = [slide(name, labels.get(name, "x")) for name in ("b1", "a2", "a1")]
    return group_by_case(slides, {name: [store] for name, store in stores.items()}, CasePatches)


def test_a_case_has_the_patches_of_its_slides_in_their_order(stores):
    slides, cases = joined(stores)
    assert [(s.id, s.case, s.split) for s in slides] == [("a", "a", "train"), ("b", "b", "train")]
    (store,) = cases["a"]
    everything = patches("a1", 5) + patches("a2", 3)
    assert store.num_patches("a") == 8
    assert store.read("a", range(8)) == everything
    chosen = [7, 0, 5, 4, 0]
    assert store.read("a", chosen) == [everything[k] for k in chosen]
    assert list(store.find_damage("a")) == []


def test_the_slides_of_a_case_lie_side_by_side(stores):
    _, cases = joined(stores)
    found, first = cases["a"][0].record("a"), stores["a1"].record("a1")
    assert found.num_patches == 8
    np.testing.assert_array_equal(found.coords[:5], first.coords)
    second = stores["a2"].record("a2").coords
    moved = found.coords[5:] - second
    assert (moved == moved[0]).all()
    assert moved[0, 0] >= first.coords[:, 0].max() + 3 * first.level0_px
    assert moved[0, 1] == 0


def test_slides_of_one_case_with_two_labels_are_refused_by_name(stores):
    with pytest.raises(UserError, match=r"case 'a': a1 x, a2 y"):
        joined(stores, a2="y")


def test_slides_evaluated_one_by_one_give_a_warning_if_a_case_has_several():
    slides = [slide(name) for name in ("b1", "a2", "a1")]
    [said] = check_one_label_per_case(slides)
    assert said.startswith("3 slides of 2 cases: each slide is evaluated by itself")
    assert check_one_label_per_case(slides[:2]) == []
    with pytest.raises(
        UserError, match=r"1 case.s. have slides of different labels.*\n.*a1 x, a2 y"
    ):
        check_one_label_per_case([*slides[:1], slide("a2", "y"), slides[2]])


def test_a_case_is_of_its_slides_centre_or_of_all_of_them(stores):
    slides = [replace(slide(n), centre=c) for n, c in zip(COUNTS, ("x", "", "y"), strict=True)]
    found, _ = group_by_case(slides, {name: [store] for name, store in stores.items()}, CasePatches)
    assert {s.id: s.centre for s in found} == {"a": "x", "b": "y"}
    slides[1] = replace(slides[1], centre="w")
    found, _ = group_by_case(slides, {name: [store] for name, store in stores.items()}, CasePatches)
    assert found[0].centre == "w+x"


def test_a_case_of_features_has_those_of_its_slides(tmp_path):
    given = {name: np.random.default_rng(k).normal(size=(3 + k, D)) for k, name in enumerate("pq")}
    write_slide(tmp_path, "p", given["p"].astype(np.float16))
    write_slide(tmp_path, "q", given["q"].astype(np.float32), coords=False)
    store, labels = open_features(tmp_path), {"label": "x"}
    slides = [Slide(name, "case", "train", labels) for name in "pq"]
    _, cases = group_by_case(slides, {"p": [store], "q": [store]}, CaseFeatures)
    (case,) = cases["case"]
    found = case.features("case")
    assert found.dtype == torch.float32
    assert (case.num_patches("case"), case.width) == (7, D)
    np.testing.assert_array_equal(found[3:], given["q"].astype(np.float32))
    assert case.record("case").coords is None  # one of them does not know


def test_a_slide_that_cannot_be_read_is_named_within_its_case(tmp_path):
    bad = np.ones((3, D), np.float32)
    bad[2, 0] = np.inf
    write_slide(tmp_path, "p", np.ones((3, D), np.float32))
    write_slide(tmp_path, "q", bad)
    store = open_features(tmp_path)
    slides = [Slide(name, "case", "train", {}) for name in "pq"]
    _, cases = group_by_case(slides, {"p": [store], "q": [store]}, CaseFeatures)
    with pytest.raises(DamagedDataError, match="slide 'q' have NaN or Inf, first in row 2"):
        cases["case"][0].features("case")


def paired_cases(folder) -> None:
    """Two slides a case, of one label."""
    table = pd.read_csv(folder / "labels.csv")
    table["case"] = [f"c{k // 4}_{k % 2}" for k in range(len(table))]
    table.to_csv(folder / "labels.csv", index=False)


def test_a_run_over_cases_predicts_each_case_once(cohort, monkeypatch, capsys):  # noqa: F811
    paired_cases(cohort)
    code, said = call(train.main, monkeypatch, capsys, *arguments(cohort, "data.unit=case"))
    assert code == 0, said
    table = pd.read_csv(cohort / "run" / "predictions.csv")
    assert sorted(table["slide"]) == ["c2_0", "c2_1", "c3_0", "c3_1"]
    assert (table["slide"] == table["case"]).all()


def test_end_to_end_a_bag_is_a_case_too(patch_cohort, tmp_path, monkeypatch, capsys):  # noqa: F811
    table = pd.read_csv(patch_cohort / "labels.csv")
    table["split"] = ["train" if k < 8 else "val" if k < 12 else "test" for k in range(16)]
    table["case"] = [f"c{k // 4}_{k % 2}" for k in range(16)]
    table.to_csv(tmp_path / "labels.csv", index=False)
    more = ("data.unit=case", f"data.labels={tmp_path}/labels.csv", "optim.epochs=1")
    line = patch_arguments(patch_cohort, tmp_path / "run", *more)
    code, said = call(train.main, monkeypatch, capsys, *line)
    assert code == 0, said
    assert len(pd.read_csv(tmp_path / "run" / "predictions.csv")) == 4
    drawn = pd.read_csv(tmp_path / "run" / "heatmaps" / "c3_0.csv")
    slides = list(table.loc[table["case"] == "c3_0", "slide"])
    assert list(drawn["slide"].unique()) == slides
    for slide, own in drawn.groupby("slide"):
        coords = PatchStore(patch_cohort / "s.lmdb").record(slide).require_coords()
        np.testing.assert_array_equal(own[["x", "y"]], coords)
    patches_of = table.assign(n=[3 + k % 4 for k in range(16)]).groupby("case")["n"].sum()
    for case in ("c3_0", "c3_1"):
        assert len(pd.read_csv(tmp_path / "run" / "heatmaps" / f"{case}.csv")) == patches_of[case]
