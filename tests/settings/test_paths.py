"""Paths in settings, and YAML that is too large."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from e2e.errors import UserError
from e2e.runs.parts import REGISTRIES
from e2e.settings.layers import load_settings
from e2e.settings.schema import Settings
from e2e.settings.yaml_text import parse_yaml

COHORT = """
data: {labels: t.csv, stores: [sub/*.lmdb, /abs/s.lmdb], scales: [[x.lmdb]], columns: {split: null}}
task: {name: classification, column: label, classes: [a, b]}
bag: {shares: [1, 1]}
"""


def load(datasets: str, *overrides: str) -> Settings:
    return load_settings(
        datasets=datasets,
        model="e2e_r18_abmil",
        files=[],
        overrides=overrides,
        registries=REGISTRIES,
    )


def test_relative_paths_of_a_yaml_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "cohorts").mkdir()
    (tmp_path / "cohorts" / "c.yaml").write_text(COHORT)
    monkeypatch.chdir(tmp_path)
    data = load("cohorts/c.yaml").data
    folder = tmp_path / "cohorts"
    assert data.labels == f"{folder}/t.csv"
    assert data.stores == [f"{folder}/sub/*.lmdb", "/abs/s.lmdb"]
    assert data.scales == [[f"{folder}/x.lmdb"]]
    assert data.split_file is None


def test_weights_named_in_a_yaml_lie_beside_it_and_those_of_the_command_line_do_not(tmp_path):
    (tmp_path / "c.yaml").write_text(COHORT)
    (tmp_path / "more.yaml").write_text("encoder: {weights: w/a.pt}\n")

    def weights(*overrides: str) -> str:
        settings = load_settings(
            datasets=f"{tmp_path}/c.yaml",
            model="e2e_r18_abmil",
            files=[f"{tmp_path}/more.yaml"],
            overrides=overrides,
            registries=REGISTRIES,
        )
        return settings.encoder.options["weights"]

    assert weights() == f"{tmp_path}/w/a.pt"
    assert weights("encoder.weights=here.pt") == "here.pt"


def test_values_of_the_command_line_and_of_shipped_files_keep_the_working_directory(tmp_path):
    (tmp_path / "c.yaml").write_text(COHORT)
    assert load(f"{tmp_path}/c.yaml", "data.labels=here.csv").data.labels == "here.csv"
    assert load("panda").data.labels == "data/panda/panda.csv"


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n"
            for old, new in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "[" * 5000,
        "[" * 60 + "]" * 60,
        "a: &a [*a]",
    ],
)
def test_yaml_that_expands_or_is_nested_deeply_is_an_error(tmp_path, text):
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match="not readable YAML"):
        load(str(Path(tmp_path / "c.yaml")))
