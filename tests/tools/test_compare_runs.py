"""Two runs on the same slides: what is compared, by which test, and what is refused."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from e2e.errors import exit_code
from e2e.files import write_json
from e2e.metrics.bootstrap import delong
from e2e.reports.predictions import Prediction, write_predictions
from e2e.runs.parts import REGISTRIES, build_task
from e2e.settings.layers import dump_settings, load_settings
from tools import compare_runs


def run_folder(folder, scores, labels, *, cases=None, classes=("no", "yes"), split="test"):
    """A run folder as training leaves it, as far as the tool reads it."""
    chosen = {"datasets": "lung_detection", "model": "e2e_r18_abmil", "files": []}
    asked = [f"task.classes=[{','.join(repr(c) for c in classes)}]", "data.labels=x.csv"]
    settings = load_settings(**chosen, overrides=asked, registries=REGISTRIES)
    folder.mkdir()
    (folder / "settings.yaml").write_text(dump_settings(settings))
    task = build_task(settings.task)
    write_json(folder / "task.json", task.state())
    cases = cases or [f"c{k}" for k in range(len(labels))]
    rows = [
        Prediction(case, f"s{k}", split, list(score), np.nan if label is None else float(label))
        for k, (case, score, label) in enumerate(zip(cases, scores, labels, strict=True))
    ]
    write_predictions(rows, task, folder / "predictions.csv")
    return folder


def of_two(yes):
    return [[1 - p, p] for p in yes]


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *map(str, words)])
    code = exit_code(compare_runs.main)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def drawn():
    rng = np.random.default_rng(2)
    labels = np.arange(60) % 2
    good, poor = (
        np.clip(0.5 + f * (labels - 0.5) + rng.normal(0, 0.2, 60), 0, 1) for f in (0.4, 0.1)
    )
    return labels, good, poor


def test_one_slide_a_case_is_tested_by_delong(tmp_path, monkeypatch, capsys, drawn):
    labels, good, poor = drawn
    a = run_folder(tmp_path / "a", of_two(good), labels)
    b = run_folder(tmp_path / "b", of_two(poor), labels)
    out = tmp_path / "ab.json"
    code, said, error = call(monkeypatch, capsys, a, b, "--draws", 300, "--json", out)
    assert (code, error) == (0, "")
    result, expected = json.loads(out.read_text()), delong(good, poor, labels == 1)
    assert result["test"] == "DeLong"
    assert result["metric"] == "auc"  # what the run was selected by
    assert result["p"] == pytest.approx(expected.p, rel=1e-6)
    assert result["p"] < 0.05
    assert result["a"]["value"] == pytest.approx(expected.first)
    assert result["difference"]["value"] == pytest.approx(expected.first - expected.second)
    assert result["difference"]["low"] == pytest.approx(expected.low, rel=1e-6)
    assert f"{result['difference']['value']:.4f}" in said
    assert "60 slides of 60 cases" in said
    assert f"p = {result['p']:.4g} (DeLong)" in said


def test_slides_that_share_a_case_are_not_independent_so_cases_are_resampled(
    tmp_path, monkeypatch, capsys, drawn
):
    labels, good, poor = drawn
    cases = [f"c{k // 2}" for k in range(60)]
    a = run_folder(tmp_path / "a", of_two(good), labels, cases=cases)
    b = run_folder(tmp_path / "b", of_two(poor), labels, cases=cases)
    out = tmp_path / "ab.json"
    assert call(monkeypatch, capsys, a, b, "--draws", 300, "--json", out)[0] == 0
    result = json.loads(out.read_text())
    assert result["test"] == "paired bootstrap"
    assert (result["slides"], result["cases"]) == (60, 30)
    low, value, high = (result["difference"][k] for k in ("low", "value", "high"))
    assert 0 < low < value < high
    assert result["p"] < 0.05


def test_a_run_is_no_better_than_itself(tmp_path, monkeypatch, capsys, drawn):
    labels, good, _ = drawn
    a = run_folder(tmp_path / "a", of_two(good), labels)
    out = tmp_path / "ab.json"
    assert (
        call(monkeypatch, capsys, a, a, "--metric", "brier", "--draws", 50, "--json", out)[0] == 0
    )
    result = json.loads(out.read_text())
    assert result["difference"] == {"value": 0, "low": 0, "high": 0}
    assert result["p"] == 1


def test_what_is_not_defined_is_said_so(tmp_path, monkeypatch, capsys):
    a = run_folder(tmp_path / "a", of_two([0.2, 0.7]), [1, 1])
    code, said, _ = call(monkeypatch, capsys, a, a, "--draws", 20, "--metric", "auc")
    assert code == 0
    assert said.count("undefined") >= 3
    assert "p = undefined" in said
    assert "0.5" not in said.replace("0.95", "")


def test_slides_are_matched_by_id_and_those_without_label_left_out(
    tmp_path, monkeypatch, capsys, drawn
):
    labels, good, poor = drawn
    a = run_folder(tmp_path / "a", of_two([*good, 0.5]), [*labels, None])
    b = run_folder(tmp_path / "b", of_two([*poor, 0.5]), [*labels, None])
    out = tmp_path / "ab.json"
    call(monkeypatch, capsys, a, b, "--draws", 20, "--json", out)
    expected = json.loads(out.read_text())
    assert expected["slides"] == 60
    table = pd.read_csv(b / "predictions.csv", dtype=str)
    table.sample(frac=1, random_state=0).to_csv(b / "predictions.csv", index=False)
    call(monkeypatch, capsys, a, b, "--draws", 20, "--json", out)
    assert json.loads(out.read_text()) == expected


def refusal(tmp_path, monkeypatch, capsys, change, *words):
    """What is said of a run against one whose table or settings ``change`` has made another."""
    labels = [0, 1, 0, 1]
    a, b = (run_folder(tmp_path / n, of_two([0.1, 0.9, 0.4, 0.3]), labels) for n in "ab")
    change(b)
    code, said, error = call(monkeypatch, capsys, a, b, "--draws", 20, *words)
    assert (code, said) == (2, "")
    return error


def table_of(change):
    def at(folder):
        path = folder / "predictions.csv"
        change(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)

    return at


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (table_of(lambda t: t[1:]), (), "s0: only in"),
        (table_of(lambda t: t.assign(label=["yes", *t["label"][1:]])), (), "s0: c0/no in"),
        (table_of(lambda t: t.assign(case="one")), (), "s3: c3/yes in"),
        (table_of(lambda t: pd.concat([t, t[:1]])), (), "slides twice"),
        (table_of(lambda t: t.drop(columns="prob_yes")), (), "has no column prob_yes"),
        (
            table_of(lambda t: t.assign(prob_yes="x")),
            (),
            "a prediction or label that is not a number",
        ),
        (
            table_of(lambda t: t),
            ("--split", "val"),
            "no labelled slide of split 'val'; it has: test",
        ),
        (table_of(lambda t: t), ("--metric", "aux"), "no metric 'aux'"),
        (table_of(lambda t: t), ("--draws", "0"), "--draws must be at least 1"),
        (lambda folder: (folder / "predictions.csv").unlink(), (), "the run is not evaluated"),
        (lambda folder: (folder / "settings.yaml").unlink(), (), "is not a run folder"),
        (lambda folder: (folder / "task.json").unlink(), (), "has no task.json"),
        (lambda folder: (folder / "task.json").write_text("[]"), (), "does not fit the task"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(
    tmp_path, monkeypatch, capsys, change, words, said
):
    assert said in refusal(tmp_path, monkeypatch, capsys, change, *words)


def test_runs_of_other_classes_are_refused(tmp_path, monkeypatch, capsys):
    a = run_folder(tmp_path / "a", of_two([0.1, 0.9]), [0, 1])
    b = run_folder(tmp_path / "b", of_two([0.1, 0.9]), [0, 1], classes=("no", "maybe"))
    code, _, error = call(monkeypatch, capsys, a, b)
    assert code == 2
    assert "different outputs" in error
    assert "no, maybe" in error


def test_survival_judged_at_other_times_is_compared_by_what_does_not_hang_on_them(
    tmp_path, monkeypatch, capsys
):
    asked = ["data.labels=x.csv", "task.name=survival", "task.event=1"]
    rng = np.random.default_rng(0)
    targets = np.stack([rng.uniform(1, 9, 40), np.arange(40) % 2], axis=1)
    for name, bins in (("a", 3), ("b", 4), ("c", 4)):
        settings = load_settings(
            datasets="lung_detection",
            model="e2e_r18_abmil",
            files=[],
            overrides=[*asked, f"task.bins={bins}"],
            registries=REGISTRIES,
        )
        task = build_task(settings.task)
        task.fit([torch.tensor(row) for row in targets], [f"t{k}" for k in range(40)])
        said = task.predict(torch.from_numpy(rng.normal(size=(40, bins)))).tolist()
        rows = [
            Prediction(f"c{k}", f"s{k}", "test", said[k], targets[k].tolist()) for k in range(40)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.yaml").write_text(dump_settings(settings))
        write_json(tmp_path / name / "task.json", task.state())
        write_predictions(rows, task, tmp_path / name / "predictions.csv")
    a, b, c = (tmp_path / name for name in "abc")
    for metric in ("integrated_brier", "auc_dynamic_mean", "survival_nll"):
        words = ("--draws", 20, "--metric", metric)
        code, _, error = call(monkeypatch, capsys, a, b, *words)
        assert (code, f"'{metric}' cannot be compared" in error) == (2, True)
        assert call(monkeypatch, capsys, b, c, *words)[0] == 0
    assert call(monkeypatch, capsys, a, b, "--draws", 20)[0] == 0
    assert call(monkeypatch, capsys, a, b, "--draws", 20, "--metric", "c_index_uno")[0] == 0


@pytest.mark.parametrize("content", [b"", b"case,\xe9", b'case,"s'])
def test_predictions_that_are_no_table_are_one_message(tmp_path, monkeypatch, capsys, content):
    run = run_folder(tmp_path / "a", of_two([0.1, 0.9]), [0, 1])
    (run / "predictions.csv").write_bytes(content)
    code, _, error = call(monkeypatch, capsys, run, run)
    assert (code, "predictions.csv is not a readable table" in error) == (2, True)
