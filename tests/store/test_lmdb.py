"""The patch store: what goes in comes out, whole slides or none, and damage is named."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e2e.errors import DamagedDataError, OneRankError, UserError
from e2e.slides import MAX_ID_BYTES
from e2e.store import snapshot
from e2e.store.lmdb import PatchStore, StoreWriter
from e2e.store.snapshot import read_snapshot, read_value
from tests.helpers.paths import ROOT
from tests.helpers.stores import RECIPE, patches, record, write_store

IDS = [
    "TCGA-AB-1234-01Z-00-DX1.0F-EE",
    "Schnitt äß 7",
    "スライド",
    "a.b.c",
    "007",
    "7",
    "x/y",
    "s:",
]


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A process of its own, for what may kill it."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def put(path: Path, **values: bytes) -> Path:
    """An LMDB file with the given keys, made without our code."""
    with lmdb.open(str(path), subdir=False, map_size=1 << 24) as env, env.begin(write=True) as txn:
        for key, value in values.items():
            txn.put(key.encode(), value)
    return path


def change(path: Path, old: bytes, new: bytes) -> Path:
    """Overwrite bytes of the file itself, as a bad disk or a bad copy does."""
    data = path.read_bytes()
    assert len(old) == len(new)
    assert old in data  # pages no longer in use may hold it too
    path.write_bytes(data.replace(old, new))
    return path


def test_what_goes_in_comes_out(tmp_path):
    written = record("a", 9, mpp=None, level0_px=256.513, width=0, height=0)
    with StoreWriter(tmp_path / "x.lmdb", {"mpp": 0.5, "scales": [1, 2]}) as writer:
        writer.add(written, patches("a", 9))
        assert writer.done == {"a"}
    store = PatchStore(tmp_path / "x.lmdb")
    assert store.recipe == {"mpp": 0.5, "scales": [1, 2]}
    assert store.slides == ["a"]
    assert store.num_patches("a") == 9
    read = store.record("a")
    assert read.coords is not None
    assert read.coords.dtype == np.int32
    np.testing.assert_array_equal(read.coords, written.coords)
    same = ("slide", "level0_px", "mpp", "patch_px", "width", "height", "source", "source_bytes")
    assert [getattr(read, name) for name in same] == [getattr(written, name) for name in same]
    assert store.read("a", range(9)) == patches("a", 9)
    assert list(store.find_damage("a")) == []


def test_patches_come_in_the_order_asked_for(make_store):
    store, values = make_store({"a": 9, "b": 3}), patches("a", 9)
    assert store.read("a", [7, 0, 7, 3]) == [values[7], values[0], values[7], values[3]]
    assert store.read("b", np.array([2])) == [patches("b", 3)[2]]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.binary(min_size=1, max_size=9000), max_size=8),
    corner=st.lists(st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 2), min_size=8, max_size=8),
)
def test_any_bytes_and_any_coords_survive(tmp_path_factory, values, corner):
    path = tmp_path_factory.mktemp("any") / "x.lmdb"
    coords = np.array(corner, np.int64).reshape(-1, 2)[: len(values)].astype(np.int32)
    with StoreWriter(path, RECIPE) as writer:
        writer.add(record("a", 0, coords=coords), values)
    store = PatchStore(path)
    assert store.read("a", range(len(values))) == values
    np.testing.assert_array_equal(store.record("a").coords, coords)


def test_ids_are_kept_as_they_are(make_store):
    store = make_store({slide: 1 + number for number, slide in enumerate(IDS)})
    assert sorted(store.slides) == sorted(IDS)
    for number, slide in enumerate(IDS):
        assert slide in store
        assert store.read(slide, range(1 + number)) == patches(slide, 1 + number)
    assert "0" not in store


@pytest.mark.parametrize(
    "slide",
    [
        "",
        "x" * (MAX_ID_BYTES + 1),
        "ä" * (MAX_ID_BYTES // 2 + 1),
        "../x",
        "/x",
        "a\x00",
        "a\nb",
        "\ud800",
    ],
)
def test_an_id_that_cannot_be_a_key_is_a_users_mistake(tmp_path, slide):
    with StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer:
        with pytest.raises(UserError, match=r"1 slide id\(s\) cannot be used"):
            writer.add(record(slide, 1), patches("a", 1))
        writer.add(record("x" * MAX_ID_BYTES, 1), patches("a", 1))


def test_a_source_with_a_long_name_does_not_spoil_the_store(tmp_path):
    with StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer:
        writer.add(record("a", 1, source="\U0001f600" * 2000 + "end.svs"), patches("a", 1))
    assert PatchStore(tmp_path / "x.lmdb").record("a").source.endswith("end.svs")


def test_a_slide_that_fails_half_way_leaves_nothing(tmp_path):
    def failing():
        yield from patches("b", 3)
        raise RuntimeError("the slide broke")

    with StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer:
        writer.add(record("a", 4), patches("a", 4))
        with pytest.raises(RuntimeError, match="the slide broke"):
            writer.add(record("b", 5), failing())
        assert writer.done == {"a"}
        with pytest.raises(ValueError, match="slide 'b' has 5 patches, but 3 JPEGs were given"):
            writer.add(record("b", 5), patches("b", 3))
        writer.add(record("c", 2), patches("c", 2))
    with lmdb.open(str(tmp_path / "x.lmdb"), subdir=False, readonly=True, lock=False) as env:
        assert env.stat()["entries"] == 1 + (4 + 1) + (2 + 1)  # header, patches and records
    store = PatchStore(tmp_path / "x.lmdb")
    assert store.slides == ["a", "c"]
    assert store.read("c", range(2)) == patches("c", 2)
    assert not [*store.find_damage("a"), *store.find_damage("c")]


def test_an_error_of_the_slide_is_not_told_as_a_full_disk(tmp_path):
    def failing():
        raise FileNotFoundError("the slide is gone")
        yield b""

    with (
        StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer,
        pytest.raises(FileNotFoundError, match="the slide is gone"),
    ):
        writer.add(record("a", 1), failing())


def test_a_pack_goes_on_where_it_stopped(tmp_path):
    with StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer:
        writer.add(record("a", 4), patches("a", 4))
    with StoreWriter(tmp_path / "x.lmdb", RECIPE) as writer:
        assert writer.done == {"a"}
        with pytest.raises(ValueError, match=r"is in .* already"):
            writer.add(record("a", 4), patches("a", 4))
        writer.add(record("b", 3), patches("b", 3))
    store = PatchStore(tmp_path / "x.lmdb")
    assert store.read("a", range(4)) + store.read("b", range(3)) == patches("a", 4) + patches(
        "b", 3
    )


def test_another_recipe_is_an_error_that_names_the_key(tmp_path):
    with StoreWriter(tmp_path / "x.lmdb", {"mpp": 0.5, "patch_px": 32}) as writer:
        writer.add(record("a", 4), patches("a", 4))
    with pytest.raises(UserError) as error:
        StoreWriter(tmp_path / "x.lmdb", {"mpp": 0.25, "patch_px": 32, "overlap": 8})
    assert "mpp: 0.5 in the store, 0.25 requested" in str(error.value)
    assert "overlap: None in the store, 8 requested" in str(error.value)
    assert "patch_px" not in str(error.value)
    assert PatchStore(tmp_path / "x.lmdb").recipe == {"mpp": 0.5, "patch_px": 32}


def test_no_store_is_named_with_the_way_to_one(tmp_path):
    with pytest.raises(UserError, match=r"no patch store at .*nothing.lmdb\n.*e2e pack"):
        PatchStore(tmp_path / "nothing.lmdb")
    with pytest.raises(UserError, match="no patch store at"):
        PatchStore(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", bytes(100_000), b"SQLite format 3\0" * 100])
def test_a_file_that_is_no_lmdb_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "x.lmdb"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not an LMDB file"):
        PatchStore(path)
    if content:  # an empty file may become a store
        with pytest.raises(UserError, match="not an LMDB file"):
            StoreWriter(path, RECIPE)
        assert path.read_bytes() == content


def test_a_newer_store_is_refused(tmp_path):
    header = json.dumps({"format": "e2e patch store", "version": 3, "recipe": {}})
    path = put(tmp_path / "x.lmdb", header=header.encode())
    with pytest.raises(UserError, match="store version 3; this program reads up to 2"):
        PatchStore(path)


def test_lmdbs_of_others_are_told_apart(tmp_path):
    abmilx = put(tmp_path / "a.lmdb", __pn__=pickle.dumps({"s": 1}), __keys__=b"", **{"s-0": b"x"})
    with pytest.raises(UserError, match="an LMDB of the ABMILX project"):
        PatchStore(abmilx)
    with pytest.raises(UserError, match="an LMDB of another kind"):
        PatchStore(put(tmp_path / "b.lmdb", some=b"thing"))
    with pytest.raises(UserError, match="an empty LMDB"):
        PatchStore(put(tmp_path / "e.lmdb"))  # as it is for a moment when a writer begins
    with pytest.raises(UserError, match="the format in its header is 'features'"):
        PatchStore(put(tmp_path / "c.lmdb", header=b'{"format": "features", "version": 1}'))
    with pytest.raises(UserError, match="an LMDB of another kind"):
        StoreWriter(put(tmp_path / "d.lmdb", some=b"thing"), RECIPE)


READ_ALL = """
    import sys
    from e2e.store.lmdb import PatchStore, StoreWriter
    from e2e.errors import UserError
    for length in map(int, sys.argv[2:]):
        with open(sys.argv[1], "r+b") as file:
            file.truncate(length)
        try:
            store = PatchStore(sys.argv[1])
            print(length, "read", [list(store.find_damage(slide)) for slide in store.slides])
        except UserError as error:
            print(length, "refused:", str(error).splitlines()[0])
        try:
            StoreWriter(sys.argv[1], {"mpp": 0.5, "patch_px": 32}).close()
        except UserError:
            continue
        print(length, "was opened for writing")
"""


@pytest.mark.slow
@pytest.mark.parametrize("slides", ["ab", "abc"])  # LMDB's two meta pages take turns
def test_a_store_cut_short_is_refused_and_never_kills_the_process(tmp_path, slides):
    path = tmp_path / "x.lmdb"
    write_store(path, dict.fromkeys(slides, 30))
    size = path.stat().st_size
    lengths = [size - 1, size - 4096, size // 2, 3 * 4096, 2 * 4096, 4096 + 100, 4096, 150, 10, 1]
    done = run(READ_ALL, path, *lengths)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(lengths), done.stdout
    for length, line in zip(lengths, lines, strict=True):
        assert line.startswith(f"{length} refused:"), line
        assert "was cut short" in line or "not an LMDB file" in line


def test_a_flipped_byte_in_the_file_is_found(tmp_path):
    path = tmp_path / "x.lmdb"
    write_store(path, {"a": 5, "b": 5})
    value = patches("a", 5)[3]
    change(path, value, value[:100] + bytes([value[100] ^ 1]) + value[101:])
    store = PatchStore(path)
    assert list(store.find_damage("a")) == ["slide 'a' patch 3: checksum differs"]
    assert list(store.find_damage("b")) == []


def test_a_missing_patch_is_named(tmp_path):
    path = tmp_path / "x.lmdb"
    write_store(path, {"a": 5, "b": 5})
    lost = tmp_path / "lost.lmdb"
    lost.write_bytes(path.read_bytes())
    with lmdb.open(str(lost), subdir=False, map_size=1 << 24) as env, env.begin(write=True) as txn:
        txn.delete(b"p" + struct.pack(">II", 1, 4))  # slide b was the second to come
    store = PatchStore(lost)
    assert list(store.find_damage("b")) == ["slide 'b' patch 4: missing"]
    with pytest.raises(DamagedDataError, match="slide 'b' patch 4 of 5 is missing"):
        store.read("b", [0, 4])
    assert store.read("b", [0]) == [patches("b", 5)[0]]


def test_damaged_coords_are_found(tmp_path):
    path = tmp_path / "x.lmdb"
    with StoreWriter(path, RECIPE) as writer:
        coords = np.array([[123456789, 987654321]], np.int32)
        writer.add(record("a", 1, coords=coords), patches("a", 1))
    change(path, struct.pack("<ii", 123456789, 987654321), struct.pack("<ii", 123456788, 987654321))
    store = PatchStore(path)
    with pytest.raises(DamagedDataError, match="the record of slide 'a' is damaged"):
        store.record("a")
    assert list(store.find_damage("a")) == [f"{path}: the record of slide 'a' is damaged"]


def test_a_damaged_mpp_is_found(tmp_path):
    path = tmp_path / "x.lmdb"
    with StoreWriter(path, {}) as writer:
        writer.add(record("a", 1, mpp=0.3125), patches("a", 1))
    change(path, b'"mpp": 0.3125', b'"mpp": 0.3135')
    assert list(PatchStore(path).find_damage("a"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'{"number": 0', b'{"number?: 0'),  # the slide's line of JSON
        (b'"recipe": {', b'"recipe": ?'),  # the header
    ],
)
def test_damage_to_what_is_read_first_is_told_as_such(tmp_path, old, new):
    path = tmp_path / "x.lmdb"
    write_store(path, {"a": 1})
    change(path, old, new)
    with pytest.raises(DamagedDataError):
        PatchStore(path)


@pytest.mark.slow
def test_a_page_of_zeros_is_told_as_damage(tmp_path):
    path = tmp_path / "x.lmdb"
    write_store(path, {"a": 40})
    data = bytearray(path.read_bytes())
    key = b"p" + struct.pack(">II", 0, 20)
    start = data.index(key) // 4096 * 4096  # the leaf page that holds patch 20's key
    data[start : start + 4096] = bytes(4096)
    path.write_bytes(data)
    done = run(READ_ALL, path, len(data))
    assert "Traceback" not in done.stderr, done.stderr


FILL = """
    import resource, signal, sys
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    from e2e.store.lmdb import StoreWriter
    from e2e.errors import UserError
    from tests.helpers.stores import RECIPE, patches, record
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    try:
        with StoreWriter(sys.argv[1], RECIPE) as writer:
            for number in range(1000):
                writer.add(record(str(number), 20), patches(str(number), 20))
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4_000, 8_192, 10_000, 300_001, 303_104])
def test_a_full_disk_is_one_message_and_what_is_there_stays(tmp_path, limit):
    path = tmp_path / "x.lmdb"
    done = run(FILL, path, limit)
    assert done.returncode == 0, done.stderr
    assert "disk" in done.stdout or "cannot open" in done.stdout, done.stdout
    if limit > 100_000:
        store = PatchStore(path)
        assert f"cannot write slide '{len(store.slides)}'" in done.stdout
        assert len(store.slides) >= 3
        for slide in store.slides:
            assert list(store.find_damage(slide)) == []
            assert store.read(slide, range(20)) == patches(slide, 20)
    again = run(FILL.replace("range(1000)", "range(990, 993)"), path, 10_000_000)
    assert (again.returncode, again.stdout) == (0, ""), again.stderr
    last = run(
        "import sys; from e2e.store.lmdb import PatchStore; s = PatchStore(sys.argv[1]);"
        "print([f for x in s.slides for f in s.find_damage(x)], s.read('992', range(20)) != [])",
        path,
    )
    assert last.stdout == "[] True\n", last.stderr


def test_a_slide_may_lack_places(tmp_path):
    path = tmp_path / "x.lmdb"
    with StoreWriter(path, RECIPE) as writer:
        writer.add(record("a", 3), patches("a", 3))
    assert b'"version": 1' in (
        read_value(path, b"header") or b""
    )  # programs of before still read it
    with StoreWriter(copy := shutil.copy(path, tmp_path / "y.lmdb"), RECIPE) as writer:
        bare = record("b", 2, coords=None)
        with pytest.raises(ValueError, match="slide 'b' has 2 patches, but 3 JPEGs were given"):
            writer.add(bare, patches("b", 3))
        writer.add(bare, patches("b", 2))
        assert writer.record("b") == bare
        assert writer.read("b", [1]) == [patches("b", 2)[1]]
        assert writer.read("a", [2]) == [patches("a", 3)[2]]
    store = PatchStore(copy)
    assert b'"version": 2' in (
        read_value(copy, b"header") or b""
    )  # which they refuse by its number
    assert (store.record("b"), store.record("b").num_patches, store.num_patches("b")) == (
        bare,
        2,
        2,
    )
    assert store.record("a").num_patches == 3
    assert store.read("b", [1, 0]) == patches("b", 2)[::-1]
    assert [*store.find_damage("a"), *store.find_damage("b")] == []
    change(copy, b'"coords": false', b'"coords": f@lse')
    with pytest.raises(DamagedDataError):
        PatchStore(copy).record("b")


def test_a_value_of_zero_bytes_is_named(tmp_path):
    path = Path(shutil.copy(write_store(tmp_path / "x.lmdb", {"a": 20}).path, tmp_path / "y.lmdb"))
    with lmdb.open(str(path), subdir=False, map_size=1 << 24) as env, env.begin(write=True) as txn:
        txn.put(b"p" + struct.pack(">II", 0, 9), b"")
    store = PatchStore(path)
    for indices in ([9], range(20), range(9, 20), [0, 19, 9]):
        with pytest.raises(DamagedDataError, match="slide 'a' patch 9 has zero bytes"):
            store.read("a", indices)
    assert list(store.find_damage("a")) == ["slide 'a' patch 9: has zero bytes"]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(indices=st.lists(st.integers(0, 59), max_size=40))
def test_however_patches_are_asked_for_they_are_the_right_ones(sixty, indices):
    store, values = sixty
    for wanted in (indices, sorted(indices), range(min(indices, default=0), 60)):
        assert store.read("b", wanted) == [values[i] for i in wanted]


@pytest.fixture(scope="module")
def sixty(tmp_path_factory):
    path = tmp_path_factory.mktemp("sixty") / "x.lmdb"
    return write_store(path, {"a": 3, "b": 60, "c": 3}), patches("b", 60)


def resident(path: Path) -> list[bool]:
    """Which pages of a file are in memory."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as view:
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        address = np.frombuffer(view, np.uint8).ctypes.data
        mincore = ctypes.CDLL(None).mincore
        mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        assert mincore(address, size, pages.ctypes.data) == 0
    return (pages & 1).astype(bool).tolist()


@pytest.mark.parametrize(("indices", "share"), [(range(0, 200, 4), 0.9), (range(0, 200, 25), 0.3)])
def test_a_cold_slide_is_read_at_once_where_much_of_it_is_wanted(tmp_path, indices, share):
    path, values = tmp_path / "x.lmdb", [os.urandom(16_000) for _ in range(200)]
    with StoreWriter(path, RECIPE) as writer:
        writer.add(record("a", 200), values)
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    store = PatchStore(path)
    if np.mean(resident(path)) > 0.1:
        pytest.skip("this file system keeps all files in memory")
    assert store.read("a", indices) == [values[i] for i in indices]
    deadline = time.monotonic() + 10  # the disk may still be at work
    while share > 0.5 and np.mean(resident(path)) < share and time.monotonic() < deadline:
        pass
    found = np.mean(resident(path))
    assert found > share if share > 0.5 else found < share, found


WRITE = """
    import sys
    from e2e.store.lmdb import StoreWriter
    from tests.helpers.stores import RECIPE, record
    with StoreWriter(sys.argv[1], RECIPE) as writer:
        print("open", flush=True)
        for number in range(int(sys.argv[2])):
            name = f"{number:05}"
            writer.add(record(name, 20), [name.encode() * (50 + k) for k in range(20)])
"""


@pytest.mark.slow
def test_a_store_that_grows_while_it_is_read_shows_whole_slides_only(tmp_path):
    path, slides = tmp_path / "x.lmdb", 300
    command = [sys.executable, "-c", textwrap.dedent(WRITE), str(path), str(slides)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        seen, first = set(), PatchStore(path)
        while (running := writer.poll() is None) or slides not in seen:
            try:
                store = PatchStore(path)
                for slide in store.slides[-3:]:
                    expected = [slide.encode() * (50 + k) for k in range(20)]
                    assert store.read(slide, range(20)) == expected
                    assert store.record(slide).num_patches == 20
                seen.add(len(store.slides))
                assert running or len(store.slides) == slides
            except OneRankError as error:
                assert "being written faster" in str(error)  # noqa: PT017
        assert writer.returncode == 0
    assert len(seen) > 3  # it was read while it grew
    for slide in first.slides:
        assert len(first.read(slide, range(20))) == 20


COMMIT_TWICE = """
    import sys, lmdb
    with lmdb.open(sys.argv[1], subdir=False, map_size=1 << 24) as env:
        for value in (b"1", b"2"):
            with env.begin(write=True) as txn:
                txn.put(b"key", value)
"""


def test_what_a_reader_looks_at_is_not_overwritten_where_it_can_say_so(tmp_path):
    path = put(tmp_path / "x.lmdb", key=b"0")

    def slow(txn):
        first = bytes(txn.get(b"key"))
        for _ in range(4):
            assert run(COMMIT_TWICE, path).returncode == 0
        return first, bytes(txn.get(b"key"))

    assert read_snapshot(path, slow) == (b"0", b"0")
    assert read_snapshot(path, lambda txn: bytes(txn.get(b"key"))) != b"0"


def test_a_snapshot_that_was_overwritten_is_taken_again(tmp_path):
    path = put(tmp_path / "x.lmdb", key=b"0")
    Path(f"{path}-lock").unlink()  # as on a disk that cannot be written
    snapshots = []

    def disturbed(times):
        def work(txn):
            snapshots.append(txn.id())
            if len(snapshots) <= times:
                assert run(COMMIT_TWICE, path).returncode == 0
                raise lmdb.CorruptedError("what overwritten pages may look like")
            return bytes(txn.get(b"key"))

        return work

    assert read_snapshot(path, disturbed(2)) == b"2"
    assert snapshots == [1, 3, 5]
    with pytest.raises(OneRankError, match="written faster than it can be read"):
        read_snapshot(path, disturbed(99))


@pytest.mark.slow
def test_a_file_that_outgrew_its_map_is_told_apart_from_damage(tmp_path, monkeypatch):
    path = Path(shutil.copy(write_store(tmp_path / "x.lmdb", {"a": 1}).path, tmp_path / "y.lmdb"))
    monkeypatch.setattr(snapshot, "GROWTH", 0)
    store = PatchStore(path)
    assert run(FILL.replace("1000", "1, 3"), path, 1 << 30).returncode == 0
    with pytest.raises(OneRankError, match="has grown by more than"):
        store.read("a", [0])


def read_in_child(store: PatchStore) -> list[bytes]:
    return store.read("b", [2, 0])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_goes_into_other_processes(make_store, method):
    store = make_store({"a": 2, "b": 3})
    expected = store.read("b", [2, 0])  # opened here before the child is made
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(read_in_child, [store]) == expected
    assert store.read("b", [2, 0]) == expected


def test_a_child_forked_in_the_middle_of_a_read_reads_and_leaves_the_reader_alone(make_store):
    store = make_store({"a": 2, "b": 3})
    expected = store.read("b", [2, 0])
    reading, forked, found = threading.Event(), threading.Event(), []

    def work(txn: lmdb.Transaction) -> tuple[int, list[str]]:
        reading.set()
        assert forked.wait(60)
        return txn.stat()["entries"], readers(store)

    thread = threading.Thread(target=lambda: found.append(read_snapshot(store.path, work)))
    thread.start()
    assert reading.wait(60)
    before = readers(store)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        with contextlib.suppress(BaseException):
            os._exit(0 if store.read("b", [2, 0]) == expected else 2)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    forked.set()
    thread.join()
    assert code == 0
    ((entries, after),) = found
    assert entries > 5
    assert before
    assert before == after  # else a writer would overwrite what this reader still reads


def readers(store: PatchStore) -> list[str]:
    """This process's rows of the store's table of readers."""
    return [
        line
        for line in snapshot._open_environment(store.path).readers().splitlines()
        if str(os.getpid()) in line
    ]


def test_what_is_lent_lies_in_the_file_and_is_what_would_be_read(make_store):
    store = make_store({"a": 4})

    def work(jpegs):
        at = [np.frombuffer(jpeg, np.uint8).ctypes.data for jpeg in jpegs]
        return [bytes(jpeg) for jpeg in jpegs], at

    found, places = store.borrow("a", [3, 0], work)
    assert found == store.read("a", [3, 0])
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1] == str(store.path)]
    for place in places:
        assert any(int(low, 16) <= place < int(high, 16) for low, high in spans)
    with pytest.raises(DamagedDataError, match="slide 'a' patch 4 of 4 is missing"):
        store.borrow("a", [4], work)


def test_a_store_may_be_moved_while_it_is_open(make_store, tmp_path):
    store = make_store({"a": 2})
    other = tmp_path / "elsewhere.lmdb"
    os.rename(store.path, other)
    assert PatchStore(other).read("a", [1]) == [patches("a", 2)[1]]


def test_no_pickle_is_in_a_store(make_store):
    store = make_store({"a": 2})
    with lmdb.open(str(store.path) + "2", subdir=False):
        pass
    data = store.path.read_bytes()
    assert patches("a", 1)[0] in data  # raw JPEG bytes, readable by any program
    assert b"\x80\x04\x95" not in data  # how a pickle begins
