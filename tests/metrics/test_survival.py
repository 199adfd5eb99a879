"""Metrics of survival against scikit-survival on its own data sets, and by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sksurv.metrics as sk
    from sksurv.datasets import load_gbsg2, load_whas500
    from sksurv.linear_model import CoxPHSurvivalAnalysis
    from sksurv.nonparametric import CensoringDistributionEstimator, kaplan_meier_estimator

from e2e.metrics import survival as sm
from e2e.metrics.bootstrap import case_weights

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
COLUMNS = {
    "whas500": ("fstat", "lenfol", "age", load_whas500),
    "gbsg2": ("cens", "time", "pnodes", load_gbsg2),
}


@pytest.fixture(scope="module", params=COLUMNS)
def cohort(request):
    """Structured outcomes, risk (with ties), time, event."""
    event, time, risk, load = COLUMNS[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table, outcome = load()
    return outcome, table[risk].to_numpy(float), outcome[time].astype(float), outcome[event]


def halves(cohort):
    """Every other case for fitting the censoring, and those of the rest with a defined G."""
    outcome, risk, time, event = cohort
    train = np.arange(len(time)) % 2 == 0
    test = ~train & (time < time[train].max())
    censoring = sm.Censoring.fit(time[train], event[train])
    return outcome[train], outcome[test], risk[test], time[test], event[test], censoring


def copies(weights, *arrays):
    """The arrays, with each row repeated as often as its weight."""
    times = weights.astype(int)
    return [np.repeat(a, times, axis=0) for a in arrays]


def resamples(count, draws=3):
    return case_weights([str(k) for k in range(count)], draws, seed=1)


def test_kaplan_meier_and_censoring_equal_scikit_survival(cohort):
    outcome, _, time, event = cohort
    points, chance = kaplan_meier_estimator(event, time)
    values = sm.kaplan_meier(time, event, np.ones((1, len(time))), points)
    np.testing.assert_allclose(values[0], chance, **CLOSE)
    estimator = CensoringDistributionEstimator().fit(outcome)
    expected = estimator.predict_proba(points)
    values = sm.Censoring.fit(time, event)(points)
    np.testing.assert_allclose(values, np.where(expected > 0, expected, np.nan), **CLOSE)


def test_kaplan_meier_by_hand():
    # Times 1 2 2 3; events at 1, 2 and 3, one censored at 2: 3/4, x 2/3, x 0.
    time, event = np.array([1.0, 2, 2, 3]), np.array([True, True, False, True])
    at = np.array([0.5, 1, 2, 2.5, 3])
    curve = sm.kaplan_meier(time, event, np.ones((1, 4)), at)
    np.testing.assert_allclose(curve, [[1, 3 / 4, 1 / 2, 1 / 2, 0]])
    # Uncensored: only the one censored at 2 leaves, of two then at risk (the event at 2 came first).
    curve = sm.kaplan_meier(time, event, np.ones((1, 4)), at, of_censoring=True)
    np.testing.assert_allclose(curve, [[1, 1, 1 / 2, 1 / 2, 1 / 2]])
    assert np.isnan(sm.Censoring.fit(time, event)(np.array([3.1]))).all()


def test_harrells_c_equals_scikit_survival_in_every_resample(cohort):
    _, risk, time, event = cohort
    weights = resamples(len(time))
    expected = []
    for row in weights:
        t, e, r = copies(row, time, event, risk)
        expected.append(sk.concordance_index_censored(e, t, r)[0])
    np.testing.assert_allclose(sm.c_index(risk, time, event, weights), expected, **CLOSE)
    assert expected[0] > 0.5  # age and positive nodes are risks


def test_ties_of_time_are_treated_as_in_scikit_survival():
    rng = np.random.default_rng(0)
    for _ in range(20):
        time, risk = rng.integers(1, 5, 25).astype(float), rng.integers(0, 4, 25).astype(float)
        event = rng.random(25) < 0.5
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = sk.concordance_index_censored(event, time, risk)[0]
        values = sm.c_index(risk, time, event, np.ones((1, 25)))
        np.testing.assert_allclose(values, expected, **CLOSE)


def test_blocks_of_events_do_not_change_the_c_index(cohort, monkeypatch):
    _, risk, time, event = cohort
    weights = resamples(len(time))
    in_one_block = sm.c_index(risk, time, event, weights)
    monkeypatch.setattr(sm, "EVENTS_AT_ONCE", 7)
    np.testing.assert_allclose(sm.c_index(risk, time, event, weights), in_one_block, **CLOSE)


def test_harrells_c_by_hand():
    # Events at 1 and 3, censored at 2 and 4. Pairs: 1 with 2, 3, 4; 3 with 4.
    time, event = np.array([1.0, 2, 3, 4]), np.array([True, False, True, False])
    risk = np.array([3.0, 3, 5, 1])  # a tie, wrong, right; right
    weights = np.array([[1.0, 1, 1, 1], [2, 1, 1, 3]])
    # Weighted: pairs 2, 2, 6, 3; right 1 + 0 + 6 + 3.
    assert sm.c_index(risk, time, event, weights).tolist() == [2.5 / 4, 10 / 13]


def test_a_higher_risk_is_an_earlier_event():
    time, event, once = np.array([1.0, 2, 3]), np.ones(3, bool), np.ones((1, 3))
    assert sm.c_index(-time, time, event, once) == 1
    assert sm.c_index(time, time, event, once) == 0  # the sign is never changed for the user
    censoring = sm.Censoring(np.array([9.0]), np.array([1.0]))
    options = {"times": np.array([1.5, 2.5]), "censoring": censoring}
    assert sm.dynamic_auc(-time, time, event, once, **options).tolist() == [[1, 1]]
    assert sm.dynamic_auc(time, time, event, once, **options).tolist() == [[0, 0]]
    assert sm.c_index_uno(-time, time, event, once, censoring=censoring) == 1


@pytest.mark.parametrize("share", [None, 0.5])
def test_unos_c_equals_scikit_survival(cohort, share):
    train, test, risk, time, event, censoring = halves(cohort)
    tau = None if share is None else float(np.quantile(time, share))
    weights = resamples(len(time))
    expected = []
    for row in weights:
        outcome, r = copies(row, test, risk)
        expected.append(sk.concordance_index_ipcw(train, outcome, r, tau=tau)[0])
    values = sm.c_index_uno(risk, time, event, weights, censoring=censoring, tau=tau or np.inf)
    np.testing.assert_allclose(values, expected, **CLOSE)


def test_dynamic_auc_equals_scikit_survival(cohort):
    train, test, risk, time, event, censoring = halves(cohort)
    times = np.quantile(time, [0.1, 0.3, 0.5, 0.7])
    weights = resamples(len(time))
    options = {"times": times, "censoring": censoring}
    each = sm.dynamic_auc(risk, time, event, weights, **options)
    mean = sm.dynamic_auc_mean(risk, time, event, weights, **options)
    for number, row in enumerate(weights):
        outcome, r = copies(row, test, risk)
        expected, expected_mean = sk.cumulative_dynamic_auc(train, outcome, r, times)
        np.testing.assert_allclose(each[number], expected, **CLOSE)
        np.testing.assert_allclose(mean[number], expected_mean, **CLOSE)


def test_integrated_brier_score_equals_scikit_survival(cohort):
    train, test, risk, time, event, censoring = halves(cohort)
    times = np.quantile(time, [0.1, 0.3, 0.5, 0.7])
    hazard = np.exp((risk - risk.mean()) / risk.std()) / time.mean()
    survival = np.exp(-hazard[:, None] * times)
    weights = resamples(len(time))
    for part in (slice(None), slice(2), slice(2, None)):
        options = {"times": times[part], "censoring": censoring}
        scores = sm.integrated_brier(survival[:, part], time, event, weights, **options)
        for number, row in enumerate(weights):
            outcome, s = copies(row, test, survival[:, part])
            expected = sk.integrated_brier_score(train, outcome, s, times[part])
            np.testing.assert_allclose(scores[number], expected, **CLOSE)


def test_a_weighting_has_the_same_values_alone_and_in_a_batch(cohort):
    *_, risk, time, event, censoring = halves(cohort)
    weights, times = resamples(len(time), draws=150), np.quantile(time, [0.2, 0.6])
    options = {"times": times, "censoring": censoring}
    metrics = {
        "dynamic_auc": lambda w: sm.dynamic_auc(risk, time, event, w, **options),
        "kaplan_meier": lambda w: sm.kaplan_meier(time, event, w, times),
        "c_index": lambda w: sm.c_index(risk, time, event, w)[:, None],
    }
    for name, metric in metrics.items():
        alone = np.concatenate([metric(row[None]) for row in weights])
        np.testing.assert_allclose(metric(weights), alone, err_msg=name, **CLOSE)


# --- the baseline hazard of Cox's model ---


@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_baseline_hazard_and_its_survival_equal_scikit_survival(cohort, ties):
    outcome, risk, time, event = cohort
    numbers = (risk[:, None] - risk.mean()) / risk.std()
    model = CoxPHSurvivalAnalysis(ties=ties).fit(numbers, outcome)
    risks = model.predict(numbers)
    baseline = sm.Baseline.fit(risks, time, event, np.ones(len(time)))
    expected_baseline = model.cum_baseline_hazard_
    np.testing.assert_allclose(np.exp(baseline(expected_baseline.x)), expected_baseline.y, **CLOSE)
    at = np.quantile(time, [0.1, 0.5, 0.9])
    survival = np.exp(-np.exp(baseline(at) + risks[:, None]))
    expected = np.stack([curve(at) for curve in model.predict_survival_function(numbers)])
    np.testing.assert_allclose(survival, expected, **CLOSE)


def test_the_baseline_hazard_by_hand():
    # Hazards 1, 2, 4, 3; an event at 1, one censored and one event at 2, an event at 3.
    risk = np.log([1.0, 2, 4, 3])
    time, event = np.array([1.0, 2, 2, 3]), np.array([True, False, True, True])
    baseline = sm.Baseline.fit(risk, time, event, np.ones(4))
    at = np.array([0.5, 1, 1.9, 2, 3, 9])
    steps = np.cumsum([0, 1 / 10, 0, 1 / 9, 1 / 3, 0])
    np.testing.assert_allclose(np.exp(baseline(at)), steps, **CLOSE)
    # Weights 1, 1, 1/2, 1: sums of 1 + 2 + 2 + 3, of 2 + 2 + 3, of 3.
    half = sm.Baseline.fit(risk, time, event, np.array([1, 1, 0.5, 1]))
    np.testing.assert_allclose(np.exp(half(at[-1:])), [1 / 8 + 0.5 / 7 + 1 / 3], **CLOSE)


def test_a_shift_of_all_risks_is_compensated_by_the_baseline_hazard(cohort):
    _, risk, time, event = cohort
    risk, once = (risk - risk.mean()) / risk.std(), np.ones(len(time))
    near, far = (sm.Baseline.fit(risk + by, time, event, once) for by in (0, 2000))
    np.testing.assert_allclose(far.log_hazard + 2000, near.log_hazard, rtol=1e-9, atol=1e-9)


def test_undefined_values_are_nan():
    time, risk = np.array([1.0, 2, 3]), np.array([1.0, 2, 3])
    none, once = np.zeros(3, bool), np.array([[1.0, 1, 1], [0, 0, 1], [1, 1, 0]])
    assert np.isnan(sm.c_index(risk, time, none, once)).all()  # no event, no pair
    last = np.array([False, False, True])
    assert np.isnan(sm.c_index(risk, time, last, once)).all()  # an event that nothing follows
    first = np.array([True, False, False])
    assert np.isnan(sm.c_index(risk, time, first, once)).tolist() == [False, True, False]
    assert np.isnan(sm.c_index(np.array([1.0, np.nan, 2]), time, first, once)).all()
    censoring = sm.Censoring(np.array([5.0]), np.array([1.0]))
    options = {"times": np.array([0.5, 1.5, 3.5]), "censoring": censoring}
    # No case yet at 0.5, no control left at 3.5.
    each = sm.dynamic_auc(risk, time, first, once[:1], **options)
    assert np.isnan(each).tolist() == [[True, False, True]]
    assert np.isnan(sm.dynamic_auc_mean(risk, time, none, once[:1], **options)).all()
    # Nobody is followed beyond 3.5; G is undefined after the last training time, 5 or 1.
    short = sm.Censoring(np.array([1.0]), np.array([1.0]))
    for g, times, undefined in (
        (censoring, [0.5, 1.5], False),
        (censoring, [0.5, 3.5], True),
        (short, [0.5, 0.9], False),
        (short, [0.5, 1.5], True),
    ):
        selected = np.full((3, 2), 0.5), time, first, once[:1]
        brier = sm.integrated_brier(*selected, times=np.array(times), censoring=g)
        assert np.isnan(brier).tolist() == [undefined], times
    assert np.isnan(
        sm.c_index_uno(risk, time, np.array([False, True, False]), once[:1], censoring=short)
    )


def test_survival_metrics_follow_the_arguments_and_ignore_missing_targets(cohort):
    _, _, risk, time, event, censoring = halves(cohort)
    targets = np.c_[time, event]
    weights = resamples(len(time))
    assert set(sm.survival_metrics(risk, targets, weights)) == {"c_index"}
    times = np.quantile(time, [0.2, 0.5])
    options = {"censoring": censoring, "times": times, "survival": np.full((len(time), 2), 0.6)}
    values = sm.survival_metrics(risk, targets, weights, **options)
    assert set(values) == {"c_index", "c_index_uno", "auc_dynamic_mean", "integrated_brier"}
    assert all(v.shape == (4,) and np.isfinite(v).all() for v in values.values())
    more = np.r_[targets, [[np.nan, 1], [2.0, np.nan]]]
    options["survival"] = np.full((len(more), 2), 0.6)
    again = sm.survival_metrics(
        np.r_[risk, 99, -99], more, np.c_[weights, np.ones((4, 2))], **options
    )
    for name, value in values.items():
        np.testing.assert_allclose(again[name], value, err_msg=name, **CLOSE)


small = st.integers(0, 6)
people = st.lists(
    st.tuples(small, st.integers(1, 6), st.booleans(), st.integers(0, 3)), min_size=2, max_size=25
)


@settings(max_examples=60, deadline=None)
@given(people, st.randoms(use_true_random=False))
def test_values_depend_on_the_order_of_risks_not_of_cases_and_weight_two_is_two_cases(rows, random):
    risk, time, event, weight = (np.array(column) for column in zip(*rows, strict=True))
    risk, time, weights = risk.astype(float), time.astype(float), weight[None].astype(float)
    censoring = sm.Censoring.fit(time, event)
    options = {"censoring": censoring, "times": np.array([1.0, 2.0, 4.0])}

    def values(r, t, e, w):
        concordance = [sm.c_index(r, t, e, w), sm.c_index_uno(r, t, e, w, censoring=censoring)]
        return [*concordance, sm.dynamic_auc_mean(r, t, e, w, **options)]

    expected = values(risk, time, event, weights)
    transformed = values(np.exp(3 * risk) - 50, time, event, weights)
    order = np.array(random.sample(range(len(rows)), len(rows)))
    shuffled = values(risk[order], time[order], event[order], weights[:, order])
    r, t, e = copies(weight, risk, time, event)
    double = values(r, t, e, np.ones((1, len(r)))) if len(r) else expected
    for actual in (transformed, shuffled, double):
        np.testing.assert_allclose(np.ravel(actual), np.ravel(expected), **CLOSE)
    backwards = sm.c_index(-risk, time, event, weights)
    np.testing.assert_allclose(backwards, 1 - expected[0], **CLOSE)


def test_an_event_that_is_neither_0_nor_1_is_an_error():
    for coded in ([1, 2], [0, -1]):
        with pytest.raises(ValueError, match="neither 0 nor 1"):
            sm.survival_metrics(np.ones(2), np.c_[[1.0, 2.0], coded], np.ones((1, 2)))
