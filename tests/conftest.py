"""Fixtures of more than one test file: JPEGs, small real stores, the shared real data."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from e2e.store.lmdb import PatchStore, StoreWriter
from e2e.store.records import SlideRecord
from tests.process_state import find_changes, fixed_seeds, read_state, shuffle_files

# No deadline: how long an example takes says nothing on a machine that others use too.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

ROOT = Path(__file__).resolve().parents[1]

pytest_plugins = ["pytester"]
RECIPE = {"mpp": 0.5, "patch_px": 32}


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
    training and evaluation leave the generators alone is a test of its own (tests/test_process_state.py).
    """
    before = read_state()
    with fixed_seeds():
        yield
    if changes := find_changes(before, read_state()):
        _file_leaves_the_process_unchanged += changes
        pytest.fail("this test leaves the process changed:\n" + "\n".join(changes), pytrace=False)


def picture(seed: int = 0, width: int = 32, height: int | None = None) -> Image.Image:
    """A smooth random RGB image: unlike noise, it survives JPEG almost as it is."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height or width), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image | int = 0, *, width: int = 32, **options: object) -> bytes:
    """JPEG bytes of an image, or of ``picture(seed)``."""
    image = picture(image, width) if isinstance(image, int) else image
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **({"quality": 90} | options))
    return buffer.getvalue()


def record(slide: str, count: int, **changes: object) -> SlideRecord:
    """A record with ``count`` different coords on a grid."""
    x, y = np.arange(count) % 7 * 64, np.arange(count) // 7 * 64
    coords = changes.get("coords")
    values: dict[str, object] = {
        "num_patches": len(coords) if isinstance(coords, np.ndarray) else count,
        "coords": np.stack([x, y], axis=1).astype(np.int32),
        "level0_px": 64.0,
        "mpp": 0.5,
        "patch_px": 32,
        "width": 1000,
        "height": 900,
        "source": f"{slide}.svs",
        "source_bytes": 12345,
    }
    return SlideRecord(slide=slide, **(values | changes))  # type: ignore[arg-type]


def patches(slide: str, count: int) -> list[bytes]:
    """JPEGs that differ from patch to patch and from slide to slide."""
    first = zlib.crc32(slide.encode()) * 1000
    return [jpeg(first + index) for index in range(count)]


def write_store(path: Path, counts: Mapping[str, int]) -> PatchStore:
    """A real store of ``{slide: patches}``."""
    with StoreWriter(path, RECIPE) as writer:
        for slide, count in counts.items():
            writer.add(record(slide, count), patches(slide, count))
    return PatchStore(path)


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., PatchStore]:
    """``make_store({"a": 5}, name="x.lmdb")`` -> PatchStore in a temporary folder."""

    def make(counts: Mapping[str, int], name: str = "cohort.lmdb") -> PatchStore:
        return write_store(tmp_path / name, counts)

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real slides, label tables and weights, which are no part of the repository."""
    folder = Path(os.environ.get("E2E_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set E2E_SHARED to the folder that holds data/")
    return folder


def pixels_of(jpegs: list[bytes]) -> NDArray[np.uint8]:
    """(n,H,W,3) as Pillow decodes them."""
    return np.stack([np.asarray(Image.open(io.BytesIO(value)).convert("RGB")) for value in jpegs])
