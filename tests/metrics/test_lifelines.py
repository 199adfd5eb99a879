"""Survival against lifelines, which no environment of ours can hold: against what it found once.

Made again by the command in the docstring of tools/bench/reference_lifelines.py, which writes lifelines.json.
Where lifelines and we mean the same, both are equal; where they do not:

- lifelines fits Cox's model with Efron's ties alone: our Breslow ties are compared with nothing of it
  (scikit-survival has them, see test_survival.py), and must differ from it wherever events are tied.
- Its baseline hazard is Breslow's also with Efron's coefficients, as ours is; and of a case of average
  covariates, ours of a case of risk 0. The covariates are standardised, so that both are the same case.
- Its concordance wants a predicted time: higher is later. Ours wants a risk.
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
    """A data set with its times in one unit, and what lifelines found."""

    x: np.ndarray  # (n, covariates), standardised
    time: np.ndarray
    event: np.ndarray
    risk: np.ndarray  # (n,) by lifelines' coefficients
    theirs: dict[str, Any]


@pytest.fixture(
    scope="module",
    params=[(name, unit) for name, s in SAVED["sets"].items() for unit in s[BY_UNIT]],
    ids=lambda given: f"{given[0]} in units of {given[1]} days",
)
def compared(request) -> Compared:
    name, unit = request.param
    known = SAVED["sets"][name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw, outcome = LOAD[name]()
    columns = []
    for column, how in known["covariates"].items():
        numbers = (raw[column].map(how["codes"]) if how["codes"] else raw[column]).to_numpy(float)
        assert [numbers.mean(), numbers.std(ddof=1)] == pytest.approx([how["mean"], how["sd"]])
        columns.append((numbers - how["mean"]) / how["sd"])
    x, theirs = np.stack(columns, axis=1), known[BY_UNIT][unit]
    time = np.ceil(outcome[known["fields"]["time"]].astype(float) / float(unit))
    event = outcome[known["fields"]["event"]].astype(bool)
    assert (len(time), event.sum()) == (known["cases"], known["events"])
    return Compared(x, time, event, x @ theirs["coefficients"], theirs)


@pytest.fixture(params=["as it is", "in float64"])
def error(request, monkeypatch):
    """Allowed of the loss, relative, and of the slope an event; of the same lines in float64 less."""
    if request.param == "as it is":
        yield 1e-6, 1e-6
        return
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield 1e-12, 1e-10
    torch.set_default_dtype(torch.float32)


def cox(compared: Compared, ties: str) -> tuple[float, np.ndarray]:
    """The sum of our loss's terms at lifelines' coefficients, and its slope by each of them."""
    at = torch.tensor(compared.theirs["coefficients"], dtype=torch.float64, requires_grad=True)
    x, time, event = (torch.from_numpy(v) for v in (compared.x, compared.time, compared.event))
    loss = cox_loss(x @ at, time, event.double(), ties=ties).sum()
    loss.backward()
    assert at.grad is not None
    return loss.item(), at.grad.numpy()


def test_efrons_loss_is_minus_lifelines_log_likelihood_and_least_at_its_coefficients(
    compared, error
):
    of_loss, of_slope = error
    loss, slope = cox(compared, "efron")
    assert loss == pytest.approx(-compared.theirs["log_likelihood"], rel=of_loss)
    np.testing.assert_allclose(slope, 0, atol=of_slope * compared.event.sum())
    # There are ties to be seen: Breslow's way with them is neither.
    breslow, steep = cox(compared, "breslow")
    assert breslow > loss + 0.05
    assert np.abs(steep).max() > 0.02


def test_harrells_c_is_lifelines_concordance(compared):
    once = np.ones((1, len(compared.time)))
    found = sm.c_index(compared.risk, compared.time, compared.event, once)
    np.testing.assert_allclose(found, compared.theirs["concordance_index"], **CLOSE)


def test_kaplan_meier_is_lifelines_of_all_and_of_each_half_by_risk(compared):
    high = compared.risk > np.median(compared.risk)
    assert high.sum() == compared.theirs["high_risk_cases"]
    at, once = np.array(compared.theirs["at"]), np.ones(len(high))
    for name, own in {"all": once, "low_risk": ~high, "high_risk": high}.items():
        found = sm.kaplan_meier(compared.time, compared.event, own[None] * once, at)
        expected = compared.theirs["kaplan_meier"][name]
        np.testing.assert_allclose(found[0], expected, err_msg=name, **CLOSE)


def test_the_figures_log_rank_p_and_curves_are_lifelines_of_its_halves_by_risk(compared):
    picture = survival_figures(compared.risk, compared.time, compared.event)[0]
    assert isinstance(picture, Curves)
    assert picture.title == f"log-rank p = {compared.theirs['log_rank']['p']:.3g}"
    at = compared.theirs["at"]
    for name, (points, chances) in picture.lines.items():
        found = chances[np.searchsorted(points, at, side="right") - 1]
        group = "_".join(name.split()[:2])
        np.testing.assert_allclose(found, compared.theirs["kaplan_meier"][group], **CLOSE)


def test_the_baseline_hazard_is_lifelines_of_a_case_of_average_covariates(compared):
    at, expected = compared.theirs["at"], compared.theirs["baseline_cumulative_hazard"]
    once = np.ones(len(compared.time))
    found = sm.Baseline.fit(compared.risk, compared.time, compared.event, once)
    np.testing.assert_allclose(np.exp(found(at)), expected, **CLOSE)
    # Covariates that are not centred have another case of risk 0, and chances that are the same.
    moved = sm.Baseline.fit(compared.risk + 3, compared.time, compared.event, once)
    np.testing.assert_allclose(np.exp(moved(at) + 3), expected, **CLOSE)
