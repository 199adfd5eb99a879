"""Reference results of lifelines on scikit-survival's data sets, for tests/metrics/test_lifelines.py.

lifelines needs another version of pandas than this project, so it has an environment of its own:

python -m venv ref && ref/bin/pip install lifelines==0.30.3 "pandas<3" scikit-survival==0.28.0 && \\
    ref/bin/python tools/bench/reference_lifelines.py

Each data set is fitted with its times in days, unchanged, and in months rounded up, where most events are
tied. The JSON describes the covariates, the codes of words and how numbers are standardised. Coefficients
are without penalty, with Efron's method for ties, the only one of lifelines; its baseline hazard is
Breslow's, of a case with average covariates (lifelines centres them).
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lifelines  # pyright: ignore[reportMissingImports]
import numpy as np
import pandas as pd
import scipy
import sksurv
from lifelines import CoxPHFitter, KaplanMeierFitter  # pyright: ignore[reportMissingImports]
from lifelines.statistics import logrank_test  # pyright: ignore[reportMissingImports]
from lifelines.utils import concordance_index  # pyright: ignore[reportMissingImports]
from numpy.typing import NDArray
from sksurv.datasets import load_gbsg2, load_whas500

Codes = Mapping[str, Mapping[str, int] | None]
Array = NDArray[np.float64]

WHAS500: Codes = dict.fromkeys(["age", "bmi", "chf", "gender", "hr", "sysbp"])
GBSG2: Codes = {
    "age": None,
    "horTh": {"no": 0, "yes": 1},
    "menostat": {"Pre": 0, "Post": 1},
    "pnodes": None,
    "progrec": None,
    "tgrade": {"I": 1, "II": 2, "III": 3},
    "tsize": None,
}
"""Covariate -> code of each word; None for a column of numbers."""
SETS = {
    "whas500": (load_whas500, "fstat", "lenfol", WHAS500),
    "gbsg2": (load_gbsg2, "cens", "time", GBSG2),
}
UNITS = (1.0, 30.4375)
"""Units of time in days: a day, a month."""
OUT = Path(__file__).resolve().parents[2] / "tests" / "metrics" / "lifelines.json"


def main() -> None:
    """Write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    reference: dict[str, Any] = {"made_by": "tools/bench/reference_lifelines.py"}
    libraries = {"lifelines": lifelines, "scikit-survival": sksurv, "pandas": pd}
    libraries |= {"numpy": np, "scipy": scipy}
    reference["versions"] = {name: library.__version__ for name, library in libraries.items()}
    reference["sets"] = {name: of_set(name) for name in SETS}
    out.write_text(json.dumps(reference, indent=1) + "\n")
    print(f"{out}: {out.stat().st_size:,} bytes")


def of_set(name: str) -> dict[str, Any]:
    """Return a description of the data set and lifelines' results with times in each unit, rounded up."""
    load, event_field, time_field, codes = SETS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-survival's reader, about pandas
        raw, outcome = load()
    days, event = outcome[time_field].astype(float), outcome[event_field].astype(bool)
    table = pd.DataFrame({c: raw[c].map(code) if code else raw[c] for c, code in codes.items()})
    table = table.astype(float)
    mean, sd = table.mean(), table.std(ddof=1)
    covariates = {c: {"codes": codes[c], "mean": mean[c], "sd": sd[c]} for c in table}
    standard = (table - mean) / sd
    return {
        "fields": {"event": event_field, "time": time_field},
        "cases": len(days),
        "events": int(event.sum()),
        "standardised": "(number - mean) / sd, both of all cases, sd by n - 1",
        "covariates": covariates,
        "by_days_in_a_unit_of_time": {
            str(unit): of_cases(standard, np.ceil(days / unit), event) for unit in UNITS
        },
    }


def of_cases(table: pd.DataFrame, time: Array, event: NDArray[np.bool_]) -> dict[str, Any]:
    """Return Cox's model of these covariates and the curves of the halves of lower and higher risk."""
    # The default tolerance leaves errors of 1e-7 in the coefficients.
    fitter = CoxPHFitter(baseline_estimation_method="breslow", penalizer=0.0)
    fitter.fit(
        table.assign(time=time, event=event),
        "time",
        "event",
        fit_options={"precision": 1e-20, "r_precision": 0.0},
    )
    risk = fitter.predict_log_partial_hazard(table).to_numpy()
    high = risk > np.median(risk)
    at = np.quantile(time, [0.05, 0.25, 0.5, 0.75, 0.95], method="nearest")
    at[1::2] += 0.5  # some at times of cases, some between
    test = logrank_test(time[high], time[~high], event[high], event[~high])
    groups = {"all": np.ones_like(high), "low_risk": ~high, "high_risk": high}
    return {
        "ties": "efron",  # the only way lifelines has
        "coefficients": fitter.params_.tolist(),
        "log_likelihood": fitter.log_likelihood_,
        "concordance_index": concordance_index(time, -risk, event),
        "at": at.tolist(),
        "baseline_cumulative_hazard": steps(fitter.baseline_cumulative_hazard_, at),
        "kaplan_meier": {name: curve(time[rows], event[rows], at) for name, rows in groups.items()},
        "high_risk_cases": int(high.sum()),
        "log_rank": {"statistic": test.test_statistic, "p": test.p_value},
    }


def steps(curve_of_times: pd.DataFrame, at: Sequence[float] | Array) -> list[float]:
    """Return the column's value at the last index up to each of ``at``; 0 before the first."""
    points, values = curve_of_times.index.to_numpy(), curve_of_times.iloc[:, 0].to_numpy()
    return np.r_[0.0, values][np.searchsorted(points, at, side="right")].tolist()


def curve(time: Array, event: NDArray[np.bool_], at: Array) -> list[float]:
    """Return lifelines' Kaplan-Meier estimate."""
    return KaplanMeierFitter().fit(time, event).survival_function_at_times(at).tolist()


if __name__ == "__main__":
    main()
