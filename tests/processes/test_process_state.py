"""Tests and runs leave the process as they found it: what checks this, and that it does."""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from e2e.encoders.base import ENCODERS
from e2e.errors import UserError
from e2e.images.threads import decoder_threads
from e2e.parallel import float32_precision
from e2e.runs.evaluate import evaluate
from e2e.runs.extract import extract
from e2e.runs.parts import REGISTRIES
from e2e.runs.predict import predict
from e2e.runs.train import train
from e2e.settings.arguments import settings_from_args
from e2e.settings.cli import train_parser
from e2e.settings.schema import Settings
from tests.helpers import feature_cohort as feature_runs
from tests.helpers import patch_cohort as patch_runs
from tests.helpers.feature_cohort import cohort as feature_cohort  # noqa: F401
from tests.helpers.patch_cohort import cohort as patch_cohort  # noqa: F401
from tests.helpers.process_state import State, find_changes, fixed_seeds, read_state, shuffle_files


def forbid_tf32_in_convolutions(_: pytest.MonkeyPatch) -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"


def forbid_tf32_in_products(_: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


CHANGES: dict[str, tuple[Callable[[pytest.MonkeyPatch], object], str]] = {
    "precision of convolutions": (
        forbid_tf32_in_convolutions,
        "torch: cudnn.conv.fp32_precision: 'tf32' before, 'ieee' after",
    ),
    "precision of products": (
        forbid_tf32_in_products,
        "torch: cuda.matmul.allow_tf32: True before, False after",
    ),
    "added variable": (
        lambda patch: patch.setenv("E2E_LEFT", "1"),
        "os.environ['E2E_LEFT']: '(not set)' before, '1' after",
    ),
    "removed variable": (lambda patch: patch.delenv("PATH"), "os.environ['PATH']: "),
    "working directory": (lambda patch: patch.chdir("/"), "working directory: "),
    "registry": (
        lambda patch: patch.setitem(ENCODERS._factories, "left", object),
        "registry of encoder: [] before, ['left'] after",
    ),
    "warnings": (
        lambda patch: patch.setattr(warnings, "filters", []),
        "warnings.filters: ",
    ),
    "sys.path": (
        lambda patch: patch.setattr(sys, "path", [*sys.path, "/left"]),
        "sys.path: [] before, ['/left'] after",
    ),
    "logger": (
        lambda patch: patch.setattr(logging.getLogger("pytest.left"), "level", logging.ERROR),
        "logger pytest.left: (0, False, True) before, (40, False, True) after",
    ),
}
"""What is changed -> how, and what the failure says of it."""


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_of_the_process_is_noticed(kind, monkeypatch):
    change, message = CHANGES[kind]
    logging.getLogger("pytest.left")
    with float32_precision("auto"):  # restores what monkeypatch cannot
        before = read_state()
        assert find_changes(before, read_state()) == []
        with monkeypatch.context() as patch:
            change(patch)
            lines = find_changes(before, read_state())
    assert [line for line in lines if line.startswith(message)], lines


def test_a_change_of_threads_or_of_the_default_dtype_is_noticed():
    before, threads = read_state(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        torch.set_default_dtype(torch.float64)
        with decoder_threads(7):
            lines = find_changes(before, read_state())
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
    assert [line.partition(":")[0] for line in lines] == [
        "decoder threads",
        "torch.get_default_dtype()",
        "torch.get_num_threads()",
    ]


FILE = """
import os
import random
import numpy
import pytest
import torch

@pytest.fixture(scope="module")
def variable():
    os.environ["E2E_LEFT_BY_FIXTURE"] = "1"

def test_changes_a_variable():
    os.environ["E2E_LEFT_BY_TEST"] = "1"

def test_changes_the_precision():
    torch.backends.cudnn.allow_tf32 = False

def test_changes_nothing():
    os.environ["E2E_LEFT_BY_TEST"] = "1"

def test_draws():
    assert (random.random(), numpy.random.rand(), torch.rand(())) == DRAWN

def test_draws_again_and_seeds():
    test_draws()
    torch.manual_seed(3)

def test_fixture_changes_a_variable(variable):
    pass
"""


def test_the_test_that_leaves_the_process_changed_fails(pytester, monkeypatch):
    with fixed_seeds():
        drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
    pytester.makeconftest(
        "from tests.conftest import _file_leaves_the_process_unchanged, _test_leaves_the_process_unchanged"
    )
    pytester.makepyfile(FILE.replace("DRAWN", repr(drawn)))
    monkeypatch.delenv("E2E_LEFT_BY_TEST", raising=False)
    monkeypatch.delenv("E2E_LEFT_BY_FIXTURE", raising=False)
    with float32_precision("auto"):
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist", "-rA")
        os.environ.pop("E2E_LEFT_BY_TEST"), os.environ.pop("E2E_LEFT_BY_FIXTURE")
    result.assert_outcomes(passed=6, errors=3)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_changes_a_variable *",
            "this test leaves the process changed:",
            "os.environ['E2E_LEFT_BY_TEST']: '(not set)' before, '1' after",
            "*ERROR at teardown of test_changes_the_precision *",
            "this test leaves the process changed:",
            "torch: cudnn.allow_tf32: True before, False after",
            "*ERROR at teardown of test_fixture_changes_a_variable *",
            "this file leaves the process changed:",
            "os.environ['E2E_LEFT_BY_FIXTURE']: '(not set)' before, '1' after",
        ],
    )


def test_the_order_of_files_depends_on_the_seed_alone():
    paths = [f"tests/test_{name}.py" for name in "abcdefgh"]
    order = shuffle_files(paths, 1)
    assert sorted(order.values()) == list(range(8))
    assert shuffle_files([*reversed(paths), *paths], 1) == order
    assert shuffle_files(paths, 2) != order


def test_random_order_keeps_the_tests_of_a_file_together(pytester):
    pytester.makeconftest(
        "from tests.conftest import pytest_addoption, pytest_configure\n"
        "import tests.conftest\n"
        "def pytest_collection_modifyitems(config, items):\n"
        "    tests.conftest.pytest_collection_modifyitems(config, items)\n"
    )
    names = "abcdefgh"
    text = "def test_one(): pass\ndef test_two(): pass\n"
    pytester.makepyfile(**{f"test_{name}": text for name in names})
    orders = []
    for seed in ("1", "1", "2"):
        result = pytester.inline_run("--random-order", seed, "-p", "no:xdist")
        ran = [report.nodeid.split("::") for report in result.getreports() if report.when == "call"]
        assert [test for _, test in ran] == ["test_one", "test_two"] * len(names)
        assert [file for file, _ in ran[::2]] == [file for file, _ in ran[1::2]]
        orders.append([file for file, _ in ran])
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


# --- runs ---


def read_state_and_generators() -> tuple[State, list[object]]:
    """The state of the process, and of the global random number generators."""
    numpy = [
        value.tolist() if isinstance(value, np.ndarray) else value
        for value in np.random.get_state()
    ]
    return read_state(), [random.getstate(), numpy, torch.get_rng_state().tolist()]


def assert_leaves_no_trace(run: Callable[[], object]) -> None:
    """Run once more: importing a library, which happens once, may set what it likes."""
    run()
    before, generators = read_state_and_generators()
    run()
    after, generators_after = read_state_and_generators()
    assert find_changes(before, after) == []
    assert generators_after == generators


def train_once(arguments: list[str], out: Path, *, strategy: str = "auto") -> tuple[Settings, Path]:
    """Train one epoch in a new folder, with settings that change the process."""
    arguments += ["optim.epochs=1", "engine.precision=fp32", "data.workers=3"]
    arguments += [f"engine.strategy={strategy}", f"run.out={unused_path(out)}"]
    settings, folder = settings_from_args(train_parser().parse(arguments), REGISTRIES)
    train(settings, folder, resume=False)
    return settings, folder


def unused_path(path: Path) -> Path:
    """``path`` with the first number behind it that is free."""
    return next(
        p for p in (path.with_name(f"{path.name}{k}") for k in range(100)) if not p.exists()
    )


def test_training_evaluation_and_prediction_leave_the_process_unchanged(feature_cohort, tmp_path):  # noqa: F811
    arguments = feature_runs.arguments(feature_cohort)
    assert_leaves_no_trace(lambda: train_once(arguments, tmp_path / "run"))
    settings, folder = train_once(arguments, tmp_path / "run")
    assert_leaves_no_trace(lambda: evaluate(settings, folder, tmp_path / "again"))

    def predict_once() -> int:
        out = unused_path(tmp_path / "predicted")
        slides = [feature_cohort / "feats"]
        return predict(settings, folder, slides, out, mpp_override=None, workers=1)

    assert_leaves_no_trace(predict_once)


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_training_end_to_end_leaves_the_process_unchanged(patch_cohort, tmp_path, strategy):  # noqa: F811
    arguments = patch_runs.arguments(patch_cohort, tmp_path)
    assert_leaves_no_trace(lambda: train_once(arguments, tmp_path / "run", strategy=strategy))


def test_deepspeed_leaves_the_process_unchanged(patch_cohort, tmp_path):  # noqa: F811
    # Once: a second run under DeepSpeed in one process fails in DeepSpeed itself.
    before, generators = read_state_and_generators()
    train_once(patch_runs.arguments(patch_cohort, tmp_path), tmp_path / "run", strategy="deepspeed")
    after, generators_after = read_state_and_generators()
    assert find_changes(before, after) == []
    assert generators_after == generators
    assert "LOCAL_RANK" not in os.environ


def test_a_failed_run_leaves_the_process_unchanged(patch_cohort, tmp_path):  # noqa: F811
    arguments = patch_runs.arguments(
        patch_cohort,
        tmp_path,
        "engine.cuda_graphs=true",
        "engine.compile=true",
        "engine.batch_norm=chunk",
    )

    def fail() -> None:
        with pytest.raises(UserError):
            train_once(arguments, tmp_path / "run")

    assert_leaves_no_trace(fail)


def test_extraction_leaves_the_process_unchanged(make_store, tmp_path):
    store = make_store({"a": 3, "b": 2})

    def extract_all() -> None:
        out = unused_path(tmp_path / "features")
        assert extract([store], "test_resnet", {"pretrained": False}, out, precision="fp32") == 0

    assert_leaves_no_trace(extract_all)
