"""The study's arithmetic, its paired bootstrap on scores made by hand, the driver on a small cohort."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest

from e2e.errors import exit_code
from tests.helpers.study_cohort import cohort as cohort
from tools.study import arms as study
from tools.study import base

pytestmark = pytest.mark.slow


def test_equal_steps_and_equal_patches():
    # Slides of 40, 10 and 30 patches, two an update: 2 updates an epoch. All: 80 patches an epoch;
    # 16 a bag: 16 + 10 + 16 = 42. 5 epochs of all are 400 patches, 400 / 42 = 9.52 epochs of 42.
    arms = base.plan_arms([40, 10, 30], bag=16, bags=2, epochs=5, frozen_epochs=7)
    found = {a.name: (a.bag, a.train_encoder, a.epochs, a.steps, a.patches) for a in arms.values()}
    assert found == {
        "all": (None, True, 5, 10, 400),
        "same_steps": (16, True, 5, 10, 210),
        "same_patches": (16, True, 10, 20, 420),
        "frozen": (None, False, 7, 14, 560),
        "frozen_whole": (None, False, 7, 14, 560),
    }
    assert arms["all"].settings()[0] == "bag.patches=null"
    assert arms.keys() == study.RATES.keys()


def compare(scores, positive, cases, draws=500):
    return base.compare_auc(
        {name: np.array(rows, float) for name, rows in scores.items()},
        np.array(positive), cases, draws=draws,
    )  # fmt: skip


def test_a_perfect_arm_against_an_inverted_and_a_constant_one():
    # In every resample with both classes the AUCs are 1, 0 and 1/2.
    positive = [True, True, False, False]
    perfect, inverted, constant = [4, 3, 2, 1], [1, 2, 3, 4], [0, 0, 0, 0]
    means, differences = compare(
        {"all": [perfect], "inverted": [inverted], "constant": [constant]}, positive, list("abcd")
    )
    assert means["all"] == {"value": 1, "low": 1, "high": 1}
    assert differences == {
        "inverted": {"value": 1, "low": 1, "high": 1},
        "constant": {"value": 0.5, "low": 0.5, "high": 0.5},
    }


def test_seeds_are_averaged_within_a_resample():
    # One seed right and one wrong: 1/2 in every resample, so the interval has no width.
    positive, right, wrong = [True, False, False, True], [4, 1, 2, 3], [1, 4, 3, 2]
    means, differences = compare(
        {"all": [right, right], "same_steps": [right, wrong]}, positive, list("abcd")
    )
    assert means["same_steps"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert differences["same_steps"] == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_identical_arms_differ_by_exactly_nothing():
    rng = np.random.default_rng(1)
    rows, positive = rng.random((3, 40)), rng.random(40) < 0.5
    cases = [f"c{k // 2}" for k in range(40)]
    means, differences = compare({"all": rows, "frozen": rows.copy()}, positive, cases)
    assert differences["frozen"] == {"value": 0, "low": 0, "high": 0}
    assert means["all"]["low"] < means["all"]["value"] < means["all"]["high"]


def test_cases_are_resampled_not_slides():
    # Case a holds two tumour slides, one above and one below those of case b (normal). A resample
    # with both cases has all four slides alike often: AUC 1/2 whatever is drawn. Slides resampled
    # one by one would also draw only the high or only the low tumour slide: AUC 1 or 0.
    positive, scores = [True, True, False, False], [[4, 1, 3, 2]]
    other = [[4, 3, 2, 1]]
    half = {"value": 0.5, "low": 0.5, "high": 0.5}
    means, differences = compare({"all": scores, "frozen": other}, positive, list("aabb"))
    assert means["all"] == half
    assert differences["frozen"] == {"value": -0.5, "low": -0.5, "high": -0.5}
    by_slide, _ = compare({"all": scores}, positive, list("abcd"))
    assert (by_slide["all"]["low"], by_slide["all"]["high"]) == (0, 1)


def test_resamples_are_those_of_a_plain_loop():
    rng = np.random.default_rng(2)
    positive, cases = rng.random(30) < 0.5, np.array([f"c{k // 3}" for k in range(30)])
    rows = {name: rng.random((2, 30)) + 0.4 * positive for name in ("all", "same_steps")}
    _, differences = compare(rows, positive, cases.tolist(), draws=4000)

    def plain(scores, chosen):
        high, low = (scores[[k for k in chosen if positive[k] == p]] for p in (True, False))
        return np.mean([(h > low_) + (h == low_) / 2 for h in high for low_ in low])

    values = []
    for _ in range(1500):
        drawn = rng.choice(np.unique(cases), 10)
        chosen = [k for case in drawn for k in np.flatnonzero(cases == case)]
        values.append(
            np.mean([plain(s, chosen) for s in rows["all"]])
            - np.mean([plain(s, chosen) for s in rows["same_steps"]])
        )
    found = differences["same_steps"]
    assert [found["low"], found["high"]] == pytest.approx(
        np.percentile(values, [2.5, 97.5]).tolist(), abs=0.03
    )


def call(monkeypatch, cohort, *more: str) -> int:
    argv = ["arms.py", "--datasets", f"{cohort}/cohort.yaml", "--out", f"{cohort}/out"]
    argv += ["--epochs", "2", "--bag", "3", "--draws", "50", "--validations", "1"]
    monkeypatch.setattr(sys, "argv", [*argv, "encoder.name=test_resnet", "bag.size=null", *more])
    return exit_code(study.main)


def test_a_study_of_two_arms(cohort, monkeypatch, capfd):
    asked = ("--arms", "all,same_steps", "--lr", "all=1e-3,1e-5", "--lr", "same_steps=1e-3")
    assert call(monkeypatch, cohort, *asked, "--seeds", "0") == 0
    assert call(monkeypatch, cohort, *asked, "--seeds", "0") == 0  # finished runs are kept
    said = capfd.readouterr().out
    assert said.count("e2e train") == 3
    assert said.count("e2e evaluate") == 2
    result = json.loads((cohort / "out" / "study.json").read_text())
    every, drawn = result["arms"]
    assert (every["steps"], every["patches"]) == (6, 2 * 6 * 6)
    assert (drawn["steps"], drawn["patches"]) == (6, 2 * 6 * 3)
    best = max(every["validation"].items(), key=lambda kv: (kv[1]["auc"], -kv[1]["log_loss"]))
    assert every["lr"] == float(best[0])
    assert len(every["test_auc"]) == len(every["minutes"]) == 1
    assert drawn["all_minus_this"]["value"] == pytest.approx(
        np.mean(every["test_auc"]) - np.mean(drawn["test_auc"])
    )
    tuned = cohort / "out" / "runs" / "all_lr0.001_seed0"
    assert set(pd.read_csv(tuned / "predictions.csv")["split"]) == {"val"}  # never saw a test slide
    assert "all - this" in (cohort / "out" / "study.md").read_text()
    assert call(monkeypatch, cohort, *asked, "optim.clip=2.0") == 2  # not these runs' settings
    assert "holds another study" in capfd.readouterr().err


def test_mistakes_are_messages(cohort, monkeypatch, capsys):
    assert call(monkeypatch, cohort, "--arms", "al") == 2
    assert "no arm al" in capsys.readouterr().err
    assert call(monkeypatch, cohort, "--lr", "all=fast") == 2
    assert "fast" in capsys.readouterr().err
