"""Survival against saved results of lifelines, which cannot be installed beside the other packages.

tools/bench/reference_lifelines.py writes lifelines.json again (see its docstring). Where lifelines
and this project define a quantity alike, the values are equal. They differ in three points:

- lifelines fits Cox's model with Efron's ties only. Breslow's ties are compared with scikit-survival (see
  test_survival.py), and must differ from lifelines wherever events are tied.
- Both use Breslow's baseline hazard, also with Efron's coefficients. That of lifelines is of a case of
  average covariates, ours of a case of risk 0; the covariates are standardised, so it is the same case.
- Its concordance takes a predicted time (higher is later), ours a risk.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sksurv.datasets import load_gbsg2, load_whas500

from e2e.losses.survival import cox_loss
from e2e.metrics import survival as sm
from e2e.metrics.figures import Curves, survival_figures

SAVED = json.loads((Path(__file__).parent / "lifelines.json").read_text())
LOAD = {"whas500": load_whas500, "gbsg2": load_gbsg2}
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
BY_UNIT = "by_days_in_a_unit_of_time"


class Compared(NamedTuple):
    """A data set with its times in one unit, and the results of lifelines."""

    x: np.ndarray  # (n, covariates), standardised
    time: np.ndarray
    event: np.ndarray
    risk: np.ndarray  # (n,) by lifelines' coefficients
    lifelines: dict[str, Any]


@pytest.fixture(
    scope="module",
    params=[(name, unit) for name, s in SAVED["sets"].items() for unit in s[BY_UNIT]],
    ids=lambda set_and_unit: f"{set_and_unit[0]} in units of {set_and_unit[1]} days",
)
def compared(request) -> Compared:
    name, unit = request.param
    saved = SAVED["sets"][name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw, outcome = LOAD[name]()
    columns = []
    for column, how in saved["covariates"].items():
        numbers = (raw[column].map(how["codes"]) if how["codes"] else raw[column]).to_numpy(float)
        assert [numbers.mean(), numbers.std(ddof=1)] == pytest.approx([how["mean"], how["sd"]])
        columns.append((numbers - how["mean"]) / how["sd"])
    x, lifelines = np.stack(columns, axis=1), saved[BY_UNIT][unit]
    time = np.ceil(outcome[saved["fields"]["time"]].astype(float) / float(unit))
    event = outcome[saved["fields"]["event"]].astype(bool)
    assert (len(time), event.sum()) == (saved["cases"], saved["events"])
    return Compared(x, time, event, x @ lifelines["coefficients"], lifelines)


@pytest.fixture(params=["as it is", "in float64"])
def error(request, monkeypatch):
    """Relative tolerance of the loss, and tolerance of its gradient per event; smaller in float64."""
    if request.param == "as it is":
        yield 1e-6, 1e-6
        return
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield 1e-12, 1e-10
    torch.set_default_dtype(torch.float32)


def cox(compared: Compared, ties: str) -> tuple[float, np.ndarray]:
    """Sum of our loss at the coefficients of lifelines, and its gradient by them."""
    at = torch.tensor(compared.lifelines["coefficients"], dtype=torch.float64, requires_grad=True)
    x, time, event = (torch.from_numpy(v) for v in (compared.x, compared.time, compared.event))
    loss = cox_loss(x @ at, time, event.double(), ties=ties).sum()
    loss.backward()
    assert at.grad is not None
    return loss.item(), at.grad.numpy()


def test_efrons_loss_is_minus_lifelines_log_likelihood_and_minimal_at_its_coefficients(
    compared, error
):
    of_loss, of_slope = error
    loss, slope = cox(compared, "efron")
    assert loss == pytest.approx(-compared.lifelines["log_likelihood"], rel=of_loss)
    np.testing.assert_allclose(slope, 0, atol=of_slope * compared.event.sum())
    # There are tied events: with Breslow's ties neither holds.
    breslow, steep = cox(compared, "breslow")
    assert breslow > loss + 0.05
    assert np.abs(steep).max() > 0.02


def test_harrells_c_equals_lifelines_concordance(compared):
    once = np.ones((1, len(compared.time)))
    value = sm.c_index(compared.risk, compared.time, compared.event, once)
    np.testing.assert_allclose(value, compared.lifelines["concordance_index"], **CLOSE)


def test_kaplan_meier_equals_lifelines_for_all_cases_and_each_half_by_risk(compared):
    high = compared.risk > np.median(compared.risk)
    assert high.sum() == compared.lifelines["high_risk_cases"]
    at, once = np.array(compared.lifelines["at"]), np.ones(len(high))
    for name, group in {"all": once, "low_risk": ~high, "high_risk": high}.items():
        curve = sm.kaplan_meier(compared.time, compared.event, group[None] * once, at)
        expected = compared.lifelines["kaplan_meier"][name]
        np.testing.assert_allclose(curve[0], expected, err_msg=name, **CLOSE)


def test_log_rank_p_and_curves_of_the_figure_equal_lifelines_for_halves_by_risk(compared):
    figure = survival_figures(compared.risk, compared.time, compared.event)[0]
    assert isinstance(figure, Curves)
    assert figure.title == f"log-rank p = {compared.lifelines['log_rank']['p']:.3g}"
    at = compared.lifelines["at"]
    for name, (points, probabilities) in figure.lines.items():
        curve = probabilities[np.searchsorted(points, at, side="right") - 1]
        group = "_".join(name.split()[:2])
        np.testing.assert_allclose(curve, compared.lifelines["kaplan_meier"][group], **CLOSE)


def test_baseline_hazard_equals_lifelines_for_a_case_of_average_covariates(compared):
    at, expected = compared.lifelines["at"], compared.lifelines["baseline_cumulative_hazard"]
    once = np.ones(len(compared.time))
    baseline = sm.Baseline.fit(compared.risk, compared.time, compared.event, once)
    np.testing.assert_allclose(np.exp(baseline(at)), expected, **CLOSE)
    # Covariates that are not centred have another case of risk 0, and the same probabilities.
    moved = sm.Baseline.fit(compared.risk + 3, compared.time, compared.event, once)
    np.testing.assert_allclose(np.exp(moved(at) + 3), expected, **CLOSE)
