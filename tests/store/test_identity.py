"""A slide in a store is its bytes and its options, not its name; a store is the file that was opened."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from e2e import cli
from e2e.errors import UserError, exit_code
from e2e.runs.feature_folder import FeatureFolder, is_complete, slide_file
from e2e.store.lmdb import PatchStore, StoreWriter
from e2e.store.mpp_table import check_overrides
from e2e.store.pack import pack
from e2e.store.patch_folders import PatchFolders
from tests.helpers.packing import cohort, source, write_slide
from tests.helpers.stores import RECIPE, jpeg, patches, picture, record, write_store


@pytest.fixture
def packed(tmp_path) -> Path:
    """A store of three slides in ``slides/``."""
    folder = cohort(tmp_path / "slides")
    pack(source(folder), tmp_path / "out.lmdb", workers=0)
    return tmp_path


def pack_again(folder: Path, **options):
    return pack(source(folder / "slides", **options), folder / "out.lmdb", workers=0)


# --- packing ---


def test_a_slide_that_was_scanned_anew_under_its_old_name_is_refused_by_name(packed):
    before = (packed / "out.lmdb").read_bytes()
    write_slide(packed / "slides" / "s1.tif", seed=99)
    with pytest.raises(
        UserError, match=r"1 slide\(s\) in the store were cut from other files"
    ) as error:
        pack_again(packed)
    assert "s1: " in str(error.value)
    assert "s0: " not in str(error.value)
    assert (packed / "out.lmdb").read_bytes() == before


def test_a_slide_of_another_resolution_override_is_refused_by_name(packed):
    with pytest.raises(UserError, match=r"--mpp-override\n  s2: "):
        pack_again(packed, mpp={"s2": 2.0})
    assert not pack_again(packed).problems


def test_a_slide_that_was_copied_or_touched_is_the_same(packed):
    shutil.move(packed / "slides", packed / "elsewhere")
    shutil.copytree(packed / "elsewhere", packed / "slides", copy_function=shutil.copyfile)
    os.utime(packed / "slides" / "s0.tif", (1, 1))
    write_slide(packed / "slides" / "s3.tif", seed=3)
    assert [row.slide for row in pack_again(packed).packed] == ["s0", "s1", "s2", "s3"]


def test_a_slide_of_a_store_without_identities_is_known_by_its_size(packed):
    shutil.move(packed / "out.lmdb", packed / "new.lmdb")
    store, old = PatchStore(packed / "new.lmdb"), packed / "out.lmdb"
    with StoreWriter(old, store.recipe) as writer:
        for slide in store.slides:
            without = dataclasses.replace(store.record(slide), identity="")
            writer.add(without, store.read(slide, range(without.num_patches)))
    assert len(pack_again(packed).packed) == 3
    with (packed / "slides" / "s1.tif").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="s1: "):
        pack_again(packed)


def test_a_folder_of_patches_is_known_by_its_files(tmp_path):
    for slide in ("a", "b"):
        (tmp_path / "patches" / slide).mkdir(parents=True)
        for k in range(3):
            (tmp_path / "patches" / slide / f"{k}.jpg").write_bytes(jpeg(k))
    out = tmp_path / "out.lmdb"
    folders = PatchFolders(tmp_path / "patches")
    assert len(pack(folders, out, workers=0).packed) == 2
    assert len(pack(folders, out, workers=0).packed) == 2
    (tmp_path / "patches" / "b" / "1.jpg").write_bytes(jpeg(77))
    with pytest.raises(UserError, match=r"1 slide\(s\)(?s:.*)  b: "):
        pack(PatchFolders(tmp_path / "patches"), out, workers=0)


# --- resolutions given by hand ---


def test_an_override_that_names_no_slide_is_an_error_with_the_nearest_name(tmp_path):
    slides = [tmp_path / "TCGA-01.svs", tmp_path / "TCGA-02.svs"]
    check_overrides({"TCGA-01": 0.5, "TCGA-02.svs": 0.25}, slides)
    with pytest.raises(
        UserError, match=r"2 row\(s\) name no slide\n  'TCGA-O1'; did you mean 'TCGA-01'"
    ):
        check_overrides({"TCGA-O1": 0.5, "other": 0.25, "TCGA-02": 0.25}, slides)


@pytest.mark.parametrize("source", ["--slides", "--patches", "--coords"])
def test_every_way_to_pack_looks_at_the_overrides(packed, source):
    (packed / "mpp.csv").write_text("slide,mpp\ns9,0.25\n")
    (packed / "slides" / "s0").mkdir()
    words = ["pack", source, packed / "slides", "--out", packed / "x.lmdb"]
    words += ["--mpp-override", packed / "mpp.csv", "--patch-size", "32"]
    words += ["--slides", packed / "slides"] if source == "--coords" else []
    assert exit_code(lambda: cli.run([str(word) for word in words])) == 2
    assert not (packed / "x.lmdb").exists()


# --- pixels ---


def test_grey_images_of_16_bits_keep_their_brightness(tmp_path):
    (tmp_path / "patches" / "a").mkdir(parents=True)
    values = np.full((32, 32), 171 * 257, np.uint16)
    Image.fromarray(values).save(tmp_path / "patches" / "a" / "0.png")
    pack(PatchFolders(tmp_path / "patches"), tmp_path / "out.lmdb", workers=0)
    stored = Image.open(io.BytesIO(PatchStore(tmp_path / "out.lmdb").read("a", [0])[0]))
    assert np.asarray(stored).mean() == pytest.approx(171, abs=1)


def test_an_image_of_another_format_behind_a_png_name_is_refused(tmp_path):
    (tmp_path / "patches" / "a").mkdir(parents=True)
    (tmp_path / "patches" / "b").mkdir()
    picture(1).save(tmp_path / "patches" / "a" / "0.png", format="TIFF")
    picture(1).save(tmp_path / "patches" / "b" / "0.png")
    report = pack(PatchFolders(tmp_path / "patches"), tmp_path / "out.lmdb", workers=0)
    assert [row.slide for row in report.packed] == ["b"]
    assert "cannot be read as an image" in report.problems[0].reason


def test_a_first_image_that_claims_a_huge_size_does_not_end_the_pack(tmp_path):
    for slide in "ab":
        (tmp_path / "patches" / slide).mkdir(parents=True)
        (tmp_path / "patches" / slide / "0.jpg").write_bytes(jpeg(1))
    bomb = bytearray(jpeg(1))
    start = bomb.index(b"\xff\xc0") + 5
    bomb[start : start + 4] = struct.pack(">HH", 65500, 65500)
    (tmp_path / "patches" / "a" / "0.jpg").write_bytes(bomb)
    report = pack(PatchFolders(tmp_path / "patches"), tmp_path / "out.lmdb", workers=0)
    assert [row.slide for row in report.packed] == ["b"]
    assert "cannot be read as an image" in report.problems[0].reason


# --- features ---


def test_features_of_a_slide_that_was_cut_anew_are_computed_again(tmp_path):
    folder = FeatureFolder(tmp_path, 20.0, 32, 0, "r18")
    old = record("a", 5, identity="first scan")
    file = tmp_path / "a.h5"
    file.write_bytes(slide_file(torch.zeros(5, 8), old, folder))
    assert is_complete(file, old)
    assert not is_complete(file, record("a", 6, identity="first scan"))
    assert not is_complete(file, record("a", 5, identity="second scan"))
    moved = record("a", 5, identity="first scan", coords=old.require_coords() + 1)
    assert not is_complete(file, moved)
    assert not is_complete(
        file, record("a", 5, identity="first scan", coords=np.zeros((5, 2), np.int32))
    )


# --- the open file ---


def write_other_store(path: Path, slides: list[str]) -> None:
    """The same slides in another order: their numbers, and so the keys of their patches, differ."""
    with StoreWriter(path, RECIPE) as writer:
        for slide in slides:
            writer.add(record(slide, 4), patches(slide, 4))


def test_a_store_replaced_under_a_reader_stays_the_one_that_was_opened(tmp_path):
    path = tmp_path / "a.lmdb"
    store = write_store(path, {"a": 4, "b": 4})
    write_other_store(tmp_path / "b.lmdb", ["c", "b", "a"])
    (tmp_path / "b.lmdb").replace(path)
    for slide in ("a", "b"):
        assert store.read(slide, range(4)) == patches(slide, 4)
    path.unlink()
    assert store.read("b", [3]) == patches("b", 4)[3:]


def read_in_a_fork(store: PatchStore) -> str:
    """What a forked process gets: its message, or the patches of slide b as they are."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = "same" if store.read("b", range(4)) == patches("b", 4) else "OTHER PATCHES"
        except UserError as error:
            text = str(error)
        os.write(writer, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with open(reader, closefd=True) as pipe:
        return pipe.read()


def test_another_process_reads_the_same_store_or_says_that_it_has_changed(tmp_path):
    path = tmp_path / "a.lmdb"
    store = write_store(path, {"a": 4, "b": 4})
    assert read_in_a_fork(store) == "same"
    shutil.copy(path, tmp_path / "copy.lmdb")
    (tmp_path / "copy.lmdb").replace(path)  # another file with the same content
    assert read_in_a_fork(store) == "same"
    write_other_store(tmp_path / "b.lmdb", ["b", "a", "c"])
    (tmp_path / "b.lmdb").replace(path)
    message = read_in_a_fork(store)
    assert f"{path} has changed since it was opened: 2 slide(s) are not what they were" in message
    path.unlink()
    assert f"{path} cannot be read: No such file" in read_in_a_fork(store)


def test_a_store_that_is_overwritten_in_place_is_noticed(tmp_path):
    path = tmp_path / "a.lmdb"
    store = write_store(path, {"a": 4, "b": 4})
    write_other_store(tmp_path / "b.lmdb", ["b", "a"])
    content = (tmp_path / "b.lmdb").read_bytes()
    assert len(content) == path.stat().st_size
    with path.open("r+b") as file:  # as `cp other.lmdb store.lmdb` does
        file.write(content)
    with pytest.raises(UserError):
        store.read("a", range(4))


# --- bit rot ---


@pytest.mark.parametrize("seed", range(3))
def test_no_flipped_bit_of_a_patch_goes_unnoticed(tmp_path, seed):
    path = tmp_path / "a.lmdb"
    write_store(path, {"a": 6})
    content, expected = path.read_bytes(), patches("a", 6)
    rng = np.random.default_rng(seed)
    for _ in range(50):
        index = int(rng.integers(6))
        damaged = bytearray(expected[index])
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        flipped = content.replace(expected[index], damaged)  # LMDB leaves copies on free pages
        copy = tmp_path / "flipped.lmdb"
        copy.unlink(missing_ok=True)
        copy.write_bytes(flipped)
        store = PatchStore(copy)
        assert store.read("a", [k for k in range(6) if k != index])
        for _ in range(2):  # a faulty patch stays faulty
            with pytest.raises(UserError, match=f"patch {index} is not as it was packed"):
                store.read("a", [index])
        assert PatchStore(copy, verify=False).read("a", [index])[0] != expected[index]


def test_a_patch_is_compared_once(tmp_path, monkeypatch):
    store = write_store(tmp_path / "a.lmdb", {"a": 6})
    compared = []
    monkeypatch.setattr(
        "e2e.store.lmdb.deflate_crc32", lambda jpeg: compared.append(1) or zlib.crc32(jpeg)
    )
    for indices in ([1, 2], [2, 1], [2, 3], range(6), range(6)):
        store.read("a", indices)
    assert len(compared) == 2 + 2 + 6  # of a request with something new, all
