"""Fixtures of more than one test file, and checks on every test and file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest

# These add warning filters when they are first imported, in whichever test that would be.
import scipy.sparse
import scipy.special  # noqa: F401
import sympy  # noqa: F401

from e2e.store.lmdb import PatchStore
from tests.helpers.paths import SHARED_DATA
from tests.helpers.process_state import find_changes, fixed_seeds, read_state, shuffle_files
from tests.helpers.stores import write_store

# No deadline: how long an example takes says nothing on a machine that others use too.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


pytest_plugins = ["pytester"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--random-order SEED``."""
    parser.addoption(
        "--random-order",
        type=int,
        metavar="SEED",
        help="run the test files in an order drawn from SEED (the tests of a file keep theirs)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """pytest-xdist would start with the longest files, whatever their order."""
    if config.getoption("random_order") is not None and config.pluginmanager.hasplugin("xdist"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the files in the order of ``--random-order``."""
    seed = config.getoption("random_order")
    if seed is not None:
        places = shuffle_files([str(item.path) for item in items], seed)
        items.sort(key=lambda item: places[str(item.path)])


@pytest.fixture(autouse=True, scope="module")
def _file_leaves_the_process_unchanged() -> Iterator[list[str]]:
    """Fail the last test of a file whose module fixtures leave state of the process changed."""
    before, reported = read_state(), list[str]()
    with fixed_seeds():
        yield reported
    after = read_state()
    for state in (before, after):
        del state["warnings.filters"]  # pytest itself sets and restores them, test by test
    if changes := [line for line in find_changes(before, after) if line not in reported]:
        pytest.fail("this file leaves the process changed:\n" + "\n".join(changes), pytrace=False)


@pytest.fixture(autouse=True)
def _test_leaves_the_process_unchanged(
    _file_leaves_the_process_unchanged: list[str],
) -> Iterator[None]:
    """Fail a test that leaves state of the process changed, so that tests pass in any order.

    Random numbers are the exception: a test may seed and draw from the global generators. Each test and
    each file starts from the same seed, and their state is restored, so no test depends on another. That
    training and evaluation leave the generators alone is a test of its own (test_process_state.py).
    """
    before = read_state()
    with fixed_seeds():
        yield
    if changes := find_changes(before, read_state()):
        _file_leaves_the_process_unchanged += changes
        pytest.fail("this test leaves the process changed:\n" + "\n".join(changes), pytrace=False)


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., PatchStore]:
    """``make_store({"a": 5}, name="x.lmdb")`` -> PatchStore in a temporary folder."""

    def make(counts: Mapping[str, int], name: str = "cohort.lmdb") -> PatchStore:
        return write_store(tmp_path / name, counts)

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real slides, label tables and weights, which are no part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}; set E2E_SHARED to the folder that holds data/")
    return SHARED_DATA
