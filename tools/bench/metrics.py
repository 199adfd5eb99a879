"""Time of the confidence intervals: every metric under DRAWS resamples of CASES simulated cases.

OMP_NUM_THREADS=1 python tools/bench/metrics.py
python tools/bench/metrics.py --cases 10000 --draws 1000
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from e2e.metrics import survival as sm
from e2e.metrics import values as m
from e2e.metrics.bootstrap import case_weights
from e2e.metrics.regression import regression_metrics


def main() -> None:
    """Print a line for each metric."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000, help="simulated cases")
    parser.add_argument("--draws", type=int, default=10_000, help="resamples")
    args = parser.parse_args()
    rng, n = np.random.default_rng(0), args.cases

    def timed(name: str, call: Callable[[], object]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"{wall:7.2f} {cpu:7.2f}  {name}", flush=True)

    print(f"{args.draws:,} draws of {n:,} cases, numpy {np.__version__}")
    print("wall seconds, CPU seconds")
    cases = [str(k) for k in range(n)]
    timed("case_weights", lambda: case_weights(cases, args.draws, 0))
    weights = case_weights(cases, args.draws, 0)
    raw = rng.random((n, 6))
    for classes in (2, 6):
        labels = rng.integers(0, classes, n)
        chance = raw[:, :classes] / raw[:, :classes].sum(1, keepdims=True)
        arguments = chance, labels, weights
        timed(
            f"all of classification, {classes} classes",
            lambda a=arguments: m.classification_metrics(*a),
        )
    timed("auc", lambda: m.auc(raw[:, 0], raw[:, 1] > 0.5, weights))
    timed("average_precision", lambda: m.average_precision(raw[:, 0], raw[:, 1] > 0.5, weights))
    timed("all of regression", lambda: regression_metrics(raw[:, 0], raw[:, 1], weights))
    follow, event = rng.exponential(size=n), rng.random(n) < 0.5
    at, g = np.quantile(follow, np.linspace(0.1, 0.9, 9)), sm.Censoring.fit(follow, event)
    followed = raw[:, 0], follow, event, weights
    targets = np.c_[follow, event]
    curves = np.exp(-at * (0.5 + raw[:, :1]))
    reference = {"censoring": g, "times": at, "survival": curves}
    timed(
        "all of survival, 9 times, half of the cases with events",
        lambda: sm.survival_metrics(raw[:, 0], targets, weights, **reference),
    )
    timed("c_index", lambda: sm.c_index(*followed))
    timed("c_index_uno", lambda: sm.c_index_uno(*followed, censoring=g))
    timed("auc_dynamic_mean", lambda: sm.dynamic_auc_mean(*followed, times=at, censoring=g))
    selected = curves, *followed[1:]
    timed("integrated_brier", lambda: sm.integrated_brier(*selected, times=at, censoring=g))


if __name__ == "__main__":
    main()
