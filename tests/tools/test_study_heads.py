"""The study of heads: arms, paired tables on predictions made by hand, the driver on a small cohort."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from e2e.errors import exit_code
from tests.helpers.study_cohort import cohort  # noqa: F401  (a fixture)
from tools.study import heads as study_heads
from tools.study.base import PEAK_MEMORY

pytestmark = pytest.mark.slow

SLIDES = 8
CASES = [f"c{k // 2}" for k in range(SLIDES)]
LABELS = ["a", "a", "b", "b"] * 2


def predictions(scores, entropy=None) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "case": CASES,
            "slide": [f"s{k}" for k in range(SLIDES)],
            "label": LABELS,
            "prob_b": np.array(scores, float),
        }
    )
    return table if entropy is None else table.assign(attention_entropy=entropy)


RIGHT = predictions([0, 0, 1, 1] * 2)
WRONG = predictions([1, 1, 0, 0] * 2)
TIED = predictions([0.5] * SLIDES)


@pytest.fixture
def evaluation() -> study_heads.Evaluation:
    return study_heads.Evaluation(RIGHT, "b", draws=200)


def test_a_head_takes_the_options_it_has():
    kind = study_heads.HeadArm("", None, False, 2, 6, 72, kind="frozen", more=["x.y=1"])
    options = {"embed_dim": 128, "attn_dim": 64}
    arms = study_heads.arms_of(kind, ["mean", "abmil"], [0.0, 0.1], options)
    found = {arm.name: arm.more for arm in arms}
    mean = ["x.y=1", "head.name=mean", "head.embed_dim=128"]
    abmil = ["x.y=1", "head.name=abmil", "head.embed_dim=128", "head.attn_dim=64"]
    assert found == {
        "frozen_mean": mean,
        "frozen_mean_aem0.1": [*mean, "aem.weight=0.1"],
        "frozen_abmil": abmil,
        "frozen_abmil_aem0.1": [*abmil, "aem.weight=0.1"],
    }
    assert arms[0].settings()[-3:] == mean


def test_a_difference_is_ours_minus_the_others_over_the_seeds_both_have(evaluation):
    assert evaluation.auc_minus([RIGHT], [TIED]) == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert evaluation.auc_minus([WRONG], [RIGHT])["value"] == -1
    # The second seed of ours has no other to be paired with.
    assert evaluation.auc_minus([RIGHT, WRONG], [TIED])["value"] == 0.5
    assert evaluation.auc([RIGHT, WRONG, TIED])["test_auc"] == [1, 0, 0.5]
    assert evaluation.auc([RIGHT, WRONG, TIED])["mean_test_auc"]["value"] == 0.5


def test_entropies_are_paired_by_slide(evaluation):
    low = np.linspace(0.1, 0.8, SLIDES)
    ours, base = predictions([0] * SLIDES, low + 0.2), predictions([0] * SLIDES, low)
    assert evaluation.entropy([ours, base]) == pytest.approx(low + 0.1)
    # As much on every slide, so in every resample.
    assert evaluation.entropy_minus([ours], [base]) == pytest.approx(
        {"value": 0.2, "low": 0.2, "high": 0.2}
    )
    assert evaluation.entropy([RIGHT]) is None  # no such column
    assert evaluation.entropy_minus([ours], [RIGHT]) is None
    assert (
        evaluation.entropy([predictions([0] * SLIDES, np.nan)]) is None
    )  # a head without attention


def test_runs_with_other_test_slides_are_refused(evaluation):
    with pytest.raises(study_heads.UserError, match="same test slides"):
        evaluation.auc([RIGHT, RIGHT[::-1].reset_index(drop=True)])


def test_the_tables_put_a_head_in_a_row_and_aem_next_to_none():
    sure = {"value": 0.9, "low": 0.8, "high": 1.0}
    less = {"value": -0.1, "low": -0.2, "high": 0.0}

    def arm(kind, head, aem=0.0, **more):
        return {
            "name": f"{kind}_{head}", "kind": kind, "head": head, "aem": aem, "lr": 1e-3, "seeds": [0],
            "validation": {"0.001": {"auc": 0.7, "log_loss": 0.6}}, "test_auc": [0.9],
            "mean_test_auc": sure, "minutes": [1.0, 2.0], "mib": [900, 1100],
            "attention_entropy": None, **more,
        }  # fmt: skip

    arms = [arm("frozen", "max"), arm("e2e", "max", minus_frozen=less), arm("e2e", "abmil")]
    result = {"test": {"slides": 8, "cases": 4, "draws": 9}, "extraction": None, "arms": arms}
    span, minus = "0.900 [0.800, 1.000]", "-0.100 [-0.200, 0.000]"
    said = study_heads.as_text(result)
    assert f"| max | 1 / 1 | {span} | {span} | {minus} | 1.5 | 1.5 | 1,100 | 1,100 |" in said
    assert f"| abmil | - / 1 |  | {span} |  |  | 1.5 |  | 1,100 |" in said
    assert "aem.weight" not in said
    arms.append(arm("e2e", "abmil", 0.1, minus_plain=less, attention_entropy=0.5))
    said = study_heads.as_text(result)
    assert f"| e2e | abmil | 0.1 | 0.900 | {span} | {minus} | 0.500 |  |" in said


def test_a_commands_memory_is_its_own(tmp_path):
    # Not the driver's, which is larger than a bare interpreter; and its exit code is passed on.
    bulk = "import sys; x = bytearray(80 << 20); print(len(x)); sys.exit(7)"
    found = []
    for program in ("pass", bulk):
        line = [sys.executable, "-I", "-S", str(PEAK_MEMORY), str(tmp_path / "peak")]
        line += [sys.executable, "-I", "-S", "-c", program]
        done = subprocess.run(line, capture_output=True, check=False)
        found.append((int((tmp_path / "peak").read_text()) / 1024, done.returncode))
    (small, ok), (large, failed) = found
    assert small < 40
    assert 75 < large - small < 90
    assert (ok, failed) == (0, 7)


def call(monkeypatch, cohort, *more: str) -> int:  # noqa: F811
    argv = ["heads.py", "--datasets", f"{cohort}/cohort.yaml", "--out", f"{cohort}/out"]
    argv += ["--epochs", "1", "--draws", "20", "--validations", "1"]
    monkeypatch.setattr(sys, "argv", [*argv, "encoder.name=test_resnet", "bag.size=null", *more])
    return exit_code(study_heads.main)


def test_a_study_of_heads(cohort, monkeypatch, capfd):  # noqa: F811
    assert call(monkeypatch, cohort, "--heads", "abmil") == 0
    # Finished runs and features are kept; an arm may be added.
    assert call(monkeypatch, cohort, "--heads", "abmil", "--aem", "0,0.1") == 0
    said = capfd.readouterr().out
    assert said.count("e2e extract") == 1
    assert said.count("e2e train") == said.count("e2e evaluate") == 4
    result = json.loads((cohort / "out" / "study.json").read_text())
    arms = {arm["name"]: arm for arm in result["arms"]}
    assert list(arms) == ["frozen_abmil", "e2e_abmil", "frozen_abmil_aem0.1", "e2e_abmil_aem0.1"]
    ours, base, plain = arms["e2e_abmil_aem0.1"], arms["frozen_abmil_aem0.1"], arms["e2e_abmil"]
    for key, other in (("minus_frozen", base), ("minus_plain", plain)):
        assert ours[key]["value"] == pytest.approx(ours["test_auc"][0] - other["test_auc"][0])
    more = ours["attention_entropy"] - plain["attention_entropy"]
    assert ours["entropy_minus_plain"]["value"] == pytest.approx(more)
    assert all(mib > 100 for arm in arms.values() for mib in arm["mib"])
    assert result["extraction"]["mib"] > 100
    run = cohort / "out" / "runs" / "frozen_abmil_aem0.1_lr0.001_seed0"
    assert set(pd.read_csv(run / "predictions.csv")["split"]) == {"val"}  # never saw a test slide
    said = (run / "settings.yaml").read_text()
    assert "name: features" in said
    assert "weight: 0.1" in said
    assert call(monkeypatch, cohort, "--heads", "abmil", "optim.clip=2.0") == 2
    assert "holds another study" in capfd.readouterr().err


def test_mistakes_are_messages(cohort, monkeypatch, capsys):  # noqa: F811
    for more, message in (
        (("--heads", "abmill"), "did you mean 'abmil'"),
        (("--kinds", "e3e"), "no kind e3e"),
        (("--lr", "all=1e-3"), "no kind all"),
        (("--aem", "much"), "much"),
    ):
        assert call(monkeypatch, cohort, *more) == 2
        assert message in capsys.readouterr().err
