"""Losses, gradient norms and metrics of small trainings are those in tests/golden (see recipes.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden.recipes import (
    GOLDEN,
    RECIPES,
    Result,
    imaging_facts,
    platform_facts,
    run_recipes,
    write_data,
)

EXACT = 1e-11
"""Relative tolerance on the platform of the file: one unit in the last of 12 digits.
Repeated runs are equal."""
EARLY_UPDATES = 4
EARLY_LOSS, LATE_LOSS = 1e-4, 1e-3
EARLY_NORM, LATE_NORM = 1e-3, 1e-2
"""Relative tolerances elsewhere, of the first updates and of later ones, when rounding has grown.
Measured between AVX-512, AVX2 and SSE 4.1 kernels: at most 8e-6 and 5e-5, 1e-4 and 1e-3."""
CONTINUOUS, LOOSE_METRIC = ("log_loss/value", "brier/value"), 1e-3
"""Metrics compared elsewhere. The others count or rank, and jump when two slides change places."""
HELP = "a change that is meant to change numbers rewrites the files: python -m tests.golden.recipes --write"


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, str]:
    """The folder of the recipes' stores and tables, and the digest of what is in it."""
    folder = tmp_path_factory.mktemp("golden") / "data"
    return folder, write_data(folder)


@pytest.fixture(scope="module")
def results(data, tmp_path_factory) -> dict[str, Result]:
    """Every recipe, trained by the project's own command."""
    return run_recipes(list(RECIPES), data[0], tmp_path_factory.mktemp("runs"))


def assert_close(name: str, what: str, actual: list, expected: list, rtol: float) -> None:
    """``None`` stands for a number that is not defined, and equals itself alone."""
    np.testing.assert_allclose(
        np.asarray(actual, dtype=float),
        np.asarray(expected, dtype=float),
        rtol=rtol,
        atol=0,
        err_msg=f"golden recipe {name}: {what} changed; {HELP}",
    )


def test_each_recipe_has_a_golden_file_of_eight_updates_or_more():
    assert sorted(path.stem for path in GOLDEN.glob("*.json")) == sorted(RECIPES)
    for name in RECIPES:
        assert golden(name)["steps"] == list(range(1, len(golden(name)["loss"]) + 1))
        assert len(golden(name)["grad_norm"]) == len(golden(name)["loss"]) >= 8
        assert golden(name)["metrics"]


@pytest.mark.parametrize("name", RECIPES)
def test_losses_and_metrics_are_the_golden_ones(name, data, results):
    expected, actual = golden(name), results[name]
    assert "error" not in actual, f"golden recipe {name} failed: {actual['error']}"
    if data[1] != expected["data"]:
        if imaging_facts() != expected["imaging"]:
            pytest.skip(
                f"the golden files are of JPEGs by {expected['imaging']}, and {imaging_facts()} makes others"
            )
        pytest.fail(
            "write_data in tests/golden/recipes.py, or a helper in tests/helpers/stores.py that it calls, no "
            f"longer writes the data that the golden files are of; {HELP}"
        )
    assert actual["steps"] == expected["steps"]
    assert sorted(actual["metrics"]) == sorted(expected["metrics"])
    if platform_facts() == expected["platform"]:
        for what in ("loss", "grad_norm"):
            assert_close(name, what, actual[what], expected[what], EXACT)
        metrics = sorted(expected["metrics"])
        rtol = EXACT
    else:
        for what, early, late in (
            ("loss", EARLY_LOSS, LATE_LOSS),
            ("grad_norm", EARLY_NORM, LATE_NORM),
        ):
            first, golden_first = (v[what][:EARLY_UPDATES] for v in (actual, expected))
            assert_close(name, f"early {what}", first, golden_first, early)
            assert_close(name, what, actual[what], expected[what], late)
        metrics = sorted(m for m in expected["metrics"] if m.endswith(CONTINUOUS))
        rtol = LOOSE_METRIC
    for metric in metrics:
        assert_close(name, metric, [actual["metrics"][metric]], [expected["metrics"][metric]], rtol)
