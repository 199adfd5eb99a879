"""The ABMILX project's LMDBs: read in place, whatever their values are, and never executed."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e2e.errors import DamagedDataError, UserError
from e2e.store.abmilx import AbmilxStore
from e2e.store.lmdb import PatchStore
from e2e.store.open import open_store
from e2e.store.pickles import read_pickle
from e2e.store.records import PatchReader
from tests.helpers.abmilx_lmdb import put, write_coords, write_seed
from tests.helpers.stores import jpeg, patches

# --- the store's face ---


@pytest.mark.parametrize("folder", [False, True])
def test_patches_are_read_in_the_order_asked_for(tmp_path, folder):
    counts = {"a": 12, "TCGA-AB-1": 3, "TCGA-AB-1-1": 2, "Schnitt 7": 1}
    store = AbmilxStore(write_seed(tmp_path / "x.lmdb", counts, folder=folder))
    assert store.slides == list(counts)
    assert "a" in store
    assert "b" not in store
    for slide, count in counts.items():
        assert store.num_patches(slide) == count
        assert store.read(slide, np.arange(count)) == patches(slide, count)
        assert list(store.find_damage(slide)) == []
    assert store.read("a", [11, 2, 2]) == [patches("a", 12)[i] for i in (11, 2, 2)]
    record = store.record("a")
    assert (record.coords, record.num_patches, record.patch_px, record.mpp) == (None, 12, 32, None)


def test_both_kinds_are_told_by_what_is_in_them(tmp_path, make_store):
    ours, theirs = make_store({"a": 1}), write_seed(tmp_path / "x.lmdb", {"a": 1})
    bare = put(tmp_path / "bare.lmdb", {"b-0": pickle.dumps(jpeg())})
    folder = write_seed(tmp_path / "folder", {"a": 1}, folder=True)
    other = put(tmp_path / "other.lmdb", {"some": b"thing"})
    opened: list[PatchReader] = [open_store(path) for path in (ours.path, theirs, bare, folder)]
    assert [type(s) for s in opened] == [PatchStore, AbmilxStore, AbmilxStore, AbmilxStore]
    assert opened[2].slides == ["b"]
    with pytest.raises(UserError, match="an LMDB of another kind"):
        open_store(other)
    with pytest.raises(UserError, match="no keys <slide>-<index>"):
        AbmilxStore(other)
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match="no patch store at"):
            open_store(path)
        with pytest.raises(UserError, match="no LMDB at"):
            AbmilxStore(path)
    (tmp_path / "text.lmdb").write_bytes(b"text" * 1000)
    with pytest.raises(UserError, match="not an LMDB file"):
        open_store(tmp_path / "text.lmdb")


def read_in_child(store: AbmilxStore) -> list[bytes]:
    return store.read("a", [1])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_goes_into_other_processes(tmp_path, method):
    store = AbmilxStore(write_seed(tmp_path / "x.lmdb", {"a": 2}))
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(read_in_child, [store]) == store.read("a", [1])


def test_coords_of_clam_give_the_places(tmp_path):
    path = write_seed(tmp_path / "x.lmdb", {"a": 2, "b": 3, "c": 1})
    write_coords(tmp_path / "h5", "a", 2)
    write_coords(tmp_path / "h5", "b", 4)
    store = AbmilxStore(path, coords=tmp_path / "h5")
    record = store.record("a")
    assert record.coords is not None
    assert record.coords.tolist() == [[0, 1], [2, 3]]
    assert (record.num_patches, record.level0_px, record.coords.dtype) == (2, 1024, np.int32)
    with pytest.raises(DamagedDataError, match=r"b.h5 has 4 coords, but .*x.lmdb has 3 patches of"):
        store.record("b")
    with pytest.raises(
        DamagedDataError, match=r"the folder of coords has no .h5 file of slide 'c' of"
    ):
        store.record("c")
    with pytest.raises(UserError, match=r"no .h5 file in"):
        AbmilxStore(path, coords=tmp_path)


# --- files that are not as they should be ---


def test_without_counts_the_keys_are_counted(tmp_path):
    counts = {"a": 12, "a-1": 3, "b": 1}
    path = write_seed(tmp_path / "x.lmdb", counts, __pn__=None, __keys__=None)
    assert {s: AbmilxStore(path).num_patches(s) for s in AbmilxStore(path).slides} == counts


def test_a_slide_that_lacks_its_count_is_named_when_it_is_wanted(tmp_path):
    store = AbmilxStore(write_seed(tmp_path / "x.lmdb", {"a": 2, "b": 2}, __pn__={"a": 2}))
    assert store.slides == ["a", "b"]
    assert store.read("a", [0]) == patches("a", 1)
    for use in (store.num_patches, store.record, lambda s: store.read(s, [0])):
        with pytest.raises(
            DamagedDataError,
            match="slide 'b' is in __slide__, but its number of patches is not in __pn__",
        ):
            use("b")
    assert len(list(store.find_damage("b"))) == 1


@pytest.mark.parametrize(
    ("counted", "fault"), [(3, "more patches than the 3"), (5, "fewer patches")]
)
def test_counts_that_disagree_with_the_keys_are_named(tmp_path, counted, fault):
    store = AbmilxStore(write_seed(tmp_path / "x.lmdb", {"a": 4}, __pn__={"a": counted}))
    with pytest.raises(DamagedDataError, match=f"slide 'a' has {fault}"):
        store.record("a")
    assert len(list(store.find_damage("a"))) == 1
    if counted == 5:
        with pytest.raises(DamagedDataError, match="slide 'a' patch 4 of 5 is missing"):
            store.read("a", range(5))


@pytest.mark.parametrize("counts", [{"a": -1}, {"a": 10**12}, {"a": "2"}, {"a": True}, {"a": None}])
def test_counts_that_cannot_be_are_refused_at_once(tmp_path, counts):
    path = write_seed(tmp_path / "x.lmdb", {"a": 2}, __pn__=counts)
    with pytest.raises(DamagedDataError, match=r"'a' has .* in a file of 6 keys"):
        AbmilxStore(path)


@pytest.mark.parametrize("meta", [{"__pn__": [1]}, {"__slide__": {"a": 1}}, {"__slide__": [["a"]]}])
def test_lists_of_another_kind_are_refused(tmp_path, meta):
    with pytest.raises(DamagedDataError, match=f"{next(iter(meta))} is not a"):
        AbmilxStore(write_seed(tmp_path / "x.lmdb", {"a": 2}, **meta))


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (b"", "patch 1 has zero bytes"),
        (pickle.dumps(b""), "patch 1 has zero bytes"),
        (pickle.dumps(b"", 2), "patch 1 has zero bytes"),  # a call of bytes without anything
        (jpeg(), "patch 1 is rejected"),  # no pickle around it
        (pickle.dumps(jpeg())[:-100], "patch 1 is rejected"),
        (pickle.dumps("text"), "patch 1 is rejected: it holds something else"),
        (pickle.dumps([jpeg()]), "patch 1 is rejected: it holds something else"),
        (pickle.dumps(np.zeros((4, 4), np.uint8)), "patch 1 is rejected: it holds an array"),
        (pickle.dumps(np.zeros(4, np.int16)), "patch 1 is rejected: it holds an array of i2"),
        (pickle.dumps(np.zeros(4, object)), "patch 1 is rejected"),
    ],
)
def test_a_value_that_is_no_patch_is_named_and_the_others_are_read(tmp_path, value, fault):
    path = write_seed(tmp_path / "x.lmdb", {"a": 3})
    put(path, {"a-1": value})
    store = AbmilxStore(path)
    for indices in ([1], [0, 2, 1]):
        with pytest.raises(DamagedDataError, match=f"x.lmdb: slide 'a' {fault}"):
            store.read("a", indices)
    assert store.read("a", [2, 0]) == [patches("a", 3)[2], patches("a", 3)[0]]
    [line] = store.find_damage("a")
    assert fault in line


def test_what_is_no_jpeg_is_named(tmp_path):
    path = write_seed(tmp_path / "x.lmdb", {"a": 3})
    put(path, {"a-1": pickle.dumps(b"no picture at all, but bytes")})
    assert list(AbmilxStore(path).find_damage("a")) == [
        f"{path}: slide 'a' patch 1 is not a JPEG, but 28 other bytes"
    ]
    put(other := write_seed(tmp_path / "y.lmdb", {"a": 3}), {"a-0": pickle.dumps(b"no picture")})
    with pytest.raises(DamagedDataError, match="patch 0 is not a JPEG"):
        AbmilxStore(other).record("a")


def test_a_file_cut_short_is_refused(tmp_path):
    path = write_seed(tmp_path / "x.lmdb", {"a": 30})
    cut = Path(shutil.copy(path, tmp_path / "y.lmdb"))
    os.truncate(cut, cut.stat().st_size - 4096)
    with pytest.raises(UserError, match=r"y.lmdb was cut short: .* bytes of"):
        open_store(cut)


# --- pickles ---

PLAIN = [
    bytes,
    bytearray,
    lambda data: np.frombuffer(data, np.uint8),
    lambda data: np.frombuffer(bytearray(data), np.uint8),  # writable
    lambda data: np.frombuffer(data, np.uint8).copy()[::1],
]


@pytest.mark.parametrize("old", [False, True], ids=["numpy2", "numpy1"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", range(len(PLAIN)))
@pytest.mark.parametrize("size", [1, 10, 255, 256, 70_000])
def test_every_way_a_patch_was_pickled_is_read(tmp_path, kind, protocol, size, old):
    data = np.random.default_rng(size).bytes(size)
    value = pickle.dumps(PLAIN[kind](data), protocol)
    if old:  # the names that numpy 1 wrote: text of another length, so frame and length change
        value = numpy1(value)
    path = put(tmp_path / "x.lmdb", {"a-0": value})
    [found] = AbmilxStore(path).read("a", [0])
    assert found == data
    assert type(found) is bytes


def numpy1(value: bytes) -> bytes:
    """The pickle as numpy 1 made it."""
    for module in (b"multiarray", b"numeric"):
        new, old = b"numpy._core." + module, b"numpy.core." + module
        if value[2:3] == b"\x95" and new in value:
            frame = int.from_bytes(value[3:11], "little") - 1
            value = value[:3] + frame.to_bytes(8, "little") + value[11:]
        value = value.replace(bytes([len(new)]) + new, bytes([len(old)]) + old).replace(new, old)
    assert b"_core" not in value
    return value


class Runs:
    """Pickles as a call of ``function``; never unpickled here."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def malicious(mark: Path) -> dict[str, bytes]:
    """Pickles that do harm where they are loaded; those that run make the file ``mark``."""
    touch = f"touch {mark}"
    posix = f"c{os.system.__module__}\nsystem\n".encode()
    nested = b"\x80\x04" + b"(" * 200_000 + b"t" * 200_000 + b"."
    return {
        **{f"reduce {p}": pickle.dumps(Runs(os.system, touch), p) for p in range(6)},
        **{f"in a list {p}": pickle.dumps([jpeg(), Runs(os.system, touch)], p) for p in (2, 4, 5)},
        "exec": pickle.dumps(Runs(exec, f"open({str(mark)!r}, 'w')")),
        "a name": b"\x80\x04cos\nsystem\n.",
        "inst": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "obj": b"(" + posix + b"S'" + touch.encode() + b"'\no.",
        "newobj": b"\x80\x02" + posix + b"X\x01\0\0\0x\x85\x81.",
        "ext": b"\x80\x02\x82\x01.",
        "persid": b"\x80\x04Pname\n.",
        "build": pickle.dumps(np.random.default_rng(0)),
        "setstate": b"\x80\x04cnumpy\ndtype\n(X\x02\0\0\0u1tR}X\x01\0\0\0xK\x01sb.",
        "frombuffer of a name": b"\x80\x04cnumpy._core.numeric\n_frombuffer\n(cos\nsystem\ntR.",
        "memo bomb": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "length bomb": b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little") + b"x" * 40,
        "long bomb": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"x" * 40,
        "doubling": b"\x80\x04C\x01x" + b"2\x86" * 2000 + b".",
        "sharing": b"\x80\x04C\x01x\x94" + b"".join(b"h%c\x86\x94" % i for i in range(40)) + b".",
        "nested": nested,
        "pops too far": b"\x80\x040000" + b"." * 30,
        "empty": b"\x80\x04" + b"." * 30,
        "buffer": b"\x80\x05\x97." + b"x" * 30,
        "length after the end": b"\x80\x04B\xff\xff\xff\xff" + b"x" * 40 + b"\x94.",
        "text": b"hello, this is no pickle",
    }


HARM = sorted(malicious(Path("mark")))


@pytest.mark.parametrize("name", HARM)
def test_a_malicious_patch_is_refused_by_name_and_never_run(tmp_path, name):
    value = malicious(tmp_path / "mark")[name]
    path = write_seed(tmp_path / "x.lmdb", {"a": 3})
    put(path, {"a-1": value})
    with pytest.raises(DamagedDataError, match=r"x.lmdb: slide 'a' patch 1 is rejected: "):
        AbmilxStore(path).read("a", range(3))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("key", ["__pn__", "__slide__"])
@pytest.mark.parametrize("name", [n for n in HARM if n not in ("doubling", "sharing", "nested")])
def test_a_malicious_list_is_refused_by_name_and_never_run(tmp_path, name, key):
    path = write_seed(tmp_path / "x.lmdb", {"a": 3})
    put(path, {key: malicious(tmp_path / "mark")[name]})
    with pytest.raises(DamagedDataError, match=f"{key} is (rejected|not a)"):
        AbmilxStore(path)
    assert not (tmp_path / "mark").exists()


def test_the_malicious_pickles_would_have_run(tmp_path):
    """Else the tests above would hold of anything."""
    for name in ("reduce 0", "reduce 2", "reduce 4", "in a list 5", "exec", "inst", "obj"):
        mark = tmp_path / name.replace(" ", "_")
        code = "import pickle, sys; pickle.load(sys.stdin.buffer)"
        subprocess.run([sys.executable, "-c", code], input=malicious(mark)[name], check=True)
        assert mark.exists(), name


def test_a_patch_of_many_steps_is_given_up_early(tmp_path):
    many = b"\x80\x04" + b"N" * 1000 + b"C\x01x."
    store = AbmilxStore(put(tmp_path / "x.lmdb", {"a-0": many}))
    with pytest.raises(DamagedDataError, match="patch 0 is rejected: its pickle has more than 100"):
        store.read("a", [0])


def test_text_as_keys_only_so_that_no_hash_takes_forever(tmp_path):
    shared = b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(100))
    with pytest.raises(ValueError, match="is invalid at SETITEM"):
        read_pickle(b"\x80\x04C\x01x\x94" + shared + b"}h\x63K\x01s.")


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_a_value_error(data):
    for prefix in (b"", b"\x80\x04", b"\x80\x04]\x94}(h\0"):
        try:
            read_pickle(prefix + data)
        except ValueError:
            continue


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text() | st.binary(),
    lambda children: (
        st.lists(children) | st.dictionaries(st.text(), children) | st.tuples(children, children)
    ),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(plain, st.sampled_from([2, 3, 4, 5]))
def test_plain_values_are_what_pickle_says(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol)) == value


def test_what_is_stored_is_the_jpeg_itself(tmp_path):
    """In RGB order as JPEGs are; the project's BGR came of its decoder."""
    from PIL import Image

    red = jpeg(Image.new("RGB", (16, 16), (250, 10, 10)))
    store = AbmilxStore(put(tmp_path / "x.lmdb", {"a-0": pickle.dumps(red)}))
    with Image.open(io.BytesIO(store.read("a", [0])[0])) as image:
        r, _, b = np.asarray(image)[8, 8]
    assert r > 200 > b
