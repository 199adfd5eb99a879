"""Survival: losses by hand and against float64 references, codes and times, bins of the training."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sksurv.datasets import load_whas500
    from sksurv.linear_model import CoxPHSurvivalAnalysis

import e2e.tasks  # noqa: F401
from e2e.errors import UserError
from e2e.losses.survival import cox_loss, discrete_nll
from e2e.metrics.survival import Censoring
from e2e.tasks.base import TASKS
from e2e.tasks.survival import Survival

NAN = math.nan


def task(**options) -> Survival:
    built = TASKS.build("survival", **({"event": "1"} | options))
    assert isinstance(built, Survival)
    return built


def targets(*pairs: tuple[float, float]) -> list[torch.Tensor]:
    return [torch.tensor(pair, dtype=torch.float64) for pair in pairs]


# --- the discrete-time likelihood ---


def test_discrete_loss_of_two_cases_by_hand():
    # Hazard 1/2 in each of 3 intervals. An event in interval 1 has the probability 1/2 * 1/2; to be
    # censored in interval 0 is to outlive it, probability 1/2. The last interval too can be outlived.
    interval, event = torch.tensor([1, 0, 2]), torch.tensor([1.0, 0.0, 0.0])
    loss = discrete_nll(torch.zeros(3, 3), interval, event)
    assert loss.tolist() == pytest.approx([math.log(4), math.log(2), math.log(8)])
    weighed = discrete_nll(torch.zeros(3, 3), interval, event, alpha=0.25)
    expected = [math.log(4), 0.75 * math.log(2), 0.75 * math.log(8)]
    assert weighed.tolist() == pytest.approx(expected)


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_discrete_loss_is_the_formula_of_products_in_float64(seed, alpha):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (6, 4))
    interval, event = rng.integers(0, 4, 6), rng.integers(0, 2, 6)
    hazard = 1 / (1 + np.exp(-logits))
    alive = np.hstack([np.ones((6, 1)), np.cumprod(1 - hazard, axis=1)])
    rows = np.arange(6)
    seen = -np.log(alive[rows, interval]) - np.log(hazard[rows, interval])
    lost = -np.log(alive[rows, interval + 1])
    expected = (1 - alpha) * np.where(event, seen, lost) + alpha * event * seen
    result = discrete_nll(
        torch.from_numpy(logits), torch.from_numpy(interval), torch.from_numpy(event), alpha=alpha
    )
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_hazards_near_0_and_1_keep_a_finite_loss_and_slope():
    logits = torch.tensor([[90.0, 90.0], [-90.0, -90.0]], requires_grad=True)
    loss = discrete_nll(logits, torch.tensor([1, 1]), torch.tensor([0.0, 1.0]))
    assert loss.tolist() == pytest.approx([180.0, 90.0])
    loss.sum().backward()
    assert logits.grad.abs().max() == pytest.approx(1)


# --- Cox's partial likelihood ---


def reference(risk, time, event, ties) -> float:
    """The negative log partial likelihood in float64, one event after the other."""
    total = 0.0
    for at in np.unique(time[event == 1]):
        tied = np.flatnonzero((time == at) & (event == 1))
        full, own = np.exp(risk[time >= at]).sum(), np.exp(risk[tied]).sum()
        for turn, case in enumerate(tied):
            taken = turn / len(tied) * own if ties == "efron" else 0.0
            total += math.log(full - taken) - risk[case]
    return total


def test_cox_loss_of_four_cases_by_hand():
    # Hazards 1, 2, 4, 3; an event at 1, one lost and one event at 2, an event at 3.
    risk = torch.tensor([1.0, 2.0, 4.0, 3.0]).log()
    time, event = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    expected = [math.log(10), 0, math.log(9 / 4), 0]
    for ties in ("breslow", "efron"):
        assert cox_loss(risk, time, event, ties=ties).tolist() == pytest.approx(expected)
    # Both at time 2 have an event: Efron takes half of the two, 3, off the second's sum of 9.
    both = torch.tensor([1.0, 1.0, 1.0, 1.0])
    efron = cox_loss(risk, time, both, ties="efron").sum()
    assert efron.item() == pytest.approx(math.log(10 * 9 * 6 / (1 * 2 * 4)))
    breslow = cox_loss(risk, time, both, ties="breslow").sum()
    assert breslow.item() == pytest.approx(math.log(10 * 9 * 9 / (1 * 2 * 4)))


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(["efron", "breslow"]), st.integers(1, 9))
def test_cox_loss_is_the_formula_in_float64_with_ties_and_in_any_order(seed, ties, last):
    rng = np.random.default_rng(seed)
    risk, time = rng.normal(0, 3, 12), rng.integers(1, last + 1, 12).astype(float)
    event = rng.integers(0, 2, 12).astype(float)
    expected = reference(risk, time, event, ties)
    for order in (np.arange(12), rng.permutation(12)):
        parts = [torch.from_numpy(v[order]) for v in (risk, time, event)]
        assert cox_loss(*parts, ties=ties).sum().item() == pytest.approx(
            expected, rel=1e-4, abs=1e-4
        )


def test_cox_loss_forgives_a_shift_of_all_risks_and_extreme_ones():
    risk = torch.tensor([500.0, 100.0, -300.0], requires_grad=True)
    loss = cox_loss(risk, torch.tensor([3.0, 2.0, 1.0]), torch.ones(3))
    assert loss.tolist() == pytest.approx([0, 400, 800])
    loss.sum().backward()
    assert risk.grad.isfinite().all()


def test_cases_that_are_not_known_are_in_no_risk_set():
    risk = torch.tensor([0.0, 1.0, 2.0, 9.0, 9.0], requires_grad=True)
    time, event = torch.tensor([1.0, 2.0, 3.0, NAN, 2.5]), torch.tensor([1.0, 1.0, 0.0, 1.0, NAN])
    for ties in ("breslow", "efron"):
        risk.grad = None
        loss = cox_loss(risk, time, event, ties=ties)
        expected = reference(*(v[:3].detach().double().numpy() for v in (risk, time, event)), ties)
        assert loss.sum().item() == pytest.approx(expected, rel=1e-5)
        loss.sum().backward()
        assert risk.grad[3:].tolist() == [0, 0]


def test_an_update_without_an_event_has_no_loss_and_one_bag_neither():
    assert (
        cox_loss(torch.randn(3), torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)).tolist() == [0] * 3
    )
    assert cox_loss(torch.randn(1), torch.ones(1), torch.ones(1)).tolist() == [0]


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_scikit_survivals_cox_model_is_where_our_loss_is_least(ties):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table, outcome = load_whas500()
        numbers = table[["age", "bmi", "hr", "sysbp"]].astype(float)
        numbers = (numbers - numbers.mean()) / numbers.std()
        model = CoxPHSurvivalAnalysis(ties=ties, tol=1e-12).fit(numbers, outcome)
    x = torch.from_numpy(numbers.to_numpy().copy())
    time = torch.from_numpy(outcome["lenfol"].astype(float).round(-2) + 1)  # with many ties
    event = torch.from_numpy(outcome["fstat"].astype(float))
    tied = outcome.copy()
    tied["lenfol"] = time.numpy()
    model = CoxPHSurvivalAnalysis(ties=ties, tol=1e-12).fit(numbers, tied)
    weights = torch.from_numpy(model.coef_.copy()).requires_grad_()
    cox_loss(x @ weights, time, event, ties=ties).sum().backward()
    assert weights.grad.abs().max() < 1e-3  # of 215 events
    other = torch.from_numpy(model.coef_.copy()).requires_grad_()
    wrong = {"efron": "breslow", "breslow": "efron"}[ties]
    cox_loss(x @ other, time, event, ties=wrong).sum().backward()
    assert other.grad.abs().max() > 0.1


# --- words ---


def test_the_coding_of_events_is_asked_for():
    with pytest.raises(
        UserError,
        match=r"task\.event is missing: which code of column 'status' is an observed event",
    ):
        TASKS.build("survival", event_column="status")


@pytest.mark.parametrize(
    ("options", "code", "event"),
    [
        ({"event": "1"}, "1", 1), ({"event": "1"}, "0", 0), ({"event": "1"}, "1.0", 1),
        ({"event": "0"}, "0", 1), ({"event": "0"}, "1", 0),
        ({"event": "dead", "censored": "alive"}, "Dead", 1),
        ({"event": "2", "censored": "1"}, "1", 0),
    ],
)  # fmt: skip
def test_a_code_means_what_the_settings_say(options, code, event):
    result = task(**options).encode({"event": code, "time": "3.5"})
    assert result.tolist() == [3.5, event]
    assert result.dtype == torch.float64


@pytest.mark.parametrize(
    ("code", "time", "message"),
    [
        ("2", "5", "'2' in column 'event' is neither task.event ('1') nor task.censored ('0')"),
        ("dead", "5", "set both to the codes of the table"),
        ("1", "0", "'0' in column 'time' is not a time: it must be a number above 0"),
        ("1", "-3", "'-3' in column 'time' is not a time"),
        ("0", "nan", "'nan' in column 'time' is not a time"),
        ("0", "12 months", "'12 months' in column 'time' is not a time"),
    ],
)
def test_other_codes_and_times_are_refused_in_one_message(code, time, message):
    with pytest.raises(UserError) as error:
        task().encode({"event": code, "time": time})
    assert message in str(error.value)


@pytest.mark.parametrize("words", [("", "5"), ("1", ""), ("", "")])
def test_half_a_label_is_none(words):
    result = task().encode(dict(zip(("event", "time"), words, strict=True)))
    assert not task().is_labelled(result)


# --- what training tells ---


def test_bins_are_cut_at_quantiles_of_the_events_of_training_cases_each_once():
    # Events at 1..8, many slides of the last case, and censored ones that do not count.
    pairs = [(float(t), 1.0) for t in range(1, 9)] + [(8.0, 1.0)] * 20 + [(50.0, 0.0)] * 9
    cases = [*"abcdefgh", *["h"] * 20, *[f"x{k}" for k in range(9)]]
    built = task(bins=4)
    built.fit(targets(*pairs), cases)
    assert built.edges == [2.75, 4.5, 6.25]
    at = torch.tensor([0.5, 2.75, 4.4, 6.25, 90.0], dtype=torch.float64)
    assert built._interval(at).tolist() == [0, 1, 1, 3, 3]


def test_training_without_events_or_with_too_few_for_the_bins_is_refused():
    with pytest.raises(UserError, match="none of the 2 labelled training cases has an event"):
        task().fit(targets((1, 0), (2, 0)), ["a", "b"])
    with pytest.raises(
        UserError, match="the 3 events of the training cases cannot be cut into 4 intervals"
    ):
        task(bins=4).fit(targets((1, 1), (2, 1), (3, 1), (4, 0)), [*"abcd"])
    for times in ([2] * 9, [1] * 5 + [2, 3, 4, 5], [1, 1, 1, 9, 9, 9, 9, 9, 9]):
        with pytest.raises(UserError, match=r"the 9 events .* cannot be cut into 3 intervals"):
            task(bins=3).fit(targets(*[(t, 1) for t in times]), [*"abcdefghi"])
    task(loss="cox").fit(targets((1, 1), (2, 0)), [*"ab"])


def test_a_state_of_other_bins_does_not_fit():
    built = task(bins=2)
    built.fit(targets((1, 1), (2, 1), (3, 0)), [*"abc"])
    with pytest.raises(ValueError, match=r"2 intervals where task\.bins=3"):
        task(bins=3).load_state(built.state())


def test_risk_is_minus_the_sum_of_the_chances_and_higher_for_an_earlier_event():
    built = task(bins=3)
    built.fit(targets((1, 1), (2, 1), (3, 1), (4, 0)), [*"abcd"])
    result = built.predict(torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]]))
    assert result[0].tolist() == pytest.approx([-(1 / 2 + 1 / 4 + 1 / 8), 1 / 2, 1 / 4, 1 / 8])
    assert result[1, 0] > result[0, 0]
    both = built.metrics(
        result.double().numpy(), np.array([[9.0, 1.0], [1.0, 1.0]]), np.ones((1, 2))
    )
    assert both["c_index"] == 1


def test_survival_nll_of_the_metrics_is_the_loss_at_alpha_0():
    built = task(bins=3, alpha=0.5)
    built.fit(targets((1, 1), (2, 1), (3, 1), (4, 0)), [*"abcd"])
    pairs = targets((0.5, 1), (2.2, 0), (9, 1), (2.9, 1))
    logits = torch.randn(4, 3)
    loss = task(bins=3)
    loss.load_state(built.state())
    expected = loss.loss(logits, torch.stack(pairs)).mean().item()
    numbers = np.array([built.target_values(t) for t in pairs])
    result = built.metrics(built.predict(logits).double().numpy(), numbers, np.ones((1, 4)))
    assert result["survival_nll"][0] == pytest.approx(expected, rel=1e-5)


# --- when probabilities are evaluated ---


@pytest.fixture
def rounded() -> tuple[Survival, np.ndarray]:
    """Intervals that meet at 2 and 3, and five cases of whole times, one lost at 2."""
    selected = np.array([[1.0, 1], [2, 1], [2, 0], [3, 1], [4, 1]])
    built = task(bins=3)
    censoring = Censoring.fit(selected[:, 0], selected[:, 1] == 1)
    known = {"times": censoring.times.tolist(), "chance": censoring.chance.tolist()}
    built.load_state({"edges": [2.0, 3.0], "censoring": known})
    return built, selected


def test_an_event_at_an_edge_is_judged_as_of_the_interval_that_begins_there_by_hand(rounded):
    built, selected = rounded
    # In sight: everybody until one of three is lost at 2, so 2/3 from there; inverse weights 1 and 3/2.
    # Before 2 the first case is ill and four are well; before 3 two are ill and two are well.
    predicted = np.tile([0.0, 0.8, 0.4, 0.1], (5, 1))
    before_2 = (0.8**2 + 4 * 0.2**2) / 5
    before_3 = (0.4**2 + 0.4**2 * 3 / 2 + 2 * 0.6**2 * 3 / 2) / 5
    result = built.metrics(predicted, selected, np.ones((1, 5)))["integrated_brier"]
    np.testing.assert_allclose(result, (before_2 + before_3) / 2, rtol=1e-12)


def test_who_knows_the_interval_of_each_event_has_no_brier_score_and_is_calibrated(rounded):
    built, selected = rounded
    seen = selected[selected[:, 1] == 1]
    alive = (built._interval(torch.from_numpy(seen[:, 0]))[:, None] > torch.arange(3)).numpy()
    predicted = np.c_[-alive.sum(1), alive].astype(float)
    assert built.metrics(predicted, seen, np.ones((1, 4)))["integrated_brier"] == 0
    [calibration] = [p for p in built.figures(predicted, seen) if p.name == "calibration"]
    for label, (message, true) in calibration.lines.items():
        np.testing.assert_array_equal(message, true, err_msg=label)
    assert [*calibration.lines] == ["at 2", "at 3"]


def test_the_chances_of_cox_are_those_before_the_edges_too():
    built, selected = task(loss="cox", bins=3), targets((1, 1), (2, 1), (3, 1), (4, 1))
    built.fit(selected, [*"abcd"])
    built.edges = [2.0, 3.0]
    built.fit_to_predictions(
        "ema", np.zeros((4, 1)), np.array([t.tolist() for t in selected]), [*"abcd"]
    )
    result = built.for_weights("ema").predict(torch.zeros(1, 1))[0, 1:].tolist()
    assert result == pytest.approx([math.exp(-1 / 4), math.exp(-1 / 4 - 1 / 3)])


def test_nothing_is_judged_before_the_first_event():
    built = task(loss="cox", bins=4)
    built.fit(targets((1, 1), (1, 1), (1, 1), (2, 1), (3, 1)), [*"abcde"])
    assert built.edges == [2.0]


# --- Cox's baseline hazard ---


@pytest.fixture(scope="module")
def whas():
    """Risks of scikit-survival's Cox model for its cases, their targets, the model and what it saw."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table, outcome = load_whas500()
        numbers = table[["age", "bmi", "hr"]].astype(float)
        model = CoxPHSurvivalAnalysis().fit(numbers, outcome)
    selected = np.c_[outcome["lenfol"].astype(float), outcome["fstat"].astype(float)]
    return model.predict(numbers)[:, None], selected, model, numbers


def settled(whas, **options) -> Survival:
    risk, selected, *_ = whas
    built = task(loss="cox", **options)
    names = [str(k) for k in range(len(selected))]
    built.fit(targets(*selected.tolist()), names)
    built.fit_to_predictions("ema", risk, selected, names)
    return built


def test_cox_has_the_chances_of_scikit_survivals_cox_model_by_the_weights_that_were_settled(whas):
    risk, selected, model, numbers = whas
    built = settled(whas)
    output = built.for_weights("ema")
    assert output.prediction_columns == ("risk", "survival_1", "survival_2", "survival_3")
    result = output.predict(torch.from_numpy(risk)).numpy()
    curves = model.predict_survival_function(numbers)
    np.testing.assert_allclose(
        result[:, 1:], [curve(built.times) for curve in curves], rtol=1e-4, atol=1e-5
    )
    values = output.metrics(result, selected, np.ones((1, len(selected))))
    assert 0.1 < values["integrated_brier"] < 0.2  # of chances of 1/2 everywhere: 0.25
    assert "calibration" in {picture.name for picture in output.figures(result, selected)}
    assert output.heatmap_output(result[0].tolist())[0] == 0


def test_of_other_weights_and_in_training_cox_has_risks_alone(whas):
    risk, selected, *_ = whas
    built, once = settled(whas), np.ones((1, len(selected)))
    for output, more in ((built, set()), (built.for_weights("model"), {"integrated_brier"})):
        assert output.prediction_columns == ("risk",)
        result = output.predict(torch.from_numpy(risk)).numpy()
        assert result.shape == risk.shape
        values = output.metrics(result, selected, once)
        assert values.keys() == {"c_index", "c_index_uno", "auc_dynamic_mean"} | more
        assert all(np.isnan(values[name]).all() for name in more)
        assert "calibration" not in {picture.name for picture in output.figures(result, selected)}


def test_a_case_of_several_slides_counts_once_in_the_baseline_hazard(whas):
    risk, selected, *_ = whas
    again = np.r_[np.arange(len(risk)), np.repeat(np.arange(40), 5)]
    names = [str(k) for k in again]
    built, expected = task(loss="cox"), settled(whas).baselines["ema"]
    built.fit_to_predictions("ema", risk[again], selected[again], names)
    result = built.baselines["ema"]
    np.testing.assert_array_equal(result.times, expected.times)
    np.testing.assert_allclose(result.log_hazard, expected.log_hazard, rtol=1e-10)


def test_slides_without_a_label_are_in_no_baseline_hazard_and_risks_that_are_no_numbers_have_none(
    whas,
):
    risk, selected, *_ = whas
    names = [str(k) for k in range(len(risk))]
    built, expected = task(loss="cox"), settled(whas).baselines["ema"]
    more = np.r_[selected, [[NAN, 1], [5, NAN]]]
    built.fit_to_predictions("ema", np.r_[risk, [[99.0], [99.0]]], more, [*names, "x", "y"])
    np.testing.assert_array_equal(built.baselines["ema"].log_hazard, expected.log_hazard)
    built.fit_to_predictions("ema", np.r_[risk[1:], [[NAN]]], selected, names)
    assert built.baselines == {}


def test_the_baseline_hazard_is_saved_with_the_run_and_runs_from_before_it_have_risks_alone(whas):
    built, fresh = settled(whas), task(loss="cox")
    state = json.loads(json.dumps(built.state()))
    fresh.load_state(state)
    logits = torch.randn(5, 1)
    assert (
        fresh.for_weights("ema").predict(logits).tolist()
        == built.for_weights("ema").predict(logits).tolist()
    )
    del state["baselines"]
    fresh.load_state(state)
    assert fresh.for_weights("ema").predict(logits).tolist() == logits.tolist()


def test_a_pass_over_the_training_slides_is_for_cox_with_a_baseline_alone():
    requested = [task(), task(loss="cox", baseline="none"), task(loss="cox")]
    assert [built.fits_predictions for built in requested] == [False, False, True]


def test_the_events_are_told_with_their_code():
    message = task(event_column="Status").describe(targets((3, 1), (10, 0), (5.5, 0)))
    assert message == "1 with an event (33%; '1' in Status), times 3 to 10"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 1}, "task.bins=1 must be 2 or more"),
        ({"alpha": 1.5}, "task.alpha=1.5 must be in [0, 1]"),
        ({"loss": "coxx"}, "did you mean 'cox'"),
        ({"ties": "exact"}, "unknown value task.ties=exact"),
        ({"baseline": "efron"}, "unknown value task.baseline=efron"),
        (
            {"loss": "cox", "monitor": "integrated_brier"},
            "unknown metric task.monitor=integrated_brier",
        ),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError) as error:
        task(**options)
    assert message in str(error.value)


def test_the_published_survival_table_of_tcga_brca_is_read_and_binned(shared_data):
    folder = shared_data / "labels" / "survival_tcga_brca_3fold"
    built = task(event_column="Status", time_column="Event")
    for fold in range(3):
        table = pd.read_csv(folder / f"fold_{fold}.csv", dtype=str)
        result = [built.encode(row) for row in table.to_dict("records")]
        assert len(result) == 1007
        assert sum(int(t[1]) for t in result) == 146
        train = [k for k, split in enumerate(table["Split"]) if split == "train"]
        built.fit([result[k] for k in train], [table["ID"][k] for k in train])
        events = [float(result[k][0]) for k in train if result[k][1] == 1]
        counts = np.bincount(np.searchsorted(built.edges, events, side="right"), minlength=4)
        assert counts.max() - counts.min() <= 2
    # The published bins were cut on all cases, those of the test among them.
    built.fit(result, [*table["ID"]])
    actual = built._interval(torch.stack(result)[:, 0]).numpy()
    assert np.bincount(actual).tolist() == np.bincount(table["Label"].astype(int)).tolist()
