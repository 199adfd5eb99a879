"""Trackers of a run: TensorBoard events and Weights & Biases files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from e2e import log as log_module
from e2e.log import TRACKERS, MetricsLog, Screen


def open_log(folder: Path, *names: str) -> MetricsLog:
    return MetricsLog(folder / "metrics.jsonl", [TRACKERS[name](folder, "a: 1") for name in names])


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        name: [(event.step, round(event.value, 6)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_has_exactly_the_numbers_of_the_log(tmp_path):
    log = open_log(tmp_path, "tensorboard")
    log.write(step=1, loss=0.5, skipped=False, slides=["a"])
    log.write(step=2, loss=None, val={"auc": 0.75, "kappa": None, "more": {"f1": 0.25}})
    log.close()
    assert scalars(tmp_path) == {
        "loss": [(1, 0.5)],
        "skipped": [(1, 0.0)],
        "val/auc": [(2, 0.75)],
        "val/more/f1": [(2, 0.25)],
    }
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    log = open_log(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        log.write(step=step, loss=float(step))
    log.close()
    resumed = open_log(tmp_path, "tensorboard")
    resumed.forget_after(1)
    resumed.write(step=2, loss=20.0)
    resumed.close()
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 20.0)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 20.0)]


def test_nothing_is_tracked_by_default(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(step=1, loss=0.5)
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.slow
def test_wandb_is_offline_by_default_and_uploads_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    with warnings.catch_warnings():  # its dependencies add filters when they are imported
        log = open_log(tmp_path / "run", "wandb")
        log.write(step=1, loss=0.5)
        log.close()
    [folder] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert not list(folder.rglob("*.py"))
    assert not list(folder.rglob("diff.patch"))


def test_progress_outside_a_terminal_says_how_much_time_is_left(monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now)
    screen = Screen(is_leader=True)
    for done in (1, 2, 3, 4):
        screen.step(done, 41, "slides")
        now += 10
    assert capsys.readouterr().out == "1/41 slides\n3/41 slides  6:20 left\n"
    screen.pause()
    now += 3600  # something else
    screen.step(5, 41, "slides")
    now += 20
    screen.step(6, 41, "slides")
    assert capsys.readouterr().out == "5/41 slides\n6/41 slides  11:40 left\n"
