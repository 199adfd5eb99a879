"""Frozen features of other tools, read in place: each format by itself, and one message for what is bad."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from e2e.errors import DamagedDataError, UserError
from e2e.features import formats
from e2e.features.check import common_width, describe_encoder, may_be_same
from e2e.features.formats import FEATURE_FORMATS
from e2e.features.reader import FeatureFiles, open_features

COUNTS = {"s1": 5, "s2": 3, "TCGA-A1.01Z": 1}
D = 4
GRID = {
    "patch_size": 256,
    "patch_size_level0": 512.0,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "name": "s",
    "savetodir": "/elsewhere",
    "level0_width": 9000,
    "level0_height": 8000,
}


def values(slide: str, count: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(len(slide) + count).normal(size=(count, D)).astype(dtype)


def grid(count: int) -> np.ndarray:
    return np.stack([np.arange(count) * 512, np.arange(count) * 512 + 7], axis=1)


def write_trident(folder: Path, slide: str, features: np.ndarray, coords=None, **attrs) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{slide}.h5", "w") as h5:
        h5["features"] = features
        h5["features"].attrs.update(name=slide, savetodir="/elsewhere", encoder="uni_v1")
        h5["coords"] = grid(len(features)) if coords is None else coords
        h5["coords"].attrs.update(GRID | attrs)
    return folder / f"{slide}.h5"


def make_trident(path: Path, dtype: str) -> Path:
    folder = path / "20x_256px_0px_overlap" / "features_uni_v1"
    for slide, count in COUNTS.items():
        write_trident(folder, slide, values(slide, count, dtype))
    return folder


def make_clam(path: Path, dtype: str) -> Path:
    (path / "h5_files").mkdir(parents=True)
    (path / "pt_files").mkdir()
    for slide, count in COUNTS.items():
        with h5py.File(path / "h5_files" / f"{slide}.h5", "w") as h5:
            h5["features"] = values(slide, count, dtype)
            h5["coords"] = grid(count).astype(np.int32)
        tensor = torch.from_numpy(values(slide, count, dtype))
        torch.save(tensor, path / "pt_files" / f"{slide}.pt")
    return path


def make_stamp(path: Path, dtype: str) -> Path:
    path.mkdir()
    for slide, count in COUNTS.items():
        with h5py.File(path / f"{slide}.h5", "w") as h5:
            h5["feats"] = values(slide, count, dtype)
            h5["coords"] = grid(count) / 512 * 256.0  # um
            h5.attrs.update(stamp_version="2.5.0", extractor="uni2", unit="um", feat_type="tile")
            h5.attrs.update(tile_size_um=256.0, tile_size_px=224)
    return path


def make_aem(path: Path, dtype: str) -> Path:
    file = path.with_suffix(".h5")
    with h5py.File(file, "w") as h5:
        for slide, count in COUNTS.items():
            group = h5.create_group(slide)
            group["feat"] = values(slide, count, dtype)
            group["coords"] = grid(count)
            group.attrs["label"] = 1
    return file


def make_pt(path: Path, dtype: str) -> Path:
    path.mkdir()
    for slide, count in COUNTS.items():
        torch.save(torch.from_numpy(values(slide, count, dtype)), path / f"{slide}.pt")
    return path


def make_trident_pt(path: Path, dtype: str) -> Path:
    path.mkdir()
    for slide, count in COUNTS.items():
        torch.save(values(slide, count, dtype), path / f"{slide}.pt")
    return path


def make_dicts(path: Path, dtype: str) -> Path:
    path.mkdir()
    for slide, count in COUNTS.items():
        found = {"feats": torch.from_numpy(values(slide, count, dtype)), "label": 1}
        torch.save(found, path / f"{slide}.pt")
    return path


def make_npy(path: Path, dtype: str) -> Path:
    path.mkdir()
    for slide, count in COUNTS.items():
        np.save(path / f"{slide}.npy", values(slide, count, dtype))
    return path


MAKERS: dict[str, tuple[str, Callable[[Path, str], Path]]] = {
    "trident": ("trident", make_trident),
    "clam": ("clam", make_clam),
    "stamp": ("stamp", make_stamp),
    "aem": ("aem", make_aem),
    "pt": ("plain", make_pt),
    "trident's pt": ("plain", make_trident_pt),
    "pt with a dict": ("plain", make_dicts),
    "npy": ("plain", make_npy),
}


@pytest.fixture(params=MAKERS)
def made(request, tmp_path) -> tuple[str, Path]:
    name, make = MAKERS[request.param]
    return name, make(tmp_path / "features", "float32")


# --- every format ---


def test_every_format_of_the_package_has_a_maker_here():
    built_in = {
        name
        for name in FEATURE_FORMATS.names()
        if FEATURE_FORMATS.factory(name).__module__ == formats.__name__
    }
    assert {name for name, _ in MAKERS.values()} == built_in


def test_a_format_is_recognised_by_itself(made):
    name, path = made
    store = open_features(path)
    assert (store.recipe["format"], store.path) == (name, path)
    assert store.slides == sorted(COUNTS)
    assert "s1" in store
    assert "s" not in store


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", MAKERS)
def test_features_come_as_they_are_stored(tmp_path, kind, dtype):
    store = open_features(MAKERS[kind][1](tmp_path / "features", dtype))
    for slide, count in COUNTS.items():
        found = store.features(slide)
        expected = torch.from_numpy(values(slide, count, dtype))
        if dtype == "float64":
            expected = expected.float()
        assert (found.dtype, found.device.type) == (expected.dtype, "cpu")
        assert torch.equal(found, expected)
        found += 1  # in memory of its own, not in the file's
        assert torch.equal(store.features(slide), expected)


def test_counts_and_width_without_the_features(made):
    store = open_features(made[1])
    assert {slide: store.num_patches(slide) for slide in store.slides} == COUNTS
    assert store.width == D


def test_counting_does_not_read_the_values(tmp_path, monkeypatch):
    store = open_features(make_trident(tmp_path, "float32"))
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda *_: pytest.fail("read"))
    assert (store.num_patches("s1"), store.width) == (5, D)


def test_counting_tensors_maps_their_file(tmp_path, monkeypatch):
    load, mapped = torch.load, []
    monkeypatch.setattr(
        torch, "load", lambda *args, **more: (mapped.append(more["mmap"]), load(*args, **more))[1]
    )
    assert open_features(make_pt(tmp_path / "pt", "float32")).num_patches("s1") == 5
    assert mapped == [True]


def test_a_copy_in_another_process_and_thread_reads_the_same(made):
    store = pickle.loads(pickle.dumps(open_features(made[1])))
    expected = {slide: store.features(slide) for slide in store.slides}
    wrong: list[str] = []

    def read() -> None:
        for slide in store.slides * 5:
            if not torch.equal(store.features(slide), expected[slide]):
                wrong.append(slide)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    reading, writing = os.pipe()
    child = os.fork()  # while they read
    if child == 0:
        same = np.array_equal(store.features("s1").numpy(), expected["s1"].numpy())
        os.write(writing, b"y" if same else b"n")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 1) == b"y"
    for thread in threads:
        thread.join()
    assert wrong == []


# --- what a format says ---


def test_trident_says_where_the_patches_lie_and_who_made_the_features(tmp_path):
    store = open_features(make_trident(tmp_path, "float32"))
    record = store.record("s1")
    assert record.coords is not None
    assert record.coords.dtype == np.int32
    assert np.array_equal(record.coords, grid(5))
    assert (record.level0_px, record.patch_px, record.mpp) == (512.0, 256, None)
    assert (record.width, record.height, record.source, record.num_patches) == (
        9000,
        8000,
        "s1.h5",
        5,
    )
    assert store.recipe == {
        "format": "trident",
        "encoder": "uni_v1",
        "target_magnification": 20,
        "patch_size": 256,
        "overlap": 0,
    }


def test_trident_is_found_from_the_folder_above_too(tmp_path):
    folder = make_trident(tmp_path, "float32").parent
    for above in (folder, folder.parent):
        assert open_features(above).slides == sorted(COUNTS)
    make_pt(folder / "features_uni_v2", "float32")
    for above, grid in ((folder, ""), (folder.parent, f"{folder.name}/")):
        names = rf"2 encoders or grids\n  {grid}features_uni_v1\n  {grid}features_uni_v2\n"
        with pytest.raises(UserError, match=names):
            open_features(above)


def test_trident_writes_the_text_none_for_what_it_does_not_know(tmp_path):
    write_trident(tmp_path, "s1", values("s1", 2), level0_width="None", level0_height="None")
    record = open_features(tmp_path).record("s1")
    assert (record.width, record.height) == (0, 0)


def test_clam_has_places_and_nothing_else(tmp_path):
    store = open_features(make_clam(tmp_path / "f", "float32"))
    record = store.record("s2")
    assert np.array_equal(record.require_coords(), grid(3))
    assert (record.level0_px, record.mpp, record.patch_px, record.width) == (0.0, None, 0, 0)
    assert open_features(tmp_path / "f" / "h5_files").record("s2").coords is not None
    without = open_features(tmp_path / "f" / "pt_files")
    assert without.record("s2").coords is None


def test_of_clams_two_folders_a_slide_may_be_in_either(tmp_path):
    path = make_clam(tmp_path / "f", "float32")
    (path / "h5_files" / "s1.h5").unlink()
    store = open_features(path)
    assert store.slides == sorted(COUNTS)
    assert store.record("s1").coords is None
    assert store.record("s2").coords is not None


def test_stamps_micrometres_become_pixels_of_the_patches_themselves(tmp_path):
    store = open_features(make_stamp(tmp_path / "f", "float32"))
    record = store.record("s1")  # 256 um are 224 px: patches follow one another at 224 px
    expected = np.rint(grid(5) / 512 * 224).astype(np.int32)
    assert np.array_equal(record.require_coords(), expected)
    assert (record.level0_px, record.patch_px, record.mpp) == (224.0, 224, 256 / 224)
    assert store.recipe["extractor"] == "uni2"


def test_stamp_without_a_unit_has_no_places(tmp_path):
    path = make_stamp(tmp_path / "f", "float32")
    with h5py.File(path / "s1.h5", "r+") as h5:
        del h5.attrs["unit"]
    store = open_features(path)
    assert store.record("s1").coords is None
    assert store.record("s2").coords is not None


def test_stamps_older_name_of_the_features(tmp_path):
    path = make_stamp(tmp_path / "f", "float32")
    for file in path.iterdir():
        with h5py.File(file, "r+") as h5:
            h5.move("feats", "patch_embeddings")
    assert open_features(path).num_patches("s1") == 5


def test_stamps_slide_embeddings_are_no_bags(tmp_path):
    path = make_stamp(tmp_path / "f", "float32")
    for file in path.iterdir():
        with h5py.File(file, "r+") as h5:
            h5.attrs["feat_type"] = "slide"
    with pytest.raises(UserError, match="embeddings of whole slides"):
        open_features(path)


def test_aems_one_file_has_the_places(tmp_path):
    record = open_features(make_aem(tmp_path / "f", "float16")).record("TCGA-A1.01Z")
    assert np.array_equal(record.require_coords(), grid(1))
    assert record.source == "f.h5"


def test_features_without_coords_are_placeless(tmp_path):
    record = open_features(make_npy(tmp_path / "f", "float32")).record("s1")
    assert (record.coords, record.num_patches) == (None, 5)
    with pytest.raises(UserError, match=r"slide 's1' has no patch coordinates\n  Set data.coords"):
        record.require_coords()


def test_coords_in_a_dict_are_places(tmp_path):
    torch.save({"features": torch.zeros(2, D), "coords": torch.ones(2, 2)}, tmp_path / "a.pt")
    assert open_features(tmp_path).record("a").require_coords().tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32])
def test_other_types_become_float32(tmp_path, dtype):
    torch.save(torch.ones(2, D, dtype=dtype), tmp_path / "a.pt")
    assert open_features(tmp_path).features("a").dtype == torch.float32


def test_tensors_of_an_old_pytorch_are_read(tmp_path):
    tensor = torch.from_numpy(values("a", 3))
    torch.save(tensor, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    store = open_features(tmp_path)
    assert store.num_patches("a") == 3
    assert torch.equal(store.features("a"), tensor)


def test_aems_published_name_says_who_made_the_features(tmp_path):
    file = make_aem(tmp_path / "patch_feats_pretrain_medical_ssl", "float16")
    assert describe_encoder(open_features(file).recipe) == "medical_ssl"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("", "uni", True),
        ("uni", "uni a1", True),  # copied without the note on its weights
        ("uni a1", "uni a1", True),
        ("uni a1", "uni b2", False),
        ("uni", "uni2", False),
        ("uni a1", "uni2 a1", False),
    ],
)
def test_makers_may_be_the_same_as_far_as_both_are_known(one, other, same):
    assert may_be_same(one, other) == may_be_same(other, one) == same


# --- what is bad ---


def refused(store: FeatureFiles, slide: str, *words: str) -> None:
    with pytest.raises(DamagedDataError) as error:
        store.features(slide)
    for word in (f"slide '{slide}'", *words):
        assert word in str(error.value)


def test_nothing_there_and_nothing_known(tmp_path):
    with pytest.raises(UserError, match=r"no features at .*\n  make them with e2e extract"):
        open_features(tmp_path / "nowhere")
    with pytest.raises(UserError, match="found: an empty folder"):
        open_features(tmp_path)
    (tmp_path / "a.txt").touch()
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"no known format \(aem, clam, .*\)\n  found: a.txt, b/"):
        open_features(tmp_path)
    with pytest.raises(UserError, match=r"one file, a\.txt"):
        open_features(tmp_path / "a.txt")


def test_two_formats_in_one_folder_are_named(tmp_path):
    write_trident(tmp_path, "s1", values("s1", 2))
    torch.save(torch.zeros(2, D), tmp_path / "s2.pt")
    with pytest.raises(UserError) as error:
        open_features(tmp_path)
    assert str(error.value).splitlines()[1:3] == ["  plain: 1 slides", "  trident: 1 slides"]


def test_other_h5_files_are_no_features(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        h5["coords"] = grid(3)
    with pytest.raises(UserError, match=r"no known format.*\n  found: a.h5; in the .h5: coords"):
        open_features(tmp_path)


def test_mixed_widths_name_two_slides(tmp_path):
    for slide, width in {"a": 4, "b": 4, "c": 6}.items():
        np.save(tmp_path / f"{slide}.npy", np.zeros((2, width), np.float32))
    store = open_features(tmp_path)
    assert store.num_patches("b") == 2
    for ask in (store.num_patches, store.record, store.features):
        with pytest.raises(UserError, match="slide 'b' has 4, slide 'c' has 6"):
            ask("c")
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "d.npy", np.zeros((1, 6), np.float32))
    other = open_features(tmp_path / "other")
    assert common_width([store]) == 4
    with pytest.raises(UserError, match=r"4 in .*, 6 in "):
        common_width([store, other])


@pytest.mark.parametrize(
    ("make", "attribute"), [(make_trident, "encoder"), (make_stamp, "extractor")]
)
def test_a_slide_of_another_encoder_among_others_is_named(tmp_path, make, attribute):
    path = make(tmp_path / "f", "float32")
    with h5py.File(path / "s2.h5", "r+") as h5:
        (h5["features"] if attribute == "encoder" else h5).attrs[attribute] = "virchow"
    store = open_features(path)
    assert store.num_patches("s1") == 5
    for ask in (store.num_patches, store.record, store.features):
        with pytest.raises(UserError, match=r"in the first file, virchow for slide 's2'"):
            ask("s2")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nan_and_inf_name_slide_and_row(tmp_path, bad, dtype):
    found = values("a", 9, dtype)
    found[6, 1] = found[8, 0] = bad
    np.save(tmp_path / "a.npy", found)
    store = open_features(tmp_path)
    assert store.num_patches("a") == 9
    refused(store, "a", "NaN or Inf, first in row 6 of 9")


@pytest.mark.parametrize("shape", [(0, D), (0,)])
def test_an_empty_bag_counts_nothing_and_is_not_read(tmp_path, shape):
    empty = np.zeros(shape, np.float32)
    write_trident(tmp_path, "a", empty, coords=np.zeros((0, 2)))
    write_trident(tmp_path, "b", values("b", 2))
    store = open_features(tmp_path)
    assert (store.num_patches("a"), store.width, store.record("a").num_patches) == (0, D, 0)
    refused(store, "a", "has no patches")
    (tmp_path / "b.h5").unlink()
    with pytest.raises(UserError, match=r"none of the 1 slides in .* has any patch"):
        _ = open_features(tmp_path).width


@pytest.mark.parametrize("coords", [grid(4), np.zeros((5, 3)), np.zeros(5)])
def test_coords_that_are_not_the_features(tmp_path, coords):
    write_trident(tmp_path, "a", values("a", 5), coords=coords)
    refused(open_features(tmp_path), "a", "5 features but coords of shape")


def test_coords_that_are_no_places(tmp_path):
    write_trident(tmp_path, "a", values("a", 1), coords=np.array([[np.nan, 0]]))
    with pytest.raises(DamagedDataError, match="slide 'a' are not positions in pixels"):
        open_features(tmp_path).record("a")


def test_rows_that_were_never_written_are_told_with_the_first_of_them(tmp_path):
    found = values("a", 9)
    found[4] = 0  # a row of zeros between others is a patch like any
    np.save(tmp_path / "whole.npy", found)
    np.save(tmp_path / "cut.npy", np.where(np.arange(9)[:, None] < 6, found, 0))
    np.save(tmp_path / "empty.npy", np.zeros_like(found))
    store = open_features(tmp_path)
    np.testing.assert_array_equal(store.features("whole"), found)
    refused(store, "cut", "slide 'cut' are all zeros from row 6 of 9 on")
    refused(store, "empty", "from row 0 of 9 on")


@pytest.mark.parametrize("shape", [(2, 3, D), (1, 1, 3, D), ()])
def test_what_is_no_matrix_is_no_bag(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.float32))
    refused(open_features(tmp_path), "a", f"the shape {shape}, need (patches, width)")


@pytest.mark.parametrize("kind", ["trident", "stamp", "clam", "aem"])
def test_what_is_no_hdf5_or_cut_short_names_the_file(tmp_path, kind):
    path = MAKERS[kind][1](tmp_path / "f", "float32")
    files = [path] if path.is_file() else sorted(path.rglob("*.h5"))
    content = files[-1].read_bytes()
    for rubbish in (b"rubbish", content[: len(content) // 2], b""):
        files[-1].write_bytes(rubbish)
        if kind == "aem":
            with pytest.raises(
                DamagedDataError, match=r"f\.h5 is not an HDF5 file, or was cut short"
            ):
                open_features(path)
        else:
            store = open_features(path)  # the others tell the format
            assert store.num_patches("s1") == 5
            slide = files[-1].name.removesuffix(".h5")
            refused(store, slide, str(files[-1]), "cannot be read")
    for file in files:
        file.write_bytes(b"rubbish")
    with pytest.raises(DamagedDataError, match=r"is not an HDF5 file, or was cut short"):
        open_features(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("stolen",)


@pytest.mark.parametrize("name", ["a.pt", "a.npy"])
def test_a_pickle_that_would_run_something_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").mkdir()
    torch.save(torch.zeros(2, D), tmp_path / "f" / "b.pt")
    if name == "a.pt":
        torch.save(Evil(), tmp_path / "f" / name)
    else:
        np.save(tmp_path / "f" / name, np.array([Evil()], object), allow_pickle=True)
    refused(open_features(tmp_path / "f"), "a", "cannot be read")
    assert not (tmp_path / "stolen").exists()


@pytest.mark.parametrize(
    "content", [b"", b"rubbish", pickle.dumps({"a": 1}), pickle.dumps([Evil()], 0)]
)
@pytest.mark.parametrize("suffix", [".pt", ".npy"])
def test_files_that_are_no_arrays_are_refused(tmp_path, monkeypatch, suffix, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"a{suffix}").write_bytes(content)
    refused(open_features(tmp_path), "a", f"a{suffix}", "cannot be read")
    assert not (tmp_path / "stolen").exists()


@pytest.mark.parametrize("content", [{"labels": torch.zeros(2)}, [torch.zeros(2, D)], "text"])
def test_a_pt_without_features_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    refused(open_features(tmp_path), "a", "cannot be read: it ")


def test_a_tensor_file_cut_short_is_refused(tmp_path):
    torch.save(torch.zeros(200, D), tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[:1500])
    refused(open_features(tmp_path), "a", "cannot be read")


def test_a_slide_twice_in_one_folder(tmp_path):
    torch.save(torch.zeros(2, D), tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", np.zeros((2, D)))
    with pytest.raises(UserError, match=r"the same slides as .pt and .npy"):
        open_features(tmp_path)


def test_what_is_not_finished_is_not_seen(tmp_path):
    write_trident(tmp_path, "s1", values("s1", 2))
    (tmp_path / ".s2.h5").write_bytes(b"half")
    assert open_features(tmp_path).slides == ["s1"]


def test_an_archive_with_a_damaged_directory_is_named(tmp_path):
    torch.save(torch.zeros(3, 4), tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    entry = content.index(b"PK\x01\x02")  # the first entry of its directory
    (tmp_path / "b.pt").write_bytes(content[:entry] + b"PK\x09\x09" + content[entry + 4 :])
    reader = open_features(tmp_path)
    assert reader.num_patches("a") == 3
    with pytest.raises(DamagedDataError, match="features of slide 'b' cannot be read"):
        reader.num_patches("b")
