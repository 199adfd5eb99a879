"""The loader's bench: what it refuses to compare, what it measures, rows that can fall short."""

from __future__ import annotations

import json
import mmap
import os
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from e2e.errors import UserError
from e2e.images.augment import Augment
from tools.bench import check_loader, loader, patches, pixels, stream, timing
from tools.bench.patches import Bench, Sizes
from tools.bench.rows import Row
from tools.bench.stream import OtherPixelsError

pytestmark = pytest.mark.slow

SIZES = Sizes(
    patches=20, chunk=8, rounds=1, out=48, long=60, cold_gib=0.0, cold_patches=5, decoder="auto"
)
SMALL = ["--size", "64"] + [
    text
    for name in Sizes.__dataclass_fields__
    for text in (f"--{name.replace('_', '-')}", str(getattr(SIZES, name)))
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    return Bench(folder, patches.drawn_jpegs(64)[:7], 64, SIZES, sorted(os.sched_getaffinity(0)))


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict], list[str]]:
    cores = os.sched_getaffinity(0)
    code = loader.main([*SMALL, *arguments])
    assert os.sched_getaffinity(0) == cores
    lines = capsys.readouterr().out.splitlines()
    return code, [json.loads(line) for line in lines if line.startswith("{")], lines


def test_the_bench_says_what_the_patches_are_and_gives_every_way_s_speed(capsys):
    code, found, _ = run(capsys)
    assert code == 0
    assert "not real tissue" in found[0]["patches"]
    ways = {line["way"]: line for line in found[1:]}
    for start in ("read", "decode", "augment", "all together", "published", "DataLoader"):
        named = [line for way, line in ways.items() if way.startswith(start)]
        assert named, start
        assert all(line["patches_per_s"] > 0 < line["cpu_us_a_patch"] for line in named)


def test_a_row_a_line_and_the_exit_code_tells_whether_one_is_short(capsys):
    rows = ["parts", "overhead", "reference", "torchvision", "handed_over", "gpu"]
    code, _, lines = run(capsys, "--check", "--rows", *rows)
    told = [line for line in lines if " | bar " in line]
    assert all(" | measured " in line and " | control " in line for line in told)
    assert len(told) >= len(rows)
    short = sum(line.startswith("FAIL") for line in told)
    assert code == (1 if short else 0)
    assert lines[-1].startswith(f"{short} short of the bar")
    assert any(line.startswith("ok   bytes a patch") for line in told)


@pytest.mark.parametrize(("good", "code"), [(True, 0), (None, 0), (False, 1)])
def test_a_row_that_falls_short_makes_the_check_fail(monkeypatch, small, good, code):
    row = Row("a", "<= 1", "2", "-", good)
    monkeypatch.setitem(check_loader.ROWS, "cold", lambda bench_: iter([row]))
    assert check_loader.check(["cold"], small) == code


def test_unknown_rows_are_named(small):
    with pytest.raises(UserError, match=r"no row colds\n  choose from: parts, overhead, reference"):
        check_loader.check(["colds"], small)


def test_our_pixels_are_those_of_the_bare_loop_and_of_the_published_way(small):
    library = pixels.simplejpeg_library()
    ours = partial(pixels.training_pixels, small, small.reader())
    assert [len(chunk) for chunk in ours()] == [8, 8, 4]
    stream.require_same("bare", ours(), pixels.bare_loop(small, library))
    stream.require_same("published", ours(), pixels.published_loader(small, library))


@pytest.mark.parametrize("options", [{"fastdct": True}, {"colorspace": "BGR"}])
def test_other_pixels_are_refused(small, options):
    other = pixels.simplejpeg_library(**options)
    with pytest.raises(OtherPixelsError, match=r"^x: pixels differ by up to \d+, "):
        stream.require_same(
            "x", pixels.training_pixels(small, small.reader()), pixels.bare_loop(small, other)
        )


@pytest.mark.parametrize("short", [[], [torch.zeros(2, 3)], [torch.zeros(2, 3), torch.zeros(1, 3)]])
def test_fewer_pixels_are_refused(short):
    whole = [torch.zeros(2, 3), torch.zeros(2, 3)]
    for a, b in ((whole, short), (short, whole)):
        with pytest.raises(OtherPixelsError, match="chunks of"):
            stream.require_same("x", iter(a), iter(b))


def test_windows_are_those_that_the_augmentation_cuts(small):
    whole = pixels.windows_of(small, Augment(flip="none", size=48))
    np.testing.assert_allclose(whole, np.tile([0, 0, 64, 64], (20, 1)), atol=0.1)
    augment = Augment(flip="none", crop=0.25, size=48)
    windows = pixels.windows_of(small, augment)
    assert len(np.unique(windows, axis=0)) == 20
    ours = partial(pixels.training_pixels, small, small.reader(augment))
    _, gap = stream.difference(pixels.normalised(ours()), pixels.resized_by_pillow(small, windows))
    shifted = np.roll(windows, 1, axis=0)
    _, wrong = stream.difference(
        pixels.normalised(ours()), pixels.resized_by_pillow(small, shifted)
    )
    assert gap < 0.1
    assert wrong > 10 * gap


def test_windows_of_patches_too_large_for_8_bits_are_refused(tmp_path):
    large = Bench(tmp_path, [b""], 512, SIZES, [0])
    with pytest.raises(UserError, match="512: windows are read off 8-bit images"):
        pixels.windows_of(large, Augment(flip="none", size=48))


def test_ways_take_turns_and_turn_the_order_round():
    order: list[str] = []

    def way(name: str) -> list[object]:
        order.append(name)
        return []

    found = timing.time_ways({name: partial(way, name) for name in "ab"}, 3)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert {name: len(times.cpu) for name, times in found.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_the_median_of_the_rounds_ratios_and_half_of_them_lie_in_its_spread():
    assert timing.ratio([2.0, 30.0, 40.0], [1.0, 10.0, 1.0]) == 3.0
    assert timing.spread([4.0, 2.0, 3.0, 1.0, 5.0], [1.0] * 5) == (2.0, 4.0)


def test_cpu_seconds_are_also_those_of_children():
    child = get_context("fork").Process(target=_spin)
    child.start()
    while timing.cpu_seconds() - time.process_time() < 0.05:
        assert child.is_alive(), "3 s of a child went by unseen"
    child.terminate()
    child.join()


def _spin() -> None:
    while time.process_time() < 3:
        pass


def test_a_file_is_evicted_and_refused_where_it_cannot_be(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert stream.pages_in_memory(str(path)) == (256, 256)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) == 0  # now these pages are in use
        with pytest.raises(UserError, match=r"256 of 256 pages of .* stay in memory"):
            stream.evict(str(path))
    stream.evict(str(path))
    assert stream.pages_in_memory(str(path)) == (0, 256)


def test_both_ways_of_a_cold_read_start_with_no_page_and_read_the_same(small):
    found = [
        stream.measure(
            stream.cold_read, store=str(small.large), slide="c3", count=5, number=4, way=way
        )
        for way in ("store", "single")
    ]
    assert [one["held_before"] for one in found] == [0, 0]
    assert all(one["held_after"] > 0 < one["seconds"] for one in found)
    assert found[0]["digest"] == found[1]["digest"]


def test_memory_of_a_stream_comes_from_a_process_of_its_own(small):
    found = stream.measure(
        stream.stream_memory, store=str(small.large), chunk=8, decoder="auto", mode="training"
    )
    assert found["patches"] == 60
    assert found["pixels"] == 8 * 3 * 64 * 64
    assert 300 < found["jpeg_bytes"] < 10_000


def test_two_workers_are_measured_beside_bare_loops(small):
    rows = list(check_loader.workers(small))
    assert len(rows) == 1
    assert "two bare decode loops (" in rows[0].what or "skipped" in rows[0].measured


def test_a_child_that_fails_is_named(tmp_path):
    with pytest.raises(UserError, match=r"(?s)stream_memory: exit code 2.*no patch store at"):
        stream.measure(
            stream.stream_memory,
            store=str(tmp_path / "x.lmdb"),
            chunk=8,
            decoder="auto",
            mode="training",
        )


def test_patches_of_another_size_are_refused(tmp_path, small):
    args = loader.parse(["--store", str(small.store.path), "--size", "256"])
    with pytest.raises(UserError, match=r"has no patches of 256 px, but of \[64\]"):
        patches.read_jpegs(args, tmp_path)


def test_slides_are_cut_and_one_without_a_scale_is_named(tmp_path, shared_data: Path):
    slides = [str(path) for path in sorted((shared_data / "slides").glob("[ct]*.svs"))]
    args = loader.parse(["--slides", slides[0]])
    jpegs, origin = patches.read_jpegs(args, tmp_path)
    assert len(jpegs) > 10
    assert f"{len(jpegs)} patches of 1 slides" in origin
    with pytest.raises(UserError, match=r"(?s)slide 'tcga.*cannot be cut.*--slide-mpp gives"):
        patches.read_jpegs(loader.parse(["--slides", slides[1]]), tmp_path / "other")
