"""What a run says before the first update and after the last."""

from __future__ import annotations

import json
import re

import pandas as pd

from e2e.runs import summary
from launch import train
from tests.helpers.commands import call
from tests.helpers.feature_cohort import arguments, cohort  # noqa: F401  (a fixture)
from tools import check_data


def said(main, monkeypatch, capsys, *argv: object) -> str:
    monkeypatch.setattr("sys.argv", ["command", *map(str, argv)])
    code = main()
    assert not code
    return capsys.readouterr().out


def test_a_run_says_what_it_trains_and_ends_with_a_headline(cohort, monkeypatch, capsys):  # noqa: F811
    out = said(train.main, monkeypatch, capsys, *arguments(cohort))
    lines = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in out.splitlines()]
    assert "data      train  8 slides, 8 cases, 56 patches: 'plain' 4, 'marked' 4" in lines
    assert any(line.startswith("          val    4 slides, 4 cases, ") for line in lines)
    assert "features  of width 12" in lines
    assert any(line.startswith("model     abmil (") for line in lines)
    assert "training  6 epochs, 3 bags of all patches an update; cpu, float32" in lines
    assert any(
        re.match(r"memory    about [\d.]+ [KMG]iB at the peak of an update", x) for x in lines
    )
    assert any(line.startswith("warning: validation has 4 cases") for line in lines)
    report = json.loads((cohort / "run" / "metrics.json").read_text())
    auc = report["test"]["ema"]["auc"]
    shown = f"test: auc {auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]"
    end = next(line for line in lines if line.startswith(shown))
    assert end.endswith(
        f" (4 slides of 4 cases; epoch {report['epoch']}, selected on val by the ema weights)"
    )
    table = out[out.index(end) :]
    assert "balanced_accuracy" in table
    assert "ece" not in table  # metrics.json has it
    assert "ece" in report["test"]["ema"]


def test_log_lines_have_time_stamps_outside_a_terminal(cohort, monkeypatch, capsys):  # noqa: F811
    out = said(train.main, monkeypatch, capsys, *arguments(cohort))
    epochs = [line for line in out.splitlines() if "val auc" in line]
    assert len(epochs) == 6
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d epoch", line) for line in epochs)
    assert "best so far" in epochs[0]


def test_memory_beyond_what_is_free_is_a_warning(cohort, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(summary, "free_memory", lambda device: 1e4)
    words = [*arguments(cohort)]
    out = said(train.main, monkeypatch, capsys, *words)
    assert re.search(r"warning: an update needs about .*, and .* are free on cpu\n  lower ", out)
    line = [word for word in words if not word.startswith("run.out")]
    out = said(check_data.main, monkeypatch, capsys, *line)
    assert "warning: an update needs about" in out


def test_the_table_of_predictions_says_what_was_predicted(cohort, monkeypatch, capsys):  # noqa: F811
    assert call(train.main, monkeypatch, capsys, *arguments(cohort))[0] == 0
    table = pd.read_csv(cohort / "run" / "predictions.csv")
    likely = table[["prob_plain", "prob_marked"]].idxmax(axis=1).str.removeprefix("prob_")
    assert table["predicted"].tolist() == likely.tolist()
